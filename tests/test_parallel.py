"""Every way to train in several processes against one, at the same global batch: the same gradients, the same weights
after 20 steps; and runs that were killed.

Run as a script, this file is train.py that also writes down the first step's gradient, before it is clipped.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

STEPS, BATCH = 20, 8
RECORDS = STEPS * BATCH - 5  # the last step is short: one process has three examples there, the other none
COMMON = "--model tiny --lr 3e-4 --save_dtype float32 --show_example no --bf16 no --limit_size " + str(RECORDS)
COMMON += " --max_tokens_per_batch 110"  # several micro-batches a step in each process
LORA = "--lora yes --lora_r 8 --lora_alpha 16 --lora_dropout 0"  # dropout draws from one stream per process
STAGES = {
    "sft": f"{COMMON} --name tiny_sft",
    "dpo": f"{COMMON} --name outputs/pairs.json --method consistency_dyn --beta 0.5",
    "dpo, LoRA": f"{COMMON} --name outputs/pairs.json --method consistency_dyn --beta 0.5 {LORA}",
}
TWO = f"--device cpu,cpu --train_bsz {BATCH // 2}"
WAYS = {
    "two processes": TWO,
    "ZeRO-2": f"{TWO} --deepspeed configs/ds_stage2.json",
    "ZeRO-3": f"{TWO} --deepspeed outputs/ds_stage3.json",
    "ZeRO-3, offload": f"{TWO} --deepspeed configs/ds_stage3_offload.json --grad_checkpointing yes",
    "torchrun": f"--device cpu --train_bsz {BATCH // 2}",
}
CASES = [(stage, "two processes") for stage in ("sft", "dpo", "dpo, LoRA")]
CASES += [(stage, way) for stage in ("dpo", "dpo, LoRA") for way in ("ZeRO-2", "ZeRO-3")]
CASES += [("dpo", "ZeRO-3, offload"), ("dpo", "torchrun")]


def recording_work(job):
    """cream.training.run.work, with the first gradient kept in the run's folder."""
    from deepspeed.utils import safe_get_full_grad

    from cream.training import parallel
    from cream.training.run import work

    def keeping(step):
        def keep_and_step(self, lr, max_norm):
            kept = job.run / "gradient.safetensors"
            if not kept.exists():
                sharded = isinstance(self, parallel.Shards)
                trained = [p for p in self.whole.parameters() if p.requires_grad]
                gradients = [safe_get_full_grad(p) if sharded else p.grad for p in trained]
                torch.distributed.barrier() if torch.distributed.is_initialized() else None
                if self.accelerator.is_main_process:
                    save_file({str(i): g.contiguous() for i, g in enumerate(gradients)}, kept)
            return step(self, lr, max_norm)

        return keep_and_step

    for kind in (parallel.Replicas, parallel.Shards):
        kind.step = keeping(kind.step)
    work(job)


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
    shards = workspace.read("configs/ds_stage3.json")
    for name in ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance", "prefetch_bucket_size"):
        shards["zero_optimization"][f"stage3_{name}"] = 0  # else a model as small as this is never in shards
    workspace.write("outputs/ds_stage3.json", shards)
    return workspace


@pytest.fixture(scope="module")
def one(world):
    """stage -> the run of one process."""
    made = {}

    def run(stage):
        if stage not in made:
            made[stage] = train(world, stage, f"--device cpu --train_bsz {BATCH}", "one")
        return made[stage]

    return run


def train(world, stage, where, name):
    """The folder of a run."""
    run = world.folder / "outputs" / f"{stage}-{name}"
    (world.folder / "outputs/pairs.scores.jsonl").unlink(missing_ok=True)  # each computes its own reference
    command = f"{__file__} {STAGES[stage]} {where} --output_dir '{run}'"
    out = "".join(torchrun(world, command)) if name == "torchrun" else world.spawn(command)
    assert stage.startswith("sft") or f"{RECORDS} computed" in out
    return run


def torchrun(world, command, nodes=2):
    """What the nodes of a world print, each a torchrun of its own with one process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = f"-m torch.distributed.run --nnodes {nodes} --nproc_per_node 1 --master_addr 127.0.0.1 --master_port {port}"
    started = [world.start(f"{place} --node_rank {rank} {command}") for rank in range(nodes)]
    said = [process.communicate()[0] for process in started]
    assert not any(process.returncode for process in started), "".join(said)
    return said


def flat(path):
    tensors = load_file(path)
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


@pytest.fixture(autouse=True)
def found(world, monkeypatch):
    """This file, run as a script, finds the project in the workspace."""
    monkeypatch.setenv("PYTHONPATH", str(world.folder))


@pytest.mark.slow
@pytest.mark.parametrize("stage, way", CASES)
def test_all_ways_to_train_equal_one_process(world, one, stage, way):
    runs = one(stage), train(world, stage, WAYS[way], way)
    first = [json.loads((run / "log.jsonl").read_text().splitlines()[0]) for run in runs]
    gradients = [flat(run / "gradient.safetensors") for run in runs]
    start = flat(world.folder / "assets/tiny_m0/model.safetensors")
    ends = [flat(run / "checkpoint-last/model.safetensors") for run in runs]
    gradient = ((gradients[1] - gradients[0]).norm() / gradients[0].norm()).item()
    weights = ((ends[1] - ends[0]).norm() / (ends[0] - start).norm()).item()
    print(f"{stage}, {way}: first gradient differs by {gradient:.1e}, weights after {STEPS} steps by {weights:.1e}")
    assert (runs[1] / f"checkpoint-{STEPS}").is_dir() and (ends[0] - start).norm() > 0.01
    assert first[0]["grad_norm"] == pytest.approx(first[1]["grad_norm"], rel=1e-5)
    assert first[0]["loss"] == pytest.approx(first[1]["loss"], rel=1e-5)
    assert gradients[0].norm() == pytest.approx(first[0]["grad_norm"], rel=1e-5)  # it is the gradient of that step
    assert gradient <= 1e-5
    assert weights <= 1e-3


@pytest.mark.slow
def test_bfloat16_in_shards_trains_as_autocast_does(world):
    """There the weights are float32 and products bfloat16, here the weights bfloat16 and their masters float32."""
    dpo = STAGES["dpo"].replace("--bf16 no", "--bf16 yes")
    ways = {"autocast": f"--device cpu --train_bsz {BATCH}", "shards": WAYS["ZeRO-3"]}
    runs = {name: world.folder / f"outputs/bfloat16-{name}" for name in ways}
    for name, where in ways.items():
        (world.folder / "outputs/pairs.scores.jsonl").unlink(missing_ok=True)
        world.spawn(f"train.py {dpo} {where} --output_dir '{runs[name]}' --log_every 1")
    start = flat(world.folder / "assets/tiny_m0/model.safetensors")
    one, two = (flat(run / "checkpoint-last/model.safetensors") - start for run in runs.values())
    logs = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in runs.values()]
    cosine = (one @ two / (one.norm() * two.norm())).item()
    print(f"bfloat16: the ways that the weights went have cosine {cosine:.4f}")
    assert logs[1][0]["loss"] == pytest.approx(logs[0][0]["loss"], abs=1e-3) and len(logs[1]) == STEPS
    assert cosine > 0.8


# Killed runs ----------------------------------------------------------------------------------------------------------


def kill_at(world, command, run, step):
    """Kill a run and its processes when its state after `step` stands."""
    process = subprocess.Popen(
        [sys.executable, *world.argv(command)], cwd=world.folder, stdout=subprocess.DEVNULL, start_new_session=True
    )
    marker = run / "state/whole"
    while not (marker.exists() and json.loads(marker.read_text())["step"] >= step):
        assert process.poll() is None, "the run ended before it was killed"
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize(
    "way, other",
    [
        ("ZeRO-2", None),
        ("ZeRO-3", None),
        ("two processes", "--device cpu --train_bsz 8"),
        ("ZeRO-2", "--device cpu --train_bsz 8 --deepspeed configs/ds_stage2.json"),
        ("ZeRO-3", "--device cpu --train_bsz 8 --deepspeed outputs/ds_stage3.json"),
    ],
)
def test_a_killed_run_goes_on(world, way, other):
    """In the same number of processes to the bit, in another one (at the same global batch) up to rounding."""
    runs = [world.folder / f"outputs/{name}" for name in (f"whole-{way}", f"killed-{way}-{bool(other)}")]
    sft = STAGES["sft"] + " --save_eval_step_ratio 4"
    whole, killed = (f"train.py {sft} {WAYS[way]} --output_dir '{run}'" for run in runs)
    world.spawn(whole)  # one that stands is not run again
    kill_at(world, killed, runs[1], 10)
    said = world.spawn(killed if other is None else f"train.py {sft} {other} --output_dir '{runs[1]}'")
    assert "resuming after step 1" in said
    start = flat(world.folder / "assets/tiny_m0/model.safetensors")
    ends = [flat(run / "checkpoint-last/model.safetensors") for run in runs]
    weights = ((ends[1] - ends[0]).norm() / (ends[0] - start).norm()).item()
    print(f"{way}, gone on {'in another number of processes' if other else 'in as many processes'}: {weights:.1e}")
    assert weights <= (1e-3 if other else 1e-6)


if __name__ == "__main__":
    sys.path[0] = str(Path.cwd())

    import train as script
    from cream.training import launch

    processes = launch.run
    launch.run = lambda _work, *where, **options: processes(recording_work, *where, **options)
    script.main()
