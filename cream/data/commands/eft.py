"""`prepare_data.py eft`: judge-training data."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cream.data import eft
from cream.data.outputs import Folder, HeldOut, Output, Seed

WORDS = "FILE"
ABOUT = "what a judge said of responses that people ranked -> data to train it on"


@dataclass
class Options(eft.EftFlags, HeldOut, Seed, Output, Folder):
    """Judge training (eft)"""


def run(words: Sequence[str], flags: Options, config) -> None:
    seeds = None if flags.seed_data is None else Path(config.file(flags.seed_data, "--seed_data"))
    target = Path(flags.output or Path(flags.output_dir) / "eft.sft.json")
    eft.make(Path(config.file(words[0])), flags, seeds, target, flags.seed or 0, config.run)
