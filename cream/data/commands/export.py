"""`prepare_data.py export`: records in the formats of other tools."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from cream.cli.flags import flag
from cream.cli.screen import say_result
from cream.data.forms import FORMS, export_row
from cream.data.outputs import Output, is_needed, skips
from cream.errors import UserError
from cream.files import journal, store

WORDS = "FILE"
ABOUT = "conversations, prompts or pairs -> the format of other tools, one row per line"


@dataclass
class Options(Output):
    """Export"""

    form: str | None = flag(None, "export: format of the rows", choices=FORMS)


def run(words: Sequence[str], flags: Options, config) -> None:
    export(Path(config.file(words[0])), flags, config.run)


def export(path: Path, flags: Options, run) -> None:
    """Write the rows of a record file in another tool's format."""
    form = flags.form
    if form is None:
        raise UserError(f"--form is missing: one of {', '.join(FORMS)}")
    target = Path(flags.output or path.with_name(f"{path.name.partition('.json')[0]}.{form}.jsonl"))
    if ".jsonl" not in target.suffixes:
        raise UserError(f"--output {target}: rows are written one per line, to a name that ends in .jsonl")
    kind, provenance = store.detect(path, skip=run.skip), run.provenance()
    provenance.output("file", path)
    output = journal.Output(target, {"form": form} | skips(run), provenance, overwrite=run.overwrite)
    if not is_needed(output, run):
        return
    records = store.read(path, kind, skip=run.skip)
    if (first := next(records, None)) is None:
        raise store.nothing_left(path, kind, "record is left to export")
    with output:
        if run.skip:
            output.reject(store.rejected(path, kind))
        count = output.finish(export_row(record, form) for record in chain([first], records))
    say_result("%s: %d rows in the format of %s", target, count, form)
