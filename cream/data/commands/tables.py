"""`prepare_data.py import`: any data set as a file of this project."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cream.data import importing
from cream.data.outputs import Folder, Seed

WORDS = "FILE|ID"
ABOUT = "any data set of messages, prompts and responses, pairs or questions -> a file of this project"


@dataclass
class Options(importing.Preferences, importing.Table, Seed, Folder):
    """Import"""


def run(words: Sequence[str], flags: Options, config) -> None:
    importing.import_table(words[0], flags, flags, flags.seed or 0, Path(flags.output_dir), config.run)
