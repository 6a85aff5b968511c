"""`prepare_data.py mix`: records of several files, by weight or count -> a shuffled training file, a held-out one.

What is in the output depends on the sources' content, the weights and the seed alone.
"""

import logging
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec

from cream.cli.flags import flag
from cream.cli.screen import say_result
from cream.data.build import shuffled
from cream.data.next_stages import next_stages
from cream.errors import UserError
from cream.files import journal, store
from cream.files.mistakes import find_mistakes
from cream.files.yaml_file import read_yaml
from cream.pairs.validity import SAME, why_invalid_pair
from cream.records import Conversation, Pair, Prompt, Ratings, Record, Samples, Steps, counted, encode, nouns
from cream.text.held_out import held_out, prompt_key

log = logging.getLogger("cream")
WORDS = {  # in the names of files, of the layouts that can be mixed
    Pair: "dpo",
    Ratings: "ratings",
    Steps: "steps",
    Conversation: "sft",
    Prompt: "prompt",
    Samples: "samples",
}


@dataclass
class MixFlags:
    """Mixtures (mix)"""

    config: str | None = flag(
        None, "mix: YAML file with the `sources` (path, weight or count, name), `seed` and `held_out`", decides=False
    )


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of a mixture, and how many of its records are taken: `count`, or `weight` times all of them (2: each
    twice); neither: all. `name` is put before the uuids, and is the file's by default."""

    path: str
    name: str | None = None
    weight: Annotated[float, msgspec.Meta(gt=0)] | None = None
    count: Annotated[int, msgspec.Meta(ge=1)] | None = None

    def __post_init__(self):
        if self.weight is not None and self.count is not None:
            raise ValueError("a source has a `weight` or a `count`, not both")

    @property
    def label(self) -> str:
        return self.name or Path(self.path).name.partition(".")[0]


class Mixture(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a mixture's YAML file holds; `held_out`: prompts, or a share of them below 1."""

    sources: Annotated[list[Source], msgspec.Meta(min_length=1)]
    seed: Annotated[int, msgspec.Meta(ge=0, lt=2**32)] = 0
    held_out: Annotated[float, msgspec.Meta(ge=0)] = 0

    def __post_init__(self):
        twice = [name for name, count in Counter(source.label for source in self.sources).items() if count > 1]
        if twice:
            raise ValueError(f"two sources are called {twice[0]}; give one a `name`")


class Row(NamedTuple):
    """A record that is taken: its uuid in the mixture, the number of the copy, where the spool has it, and the hash of
    its prompt."""

    uuid: str
    copy: int
    offset: int
    prompt: int


# Pure functions -------------------------------------------------------------------------------------------------------


def taken(uuids: Collection[str], weight: float | None, count: int | None, seed: int) -> list[tuple[str, int]]:
    """(uuid, number of the copy) of the records that are taken: `weight` times all, or `count`, drawn by the seed.
    Raises UserError if there are fewer than `count`."""
    if count is not None and count > len(uuids):
        raise UserError(f"count {count} is more than its {len(uuids)} usable records; a weight above 1 repeats them")
    number = count if count is not None else round((1.0 if weight is None else weight) * len(uuids))
    copies, rest = divmod(number, len(uuids)) if uuids else (0, 0)
    whole = [(uuid, copy) for copy in range(copies) for uuid in uuids]
    return whole + [(uuid, copies) for uuid in (shuffled(uuids, seed)[:rest] if rest else ())]


def why_dropped(record: Record) -> str | None:
    """Why a record is not trained on; None if it may be."""
    if not isinstance(record, Pair):
        return None
    return why_invalid_pair(record) or (SAME if record.selected == record.rejected else None)


# The command ----------------------------------------------------------------------------------------------------------


class Spool:
    """Encoded records in a temporary file, so that they can be shuffled without being in memory."""

    def __init__(self, folder: Path):
        self._file = tempfile.TemporaryFile(dir=folder)

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *error) -> None:
        self._file.close()

    def add(self, row: dict) -> int:
        """The offset of a row, which `read` takes."""
        offset = self._file.tell()
        self._file.write(msgspec.json.encode(row) + b"\n")
        return offset

    def read(self, rows: Iterable[Row], source: dict[str, str]) -> Iterator[dict]:
        """Rows with their uuids in the mixture, and the name of their source as `mixed_from`."""
        for row in rows:
            self._file.seek(row.offset)
            yield msgspec.json.decode(self._file.readline()) | {"uuid": row.uuid, "mixed_from": source[row.uuid]}


def read_mixture(path: Path) -> Mixture:
    """The mixture in a YAML file. Raises UserError with all that is wrong with it."""
    value = read_yaml(path)
    if mistakes := find_mistakes(value, Mixture):
        raise UserError("\n".join(f"{path}: {mistake}" for mistake in mistakes))
    return msgspec.convert(value, Mixture)


def make(mixture: Mixture, config: Path | None, output: Path | None, folder: Path, run) -> None:
    """Write the mixture, and beside it its held-out part. `config`: its file, if it has one."""
    paths = [Path(source.path) for source in mixture.sources]
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise UserError(f"{config or 'mix'}: {', '.join(missing)}: no such file")
    kind = _kind_of(paths, run.skip)
    target = output or folder / f"{config.name.partition('.')[0] if config else 'mix'}.{WORDS[kind]}.json"
    outputs = _outputs(mixture, paths, {"train": target, "held out": _beside(target, kind)}, run)
    if all(each.up_to_date for each in outputs.values()):
        say_result("%s is up to date (same settings and inputs); skipping", target)
        return
    with tempfile.TemporaryDirectory() as scratch, Spool(Path(scratch)) as spool:
        rows, sources, dropped = [], {}, Counter()
        for source, path in zip(mixture.sources, paths, strict=True):
            own = _rows(source, path, kind, mixture.seed, spool, dropped, run.skip)
            sources |= {row.uuid: source.label for row in own}
            rows += own
        parts, counts = _split(rows, sources, mixture)
        _describe(counts, dropped)
        if run.dry_run:
            log.info("dry run: would write %s; nothing was written", ", ".join(str(o.path) for o in outputs.values()))
            return
        for part, each in outputs.items():
            if not each.up_to_date:
                with each:
                    if part == "train":
                        each.dropped += dropped
                        each.reject(row for path in paths if run.skip for row in store.rejected(path, kind))
                    each.finish(spool.read(parts[part], sources), taken=counts)
            say_result("%s: %s", each.path, counted(len(parts[part]), kind))
    held = outputs.get("held out")
    for word, command in zip(("next", "or"), next_stages(kind, target, held and held.path), strict=False):
        log.info("%s: %s", word, command)


def _outputs(mixture: Mixture, paths: Sequence[Path], places: dict[str, Path], run) -> dict[str, journal.Output]:
    """The files of both parts, the held-out one only if there is one."""
    provenance = run.provenance()
    for source, path in zip(mixture.sources, paths, strict=True):
        provenance.output(source.label, path)
    how = [{"name": each.label, "weight": each.weight, "count": each.count} for each in mixture.sources]
    settings = {"mix": how, "seed": mixture.seed, "held_out": mixture.held_out, "on_bad_record": run.on_bad_record}
    return {
        part: journal.Output(place, settings | {"part": part}, provenance, overwrite=run.overwrite)
        for part, place in places.items()
        if part == "train" or mixture.held_out
    }


def _kind_of(paths: Sequence[Path], skip: bool) -> type[Record]:
    """The layout that all files have."""
    kinds = {path: store.detect(path, skip=skip) for path in paths}
    first = kinds[paths[0]]
    if first not in WORDS:
        raise UserError(f"{paths[0]}: holds {nouns(first)}, which cannot be mixed")
    if odd := [path for path in paths if kinds[path] is not first]:
        raise UserError(
            f"{odd[0]}: holds {nouns(kinds[odd[0]])}, and {paths[0]} {nouns(first)}; a mixture has one layout"
        )
    return first


def _rows(
    source: Source, path: Path, kind: type[Record], seed: int, spool: Spool, dropped: Counter[str], skip: bool
) -> list[Row]:
    """The records that are taken of a source."""
    places: dict[str, tuple[int, int]] = {}
    for record in store.read(path, kind, skip=skip):
        if reason := why_dropped(record):
            dropped[reason] += 1
        else:
            places[record.uuid] = spool.add(encode(record)), prompt_key(record)
    try:
        chosen = taken(places, source.weight, source.count, seed)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if not chosen:
        raise UserError(f"{path}: none of its {len(places)} usable records is taken")
    return [Row(f"{source.label}/{uuid}" + (f"#{copy}" if copy else ""), copy, *places[uuid]) for uuid, copy in chosen]


def _split(rows: list[Row], sources: dict[str, str], mixture: Mixture) -> tuple[dict[str, list[Row]], dict[str, dict]]:
    """The shuffled rows of each part, and per source how many each part has. The held-out part has no copies."""
    held = held_out({row.prompt for row in rows}, mixture.held_out, mixture.seed)
    by_uuid = {row.uuid: row for row in rows}
    parts: dict[str, list[Row]] = {"train": [], "held out": []}
    counts = {source.label: dict.fromkeys(parts, 0) for source in mixture.sources}
    for uuid in shuffled(by_uuid, mixture.seed):
        row = by_uuid[uuid]
        part = "held out" if row.prompt in held else "train"
        if part == "held out" and row.copy:
            continue
        parts[part].append(row)
        counts[sources[uuid]][part] += 1
    return parts, counts


def _beside(output: Path, kind: type[Record]) -> Path:
    """mix.dpo.json -> mix.held_out.dpo.json."""
    head, dot, ending = output.name.rpartition(".json")
    word = WORDS[kind]
    return output.with_name(f"{head.removesuffix('.' + word)}.held_out.{word}{dot}{ending}")


def _describe(counts: dict[str, dict], dropped: Counter[str]) -> None:
    for name, parts in counts.items():
        log.info("  %s: %d to train on, %d held out", name, parts["train"], parts["held out"])
    for reason, count in dropped.items():
        log.info("  %d skipped: %s", count, reason)
