"""The signs that a process reward model gives to the steps of many responses: the worker of such passes.

The model is a language model, and a step's probability that of "+" against "-" where its sign stands
(cream/text/steps.py). All steps of all responses to a prompt are one tree.
"""

import logging
from collections import Counter
from collections.abc import Callable, Container, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from cream.scoring.cache import SIGNS
from cream.scoring.driver import Model
from cream.scoring.logprobs import Options, Scorer, arguments, chunk_of
from cream.text.rendering import Refused
from cream.text.steps import Signs

log = logging.getLogger("cream")
__all__ = ["Options", "chunk_of"]  # as the log-probability worker has them, with those below

CACHED = SIGNS  # of what the score cache has of its results


@dataclass(slots=True)
class StepGroup:
    """A prompt's responses, each as its steps. `cached` and `sampled` as in logprobs.Group."""

    uuid: str
    prompt: list
    steps: list[list[str]]
    cached: dict[str, list[float]] = field(default_factory=dict)
    sampled: None = None


@dataclass(slots=True)
class Signed:
    """A group's signs: per response the log-odds of + against - of each step, or None; why it has none. The rest as in
    logprobs.Scored."""

    log_odds: list[list[float] | None]
    reason: list[str | None]
    computed: dict[str, list] = field(default_factory=dict, compare=False)
    sources: Counter[str] = field(default_factory=Counter, compare=False)


class Reader(Scorer):
    """A pool's worker, as Scorer: the language model in a folder, its chat with these signs."""

    def __init__(self, signs: Signs, *arguments):
        super().__init__(*arguments)
        self._encoder, self.signs = signs, signs.tokens

    def _score(self, groups: list[StepGroup]) -> list[Signed]:
        return [_by_response(group, rows) for group, rows in zip(groups, super()._score(groups), strict=True)]

    def _encode(self, group: StepGroup) -> tuple[list, list[str | None]]:
        """The rows of all responses, one after the other, None for one without any; and the reasons for None."""
        rows, reasons = [], []
        for steps in group.steps:
            try:
                found = self._encoder.encode(group.prompt, steps, self.limit)
            except Refused as error:
                found = str(error)
            refused = isinstance(found, str)
            rows += [None] if refused else found
            reasons += [found] if refused else [None] * len(found)
        return rows, reasons

    def _result(self, rows: list, values: list, reasons: list, computed: dict, sources: Counter) -> Signed:
        return Signed(values, reasons, computed, sources)


def _by_response(group: StepGroup, rows: Signed) -> Signed:
    """The signs of each response, of those of its rows: as many as it has steps."""
    values, odds, reasons = zip(rows.log_odds, rows.reason, strict=True), [], []
    for steps in group.steps:
        own, why = next(values)
        found = own or []
        while why is None and len(found) < len(steps):
            own, why = next(values)
            found = found + (own or [])
        odds.append(None if why else found)
        reasons.append(why)
    return Signed(odds, reasons, rows.computed, rows.sources)


def setup(model: Model, options: Options, chunk: int, done: Container[str] = ()) -> Callable[[str], Reader]:
    return partial(Reader, Signs(model.chat), *arguments(model, options), chunk, model.pool.group)


def as_row(signed: Signed, chat=None) -> dict:
    return {"log_odds": signed.log_odds, "reason": signed.reason}


def from_row(row: dict, group: StepGroup) -> Signed | None:
    return Signed(**row) if len(row["log_odds"]) == len(group.steps) else None


def show_first(model: Model, groups: Iterable[StepGroup], options: Options) -> None:
    signs, limit = Signs(model.chat), model.limit(options.max_length)
    for group in groups:
        for steps in group.steps:
            with suppress(Refused):
                if not isinstance(rows := signs.encode(group.prompt, steps, limit), str):
                    shown = "\n".join(map(model.chat.show, rows))
                    log.info("first response as the model sees it, its signs marked:\n%s", shown)
                    return
