"""`prepare_data.py join`: several files as one, each uuid once."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cream.data import join
from cream.data.outputs import Folder, Output, path_of

WORDS = "FILE …"
ABOUT = "several files -> one; a uuid that several have is taken from the first of them"


@dataclass
class Options(join.JoinFlags, Output, Folder):
    """Joined files (join)"""


def run(words: Sequence[str], flags: Options, config) -> None:
    without = flags.without and Path(config.file(flags.without, "--without"))
    join.make(
        [Path(config.file(word)) for word in words], without, path_of(flags.output), Path(flags.output_dir), config.run
    )
