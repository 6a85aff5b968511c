"""Stages killed (SIGKILL) from outside, twice in a row, and run to their end: their outputs are an undisturbed run's.

tests/test_crash_states.py has every state that a stage leaves between two changes of a file; here the kernel ends real
processes in the midst of their work, vLLM's included. `pytest -m "" -rP` shows what was done when they were killed.
"""

import copy
import json
import os
import select
import shutil
import signal

import pytest
import yaml
from on_disk import contents, journalled, progress, recorded, so_far
from test_crash_states import RECIPE
from workspace import LOOP, M1, ON, Done

from cream.files.append_log import strip_checksum

pytestmark = pytest.mark.slow
EVERY = 3  # steps between two checkpoints
TRAIN = f"train.py {ON} --lr 3e-4 --log_every 1 --save_eval_step_ratio 4 --output_dir outputs/"
INFER = f"infer.py {ON} --gen_max_tokens 48 --max_length 100 --output_dir outputs/"
REWARD = f"rewarding.py {ON} --input_file localdata/many.jsonl --output outputs/"
REWARDS, REWARDS_TOO = (
    f"{current} {LOOP}/current.jsonl {previous} {LOOP}/previous.jsonl"
    for current, previous in (("--file1", "--file2"), ("--rewards", "--previous"))
)
STAGES = {  # stage -> its command, and how much is done at the two kills: records or steps, or ("3") changes of files
    "sft": (TRAIN + "sft/run --name tiny_sft --limit_size 32 --epoch 3 --train_bsz 8 --register m1", (2, 8)),
    "sampling": (
        f"{INFER}sampling/x.json {M1} --name tiny_prompt_1 --limit_size 60 --gen_n 4 --max_tokens_per_batch 1000",
        (5, 30),
    ),
    "rewarding": (f"{REWARD}rewarding/x.jsonl {M1} --ref_model_ckpt none", (100, 400)),
    "dpo": (f"{TRAIN}dpo/run {M1} --name {LOOP}/pairs.json --limit_size 16 --epoch 3 --train_bsz 4", (2, 8)),
    "evaluation": (
        f"{INFER}evaluation/x.json {M1} --mode evaluation --name tiny_test --limit_size 60 --max_tokens_per_batch 1000",
        (5, 30),
    ),
    "consistency": (f"cal_consistency.py {REWARDS} --output outputs/consistency/x.json --register pairs", ("3", "7")),
    "pairs": (f"make_pairs.py --strategy all_pairs {REWARDS_TOO} --output outputs/pairs/x.jsonl", ("3", "7")),
    "iterate": ("iterate.py --device cpu --config localdata/recipe.yaml", (2, 12)),
}
LONGER = RECIPE | {"base_dir": "outputs/iterate/base", "output_dir": "outputs/iterate/own"}
LONGER["evaluation"] = RECIPE["evaluation"] | {"name": "tiny_test"}
LONGER |= {"sft": RECIPE["sft"] | {"limit_size": 32}, "sampling": RECIPE["sampling"] | {"limit_size": 24}}


class Stage:
    """A stage and what its undisturbed run, which making this is, made in its folder and in the registries."""

    def __init__(self, world, name, command):
        self.world, self.name, self.command = world, name, command
        self.folder = world.folder / "outputs" / name
        self.begin()
        done = self.run()
        assert not done.code, done.err
        self.made = self.contents()

    def begin(self):
        """As before its first run."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for path in self.world.folder.glob("configs/*.json"):
            path.unlink()
        for path in self.world.folder.glob("localdata/*.scores.jsonl"):
            path.unlink()

    def run(self, done: int | str | None = None) -> Done:
        """Run it: to its end, or until so much is `done`, when it is killed."""
        fatal = int(done) if isinstance(done, str) else None
        process = self.world.stages.start(self.world.folder, self.world.argv(self.command), fatal)
        while isinstance(done, int) and not select.select([process], [], [], 0.002)[0]:
            if so_far(finished, self.folder) >= done:
                signal.pidfd_send_signal(process, signal.SIGKILL)
                break
        os.close(process)
        return self.world.stages.end()

    def contents(self):
        return contents(self.world.folder, f"outputs/{self.name}", "configs/*.json")


def finished(folder):
    """Records in journals and steps in logs, of what is being written below a folder; in a loop, of all its stages."""
    return recorded(folder) + sum(step for step, _ in progress(folder))


@pytest.fixture(scope="module")
def world(looped):
    """The tiny loop's outputs, a file of more responses than are rewarded at once, a recipe."""
    (looped.folder / "localdata/recipe.yaml").write_text(yaml.safe_dump(LONGER))
    prompts = list(looped.read("localdata/tiny/prompt.1.json").items())[:60]
    rows = [
        {"uuid": f"{turn}-{uuid}", "prompt": prompt, "responses": [f"Answer: {turn}", f"{turn} + 1, Answer: 3"]}
        for turn in range(5)
        for uuid, prompt in prompts
    ]
    (looped.folder / "localdata/many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return looped


def killed(stage, moments):
    """Run a stage and kill it once so much is done, again and again; no record may be lost meanwhile or be there twice,
    no more steps than since the last checkpoint. Returns the records of its journals."""
    for _ in range(3):  # on a busy machine it may end before it is seen that so much is done
        stage.begin()
        held = {}
        for moment in moments:
            done = stage.run(moment)
            if done.code != -signal.SIGKILL:
                break
            check(stage, held)
            print(f"{stage.name}: killed with {so_far(finished, stage.folder)} records and steps done")
        else:
            return [line for lines in held.values() for line in lines]
    pytest.fail(f"it ended before so much was done: {moment}\n{done.out}\n{done.err}")


def check(stage, held):
    """What a killed stage has on disk, against the records that it had when it was killed before."""
    for journal in stage.folder.rglob("*.partial"):
        lines, before = journalled(journal), held.get(journal, [])
        uuids = [json.loads(strip_checksum(line))["uuid"] for line in lines]
        assert lines[: len(before)] == before, f"{journal.name} has lost records"
        assert len({*uuids}) == len(uuids), f"{journal.name} has records twice"
        held[journal] = lines
    assert all(logged - saved <= EVERY for logged, saved in progress(stage.folder))


@pytest.mark.parametrize("name", STAGES)
def test_a_killed_stage_ends_as_if_undisturbed(world, name):
    """Every file of it is the undisturbed run's, weights included; no journal, lock or temporary file is left over."""
    command, moments = STAGES[name]
    stage = Stage(world, name, command)
    killed(stage, moments)
    done = stage.run()
    assert not done.code, done.err
    assert "resuming" in done.out or name in ("consistency", "pairs")
    assert stage.contents() == stage.made


# vLLM -----------------------------------------------------------------------------------------------------------------


@pytest.mark.xdist_group("vllm")
def test_killed_sampling_by_vllm_keeps_what_was_finished(world, with_vllm):
    """Every prompt once, none missing; what was finished is kept byte for byte. The others are drawn again: vLLM, which
    rounds otherwise in other batches, may draw them otherwise."""
    own = copy.copy(world)
    own.stages = with_vllm
    stage = Stage(
        own, "vllm", f"{INFER}vllm/x.jsonl {M1} --engine vllm --name tiny_prompt_1 --limit_size 60 --gen_n 16"
    )
    held = killed(stage, (5, 30))
    done = stage.run()
    assert not done.code, done.err
    made, now = stage.made, stage.contents()
    assert made.keys() == now.keys()
    rows, again = (outputs["outputs/vllm/x.jsonl"].splitlines() for outputs in (made, now))
    assert [json.loads(row)["uuid"] for row in again] == [json.loads(row)["uuid"] for row in rows]
    assert {*map(strip_checksum, held)} <= {*again} and 30 <= len(held) < 60
    for outputs in (made, now):
        outputs["outputs/vllm/x.jsonl.meta.json"].pop("output")
    assert now["outputs/vllm/x.jsonl.meta.json"] == made["outputs/vllm/x.jsonl.meta.json"]
