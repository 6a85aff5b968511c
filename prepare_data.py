"""Look at data before an expensive run.

validate FILE …  check each file against its layout, as stages do: records, duplicates, lengths, everything bad
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from config import Model, group
from cream import console
from cream.console import log
from cream.errors import UserError
from cream.flags import flag, parse

EXAMPLE = """\
  python prepare_data.py validate localdata/tiny/*.json
  python prepare_data.py validate prompts.jsonl --model llama3 --max_length 2048"""


@dataclass
class Lengths:
    """Lengths"""

    max_length: int = flag(2048, "tokens of prompt and answer together; how many are longer is told", low=2)


@dataclass
class PrepareConfig:
    """prepare_data.py"""

    model: Model = group(Model)
    lengths: Lengths = group(Lengths)


@console.stage
def main(argv=None):
    words: list[str] = []
    config = parse(PrepareConfig, argv, description=__doc__, example=EXAMPLE, files=False, words=words)
    if len(words) < 2 or words[0] != "validate":
        raise UserError("expected a command and files: validate FILE …")
    validate(config, [Path(word) for word in words[1:]])


def validate(config: PrepareConfig, paths: list[Path]) -> None:
    """Print what each file holds; exit code 2 if anything in one of them is bad. Lengths are in tokens by --model's
    template, and in characters without it."""
    from cream.validation import report
    from cream.validation import validate as look

    m, chat = config.model, None
    if m.model or m.checkpoint:
        from cream.folders import check_folder
        from cream.models import load_chat

        folder = m.folder(m.checkpoint)
        check_folder(folder)
        chat = load_chat(folder, m.template())
    bad = []
    for path in paths:
        try:
            found = look(path, chat, config.lengths.max_length)
        except UserError as error:
            bad.append(path)
            log.info("%s", error)
            continue
        if found.bad_count:
            bad.append(path)
        log.info("%s", "\n".join(report(path, found, "tokens" if chat else "characters")))
    if bad:
        print(f"error: {len(bad)} of {len(paths)} files have bad records: {', '.join(map(str, bad))}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
