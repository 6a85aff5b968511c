"""`prepare_data.py build`: public sources -> the files of a loop."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cream.cli.flags import flag
from cream.cli.screen import say_result
from cream.data.outputs import Folder, Seed, add_input, describe_dropped
from cream.files import journal
from cream.records import encode

log = logging.getLogger("cream")
WORDS = "SOURCE …"
ABOUT = "public sources, or all -> localdata/: SFT set, prompts and their subsets, test sets, train splits"


@dataclass
class Options(Folder, Seed):
    """Build"""

    from_folder: str | None = flag(
        None,
        "folder with copies of the hub's data sets, or with files named after them; none: the hub",
        aliases=("from",),
    )
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


def run(words: Sequence[str], flags: Options, config) -> None:
    build(words, flags, config.run)


def build(names: Sequence[str], flags: Options, run) -> None:
    """Write the files of some sources, after all of them have been read and checked."""
    from cream.data.build import build_files, check_subsets, read_tables

    folder = Path(flags.output_dir)
    copies = None if flags.from_folder is None else Path(flags.from_folder)
    which = {"multi_turn": flags.multi_turn, "selection": flags.selection}
    tables = read_tables(names, copies, skip=run.skip, **which)
    how = {"seed": flags.seed or 0, "task_limit": flags.task_limit, "sft_limit": flags.sft_limit} | which
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


def _describe(file, output: journal.Output) -> None:
    """Log the size of a file, and how many records of its sources were skipped."""
    from cream.data.build import lost_sources

    say_result(
        "%s: %d records%s", output.path, len(file.records), " (up to date; skipping)" if output.up_to_date else ""
    )
    if names := lost_sources(output.path, output.provenance.inputs):
        log.warning("  this replaces a file that also has records of %s, which are lost", ", ".join(names))
    for task, counts in file.tasks.items():
        skipped = "".join(f"; {count} skipped: {why}" for why, count in counts.items() if why != "kept")
        log.info("  %s: %d%s", task, counts["kept"], skipped)
    describe_dropped({} if file.tasks else file.dropped)
