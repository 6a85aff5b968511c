"""Convert public or your own data to the layouts of this project and back, and check files.

build SOURCE …    public sources, or all -> localdata/: SFT set, prompts and their subsets, test sets, train splits
list              print the sources: contents, published rows, licences
eft FILE          what a judge said of responses that people ranked -> data to train it on
steps FILE        samples with rewards by gold labels -> responses in steps, to train reward models on
pairwise FILE     preference pairs -> data to train a model that compares two responses
import FILE|ID    any data set of messages, prompts and responses, pairs or questions -> a file of this project
mix FILE …        several files, by the weights in --config FILE -> one training file and a held-out one
rrm FILE          preference pairs -> the same with RRM's augmentation
export FILE       conversations, prompts or pairs -> the format of other tools, one row per line
overlap FILE …    records of the first file that share 13 words in a row with those of others, such as test questions
validate FILE …   check files as stages do, and print their records, duplicates, lengths and all problems
"""

import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from config import DATASET_FILES, DATASETS, Model, Run, group
from cream.cli import console, names
from cream.cli.flags import parse
from cream.data import commands, importing, mix, rrm
from cream.data.commands import Build, Lengths, Table
from cream.data.eft import EftFlags
from cream.data.importing import Preferences
from cream.data.mix import MixFlags
from cream.data.pairwise import PairwiseFlags
from cream.data.rrm import RrmFlags
from cream.data.verified import VerifiedFlags
from cream.errors import UserError
from cream.files.store import is_record_file

EXAMPLE = """\
  python prepare_data.py build all
  python prepare_data.py build gsm8k arc_easy --from FOLDER
  python prepare_data.py import pairs.jsonl --columns prompt=question,chosen=good,rejected=bad
  python prepare_data.py eft judged.json --seed_data oasst_sft
  python prepare_data.py steps labelled.json --step_split sentences
  python prepare_data.py pairwise localdata/dpo.1.json --orders both
  python prepare_data.py overlap own.prompt.json all_test --output clean.prompt.json
  python prepare_data.py mix --config mix.yaml --held_out 500
  python prepare_data.py rrm localdata/mix.dpo.json
  python prepare_data.py export localdata/dpo.1.json --form trl --output pairs.jsonl
  python prepare_data.py validate prompts.jsonl --model llama3 --max_length 2048"""


@dataclass
class PrepareConfig:
    """prepare_data.py"""

    READS_FILES = False  # its --config is a mixture

    build: Build = group(Build)
    table: Table = group(Table)
    preferences: Preferences = group(Preferences)
    mix: MixFlags = group(MixFlags)
    rrm: RrmFlags = group(RrmFlags)
    eft: EftFlags = group(EftFlags)
    verified: VerifiedFlags = group(VerifiedFlags)
    pairwise: PairwiseFlags = group(PairwiseFlags)
    model: Model = group(Model)
    lengths: Lengths = group(Lengths)
    run: Run = group(Run)


PARTS = (Run, Model, EftFlags, PairwiseFlags, Preferences, RrmFlags)
RUN, MODEL, EFT, PAIRWISE, PAIRS, RRM = (tuple(each.name for each in fields(part)) for part in PARTS)
BUILD = ("from_folder", "output_dir", "subsets", "task_limit", "multi_turn", "selection", "sft_limit", "seed")
IMPORT = ("columns", "best", "thought_key", "ignore_keys", "sep")
USES = {  # the flags of each command; another is refused
    "build": (*BUILD, *RUN),
    "list": ("list",),
    "eft": (*EFT, "seed", "output", "output_dir", *RUN),
    "import": (*IMPORT, *PAIRS, "subset", "split", "first_answer", "grader", "seed", "output", "output_dir", *RUN),
    "mix": ("config", "held_out", "seed", "output", "output_dir", *RUN),
    "rrm": (*RRM, "seed", "output", *RUN),
    "steps": ("step_split", "step_labeller", "output", "output_dir", *RUN),
    "pairwise": (*PAIRWISE, "seed", "output", "output_dir", *RUN),
    "export": ("form", "output", *RUN),
    "overlap": ("output", *RUN),
    "validate": (*MODEL, "max_length"),
}


@console.stage
def main(argv=None):
    words: list[str] = []
    config = parse(PrepareConfig, argv, description=__doc__, example=EXAMPLE, words=words)
    command, *rest = check(config, {"words": words})
    files = ("pairwise", "mix", "rrm", "export", "overlap", "validate")
    rest = [_file(word) for word in rest] if command in files else rest
    model, run = config.model, config.run
    match command:
        case "list":
            commands.list_sources()
        case "build":
            commands.build(rest, config.build, run)
        case "eft":
            seeds = None if config.eft.seed_data is None else Path(_file(config.eft.seed_data, "--seed_data"))
            commands.eft(rest[0], config.eft, seeds, config.build, config.table.output, run)
        case "steps":
            commands.steps(rest[0], config.verified, config.build, config.table.output, run)
        case "pairwise":
            commands.pairwise(rest[0], config.pairwise, config.build, config.table.output, run)
        case "import":
            folder = Path(config.build.output_dir)
            importing.import_table(rest[0], config.table, config.preferences, config.build.seed, folder, run)
        case "mix":
            _mix(rest, config)
        case "rrm":
            rrm.make(Path(rest[0]), config.rrm, config.build.seed, _output(config), run)
        case "export":
            commands.export(rest[0], config.table, run)
        case "overlap":
            commands.overlap(rest, config.table, run)
        case "validate":
            named = model.model or model.checkpoint
            folder = model.folder(model.checkpoint) if named else None
            commands.validate(rest, folder, model.text(), config.lengths.max_length)


def _mix(paths: list[str], config: PrepareConfig) -> None:
    """Mix files, or the sources of --config; --seed and --held_out override what it says."""
    from msgspec.structs import replace

    path = None if config.mix.config is None else Path(config.mix.config)
    mixture = mix.Mixture([mix.Source(each) for each in paths]) if path is None else mix.read_mixture(path)
    given = {"seed": config.build.seed or None, "held_out": config.eft.held_out}
    mixture = replace(mixture, **{name: value for name, value in given.items() if value is not None})
    mix.make(mixture, path, _output(config), Path(config.build.output_dir), config.run)


def _output(config: PrepareConfig) -> Path | None:
    return None if config.table.output is None else Path(config.table.output)


def check(config: PrepareConfig, about: dict) -> list[str]:
    """The command and its files or sources, in `about["words"]`. Raises UserError where these are not a command's, or a
    flag is not its."""
    command, *rest = about["words"] or ["list" if config.build.list else ""]
    one, several = len(rest) == 1, len(rest) > 1
    single = dict.fromkeys(("eft", "steps", "pairwise", "import", "rrm", "export"), one)
    mixed = bool(rest) != (config.mix.config is not None)
    fits = ({"list": not rest, "overlap": several, "mix": mixed} | single).get(command, bool(rest))
    if command not in USES or not fits:
        raise UserError(
            "expected a command: build SOURCE …, list, eft FILE, steps FILE, pairwise FILE, import FILE|ID, "
            "mix --config FILE, mix FILE …, rrm FILE, export FILE, overlap FILE FILE …, or validate FILE …"
        )
    _check_flags(command, config)
    return [command, *rest]


def _file(word: str, flag: str = "") -> str:
    """The path of a record file: a path, or that of a data set by its name; `flag`: the flag that gives it."""
    if os.sep in word or is_record_file(Path(word)) or Path(word).is_file():
        return word
    try:
        return str(names.dataset(word, DATASET_FILES, DATASETS))
    except UserError as error:
        raise UserError(f"{flag} {str(error).removeprefix('--name ')}".lstrip()) from None


def _check_flags(command: str, config: PrepareConfig) -> None:
    """Raises UserError if a flag is given that the command does not use."""
    given, plain = ({k: v for part in asdict(c).values() for k, v in part.items()} for c in (config, PrepareConfig()))
    if unused := [f"--{name}" for name in given if given[name] != plain[name] and name not in USES[command]]:
        uses = ", ".join(f"--{name}" for name in USES[command])
        raise UserError(f"{command} does not use {', '.join(unused)}; it takes {uses}")


if __name__ == "__main__":
    main()
