"""Outputs: finished ones are up to date, interrupted ones resume, and other settings never mix in."""

import json
import os
import signal

import pytest
import xxhash

from cream.errors import UserError
from cream.files import store
from cream.files.append_log import add_checksum
from cream.files.fingerprints import fingerprint_file
from cream.files.identity import find_free_path
from cream.files.journal import Output
from cream.files.provenance import Provenance, read_meta

SETTINGS, INPUTS = {"seed": 0, "top_p": 0.95}, {"input_file": "c0ffee"}
ROWS = [{"uuid": f"u{i}", "question": "é" * i, "label": str(i)} for i in range(4)]
ORDER = [row["uuid"] for row in ROWS]


def begin(path, settings=SETTINGS, inputs=INPUTS, **options):
    provenance = Provenance()
    provenance.inputs = inputs
    return Output(path, settings, provenance, **options)


def held(output):
    """The keys that an output takes up from its journal."""
    keys = output.resume()
    found = [uuid for uuid in ORDER if uuid in keys]
    assert len(keys) == len(found)
    return found


def interrupted(path, rows):
    """A run that ended after some rows: its journal is all that is left."""
    with begin(path) as output:
        assert not held(output)
        for row in rows:
            output.append(row)


def test_a_finished_output_is_up_to_date_and_has_its_sidecar(tmp_path):
    path = tmp_path / "new" / "x.jsonl"
    with begin(path) as output:
        output.resume()
        for row in reversed(ROWS):
            output.append(row)
        output.drop("too long", 2)
        output.drop("too long")
        assert not path.exists()
        assert output.finish(output.rows(["absent", *ORDER]), mean=0.5) == 4
    assert list(store.read_rows(path)) == ROWS
    meta = read_meta(path)
    assert (meta["settings"], meta["inputs"], meta["mean"]) == (SETTINGS, INPUTS, 0.5)
    assert meta["counts"] == {"out": 4, "dropped": {"too long": 3}}
    assert meta["output"] == fingerprint_file(path) == xxhash.xxh3_128_hexdigest(path.read_bytes())
    assert {file.name for file in path.parent.iterdir()} == {"x.jsonl", "x.jsonl.meta.json"} and "resumed" not in meta
    assert begin(path).up_to_date


def test_a_sidecar_says_how_many_records_an_interrupted_run_had_made(tmp_path):
    interrupted(tmp_path / "x.jsonl", ROWS[:3])
    with begin(tmp_path / "x.jsonl") as output:
        output.resume()
        output.append(ROWS[3])
        output.finish(output.rows(ORDER))
    assert read_meta(tmp_path / "x.jsonl")["resumed"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("zeros", [b"", bytes(7), bytes(3) + b"\n"])
def test_an_interrupted_run_resumes_wherever_it_was_killed(tmp_path, zeros):
    """The journal cut at every byte, then zeros as a power cut may leave them: what was whole before is kept, and the
    end is the same."""
    whole = tmp_path / "whole.jsonl"
    interrupted(whole, ROWS)
    data = begin(whole).partial.read_bytes()
    header, *lines = data.splitlines(keepends=True)
    for cut in range(len(header) if zeros else 0, len(data) + 1):
        path = tmp_path / f"{cut}.jsonl"
        end = cut + (not zeros)  # a line that lacks only its newline is whole
        kept = [row["uuid"] for i, row in enumerate(ROWS) if len(header) + sum(map(len, lines[: i + 1])) <= end]
        with begin(path) as output:
            output.partial.write_bytes(data[:cut] + zeros)
            assert held(output) == kept
            for row in ROWS:
                if row["uuid"] not in kept:
                    output.append(row)
            assert list(output.rows(ORDER)) == ROWS
        with begin(path) as output:
            assert held(output) == ORDER  # and it can be killed again


@pytest.mark.parametrize(
    "change",
    [
        lambda line: line.replace(b'"label":"1"', b'"label":"7"'),
        lambda line: line.replace(b'"u1"', b'"u9"'),
        lambda line: b'{"uuid":"u1"}\n',
        lambda line: line.partition(b"\t")[0] + b"\n",
        lambda line: add_checksum({"label": "1"}),
    ],
    ids=["another label", "another uuid", "a uuid alone", "without its hash", "a later version's"],
)
def test_a_record_that_was_changed_ends_the_journal(tmp_path, caplog, change):
    """It, and what follows it, is computed again, and a line says how much."""
    path = tmp_path / "x.jsonl"
    interrupted(path, ROWS)
    partial = begin(path).partial
    lines = partial.read_bytes().splitlines(keepends=True)
    partial.write_bytes(b"".join([*lines[:2], change(lines[2]), *lines[3:]]))
    with begin(path) as output:
        assert held(output) == ORDER[:1]
        assert (
            "x.jsonl.partial: line 3 is damaged; it and all lines after it, 3 in total, are computed again"
            in caplog.text
        )
        for row in ROWS[1:]:
            output.append(row)
        assert list(output.rows(ORDER)) == ROWS


@pytest.mark.parametrize("change", [b'"seed":1', b'"seed":0 ', None])
def test_a_journal_whose_first_line_was_changed_is_not_believed(tmp_path, change):
    """Nor is one of an earlier version, without a hash."""
    path = tmp_path / "x.jsonl"
    interrupted(path, ROWS)
    partial = begin(path).partial
    first, rest = partial.read_bytes().split(b"\n", 1)
    first = first.replace(b'"seed":0', change) if change else first.partition(b"\t")[0]
    partial.write_bytes(first + b"\n" + rest)
    with pytest.raises(UserError, match="or it is damaged.*--overwrite"), begin(path) as output:
        output.resume()


def test_other_settings_are_refused_by_name(tmp_path):
    path = tmp_path / "x.json"
    interrupted(path, ROWS[:2])
    with pytest.raises(UserError, match=r"seed: 0 -> 7.*x\.2\.json"):
        begin(path, {**SETTINGS, "seed": 7}).resume()
    with begin(path) as output:
        output.resume()
        output.finish(output.rows(ORDER))
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"seed: 0 -> 7.*x\.2\.json.*--overwrite"):
        begin(path, {**SETTINGS, "seed": 7})
    with pytest.raises(UserError, match="input_file: c0ffee -> 0ther"):
        begin(path, inputs={"input_file": "0ther"})
    assert path.read_bytes() == before


def test_overwrite_resumes_from_its_own_journal(tmp_path):
    """It replaces what is finished; an interrupted one is resumed by the same command."""
    path, other = tmp_path / "x.json", {**SETTINGS, "seed": 7}
    with begin(path) as output:
        output.finish(ROWS[:1])
    with begin(path, other, overwrite=True) as output:
        assert not held(output)
        for row in ROWS[:3]:
            output.append(row)
    assert list(store.read_rows(path)) == ROWS[:1]
    with begin(path, other, overwrite=True) as output:
        assert held(output) == ORDER[:3]
        output.append(ROWS[3])
        output.finish(output.rows(ORDER))
    assert list(store.read_rows(path)) == ROWS and begin(path, other).up_to_date


@pytest.mark.parametrize("own", [True, False])
def test_an_up_to_date_output_leaves_the_journal_of_a_command_that_is_to_replace_it(tmp_path, own):
    """It is removed only where the command that made the output wrote it."""
    path = tmp_path / "x.jsonl"
    with begin(path) as output:
        output.finish(iter(ROWS))
    settings = SETTINGS if own else {**SETTINGS, "seed": 1}
    with begin(path, settings, overwrite=True) as output:
        output.resume()
        output.append(ROWS[0])
    assert begin(path).up_to_date and output.partial.exists() is not own
    if not own:
        with begin(path, settings, overwrite=True) as output:
            assert held(output) == ORDER[:1]


@pytest.mark.parametrize("damage", [lambda data: data, lambda data: data.replace(b"seed", b"deed"), lambda data: b"{"])
def test_overwrite_starts_from_scratch(tmp_path, damage):
    path = tmp_path / "x.json"
    interrupted(path, ROWS[:2])
    partial = begin(path).partial
    partial.write_bytes(damage(partial.read_bytes()))
    with begin(path, {**SETTINGS, "seed": 7}, overwrite=True) as output:
        assert not output.up_to_date and not held(output)
        output.append(ROWS[3])
        output.finish(output.rows(ORDER))
    assert list(store.read_rows(path)) == ROWS[3:]
    assert begin(path, {**SETTINGS, "seed": 7}).up_to_date


def test_a_second_writer_is_refused_and_told_of_the_first(tmp_path):
    path = tmp_path / "new" / "x.jsonl"
    with begin(path) as output:
        output.append(ROWS[0])
        with pytest.raises(UserError, match=rf"x\.jsonl: process {os.getpid()} on .* is writing it"), begin(path):
            pass
        waiting = begin(path)
        output.finish(ROWS)
    assert {file.name for file in path.parent.iterdir()} == {"x.jsonl", "x.jsonl.meta.json"}
    with pytest.raises(UserError, match="has just finished it"), waiting:
        pass
    assert begin(path).up_to_date
    with begin(tmp_path / "other" / "x.jsonl"):
        pass
    assert not (tmp_path / "other").exists()


def test_a_lock_goes_with_its_process(tmp_path):
    path = tmp_path / "x.jsonl"
    child = os.fork()
    if not child:
        begin(path).__enter__()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert [file.name for file in tmp_path.iterdir()] == [".x.jsonl.lock"]
    interrupted(path, ROWS)
    assert [file.name for file in tmp_path.iterdir()] == ["x.jsonl.partial"]


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
    with pytest.raises(OSError), begin(path) as output:
        output.resume()
        output.finish(fails(output))
    assert not path.exists() and read_meta(path) is None
    with begin(path) as output:
        assert held(output) == ORDER


def test_settings_that_json_respells_are_the_same(tmp_path):
    """A tuple comes back from the sidecar as a list."""
    path = tmp_path / "x.jsonl"
    for finished in (False, True):
        output = begin(path, {"tasks": ("a", "b")})
        assert output.up_to_date is finished
        if not finished:
            with output:
                output.finish([])
    assert json.loads((tmp_path / "x.jsonl.meta.json").read_text())["settings"]["tasks"] == ["a", "b"]


def test_free_paths_count_up(tmp_path):
    for name in ("pairs.1.json", "pairs.1.2.json"):
        (tmp_path / name).touch()
    (tmp_path / "run").mkdir()
    assert find_free_path(tmp_path / "pairs.1.json").name == "pairs.1.3.json"
    assert find_free_path(tmp_path / "a.jsonl.zst").name == "a.2.jsonl.zst"
    assert find_free_path(tmp_path / "run").name == "run-2"


def test_a_sidecar_that_does_not_say_what_it_is_of_is_not_believed(tmp_path):
    path = tmp_path / "x.json"
    with begin(path) as output:
        output.finish(ROWS)
    meta = json.loads((tmp_path / "x.json.meta.json").read_text())
    del meta["output"]
    (tmp_path / "x.json.meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="is not what its sidecar describes"):
        begin(path)


CHANGES = {
    "another content": (lambda file: file.write_text("[2]"), True),
    "gone": (lambda file: file.unlink(), True),
    "written again": (lambda file: file.write_text("[1]"), False),
}


@pytest.mark.parametrize(("change", "refused"), CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("place", ["data.json", "model/config.json"])
@pytest.mark.parametrize("late", [False, True], ids=["rows", "rejected"])
def test_an_input_that_changes_while_a_stage_runs(tmp_path, place, change, refused, late):
    """Nothing is made of it; what is finished is kept, for what the input held before."""
    path, file = tmp_path / "x.json", tmp_path / place
    file.parent.mkdir(exist_ok=True)

    def begun():
        provenance = Provenance()
        provenance.model("model", file.parent) if "/" in place else provenance.file("data", file)
        return Output(path, SETTINGS, provenance)

    def reading(output):
        yield from output.rows(ORDER[:2])
        if not late:
            change(file)
        yield from output.rows(ORDER[2:])

    def rejected():
        if late:
            change(file)
        yield {"uuid": "bad"}

    file.write_text("[1]")
    with begun() as output:
        for row in ROWS:
            output.append(row)
        output.reject(rejected())
        if refused:
            with pytest.raises((UserError, FileNotFoundError), match="was changed while this ran|no such file"):
                output.finish(reading(output))
        else:
            output.finish(reading(output))
    if refused:
        left = {each.name for each in tmp_path.iterdir() if each.is_file()}
        assert left - {"data.json"} == {"x.json.partial"}
        file.write_text("[1]")
        with begun() as output:
            assert held(output) == ORDER
            output.finish(output.rows(ORDER))
    assert list(store.read_rows(path)) == ROWS


@pytest.mark.parametrize("name", ["x.json", "x.json.partial", "x.json.meta.json", "x.json.rejected.jsonl", "link.json"])
def test_an_output_never_replaces_an_input(tmp_path, name):
    (tmp_path / "link.json").symlink_to("x.json")
    (tmp_path / name).write_text("{}")
    provenance = Provenance()
    provenance.file("data", tmp_path / name)
    with pytest.raises(UserError, match=f"{name} is an input"):
        Output(tmp_path / "x.json", SETTINGS, provenance, overwrite=True)


def test_an_output_never_changes_a_model_by_lying_in_its_folder(tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "config.json").write_text("{}")
    (tmp_path / "checkpoint-last").symlink_to("checkpoint-2")
    provenance = Provenance()
    provenance.model("policy", tmp_path / "checkpoint-last")
    with pytest.raises(UserError, match="is in the folder of .*checkpoint-last"):
        Output(tmp_path / "checkpoint-2" / "x.json", SETTINGS, provenance)
    Output(tmp_path / "checkpoint-2" / "below" / "x.json", SETTINGS, provenance)


@pytest.mark.parametrize("ending", [".json", ".jsonl.zst", f".{'v' * 100}.json"])
def test_a_name_that_is_accepted_is_short_enough_to_the_end(tmp_path, ending):
    """Each length is refused before anything is spent, or goes all the way, rejected records included."""
    accepted = set()
    for length in range(226, 256):  # shorter ones are accepted
        path = tmp_path / ("x" * (length - len(ending)) + ending)
        try:
            output = begin(path)
        except UserError as error:
            assert "too long" in str(error)
            continue
        with output:
            output.resume()
            output.append(ROWS[0])
            output.reject([{"uuid": "u9"}])
            output.finish(output.rows(ORDER))
        accepted.add(length)
    assert accepted == set(range(226, max(accepted) + 1))


def test_the_lock_is_released_whatever_fails(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    waiting = begin(path)
    path.write_text("{}")  # from elsewhere, in between
    with pytest.raises(UserError, match="not made by this command"), waiting:
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]
    path.unlink()

    def full(handle):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), begin(path) as output:
        output.append(ROWS[0])
        monkeypatch.setattr(os, "fsync", full)
    assert [file.name for file in tmp_path.iterdir()] == ["x.json.partial"]
    monkeypatch.undo()
    with begin(path) as output:
        assert held(output) == ORDER[:1]


def test_rejected_records_belong_to_the_output_that_skipped_them(tmp_path):
    path, rejected = tmp_path / "x.json", tmp_path / "x.json.rejected.jsonl"
    with begin(path) as output:
        output.reject([{"uuid": "bad"}])
        output.finish(ROWS)
    assert rejected.exists()
    with begin(path, {**SETTINGS, "seed": 7}, overwrite=True) as output:
        output.finish(ROWS)
    assert not rejected.exists()


def test_what_a_killed_run_staged_goes(tmp_path):
    """With the next that makes the output, or finds it."""
    for finished in (False, True):
        left = [tmp_path / ".whole.x.json", tmp_path / ".x.json.rejected.jsonl", tmp_path / ".x.json.lock"]
        for path in left:
            path.write_text("{}")
        output = begin(tmp_path / "x.json")
        assert output.up_to_date == finished
        if not finished:
            with output:
                output.finish(ROWS)
        assert {path.name for path in tmp_path.iterdir()} == {"x.json", "x.json.meta.json"}


def test_what_fails_leaves_the_rejected_records_of_a_finished_output(tmp_path):
    with begin(tmp_path / "x.json") as output:
        output.reject([{"uuid": "bad"}])
        output.finish(ROWS)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def failing(row):
        yield row
        raise UserError("no more")

    for rows, rejected in ((failing(ROWS[0]), [{"uuid": "another"}]), (ROWS, failing({"uuid": "another"}))):
        with pytest.raises(UserError), begin(tmp_path / "x.json", {**SETTINGS, "seed": 7}, overwrite=True) as output:
            output.reject(rejected)
            output.finish(rows)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
