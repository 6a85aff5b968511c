"""`prepare_data.py mix`: files, or the sources of --config, as one; --seed and --held_out override what it says."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from cream.data import mix
from cream.data.outputs import Folder, HeldOut, Output, Seed, path_of
from cream.errors import UserError

WORDS = "[FILE …]"
ABOUT = "several files, or those in --config FILE, by weight -> one training file and a held-out one"


@dataclass
class Options(mix.MixFlags, HeldOut, Seed, Output, Folder):
    """Mixtures (mix)"""


def run(words: Sequence[str], flags: Options, config) -> None:
    path = path_of(flags.config)
    if bool(words) == (path is not None):
        raise UserError("mix: expected files, or --config FILE, which names them; one of both")
    sources = [mix.Source(config.file(word)) for word in words]
    mixture = mix.Mixture(sources) if path is None else mix.read_mixture(path)
    given = {"seed": flags.seed, "held_out": flags.held_out}
    mixture = replace(mixture, **{name: value for name, value in given.items() if value is not None})
    mix.make(mixture, path, path_of(flags.output), Path(flags.output_dir), config.run)
