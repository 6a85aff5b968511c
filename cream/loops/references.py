"""Values of a loop file in a round: one of several, with its references replaced."""

import re
from collections.abc import Mapping

from cream.cli.flags import spell
from cream.errors import nearest
from cream.loops.loop import BEST, Loop, Rounds, Value

REFERENCE = re.compile(r"\$\{([^}]*)\}?")
TARGET = re.compile(r"([\w.-]+?)(?:@-([1-9]\d?))?")
ROUND = re.compile(r"round([+-]\d{1,3})?")
OWN_SEED = re.compile(r"seed\+(round|\d{1,3})")  # draws apart from those of the same prompts in other rounds and steps


def all_values(value) -> list[Value]:
    """The values that a key has in some round."""
    if isinstance(value, Rounds):
        return [value.first, value.then]
    return value if isinstance(value, list) else [value]


class Made(dict[tuple[str, int | None], str]):
    """(id, round or None) -> the text in place of a reference to that step; `parents`: round -> the round that it
    starts from, where that is not the one before."""

    def __init__(self, parents: Mapping[int, int]):
        self.parents = parents

    def before(self, t: int, back: int = 1) -> int:
        """The round that is `back` rounds before `t` in the line of rounds that led to it; 0: the start."""
        for _ in range(back):
            t = self.parents.get(t, t - 1)
        return t


def in_round(value, t: int | None, loop: Loop, made: Made) -> Value:
    """A value in round `t` (None: outside the rounds), its references replaced. Raises ValueError where it has none."""
    if isinstance(value, list | Rounds):
        if t is None:
            raise ValueError("has values per round, but the step is not in `repeat`")
        if isinstance(value, list) and len(value) < loop.rounds:
            raise ValueError(f"{len(value)} values for {loop.rounds} rounds")
        first = made.before(t) == 0
        value = value[t - 1] if isinstance(value, list) else value.first if first else value.then
    if not isinstance(value, str):
        return value
    return REFERENCE.sub(lambda match: _target(match, t, loop, made), value)


def _target(match: re.Match, t: int | None, loop: Loop, made: Made) -> str:
    """The text that a reference stands for in round `t`. Raises ValueError where there is none."""
    if t is not None and (number := ROUND.fullmatch(match[1])):
        return str(t + int(number[1] or 0))
    if (own := OWN_SEED.fullmatch(match[1])) and (t is not None or own[1] != "round"):
        return str(loop.seed + (t if own[1] == "round" else int(own[1])))
    target, ids, repeated = TARGET.fullmatch(match[1]), {s.id for s in loop.steps()}, {s.id for s in loop.repeat}
    if target is None or not match[0].endswith("}"):
        raise ValueError(f"{match[0]} is not a reference; write ${{id}}, ${{id@-1}} (a round before) or ${{round}}")
    name, back = target[1], int(target[2] or 0)
    if name == BEST and loop.keep and not back:
        if (BEST, None) not in made:
            raise ValueError(f"{match[0]}: the best round is known after the rounds; it is for steps of `after`")
        return made[BEST, None]
    if name not in ids:
        raise ValueError(f"{match[0]}: no step has the id {name}{nearest(name, ids)}")
    if back and (t is None or name not in repeated):
        raise ValueError(f"{match[0]}: an earlier round exists only between steps of `repeat`")
    round_ = None if name not in repeated else loop.rounds if t is None else made.before(t, back)
    if round_ == 0 and name in loop.start:
        return spell(in_round(loop.start[name], None, loop, made))
    if round_ is not None and round_ < 1:
        advice = f"`start` gives one for {name}" if round_ == 0 else "give round 1 a value of its own"
        raise ValueError(f"{match[0]}: round {t} has no output {back} rounds before it; {advice}")
    if (name, round_) not in made:
        raise ValueError(f"{match[0]}: that step runs later; steps run in the order of the file")
    return made[name, round_]
