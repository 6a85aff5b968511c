"""Outputs in the making: finished ones stand, interrupted ones go on, and other settings never mix in."""

import json

import pytest
import xxhash

from cream import journal, store
from cream.errors import UserError
from cream.journal import Output

SETTINGS, INPUTS = {"seed": 0, "top_p": 0.95}, {"input_file": "c0ffee"}
ROWS = [{"uuid": f"u{i}", "question": "é" * i, "label": str(i)} for i in range(4)]
ORDER = [row["uuid"] for row in ROWS]


def begin(path, settings=SETTINGS, **options):
    return Output(path, settings, INPUTS, **options)


def interrupted(path, rows):
    """A run that was killed after some rows: its journal is all that is left."""
    output = begin(path)
    assert output.resume() == set()
    for row in rows:
        output.append(row)


def test_a_finished_output_stands_with_its_sidecar(tmp_path):
    path = tmp_path / "new" / "x.jsonl"
    output = begin(path)
    output.resume()
    for row in reversed(ROWS):
        output.append(row)
    output.drop("too long", 2)
    output.drop("too long")
    assert not path.exists()
    assert output.finish(output.rows(["absent", *ORDER]), mean=0.5) == 4
    assert list(store.read_rows(path)) == ROWS
    meta = journal.read_meta(path)
    assert (meta["settings"], meta["inputs"], meta["mean"]) == (SETTINGS, INPUTS, 0.5)
    assert meta["counts"] == {"out": 4, "dropped": {"too long": 3}}
    assert meta["output"] == journal.fingerprint(path) == xxhash.xxh3_128_hexdigest(path.read_bytes())
    assert {file.name for file in path.parent.iterdir()} == {"x.jsonl", "x.jsonl.meta.json"}
    assert begin(path).stands


def test_an_interrupted_run_goes_on_wherever_it_was_killed(tmp_path):
    """The journal cut at every byte: what was whole before the cut is kept, and the end is the same."""
    whole = tmp_path / "whole.jsonl"
    interrupted(whole, ROWS)
    data = journal.Output(whole, SETTINGS, INPUTS).partial.read_bytes()
    header, *lines = data.splitlines(keepends=True)
    for cut in range(len(data) + 1):
        path = tmp_path / f"{cut}.jsonl"
        output = begin(path)
        output.partial.write_bytes(data[:cut])
        kept = [row["uuid"] for i, row in enumerate(ROWS) if len(header) + sum(map(len, lines[: i + 1])) <= cut]
        assert output.resume() == set(kept)
        for row in ROWS:
            if row["uuid"] not in kept:
                output.append(row)
        assert list(output.rows(ORDER)) == ROWS
        assert begin(path).resume() == set(ORDER)  # and it can be killed again


def test_other_settings_are_refused_by_name(tmp_path):
    path = tmp_path / "x.json"
    interrupted(path, ROWS[:2])
    with pytest.raises(UserError, match=r"seed: 0 -> 7.*x\.2\.json"):
        begin(path, {**SETTINGS, "seed": 7}).resume()
    output = begin(path)
    output.resume()
    output.finish(output.rows(ORDER))
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"seed: 0 -> 7.*x\.2\.json.*--overwrite"):
        begin(path, {**SETTINGS, "seed": 7})
    with pytest.raises(UserError, match="input_file: c0ffee -> 0ther"):
        Output(path, SETTINGS, {"input_file": "0ther"})
    assert path.read_bytes() == before


def test_overwrite_starts_afresh(tmp_path):
    path = tmp_path / "x.json"
    interrupted(path, ROWS[:2])
    output = begin(path, {**SETTINGS, "seed": 7}, overwrite=True)
    assert not output.stands and output.resume() == set()
    output.append(ROWS[3])
    output.finish(output.rows(ORDER))
    assert list(store.read_rows(path)) == ROWS[3:]
    assert begin(path, {**SETTINGS, "seed": 7}).stands


def test_a_file_from_elsewhere_is_not_replaced(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("{}")
    with pytest.raises(UserError, match=r"x\.json"):
        begin(path)
    for other in (tmp_path, tmp_path / "x.txt"):
        with pytest.raises(UserError, match="ends in .json"):
            begin(other)
    assert path.read_text() == "{}"


def test_a_failure_while_finishing_keeps_the_journal(tmp_path):
    def fails(output):
        yield from output.rows(ORDER[:1])
        raise OSError("disk full")

    path = tmp_path / "x.jsonl"
    interrupted(path, ROWS)
    output = begin(path)
    output.resume()
    with pytest.raises(OSError):
        output.finish(fails(output))
    assert not path.exists() and journal.read_meta(path) is None
    assert begin(path).resume() == set(ORDER)


def test_settings_that_json_respells_are_the_same(tmp_path):
    """A tuple comes back from the sidecar as a list."""
    path = tmp_path / "x.jsonl"
    for stands in (False, True):
        output = begin(path, {"tasks": ("a", "b")})
        assert output.stands is stands
        if not stands:
            output.finish([])
    assert json.loads((tmp_path / "x.jsonl.meta.json").read_text())["settings"]["tasks"] == ["a", "b"]


def test_free_paths_count_up(tmp_path):
    for name in ("pairs.1.json", "pairs.1.2.json"):
        (tmp_path / name).touch()
    (tmp_path / "run").mkdir()
    assert journal.free_path(tmp_path / "pairs.1.json").name == "pairs.1.3.json"
    assert journal.free_path(tmp_path / "a.jsonl.zst").name == "a.2.jsonl.zst"
    assert journal.free_path(tmp_path / "run").name == "run-2"


def test_fingerprints_are_those_of_xxhash(tmp_path):
    data = bytes(range(256)) * 10_000  # more than one block
    (tmp_path / "x").write_bytes(data)
    assert journal.fingerprint_of(str(tmp_path / "x")) == xxhash.xxh3_128_hexdigest(data)
    assert journal.fingerprint_text("é") == xxhash.xxh3_128_hexdigest("é".encode())
    with pytest.raises(UserError, match="absent"):
        journal.fingerprint_of(tmp_path / "absent")
