"""Malformed inputs of every stage: one message with the file and place, exit code 2, nothing written or changed."""

import re
import shutil

import damaged
import pytest
import zstandard
from layouts import GOOD, STAGES, lines, put, records, whole
from malformed import Case, corpus, mutations
from msgspec import structs
from workspace import REGISTRIES

from cream.errors import UserError
from cream.files.store import MALFORMED, read, read_rows
from cream.records import Conversation, Item, Pair, Rewards

pytestmark = pytest.mark.slow
TRAINED = (Conversation, Pair)  # what training reads
GROUPS = ("sidecars", "journals", "registries", "models", "recipes")


@pytest.fixture(scope="module")
def world(quick):
    put(quick.folder / GOOD, Rewards)
    (quick.folder / "localdata/bad").mkdir()
    return quick


def is_refused(path, kind) -> bool:
    """Whether a file cannot be read as records of its layout, or has none."""
    try:
        return not list(read(path, kind))
    except (UserError, OSError):
        return True


def problem(world, stage: str, case: Case, number: int) -> str | None:
    """What a stage does with a case that it should not, None where all is well; "valid" where the file is."""
    kind, command = STAGES[stage]
    path = world.folder / f"localdata/bad/{stage}-{number}{case.suffix}"
    path.write_bytes(case.data) if isinstance(case.data, bytes) else case.data(path)
    command = command.format(file=path.relative_to(world.folder)).replace("outputs/x", f"outputs/{stage}-{number}")
    said = f"{path.name} ({case.name}): "
    try:
        if not is_refused(path, kind):
            done = world.stages.run(world.folder, world.argv(command + " --dry_run"))
            return f"{said}{done.err}" if done.code not in (0, 2) or "Traceback" in done.err else "valid"
        before = world.state()
        done = world.stages.run(world.folder, world.argv(command))
        if done.code != 2 or "Traceback" in done.err or world.state() != before:
            return f"{said}ended with {done.code}, changed {world.state() != before}: {done.err[-600:]}"
        if (
            not re.search(rf"{path.name}|--file2|--labels", done.err)
            or not re.search(case.place, done.err)
            or len(done.err) > 2000
        ):
            return f"{said}the message does not name the file and {case.place}: {done.err[:600]}"
    finally:
        path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)


def met(world, damage) -> str | None:
    """What a stage does about some damage that it should not, None where all is well."""
    folder = world.folder / "localdata/damaged"
    folder.mkdir()
    damage.make(world.folder)
    before = world.state()
    done = world.stages.run(world.folder, world.argv(damage.command))
    changed = world.state() != before
    shutil.rmtree(folder)
    for name in REGISTRIES:
        (world.folder / "configs" / name).unlink(missing_ok=True)
    if done.code != 2 or "Traceback" in done.err or changed or damage.said not in done.err:
        return f"{damage.name}: ended with {done.code}, changed {changed}, not {damage.said}: {done.err[-500:]}"


def refused(world, group: str) -> int:
    """How many of a stage's, or a group's, malformed inputs were refused as they should be: all of them."""
    with world.stages.together():
        if group in GROUPS:
            found = [met(world, damage) for damage in list(getattr(damaged, group)())]
        else:
            kind = STAGES[group][0]
            cases = [*corpus(kind), *mutations(kind, group)]
            found = [problem(world, group, case, number) for number, case in enumerate(cases)]
    assert not [text for text in found if text not in (None, "valid")]
    return found.count(None)


@pytest.fixture(scope="module")
def counts():
    """Refused inputs by stage or group."""
    return {}


@pytest.mark.parametrize("group", [*STAGES, *GROUPS])
def test_all_malformed_inputs_are_refused(world, counts, group):
    counts[group] = refused(world, group)


def test_they_are_many(counts, capsys):
    with capsys.disabled():
        print(f"\nmalformed inputs refused: {sum(counts.values())} {counts}")
    assert len(counts) == len(STAGES) + len(GROUPS) and sum(counts.values()) >= 300


# What is harmless, and what is left out -------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_line_ends_do_not_matter(world, stage):
    """CRLF as LF: the same output."""
    kind, command = STAGES[stage]
    found = {}
    for name, end in (("lf", b"\n"), ("crlf", b"\r\n")):
        file, output = world.folder / f"localdata/{name}/x.jsonl", f"outputs/{stage}-{name}"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(lines(records(kind)[::-1]).replace(b"\n", end))  # in an order other than GOOD's
        world.run(command.format(file=file.relative_to(world.folder)).replace("outputs/x", output))
        made = world.folder / (f"{output}/checkpoint-last/model.safetensors" if kind in TRAINED else f"{output}.json")
        found[name] = made.read_bytes()
    assert found["lf"] == found["crlf"]


def test_bad_labels_are_left_out_on_request(world):
    """The prompts must have theirs all the same."""
    rows = [*records(Item), {"uuid": "q9", "question": "What?", "label": "Z"}]
    path, output = "localdata/oracle.jsonl", "outputs/oracle.json"
    command = STAGES["labels"][1].format(file=path).replace("outputs/x.json", output) + " --on_bad_record skip"
    (world.folder / path).write_bytes(lines(rows).replace(b'"label": 2', b'"label": "Z"'))
    assert "no item 'q0'" in world.refused(command)
    (world.folder / path).write_bytes(lines(rows))
    assert "line 7: record 'q9': question 'What?'" in world.refused(command.replace("skip", "fail"))
    world.run(command)
    assert [row["uuid"] for row in read_rows(world.folder / f"{output}.rejected.jsonl")] == ["q9"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.zst"])
@pytest.mark.parametrize("stage", ["sampling", "evaluation", "rescore", "rewarding", "file1", "sft", "dpo"])
def test_bad_records_are_left_out_on_request(world, stage, suffix):
    """Exactly those, each with its reason; the sidecar counts them, and all good ones are there."""
    kind, command = STAGES[stage]
    rows = records(kind)
    field = next(field.name for field in structs.fields(kind) if field.required)
    bad = {"q1": {field: None}, "q4": {field: [7]}}
    text = [row | bad.get(row["uuid"], {}) for row in rows] + [rows[2]]
    path = world.folder / f"localdata/skip-{stage}{suffix}"
    data = lines(text) if "jsonl" in suffix else whole(kind, text)
    path.write_bytes(zstandard.ZstdCompressor().compress(data) if suffix.endswith("zst") else data)
    output = f"outputs/skip-{stage}{suffix.replace('.', '-')}"
    command = command.format(file=path.relative_to(world.folder)).replace("outputs/x", output)
    world.refused(command)
    done = world.run(command + " --on_bad_record skip")
    assert "Traceback" not in done.err
    run = kind in TRAINED
    left_out = read_rows(world.folder / (f"{output}/rejected.jsonl" if run else f"{output}.json.rejected.jsonl"))
    reasons = {row["uuid"]: row["reason"] for row in left_out}
    assert reasons.keys() == {"q1", "q4", "q2"} and "twice" in reasons["q2"]
    assert all("xpected" in reasons[uuid] for uuid in bad)
    assert not re.search(r"3 of 4|9 of 12", done.out)  # none of the good ones is counted as bad
    counts = world.read(f"{output}/meta.json" if run else f"{output}.json.meta.json")["counts"]
    assert counts["dropped"][MALFORMED] == 3
    assert (counts["trained_on"] if run else counts["out"]) == 4
    if not run:
        assert [row["uuid"] for row in read_rows(world.folder / f"{output}.json")] == ["q0", "q2", "q3", "q5"]
