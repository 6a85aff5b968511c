"""Evaluation: what is asked (tasks), what a response answers (answers), how sure the numbers are (statistics)."""
