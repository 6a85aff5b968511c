"""Every way to train in several processes against one, at the same global batch: the same gradients, the same weights
at the end; and runs that were killed. The processes are forks; once each, commands are started as users start them."""

import json
import shutil
import signal

import pytest
import ranks
import torch
from safetensors.torch import load_file, save_file

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("both cores")]

STEPS, BATCH = 6, 8
RECORDS = STEPS * BATCH - 5  # the last step is short: one process has three examples there, the other none
COMMON = "--model tiny --lr 3e-4 --save_dtype float32 --show_example no --bf16 no --limit_size " + str(RECORDS)
COMMON += " --max_tokens_per_batch 110"  # several micro-batches a step in each process
COMMON += " --log_every 1"
LORA = "--lora yes --lora_r 8 --lora_alpha 16 --lora_dropout 0"  # dropout draws from one stream per process
STAGES = {
    "sft": f"{COMMON} --name tiny_sft",
    "dpo": f"{COMMON} --name outputs/pairs.json --method consistency_dyn --beta 0.5",
    "dpo, LoRA": f"{COMMON} --name outputs/pairs.json --method consistency_dyn --beta 0.5 {LORA}",
    "odin": f"{COMMON} --name outputs/pairs.json --train_stage odin",  # a head, and a term of the whole global batch
    "grpo": f"{COMMON} --name outputs/rewards.json --train_stage grpo --kl_coef 0.1 --kl_reference outputs/other",
}
ONE = f"--device cpu --train_bsz {BATCH}"
TWO = f"--device cpu,cpu --train_bsz {BATCH // 2}"
RANK = f"--device cpu --train_bsz {BATCH // 2}"  # one of two that something else starts
SHARDS = {"ZeRO-2": "--deepspeed configs/ds_stage2.json", "ZeRO-3": "--deepspeed outputs/ds_stage3.json"}
OFFLOAD = "--deepspeed configs/ds_stage3_offload.json --grad_checkpointing yes"
WAYS = {
    "one process": ONE,
    "two processes": TWO,
    **{name: f"{TWO} {flags}" for name, flags in SHARDS.items()},
    "ZeRO-3, offload": f"{TWO} {OFFLOAD}",
    "a launcher": RANK,
}
CASES = [(stage, "two processes") for stage in ("sft", "dpo", "dpo, LoRA")]
CASES += [(stage, way) for stage in ("dpo", "dpo, LoRA") for way in SHARDS]
CASES += [("dpo", "ZeRO-3, offload"), ("dpo", "a launcher")]
CASES += [("odin", way) for way in ("two processes", *SHARDS)]
CASES += [("grpo", way) for way in ("two processes", *SHARDS)]  # with another model, the KL term's reference


@pytest.fixture(scope="module")
def world(workspace):
    """The workspace with preference pairs: a solution against the next problem's."""
    sft = list(workspace.read("localdata/tiny/sft.json").items())
    pairs = {}
    for i, (uuid, (question, answer)) in enumerate(sft):
        other = next(o for _, (_, o) in sft[i + 1 :] + sft if o != answer)
        pairs[uuid] = {"prompt": [question], "selected": [question, answer], "rejected": [question, other]}
        pairs[uuid]["consistency"] = i % 11 / 10
    workspace.write("outputs/pairs.json", pairs)
    rewards = {
        uuid: {"prompt": pair["prompt"], "response": [pair["selected"], pair["rejected"]], "reward": [1, i % 3 / 2]}
        for i, (uuid, pair) in enumerate(pairs.items())
    }
    workspace.write("outputs/rewards.json", rewards)
    other = workspace.folder / "outputs/other"
    shutil.copytree(workspace.folder / "assets/tiny_m0", other)
    weights = load_file(other / "model.safetensors")
    save_file({n: w * 1.05 for n, w in weights.items()}, other / "model.safetensors", {"format": "pt"})
    shards = workspace.read("configs/ds_stage3.json")
    for name in ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance", "prefetch_bucket_size"):
        shards["zero_optimization"][f"stage3_{name}"] = 0  # else a model as small as this is never in shards
    workspace.write("outputs/ds_stage3.json", shards)
    return workspace


@pytest.fixture(scope="module")
def trained(world):
    """(stage, way) -> the folder of that run."""
    made = {}

    def get(stage, way):
        if (stage, way) not in made:
            made[stage, way] = train(world, stage, way)
        return made[stage, way]

    return get


def train(world, stage, way):
    """The folder of a run, its first gradient in it."""
    run = world.folder / "outputs" / f"{stage}-{way}"
    again(world)
    command = f"{ranks.disturbed('kept')} {STAGES[stage]} {WAYS[way]} --output_dir '{run}'"
    if way == "a launcher":
        ended = ranks.run(world, command)
        assert [code for code, _ in ended] == [0, 0], ended
        out = ended[0][1]
    else:
        out = world.run(command).out
    assert stage in ("sft", "odin") or f"{RECORDS} computed" in out
    return run


def again(world):
    """Each run computes its own reference."""
    for name in ("pairs", "rewards"):
        (world.folder / f"outputs/{name}.scores.jsonl").unlink(missing_ok=True)


def flat(path):
    tensors = load_file(path)
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def moved(world, run):
    """How far a run's weights went from where they started, without those of a new head."""
    start, end = (world.folder / "assets/tiny_m0", run / "checkpoint-last")
    start, end = (load_file(folder / "model.safetensors") for folder in (start, end))
    return torch.cat([(end[name].double() - start[name].double()).flatten() for name in sorted(start)])


def difference(found, wanted):
    """Relative to what is wanted."""
    return ((found - wanted).norm() / wanted.norm()).item()


def log(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def check_equal(world, run, one):
    """A run's first step and its last weights are those of one process."""
    weights = difference(moved(world, run), moved(world, one))
    print(f"weights after {STEPS} steps differ by {weights:.1e}")
    assert (run / f"checkpoint-{STEPS}").is_dir() and moved(world, one).norm() > 0.01
    first, wanted = log(run)[0], log(one)[0]
    assert first["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5)
    assert first["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    assert weights <= 1e-3


@pytest.mark.parametrize("stage, way", CASES)
def test_all_ways_to_train_equal_one_process(world, trained, stage, way):
    run, one = trained(stage, way), trained(stage, "one process")
    found, wanted = (flat(folder / "gradient.safetensors") for folder in (run, one))
    print(f"{stage}, {way}: first gradient differs by {difference(found, wanted):.1e}")
    assert wanted.norm() == pytest.approx(log(one)[0]["grad_norm"], rel=1e-5)  # it is the gradient of that step
    assert difference(found, wanted) <= 1e-5
    check_equal(world, run, one)


def test_two_processes_as_a_user_starts_them(world, trained):
    """By spawn, each with its own imports, as CUDA needs it."""
    run = world.folder / "outputs/spawned"
    world.spawn(f"train.py {STAGES['sft']} {TWO} --output_dir {run}")
    check_equal(world, run, trained("sft", "one process"))


def test_torchrun_as_a_user_starts_it(world, trained):
    """It holds the store where the processes meet."""
    run = world.folder / "outputs/torchrun"
    place = f"--nproc_per_node 2 --master_addr 127.0.0.1 --master_port {ranks.free_port()}"
    world.spawn(f"-m torch.distributed.run {place} train.py {STAGES['sft']} {RANK} --output_dir {run}")
    check_equal(world, run, trained("sft", "one process"))


def test_bfloat16_in_shards_trains_as_autocast_does(world):
    """There the weights are float32 and products bfloat16, here the weights bfloat16 and their masters float32."""
    dpo = STAGES["dpo"].replace("--bf16 no", "--bf16 yes")
    runs = [world.folder / f"outputs/bfloat16-{way}" for way in ("one process", "ZeRO-3")]
    for run in runs:
        again(world)
        world.run(f"{ranks.disturbed('kept')} {dpo} {WAYS[run.name.removeprefix('bfloat16-')]} --output_dir '{run}'")
    one, two = (moved(world, run) for run in runs)
    cosine = (one @ two / (one.norm() * two.norm())).item()
    print(f"bfloat16: the ways that the weights went have cosine {cosine:.4f}")
    logs = [log(run) for run in runs]
    assert logs[1][0]["loss"] == pytest.approx(logs[0][0]["loss"], abs=1e-3) and len(logs[1]) == STEPS
    assert cosine > 0.8


# Killed runs ----------------------------------------------------------------------------------------------------------

SAVED, KILLED = STEPS // 2, STEPS - 1  # after which step the state is saved; before which step's update all are killed
STAGE = f"{STAGES['dpo']} --save_eval_step_ratio 2"


@pytest.fixture(scope="module")
def interrupted(world):
    """way -> a copy of the folder of a run that was killed."""
    made = {}

    def copy(way, name):
        if way not in made:
            made[way] = world.folder / f"outputs/killed-{way}"
            again(world)
            killed = f"{ranks.disturbed(f'killed {KILLED}')} {STAGE} {WAYS[way]} --output_dir '{made[way]}'"
            world.run(killed, code=-signal.SIGKILL)
        return shutil.copytree(made[way], made[way].with_name(f"{made[way].name}-{name}"), symlinks=True)

    return copy


@pytest.mark.parametrize(
    "way, other",
    [
        ("ZeRO-2", None),
        ("ZeRO-3", None),
        ("two processes", ONE),
        ("ZeRO-2", f"{ONE} {SHARDS['ZeRO-2']}"),
        ("ZeRO-3", f"{ONE} {SHARDS['ZeRO-3']}"),
    ],
)
def test_a_killed_run_goes_on(world, trained, interrupted, way, other):
    """In the same number of processes to the bit, in another one (at the same global batch) up to rounding."""
    run = interrupted(way, "one" if other else "two")
    again(world)
    out = world.run(f"{ranks.disturbed('kept')} {STAGE} {other or WAYS[way]} --output_dir '{run}'").out
    assert f"resuming after step {SAVED}" in out
    weights = difference(moved(world, run), moved(world, trained("dpo", way)))
    print(f"{way}, gone on {'in another number of processes' if other else 'in as many processes'}: {weights:.1e}")
    assert weights <= (1e-3 if other else 1e-6)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_process_ends_the_command_by_its_name(world, lost):
    train = f"{STAGES['sft']} {TWO} --output_dir outputs/lost-{lost}"
    done = world.run(f"{ranks.disturbed(f'lost 3 {lost}')} {train}", code=2)
    assert f"error: training process {lost} of 2 ended with code -9 (signal SIGKILL); the same command" in done.err


def test_a_signal_to_one_process_ends_all_after_the_same_step(world):
    run = world.folder / "outputs/asked"
    done = world.run(f"{ranks.disturbed('asked 3 1')} {STAGES['sft']} {TWO} --output_dir {run}", code=143)
    assert "interrupted: finished work is kept" in done.err and "Traceback" not in done.err
    assert len(log(run)) == json.loads((run / "state/whole").read_text())["step"] == 3
