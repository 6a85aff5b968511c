"""The commands of prepare_data.py but import, and the flags of all.

`run`: the script's flags of that name (overwrite, dry_run, skip, provenance()).
"""

import logging
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
SHOWN = 10  # overlapping records that are listed


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
    selection: str = flag(
        "rank",
        "oasst1's SFT set: rank, every prompt with its best-ranked reply, as arXiv 2401.10020 selects; quality, only "
        "those with a quality label above 0.6 and more than 5 words on both sides, the best first, as AutoAlign does",
        choices=("rank", "quality"),
    )
    sft_limit: int | None = flag(
        None,
        "at most this many conversations in the SFT set (the paper: 3200), chosen by the seed, with --selection "
        "quality the best; none: all",
        low=1,
    )
    seed: int = flag(0, "seed of the subsets, of --task_limit and --sft_limit, of --orders one", low=0, high=2**32 - 1)
    list: bool = flag(False, "same as the command list")


@dataclass
class Table:
    """Import, export and overlap"""

    columns: str | None = flag(
        None,
        "what each column is, field=column,…; a+b joins two columns, a.b is a key (or number) inside one, #1 the first "
        "column of a .csv file without a header; none: by their usual names",
    )
    best: str | None = flag(
        None, "meaning of the column that --columns names as best, value=N,…: response 1 or 2 is better, 0 a tie"
    )
    thought_key: str | None = flag(
        None, "key of messages with a response's thought, which is put into the response as <think>…</think>"
    )
    ignore_keys: str | None = flag(None, "keys of messages to drop, key,…; other unknown ones are refused")
    sep: str | None = flag(
        None, "character between the cells of a .csv file, or tab; none: a comma, in a .tsv file a tab"
    )
    subset: str | None = flag(None, "configuration of a data set on the hub, or in a folder with the hub's layout")
    split: str = flag("train", "split of such a data set")
    first_answer: int | None = flag(None, "number of the first option, if answers are numbers", choices=(0, 1))
    grader: str | None = flag(
        None,
        "math: answers may be formulas, which evaluation compares by math-verify; none: letters and numbers only",
        choices=("math",),
    )
    form: str | None = flag(None, "export: format of the rows", choices=FORMS)
    output: str | None = flag(
        None,
        "output file; none: localdata/<name>.<sft|prompt|dpo|ranked|test>.json (import), <file>.<form>.jsonl (export), "
        "localdata/eft.sft.json (eft), localdata/<file>.steps.json (steps), localdata/<file>.pairwise.sft.json "
        "(pairwise), no file (overlap)",
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
    which = {"multi_turn": flags.multi_turn, "selection": flags.selection}
    tables = read_tables(names, copies, skip=run.skip, **which)
    how = {"seed": flags.seed, "task_limit": flags.task_limit, "sft_limit": flags.sft_limit} | which
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
        add_input(provenance, name, tables[name].place, tables[name].digest)
    return journal.Output(path, file.settings, provenance, overwrite=run.overwrite, instead=instead)


def add_input(provenance: Provenance, name: str, place, digest: str) -> None:
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
    describe_dropped({} if file.tasks else file.dropped)


def describe_dropped(dropped: dict[str, int]) -> None:
    for reason, count in dropped.items():
        log.info("  %d skipped: %s", count, reason)


def skips(run) -> dict[str, str]:
    """The setting of an output that lacks malformed records."""
    return {"on_bad_record": "skip"} if run.skip else {}


def is_needed(output: journal.Output, run) -> bool:
    """Whether an output has to be written; logs why not."""
    if output.up_to_date:
        log.info("%s is up to date (same settings and inputs); skipping", output.path)
    elif run.dry_run:
        log.info("dry run: would write %s; nothing was written", output.path)
    return not (output.up_to_date or run.dry_run)


def overlap(words: Sequence[str], flags: Table, run) -> None:
    """Say which prompts or questions of the first file share words with those of the others; with --output, write the
    first file without them."""
    from cream.data.overlap import CONTAMINATED, N, first_shared, grams, prompt_text, share

    path, *others = paths = [Path(word) for word in words]
    provenance = run.provenance()
    for name, each in zip(("file", *(f"other_{number}" for number, _ in enumerate(others, 1))), paths, strict=True):
        provenance.output(name, each)
    kinds = {each: store.detect(each, skip=run.skip) for each in paths}
    known, count = {}, 0  # gram -> the first record that has it
    for each in others:
        for record in store.read(each, kinds[each], skip=run.skip):
            count += 1
            known |= {gram: (each, record.uuid) for gram in grams(prompt_text(record)) if gram not in known}
    shared = {}  # uuid -> what it shares with whom
    total = 0
    for record in store.read(path, kinds[path], skip=run.skip):
        total += 1
        text = prompt_text(record)
        if found := first_shared(text, known):
            own, (file, uuid) = grams(text), known[found[0]]
            shared[record.uuid] = f"{share(own, known.keys()):4.0%} of its runs, one with {uuid} of {file}: {found[1]}"
    log.info("%s: %d of %d records share %d words in a row (shorter ones: all words) with one of %d records of %s",
             path, len(shared), total, N, count, ", ".join(map(str, others)))  # fmt: skip
    for uuid, what in [*shared.items()][:SHOWN]:
        log.info("  %s: %s", uuid, what)
    if len(shared) > SHOWN:
        log.info("  … and %d more", len(shared) - SHOWN)
    if flags.output is None:
        log.info("to write the others: --output FILE" if shared else "they do not overlap")
        return
    output = journal.Output(Path(flags.output), {"overlap": N} | skips(run), provenance, overwrite=run.overwrite)
    if is_needed(output, run):
        with output:
            output.reject(store.rejected(path, kinds[path]) if run.skip else ())
            output.dropped[CONTAMINATED] += len(shared)
            kept = (each for each in store.read(path, kinds[path], skip=run.skip) if each.uuid not in shared)
            log.info("%s: %d records", output.path, output.finish(map(encode, kept)))


def eft(word: str, flags, seed_data: Path | None, build_flags: Build, output: str | None, run) -> None:
    """Write judge-training data. `seed_data`: the file that --seed_data names."""
    from cream.data.eft import make

    target = Path(output or Path(build_flags.output_dir) / "eft.sft.json")
    make(Path(word), flags, seed_data, target, build_flags.seed, run)


def steps(word: str, flags, build_flags: Build, output: str | None, run) -> None:
    """Make training data of process and outcome reward models of verified responses."""
    from cream.data import verified

    target = Path(output or Path(build_flags.output_dir) / f"{Path(word).name.partition('.json')[0]}.steps.json")
    verified.make(Path(word), flags, target, run)


def pairwise(word: str, flags, build_flags: Build, output: str | None, run) -> None:
    """Write the training data of a pairwise preference model."""
    from cream.data.pairwise import make

    path = Path(word)
    default = Path(build_flags.output_dir) / f"{path.name.partition('.json')[0]}.pairwise.sft.json"
    make(path, flags, Path(output) if output else default, build_flags.seed, run)


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
        raise UserError(
            f"{len(bad)} of {len(paths)} files cannot be read or have bad records: {', '.join(map(str, bad))}"
        )
