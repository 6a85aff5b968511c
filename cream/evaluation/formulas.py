"""Answers that are formulas (roots, ratios, tuples, intervals, polynomials), compared by math-verify.

math-verify 0.9 is the grader of --grader math; what it is given is chosen here: a single formula, since it would join
boxes that stand close to each other to a set. It takes both 50 and 0.5 for 50 %, (2, 3) for the interval and the point,
10:30 for 1/3, and an equation for its right side.
"""

from __future__ import annotations

import logging
import re
import threading
from functools import lru_cache

from cream.errors import UserError
from cream.evaluation.answers import MARKER, first_answer

PACKAGE = "math-verify==0.9.0"
SECONDS = 10  # for one formula; what takes longer is not equal. Outside the main thread there is no limit
MOST = 1000  # characters of a formula
WORDS = re.compile(r"(?<![\\A-Za-z{])(?!(?:sin|cos|tan|cot|sec|csc|log|exp|sqrt|frac|arc\w+|infinity)\b)[A-Za-z]{3,}")
IN_TEXT = re.compile(r"\\(?:text(?:bf|rm|it)?|mathrm|operatorname|mbox)\s*\{[^{}]*\}")
DELIMITED = re.compile(r"\$\$?(.+?)\$\$?|\\\(((?:(?!\\\().)+?)\\\)|\\\[((?:(?!\\\[).)+?)\\\]", re.DOTALL)
ANSWER_MARK = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL | re.IGNORECASE)


def is_formula(label: str) -> bool:
    """Whether a label can be compared: math-verify reads it, and it holds no word outside \\text{}."""
    return not _has_words(label) and any(not isinstance(part, str) for part in _parse(label))


def grade_formula(label: str, response: str) -> tuple[str, bool]:
    """(the formula that a response answers with, as sympy writes it, or "none"; whether it equals the label)."""
    formula = extract_formula(response)
    parsed = _parse(formula) if formula else ()
    if not parsed:
        return "none", False
    from math_verify import verify

    return str(parsed[0]), verify([*_parse(label)], [*parsed], timeout_seconds=_seconds(), raise_on_error=False)


def extract_formula(text: str) -> str | None:
    """The formula that a text gives as its answer, as LaTeX: that of the last box, else after the last marker or, where
    there is none, the last one in dollar signs. Where a marker leads to none, the one before it is asked."""
    return first_answer(text, _formula)


def _formula(text: str) -> str | None:
    if marked := ANSWER_MARK.findall(text):
        text = f"Answer: {marked[-1].strip()}"
    end, markers = len(text), list(MARKER.finditer(text))
    for marker in reversed(markers):
        if formula := _after(text, marker, end):
            return formula
        end = marker.start()
    return None if markers else _delimited(text)


def _after(text: str, marker: re.Match, end: int) -> str | None:
    """The formula after a marker: in its braces, else in the next line, or in the lines that \\[ or $$ opens there."""
    if marker[0].endswith("{"):
        return _balanced(text, marker.end()).strip() or None  # math-verify leaves units aside
    after = text[marker.end() : end].lstrip(" \t\n*`#:_")
    if "box" in marker[0]:
        return next(iter(after.split()), "").rstrip("$.") or None
    line = next(iter(after.splitlines()), "").rstrip(" \t.*`_:")
    if line in (r"\[", r"\(", "$$", "$"):
        block = DELIMITED.match(after)
        return block and _delimited(block[0])
    return _delimited(line) or _without_words(line)


def _delimited(text: str) -> str | None:
    found = [next(filter(None, groups)).strip() for groups in DELIMITED.findall(text)]
    return next(filter(_without_words, reversed(found)), None)


def _without_words(formula: str) -> str | None:
    return None if _has_words(formula) else formula.strip() or None


def _has_words(formula: str) -> bool:
    return bool(WORDS.search(IN_TEXT.sub(" ", formula)))


def _balanced(text: str, start: int) -> str:
    """The text up to the brace that closes the one before `start`; all of it if none does."""
    depth = 1
    for brace in re.finditer(r"(?<!\\)[{}]", text[start:]):
        depth += 1 if brace[0] == "{" else -1
        if not depth:
            return text[start : start + brace.start()]
    return text[start:]


@lru_cache(maxsize=4096)
def _parse(formula: str) -> tuple:
    """What math-verify reads in a formula: the expression, and its text. Raises UserError if it is not installed."""
    try:
        from math_verify import LatexExtractionConfig, parse
    except ImportError:
        raise UserError(f"--grader math needs math-verify: pip install {PACKAGE}") from None
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it logs what it cannot read
    if len(formula) > MOST:
        return ()
    how = {"parsing_timeout": _seconds(), "raise_on_error": False}
    return tuple(parse(f"${formula}$", [LatexExtractionConfig()], **how))


def _seconds() -> int | None:
    """math-verify's limit is a signal, which reaches the main thread only."""
    return SECONDS if threading.current_thread() is threading.main_thread() else None
