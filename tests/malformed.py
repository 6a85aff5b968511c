"""Malformed files of every layout: what people and machines do to them, and seeded mutations of valid ones."""

import gzip
import json
import os
import random
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import zstandard
from layouts import lines, records, whole
from msgspec import structs

from cream.files.raw import BOM
from cream.records import Answer, Conversation, Item, Pair, Prompt, Rewards, Samples

BAD = 2  # the record that is damaged
HERE = rf"line {BAD + 1}\b|'q{BAD}'|element {BAD}\b"  # how a message names it
ANYWHERE = r"line \d+|element \d+|record '|uuid '|byte|truncated|UTF-8|unpacked|nested|no records|surrogate|expected"
MUTATIONS = 20  # of each stage's valid file
WRONG = (None, True, 7, -1.5, "x", "", [], {}, [[]], {"a": 1}, 10**30)
ROLES = {
    "no turn": [],
    "the assistant ends": ["user", "assistant"],
    "only a system's turn": ["system"],
    "the assistant begins": ["assistant", "user"],
    "two users": ["user", "user"],
    "system within": ["user", "system", "user"],
    "unknown role": ["tool"],
    "no role": [None],
}
NUMBERS = {  # field -> raw JSON that stands where a finite number is due
    Samples: {"logprob": ["NaN", "Infinity", "1e999", "1e301", '"-3.5"', "true"], "num_tokens": ["-1", "1.5", "1e20"]},
    Rewards: {
        "reward": ["NaN", "-Infinity", "1e999", "-1e301", '"1"', "[]"],
        "score": ["nan", "1e400", "{}"],
        "ref_score": ["Infinity", "false"],
        "num_tokens": ["2147483648", "null"],
    },
    Pair: {
        "consistency": ["NaN", "1.5", "-0.1", '"0.5"', "1e999", "[0.5]"],
        "tau": ["2", "-Infinity"],
        "margin": ["1e999"],
        "selected_index": ["-1", "1.5"],
        "selected_truncated": ["1", "null"],
    },
    Item: {"label": ["null", "NaN", "1e999", '""', '" "', "[]", "1" + "0" * 400, '"Z"']},
    Answer: {"label": ['"Z"', '"' + "Z" * 5000 + '"']},
}
LISTS = {Samples: ["finish_reason", "num_tokens", "logprob"], Rewards: ["score", "ref_score", "reward", "reason"]}


class Case(NamedTuple):
    """A file's suffix and bytes (or what makes it), and a pattern of how the message names the place."""

    name: str
    suffix: str
    data: bytes | Callable[[Path], object]
    place: str = ANYWHERE


def corpus(kind: type) -> Iterator[Case]:
    """What is wrong whatever the random generator says."""
    yield from _places()
    yield from _files(kind)
    yield from _packed(kind)
    yield from _records(kind)
    yield from _fields(kind)
    yield from _conversations(kind)
    for field, raws in NUMBERS.get(kind, {}).items():
        for raw in raws:
            listed = records(kind)[BAD].get(field)
            value = ["@", *listed[1:]] if isinstance(listed, list) else "@"
            yield _line(kind, f"{field} {raw[:9]}", raw.encode(), {field: value})


def _line(kind: type, name: str, raw: bytes, change: dict) -> Case:
    """The valid records but for one, which has `change`, its "@" replaced by raw text."""
    rows = records(kind)
    rows[BAD] |= change
    return Case(name, ".jsonl", lines(rows).replace(b'"@"', raw), HERE)


def _places() -> Iterator[Case]:
    """No file, or none that can be read."""
    yield Case("missing", ".jsonl", lambda path: None, "no such file|neither a file")
    yield Case("a folder", ".jsonl", Path.mkdir, "folder|no such file|neither a file")
    yield Case("a pipe", ".jsonl", os.mkfifo, "pipe|no such file|neither a file")
    yield Case("a link to nothing", ".json", lambda path: path.symlink_to("nothing"), "no such file|neither a file")
    yield Case("a link to itself", ".json", lambda path: path.symlink_to(path.name), "links|no such|neither a file")
    if os.geteuid():  # root reads it all the same
        yield Case("unreadable", ".jsonl", lambda path: path.touch(0), "permission")


def _files(kind: type) -> Iterator[Case]:
    """Damage to a file as a whole."""
    rows = records(kind)
    for suffix, text in ((".jsonl", lines(rows)), (".json", whole(kind, rows))):
        yield Case("empty", suffix, b"", ".")
        yield Case("blanks", suffix, b" \n\t\r\n", ".")
        yield Case("byte-order mark", suffix, BOM + text, "byte-order mark")
        yield Case("trailing garbage", suffix, text + b"}", f"line {len(rows) + 1}|byte|trailing")
        yield Case("cut short", suffix, text[:-9])
        yield Case("no UTF-8", suffix, text.replace(b"What", b"\xff\xfe", 1), "line 1|q0|UTF-8")
        yield Case("UTF-16", suffix, text.decode().encode("utf-16"))
        yield Case("lone surrogate", suffix, text.replace(b"What", b"\\ud800", 1), "surrogate")
        yield Case("zeros", suffix, text[:20] + bytes(64) + text[84:])
        yield Case("doubled uuid", suffix, (lines if suffix == ".jsonl" else _whole(kind))([*rows, rows[BAD]]), "'q2'")
        yield Case("a number", suffix, b"7", ".")
        yield Case("single quotes", suffix, text.replace(b'"', b"'"))
    yield Case("a list of nothing", ".json", b"[]", ".")
    yield Case("an empty object", ".json", b"{}", ".")
    yield Case("brackets without end", ".json", b'{"q0": ' + b"[" * 200_000, "nested|q0|byte|truncated")
    yield Case("brackets", ".jsonl", lines(rows) + b"[" * 200_000 + b"]" * 200_000, f"line {len(rows) + 1}")
    yield Case("braces", ".jsonl", b'{"a":' * 200_000 + b"1" + b"}" * 200_000, "line 1")
    for suffix in (".txt", ".csv", "", ".json.bz2", ".jsonl.zip"):
        yield Case("wrong suffix", suffix, lines(rows), r"\.json or \.jsonl|neither a file")


def _whole(kind: type):
    return lambda rows: whole(kind, rows)


def _packed(kind: type) -> Iterator[Case]:
    """Damage to packed files, of which a part still unpacks to whole records."""
    text = lines(records(kind))
    zst, gz = zstandard.ZstdCompressor(write_checksum=True).compress(text), gzip.compress(text, mtime=0)
    first = text.index(b"\n") + 1
    parts = zstandard.ZstdCompressor().compressobj()
    up_to_a_line = parts.compress(text[:first]) + parts.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    deflate = zlib.compressobj(wbits=31)
    synced = deflate.compress(text[:first]) + deflate.flush(zlib.Z_SYNC_FLUSH)
    for suffix, packed, at_a_line in ((".jsonl.zst", zst, up_to_a_line), (".jsonl.gz", gz, synced)):
        for name, data in {
            "not packed": text,
            "cut short": packed[: len(packed) // 2],
            "last byte missing": packed[:-1],
            "cut within the first bytes": packed[:3],
            "cut at a line": at_a_line,
            "a bit of its checksum": packed[:-1] + bytes([packed[-1] ^ 1]) if suffix[-2:] == "st" else packed[:-5],
            "garbage after it": packed + b"garbage",
            "a second one, cut": packed + packed[:20],
        }.items():
            yield Case(f"packed: {name}", suffix, data, "unpacked")


def _records(kind: type) -> Iterator[Case]:
    """A record that is none, or has no uuid."""
    rows = records(kind)
    for value in (None, 7, "x", [], [[]], {}, True, 10**400):
        damaged = [*rows[:BAD], value, *rows[BAD + 1 :]]
        yield Case(f"record {str(value)[:5]}", ".jsonl", lines(damaged), HERE)
        if kind is not Item and value not in ([], {}):  # a conversation's value may be a list
            text = whole(kind, rows)[:-1] + b', "bad": ' + json.dumps(value).encode() + b"}"
            yield Case(f"value {str(value)[:5]}", ".json", text, "'bad'")
    for uuid in (None, 7, "", " \n", [], {}, True):
        yield _line(kind, f"uuid {uuid!r}", b"", {"uuid": uuid})
    rows[BAD].pop("uuid")
    yield Case("no uuid", ".jsonl", lines(rows), HERE)
    if kind is not Item:
        for uuid in ("", " \n"):
            text = whole(kind, [*records(kind), {**records(kind)[0], "uuid": uuid}])
            yield Case(f"key {uuid!r}", ".json", text, "blank")


def _fields(kind: type) -> Iterator[Case]:
    """Each key missing, and of a type that none has; each list longer than the others."""
    for field in structs.fields(kind):
        if field.name in ("uuid", "extra"):
            continue
        yield _line(kind, f"{field.name} of a wrong type", b"", {field.name: {"no": 1}})
        if field.required:
            rows = records(kind)
            del rows[BAD][field.name]
            yield Case(f"no {field.name}", ".jsonl", lines(rows), HERE)
    for field in LISTS.get(kind, ()):
        yield _line(kind, f"ragged {field}", b"", {field: [None, None]})


def _conversations(kind: type) -> Iterator[Case]:
    """Turns in a wrong order, blank ones, and answers that belong to another prompt."""
    field = "messages" if kind in (Prompt, Conversation) else "prompt"
    if not hasattr(kind, field):
        return
    for name, roles in ROLES.items():
        yield _line(kind, name, b"", {field: [{"role": role, "content": "x"} for role in roles]})
    for content in ("", " \n\t", None, 7, ["x"]):
        answer = [{"role": "assistant", "content": "x"}] if kind is Conversation else []
        yield _line(kind, f"content {content!r}", b"", {field: [{"role": "user", "content": content}, *answer]})
    if kind is Pair:
        for name in ("selected", "rejected"):
            yield _line(kind, f"{name} of another prompt", b"", {name: records(kind)[0][name]})
            yield _line(kind, f"{name} without an answer", b"", {name: records(kind)[BAD]["prompt"]})
    if kind is Rewards:
        yield _line(kind, "answers of another prompt", b"", {"response": records(kind)[0]["response"]})


def mutations(kind: type, seed: str) -> Iterator[Case]:
    """Valid files, each changed at a random place. Some of them stay valid."""
    rng = random.Random(seed)
    for number in range(MUTATIONS):
        rows, suffix = records(kind), rng.choice([".jsonl", ".json", ".jsonl.zst", ".json.gz"])
        how = rng.choice([_swap, _swap, _flip, _delete, _truncate])
        if how is _swap:
            _swap(rows[rng.randrange(len(rows))], rng)
        data = lines(rows) if "jsonl" in suffix else whole(kind, rows)
        pack = {".zst": zstandard.ZstdCompressor(write_checksum=True).compress, ".gz": gzip.compress}
        data = pack.get(suffix[-4:] if suffix.endswith("zst") else suffix[-3:], bytes)(data)
        yield Case(f"{how.__name__[1:]} {number}", suffix, data if how is _swap else how(data, rng))


def _swap(value: dict | list, rng: random.Random) -> None:
    """Another value at a random JSON path."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = rng.choice([key for key in keys if key != "uuid"])
    if isinstance(value[key], dict | list) and value[key] and rng.random() < 0.6:
        _swap(value[key], rng)
    else:
        value[key] = rng.choice([other for other in WRONG if type(other) is not type(value[key])])


def _flip(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ rng.randrange(1, 256)]) + data[at + 1 :]


def _delete(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + data[at + rng.randrange(1, 30) :]


def _truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]
