"""Convert public or your own data to the layouts of this project and back, and check files."""

import os
from dataclasses import dataclass, fields
from pathlib import Path

from config import DATASET_FILES, DATASETS, Model, Run, group
from cream.cli import console, names
from cream.cli.flag_fields import as_dict, one_of
from cream.cli.flags import parse
from cream.data.commands import COMMANDS, check_words, describe
from cream.errors import UserError
from cream.files.store import is_record_file

Options = one_of({f"of_{name}": command.Options for name, command in COMMANDS.items()})

EXAMPLE = """\
  python prepare_data.py build all
  python prepare_data.py build gsm8k arc_easy --from FOLDER
  python prepare_data.py import pairs.jsonl --columns prompt=question,chosen=good,rejected=bad
  python prepare_data.py eft judged.json --seed_data oasst_sft
  python prepare_data.py steps labelled.json --step_split sentences
  python prepare_data.py pairwise localdata/dpo.1.json --orders both
  python prepare_data.py overlap own.prompt.json all_test --output clean.prompt.json
  python prepare_data.py mix --config mix.yaml --held_out 500
  python prepare_data.py split localdata/dpo.1.json --seed_share 0.15 --held_out 500
  python prepare_data.py join seed.dpo.json newest.dpo.json older.dpo.json --output train.dpo.json
  python prepare_data.py rrm localdata/mix.dpo.json
  python prepare_data.py export localdata/dpo.1.json --form trl --output pairs.jsonl
  python prepare_data.py validate prompts.jsonl --model llama3 --max_length 2048"""


@dataclass
class PrepareConfig:
    """prepare_data.py"""

    READS_FILES = False  # its --config is a mixture

    options: Options = group(Options)
    model: Model = group(Model)
    run: Run = group(Run)

    def file(self, word: str, flag: str = "") -> str:
        """The path of a record file: a path, or that of a data set by its name; `flag`: the flag that gives it."""
        if os.sep in word or is_record_file(Path(word)) or Path(word).is_file():
            return word
        try:
            return str(names.dataset(word, DATASET_FILES, DATASETS))
        except UserError as error:
            raise UserError(f"{flag} {str(error).removeprefix('--name ')}".lstrip()) from None


@console.stage
def main(argv=None):
    words: list[str] = []
    lines = "\n".join(f"{describe(name):19}  {command.ABOUT}" for name, command in COMMANDS.items())
    config = parse(PrepareConfig, argv, description=f"{__doc__}\n\n{lines}", example=EXAMPLE, words=words)
    command, *rest = check(config, {"words": words})
    COMMANDS[command].run(rest, getattr(config.options, f"of_{command}"), config)


def check(config: PrepareConfig, about: dict) -> list[str]:
    """The command and its files or sources, in `about["words"]`. Raises UserError where these are not a command's, or a
    flag is not its."""
    command, *rest = about["words"] or ["list" if config.options.of_list.list else ""]
    check_words(command, rest)
    own, given, plain = COMMANDS[command], as_dict(config), as_dict(PrepareConfig())
    taken = [own.Options, *(getattr(config, group) for group in getattr(own, "TAKES", ("run",)))]
    names = [field.name for each in taken for field in fields(each)]
    if unused := [f"--{name}" for name in given if given[name] != plain[name] and name not in names]:
        uses = ", ".join(f"--{name}" for name in names) or "none"
        raise UserError(f"{command} does not use {', '.join(unused)}; it takes {uses}")
    return [command, *rest]


if __name__ == "__main__":
    main()
