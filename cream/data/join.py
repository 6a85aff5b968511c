"""`prepare_data.py join`: the records of several files, each uuid once, from the first file that has it.

So a training set from few labels is made: the labelled pairs first, which are never replaced; then the newest
pseudo-labels; then the training set of the round before. With --without one takes a pool's labelled prompts away.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cream.cli import advice
from cream.cli.flags import flag
from cream.cli.screen import say_result
from cream.data.mix import WORDS
from cream.data.next_stages import next_stages
from cream.errors import UserError
from cream.files import journal, store
from cream.records import Record, counted, encode, nouns

log = logging.getLogger("cream")
EARLIER = "an earlier file has its uuid"
WITHOUT = "--without has its uuid"


@dataclass
class JoinFlags:
    """Joined files (join)"""

    without: str | None = flag(None, "join: a file whose uuids are skipped", decides=False)


def first_of(
    files: Sequence[Iterator[Record]], without: set[str], counts: list[int], dropped: Counter[str]
) -> Iterator[Record]:
    """Each record whose uuid is neither in `without` nor in an earlier file; `counts`: how many of each file."""
    seen = set(without)
    for number, records in enumerate(files):
        own = set()
        for record in records:
            if record.uuid in seen:
                dropped[WITHOUT if record.uuid in without else EARLIER] += 1
                continue
            own.add(record.uuid)
            counts[number] += 1
            yield record
        seen |= own


def make(paths: Sequence[Path], without: Path | None, target: Path | None, folder: Path, run) -> None:
    """Write the joined file. Raises UserError where files are of several layouts, or nothing is left."""
    paths = list(dict.fromkeys(paths))  # in a loop's first round two may be the same
    kind = _kind_of(paths)
    target = target or folder / f"joined.{WORDS[kind]}.json"
    provenance = run.provenance()
    for number, path in enumerate(paths, 1):
        provenance.output(f"file_{number}", path)
    if without:
        provenance.output("without", without)
    output = journal.Output(target, {"on_bad_record": run.on_bad_record}, provenance, overwrite=run.overwrite)
    if output.up_to_date:
        say_result("%s is up to date (same settings and inputs); skipping", target)
        return
    if run.dry_run:
        log.info("dry run: would write %s; nothing was written", target)
        return
    known = {row["uuid"] for row in store.read_rows(without)} if without else set()
    counts = [0] * len(paths)
    with output:
        output.reject(row for path in paths if run.skip for row in store.rejected(path, kind))
        records = first_of([store.read(path, kind, skip=run.skip) for path in paths], known, counts, output.dropped)
        total = output.finish(_some(records, paths), taken=counts)
    say_result("%s: %s", target, counted(total, kind))
    for path, count in zip(paths, counts, strict=True):
        log.info("  %d of %s", count, path)
    for reason, count in output.dropped.items():
        log.info("  %d skipped: %s", count, reason)
    advice.say("next: %s", next_stages(kind, target)[-1])


def _some(records: Iterator[Record], paths: Sequence[Path]) -> Iterator[dict]:
    """The records, encoded. Raises UserError if there is none."""
    empty = True
    for record in records:
        empty = False
        yield encode(record)
    if empty:
        raise UserError(f"join: no record is left of {', '.join(map(str, paths))}")


def _kind_of(paths: Sequence[Path]) -> type[Record]:
    """The layout of all files but empty ones, as pairs may be of a round without pseudo-labels."""
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise UserError(f"join: {', '.join(missing)}: no such file")
    kinds = {path: kind for path in paths if next(store.read_rows(path), None) and (kind := store.detect(path))}
    if not kinds:
        raise UserError(f"join: no record is left of {', '.join(map(str, paths))}")
    first, *others = kinds.items()
    if first[1] not in WORDS:
        raise UserError(f"{first[0]}: holds {nouns(first[1])}, which cannot be joined")
    for path, kind in others:
        if kind is not first[1]:
            raise UserError(f"{path}: holds {nouns(kind)}, and {first[0]} {nouns(first[1])}")
    return first[1]
