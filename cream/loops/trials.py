"""The models that a loop has measured, and how it speaks of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from cream.loops import facts
from cream.loops.facts import Fact
from cream.loops.loop import Bound, Loop
from cream.loops.plan import TRAIN, Command

MODELS = ("reward_model", "judge_model", "checkpoint")  # flags that name the model that a step measures


@dataclass(frozen=True)
class Trial:
    """A model that was measured: of `round`, 0 for the one before round 1; `starts_from`: the round before it."""

    round: int
    starts_from: int | None
    command: Command
    model: str
    fact: Fact


@dataclass(frozen=True)
class Stop:
    """Why no round follows on `round`; `at_once`: before that has trained its model, so that nothing else of it
    runs."""

    round: int
    why: str
    at_once: bool = False


def find(name: str, loop: Loop, ran: Sequence[Command], t: int) -> tuple[Command | None, str]:
    """The command of round `t`, or before the rounds, whose fact has this name, and which of its facts that is; None
    where the round has no such command."""
    step, path = facts.split(name, [each.id for each in loop.steps()])
    return next((each for each in ran if each.step == step and each.place.round == t), None), path


def model_of(command: Command, commands: Sequence[Command]) -> str | None:
    """The model that a step measures: the one that it trains, or a flag names, its own or, where it reads rewards,
    that of the step that made them; None of the base model."""
    if command.script == TRAIN:
        return command.result
    if named := [str(command.flags[name]) for name in MODELS if command.flags.get(name) is not None]:
        return named[0]
    makers = {each.result: each for each in commands if each is not command}
    made_by = (makers[text] for text in command.flags.values() if text in makers)
    return next(filter(None, (model_of(maker, commands) for maker in made_by)), None)


def called(t: int) -> str:
    """A round in words."""
    return f"round {t}" if t else "the start"


def against(other: Trial, one: Trial, path: str) -> str:
    """How far a trial is from another one: by a paired interval where both are evaluations of the same items, else by
    whether the other's value is in the one's interval."""
    moved = facts.difference(other.command, one.command, path)
    if moved is None:
        inside = one.fact.low is not None and one.fact.low <= other.fact.value <= one.fact.high
        text = one.fact.spell(one.fact.value - other.fact.value, "+") + " points" * one.fact.share
    else:
        inside = moved.low <= 0 <= moved.high
        text = f"{moved.spell(moved.value, '+')} points [{moved.spell(moved.low, '+')}, {moved.spell(moved.high, '+')}]"
    doubt = ", inside the interval: the two may be equally good" * inside
    return f"{text} against {called(other.round)}{doubt}"


def broken(bound: Bound, fact: Fact, first: Fact) -> str | None:
    """In words that a fact is beyond a bound; None where it is not. `first`: the same fact in round 1."""
    if bound.below is not None and fact.value < bound.below:
        return f"is {fact}, below {fact.spell(bound.below)}"
    if bound.above is not None and fact.value > bound.above:
        return f"is {fact}, above {fact.spell(bound.above)}"
    if bound.drift is not None and first.value and abs(change := fact.value / first.value - 1) > bound.drift:
        return f"is {fact}, {100 * change:+.0f} % against {first} in round 1 (drift {bound.drift:g})"
    return None
