"""The sections of a report, each in a file of its own.

A section has TITLE, `collect(run)` -> its numbers as JSON values, and `show(runs, …)` -> its part of the page, or None
where there is nothing to show.
"""
