"""The keys of a loop file (docs/loops.md)."""

from math import isfinite
from pathlib import Path
from typing import Annotated, Literal, TypedDict

import msgspec

from cream.cli.flags import is_plain

Value = str | int | float | bool | None
Flags = dict[str, Value]
BEST = "best"  # ${best} in `after`, and the link in output_dir: the model of the best round


class Rounds(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A value for round 1 and one for all later rounds."""

    first: Value
    then: Value


RoundFlags = dict[str, Value | list[Value] | Rounds]  # a list has one value for each round


class Step(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """One stage: `script` with `flags`.

    `words`: words before the flags, the command of prepare_data.py and its files. `output`: name of the output,
    by default the id, after `round<t>.` in a repeated step. `shared`: whether the output lies in the loop's base_dir,
    where other loops find it. `title`: what the log calls the step.
    """

    id: str
    script: str
    flags: RoundFlags = {}
    words: list[str] = []
    output: str | None = None
    shared: bool | Rounds = False
    title: str | None = None


class Keep(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """Which round's model is the loop's result: the one with the best `metric`, the first of equal ones.

    `metric`: id of a step of `repeat`, and optionally which of its facts (cream/loops/facts.py); `start`: the same of
    the model before round 1, which may be the best as well. `patience`: the loop stops after so many evaluated rounds
    without a new best. `roll_back`: a round after one that is not a new best starts from the best one. `register`: name
    of the result in configs/checkpoint.json.
    """

    metric: str
    mode: Literal["max", "min"] = "max"
    start: str | None = None
    patience: Annotated[int, msgspec.Meta(ge=1)] | None = None
    roll_back: bool = False
    register: Annotated[str, msgspec.Meta(min_length=1)] | None = None


class Bound(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Where a fact ends the loop: `below` or `above` a number, or further than the share `drift` from round 1's."""

    below: float | None = None
    above: float | None = None
    drift: Annotated[float, msgspec.Meta(gt=0)] | None = None

    def __post_init__(self):
        given = [bound for bound in (self.below, self.above, self.drift) if bound is not None]
        if not given or not all(map(isfinite, given)):
            raise ValueError("expected `below`, `above` or `drift`, each with a number")


class Steering(TypedDict, total=False):
    """The keys of a loop by which it decides while it runs."""

    keep: Keep | None
    eval_every: int
    stop_if: dict[str, Bound]


class Loop(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Steps that run once `before` the rounds, in every round (`repeat`), and once `after` them.

    `start`: id of a repeated step -> its output before round 1. `flags`: id of a step -> flags put over its own; a null
    takes a flag away. `fresh`: ids of steps whose data must be another set in every round. `eval_every`: evaluations
    of `repeat` run in every so many rounds, and in the last one. `stop_if`: fact, as in `Keep.metric`, -> where it ends
    the loop.
    """

    title: str
    model: str
    output_dir: str
    base_dir: str | None = None
    seed: int = 0
    rounds: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 1
    before: list[Step] = []
    repeat: list[Step] = []
    after: list[Step] = []
    start: dict[str, str | None] = {}
    flags: dict[str, RoundFlags] = {}
    fresh: list[str] = []
    keep: Keep | None = None
    eval_every: Annotated[int, msgspec.Meta(ge=1)] = 1
    stop_if: dict[str, Bound] = {}

    def __post_init__(self):
        check_texts(self.title, self.model, self.output_dir, *([] if self.base_dir is None else [self.base_dir]))

    def steps(self) -> list[Step]:
        """All steps, each once."""
        return [*self.before, *self.repeat, *self.after]

    @property
    def steered(self) -> bool:
        """Whether anything is decided while it runs."""
        return bool(self.keep or self.stop_if)

    @property
    def best(self) -> Path:
        """The link to the model of the best round."""
        return Path(self.output_dir, BEST)

    def flags_of(self, step: Step) -> RoundFlags:
        """A step's flags with those of the loop put over them."""
        return {**step.flags, **self.flags.get(step.id, {})}


def check_texts(*texts: str) -> None:
    """Raises ValueError for a text that cannot be part of a path and of a JSON file."""
    if odd := [text for text in texts if not is_plain(text)]:
        raise ValueError(f"{odd[0]!r} is not a text: it is empty, or has a NUL or half of a character")
