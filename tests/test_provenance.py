"""Where outputs come from: hashes, objections and what overrides them, the chain down to the raw data."""

import json
import os
import shutil

import pytest
import xxhash

from cream.errors import UserError
from cream.files import lineage, provenance
from cream.files.fingerprints import fingerprint_file, fingerprint_text
from cream.files.provenance import Provenance
from cream.pairs.match import MISSING, OTHER


def test_fingerprints_are_those_of_xxhash(tmp_path):
    data = bytes(range(256)) * 10_000  # more than one block
    (tmp_path / "x").write_bytes(data)
    assert fingerprint_file(str(tmp_path / "x")) == xxhash.xxh3_128_hexdigest(data)
    assert fingerprint_text("é") == xxhash.xxh3_128_hexdigest("é".encode())
    with pytest.raises(UserError, match="absent"):
        fingerprint_file(tmp_path / "absent")


def put(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def test_an_input_is_believed_as_far_as_its_sidecar_goes(tmp_path, caplog):
    made = put(tmp_path / "a.json", {})
    found = Provenance()
    assert found.output("input", made) == {} and found.unverified == ["a.json"]
    about = {"settings": {}, "inputs": {}, "output": fingerprint_file(made), "unverified": ["raw.json"]}
    put(tmp_path / "a.json.meta.json", about)
    found = Provenance()
    assert found.output("input", made)["output"] == found.inputs["input"]
    assert found.record(tmp_path / "elsewhere") == {
        "sources": {"input": "../a.json"},
        "unverified": ["raw.json"],
        "forced": [],
    }
    put(tmp_path / "a.json.meta.json", {"settings": {}, "inputs": {}, "policy": None})
    found = Provenance()
    assert found.output("input", made) == {} and found.unverified == ["a.json"]
    assert Provenance().file("input", made) is None
    put(tmp_path / "a.json.meta.json", about)
    put(made, {"changed": []})
    with pytest.raises(UserError, match=r"a\.json was changed since it was made.*--force"):
        Provenance().file("data", str(made))
    with pytest.raises(UserError, match=r"a\.json was changed since it was made.*--force"):
        Provenance().output("input", made)
    found = Provenance(force=True)
    found.output("input", made)
    assert len(found.forced) == 1 and "was changed since" in found.record(tmp_path)["forced"][0]


@pytest.mark.parametrize(
    "damage", [[], 3, {"inputs": []}, {"inputs": {"a": 1}}, {"settings": 1}, {"policy": {"model": 1}}, {"output": None}]
)
def test_a_damaged_sidecar_is_refused(tmp_path, damage):
    put(tmp_path / "a.json.meta.json", damage)
    with pytest.raises(UserError, match=r"a\.json\.meta\.json: is damaged"):
        provenance.read_meta(tmp_path / "a.json")
    put(tmp_path / provenance.KIND, damage)
    with pytest.raises(UserError, match=r"cream\.json: is damaged"):
        provenance.read_kind(tmp_path)


def test_a_checkpoint_without_a_hash_of_itself_is_unverified(tmp_path):
    """One of a run whose cream.json is gone, or says nothing; a model from elsewhere is raw, as data are."""
    (tmp_path / "checkpoint-last").symlink_to("checkpoint-3")
    put(tmp_path / "checkpoint-3/config.json", {})
    found = Provenance()
    assert found.model("policy", tmp_path / "checkpoint-3") == {} and not found.unverified
    put(tmp_path / "args.json", {})
    found.model("policy", tmp_path / "checkpoint-last")
    assert found.unverified == [f"{tmp_path.name}/checkpoint-3"]
    (tmp_path / "args.json").unlink()
    put(tmp_path / "checkpoint-3" / provenance.KIND, {"stage": "sft"})
    found = Provenance()
    assert found.model("policy", tmp_path / "checkpoint-3")["stage"] == "sft"
    assert found.unverified == [f"{tmp_path.name}/checkpoint-3"]


SMALL = " --device cpu --model tiny"
STAGES = [
    f"train.py{SMALL} --name tiny_sft --limit_size 16 --train_bsz 8 --lr 3e-4 --output_dir outputs/M1",
    f"infer.py{SMALL} --checkpoint outputs/M1/checkpoint-last --name tiny_prompt_1 --limit_size 8 --gen_max_tokens 24 "
    "--output_dir outputs/s.json",
    f"rewarding.py{SMALL} --checkpoint outputs/M1/checkpoint-last --input_file outputs/s.json --output outputs/c.json",
    f"rewarding.py{SMALL} --reward likelihood --input_file outputs/s.json --output outputs/p.json",
    "cal_consistency.py --file1 outputs/c.json --file2 outputs/p.json --keep_truncated --output outputs/pairs.json",
    f"train.py{SMALL} --checkpoint outputs/M1/checkpoint-last --name outputs/pairs.json --train_bsz 4 "
    "--output_dir outputs/M2",
]


@pytest.fixture
def chain(workspace):
    """A round of the method, fresh for each test, in the workspace's outputs."""
    kept, outputs = workspace.folder / "kept", workspace.folder / "outputs"
    if not kept.exists():
        for command in STAGES:
            workspace.run(command)
        shutil.copytree(outputs, kept, symlinks=True)
    shutil.rmtree(outputs, ignore_errors=True)
    shutil.copytree(kept, outputs, symlinks=True)
    return workspace


LAST = "outputs/M2/checkpoint-last"


def test_the_chain_goes_down_to_the_raw_data(chain):
    lines = chain.run(f"report.py lineage {LAST}").out.splitlines()
    told = [line.strip().partition("  ")[0] for line in lines]
    assert told == [
        LAST,
        "data: outputs/pairs.json",
        *("file1: outputs/c.json", "input_file: outputs/s.json", "data: localdata/tiny/prompt.1.json"),
        *(f"policy: {LAST.replace('2', '1')}", "data: localdata/tiny/sft.json", "start: assets/tiny_m0"),
        *(f"policy: {LAST.replace('2', '1')}", "reference: assets/tiny_m0"),
        *("file2: outputs/p.json", "input_file: outputs/s.json", "policy: assets/tiny_m0"),
        f"start: {LAST.replace('2', '1')}",
    ]
    assert "<- cal_consistency.py" in lines[1] and lines[-1].endswith("as above")
    assert "all files are as recorded" in chain.run(f"report.py verify {LAST}").out
    moved = chain.folder / "moved"
    shutil.rmtree(moved, ignore_errors=True)
    shutil.copytree(chain.folder, moved, symlinks=True, ignore=shutil.ignore_patterns("moved", "kept"))
    shutil.rmtree(chain.folder / "outputs")
    assert "moved/outputs/s.json: verified" in chain.run(f"report.py verify moved/{LAST}").out
    assert "no such file" in chain.refused("report.py verify nowhere")
    assert "lineage PATH" in chain.refused("report.py lineage")


def test_a_sidecar_from_elsewhere_only_says_what_it_says(workspace):
    """It names a device, a pipe, a terminal's codes: nothing is waited for, and nothing reaches the terminal."""
    folder = workspace.folder / "localdata/liar"
    made = put(folder / "a.json", {})
    os.mkfifo(folder / "pipe")
    hashes = {"output": fingerprint_file(made), "inputs": dict.fromkeys(("data", "more"), "0" * 32)}
    places = {"data": "/dev/zero", "more": "pipe"}
    put(folder / "a.json.meta.json", {**hashes, "sources": places, "command": ["\x1b]0;x\x07"], "forced": ["\x1b[2J"]})
    out = workspace.run("report.py lineage localdata/liar/a.json").out
    assert "\x1b" not in out and "\x07" not in out and r"<- \x1b]0;x\x07" in out and r"overrode: \x1b[2J" in out
    out = workspace.run("report.py verify localdata/liar/a.json", code=1).out
    assert "/dev/zero: is not a regular file" in out and "liar/pipe: is not a regular file" in out and "\x1b" not in out
    put(folder / "a.json.meta.json", {**hashes, "sources": {"data": "a\0b"}})
    assert "a.json.meta.json: is damaged" in workspace.refused("report.py lineage localdata/liar/a.json")


def test_an_input_is_found_where_outputs_is_a_link_to_another_disk(tmp_path):
    """Whether the sidecar was written under the link's name or the disk's."""
    repo, disk = tmp_path / "home" / "repo", tmp_path / "disk"
    for folder in (repo, disk):
        folder.mkdir(parents=True)
    (repo / "outputs").symlink_to(disk)
    prompts = put(repo / "prompts.json", {})
    made = Provenance()
    made.file("data", prompts)
    for written_at in (repo / "outputs", disk):
        place = made.record(written_at)["sources"]["data"]
        assert provenance.place_of(repo / "outputs", place) == prompts


def test_a_chain_may_be_long(tmp_path):
    for i in range(1500):
        put(tmp_path / f"{i}.json", {})
        about = {"inputs": {"data": "0" * 32}, "sources": {"data": f"{i + 1}.json"}}
        put(tmp_path / f"{i}.json.meta.json", about)
    steps = list(lineage.chain(tmp_path / "0.json"))
    assert [step.depth for step in steps] == list(range(1501)) and steps[-1].path == tmp_path / "1500.json"


@pytest.mark.parametrize(
    "path, said",
    [
        ("outputs/s.json", "outputs/s.json: changed since it was used"),
        ("outputs/M1/checkpoint-last/model.safetensors", "checkpoint-last: changed since it was used"),
        ("outputs/M2/checkpoint-last/model.safetensors", "checkpoint-last: is not what its sidecar describes"),
        ("localdata/tiny/sft.json", "sft.json: changed since it was used"),
    ],
)
def test_a_changed_file_is_found(chain, path, said):
    file = chain.folder / path
    before = file.read_bytes()
    file.write_bytes(before[:-3] + b" " + before[-2:])
    done = chain.run(f"report.py verify {LAST}", code=1)
    file.write_bytes(before)
    assert said in done.out and "not as recorded" in done.err


def test_what_has_no_hash_is_not_verified(chain):
    (chain.folder / "outputs/s.json.meta.json").write_text("{}")
    out = chain.run("report.py verify outputs/c.json").out
    assert "outputs/s.json: as it was used, unverified: its sidecar has no hash of it" in out
    assert "assets/tiny_m0: as it was used, unverified: it has no sidecar" in out
    assert "outputs/s.json: unverified: its sidecar has" in chain.run("report.py verify outputs/s.json").out


def test_what_training_reads_is_held_against_its_sidecar(chain):
    """Pairs are conversations, too; so are prompts that a stage may once make."""
    pairs = chain.read("outputs/pairs.json")
    chain.write("outputs/pairs.json", pairs)
    sft = STAGES[0].replace("tiny_sft", "outputs/pairs.json --train_stage sft").replace("M1", "M5")
    assert "outputs/pairs.json was changed since it was made" in chain.refused(sft)


RUN = "outputs/M1"
HARM = {
    "the last is gone": lambda run: shutil.rmtree((run / "checkpoint-last").resolve()),
    "a link to nowhere": lambda run: (run / "checkpoint-last").unlink(),
    "other weights": lambda run: flip(run / "checkpoint-last/model.safetensors"),
    "another config": lambda run: flip(run / "checkpoint-last/config.json"),
}


def flip(path):
    data = path.read_bytes()
    path.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])


@pytest.mark.parametrize("harm", HARM.values(), ids=HARM)
def test_a_finished_run_stands_as_long_as_its_last_checkpoint(chain, harm):
    assert f"{RUN}: verified" in chain.run(f"report.py verify {RUN}").out
    meta = chain.read(f"{RUN}/meta.json")
    assert meta["output"] == chain.read(f"{RUN}/checkpoint-last/cream.json")["fingerprint"]
    assert "is up to date" in chain.run(STAGES[0]).out
    harm(chain.folder / RUN)
    assert "last checkpoint is not what was saved" in chain.refused(STAGES[0] + " --register gone")
    said = chain.run(f"report.py verify {RUN}", code=1).out
    assert "no longer has checkpoint-last" in said or "is not what its sidecar describes" in said


@pytest.mark.slow
def test_what_changed_is_refused_by_the_next_stage_unless_forced(chain):
    """And the sidecars of all that comes after say so."""
    samples = chain.read("outputs/s.json")
    chain.write("outputs/s.json", samples)  # the same records, in other bytes
    again = STAGES[2].replace("c.json", "again.json")
    assert "outputs/s.json was changed since it was made" in chain.refused(again)
    assert "--force: outputs/s.json was changed" in chain.run(again + " --force").out
    assert len(chain.read("outputs/again.json.meta.json")["forced"]) == 1
    (chain.folder / "outputs/s.json.meta.json").unlink()
    unverified = STAGES[2].replace("c.json", "unverified.json")
    assert "it is used unverified" in chain.run(unverified).out
    pairs = STAGES[4].replace("c.json", "unverified.json").replace("pairs.json", "pairs2.json")
    chain.run(pairs)
    chain.run(STAGES[5].replace("pairs.json", "pairs2.json").replace("M2", "M3"))
    for sidecar in (
        "unverified.json.meta.json",
        "pairs2.json.meta.json",
        "M3/meta.json",
        "M3/checkpoint-last/cream.json",
    ):
        assert chain.read(f"outputs/{sidecar}")["unverified"] == ["s.json"]
    assert "! unverified: s.json" in chain.run("report.py lineage outputs/M3/checkpoint-last").out


def test_other_prompts_than_those_answered_are_refused(chain):
    prompts = chain.folder / "localdata/tiny/prompt.1.json"
    before = prompts.read_text()
    prompts.write_text(before.replace("eggs", "ideas"))
    error = chain.refused(STAGES[2].replace("c.json", "other.json"))
    prompts.write_text(before)
    assert "outputs/s.json is of other prompts than" in error and "prompt.1.json" in error


def test_pairs_of_another_policy_are_refused_unless_forced(chain):
    other = STAGES[5].replace("--checkpoint outputs/M1/checkpoint-last", "--checkpoint none").replace("M2", "M4")
    assert "made for --checkpoint outputs/M1/checkpoint-last of tiny" in chain.refused(other)
    chain.run(other + " --force")
    assert "made for --checkpoint" in chain.read("outputs/M4/meta.json")["forced"][0]


def test_rankings_of_other_responses_are_refused_unless_forced(chain):
    """Forced, they are skipped, and counted."""
    previous = chain.read("outputs/p.json")
    first, second = list(previous)[:2]
    previous[first]["response"][0][-1]["content"] += " or so"
    del previous[second]
    chain.write("outputs/other.json", previous)
    command = STAGES[4].replace("p.json", "other.json").replace("pairs.json", "few.json")
    assert f"record '{first}' has other responses in --file2" in chain.refused(command)
    out = chain.run(command + " --force").out
    assert OTHER in out and MISSING in out
    meta = chain.read("outputs/few.json.meta.json")
    assert meta["counts"]["dropped"][OTHER] == 1 == meta["counts"]["dropped"][MISSING]
    assert "2 records of --file1 and --file2 do not match" in meta["forced"]
    assert {first, second}.isdisjoint(chain.read("outputs/few.json"))
