"""Every state of every stage: each runs once while its files are recorded before each change (tests/snapshots.py), and
from each of these states, torn files included, the same command must end in the outputs of an undisturbed run.

`pytest -m "" -rP` shows how many states there are. Real kills: tests/test_faults.py.
"""

import re
import shutil

import pytest
import yaml
from on_disk import contents, recorded, saved_step
from snapshots import restore, states
from workspace import LOOP, M1, ON, Stages, Workspace

pytestmark = pytest.mark.slow
OUT = "outputs/crash"
WATCHED = [OUT, f"{LOOP}/*.scores.jsonl", "configs/checkpoint.json", "configs/dataset.json"]
TRAIN = f"train.py {ON} --lr 3e-4 --log_every 1 --save_eval_step_ratio 2 --train_bsz 4"
INFER = f"infer.py {ON} --gen_max_tokens 24 --max_length 100 --max_tokens_per_batch 300 --limit_size 8"
REWARD = f"rewarding.py {ON} --input_file {LOOP}/samples.jsonl --limit_size 8 --max_tokens_per_batch 300"
REWARDS = f"{LOOP}/current.jsonl", f"{LOOP}/previous.jsonl"
STAGES = {
    "sft": f"{TRAIN} --name tiny_sft --limit_size 8 --epoch 2 --output_dir {OUT}/run --register m1",
    "dpo": f"{TRAIN} {M1} --name {LOOP}/pairs.json --limit_size 12 --output_dir {OUT}/run",
    "sampling": f"{INFER} {M1} --name tiny_prompt_1 --gen_n 2 --output_dir {OUT}/samples.json",
    "evaluation": f"{INFER} {M1} --mode evaluation --name tiny_test --output_dir {OUT}/answers.json",
    "rewarding": f"{REWARD} {M1} --ref_model_ckpt none --output {OUT}/rewards.jsonl",
    "consistency": f"cal_consistency.py --file1 {REWARDS[0]} --file2 {REWARDS[1]} --output {OUT}/pairs.json "
    "--register pairs",
    "pairs": f"make_pairs.py --strategy all_pairs --rewards {REWARDS[0]} --previous {REWARDS[1]} "
    f"--output {OUT}/pairs.jsonl.zst",
    "iterate": "iterate.py --device cpu --config localdata/recipe.yaml",
}
RECIPE = {
    "title": "small",
    "model": "tiny",
    "iterations": 1,
    "prompts": ["tiny_prompt_1"],
    "base_dir": f"{OUT}/base",
    "output_dir": f"{OUT}/own",
    "sft": {"name": "tiny_sft", "limit_size": 8, "lr": 2e-4, "train_bsz": 8},
    "sampling": {"limit_size": 6, "gen_n": 3, "gen_temperature": 1.0, "gen_max_tokens": 24},
    "dpo": {"lr": 3e-4, "train_bsz": 4, "beta": 1.0, "save_eval_step_ratio": 1},
    "evaluation": {"name": "tiny_test", "limit_size": 4, "gen_max_tokens": 24},
}


@pytest.fixture(scope="module")
def world(repo, loop, tmp_path_factory):
    """A workspace with the tiny loop's outputs, whose stages start in forks of a process that has the project, too."""
    folder = tmp_path_factory.mktemp("workspace")
    world = Workspace(folder, repo, None, loop)
    (folder / "localdata/recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    modules = (
        path.relative_to(folder).with_suffix("") for path in [*folder.glob("*.py"), *folder.glob("cream/**/*.py")]
    )
    names = {".".join(path.parts).removesuffix(".__init__") for path in modules}
    world.stages = Stages(*sorted(names), project=folder)
    yield world
    world.stages.close()


@pytest.fixture(autouse=True)
def begin(world, loop):
    """Before a stage: no outputs, nobody registered, the score caches of the tiny loop."""
    restore(world.folder, WATCHED, world.folder, {})
    for cache in (loop / LOOP).glob("*.scores.jsonl"):
        shutil.copy(cache, world.folder / LOOP)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.xdist_group(f"crash states, {n}")) for n in STAGES])
def test_every_state_of_a_stage_ends_in_its_outputs(world, name, tmp_path):
    """Every file is the undisturbed run's, weights included; no journal, lock or temporary file is left over; what was
    finished is not done again."""
    folder, command = world.folder, STAGES[name]
    done = world.stages.record(folder, world.argv(command), WATCHED, tmp_path / "states")
    assert done.code == 0, done.err
    made, found = contents(folder, *WATCHED), states(tmp_path / "states")
    if name == "iterate":  # whose stages are tested each: a state for each file that gets its name
        named = {frozenset(n for n in s if "/." not in n): (e, s) for e, s in found if not e.endswith(" torn")}
        found = [*named.values()]
    wrong = []
    for event, state in found:
        restore(folder, WATCHED, tmp_path / "states", state)
        kept = unfinished(folder)
        done = world.stages.run(folder, world.argv(command))
        if done.code:
            wrong.append(f"{event}: it ended with {done.code}: {done.err}")
            continue
        now = contents(folder, *WATCHED)
        wrong += [f"{event}: {path} {how}" for path, how in differences(made, now)]
        if kept_by(done.out) != kept and "is up to date" not in done.out:
            wrong.append(f"{event}: {kept_by(done.out)} of {kept} (records in journals, steps in a state) were kept")
    torn = sum(event.endswith(" torn") for event, _ in found)
    print(f"{name}: {len(found)} states, {torn} of them torn; {len(wrong)} things wrong")
    assert not wrong, "\n".join(wrong)
    assert len(found) - torn > 8


def unfinished(folder):
    """(records in journals, steps in the saved states of training runs) that the command need not do again."""
    runs = [args.parent for args in (folder / OUT).rglob("args.json")]
    return recorded(folder / OUT), sum(saved_step(run) for run in runs if not (run / "meta.json").exists())


def kept_by(said):
    """The same, as a command says it."""
    records, steps = (
        re.findall(r"^resuming: (\d+) of ", said, re.M),
        re.findall(r"^resuming after step (\d+)", said, re.M),
    )
    return sum(map(int, records)), sum(map(int, steps))


def differences(made, now):
    for path in sorted({*made, *now}):
        if made.get(path) != now.get(path):
            yield path, "is left over" if path not in made else "is missing" if path not in now else "differs"
