"""The files that pair strategies read, each by the flag that names it."""

from typing import NamedTuple

from cream.records import Item, Record, Rewards


class Input(NamedTuple):
    """A file that a strategy reads: the layout of its records, and the help text of its flag.

    `needed`: the strategy makes no pairs without it. `made_by`: the stage that writes such files; None: anything may.
    `several`: the flag takes several files, separated by commas, oldest first. They are inputs of their own: that of
    --samples are `samples` (the last), `samples@-1` (the one before), and so on, as loops name the outputs of rounds.
    """

    kind: type[Record]
    help: str
    needed: bool = True
    made_by: str | None = None
    several: bool = False


REWARDS = Input(Rewards, "rewards, the output of rewarding.py", made_by="rewarding.py")
PREVIOUS = Input(
    Rewards,
    "the previous model's rewards of the same responses, from which C is computed",
    needed=False,
    made_by="rewarding.py",
)
LABELS = Input(Item, "labelled questions, matched by uuid")
