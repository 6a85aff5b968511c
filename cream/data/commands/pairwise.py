"""`prepare_data.py pairwise`: training data of a pairwise preference model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cream.data import pairwise
from cream.data.outputs import Folder, Output, Seed

WORDS = "FILE"
ABOUT = "preference pairs -> data to train a model that compares two responses"


@dataclass
class Options(pairwise.PairwiseFlags, Seed, Output, Folder):
    """Pairwise preference data (pairwise)"""


def run(words: Sequence[str], flags: Options, config) -> None:
    path = Path(config.file(words[0]))
    target = Path(flags.output or flags.beside(path, "pairwise.sft.json"))
    pairwise.make(path, flags, target, flags.seed or 0, config.run)
