"""Public data, or your own, into the layouts of this project and out of them; and what files hold.

build SOURCE …    public sources (all: every one) -> localdata/: SFT set, prompts and their subsets, tests, train splits
list              the sources: what they give, rows that are published, licences
import FILE|ID    any data set of messages, prompts and responses, pairs or questions -> a file of ours
export FILE       conversations, prompts or pairs -> the form of other tools, a row a line
validate FILE …   check each file against its layout, as stages do: records, duplicates, lengths, everything bad
"""

import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from itertools import chain
from pathlib import Path

from config import MAX_SEED, Model, Run, group
from cream.cli import console
from cream.cli.console import log
from cream.cli.flags import flag, parse
from cream.data.forms import FORMS
from cream.errors import UserError, mendable
from cream.files import journal, store
from cream.records import Record, encode

EXAMPLE = """\
  python prepare_data.py build all
  python prepare_data.py build gsm8k arc_easy --from FOLDER
  python prepare_data.py import pairs.jsonl --columns prompt=question,chosen=good,rejected=bad
  python prepare_data.py export localdata/dpo.1.json --form trl --output pairs.jsonl
  python prepare_data.py validate prompts.jsonl --model llama3 --max_length 2048"""


@dataclass
class Build:
    """Build"""

    from_folder: str | None = flag(
        None, "a folder with copies of the hub's data sets, or files named for them; none: the hub", aliases=("from",)
    )
    output_dir: str = flag("localdata", "folder of what is written")
    subsets: int = flag(3, "parts into which the unlabelled prompts are dealt, one for each round", low=1)
    task_limit: int | None = flag(None, "unlabelled prompts of a source at most, drawn by the seed; none: all", low=1)
    multi_turn: bool = flag(False, "oasst1: whole threads along the best-ranked replies; no: the first turn")
    seed: int = flag(0, "seed of the subsets", low=0, high=MAX_SEED)
    list: bool = flag(False, "the same as the command list")


@dataclass
class Table:
    """Import and export"""

    columns: str | None = flag(
        None, "what columns hold, field=column,…; a+b joins two, a.b looks into one; none: as they are commonly called"
    )
    subset: str | None = flag(None, "configuration of a data set on the hub or of a folder like it")
    split: str = flag("train", "split of these")
    first_answer: int | None = flag(None, "number of the first choice where answers are numbers", choices=(0, 1))
    form: str | None = flag(None, "export: whose form", choices=FORMS)
    output: str | None = flag(
        None, "file; none: import localdata/<name>.<sft|prompt|dpo|test>.json, export <file>.<form>.jsonl"
    )


@dataclass
class Lengths:
    """Lengths"""

    max_length: int = flag(2048, "tokens of prompt and answer together; how many are longer is told", low=2)


@dataclass
class PrepareConfig:
    """prepare_data.py"""

    build: Build = group(Build)
    table: Table = group(Table)
    model: Model = group(Model)
    lengths: Lengths = group(Lengths)
    run: Run = group(Run)


RUN, MODEL = (tuple(each.name for each in fields(part)) for part in (Run, Model))
USES = {  # the flags of each command; another is refused
    "build": ("from_folder", "output_dir", "subsets", "task_limit", "multi_turn", "seed", *RUN),
    "list": ("list",),
    "import": ("columns", "subset", "split", "first_answer", "output", "output_dir", *RUN),
    "export": ("form", "output", *RUN),
    "validate": (*MODEL, "max_length"),
}


@console.stage
def main(argv=None):
    words: list[str] = []
    config = parse(PrepareConfig, argv, description=__doc__, example=EXAMPLE, files=False, words=words)
    command, *rest = words or ["list" if config.build.list else ""]
    commands = {"build": build, "list": listing, "import": import_, "export": export, "validate": validate}
    fits = {"list": not rest, "import": len(rest) == 1, "export": len(rest) == 1}.get(command, bool(rest))
    if command not in commands or not fits:
        raise UserError("expected a command: build SOURCE …, list, import FILE|ID, export FILE, or validate FILE …")
    _check_flags(command, config)
    commands[command](config, rest)


def _check_flags(command: str, config: PrepareConfig) -> None:
    """Raises UserError where a flag is not at its default that the command does not use."""
    given, plain = ({k: v for part in asdict(c).values() for k, v in part.items()} for c in (config, PrepareConfig()))
    needless = [f"--{name}" for name in given if given[name] != plain[name] and name not in USES[command]]
    if needless:
        told = ", ".join(f"--{name}" for name in USES[command])
        raise UserError(f"{command} has no use for {', '.join(needless)}; it takes {told}")


def listing(config: PrepareConfig, words: list[str]) -> None:
    """Print what sources there are."""
    from cream.data import sources

    for source in sources(["all"]):
        rows = ", ".join(f"{split} {about.rows}" for split, about in source.splits.items())
        log.info("%-14s %s\n%15s%s rows; %s; %s", source.name, source.gives, "", rows, source.licence, source.hub)


# Public sources -------------------------------------------------------------------------------------------------------


def build(config: PrepareConfig, names: list[str]) -> None:
    """Write the files of some sources; nothing before all are read, and none is refused."""
    from cream.data.build import check_subsets, gathered, localdata

    b, folder = config.build, Path(config.build.output_dir)
    copies = None if b.from_folder is None else Path(b.from_folder)
    tables = gathered(names, copies, skip=config.run.skip, multi_turn=b.multi_turn)
    files = localdata(tables, count=b.subsets, seed=b.seed, multi_turn=b.multi_turn, task_limit=b.task_limit)
    check_subsets(folder, files, b.subsets)
    outputs = [_output(config, folder, file, tables) for file in files]
    for file, output in zip(files, outputs, strict=True):
        _tell(file, output)
        if not config.run.dry_run and not output.stands:
            with output:
                output.dropped += file.dropped
                output.reject(file.rejected)
                places = {name: str(tables[name].place) for name in file.inputs}
                output.finish(map(encode, file.records), tables=places, tasks=file.tasks)
    if config.run.dry_run:
        log.info("dry run: nothing was written")


def _tell(file, output: journal.Output) -> None:
    from cream.data.build import lost

    log.info("%s: %d records%s", output.path, len(file.records), ", stands already" if output.stands else "")
    if names := lost(output.path, output.provenance.inputs):
        log.warning("  what stands there is of %s too, which this command leaves out", ", ".join(names))
    for task, counts in file.tasks.items():
        left = "".join(f"; {count} left out: {why}" for why, count in counts.items() if why != "kept")
        log.info("  %s: %d%s", task, counts["kept"], left)
    for reason, count in ({} if file.tasks else file.dropped).items():
        log.info("  %d left out: %s", count, reason)


def _output(config: PrepareConfig, folder: Path, file, tables: dict) -> journal.Output:
    provenance = config.run.provenance()
    for name in file.inputs:
        _add(provenance, name, tables[name].place, tables[name].digest)
    return journal.Output(
        folder / file.name,
        file.settings,
        provenance,
        overwrite=config.run.overwrite,
        instead="another --output_dir",
    )


def _add(provenance, name: str, place, digest: str) -> None:
    if place.file:
        provenance.file(name, place.file)
    else:
        provenance.content(name, digest)


# Tables of any kind ---------------------------------------------------------------------------------------------------


def import_(config: PrepareConfig, words: list[str]) -> None:
    """A file of ours from any table; its first good row says of which layout."""
    from cream.data import reading, table

    t = config.table
    place = reading.Place(words[0], t.subset, t.split)
    if place.file and (t.subset, t.split) != (Table.subset, Table.split):
        raise UserError(f"{place}: --subset and --split are of a folder like the hub's, or a hub id; this is one file")
    stem = Path(os.path.abspath(words[0])).name.partition(".")[0]
    with reading.opened(place) as rows:
        kind, names = table.plan(table.columns(t.columns or ""), rows.column_names, str(place))
        log.info("%s: %d rows; %s", place, len(rows), ", ".join(f"{name}={column}" for name, column in names.items()))
        rejected, dropped = [], Counter()
        found = table.records(rows, kind, names, stem, t.first_answer, str(place))
        records = table.kept(found, rejected, dropped, config.run.skip)
        if (first := next(records, None)) is None:
            why = rejected[0]["reason"] if rejected else next(iter(dropped), "none")
            raise UserError(f"{place}: no row makes a record; the first: {why}")
        word = table.WORDS[type(first)]
        target = Path(t.output or Path(config.build.output_dir) / f"{stem}.{word}.json")
        provenance = config.run.provenance()
        _add(provenance, "table", place, reading.digest(rows) if not place.file else "")
        settings = {"columns": t.columns, "first_answer": t.first_answer}
        settings |= {} if place.file else {"table": place.path, "subset": t.subset, "split": t.split}
        settings |= {"on_bad_record": "skip"} if config.run.skip else {}
        output = journal.Output(target, settings, provenance, overwrite=config.run.overwrite)
        if _to_write(config, output):
            with output:
                count = output.finish(_written(chain([first], records), output, rejected, dropped))
            log.info("%s: %d %s records, %d bad rows left out", target, count, type(first).__name__, len(rejected))
            for reason, left in dropped.items():
                log.info("  %d left out: %s", left, reason)
    log.info("next: python prepare_data.py validate %s", target)


def _written(
    records: Iterable[Record], output: journal.Output, rejected: list[dict], dropped: Counter[str]
) -> Iterator[dict]:
    yield from map(encode, records)
    output.dropped += dropped  # all of them are known now
    output.reject(rejected)


def _to_write(config: PrepareConfig, output: journal.Output) -> bool:
    """Whether an output is to be made; tells why not."""
    if output.stands:
        log.info("%s stands already, made by the same settings from the same inputs", output.path)
    elif config.run.dry_run:
        log.info("dry run: would write %s; nothing was written", output.path)
    return not (output.stands or config.run.dry_run)


def export(config: PrepareConfig, words: list[str]) -> None:
    """Rows for other tools, of a file of ours."""
    from cream.data import forms

    t, path = config.table, Path(words[0])
    if t.form is None:
        raise UserError(f"--form is missing: one of {', '.join(FORMS)}")
    target = Path(t.output or path.with_name(f"{path.name.partition('.json')[0]}.{t.form}.jsonl"))
    if ".jsonl" not in target.suffixes:
        raise UserError(f"--output {target}: rows are written one a line, to a name that ends in .jsonl")
    kind = store.detect(path, skip=config.run.skip)
    provenance = config.run.provenance()
    provenance.output("file", path)
    settings = {"form": t.form} | ({"on_bad_record": "skip"} if config.run.skip else {})
    output = journal.Output(target, settings, provenance, overwrite=config.run.overwrite)
    if not _to_write(config, output):
        return
    records = store.read(path, kind, skip=config.run.skip)
    if (first := next(records, None)) is None:
        raise store.nothing_left(path, kind, "record is left to export")
    with output:
        if config.run.skip:
            output.reject(store.rejected(path, kind))
        count = output.finish(forms.export(record, t.form) for record in chain([first], records))
    log.info("%s: %d rows in the form of %s", target, count, t.form)


# What files hold ------------------------------------------------------------------------------------------------------


def validate(config: PrepareConfig, words: list[str]) -> None:
    """Print what each file holds; exit code 2 if anything in one of them is bad. Lengths are in tokens by --model's
    template, and in characters without it."""
    from cream.data.validation import report
    from cream.data.validation import validate as look

    m, chat = config.model, None
    paths = [Path(word) for word in words if not word.endswith(".meta.json")]
    if len(paths) < len(words):
        log.info("%d sidecars passed over: they are no data", len(words) - len(paths))
    if m.model or m.checkpoint:
        from cream.files.folders import check_folder
        from cream.model.load import load_chat

        folder = m.folder(m.checkpoint)
        check_folder(folder)
        chat = load_chat(folder, m.template())
    bad = []
    for path in paths:
        try:
            found = look(path, chat, config.lengths.max_length)
        except (UserError, OSError) as error:
            if (told := mendable(error)) is None:
                raise
            bad.append(path)
            log.info("%s", told)
            continue
        if found.bad_count:
            bad.append(path)
        log.info("%s", "\n".join(report(path, found, "tokens" if chat else "characters")))
    if bad:
        print(f"error: {len(bad)} of {len(paths)} files have bad records: {', '.join(map(str, bad))}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
