"""The flags of prepare_data.py."""

from dataclasses import dataclass

from cream.cli.flags import flag
from cream.data.forms import FORMS


@dataclass
class Build:
    """Build"""

    from_folder: str | None = flag(
        None, "a folder with copies of the hub's data sets, or files named for them; none: the hub", aliases=("from",)
    )
    output_dir: str = flag("localdata", "folder of what is written")
    subsets: int = flag(3, "parts into which the unlabelled prompts are split at random, one for each round", low=1)
    task_limit: int | None = flag(None, "unlabelled prompts of a source at most, drawn by the seed; none: all", low=1)
    multi_turn: bool = flag(False, "oasst1: whole threads along the best-ranked replies; no: the first turn")
    seed: int = flag(0, "seed of the subsets", low=0, high=2**32 - 1)
    list: bool = flag(False, "the same as the command list")


@dataclass
class Table:
    """Import and export"""

    columns: str | None = flag(
        None, "what columns hold, field=column,…; a+b joins two, a.b looks into one; none: as they are commonly called"
    )
    subset: str | None = flag(None, "configuration of a data set on the hub or of a folder like it")
    split: str = flag("train", "split of these")
    first_answer: int | None = flag(None, "number of the first choice where answers are numbers", choices=(0, 1))
    form: str | None = flag(None, "export: whose form", choices=FORMS)
    output: str | None = flag(
        None, "file; none: import localdata/<name>.<sft|prompt|dpo|test>.json, export <file>.<form>.jsonl"
    )


@dataclass
class Lengths:
    """Lengths"""

    max_length: int = flag(2048, "tokens of prompt and response together; longer ones are counted", low=2)
