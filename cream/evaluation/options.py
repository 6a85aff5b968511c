"""The flags of infer.py, but for those that steer generation (cream/engines)."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cream.cli import names
from cream.cli.flag_fields import IF_GIVEN
from cream.cli.flags import flag
from cream.errors import UserError
from cream.evaluation.choices import FORMATS, NORMS
from cream.evaluation.evaluate import SCORINGS
from cream.evaluation.grade import Rules
from cream.evaluation.tasks import is_all_test
from cream.files import store
from cream.records import Conversation, Item, Prompt, nouns
from cream.text.thoughts import Tags

READS = {  # --mode -> records of --name, and what they are
    "sampling": ((Prompt, Conversation), "unlabelled prompts, or conversations"),
    "evaluation": ((Item,), "questions with labels"),
    "instructions": ((Prompt, Conversation), "prompts or conversations, whose first turns are the seeds"),
}


@dataclass
class Task:
    """Task"""

    mode: str = flag(
        "sampling",
        "sampling: generate responses for training; evaluation: respond to questions and grade; rescore: grade "
        "the responses of an evaluation again; instructions: write new prompts after the example of others",
        choices=("sampling", "evaluation", "rescore", "instructions"),
    )
    name: str | None = flag(
        None,
        "dataset: a built-in name (DatasetEnum in config.py), a name in configs/dataset.json, or a file",
        decides=False,
    )
    input_file: str | None = flag(None, "rescore: the evaluation's result file", decides=False)
    limit_size: int | None = flag(None, "read at most this many records; none: all", low=1)
    part: int | None = flag(
        None,
        "sampling: the file in parts of --limit_size records, of which this one is read, from 1; after the last the "
        "first again: for short rounds over one file",
        decides=IF_GIVEN,
        low=1,
    )
    limit_per_task: int | None = flag(
        None,
        "evaluation: read at most this many questions of each task, the first ones; none: all",
        decides=IF_GIVEN,
        low=1,
    )

    def __post_init__(self):
        for name in ("limit_size", "limit_per_task"):
            if self.mode == "rescore" and getattr(self, name):
                raise UserError(f"--mode rescore grades every response of the file: --{name} does not apply")
        if self.mode in ("sampling", "instructions") and self.limit_per_task:
            raise UserError(f"--limit_per_task: prompts have no task; --limit_size limits --mode {self.mode}")
        if self.part and (self.mode != "sampling" or not self.limit_size):
            raise UserError("--part is for --mode sampling, with --limit_size: the number of records of a part")

    def dataset(self, known: Mapping[str, str], registry: Path, *, skip: bool) -> Path:
        """The data set's file; `known` and `registry` as names.dataset takes them. Raises UserError unless it holds
        records that the mode reads. The file of all tasks may be missing: those of each task stand for it."""
        if self.name is None:
            raise UserError(f"--mode {self.mode} needs --name, a data set's name or file")
        path = names.dataset(self.name, known, registry)
        if not path.exists():
            if is_all_test(path):
                return path
            raise names.missing_data(self.name, path)
        kinds, what = READS[self.mode]
        if (held := store.detect(path, skip=skip)) not in kinds:
            holds = f"{path} holds {nouns(held)}"
            why = ": test questions must not enter training" if held is Item else ""
            raise UserError(f"--mode {self.mode} --name {self.name}: {holds}; {self.mode} takes {what}{why}")
        return path

    def limit(self, debug: bool) -> int | None:
        """The records that are read at most."""
        return self.limit_size or (97 if debug else None)


@dataclass
class EvaluationFlags:
    """Evaluation"""

    few_shot: int = flag(
        0, "solved examples before each question, the same for all questions of a task", decides=IF_GIVEN, low=0
    )
    few_shot_file: str | None = flag(
        None,
        "labelled questions to take the examples from; none: train.json next to the task's test.json",
        decides=False,
    )
    extraction: str = flag(
        "default",
        "how an answer is extracted from a response: default, or strict (the released code's rules)",
        choices=("default", "strict"),
    )
    grader: str = flag(
        "task",
        "what compares answers: task, each task's rule (letters and numbers), and math-verify for items imported with "
        "--grader math; math: math-verify for all that is not multiple choice",
        choices=("task", "math"),
    )
    scoring: str = flag(
        "generate",
        "generate a response and extract its answer, or compare the options' log-likelihoods (nothing to extract)",
        choices=tuple(SCORINGS),
    )
    prompt_format: str = flag(
        "plain",
        "loglikelihood: plain, options continue a text as in lm-evaluation-harness; chat, options are assistant turns. "
        "instructions: plain, the model continues a list; chat, it is asked to",
        choices=FORMATS,
    )
    length_norm: str = flag(
        "chars",
        "loglikelihood: divide each option's log-likelihood by its length in these units (the summary has all of "
        "them); none is the harness's acc, chars its acc_norm",
        choices=tuple(NORMS),
    )

    def rules(self, tags: Tags) -> Rules:
        """How responses are graded; `tags` are those around a thought."""
        return Rules(self.extraction == "strict", tags, self.all_by)

    @property
    def all_by(self) -> str | None:
        """What grades all items, if not each by its own."""
        return None if self.grader == "task" else self.grader

    def check(self, mode: str) -> None:
        """Raises UserError for a flag that does not apply in `mode`."""
        if self.scoring != "generate" and mode != "evaluation":
            raise UserError(f"--scoring {self.scoring}: options are those of questions, in --mode evaluation")
        if self.few_shot and mode != "evaluation":
            raise UserError(f"--few_shot {self.few_shot}: examples go in front of questions, in --mode evaluation")
        if self.few_shot_file and not self.few_shot:
            raise UserError(
                f"--few_shot_file {self.few_shot_file}: --few_shot K says how many of its examples are shown"
            )


@dataclass
class InferOutput:
    """Output"""

    output_dir: str | None = flag(
        None,
        "output file or folder; none: a file in outputs/sampling, outputs/evaluation or outputs/instructions",
        decides=False,
    )
    show_example: bool = flag(True, "print the first prompt as the model sees it", decides=False)
