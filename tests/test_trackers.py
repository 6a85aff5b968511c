"""What one sees of a training while it runs: metrics in trackers, held-out data, samples at checkpoints."""

import json
import shutil
import sqlite3
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
from workspace import LOOP, M1, ON

from cream.errors import UserError
from cream.records import Message, Pair
from cream.training.options import TrainOutput
from cream.training.samples import SampleFlags
from cream.training.stages import dpo

DPO = f"train.py {ON} {M1} --name {LOOP}/pairs.json --train_bsz 8 --lr 3e-4"
SAMPLES = "--sample_prompts tiny_prompt_2 --sample_limit 3 --sample_n 2 --sample_max_tokens 24"


def test_several_trackers():
    assert TrainOutput().trackers() == [] and TrainOutput(report_to="TensorBoard,").trackers() == ["tensorboard"]
    with pytest.raises(UserError, match="tensorbord: expected tensorboard, wandb, trackio; did you mean tensorboard"):
        TrainOutput(report_to="tensorbord").trackers()


def test_a_folder_that_is_called_as_a_tracker_is_none(tmp_path, monkeypatch):
    """An offline run of wandb leaves one in the current folder, which Python takes for a package."""
    (tmp_path / "trackio").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert find_spec("trackio") is not None
    if find_spec("trackio").origin:
        pytest.skip("trackio is installed")
    with pytest.raises(UserError, match="--report_to trackio: not installed; .venv/bin/pip install trackio"):
        TrainOutput(report_to="tensorboard,trackio").trackers()


def test_the_files_of_trackers_are_in_the_run_s_folder_unless_the_user_says_where(monkeypatch):
    monkeypatch.delenv("WANDB_DIR", raising=False)
    output = TrainOutput(wandb_project_name="sums")
    where = {"TENSORBOARD_LOGGING_DIR": "run/sums", "WANDB_PROJECT": "sums", "WANDB_DIR": "run"}
    assert output.tracker_variables(Path("run")) == where
    monkeypatch.setenv("WANDB_DIR", "elsewhere")
    assert output.tracker_variables(Path("run")) == where | {"WANDB_DIR": "elsewhere"}


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_missing_trackers_are_named_before_a_model_is_looked_for(looped):
    told = looped.refused("train.py --device cpu --model no/such --name tiny_sft --report_to wandb,trackio")
    if find_spec("trackio") is None:
        assert told == "error: --report_to wandb,trackio: not installed; .venv/bin/pip install wandb trackio\n"


FAKE = {  # what transformers and Accelerate look at
    "wandb/__init__.py": "run = None\ndef init(**_): raise ValueError('no key; log in')\n",
    "wandb/sdk/lib/config_util.py": "class ConfigError(Exception): pass\n",
}


@pytest.fixture
def fake_wandb(looped):
    for name, text in FAKE.items():
        (looped.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (looped.folder / name).write_text(text)
    yield
    shutil.rmtree(looped.folder / "wandb")


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ("--train_stage online_rloo --name localdata/tiny/labels.json --reward labels --gen_n 2", "no key; log in"),
        ("--name tiny_sft", "Accelerate omits it"),
    ],
)
def test_a_tracker_that_does_not_start_ends_a_run_before_it_trains(looped, fake_wandb, flags, why):
    run = f"outputs/{why[:2]}"
    done = looped.run(f"train.py {ON} {flags} --limit_size 8 --output_dir {run} --report_to wandb", code=2)
    assert f"error: --report_to wandb: it did not start: {why}" in done.err and "nothing more was trained" in done.err
    assert "Traceback" not in done.err and not [*(looped.folder / run).glob("checkpoint-*")]


@pytest.mark.slow
def test_wandb_and_trackio_have_what_the_log_has(looped, monkeypatch, tmp_path):
    """Where they are installed; the set-up does not install them."""
    pytest.importorskip("wandb")
    pytest.importorskip("trackio")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    flags = "--limit_size 16 --train_bsz 8 --log_every 1 --output_dir outputs/both --report_to wandb,trackio"
    looped.spawn(f"train.py {ON} --name tiny_sft {flags}")
    run = looped.folder / "outputs/both"
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [*run.glob("wandb/offline-run-*/*.wandb")] and not (looped.folder / "wandb").exists()
    with sqlite3.connect(tmp_path / "CREAM.db") as table:
        logged = [(name, json.loads(text)) for name, text in table.execute("select run_name, metrics from metrics")]
    assert {name for name, _ in logged} == {"both"}
    assert [row["loss"] for _, row in logged if "loss" in row] == [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize(
    ("flags", "model", "zero", "message"),
    [
        ({"sample_n": 2}, "logprobs", 0, "--sample_n needs --sample_prompts"),
        ({"sample_prompts": "x"}, "heads", 0, "a reward model writes no responses"),
        ({"sample_prompts": "x"}, "logprobs", 3, "no process has the whole weights"),
    ],
)
def test_samples_that_cannot_be_had(flags, model, zero, message):
    SampleFlags(sample_prompts="x", sample_n=2).check("logprobs", 2)
    with pytest.raises(UserError, match=message):
        SampleFlags(**flags).check(model, zero)


def test_held_out_pairs_are_weighed_by_the_mean_of_those_that_are_trained_on(tiny_chat):
    def pairs(*values):
        for i, c in enumerate(values):
            prompt = [Message("user", f"What is {i} + 1?")]
            ends = [[*prompt, Message("assistant", f"Answer: {n}")] for n in (1, 2)]
            yield Pair(uuid=f"{i}", prompt=prompt, selected=ends[0], rejected=ends[1], consistency=c)

    for method, expected in {"consistency_avg": [0.8] * 3, "consistency_dyn": [0.1, 0.2, 0.8]}.items():
        stage = dpo.Stage(dpo.Options(method=method), {})
        stage.prepare(pairs(0.7, 0.9), tiny_chat, 512, Counter())
        held = [example for _, example in stage.prepare(pairs(0.1, 0.2, None), tiny_chat, 512, Counter())]
        assert [example.consistency for example in held] == pytest.approx(expected)


@pytest.mark.slow
def test_a_training_that_is_watched_gives_the_same_weights(looped):
    """Held-out pairs, samples and a tracker beside the training of the fixture's loop: not a bit of it differs; the
    samples are those that infer.py draws from the checkpoint."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    held = looped.read(f"{LOOP}/pairs.json")
    for each in held.values():
        for messages in (each["prompt"], each["selected"], each["rejected"]):
            messages[0]["content"] += " Say it in words."
    looped.write("outputs/held.json", held)
    out = looped.run(
        f"{DPO} {SAMPLES} --eval_name outputs/held.json --eval_every 2 --report_to tensorboard --log_every 1 "
        "--output_dir outputs/watched --alarm kl=-1"
    ).out
    run = looped.folder / "outputs/watched"
    weights = [(looped.folder / f / "checkpoint-last/model.safetensors").read_bytes() for f in (f"{LOOP}/m2", run)]
    assert weights[0] == weights[1]

    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "loss" in row]
    for row in trained:
        assert row["kl"] == pytest.approx(-(row["ratio_chosen"] + row["ratio_rejected"]) / 2, abs=1e-6)
    evaluated = [row for row in rows if "eval_loss" in row]
    assert {row["step"] for row in evaluated} >= {2, trained[-1]["step"]} and evaluated[0]["eval_n"] == len(held)
    assert 0 < evaluated[0]["eval_ratio_abs"] < 20 and 0 <= evaluated[-1]["eval_accuracy"] <= 1

    sampled = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert len(sampled) == 3 and {len(row["responses"]) for row in sampled} == {2}
    infer = "--name tiny_prompt_2 --limit_size 3 --gen_n 2 --gen_max_tokens 24 --engine hf"
    looped.run(f"infer.py {ON} --checkpoint outputs/watched/checkpoint-last {infer} --output_dir outputs/same.json")
    assert {row["uuid"]: row["responses"] for row in sampled} == {
        uuid: record["responses"] for uuid, record in looped.read("outputs/same.json").items()
    }

    (events,) = (run / "CREAM").glob("events.out.tfevents.*")
    board = EventAccumulator(str(events)).Reload()
    assert [event.value for event in board.Scalars("kl")] == pytest.approx([row["kl"] for row in trained])
    (pairs,), (kept,) = board.Scalars("data/pairs"), board.Scalars("data/mean_c")
    about = looped.read("outputs/watched/meta.json")
    assert (pairs.value, kept.value) == (len(held), pytest.approx(about["counts"]["mean_c"]))
    (text,) = board.Tensors(f"samples/{sampled[0]['uuid']}/text_summary")
    assert text.tensor_proto.string_val[0].decode().split("\n\n---\n\n") == sampled[0]["responses"]
    assert about["alarms"][0]["alarm"] == "kl" and f"step {about['alarms'][0]['step']}/" in out
    assert about["counts"]["truncated"] == 0 and about["counts"]["response_tokens"] > 1
