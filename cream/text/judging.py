"""A judge's form: the request for its verdict on a response, and the verdict in the text that it wrote.

The request quotes texts by others, which must not be able to end it. Two things could: the line of the template that
follows a quoted text (`</response>`, say), which is broken up by a backslash where the text has it, and a special token
written out, which `Chat` with `literal` breaks up alike. The verdict is looked for in the judge's own text only, so
that a score in the response is none.
"""

import importlib.util
import math
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

import regex

from cream.errors import UserError, nearest
from cream.records import Message
from cream.text.judge_prompts import JUDGE_PROMPTS, JudgePrompt
from cream.text.templates import check_numbers, limit_rendering, probe_in_subprocess
from cream.text.valid_scores import bounds_of, is_valid

FLAG = "--judge_prompt FILE"
NAMES = ("prompt", "response", "response_a", "response_b")  # of a template's variables
LETTERS = ("A", "B")
HOLE = re.compile(r"\{\{-?\s*reward\s*-?\}\}")
MARKS = r"""[\s*_`"'<(\[]*"""  # that a judge may write before its verdict: **4**, <4>, [[A]]
NUMBER = MARKS + r"([-+]?\d+(?:\.\d+)?)(?!\d)"
LETTER = MARKS + r"([AB])(?!\w|\s*(?:or|/)\s*[AB]\b)"  # "A or B" is no choice
AFTER = re.compile(r"\{\{-?\s*(?:" + "|".join(NAMES) + r")\b[^{}]*\}\}(?:\s*\{%[^{}]*%\})*([^{]*)")
SHORT = 3  # characters; shorter text after a quoted one does not mark its end
TAIL = 20_000  # characters at the end of a judge's text that are searched
PATIENCE = 0.5  # seconds for a search in one text
MOST = 101  # admissible scores

NO_SCORE = "no score in the judge's text"
NOT_VALID = "the judge's score is not a valid one"
SLOW = "--judge_parse takes too long on the judge's text"
FAILED = "--judge_parse failed on the judge's text"


class Verdict(NamedTuple):
    """A score, or 1 for the choice of response A and 0 for B; None with the reason."""

    value: float | None
    reason: str | None = None


@dataclass(frozen=True)
class Form:
    """A judge prompt as --judge_prompt, --judge_parse and --valid_reward give it; `read_form` makes a checked one."""

    name: str
    template: str
    parse: str
    valid: str | None

    @cached_property
    def variables(self) -> frozenset[str]:
        """The variables that the template reads."""
        from jinja2 import meta

        environment = _compile(self.template).environment
        return frozenset(meta.find_undeclared_variables(environment.parse(self.template)) - {*environment.globals})

    @property
    def pairwise(self) -> bool:
        """Whether the judge compares two responses."""
        return "response_a" in self.variables

    def ask(self, prompt: Sequence[Message], *responses: str) -> list[Message]:
        """The request for a verdict on a response, or on two in this order."""
        if not self.variables:
            return [*prompt, Message("assistant", responses[0]), Message("user", self._render({}))]
        names = ("response_a", "response_b") if self.pairwise else ("response",)
        texts = {"prompt": conversation_text(prompt)} | dict(zip(names, responses, strict=True))
        return [Message("user", self._render({name: self._fenced(text) for name, text in texts.items()}))]

    def _render(self, texts: dict[str, str]) -> str:
        with limit_rendering(f"--judge_prompt {self.name}", FLAG):
            return _compile(self.template).render(**texts)

    def _fenced(self, text: str) -> str:
        """A text that has none of the template's lines that follow a quoted text."""
        return _closings(self.template).sub(lambda found: f"{found[0][0]}\\{found[0][1:]}", text)

    def read(self, text: str, truncated: bool = False) -> Verdict:
        """The verdict in a judge's text, without its thought: its last match of --judge_parse. One at the very end of a
        truncated text may be cut, and is none."""
        found, reason = _reader(self.parse, self.pairwise)(text, truncated)
        return Verdict(None, reason) if found is None else self._verdict(found)

    def _verdict(self, found: object) -> Verdict:
        """What --judge_parse found, as a verdict."""
        if self.pairwise:
            return Verdict(1.0 - LETTERS.index(found)) if found in LETTERS else Verdict(None, NOT_VALID)
        try:
            value = float(found)
        except (TypeError, ValueError, OverflowError):
            return Verdict(None, NOT_VALID)
        if not math.isfinite(value) or not is_valid(self.valid, value):
            return Verdict(None, NOT_VALID)
        return Verdict(value)

    def cut(self, text: str, score: float) -> str:
        """A judge's text without what follows the line where it says its score, the last such one; all of it where the
        score has no place in it."""
        if parse_file(self.parse):
            return text
        ends = []
        with suppress(TimeoutError):
            for found in _pattern(self.parse, self.pairwise).finditer(text, timeout=PATIENCE):
                ends += [found.end()] if self._verdict(found[1]).value == score else []
        return text[: ends[-1]] + text[ends[-1] :].partition("\n")[0] if ends else text

    @property
    def scores(self) -> tuple[int, ...]:
        """The admissible scores: the whole numbers in the valid range. Raises UserError where they are not few."""
        bounds = bounds_of(self.valid or "")
        if bounds is not None and all(map(math.isfinite, bounds)):
            low, high = math.ceil(bounds[0]), math.floor(bounds[1])
            if 1 <= high - low < MOST:
                return tuple(range(low, high + 1))
        raise UserError(
            "--judge_mode expected needs the admissible scores: --valid_reward LOW:HIGH, such as 0:5, with 2 to "
            f"{MOST} whole numbers in it; it is {self.valid or 'none'}"
        )

    @property
    def continuations(self) -> list[str]:
        """The texts that state the admissible verdicts, as the judge would begin its turn with them: "Score: 0" …"""
        if not (hole := HOLE.search(self.parse)):
            raise UserError(
                "--judge_mode expected needs a --judge_parse that says where the score stands, such as "
                f"'Score: {{{{ reward }}}}'; it is {self.parse!r}"
            )
        lead = self.parse[: hole.start()]
        return [f"{lead}{verdict}" for verdict in (LETTERS if self.pairwise else self.scores)]


def read_form(prompt: str, parse: str | None, valid: str | None) -> Form:
    """The form by the flags: `prompt` is a name or a file; `parse` and `valid` replace what a named one has.

    Raises UserError for a template that cannot be used, a pattern without exactly one group, and a senseless range.
    """
    _reader.cache_clear()  # a function's file may have changed since an earlier run of this process
    named = JUDGE_PROMPTS.get(prompt) or JudgePrompt(_read_template(Path(prompt)), parse or "", None)
    form = Form(prompt, named.template, parse or named.parse, valid or named.valid)
    if not form.parse:
        raise UserError(
            f"--judge_prompt {prompt}: a template of your own needs --judge_parse: the text around its score, such as "
            "'Score: {{ reward }}', a pattern with a group, or path.py:function"
        )
    if prompt not in JUDGE_PROMPTS:
        _check_template(form)
    if form.pairwise and form.valid is not None:
        raise UserError("--valid_reward does not apply to a pairwise judge, which chooses A or B")
    _reader(form.parse, form.pairwise)
    if form.valid is not None:
        is_valid(form.valid, 0.0)
    return form


def parse_file(parse: str | None) -> Path | None:
    """The file of a Python function that --judge_parse names, None where it is something else."""
    found = re.fullmatch(r"(.+\.py):(\w+)", parse or "")
    return Path(found[1]) if found else None


def conversation_text(messages: Sequence[Message]) -> str:
    """A prompt as a judge reads it: a single user's turn as it is, of a longer one each turn after its role."""
    if len(messages) == 1:
        return messages[0].content
    return "\n\n".join(f"{message.role.capitalize()}: {message.content}" for message in messages)


# Templates ------------------------------------------------------------------------------------------------------------


def _compile(template: str):
    from transformers.utils.chat_template_utils import _compile_jinja_template  # sandboxed; it caches what it compiles

    return _compile_jinja_template(template)


def _read_template(path: Path) -> str:
    if not path.is_file():
        raise UserError(
            f"--judge_prompt {path}: neither a file, nor one of {', '.join(JUDGE_PROMPTS)}"
            f"{nearest(str(path), JUDGE_PROMPTS)}"
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"--judge_prompt {path}: is not UTF-8 text") from None


def _check_template(form: Form) -> None:
    """Raises UserError unless the template quotes a response, or two, and renders within its limits."""
    from jinja2 import TemplateError

    where = f"--judge_prompt {form.name}"
    try:
        variables = form.variables
    except (TemplateError, RecursionError) as error:
        raise UserError(f"{where}: is not a Jinja template: {error}") from None
    if odd := sorted(variables - {*NAMES}):
        raise UserError(
            f"{where}: has no value for {{{{ {odd[0]} }}}}{nearest(odd[0], NAMES)}; it may use {', '.join(NAMES)}"
        )
    if variables & {*NAMES[1:]} not in ({"response"}, {"response_a", "response_b"}):
        raise UserError(
            f"{where}: the judge would not see what it judges: the template needs {{{{ response }}}}, or both "
            "{{ response_a }} and {{ response_b }} to compare two"
        )

    def probe() -> None:
        form.ask([Message("user", "What is 2 + 3?")], *["5"] * (1 + form.pairwise))

    check_numbers(form.template, where, FLAG)
    probe_in_subprocess(probe, where, FLAG)
    try:
        probe()
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise UserError(f"{where}: the template fails on a test conversation: {error}") from None


@cache
def _closings(template: str) -> re.Pattern:
    """A pattern of the lines that follow quoted texts, in any case and with any spaces between their characters."""
    after = (literal.strip().partition("\n")[0] for literal in AFTER.findall(template))
    lines = {"".join(line.split())[:80] for line in after}
    patterns = [r"\s*".join(map(re.escape, line)) for line in sorted(lines) if len(line) >= SHORT]
    return re.compile("|".join(patterns) or "(?!)", re.IGNORECASE)


# Verdicts -------------------------------------------------------------------------------------------------------------


@cache
def _reader(parse: str, pairwise: bool) -> Callable[[str, bool], tuple[object, str | None]]:
    """(text, truncated) -> what --judge_parse finds in it, or None and why. Raises UserError for one that cannot be
    used."""
    if path := parse_file(parse):
        return _call(_load_function(path, parse.rpartition(":")[2]), parse)
    return _search(_pattern(parse, pairwise))


@cache
def _pattern(parse: str, pairwise: bool) -> regex.Pattern:
    """--judge_parse, a template or a regular expression, as a pattern. Raises UserError if it cannot be used."""
    if "{{" in parse:
        around = HOLE.split(parse)
        if len(around) != 2 or "{{" in "".join(around):
            raise UserError(f"--judge_parse {parse!r}: a template has {{{{ reward }}}} once and nothing else in braces")
        before, after = (r"\s*".join(map(re.escape, re.split(r"\s+", part))) for part in around)
        parse = before + (LETTER if pairwise else NUMBER) + after
    try:
        pattern = regex.compile(parse)
    except (regex.error, RecursionError) as error:
        raise UserError(f"--judge_parse {parse!r}: is not a regular expression: {error}") from None
    if pattern.groups != 1 and parse.endswith(".py"):
        raise UserError(f"--judge_parse {parse}: which function of this file? Give {parse}:NAME")
    if pattern.groups != 1:
        raise UserError(
            f"--judge_parse {parse!r}: has {pattern.groups} groups, expected one around the score: 'Score: (\\d+)', say"
        )
    return pattern


def _search(pattern) -> Callable[[str, bool], tuple[str | None, str | None]]:
    def read(text: str, truncated: bool) -> tuple[str | None, str | None]:
        text, last = text[-TAIL:], None
        try:
            for found in pattern.finditer(text, timeout=PATIENCE):
                if found[1] is not None and not (truncated and text[found.end(1) :] in ("", ".")):
                    last = found[1]
        except TimeoutError:
            return None, SLOW
        return last, None if last is not None else NO_SCORE

    return read


def _call(function: Callable[[str], object], name: str) -> Callable[[str, bool], tuple[object, str | None]]:
    def read(text: str, truncated: bool) -> tuple[object, str | None]:
        try:
            found = function(text)
        except (Exception, SystemExit) as error:  # the texts are kept, and this one has no score
            return None, f"{FAILED}: {type(error).__name__}"
        return found, NO_SCORE if found is None else None

    return read


def _load_function(path: Path, name: str) -> Callable[[str], object]:
    """A user's own function. This runs the file."""
    if not path.is_file():
        raise UserError(f"--judge_parse {path}:{name}: there is no such file")
    spec = importlib.util.spec_from_file_location("judge_parse", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"--judge_parse {path}: cannot be run: {type(error).__name__}: {error}") from None
    if not callable(function := getattr(module, name, None)):
        raise UserError(f"--judge_parse {path}:{name}: the file has no function of this name")
    return function
