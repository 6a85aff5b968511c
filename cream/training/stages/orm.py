"""An outcome reward model by next-token prediction: a PRM (prm.py) whose one step is the whole response, its label that
of the last step (RLHFlow, math-rm)."""

from dataclasses import dataclass

from cream.records import Steps
from cream.text.steps import join_steps
from cream.training.stages import prm

RECORDS = (Steps,)


@dataclass
class Options(prm.Options):
    """Signs of steps (prm, orm)"""


class Stage(prm.Stage):
    """ORM: a step's loss is the mean over all responses of the global batch."""

    unit = "responses"

    def steps(self, record: Steps) -> tuple[list[str], list[float | None]]:
        """The whole response, as it was before it was split, and its label."""
        return [join_steps(record.steps, self.split or "lines")], record.labels[-1:]
