"""Every stage killed (SIGKILL) at random moments and run again until it ends: its outputs are an undisturbed run's.

A moment is a time, anywhere in what the undisturbed run took, or a change of a file, any of those it made: so the short
end of a stage, where files are put in place, is met as well. `pytest -m "" -rP` shows how many kills and losses.
"""

import copy
import json
import os
import random
import select
import shutil
import signal
import time
from collections import Counter
from contextlib import suppress

import pytest
import yaml
from workspace import Done, Stages

from cream.files.append_log import strip_checksum

pytestmark = pytest.mark.slow
KILLS = 10  # of a stage, at least
ROW = 5  # kills in a row; then it may end
EVERY = 3  # steps between two checkpoints
TRAIN = "train.py --device cpu --model tiny --lr 3e-4 --log_every 1 --save_eval_step_ratio 4 --output_dir outputs/"
INFER = "infer.py --device cpu --model tiny --gen_max_tokens 48 --max_length 100 --output_dir outputs/"
M1 = "--checkpoint outputs/sft/run/checkpoint-last"
REWARD = "rewarding.py --device cpu --model tiny --input_file outputs/rewarding/samples.jsonl --output outputs/"
STAGES = {
    "sft": TRAIN + "sft/run --name tiny_sft --epoch 3 --train_bsz 8 --register m1",
    "sampling": f"{INFER}sampling/samples.json {M1} --name tiny_prompt_1 --gen_n 4 --max_tokens_per_batch 2000",
    "rewarding": f"{REWARD}rewarding/rewards.jsonl {M1} --ref_model_ckpt none",
    "previous": f"{REWARD}previous/rewards.jsonl --reward likelihood --checkpoint none",
    "consistency": "cal_consistency.py --file1 outputs/rewarding/rewards.jsonl --file2 outputs/previous/rewards.jsonl "
    "--output outputs/consistency/pairs.json --register pairs",
    "dpo": f"{TRAIN}dpo/run {M1} --name outputs/consistency/pairs.json --limit_size 48 --train_bsz 4",
    "evaluation": f"{INFER}evaluation/answers.json {M1} --mode evaluation --name tiny_test --max_tokens_per_batch 1000",
    "iterate": "iterate.py --device cpu --config localdata/recipe.yaml",
}
VLLM = f"{INFER}vllm/samples.jsonl {M1} --engine vllm --name tiny_prompt_1 --gen_n 16"
RECIPE = {
    "title": "small",
    "model": "tiny",
    "iterations": 1,
    "prompts": ["tiny_prompt_1"],
    "base_dir": "outputs/iterate/base",
    "output_dir": "outputs/iterate/own",
    "sft": {"name": "tiny_sft", "limit_size": 16, "lr": 2e-4, "train_bsz": 8},
    "sampling": {"limit_size": 16, "gen_n": 4, "gen_temperature": 1.0, "gen_max_tokens": 48},
    "dpo": {"lr": 3e-4, "train_bsz": 4, "beta": 1.0, "save_eval_step_ratio": 1},
    "evaluation": {"name": "tiny_test", "limit_size": 20, "gen_max_tokens": 48},
}


# What is on disk ------------------------------------------------------------------------------------------------------


def contents(folder):
    """What every file below a folder holds, but for times and speeds."""
    paths = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    return {str(path.relative_to(folder)): content(path) for path in paths}


def content(path):
    if path.is_symlink():
        return os.readlink(path)
    if path.name == "log.jsonl":
        return [timeless(json.loads(line)) for line in path.read_text().splitlines()]
    if path.name.endswith(".scores.jsonl"):  # kept scores, in any order
        return Counter(path.read_bytes().splitlines())
    return timeless(json.loads(path.read_bytes())) if path.name.endswith("meta.json") else path.read_bytes()


def timeless(value):
    """A sidecar, or a line of a log, without what is measured anew each time."""
    if not isinstance(value, dict):
        return value
    kept = {k: v for k, v in value.items() if not k.endswith("_per_second")}
    return {k: timeless(v) for k, v in kept.items() if k not in ("wall_seconds", "peak_memory_gb")}


def whole(journal):
    """The whole lines of a journal, its first one excepted."""
    return [line for line in journal.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")][1:]


def recorded(folder):
    """Records in the journals below a folder."""
    return sum(len(whole(journal)) for journal in folder.rglob("*.partial"))


def so_far(done, folder):
    """What is `done` in a folder that a stage is changing: nothing while it moves or removes what is being read."""
    with suppress(FileNotFoundError):
        return done(folder)
    return 0


def progress(folder):
    """(steps in its log, steps in its saved state) of each unfinished training run below a folder."""
    for log in folder.rglob("log.jsonl"):
        if not (log.parent / "meta.json").exists():
            state = log.parent / "state/whole"
            yield log.read_bytes().count(b"\n"), json.loads(state.read_bytes())["step"] if state.exists() else 0


# Stages that are killed -----------------------------------------------------------------------------------------------


class Stage:
    """A stage and what its undisturbed run, which making this is, made in its folder and in the registries."""

    def __init__(self, world, name, command):
        self.world, self.name, self.command = world, name, command
        self.folder, self.kept = (world.folder / root / name for root in ("outputs", "kept"))
        self.begin()
        began = time.monotonic()
        done = self.run()
        assert not done.code, done.err
        self.seconds, self.changes = time.monotonic() - began, len(done.changes.splitlines())
        self.made = self.contents()
        shutil.copytree(self.folder, self.kept, symlinks=True)

    def begin(self):
        """As before its first run."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for path in self.world.folder.glob("configs/*.json"):
            path.unlink()
        if self.name == "rewarding":
            many_samples(self.world)

    def run(self, seconds=None, change=0, records=None) -> Done:
        """Run it: to its end, or until it is killed, after some seconds, before its change number `change`, or once its
        journal has so many records."""
        process = self.world.stages.start(self.world.folder, self.world.argv(self.command), change)
        while records and not select.select([process], [], [], 0.002)[0]:
            if so_far(recorded, self.folder) >= records:
                seconds = records = 0
        if seconds is not None and not select.select([process], [], [], seconds)[0]:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(process, signal.SIGKILL)
        os.close(process)
        return self.world.stages.end()

    def contents(self):
        registries = {f"configs/{path.name}": content(path) for path in self.world.folder.glob("configs/*.json")}
        return contents(self.folder) | registries

    def restore(self):
        """For the stages that follow."""
        shutil.rmtree(self.folder)
        shutil.copytree(self.kept, self.folder, symlinks=True)


def at_random(stage):
    """Rows of moments, without end."""
    rng = random.Random(stage.name)
    while True:
        times = [{"seconds": rng.uniform(0, stage.seconds)} for _ in range(ROW)]
        changes = [{"change": rng.randint(1, stage.changes)} for _ in range(ROW)]
        yield [rng.choice(two) for two in zip(times, changes, strict=True)]


def amid_records(stage, most):
    """The same for a stage that takes long to start: of each row but one moment while it fills its journal."""
    rng = random.Random(stage.name)
    while True:
        records = sorted(rng.sample(range(1, most), ROW - 1))
        yield [{"seconds": rng.uniform(0, stage.seconds)}, *({"records": number} for number in records)]


def at_both_ends(stage):
    """Rows of one moment: before each of the first and the last changes of files."""
    numbers = range(1, stage.changes + 1)
    return [[{"change": number}] for number in sorted({*numbers[:5], *numbers[-16:]})]


class Disturbed:
    """A stage that is killed at the moments of a row and run to its end, row by row: what happened, what is wrong."""

    def __init__(self, stage, rows, kills=None):
        self.stage, self.tally, self.wrong = stage, Counter(), []
        for row in rows:
            if kills and self.tally["kills"] >= kills:
                break
            stage.begin()
            self.held, self.last = {}, []
            done = self.killed(row) or stage.run()
            self.tally["runs to the end"] += 1
            self.expect(not done.code, f"it ended with {done.code}: {done.err}")
            if not done.code:
                self.compare()
        stage.restore()
        told = ", ".join(f"{count} {what}" for what, count in sorted(self.tally.items()))
        print(f"{stage.name}: {told}, {len(self.wrong)} things wrong")

    def killed(self, row) -> Done | None:
        """Kills, one after the other; how it ended, if it has ended meanwhile."""
        for moment in row:
            done = self.stage.run(**moment)
            if done.code != -signal.SIGKILL:
                return done
            self.tally["kills"] += 1
            last = done.changes.splitlines()[-1] if done.changes else "its start"
            self.last.append(f"{'before' if 'change' in moment else 'after'} {last}")
            self.check()

    def expect(self, right, what):
        if not right:
            self.wrong.append(f"killed {', '.join(self.last)}: {what}")

    def check(self):
        """No record is lost that was in a journal before, none is there twice."""
        for journal in self.stage.folder.rglob("*.partial"):
            lines, before = whole(journal), self.held.setdefault(journal.name, [[]])
            self.expect(lines[: len(before[-1])] == before[-1], f"{journal.name} has lost records")
            uuids = [json.loads(strip_checksum(line))["uuid"] for line in lines]
            self.expect(len({*uuids}) == len(uuids), f"{journal.name} has records twice")
            before.append(lines)
        for logged, saved in progress(self.stage.folder):
            self.tally["steps trained again"] += logged - saved
            self.expect(logged - saved <= EVERY, f"{logged} steps were done, and {saved} are kept")

    def compare(self):
        """The stage's outputs with the undisturbed run's."""
        found, made = self.stage.contents(), self.stage.made
        for name in sorted({*found, *made}):
            how = "is left over" if name not in made else "is missing" if name not in found else "differs"
            self.expect(found.get(name) == made.get(name), f"{name} {how}")


# Their inputs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(workspace):
    """Short data, a prompt that is too long, a recipe."""
    for name, count in {"sft": 32, "prompt.1": 60, "test": 60}.items():
        workspace.shorten(f"localdata/tiny/{name}.json", count)
    prompts = workspace.read("localdata/tiny/prompt.1.json")
    workspace.write("localdata/tiny/prompt.1.json", prompts | {"long": [{"role": "user", "content": "egg " * 200}]})
    (workspace.folder / "localdata/recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    workspace.run(TRAIN + "warm --limit_size 8")  # the first run is slower: no measure of when to kill the others
    return workspace


def many_samples(world):
    """The input of rewarding: more than is computed at once."""
    prompts = world.read("localdata/tiny/prompt.1.json")
    del prompts["long"]
    rows = [
        {"uuid": f"{turn}-{uuid}", "prompt": prompt, "responses": [f"Answer: {turn}", f"{turn} + 1, Answer: 3"]}
        for turn in range(5)
        for uuid, prompt in prompts.items()
    ]
    path = world.folder / "outputs/rewarding/samples.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def undisturbed(world):
    """The undisturbed run of a stage, after those of the stages before it."""
    made = {}

    def get(name):
        for each in list(STAGES)[: list(STAGES).index(name) + 1]:
            made[each] = made.get(each) or Stage(world, each, STAGES[each])
        return made[name]

    return get


@pytest.mark.parametrize("name", [name for name in STAGES if name != "previous"])
def test_a_killed_stage_ends_as_if_undisturbed(undisturbed, name):
    """Every file of it is the undisturbed run's, weights included; no journal, lock or temporary file is left over."""
    stage = undisturbed(name)
    found = Disturbed(stage, at_random(stage), KILLS)
    assert not found.wrong, "\n".join(found.wrong)


@pytest.mark.parametrize("name", ["sft", "rewarding", "consistency", "evaluation"])
def test_a_stage_killed_before_a_change_of_a_file_ends_as_if_undisturbed(undisturbed, name):
    """Each change once, but for those amid a long training: what a random moment seldom hits."""
    stage = undisturbed(name)
    found = Disturbed(stage, at_both_ends(stage))
    assert not found.wrong, "\n".join(found.wrong)


# vLLM -----------------------------------------------------------------------------------------------------------------


class Redrawn(Disturbed):
    """Sampling by vLLM, which rounds otherwise in other batches: what was finished at a kill is kept byte for byte."""

    def compare(self):
        found, made = self.stage.contents(), self.stage.made
        self.expect(found.keys() == made.keys(), f"files: {sorted(found)}")
        rows, ours = (contents["samples.jsonl"].splitlines(keepends=True) for contents in (made, found))
        held = [
            [strip_checksum(line) + b"\n" for line in lines]
            for lines in self.held.get("samples.jsonl.partial", [])
            if lines
        ]
        self.expect(not held or {*held[-1]} <= {*ours}, "finished records are not kept")
        first = {json.loads(line)["uuid"] for line in held[0]} if held else {}
        for row, our in zip(map(json.loads, rows), map(json.loads, ours), strict=True):
            self.expect(row["uuid"] == our["uuid"], "other prompts")
            if held and row["uuid"] not in first:  # in the company of fewer others
                self.tally["answers drawn again"] += len(row["responses"])
                self.tally["of them differ"] += sum(map(str.__ne__, row["responses"], our["responses"]))
        for sidecar in (found["samples.jsonl.meta.json"], made["samples.jsonl.meta.json"]):
            sidecar.pop("output", None)
        self.expect(found["samples.jsonl.meta.json"] == made["samples.jsonl.meta.json"], "another sidecar")


@pytest.fixture
def with_vllm(world, undisturbed, monkeypatch):
    """The workspace, its stages in forks of a process that has imported vLLM: to start takes it 15 s."""
    pytest.importorskip("vllm", exc_type=ImportError)
    undisturbed("sft")
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "TORCH_COMPILE_DISABLE": "1"}
    for name, value in variables.items():  # the last: else it would start compilers, which a kill leaves behind
        monkeypatch.setenv(name, value)
    engine = ("v1.engine.llm_engine", "v1.engine.core", "v1.executor.uniproc_executor", "v1.worker.cpu_worker")
    stages = Stages(*(f"vllm.{module}" for module in (*engine, "model_executor.models.llama")))
    own = copy.copy(world)
    own.stages = stages
    own.run(f"{VLLM} --limit_size 1".replace("vllm/", "warm/"))  # as above
    yield own
    stages.close()


def test_killed_sampling_by_vllm_keeps_what_was_finished(with_vllm):
    """None twice, none missing, none of what was kept another."""
    stage = Stage(with_vllm, "vllm", VLLM)
    found = Redrawn(stage, amid_records(stage, 60), KILLS)
    assert found.tally["answers drawn again"]
    assert not found.wrong, "\n".join(found.wrong)
