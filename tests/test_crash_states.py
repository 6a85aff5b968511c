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
from workspace import LOOP, M1, ON

pytestmark = pytest.mark.slow
OUT = "outputs/crash"
FEW = "localdata/few.json"  # questions, all of which are read and checked from each state
TEMPORARY = re.compile(r"/\.|\.partial$|/state\b")
WATCHED = [OUT, f"{LOOP}/*.scores.jsonl", "configs/checkpoint.json", "configs/dataset.json", "configs/.*"]
TRAIN = f"train.py {ON} --lr 3e-4 --save_eval_step_ratio 2 --train_bsz 4"
INFER = f"infer.py {ON} --gen_max_tokens 24 --max_length 100 --max_tokens_per_batch 300 --limit_size 8"
REWARD = f"rewarding.py {ON} --input_file {LOOP}/samples.jsonl --limit_size 8 --max_tokens_per_batch 300"
REWARDS = f"{LOOP}/current.jsonl", f"{LOOP}/previous.jsonl"
STAGES = {
    "sft": f"{TRAIN} --name tiny_sft --limit_size 8 --epoch 2 --log_every 3 --output_dir {OUT}/run --register m1",
    "dpo": f"{TRAIN} {M1} --name {LOOP}/pairs.json --limit_size 12 --log_every 1 --output_dir {OUT}/run",
    "sampling": f"{INFER} {M1} --name tiny_prompt_1 --gen_n 2 --output_dir {OUT}/samples.json",
    "instructions": f"infer.py {ON} {M1} --mode instructions --name tiny_prompt_1 --limit_size 30 --max_rouge 1 "
    f"--num_prompts 8 --queries_per_round 4 --gen_max_tokens 16 --output_dir {OUT}/prompts.json",
    "evaluation": f"{INFER} {M1} --mode evaluation --name {FEW} --output_dir {OUT}/answers.json",
    "rescore": f"infer.py --mode rescore --input_file {LOOP}/m1.json --output_dir {OUT}/rescored.json",
    "rewarding": f"{REWARD} {M1} --ref_model_ckpt none --output {OUT}/rewards.jsonl",
    "consistency": f"cal_consistency.py --file1 {REWARDS[0]} --file2 {REWARDS[1]} --output {OUT}/pairs.json "
    "--register pairs",
    "pairs": f"make_pairs.py --strategy all_pairs --rewards {REWARDS[0]} --previous {REWARDS[1]} "
    f"--output {OUT}/pairs.jsonl.zst",
    "measuring": f"evaluate_reward.py --rewards {REWARDS[0]} --gold localdata/tiny/labels.json --output_dir {OUT}",
    "iterate": "iterate.py --device cpu --config localdata/recipe.yaml --jobs 1 --report no --verbose",
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
    "dpo": {"lr": 3e-4, "train_bsz": 4, "beta": 1.0, "save_eval_step_ratio": 1, "allow_reversed": True},
    "evaluation": {"name": FEW, "limit_size": 4, "gen_max_tokens": 24},
    "keep": {"metric": "accuracy", "start": "accuracy.M1"},
}


@pytest.fixture
def world(quick, loop):
    """A workspace before a stage: no outputs, nobody registered, the tiny loop's score caches."""
    restore(quick.folder, WATCHED, quick.folder, {})
    for cache in (loop / LOOP).glob("*.scores.jsonl"):
        shutil.copy(cache, quick.folder / LOOP)
    (quick.folder / "localdata/recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    quick.write(FEW, quick.read("localdata/tiny/test.json")[:20])
    return quick


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.xdist_group(f"crash states, {n}")) for n in STAGES])
def test_every_state_of_a_stage_ends_in_its_outputs(world, name, tmp_path):
    """Every file is the undisturbed run's, weights included; no journal, lock or temporary file is left over; what was
    finished is not done again."""
    if name == "rewarding":  # else there is nothing to compute
        restore(world.folder, [f"{LOOP}/*.scores.jsonl"], world.folder, {})
    found = record(world, name, tmp_path / "first")
    made, last = contents(world.folder, *WATCHED), raw(world.folder)
    if name != "iterate":
        found += new_names(found, resumed(world, name, found, tmp_path))
    else:  # its stages are tested each: a state for each file that gets its name, of a checkpoint only one
        whole = [each for each in found if not each[1].endswith(" torn")]
        found = [*{frozenset(n for n in _names(each[2]) if not TEMPORARY.search(n)): each for each in whole}.values()]
    with world.stages.together():
        wrong = [f"{each[1]}: {fault}" for each in found for fault in faults(world, name, each, made, last)]
    torn = sum(event.endswith(" torn") for _, event, _ in found)
    print(f"{name}: {len(found)} states, {torn} of them torn; {len(wrong)} things wrong")
    assert not wrong, "\n".join(wrong)
    assert len(found) - torn > 8 and (torn > 4 or name in ("iterate", "consistency", "pairs", "rescore", "measuring"))


def faults(world, name, found, made, last):
    """What is wrong after the stage is resumed from a state."""
    store, _, state = found
    restore(world.folder, WATCHED, store, state)
    finished = name != "iterate" and raw(world.folder).items() >= last.items()
    there = unfinished(world.folder)
    done = world.stages.run(world.folder, world.argv(STAGES[name]))
    if done.code:
        yield f"it ended with {done.code}: {done.err}"
        return
    for path, how in differences(made, contents(world.folder, *WATCHED)):
        yield f"{path} {how}"
    if "is up to date" not in done.out:
        if finished:
            yield "it was finished, and was done again"
        if (kept := kept_by(done.out)) != there:
            yield f"{kept} of {there} (records in journals, steps in a state) were kept"


@pytest.mark.parametrize("name, other", [("sft", "--weight_decay 1"), ("dpo", "--beta 2"), ("sampling", "--seed 1")])
def test_an_interrupted_run_refuses_other_settings(world, name, other, tmp_path):
    """In the last of its states in which something is left to do, and something finished."""
    states = [state for _, event, state in record(world, name, tmp_path / "first") if not event.endswith(" torn")]
    while not sum(unfinished(world.folder)) or [*(world.folder / OUT).glob("*samples.json")]:
        restore(world.folder, WATCHED, tmp_path / "first", states.pop())
    assert "found an interrupted run" in world.refused(f"{STAGES[name]} {other}")


def record(world, name, store):
    """Run a stage; (store, event, state) of each of its states."""
    done = world.stages.record(world.folder, world.argv(STAGES[name]), WATCHED, store)
    assert done.code == 0, done.err
    return [(store, event, state) for event, state in states(store)]


def resumed(world, name, found, folder):
    """The same of two runs that resume, from a third of the states of another one, and from two thirds."""
    again = []
    for third in (1, 2):
        store, _, state = found[third * len(found) // 3]
        restore(world.folder, WATCHED, store, state)
        again += record(world, name, folder / f"again {third}")
    return again


def new_names(known, found):
    """Those states in which other files are there than in any before, without what a checkpoint has in it."""
    seen = {_names(state) for _, _, state in known}
    return [each for each in found if not ((names := _names(each[2])) in seen or seen.add(names))]


def _names(state):
    return frozenset(name for name in state if "/checkpoint-" not in name.replace("checkpoint-last", ""))


def unfinished(folder):
    """(records in journals, steps in the saved states of training runs) that the command need not do again."""
    runs = [args.parent for args in (folder / OUT).rglob("args.json")]
    return recorded(folder / OUT), sum(saved_step(run) for run in runs if not (run / "meta.json").exists())


def raw(folder):
    """The bytes of every file that is watched, by path."""
    paths = [path for name in WATCHED for top in folder.glob(name) for path in (top, *top.rglob("*"))]
    return {path: path.read_bytes() for path in paths if path.is_file()}


def kept_by(said):
    """The same, as a command says it."""
    records, steps = (
        re.findall(r"^resuming: (\d+) of ", said, re.M),
        re.findall(r"^resuming after step (\d+)", said, re.M),
    )
    return sum(map(int, records)), sum(map(int, steps))


def differences(made, now):
    """Lines of a score cache may be lost with the power, and computed again beside others that were not."""
    for path in sorted({*made, *now}):
        if path.endswith(".scores.jsonl") and {*now.get(path, ())} <= {*made.get(path, ())}:
            continue
        if made.get(path) != now.get(path):
            yield path, "is left over" if path not in made else "is missing" if path not in now else "differs"
