"""What one sees of a training while it runs: metrics in trackers, held-out data, samples at checkpoints."""

import json
from collections import Counter

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
