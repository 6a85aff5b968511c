"""`prepare_data.py rrm`: RRM's augmentation."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cream.data import rrm
from cream.data.outputs import Output, Seed, path_of

WORDS = "FILE"
ABOUT = "preference pairs -> the same with RRM's augmentation"


@dataclass
class Options(rrm.RrmFlags, Seed, Output):
    """Augmentation (rrm)"""


def run(words: Sequence[str], flags: Options, config) -> None:
    rrm.make(Path(config.file(words[0])), flags, flags.seed or 0, path_of(flags.output), config.run)
