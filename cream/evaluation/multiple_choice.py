"""The options inside a multiple choice question: an item of CREAM's data carries them in its text."""

import re

OPTION_LINE = re.compile(r"^[ \t]*(?:\(([A-H1-9])\)|([A-H1-9])[.):])[ \t]+(\S(?:.*[^ \t\n])?)[ \t]*$", re.MULTILINE)
OPTION_INLINE = re.compile(
    r"(?<!\S)\(?([A-H1-9])\)[ \t]+(\S.*?)(?<![ \t])(?=[ \t]+\(?[A-H1-9]\)[ \t]|[ \t]*$)", re.MULTILINE
)


def options_of(question: str) -> dict[str, str]:
    """Label -> text of the options inside a question, in order; {} when it has none.

    Options are lines ("A. oxygen", "B) neon", "(C) helium", "4: argon"), or follow each other on one line ("A) Tom B)
    Mary C) same"). They run from A or 1 without a gap, at least two of them; of several such runs the last is taken.
    """
    return split_question(question)[1]


def split_question(question: str) -> tuple[str, dict[str, str]]:
    """(what is asked, without the line break or blank before its options; the options, as `options_of` gives them)."""
    for pattern in (OPTION_LINE, OPTION_INLINE):
        start, options = _last_run(list(pattern.finditer(question)))
        if options:
            before = question[:start]
            return (before[:-1] if before[-1:] in ("\n", " ") else before), options
    return question, {}


def _last_run(found: list[re.Match]) -> tuple[int, dict[str, str]]:
    """Where the last run of two options or more starts, and its options; (0, {}) without one."""
    runs: list[tuple[int, dict[str, str]]] = []
    for match in found:
        *labels, text = match.groups()
        label = next(filter(None, labels))
        if label in ("A", "1"):
            runs.append((match.start(), {label: text}))
        elif runs and label == chr(ord(next(reversed(runs[-1][1]))) + 1):
            runs[-1][1][label] = text
    return next((run for run in reversed(runs) if len(run[1]) > 1), (0, {}))
