"""`prepare_data.py steps`: training data of process and outcome reward models, of verified responses."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cream.data import verified
from cream.data.outputs import Folder, Output

WORDS = "FILE"
ABOUT = "samples with rewards by gold labels -> responses in steps, to train reward models on"


@dataclass
class Options(verified.VerifiedFlags, Output, Folder):
    """Steps of samples (steps)"""


def run(words: Sequence[str], flags: Options, config) -> None:
    path = Path(config.file(words[0]))
    verified.make(path, flags, Path(flags.output or flags.beside(path, "steps.json")), config.run)
