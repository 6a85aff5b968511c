"""--device cpu,cpu against --device cpu at the same global batch: the same gradients, the same weights after 20 steps.

Run as a script, this file is train.py that also writes down the first step's gradient, before it is clipped.
"""

import json
import sys
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
    "sft, LoRA": f"{COMMON} --name tiny_sft {LORA}",
    "dpo, LoRA": f"{COMMON} --name outputs/pairs.json --method consistency_dyn --beta 0.5 {LORA}",
}


def recording_work(job):
    """cream.training.run.work, with the first gradient kept in the run's folder."""
    from accelerate import Accelerator

    from cream.training.run import work

    clip = Accelerator.clip_grad_norm_

    def keep_and_clip(self, parameters, max_norm):
        parameters, kept = list(parameters), job.run / "gradient.safetensors"
        if self.is_main_process and not kept.exists():
            save_file({str(i): p.grad for i, p in enumerate(parameters) if p.grad is not None}, kept)
        return clip(self, parameters, max_norm)

    Accelerator.clip_grad_norm_ = keep_and_clip
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
    return workspace


def flat(path):
    tensors = load_file(path)
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_equal_one(world, stage, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(world.folder))
    runs, kept = {}, world.folder / "outputs/pairs.scores.jsonl"
    for device, size in (("cpu", BATCH), ("cpu,cpu", BATCH // 2)):
        runs[device] = world.folder / "outputs" / f"{stage}-{device}"
        kept.unlink(missing_ok=True)  # each computes its own reference
        where = f"--device {device} --train_bsz {size} --output_dir '{runs[device]}'"
        out = world.spawn(f"{__file__} {STAGES[stage]} {where}")
        assert stage.startswith("sft") or f"{RECORDS} computed now" in out
    one, two = runs.values()
    first = [json.loads((run / "log.jsonl").read_text().splitlines()[0]) for run in (one, two)]
    gradients = [flat(run / "gradient.safetensors") for run in (one, two)]
    start = flat(world.folder / "assets/tiny_m0/model.safetensors")
    ends = [flat(run / "checkpoint-last/model.safetensors") for run in (one, two)]
    gradient = ((gradients[1] - gradients[0]).norm() / gradients[0].norm()).item()
    weights = ((ends[1] - ends[0]).norm() / (ends[0] - start).norm()).item()
    print(
        f"{stage}: first gradient differs by {gradient:.1e}, weights after {STEPS} steps by {weights:.1e} of their way"
    )
    assert (one / f"checkpoint-{STEPS}").is_dir() and (ends[0] - start).norm() > 0.01
    assert first[0]["grad_norm"] == pytest.approx(first[1]["grad_norm"], rel=1e-5)
    assert first[0]["loss"] == pytest.approx(first[1]["loss"], rel=1e-5)
    assert gradients[0].norm() == pytest.approx(first[0]["grad_norm"], rel=1e-5)  # it is the gradient of that step
    assert gradient <= 1e-5
    assert weights <= 1e-3


if __name__ == "__main__":
    sys.path[0] = str(Path.cwd())

    import train
    from cream.training import launch

    processes = launch.run
    launch.run = lambda _work, *where: processes(recording_work, *where)
    train.main()
