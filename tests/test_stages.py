"""The stage scripts as users type them: the method's README word for word, two rounds of it, and each stage's options.

The tiny world stands for the big model and its data (cut to a few records, so that no command needs a limit of its
own), cpu for the GPUs; --register is added where the README has its reader edit a file. Nothing else is changed.
"""

import json
import math
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import kendalltau

from cream.files.store import read
from cream.records import Pair, Rewards, Samples

pytestmark = pytest.mark.slow
SFT = (
    "train.py --device cpu --train_stage sft --epoch 5 --lr 5e-6 --train_bsz 4 --model tiny --name tiny_sft "
    "--register tiny_m1"
)
SAMPLES = "outputs/sampling.json"
REWARDS = [
    "outputs/sampling.rewarding.tiny-dpo-policy_tiny_m1-ref_none.json",
    "outputs/sampling.rewarding.tiny-likelihood-policy_none-ref_none.json",
]
PAIRS = REWARDS[0].replace(".json", ".kendall.dpo.json")
ROUND_1 = [
    "infer.py --device cpu --mode sampling --model tiny --name tiny_prompt_1 --checkpoint tiny_m1 "
    f"--output_dir {SAMPLES} --sysprompt none",
    f"rewarding.py --device cpu --model tiny --enable_ref yes --input_file {SAMPLES} --checkpoint tiny_m1 "
    "--ref_model_ckpt none",
    f"rewarding.py --device cpu --model tiny --enable_ref no --input_file {SAMPLES} --checkpoint none",
    f"cal_consistency.py --file1 {REWARDS[0]} --file2 {REWARDS[1]} --method consistency_avg --register dpo_1",
    "train.py --device cpu --model tiny --checkpoint tiny_m1 --name dpo_1 --method consistency_avg --epoch 1 "
    "--train_bsz 4 --lr 1e-6 --register tiny_m2",
    "infer.py --device cpu --model tiny --checkpoint tiny_m2 --mode evaluation --name tiny_test "
    "--output_dir outputs/evaluation",
]
SAMPLES_2 = "outputs/sampling2.json"
REWARDS_2 = [f"outputs/sampling2.rewarding.tiny-dpo-policy_tiny_m{t}-ref_none.json" for t in (2, 1)]
ROUND_2 = [
    "infer.py --device cpu --mode sampling --model tiny --name tiny_prompt_2 --checkpoint tiny_m2 "
    f"--output_dir {SAMPLES_2} --sysprompt none",
    *(
        f"rewarding.py --device cpu --model tiny --enable_ref yes --input_file {SAMPLES_2} --checkpoint tiny_m{t} "
        "--ref_model_ckpt none"
        for t in (2, 1)
    ),
    f"cal_consistency.py --file1 {REWARDS_2[0]} --file2 {REWARDS_2[1]} --method consistency_avg --register dpo_2",
    "train.py --device cpu --model tiny --checkpoint tiny_m2 --name dpo_2 --method consistency_avg --epoch 1 "
    "--train_bsz 4 --lr 1e-6 --register tiny_m3",
    "infer.py --device cpu --model tiny --checkpoint tiny_m3 --mode evaluation --name tiny_test "
    "--output_dir outputs/evaluation2",
]
README = [SFT, *ROUND_1, *ROUND_2]
TRAIN = "train.py --device cpu --model tiny --name tiny_sft --limit_size 16 --train_bsz 8 --lr 3e-4 --output_dir"
DPO = f"train.py --device cpu --model tiny --checkpoint tiny_m1 --name {PAIRS} --train_bsz 8 --lr 3e-4 --output_dir"
REWARD = f"rewarding.py --device cpu --model tiny --input_file {SAMPLES} --checkpoint tiny_m1"
SAMPLE = "infer.py --device cpu --model tiny --checkpoint tiny_m1 --name tiny_prompt_1 --gen_max_tokens 48 --output_dir"


@pytest.fixture(scope="module")
def readme(workspace):
    """What each command of two rounds of the README printed."""
    for name, count in {"sft": 32, "prompt.1": 24, "prompt.2": 24, "test": 30}.items():
        workspace.shorten(f"localdata/tiny/{name}.json", count)
    return {command: workspace.run(command) for command in README}


@pytest.fixture(scope="module")
def world(workspace, readme):
    """The workspace after two rounds."""
    return workspace


def log_of(world, run):
    """The lines of a run's log.jsonl."""
    return [json.loads(line) for line in (world.folder / run / "log.jsonl").read_text().splitlines()]


def weights(world, checkpoint):
    """The tensors of a checkpoint."""
    return load_file(world.folder / checkpoint / "model.safetensors")


def equal_weights(world, a, b):
    a, b = weights(world, a), weights(world, b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# The method's README ------------------------------------------------------------------------------------------------


def test_two_rounds_of_the_readme(world):
    """Every command runs, DPO is what a pairs file trains, and what was registered is what the next command finds."""
    checkpoints, datasets = world.read("configs/checkpoint.json"), world.read("configs/dataset.json")
    assert sorted(checkpoints) == ["tiny_m1", "tiny_m2", "tiny_m3"] and sorted(datasets) == ["dpo_1", "dpo_2"]
    for t in (2, 3):
        run = checkpoints[f"tiny_m{t}"].removesuffix("/checkpoint-last")
        meta = world.read(f"{run}/meta.json")
        assert meta["settings"]["train_stage"] == "dpo" and meta["settings"]["method"] == "consistency_avg"
        assert meta["counts"]["mean_c"] == pytest.approx(meta["counts"]["mean_c_used"])
        assert log_of(world, run)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert len(world.read("outputs/evaluation/tiny_m2-tiny_test/results.json")) == 30
    assert {row["task"] for row in world.read("outputs/evaluation2/tiny_m3-tiny_test/summary.json")["tasks"]} >= {
        "tiny_add",
        "tiny_sub",
    }


@pytest.mark.parametrize("files", [REWARDS, REWARDS_2], ids=["round 1", "round 2"])
def test_pairs_and_consistency_follow_from_the_rewards(world, files):
    """Worked out again per prompt with scipy: distinct complete answers, best against worst, c = (tau + 1) / 2."""
    current, previous = ({r.uuid: r for r in read(world.folder / file, Rewards)} for file in files)
    pairs = {p.uuid: p for p in read(world.folder / files[0].replace(".json", ".kendall.dpo.json"), Pair)}
    assert pairs
    for uuid, record in current.items():
        texts = record.responses()
        kept = [i for i, t in enumerate(texts) if texts.index(t) == i and record.finish_reason[i] == "stop"]
        reward = {i: record.reward[i] for i in kept}
        if len(kept) < 2 or len(set(reward.values())) == 1:
            assert uuid not in pairs
            continue
        best, worst = max(kept, key=reward.get), min(kept, key=reward.get)
        tau = kendalltau([reward[i] for i in kept], [previous[uuid].reward[i] for i in kept]).statistic
        assert pairs[uuid].selected == record.response[best] and pairs[uuid].rejected == record.response[worst]
        assert pairs[uuid].consistency == pytest.approx((tau + 1) / 2)


def test_the_same_commands_again_change_nothing(world):
    before = world.state()
    for command in README:
        assert "is up to date" in world.run(command).out, command
    assert world.state() == before


def test_printed_commands_run(world, readme):
    """What a stage prints as next runs, once a placeholder has its value; training and sampling only try."""
    for start, done in readme.items():
        current = REWARDS_2[0] if SAMPLES_2 in start else REWARDS[0]  # of the round
        values = {"CHECKPOINT": "tiny_m1", "CURRENT": current, "PROMPTS": "tiny_prompt_3", "QUESTIONS": "tiny_test"}
        assert done.commands() or "evaluation" in start
        for command in done.commands():
            words = [values.get(word, word) for word in world.argv(command)]
            quick = words[0] in ("rewarding.py", "cal_consistency.py")
            world.run(shlex.join(words if quick else [*words, "--dry_run", "--overwrite"]))


def test_dry_runs_write_nothing(world):
    commands = [
        TRAIN + " outputs/dry",
        SAMPLE + " outputs/dry.json",
        "infer.py --mode evaluation --name tiny_test --model tiny --output_dir outputs/dry",
        "infer.py --mode rescore --input_file outputs/evaluation/tiny_m2-tiny_test/results.json",
        REWARD + " --output outputs/dry.json",
        f"cal_consistency.py --file1 {REWARDS[0]} --output outputs/dry.json --register dry",
    ]
    before = world.state()
    for command in commands:
        world.run(command + " --dry_run")
        world.run(command + " --dry_run --overwrite")
    assert world.state() == before


# Mistakes -----------------------------------------------------------------------------------------------------------

MISTAKES = {
    "dpo on conversations": (TRAIN + " outputs/x --train_stage dpo", "dpo trains on preference pairs"),
    "method on conversations": (TRAIN + " outputs/x --method consistency_avg", "--method belongs to --train_stage dpo"),
    "another method than recorded": (DPO + " outputs/x --method consistency_dyn", "made for consistency_avg"),
    "policy is the reference": (REWARD + " --ref_model_ckpt tiny_m1", "policy and reference are the same"),
    "the same by another name": (
        REWARD.replace("tiny_m1", "assets/tiny_m0") + " --ref_model_ckpt none",
        "policy and reference are the same",
    ),
    "no checkpoint against the base": (REWARD.replace("tiny_m1", "none"), "policy and reference are the same"),
    "sampling on test data": (SAMPLE.replace("prompt_1", "test") + " outputs/x.json", "must not enter training"),
    "evaluation on prompts": (SAMPLE + " outputs/x --mode evaluation", "questions with labels"),
    "reward contradicts": (REWARD + " --reward likelihood --enable_ref yes", "contradicts --enable_ref_model"),
    "method without file2": (f"cal_consistency.py --file1 {REWARDS[0]} --method consistency_dyn", "needs --file2"),
    "rank twice": (f"cal_consistency.py --file1 {REWARDS[0]} --method kendall --rank spearman", "contradicts --rank"),
    "pairs of another policy": (DPO.replace("--checkpoint tiny_m1", "") + " outputs/x", "--checkpoint tiny_m1"),
    "a folder of something else": (TRAIN + " localdata --overwrite", "not the folder of a training run"),
    "over its own start": (
        TRAIN.replace("--model", "--checkpoint tiny_m1 --model") + " {run} --overwrite",
        "checkpoint-last, an input; give another",
    ),
    "the same file twice": (f"cal_consistency.py --file1 {REWARDS[0]} --file2 {REWARDS[0]}", "every C would be 1"),
    "no record file": (REWARD + " --output outputs/rewards.txt", "ends in .json"),
    "a file as a folder": (SAMPLE + " train.py/x.json", "train.py"),
    "no wandb": (TRAIN + " outputs/x --report_to wandb", "wandb"),
    "other samples": (
        f"cal_consistency.py --file1 {REWARDS[0]} --file2 {REWARDS_2[1]} --output outputs/x.json",
        "must rank the same samples",
    ),
    "no such file": ("cal_consistency.py --file1 outputs/none.json", "no such file"),
    "a folder": ("cal_consistency.py --file1 outputs", "outputs: expected a file, found a folder"),
    "a built-in name": (
        f"cal_consistency.py --file1 {REWARDS[0]} --output outputs/x.json --register Tiny_SFT",
        "built-in name of localdata/tiny/sft.json",
    ),
    "over the score cache": (REWARD + " --output outputs/sampling.scores.jsonl", "log-probabilities are cached there"),
    "unknown checkpoint": (SAMPLE.replace("tiny_m1", "tiny_m9") + " outputs/x.json", "did you mean tiny_m"),
    "unknown model": ("infer.py --device cpu --model tinny --name tiny_prompt_1", "did you mean tiny?"),
    "unknown dataset": (SAMPLE.replace("prompt_1", "promt_1") + " outputs/x.json", "did you mean tiny_prompt_1"),
    "unknown flag": (SAMPLE + " outputs/x.json --gen_temp 1", "write --gen_temperature"),
    "name taken, checkpoint": (TRAIN + " outputs/x --register tiny_m1", "registered in"),
    "name taken, pairs": (
        f"cal_consistency.py --file1 {REWARDS[0]} --output outputs/x.json --register dpo_1",
        "registered in",
    ),
    "nothing fits": (TRAIN + " outputs/x --max_length 8", "no record is left to train on"),
    "overwrite for nothing": (SFT + " --max_length 8 --output_dir {run} --overwrite", "no record is left to train on"),
    "no gpu": (SAMPLE.replace("--device cpu", "--device 7") + " outputs/x.json", "no NVIDIA device is visible"),
    "no rewards but samples": (
        f"cal_consistency.py --file1 {SAMPLES}",
        f"--file1 {SAMPLES} holds prompts with responses; it",
    ),
    "no samples but prompts": (
        REWARD.replace(SAMPLES, "localdata/tiny/prompt.1.json"),
        "holds prompts; it should hold prompts with responses, which infer.py --mode sampling writes",
    ),
    "no samples but rewards": (
        REWARD.replace(SAMPLES, REWARDS[0]),
        "holds prompts with rewards; it should hold prompts with responses",
    ),
    "previous samples": (f"cal_consistency.py --file1 {REWARDS[0]} --file2 {SAMPLES}", f"--file2 {SAMPLES} holds"),
    "sampling on pairs": (
        SAMPLE.replace("tiny_prompt_1", PAIRS) + " outputs/x.json",
        "sampling takes unlabelled prompts",
    ),
    "swapped, round 1": (
        f"cal_consistency.py --file1 {REWARDS[1]} --file2 {REWARDS[0]} --output outputs/x.json",
        "ranks by a model that did not sample these responses, --file2 by the one that did",
    ),
    "swapped, round 2": (
        f"make_pairs.py --strategy extremes --rewards {REWARDS_2[1]} --previous {REWARDS_2[0]} --output x.json",
        "did not sample these responses, --previous by the one that did: they seem to be swapped",
    ),
    "a run's folder": (SAMPLE.replace("tiny_m1", "{run}") + " outputs/x.json", "did you mean {run}/checkpoint-last?"),
    "public data that are not there": (SFT.replace("tiny_sft", "oasst_sft"), "prepare_data.py build oasst1` makes it"),
    "no gpu, dry run": (SAMPLE.replace("--device cpu", "--device 7") + " outputs/x.json --dry_run", "no NVIDIA device"),
    "no gpu to reward on, dry run": (
        REWARD.replace("--device cpu", "--device 7") + " --output outputs/x.json --dry_run",
        "no NVIDIA device",
    ),
}


@pytest.mark.parametrize(("command", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_refused(world, command, message):
    """One message that says what is wrong, exit code 2, nothing written."""
    run = world.read("configs/checkpoint.json")["tiny_m1"].removesuffix("/checkpoint-last")
    error = world.refused(command.replace("{run}", run))
    assert message.replace("{run}", run) in error and error.count("error: ") <= 1


TAKEN = {
    "sampling": (ROUND_1[0] + " --gen_n 3", "gen_n: 5 -> 3"),
    "rewarding": (ROUND_1[1] + " --normalize mean", "normalize: sum -> mean"),
    "consistency": (ROUND_1[3] + f" --rank spearman --output {PAIRS}", "rank: kendall -> spearman"),
    "evaluation": (ROUND_1[5] + " --gen_max_tokens 9", "gen_max_tokens: 768 -> 9"),
    "training": (SFT + " --seed 3 --output_dir {run}", "seed: 0 -> 3"),
}


@pytest.mark.parametrize(("command", "difference"), TAKEN.values(), ids=TAKEN)
def test_other_settings_to_the_same_output(world, command, difference):
    """The refusal names what differs and a path that is free."""
    run = world.read("configs/checkpoint.json")["tiny_m1"].removesuffix("/checkpoint-last")
    error = world.refused(command.replace("{run}", run))
    taken, free = re.search(r"error: (\S+): .* such as (\S+), or --overwrite", error).groups()
    assert difference in error
    assert (world.folder / taken).exists() and not (world.folder / free).exists()
    assert Path(free).parent == Path(taken).parent and "2" in Path(free).name


def test_overwrite(world):
    """--overwrite replaces an output that was made otherwise, a run folder and a registered name included."""
    world.run(SAMPLE + " outputs/over.json --gen_n 2 --limit_size 3")
    world.run(SAMPLE + " outputs/over.json --gen_n 3 --limit_size 3 --overwrite")
    assert all(len(record["responses"]) == 3 for record in world.read("outputs/over.json").values())
    world.run(TRAIN + " outputs/over --register over")
    world.run(TRAIN + " outputs/over --register over --epoch 2 --overwrite")
    assert sorted(path.name for path in (world.folder / "outputs/over").glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-last",
    ]


# Options of the stages ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.zst", "json.gz"])
def test_forms_of_files(world, suffix):
    """Whatever form the files between the stages have, the records are the same."""
    samples, rewards, pairs = (f"outputs/{name}.{suffix}" for name in ("samples", "rewards", "pairs"))
    world.run(ROUND_1[0].replace(SAMPLES, samples))
    world.run(REWARD.replace(SAMPLES, samples) + f" --output {rewards}")
    world.run(f"cal_consistency.py --file1 {rewards} --output {pairs}")
    world.run(f"cal_consistency.py --file1 {REWARDS[0]} --output outputs/pairs-{suffix}.json")
    for kind, plain, packed in (
        (Samples, SAMPLES, samples),
        (Rewards, REWARDS[0], rewards),
        (Pair, f"outputs/pairs-{suffix}.json", pairs),
    ):
        assert list(read(world.folder / plain, kind)) == list(read(world.folder / packed, kind))
    world.run(DPO.replace(PAIRS, pairs) + f" outputs/dpo-{suffix} --limit_size 4")


def test_greedy_sampling(world):
    """--do_sample no: one answer a prompt, the one that evaluation would give."""
    world.run(SAMPLE + " outputs/greedy.json --do_sample no")
    questions = {uuid: messages[0]["content"] for uuid, messages in world.read("localdata/tiny/prompt.1.json").items()}
    items = [{"uuid": uuid, "question": question, "label": "1"} for uuid, question in questions.items()]
    items = [item for item in items if "A)" not in item["question"]]  # those have letters for labels
    world.write("localdata/asked.json", items)
    world.run(
        "infer.py --device cpu --mode evaluation --model tiny --checkpoint tiny_m1 --name localdata/asked.json "
        "--sysprompt none --gen_max_tokens 48 --output_dir outputs/asked.json"
    )
    samples = world.read("outputs/greedy.json")
    for uuid, answer in world.read("outputs/asked.json").items():
        assert samples[uuid]["responses"] == [answer["responses"]]


def test_a_changed_template_is_a_changed_input(world):
    """What a template file holds decides, not what it is called."""
    template = (world.folder / "assets/tiny_m0/chat_template.jinja").read_text()
    (world.folder / "localdata/own.jinja").write_text(template)
    command = SAMPLE + " outputs/templated.json --limit_size 2 --chat_template localdata/own.jinja"
    done = world.run(command)
    assert "--chat_template localdata/own.jinja" in done.commands()[0]
    assert "is up to date" in world.run(command).out
    (world.folder / "localdata/own.jinja").write_text(template + "{# again #}")
    assert "chat_template" in world.refused(command)


def test_missing_tasks_are_named(world):
    """all_test goes on with the tasks that are there, and notices when one joins them."""
    items = world.read("localdata/tiny/test.json")
    for task, tiny in {"gsm8k": "tiny_add", "openbookqa": "tiny_compare"}.items():
        own = [{k: v for k, v in item.items() if k != "task"} for item in items if item["task"] == tiny]
        world.write(f"localdata/{task}/test.json", own)
    done = world.run(
        "infer.py --device cpu --mode evaluation --model tiny --name all_test --gen_max_tokens 8 "
        "--output_dir outputs/all_test"
    )
    for task in ("arc_easy", "arc_challenge", "siqa"):
        assert f"task {task} is not evaluated" in done.out
    tasks = {row["task"]: row["n"] for row in world.read("outputs/all_test/tiny-all_test/summary.json")["tasks"]}
    assert tasks["gsm8k"] == 10 and tasks["openbookqa"] == 10


@pytest.mark.parametrize(("extraction", "prediction", "correct"), [("default", "7", True), ("strict", "3", False)])
def test_rescore(world, extraction, prediction, correct):
    """The answer clause's last number counts; strict takes its first, as the released code does."""
    answer = {"uuid": "a", "question": "How many?", "label": "7", "responses": "Answer: x = 3 + 4 = 7"}
    world.write("outputs/answers.json", {"a": {**answer, "final_prediction": "none", "correct": False}})
    done = world.run(f"infer.py --mode rescore --input_file outputs/answers.json --extraction {extraction}")
    rescored = world.read(f"outputs/answers.rescored-{extraction}.json")["a"]
    assert (rescored["final_prediction"], rescored["correct"]) == (prediction, correct)
    assert f"a: none -> {prediction}" in done.out


def test_rescore_of_an_evaluation_changes_nothing(world):
    done = world.run("infer.py --mode rescore --input_file outputs/evaluation/tiny_m2-tiny_test/results.json")
    assert "0 of 30 predictions changed" in done.out
    assert world.read("outputs/evaluation/tiny_m2-tiny_test/results.rescored-default.json") == world.read(
        "outputs/evaluation/tiny_m2-tiny_test/results.json"
    )


def test_chat_template(world):
    """A model without a template is refused; with the file it answers as the model that has its own."""
    bare = world.folder / "assets/bare"
    shutil.copytree(world.folder / "assets/tiny_m0", bare)
    (bare / "chat_template.jinja").rename(world.folder / "assets/template.jinja")
    sample = "infer.py --device cpu --name tiny_prompt_1 --limit_size 4 --gen_max_tokens 16 --model "
    assert "--chat_template FILE" in world.refused(sample + "assets/bare --output_dir outputs/bare.json")
    world.run(sample + "assets/bare --output_dir outputs/bare.json --chat_template assets/template.jinja")
    world.run(sample + "tiny --output_dir outputs/own.json")
    assert world.read("outputs/bare.json") == world.read("outputs/own.json")
    world.run(TRAIN.replace("tiny ", "assets/bare ", 1) + " outputs/bare --chat_template assets/template.jinja")
    world.run(sample + "assets/bare --checkpoint outputs/bare/checkpoint-last --output_dir outputs/bare1.json")


def test_lora(world):
    """The method's flag names; checkpoints are plain folders whose weights are the base's plus the adapter's."""
    world.run(TRAIN + " outputs/lora --enable yes -r 4 --alpha 8 --dropout 0 --weight_decay 0 --save_dtype float32")
    last = world.folder / "outputs/lora/checkpoint-last"
    base, merged = weights(world, "assets/tiny_m0"), weights(world, "outputs/lora/checkpoint-last")
    adapter = load_file(last / "adapter/adapter_model.safetensors")
    adapted = [name for name in base if f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight" in adapter]
    assert len(adapted) == 7 * 3  # q, k, v, o, gate, up, down in each of three layers
    for name in base:
        expected = base[name].float()
        if name in adapted:
            key = f"base_model.model.{name.removesuffix('.weight')}.lora_{{}}.weight"
            change = adapter[key.format("B")] @ adapter[key.format("A")] * (8 / 4)
            assert change.abs().max() > 1e-4
            expected = expected + change
        torch.testing.assert_close(merged[name], expected, atol=1e-6, rtol=1e-5)
    world.run(SAMPLE.replace("tiny_m1", "outputs/lora/checkpoint-last") + " outputs/lora.json --limit_size 2")


def test_gradient_checkpointing_and_accumulation_change_no_weight(world):
    """Recomputed activations give the very same weights; 2 x 4 examples a step, in small micro-batches, those of 8 at
    once up to rounding."""
    plain = TRAIN + " outputs/{} --save_dtype float32"
    small = " --max_tokens_per_batch 150"
    for name, flags in {"plain": "", "recomputed": " --grad_checkpointing", "accumulated": small}.items():
        command = plain.format(name).replace("bsz 8", "bsz 4 --grad_accum 2") if name == "accumulated" else plain
        world.run(command.format(name) + flags)
    assert equal_weights(world, "outputs/plain/checkpoint-last", "outputs/recomputed/checkpoint-last")
    plain, accumulated = (weights(world, f"outputs/{name}/checkpoint-last") for name in ("plain", "accumulated"))
    for name in plain:
        torch.testing.assert_close(accumulated[name], plain[name], atol=2e-5, rtol=0)


def test_tensorboard(world):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    world.run(TRAIN + " outputs/board --report_to tensorboard --log_every 1")
    (events,) = (world.folder / "outputs/board/CREAM").glob("events.out.tfevents.*")
    losses = [event.value for event in EventAccumulator(str(events)).Reload().Scalars("loss")]
    assert losses == pytest.approx([row["loss"] for row in log_of(world, "outputs/board")])


def test_bfloat16_on_cpu(world):
    """Rewarding in bfloat16 weights, training with bfloat16 products on float32 masters: close to float32."""
    world.run(REWARD + " --bf16 yes --output outputs/bf16.json")
    for record, exact in zip(
        *(read(world.folder / file, Rewards) for file in ("outputs/bf16.json", REWARDS[0])), strict=True
    ):
        for score, expected, tokens in zip(record.score, exact.score, exact.num_tokens, strict=True):
            assert score == pytest.approx(expected, abs=0.1 * tokens) and score != expected
    world.run(DPO + " outputs/dpo-bf16 --bf16 yes")
    world.run(DPO + " outputs/dpo-f32 --bf16 no")
    products, exact = (log_of(world, f"outputs/dpo-{dtype}")[0] for dtype in ("bf16", "f32"))
    assert products["loss"] == pytest.approx(math.log(2), abs=0.02)
    assert products["logp_chosen"] == pytest.approx(exact["logp_chosen"], rel=0.02)
    assert products["logp_chosen"] != exact["logp_chosen"]


def test_labels_choose_as_the_oracle(world):
    labels = {item["uuid"]: str(item["label"]) for item in world.read("localdata/tiny/labels.json")}
    world.run(
        f"cal_consistency.py --file1 {REWARDS[0]} --labels localdata/tiny/labels.json --output outputs/oracle.json"
    )
    pairs = world.read("outputs/oracle.json")
    assert pairs
    for uuid, pair in pairs.items():
        assert pair["selected"][-1]["content"].endswith(f"Answer: {labels[uuid]}")
        assert not pair["rejected"][-1]["content"].endswith(f"Answer: {labels[uuid]}")


def test_shuffled_consistency(world):
    """The same pairs and the same c's, dealt out otherwise; the seed decides how."""
    own = world.read(PAIRS)
    files = {"a": 0, "b": 0, "c": 1}
    for name, seed in files.items():
        rewards = f"--file1 {REWARDS[0]} --file2 {REWARDS[1]}"
        world.run(f"cal_consistency.py {rewards} --shuffle_consistency {seed} --output outputs/shuffled-{name}.json")
    a, b, c = (world.read(f"outputs/shuffled-{name}.json") for name in files)
    values = [[pair["consistency"] for pair in pairs.values()] for pairs in (own, a, c)]
    assert a == b and sorted(values[0]) == sorted(values[1]) == sorted(values[2])
    assert values[0] != values[1] != values[2]
    assert [pair["selected"] for pair in a.values()] == [pair["selected"] for pair in own.values()]


def test_fixed_consistency(world):
    """C = 1/2 has no gradient at the first step (policy = reference), whatever the pairs say."""
    world.run(DPO + " outputs/fixed --fixed_consistency 0.5")
    world.run(DPO + " outputs/not_fixed")
    first, other = (log_of(world, f"outputs/{name}")[0]["grad_norm"] for name in ("fixed", "not_fixed"))
    assert first < 1e-4 * other
