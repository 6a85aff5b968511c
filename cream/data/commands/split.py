"""`prepare_data.py split`: a seed with labels, a pool without, and held-out pairs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cream.data import split
from cream.data.outputs import Folder, HeldOut, Output, Seed
from cream.errors import UserError

WORDS = "FILE"
ABOUT = "preference pairs -> a seed that keeps its labels, a pool of unlabelled ones, and held-out pairs"


@dataclass
class Options(split.SplitFlags, HeldOut, Seed, Output, Folder):
    """Few labels (split)"""


def run(words: Sequence[str], flags: Options, config) -> None:
    path, out = Path(config.file(words[0])), flags.held_out or 0.0
    if flags.output and not flags.part:
        raise UserError("split: --output is the file of one part; give --part, or --output_dir for all parts")
    if flags.part == "held_out" and not out:
        raise UserError("split: --part held_out needs --held_out, the share or number of prompts that are held out")
    parts = [flags.part] if flags.part else [part for part in split.ENDINGS if part != "held_out" or out]
    stem = path.with_name(path.name.partition(".json")[0].removesuffix(".dpo"))
    places = {part: Path(flags.output or flags.beside(stem, split.ENDINGS[part])) for part in parts}
    split.make(path, flags, out, flags.seed or 0, places, config.run)
