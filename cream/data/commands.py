"""The commands of prepare_data.py, and their flags.

`run`: the script's flags of that name (overwrite, dry_run, skip, provenance()).
"""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from cream.cli.flags import flag
from cream.data.forms import FORMS, export_row
from cream.errors import UserError, user_error
from cream.files import journal, store
from cream.files.provenance import Provenance
from cream.records import encode

log = logging.getLogger("cream")


@dataclass
class Build:
    """Build"""

    from_folder: str | None = flag(
        None,
        "folder with copies of the hub's data sets, or with files named after them; none: the hub",
        aliases=("from",),
    )
    output_dir: str = flag("localdata", "folder for the output files")
    subsets: int = flag(3, "number of subsets to split the unlabelled prompts into at random, one per round", low=1)
    task_limit: int | None = flag(
        None, "keep at most this many unlabelled prompts per source, chosen by the seed; none: all", low=1
    )
    multi_turn: bool = flag(
        False, "oasst1: whole conversations along the best-ranked replies; no: the first exchange only"
    )
    seed: int = flag(0, "seed of the subsets and of --task_limit", low=0, high=2**32 - 1)
    list: bool = flag(False, "same as the command list")


@dataclass
class Table:
    """Import and export"""

    columns: str | None = flag(
        None,
        "what each column is, field=column,…; a+b joins two columns, a.b is a key inside one; none: by their "
        "usual names",
    )
    subset: str | None = flag(None, "configuration of a data set on the hub, or in a folder with the hub's layout")
    split: str = flag("train", "split of such a data set")
    first_answer: int | None = flag(None, "number of the first option, if answers are numbers", choices=(0, 1))
    form: str | None = flag(None, "export: format of the rows", choices=FORMS)
    output: str | None = flag(
        None, "output file; none: localdata/<name>.<sft|prompt|dpo|test>.json (import), <file>.<form>.jsonl (export)"
    )


@dataclass
class Lengths:
    """Lengths"""

    max_length: int = flag(2048, "count responses with more than this many tokens, the prompt included", low=2)


def list_sources() -> None:
    """Print the public sources."""
    from cream.data import sources

    for source in sources(["all"]):
        rows = ", ".join(f"{split} {about.rows}" for split, about in source.splits.items())
        log.info("%-14s %s\n%15s%s rows; %s; %s", source.name, source.gives, "", rows, source.licence, source.hub)


def build(names: Sequence[str], flags: Build, run) -> None:
    """Write the files of some sources, after all of them have been read and checked."""
    from cream.data.build import build_files, check_subsets, read_tables

    folder = Path(flags.output_dir)
    copies = None if flags.from_folder is None else Path(flags.from_folder)
    tables = read_tables(names, copies, skip=run.skip, multi_turn=flags.multi_turn)
    how = {"seed": flags.seed, "task_limit": flags.task_limit, "multi_turn": flags.multi_turn}
    files = build_files(tables, count=flags.subsets, **how)
    check_subsets(folder, files, flags.subsets)
    outputs = [_built_output(folder / file.name, file, tables, run) for file in files]
    for file, output in zip(files, outputs, strict=True):
        _describe(file, output)
        if not run.dry_run and not output.up_to_date:
            with output:
                output.dropped += file.dropped
                output.reject(file.rejected)
                places = {name: str(tables[name].place) for name in file.inputs}
                output.finish(map(encode, file.records), tables=places, tasks=file.tasks)
    if run.dry_run:
        log.info("dry run: nothing was written")


def _built_output(path: Path, file, tables: dict, run) -> journal.Output:
    provenance, instead = run.provenance(), "another --output_dir"
    for name in file.inputs:
        _add_input(provenance, name, tables[name].place, tables[name].digest)
    return journal.Output(path, file.settings, provenance, overwrite=run.overwrite, instead=instead)


def _add_input(provenance: Provenance, name: str, place, digest: str) -> None:
    if place.file:
        provenance.file(name, place.file)
    else:
        provenance.content(name, digest)


def _describe(file, output: journal.Output) -> None:
    """Log the size of a file, and how many records of its sources were skipped."""
    from cream.data.build import lost_sources

    log.info("%s: %d records%s", output.path, len(file.records), " (up to date; skipping)" if output.up_to_date else "")
    if names := lost_sources(output.path, output.provenance.inputs):
        log.warning("  this replaces a file that also has records of %s, which are lost", ", ".join(names))
    for task, counts in file.tasks.items():
        skipped = "".join(f"; {count} skipped: {why}" for why, count in counts.items() if why != "kept")
        log.info("  %s: %d%s", task, counts["kept"], skipped)
    _describe_dropped({} if file.tasks else file.dropped)


def _describe_dropped(dropped: dict[str, int]) -> None:
    for reason, count in dropped.items():
        log.info("  %d skipped: %s", count, reason)


def import_table(word: str, flags: Table, folder: Path, run) -> None:
    """Write a record file in `folder` from any table, whose first good row decides the layout."""
    from cream.data import reading, table

    place = reading.Place(word, flags.subset, flags.split)
    if place.file and (flags.subset, flags.split) != (Table.subset, Table.split):
        raise UserError(f"{place}: --subset and --split are for hub ids and folders like them; this is one file")
    stem = Path(os.path.abspath(word)).name.partition(".")[0]
    with reading.open_rows(place) as rows:
        kind, names = table.plan(table.parse_columns(flags.columns or ""), rows.column_names, str(place))
        log.info("%s: %d rows; %s", place, len(rows), ", ".join(f"{name}={column}" for name, column in names.items()))
        rejected, dropped = [], Counter()
        results = table.records(rows, kind, names, stem, flags.first_answer, str(place))
        records = table.keep_good(results, rejected, dropped, run.skip)
        if (first := next(records, None)) is None:
            why = rejected[0]["reason"] if rejected else next(iter(dropped), "none")
            raise UserError(f"{place}: no row makes a record; the first: {why}")
        target = Path(flags.output or folder / f"{stem}.{table.WORDS[type(first)]}.json")
        provenance = run.provenance()
        _add_input(provenance, "table", place, reading.digest(rows) if not place.file else "")
        settings = {"columns": flags.columns, "first_answer": flags.first_answer} | _skips(run)
        settings |= {} if place.file else {"table": place.path, "subset": flags.subset, "split": flags.split}
        output = journal.Output(target, settings, provenance, overwrite=run.overwrite)
        if _is_needed(output, run):
            with output:
                output.reject(rejected)  # both are complete after the last record
                output.dropped = dropped
                count = output.finish(map(encode, chain([first], records)))
            log.info("%s: %d %s records", target, count, type(first).__name__)
            _describe_dropped(dropped)
    log.info("next: python prepare_data.py validate %s", target)


def _skips(run) -> dict[str, str]:
    return {"on_bad_record": "skip"} if run.skip else {}


def _is_needed(output: journal.Output, run) -> bool:
    """Whether an output has to be written; logs why not."""
    if output.up_to_date:
        log.info("%s is up to date (same settings and inputs); skipping", output.path)
    elif run.dry_run:
        log.info("dry run: would write %s; nothing was written", output.path)
    return not (output.up_to_date or run.dry_run)


def export(word: str, flags: Table, run) -> None:
    """Write the rows of a record file in another tool's format."""
    path, form = Path(word), flags.form
    if form is None:
        raise UserError(f"--form is missing: one of {', '.join(FORMS)}")
    target = Path(flags.output or path.with_name(f"{path.name.partition('.json')[0]}.{form}.jsonl"))
    if ".jsonl" not in target.suffixes:
        raise UserError(f"--output {target}: rows are written one per line, to a name that ends in .jsonl")
    kind, provenance = store.detect(path, skip=run.skip), run.provenance()
    provenance.output("file", path)
    output = journal.Output(target, {"form": form} | _skips(run), provenance, overwrite=run.overwrite)
    if not _is_needed(output, run):
        return
    records = store.read(path, kind, skip=run.skip)
    if (first := next(records, None)) is None:
        raise store.nothing_left(path, kind, "record is left to export")
    with output:
        if run.skip:
            output.reject(store.rejected(path, kind))
        count = output.finish(export_row(record, form) for record in chain([first], records))
    log.info("%s: %d rows in the format of %s", target, count, form)


def validate(words: Sequence[str], model: Path | None, text: dict, max_length: int) -> None:
    """Print a summary of each file; raises UserError if one has bad records. Lengths are in tokens of the model in the
    folder `model` (with its chat template, as `text` says), without a model in characters."""
    from cream.data import validation

    chat, bad = None, []
    paths = [Path(word) for word in words if not word.endswith(".meta.json")]
    if len(paths) < len(words):
        log.info("%d sidecars skipped: they hold no records", len(words) - len(paths))
    if model is not None:
        from cream.files.folders import check_folder
        from cream.model.load import load_chat

        check_folder(model)
        chat = load_chat(model, **text)
    for path in paths:
        try:
            summary = validation.validate(path, chat, max_length)
        except (UserError, OSError) as error:
            if (message := user_error(error)) is None:
                raise
            bad.append(path)
            log.info("%s", message)
            continue
        if summary.bad_count:
            bad.append(path)
        log.info("%s", "\n".join(validation.report(path, summary, "tokens" if chat else "characters")))
    if bad:
        raise UserError(f"{len(bad)} of {len(paths)} files have bad records: {', '.join(map(str, bad))}")
