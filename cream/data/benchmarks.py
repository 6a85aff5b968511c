"""Preferences -> samples with gold values, which any reward can be given to and measured by.

Read are RewardBench (prompt, chosen, rejected, subset), RewardBench 2 (lists of chosen and of rejected texts), problems
with answers and labels, pairs and ranked responses as `prepare_data.py import` reads them without --columns, and pair
and ranked files of this project. A sample's `gold` has a number for each response, the highest is best.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cream.cli.screen import say_result
from cream.data import columns, reading, table
from cream.data.reading import Place
from cream.errors import UserError
from cream.files import store
from cream.files.journal import Output
from cream.files.provenance import Provenance
from cream.files.store import Bad
from cream.records import Pair, Record, Samples, decode, encode, nouns

log = logging.getLogger("cream")
SPLITS = {"allenai/reward-bench": "filtered"}  # splits of data sets on the hub that are not called test
KINDS = (Pair, Samples)
ENDINGS = re.compile(r"(\.(dpo|samples|json|jsonl|csv|parquet|gz|zst|zip))+$")


@dataclass(frozen=True)
class Data:
    """The samples of several places, with what was dropped; `digests`: of the rows of places that are not files."""

    places: list[Place]
    samples: list[Samples]
    dropped: Counter[str]
    rejected: list[dict]
    digests: list[str]

    @classmethod
    def read(cls, words: str, split: str | None, limit: int | None, skip: bool) -> "Data":
        """`words`: places, separated by commas. Raises UserError where two samples have one uuid, or there is none."""
        places = [Place(word.strip(), None, split or SPLITS.get(word.strip(), "test")) for word in words.split(",")]
        dropped, rejected, samples, digests = Counter(), [], {}, []
        for place in places:
            own = list(read(place, limit, dropped, rejected, skip))
            digests.append("" if place.file else reading.digest(map(encode, own)))
            for sample in own:
                if sample.uuid in samples:
                    raise UserError(f"{place}: uuid {sample.uuid!r} occurs in an earlier file of --data, too")
                samples[sample.uuid] = sample
        if not samples:
            raise UserError(f"--data {words}: no row is left; {rejected[0]['reason'] if rejected else ''}")
        return cls(places, [*samples.values()], dropped, rejected, digests)

    @property
    def name(self) -> str:
        """The files' names, without their endings: of mix.held_out.dpo.json "mix.held_out"."""
        return "+".join(ENDINGS.sub("", Path(place.path.rstrip("/")).name) for place in self.places)

    def add_to(self, provenance: Provenance) -> None:
        """Add the places to an output's inputs."""
        for number, (place, digest) in enumerate(zip(self.places, self.digests, strict=True), 1):
            name = "data" if number == 1 else f"data_{number}"
            if place.file:
                provenance.file(name, place.file)
            else:
                provenance.content(name, digest)

    def write(self, path: Path, run) -> Path:
        """Write the samples, unless they are there or this is a dry run; `run`: the script's flags of that name."""
        provenance = run.provenance()
        self.add_to(provenance)
        settings = {"rows": len(self.samples)} | ({"on_bad_record": "skip"} if run.skip else {})
        output = Output(path, settings, provenance, overwrite=run.overwrite, instead="another --output_dir")
        say_result("%s: %d prompts%s", path, len(self.samples), " (up to date)" if output.up_to_date else "")
        for reason, count in self.dropped.items():
            log.info("  %d skipped: %s", count, reason)
        if not (output.up_to_date or run.dry_run):
            with output:
                output.reject(self.rejected)
                output.dropped += self.dropped
                output.finish(map(encode, self.samples))
        return path


def read(place: Place, limit: int | None, dropped: Counter[str], rejected: list[dict], skip: bool) -> Iterator[Samples]:
    """The samples of a file, a folder or a data set on the hub, or of its first `limit` rows. Pairs of equal responses
    are counted in `dropped`, malformed rows added to `rejected` with `skip`; else they raise a UserError."""
    kind = store.kind_in(place.file) if place.file and store.is_record_file(place.file) else None
    if kind in KINDS:
        rejected += store.rejected(place.file, kind, limit) if skip else ()
        records: Iterable[Record] = store.read(place.file, kind, limit, skip=skip)
        yield from map(_sample, _kept(records, dropped))
        return
    with reading.open_rows(place) as rows:
        yield from map(_sample, table.keep_good(_records(rows, place, limit), rejected, dropped, skip))


def _kept(records: Iterable[Record], dropped: Counter[str]) -> Iterator[Record]:
    for record in records:
        if isinstance(record, Pair) and record.selected == record.rejected:
            dropped[table.SAME] += 1
        else:
            yield record


def _records(rows: Iterable[Mapping], place: Place, limit: int | None) -> Iterator:
    """The record of each row, or why it has none, as `table.records` gives them."""
    rows = [_named(row) for _, row in zip(range(limit or len(rows)), rows, strict=False)]
    head, where = next(iter(rows), {}), str(place)
    several = [name for name in ("chosen", "rejected") if _texts(head.get(name))]
    if "answers" in head or len(several) == 2:
        return _responses(rows, where)
    kind, names = columns.plan({}, head, where)
    if kind not in KINDS:
        raise UserError(
            f"{where}: its rows are {nouns(kind)}, which say of no response that it is better than another. "
            "Expected chosen and rejected, or answers and labels; prepare_data.py import reads other forms"
        )
    return table.records(rows, kind, names, place.path.rpartition("/")[2].partition(".")[0], where)


def _named(row: Mapping) -> dict:
    """The row with a uuid, if it has an id: these are unique in their subset."""
    subset, own = row.get("subset") or "", row.get("id")
    if "uuid" in row or own is None:
        return dict(row)
    return {"uuid": str(own) if str(own).startswith(subset) else f"{subset}-{own}", **row}


def _texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, str) for each in value)


def _responses(rows: Iterable[Mapping], where: str) -> Iterator[Samples | Bad]:
    """Samples of rows with several correct and wrong responses, or with answers and labels."""
    seen = set()
    for index, row in enumerate(rows):
        uuid = str(row.get("uuid") or row.get("id") or f"row-{index:06d}")
        try:
            if uuid in seen:
                raise ValueError(f"uuid {uuid!r} occurs twice")
            record = decode(Samples, uuid, {**_rest(row), **_fields(row)}, "row")
        except (ValueError, UserError) as error:
            reason = str(error).removeprefix(f"row: record {uuid!r}: ")
            yield Bad(f"{where}, row {index}", uuid, reason, repr(row).encode())
            continue
        seen.add(uuid)
        yield record


def _rest(row: Mapping) -> dict:
    return {key: v for key, v in row.items() if v is not None and key in ("id", "subset", "num_correct")}


def _fields(row: Mapping) -> dict:
    """`prompt`, `responses`, `gold` and perhaps `finals` of a row. Raises ValueError where there is none of them."""
    prompt = row.get("prompt")
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if "answers" in row:
        labels = row.get("labels", row.get("label"))
        if not _texts(row["answers"]) or not isinstance(labels, list) or len(labels) != len(row["answers"]):
            raise ValueError("expected answers, texts, and labels, a number for each")
        finals = row.get("final")
        return {"prompt": prompt, "responses": row["answers"], "gold": labels} | ({"finals": finals} if finals else {})
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if not _texts(chosen) or not _texts(rejected):
        raise ValueError("expected chosen and rejected, texts: a response is missing")
    if row.get("num_correct") not in (None, len(chosen)):
        raise ValueError(f"{len(chosen)} chosen responses, but num_correct is {row['num_correct']}")
    return {"prompt": prompt, "responses": chosen + rejected, "gold": [1] * len(chosen) + [0] * len(rejected)}


def _sample(record: Record) -> Samples:
    """The record as samples with gold values. Raises UserError where it has none."""
    if isinstance(record, Pair):
        ends = ["length" if cut else "stop" for cut in (record.selected_truncated, record.rejected_truncated)]
        texts = [record.selected[-1].content, record.rejected[-1].content]
        gold = [0, 0] if record.ordered is None else [1, 0] if record.ordered[0] == texts[0] else [0, 1]
        fields = {"prompt": encode(record)["prompt"], "responses": texts, "finish_reason": ends, "gold": gold}
        extra = {key: value for key, value in record.extra.items() if key not in ("gold", "ranks")}
        record = decode(Samples, record.uuid, {**extra, **fields}, "pair")
    if not any(record.extra.get(key) is not None for key in ("gold", "ranks")):
        raise UserError(
            f"record {record.uuid!r}: has neither `gold` nor `ranks`: nothing says which response is better"
        )
    return record
