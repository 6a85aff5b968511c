"""The loop from a recipe: what is shipped binds to its scripts' flags, and a small one runs to its table, once."""

import json
import re
import shlex
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import pytest
import yaml
from safetensors.torch import load_file

import iterate
from config import SCRIPTS
from cream.cli.flags import as_dict, parse
from cream.errors import UserError
from cream.loops.recipes import Recipe, plan, read_recipe, results

RECIPES = sorted((Path(__file__).parents[1] / "configs/recipes").glob("*.yaml"))
SMALL = {
    "title": "small",
    "model": "tiny",
    "iterations": 2,
    "prompts": ["tiny_prompt_1", "tiny_prompt_2"],
    "base_dir": "outputs/base",
    "output_dir": "outputs/cream",
    "sft": {"name": "tiny_sft", "limit_size": 16, "lr": 2e-4, "train_bsz": 8},
    "sampling": {"limit_size": 12, "gen_n": 4, "gen_temperature": 1.0, "gen_max_tokens": 48},
    "consistency": {"method": "consistency_dyn"},
    "dpo": {"lr": 3e-4, "train_bsz": 4, "beta": 1.0},
    "evaluation": {"name": "tiny_test", "limit_size": 30, "gen_max_tokens": 48},
}
PLAIN = SMALL | {"title": "plain", "output_dir": "outputs/plain", "consistency": {"method": "original"}}


def stages(out):
    """The command lines that iterate.py printed."""
    return [line.removeprefix("$ ") for line in out.splitlines() if line.startswith("$ ")]


def write(world, name, recipe):
    (world.folder / name).write_text(yaml.safe_dump(recipe))
    return f"iterate.py --device cpu --config {name}"


# Recipes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_bind_to_their_scripts(path):
    """Every flag exists, takes its value, and arrives as the recipe has it."""
    recipe = read_recipe(path)
    commands = plan(recipe, "cpu")
    assert len(commands) == 3 + 6 * recipe.iterations
    for command in commands:
        values = as_dict(parse(SCRIPTS[command.script], command.argv(), description="", example=""))
        for name, value in command.flags.items():
            assert values[name] == (str(value) if isinstance(value, Path) else value)


def test_the_fixed_recipe_is_plain_self_rewarding_but_for_its_constant():
    fixed, plain = (plan(read_recipe(path), "cpu") for path in RECIPES if path.stem in ("tiny_fixed", "tiny_srlm"))
    for one, other in zip(fixed, plain, strict=True):
        flags = {name: str(value).replace("tiny/srlm", "tiny/fixed") for name, value in other.flags.items()}
        only = {"fixed_consistency": "0.8"} if flags.get("train_stage") == "dpo" else {}
        assert {name: str(value) for name, value in one.flags.items()} == flags | only


def test_the_loop_s_flags_reach_the_stages_that_have_them():
    recipe = Recipe(**SMALL | {"seed": 5, "sft": SMALL["sft"] | {"bf16": True}})
    wanted = {"train.py": {"seed": 5, "bf16": False}, "infer.py": {"seed": 5, "bf16": False}}
    wanted |= {"rewarding.py": {"bf16": False}, "cal_consistency.py": {}}
    for command in plan(recipe, "cpu", bf16=False):  # the command line wins over the recipe
        assert {name: command.flags[name] for name in ("seed", "bf16") if name in command.flags} == wanted[
            command.script
        ]
    assert [c.title for c in plan(recipe, "cpu") if "bf16" in c.flags] == ["train M1"]


def test_every_stage_reads_what_an_earlier_one_made():
    made = set()
    for command in plan(Recipe(**SMALL), "cpu"):
        flags = command.flags
        paths = [flags.get(name) for name in ("checkpoint", "ref_model_ckpt", "input_file", "file1", "file2", "name")]
        for path in map(str, filter(None, paths)):
            assert path.startswith("tiny_") or path.removesuffix("/checkpoint-last") in made, command.title
        made.add(str(command.output))


def test_rounds_rank_by_the_models_of_the_paper():
    """Current ranking: M_t against M0. Previous: M0's likelihood, later M_{t-1} against M0. DPO starts from M_t."""
    by_title = {command.title: command.flags for command in plan(Recipe(**SMALL), "cpu")}
    m1, m2 = "outputs/base/M1/checkpoint-last", "outputs/cream/M2/checkpoint-last"
    expected = {
        "round 1: rank by M1": ("dpo", m1),
        "round 1: rank by M0": ("likelihood", "None"),
        "round 2: rank by M2": ("dpo", m2),
        "round 2: rank by M1": ("dpo", m1),
    }
    for title, (reward, policy) in expected.items():
        flags = by_title[title]
        assert (flags["reward"], str(flags["checkpoint"]), flags.get("ref_model_ckpt")) == (reward, policy, None)
    assert [str(by_title[f"train {m}"].get("checkpoint")) for m in ("M1", "M2", "M3")] == ["None", m1, m2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"iterations": 3}, "3 iterations need as many prompt sets"),
        ({"iteration": 2}, "unknown field `iteration`"),
        ({"model": 7}, "Expected `str`"),
        ({"sft": {"lr": [1e-4, 2e-4]}}, "got `array` - at `$.sft"),
        ({"dpo": {1: 2}}, "at `key` in `$.dpo`"),
    ],
)
def test_wrong_recipes_are_refused(tmp_path, change, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(SMALL | change))
    with pytest.raises(UserError, match="recipe.yaml") as caught:
        read_recipe(path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"title: \xff", "not valid YAML"),
        (b"title: [", "not valid YAML"),
        (b"title: 2020-13-01", "not valid YAML: month"),
        (b"title: a\nseed: 1\ntitle: b", "not valid YAML: 'title' is given twice"),
        (b"sft:\n  lr: 1\n  lr: 2", "not valid YAML: 'lr' is given twice"),
        (b"[" * 5000, "not valid YAML: maximum recursion"),
        (b"", "Expected `object`, got `null`"),
        (None, "no such file"),
    ],
)
def test_unreadable_recipes_are_refused(tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="recipe.yaml: ") as caught:
        read_recipe(path)
    assert message in str(caught.value)


def refused(capsys, argv):
    """What stands on stderr when the loop ends with exit code 2 before its first stage."""
    with pytest.raises(SystemExit) as stop:
        iterate.main(["--device", "cpu", *argv])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and "Traceback" not in err
    return err


def test_every_flag_is_checked_before_the_first_stage(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong = {"sft": {"lrr": 1e-4, "epoch": 0}, "consistency": {"seed": 3}, "evaluation": {"gen_max_tokens": 0}}
    for name, change in {"right": {}, "one": wrong, "two": {"dpo": {"beta": 0}}}.items():
        Path(f"{name}.yaml").write_text(yaml.safe_dump(SMALL | change))
    accuracies = ", ".join(f"accuracy of M{t}" for t in range(4))
    pairs = "round 1: consistency and pairs, round 2: consistency and pairs"
    first, *problems = refused(capsys, ["--config", "right.yaml,one.yaml, two.yaml"]).splitlines()
    assert first == "error: nothing was started:"
    assert sorted(problems) == [
        f"one.yaml: {accuracies} (infer.py): --gen_max_tokens: '0' is not a whole number at least 1",
        f"one.yaml: {pairs} (cal_consistency.py): --seed: unknown flag; did you mean --method, --register, --help?",
        "one.yaml: train M1 (train.py): --epoch: '0' is not a whole number at least 1",
        "one.yaml: train M1 (train.py): --lrr: unknown flag; did you mean --lr, --lora_r, --lora?",
        "two.yaml: train M2, train M3 (train.py): --beta: '0' is not a number above 0",
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"one.yaml", "two.yaml", "right.yaml"}


def test_what_config_cannot_name(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(yaml.safe_dump(SMALL))
    assert "is a folder where a file is expected" in refused(capsys, ["--config", str(tmp_path)])
    for value in ("small.yaml,", ",small.yaml", "small.yaml,,small.yaml"):
        assert "no name stands before or after a comma" in refused(capsys, ["--config", value])
    assert "--config is missing" in refused(capsys, [])
    assert "--seed: '-1' is not a whole number in [0, " in refused(capsys, ["--config", "small.yaml", "--seed", "-1"])


DAMAGED = [
    ("M1.evaluation.summary.json", value)
    for value in ([], {}, {"tasks": 7}, {"tasks": []}, {"tasks": [{"task": "x"}]}, {"tasks": [{"accuracy": None}]})
]
DAMAGED += [
    ("round1.pairs.json.meta.json", value)
    for value in ([], {}, {"counts": {}, "mean_consistency": 1}, {"counts": {"out": 1}}, {"counts": 7})
]


@pytest.mark.parametrize(("name", "value"), DAMAGED)
def test_results_of_damaged_files_are_refused(tmp_path, name, value):
    good = {f"M{t}.evaluation.summary.json": {"tasks": [{"task": "x", "accuracy": 0.1 * t}]} for t in range(3)}
    good["round1.pairs.json.meta.json"] = {"counts": {"out": 7}, "mean_consistency": None}
    for file, content in good.items():
        (tmp_path / file).write_text(json.dumps(content))
    recipe = Recipe(**SMALL | {"iterations": 1, "base_dir": str(tmp_path), "output_dir": str(tmp_path)})
    last = {"model": "M2", "accuracy": 0.2, "tasks": {"x": 0.2}, "pairs": 7, "consistency": None}
    assert results(recipe)[-1] == last
    (tmp_path / name).write_text(json.dumps(value))
    with pytest.raises(UserError, match=f"{name}: damaged"):
        results(recipe)


# The loop -----------------------------------------------------------------------------------------------------------


def macro_accuracy(world, path):
    """The mean over tasks of the share of correct answers, in percent, from the answers themselves."""
    tasks = defaultdict(list)
    for answer in world.read(path).values():
        tasks[answer["task"]].append(answer["correct"])
    return 100 * fmean(map(fmean, tasks.values()))


def check_table(world, out):
    """Its rows are the accuracies of M0 to M3, once per recipe, and the mean c of the pairs each was trained on."""
    table = [line.split() for line in out.splitlines() if line[:2] in ("M0", "M1", "M2", "M3")]
    assert [row[0] for row in table] == ["M0", "M1", "M2", "M3"]
    for t, (_, *cells) in enumerate(table):
        expected = []
        for own in ("cream", "plain"):
            root = "outputs/base" if t < 2 else f"outputs/{own}"
            expected.append(f"{macro_accuracy(world, f'{root}/M{t}.evaluation.json'):.1f}")
            if t >= 2:
                pairs = world.read(f"{root}/round{t - 1}.pairs.json").values()
                expected.append(f"{fmean(pair['consistency'] for pair in pairs):.2f}")
        assert cells == expected


@pytest.mark.slow
def test_the_loop(workspace):
    """Two recipes of a family: they share M0, M1 and round 1's measurements, and end in one table.

    All stages ran in one process; run one by one, each in its own, the same commands give the same weights and answers.
    Run again, the loop passes over everything.
    """
    write(workspace, "plain.yaml", PLAIN)
    loop = write(workspace, "small.yaml", SMALL) + ",plain.yaml"
    before = workspace.state()
    printed = stages(workspace.run(loop + " --dry_run").out)
    assert len(printed) == 30 and workspace.state() == before
    first = workspace.run(loop)
    assert stages(first.out) == printed
    shared = re.findall("stands already|is up to date", first.out)
    assert len(shared) == 6  # of the second recipe: M0, M1 and its training, round 1's rankings
    check_table(workspace, first.out)
    for made in (
        "base/M1/meta.json",
        "base/round1.rewards.previous.json.meta.json",
        "cream/round1.pairs.json.meta.json",
    ):
        command = workspace.read(f"outputs/{made}")["command"]  # not the loop's own
        assert ["python", *command] in map(shlex.split, printed)

    before = workspace.state()
    again = workspace.run(loop)
    assert len(re.findall("stands already|is up to date", again.out)) == 30 and workspace.state() == before
    check_table(workspace, again.out)

    for command in stages(workspace.run(loop + " --dry_run --output_root alone").out)[:15]:
        workspace.run(command)
    for model in ("outputs/base/M1", "outputs/cream/M2", "outputs/cream/M3"):
        one, other = (
            load_file(workspace.folder / root / model / "checkpoint-last/model.safetensors") for root in (".", "alone")
        )
        assert one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)
        answers = f"{model}.evaluation.json"
        assert workspace.read(answers) == workspace.read(f"alone/{answers}")


@pytest.mark.slow
def test_stages_of_big_models_are_processes(workspace):
    """Beyond IN_PROCESS each stage is started; one that fails ends the loop with its exit code."""
    recipe = SMALL | {"base_dir": "outputs/other", "sft": SMALL["sft"] | {"name": "tiny_sftt"}}
    argv = shlex.split(write(workspace, "broken.yaml", recipe))[1:]
    code = f"import iterate; iterate.IN_PROCESS = 0; iterate.main({argv})"
    process = workspace.start(f"-c {shlex.quote(code)}")
    out, _ = process.communicate()
    assert process.returncode == 2
    assert (workspace.folder / "outputs/other/M0.evaluation.json").exists()
    assert "did you mean tiny_sft" in out and "train M1 ended with 2" in out and "rank by M1" not in out
