"""Online RLOO by trl's trainer: a run that is killed and resumed, rewards that are rewarding.py's, what is refused."""

import json
import os
import pickle
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from workspace import LOOP, ON

from cream.cli import interrupts
from cream.cli.flags import parse
from cream.errors import UserError
from cream.files import store
from cream.files.fingerprints import fingerprint_folder
from cream.files.provenance import Provenance, read_kind
from cream.model.checkpoint import save
from cream.model.load import load_chat, load_with_head
from cream.records import Message, Prompt, Rewards, Samples
from cream.rewards.live import Live
from cream.rewards.stage import choose
from cream.training import online, options
from cream.training.stages import online_rloo
from rewarding import Options as RewardOptions
from train import TrainConfig

RUN = f"train.py {ON} --name localdata/tiny/labels.json --train_stage online_rloo --reward labels --gen_n 2 --lr 3e-4"
RUN += " --gen_max_tokens 24 --limit_size 4 --train_bsz 2 --epoch 2 --log_every 1 --kl_coef 0.1"
RUN += " --report_to tensorboard --alarm entropy_left=2,length_drift=0.5"  # which sound at once
TIMES = ("prompts_per_second", "tokens_per_second", "peak_memory_gb")
TEXT = {"thoughts": "score"}


def lines(world, run):
    """log.jsonl without what depends on the time."""
    found = map(json.loads, (world.folder / run / "log.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in TIMES} for line in found]


def test_a_run_that_is_killed_and_resumed_is_the_undisturbed_one(looped):
    """Killed after step 3, while what it resumes from is of step 2: the same samples, log lines and weights, bit by
    bit. The second epoch has an order of its own."""
    world = looped
    world.run(f"{RUN} --output_dir outputs/whole --register online")
    last = world.folder / "outputs/whole/checkpoint-last"
    about, made_by = read_kind(last), world.read("outputs/whole/meta.json")
    assert (about["kind"], about["stage"], about["step"]) == ("policy", "online_rloo", 4)
    assert about["fingerprint"] == made_by["output"] == fingerprint_folder(last)
    assert about["inputs"].keys() == {"data", "start", "labels"} and about["settings"]["reward"] == "labels"
    assert made_by["counts"] | {"records": 4, "trained_on": 4, "steps": 4, "responses": 16} == made_by["counts"]
    assert world.read("configs/checkpoint.json")["online"].endswith("outputs/whole/checkpoint-last")
    assert not (world.folder / "outputs/whole/state").exists()
    found = lines(world, "outputs/whole")
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    wanted = {"loss", "reward", "unrewarded", "kl_per_token", "length", "truncated", "entropy", "grad_norm", "lr"}
    assert all(wanted <= line.keys() for line in found) and {line["lr"] for line in found} > {3e-4}
    sounded = {each["alarm"]: each["step"] for each in made_by["alarms"]}
    assert sounded.items() >= {"entropy_left": 1, "length_drift": 1}.items()
    assert [*(world.folder / "outputs/whole/CREAM").glob("events.out.tfevents.*")]  # where other stages have them

    command = f"{RUN} --output_dir outputs/cut"
    killed = die_after(world, command, step=3)
    assert killed.code == -9 and [line["step"] for line in lines(world, "outputs/cut")] == [1, 2, 3]
    resumed = world.run(command)
    assert "resuming after step 2" in resumed.out and "alarm:" not in resumed.out  # they have sounded
    assert world.read("outputs/cut/meta.json")["alarms"] == made_by["alarms"]
    assert lines(world, "outputs/cut") == found
    weights, others = (
        load_file(world.folder / f"outputs/{n}/checkpoint-last/model.safetensors") for n in ("whole", "cut")
    )
    start = load_file(world.folder / "assets/tiny_m0/model.safetensors")
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert not all(torch.equal(weights[name], start[name]) for name in weights)
    assert "up to date" in world.run(command).out
    assert "kl_coef: 0.1 -> 0.2" in world.refused(command.replace("--kl_coef 0.1", "--kl_coef 0.2"))


def die_after(world, command, step):
    """The command, killed once the log has the line of a step."""
    log = world.folder / "outputs/cut/log.jsonl"
    pidfd = world.stages.start(world.folder, world.argv(command))
    while not (log.exists() and f'"step": {step},' in log.read_text()):
        time.sleep(0.001)
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    os.close(pidfd)
    return world.stages.end()


# Rewards --------------------------------------------------------------------------------------------------------------


def live(name, folders, **flags):
    """A reward source in this process."""
    groups = RewardOptions()
    for flag, value in flags.items():
        setattr(getattr(groups, name), flag, value)
    own = choose(groups, name, None)[1]
    return Live(name, own, {role: (folder, fingerprint_folder(folder)) for role, folder in folders.items()})


@pytest.mark.parametrize("name", ["dpo", "likelihood", "labels", "bradley_terry"])
def test_rewards_are_those_of_rewarding(looped, tiny_folder, name, tmp_path):
    """Of the ids that were sampled, exactly: equal texts, truncated ones and those without an answer among them."""
    world, m0, m1 = looped, looped.folder / "assets/tiny_m0", looped.folder / LOOP / "m1/checkpoint-last"
    samples = list(store.read(world.folder / LOOP / "samples.jsonl", Samples))
    target = world.folder / LOOP / {"dpo": "current.jsonl", "likelihood": "previous.jsonl"}.get(name, f"{name}.jsonl")
    rm = world.folder / "outputs/rm"
    flags = {
        "labels": {"labels": str(world.folder / "localdata/tiny/labels.json")},
        "bradley_terry": {"reward_model": "x"},
    }
    folders = {"dpo": {"policy": m1, "reference": m0}, "likelihood": {"policy": m0}, "bradley_terry": {"rm": rm}}
    if name == "bradley_terry":
        chat = load_chat(tiny_folder)
        head = {"outputs": 1, "reads": "last_token"}
        model = load_with_head(tiny_folder, head, torch.float32, torch.device("cpu"))
        model.config.pad_token_id = chat.tokenizer.pad_token_id
        save(model, chat.tokenizer, rm, torch.float32, {})
        world.run(f"rewarding.py --device cpu --input_file {LOOP}/samples.jsonl --reward {name} "
                  f"--reward_model outputs/rm --output {target}")  # fmt: skip
    elif name == "labels":
        world.run(f"rewarding.py --input_file {LOOP}/samples.jsonl --reward labels --labels localdata/tiny/labels.json "
                  f"--output {target}")  # fmt: skip
    wanted = list(store.read(target, Rewards))
    rewards = live(name, folders.get(name, {}), **flags.get(name, {}))
    rewards.prepare([Prompt(uuid=each.uuid, messages=each.prompt) for each in samples], False)
    assert sampled(m1, samples, rewards.load("cpu", None, TEXT)) == [value for each in wanted for value in each.reward]


def sampled(folder, samples, rewards):
    """What trl's reward function gives for the ids of these samples."""
    chat, logged = load_chat(folder), {}
    ids, uuids = [], []
    for sample in samples:
        complete = [reason == "stop" for reason in sample.finish_reason]
        for row in chat.encode_responses(sample.prompt, sample.responses, complete):
            start, end = row.spans[0]
            ids.append(row.ids[start:end])
            uuids.append(sample.uuid)
    own = online_rloo.Options(reward="labels", gen_n=4, gen_max_tokens=48)
    prompts = [Prompt(uuid=each.uuid, messages=each.prompt) for each in samples]
    reward = online.reward_function(own, chat, prompts, rewards)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    values = reward(completion_ids=ids, uuid=uuids, prompts=None, log_metric=logged.__setitem__)
    assert torch.equal(before, torch.get_rng_state())  # else a resumed run would sample otherwise
    assert logged == {"unrewarded": values.count(None) / len(values)}
    return values


def test_a_missing_reward_is_a_number_if_asked_for(tiny_chat):
    prompt = Prompt(uuid="a", messages=[Message("user", "Tom has 3 books. How many now?")])
    ids = [*tiny_chat.tokenizer("Answer: 3", add_special_tokens=False)["input_ids"], tiny_chat.end_of_turn]

    def rewards(samples):
        return [SimpleNamespace(reward=[1.0, None], reason=[None, "no answer"])]

    for missing, wanted in ((None, [1.0, None]), (-1.0, [1.0, -1.0])):
        own = online_rloo.Options(reward="labels", gen_n=2, missing_reward=missing)
        reward = online.reward_function(own, tiny_chat, [prompt], rewards)
        assert reward(completion_ids=[ids, ids], uuid=["a", "a"], log_metric=lambda *_: None) == wanted


def test_gold_is_the_share_of_right_responses(tiny_chat):
    prompt, logged = Prompt(uuid="a", messages=[Message("user", "Tom has 3 books. How many now?")]), {}
    own = online_rloo.Options(reward="likelihood", gen_n=4)
    rewards, gold = (
        [SimpleNamespace(reward=values, reason=None)] for values in ([0.5, None, -1.0, 2.0], [1.0, None, 0.0, 0.0])
    )
    reward = online.reward_function(own, tiny_chat, [prompt], lambda _: rewards, lambda _: gold)
    given = {"completion_ids": [[tiny_chat.end_of_turn]] * 4, "uuid": ["a"] * 4, "log_metric": logged.__setitem__}
    assert reward(**given) == [0.5, None, -1.0, 2.0] and logged == {"unrewarded": 0.25, "gold": 0.25}


def test_a_reward_that_no_response_has_ends_the_run(tiny_chat):
    prompt = Prompt(uuid="a", messages=[Message("user", "Tom has 3 books. How many now?")])
    own = online_rloo.Options(reward="labels", gen_n=32)
    nothing = [SimpleNamespace(reward=[None] * 32, reason=["no answer"] * 32)]
    reward = online.reward_function(own, tiny_chat, [prompt], lambda samples: nothing)
    given = {"completion_ids": [[tiny_chat.end_of_turn]] * 32, "uuid": ["a"] * 32, "log_metric": lambda *_: None}
    assert reward(**given) == [None] * 32
    with pytest.raises(UserError, match=r"none of the first 64 responses has a reward \(no answer\)"):
        reward(**given)


# Plan and signals -----------------------------------------------------------------------------------------------------


def job(prompts=10, epoch=3, train_bsz=2, grad_accum=2, gen_n=3, seed=0, tokens=None):
    flags = options.Optimisation(epoch=epoch, train_bsz=train_bsz, grad_accum=grad_accum, max_tokens_per_batch=tokens)
    own = online_rloo.Options(reward="labels", gen_n=gen_n, gen_max_tokens=20)
    config = SimpleNamespace(optimisation=flags, run=SimpleNamespace(seed=seed))
    header = {"settings": {"global_batch": flags.global_batch(1)}}
    made = [Prompt(uuid=str(i), messages=[Message("user", f"Tom has {i} books.")]) for i in range(prompts)]
    return SimpleNamespace(config=config, stage=SimpleNamespace(options=own), header=header, data="data"), made


@pytest.mark.parametrize("tokens", [None, 1, 100])
def test_a_plan_has_every_prompt_once_an_epoch(tiny_chat, tokens):
    plan = online.make_plan(*job(tokens=tokens), tiny_chat, torch.device("cpu"))
    assert (plan.steps, plan.prompts, len(plan.order)) == (7, 4, 28)  # 30 of 3 epochs; 2 are left over at the end
    assert sorted(plan.order[:10]) == sorted(plan.order[10:20]) == [*range(10)]
    assert plan.order[:10] == np.random.default_rng([0, 0]).permutation(10).tolist() != plan.order[10:20]
    assert plan.rows * plan.passes == 2 * 2 * 3 and (plan.rows, plan.passes) == {None: (12, 1), 1: (1, 12)}.get(
        tokens, (plan.rows, plan.passes)
    )


def test_fewer_prompts_than_a_step_takes_are_refused(tiny_chat):
    with pytest.raises(UserError, match="3 prompts in 1 epochs are fewer than a step takes, 4"):
        online.make_plan(*job(prompts=3, epoch=1), tiny_chat, torch.device("cpu"))


@pytest.mark.slow  # imports trl
def test_a_signal_saves_after_the_step_in_flight_and_ends(tmp_path, monkeypatch):
    from accelerate import Accelerator

    with online._trl(False):
        from cream.training.rloo_trainer import Watch
    flags = options.Optimisation(epoch=1, save_eval_step_ratio=2, log_every=3)
    run = SimpleNamespace(config=SimpleNamespace(optimisation=flags), run=tmp_path)
    watch = Watch(run, online.Plan([], 10, 1, 1, 1), 0, lambda: True, print, print)
    watch.trainer = SimpleNamespace(accelerator=Accelerator(cpu=True))

    def after(step):
        control = SimpleNamespace()
        watch.on_step_end(None, SimpleNamespace(global_step=step), control)
        return control.should_log, control.should_save, control.should_training_stop

    found = {step: after(step) for step in range(1, 11)}
    assert [step for step, (logged, _, _) in found.items() if logged] == [1, 3, 5, 6, 9, 10]
    assert [step for step, (_, saved, _) in found.items() if saved] == [5, 10]
    assert [step for step, (_, _, ends) in found.items() if ends] == [10]
    monkeypatch.setattr(interrupts._state, "signum", 15)
    assert after(4) == (True, True, True)
    with interrupts.whole():  # as rewards are
        assert not interrupts.received()


# What is refused ------------------------------------------------------------------------------------------------------

REFUSED = {
    "": "needs --reward, what rewards a response: likelihood, dpo,",
    "--reward labels --reward_model x": "--reward_model belongs to --reward bradley_terry, odin",
    "--reward bradley_terry": "--reward bradley_terry needs --reward_model",
    "--reward labels": "--reward labels needs --labels FILE",
    "--reward labels --labels localdata/tiny/val.json": "none of its .* questions belongs to a prompt",
    "--reward labels --labels localdata/tiny/labels.json --reward_checkpoint tiny": "no use for --reward_checkpoint",
    "--reward dpo": "policy and reference are the same model.* give --reward_checkpoint and --ref_model_ckpt",
    "--reward likelihood --online_engine vllm_colocate": "--online_engine vllm_colocate needs GPUs",
    "--reward likelihood --vllm_memory 0.5": "--vllm_memory belongs to --online_engine vllm_colocate",
    "--reward likelihood --compile": "--compile: not with --train_stage online_rloo",
    "--reward likelihood --sample_prompts tiny_prompt_2": "--sample_prompts: not with --train_stage online_rloo",
    "--reward likelihood --beta 0.2": "--beta belongs to --train_stage dpo",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_flags_that_do_not_suit_are_refused(repo, flags):
    argv = f"{ON} --train_stage online_rloo {flags}".split()
    argv = [str(repo / word) if word.startswith("localdata") else word for word in argv]
    config = parse(TrainConfig, argv, description="", example="")
    data = repo / "localdata/tiny/prompt.1.json"
    with pytest.raises(UserError, match=REFUSED[flags]):
        _, stage = options.choose_stage("online_rloo", config.stage, data, False)
        stage.add_inputs(config, data, repo / "assets/tiny_m0", Provenance())


def test_the_policy_that_starts_rewards_where_no_other_is_named(repo):
    config = parse(TrainConfig, f"{ON} --reward likelihood".split(), description="", example="")
    data, start, provenance = repo / "localdata/tiny/prompt.1.json", repo / "assets/tiny_m0", Provenance()
    name, stage = options.choose_stage(None, config.stage, data, False)
    stage.add_inputs(config, data, start, provenance)
    assert name == "online_rloo" and provenance.inputs == {"reward_policy": fingerprint_folder(start)}
    assert stage.settings["normalize"] == "mean" and "max_length" not in stage.settings and stage.gold is None
    stage.add_inputs(config, repo / "localdata/tiny/labels.json", start, Provenance())
    assert stage.gold.name == "labels"  # labelled questions: how many are right goes to the log


@pytest.mark.parametrize(
    "flags", ["labels --labels localdata/tiny/labels.json", "judge", "judge --judge_prompt pairwise"]
)
def test_every_process_that_trains_gets_the_stage(repo, flags):
    """Processes are spawned: what a stage holds is pickled."""
    argv = [str(repo / word) if word.startswith("localdata") else word for word in f"{ON} --reward {flags}".split()]
    config = parse(TrainConfig, argv, description="", example="")
    data = repo / "localdata/tiny/prompt.1.json"
    _, stage = options.choose_stage(None, config.stage, data, False)
    stage.add_inputs(config, data, repo / "assets/tiny_m0", Provenance())
    sent = pickle.loads(pickle.dumps(stage))
    assert sent.live.folders == stage.live.folders and sent.settings == stage.settings
