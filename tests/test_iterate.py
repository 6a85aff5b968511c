"""Loops and recipes: what is shipped binds to its scripts' flags, mistakes are listed before anything runs, and small
ones run to their table, once."""

import json
import os
import re
import shlex
from collections import defaultdict
from html import escape
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

import pytest
import yaml
from headless import WIDTHS, barriers, draw_all, expect, launched, new_tab
from safetensors.torch import load_file

import iterate
from cream.cli import names
from cream.cli.flags import as_dict, parse
from cream.errors import UserError
from cream.loops import plan as planning
from cream.loops.reading import read_loop
from cream.loops.results import _pairs_of, results, table

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES, LOOPS = (sorted((CONFIGS / kind).glob("*.yaml")) for kind in ("recipes", "loops"))
CREAM = ("cream", "tiny_cream", "tiny_cream_dyn", "tiny_fixed", "tiny_oracle", "tiny_shuffled", "tiny_srlm")
OF_CREAM = [path for path in LOOPS if path.stem in CREAM]  # the others are of other methods
SCRIPTS = {script: iterate.config_of(script) for script in iterate.SCRIPTS if (CONFIGS.parent / script).exists()}
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
OWN_POLICY = {"first": "none", "then": "${tuned@-1}"}  # the same rewards and trains: M0, later the round before's
LOOP = {  # two samplings a round, ranked by likelihood, the pairs of both in turn; one evaluation at the end
    "title": "own",
    "model": "tiny",
    "output_dir": "outputs/own",
    "rounds": 2,
    "before": [{"id": "m1", "script": "train.py", "flags": SMALL["sft"]}],
    "start": {"tuned": "${m1}"},
    "repeat": [
        {
            "id": "samples",
            "script": "infer.py",
            "flags": {"checkpoint": "${tuned@-1}", "name": ["tiny_prompt_1", "tiny_prompt_2"], **SMALL["sampling"]},
        },
        {
            "id": "more",
            "script": "infer.py",
            "output": "more${round}.jsonl",
            "flags": {"checkpoint": "${m1}", "name": "tiny_prompt_3", "seed": [7, 8], **SMALL["sampling"]},
        },
        {
            "id": "rewards",
            "script": "rewarding.py",
            "flags": {
                "input_file": ["${more}", "${samples}"],
                "reward": "likelihood",
                "checkpoint": OWN_POLICY,
            },
        },
        {"id": "pairs", "script": "cal_consistency.py", "flags": {"file1": "${rewards}"}},
        {
            "id": "tuned",
            "script": "train.py",
            "flags": {"checkpoint": OWN_POLICY, "name": "${pairs}", "lr": [3e-4, 2e-4], "train_bsz": 4},
        },
    ],
    "after": [
        {
            "id": "test",
            "script": "infer.py",
            "flags": {"mode": "evaluation", "checkpoint": "${tuned}", **SMALL["evaluation"]},
        }
    ],
}


def plan(config, *args, **kwargs):
    """The commands of a loop or recipe, given as a file or as what a file holds; without problems."""
    commands, problems = planning.plan(load(config), SCRIPTS, *(args or ["cpu"]), **kwargs)
    assert problems == []
    return commands


def load(config):
    if isinstance(config, Path):
        return read_loop(config)
    with TemporaryDirectory() as folder:
        path = Path(folder, "x.yaml")
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        return read_loop(path)


def stages(out):
    """The command lines that iterate.py printed, in a dry run or with --verbose, or that begin a log file."""
    return [line.removeprefix("$ ") for line in out.splitlines() if line.startswith("$ ")]


def titles(out):
    """The stages that iterate.py ran, each with what came of it in the next line."""
    return re.findall(r"^\[\w+ \d+/\d+\] .*\n    .*$", out, re.MULTILINE)


def write(world, name, recipe):
    (world.folder / name).write_text(yaml.safe_dump(recipe))
    return f"iterate.py --device cpu --config {name}"


# Recipes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*RECIPES, *LOOPS], ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_files_bind_to_their_scripts(path):
    """Every flag exists, takes its value, and arrives as the file has it."""
    loop, commands = read_loop(path), plan(path)
    if path in RECIPES or path in OF_CREAM:
        evaluations = sum(command.title.startswith("accuracy of M0") for command in commands)
        assert evaluations >= 1 and len(commands) == 1 + 2 * evaluations + (5 + evaluations) * loop.rounds
    for command in commands:
        words = [] if command.words else None
        values = as_dict(parse(SCRIPTS[command.script], command.argv(), description="", example="", words=words))
        assert tuple(words or ()) == command.words
        for name, value in command.flags.items():
            number = int(value) if isinstance(values[name], int) else value  # ${seed+round}, ${round} are texts
            assert values[name] == (None if value == "none" else number)


def test_shipped_loops_are_the_shipped_recipes():
    """The same commands with the same outputs, word for word, of every loop."""
    recipes = {path.name.replace("llama3_", ""): path for path in RECIPES}
    recipes = {name: path for name, path in recipes.items() if not name.startswith(("llama2", "smollm2"))}
    loops = {path.name: path for path in OF_CREAM}
    assert loops.keys() == recipes.keys()
    for name in loops:
        assert plan(loops[name]) == plan(recipes[name])
        assert read_loop(loops[name]).title == read_loop(recipes[name]).title


@pytest.mark.slow
def test_a_twin_is_its_loop_with_other_settings():
    """The same steps in each round, which read the same outputs; after what makes M1. Nothing that the twin reads is
    missing."""
    twins = [path for path in LOOPS if path.stem.startswith("tiny_")]
    methods = {path.stem for path in LOOPS} - {path.stem for path in twins}
    assert {f"tiny_{method}" for method in methods} <= {path.stem for path in twins}
    for method in methods:
        steps = [read_loop(CONFIGS / f"loops/{name}.yaml").repeat for name in (method, f"tiny_{method}")]
        assert steps[0] == steps[1]
    for path in twins:
        assert iterate.prepare(read_loop(path), ["cpu"], None, set())[1] == []


@pytest.mark.slow
def test_shipped_files_can_be_run_beside_each_other():
    """What two of them make at one path is the same, and lies in no training run of a third."""
    made = {}
    for path in [*RECIPES, *LOOPS]:
        for command in plan(path):
            flags = {name: str(value) for name, value in command.flags.items()}
            assert made.setdefault(command.output, (command.script, flags)) == (command.script, flags), path
    runs = {output for output, (script, _) in made.items() if script == "train.py"}
    assert [output for output in made if runs & {*output.parents}] == []


def test_the_page_on_loops_lists_them_all():
    page = (CONFIGS.parent / "docs/loops.md").read_text()
    assert [path.name for path in LOOPS if f"`{path.name}`" not in page and path.stem not in CREAM] == []


def test_spin_uses_the_samples_of_the_last_two_rounds():
    """A model trains from the one that sampled last, with a beta and rate of its round."""
    by_title = {command.title: command.flags for command in plan(CONFIGS / "loops/spin.yaml")}
    samples = [f"outputs/zephyr/spin/round{t}.samples.json" for t in range(1, 5)]
    models = ["none", *(f"outputs/zephyr/spin/M{t}/checkpoint-last" for t in range(2, 5))]
    for t, start in enumerate(models, 1):
        sampled, paired, trained = (
            by_title[title]
            for title in (f"round {t}: sample from M{t}", f"round {t}: data against samples", f"train M{t + 1}")
        )
        assert sampled["checkpoint"] == trained["checkpoint"] == start and sampled["seed"] == str(t)
        assert paired["samples"] == ",".join(samples[max(0, t - 2) : t]) and paired["strategy"] == "spin"
        assert (trained["lr"], trained["beta"]) == ((5e-7, 0.1), (5e-7, 0.1), (1e-7, 0.1), (1e-7, 5.0))[t - 1]


@pytest.mark.parametrize("path", LOOPS, ids=lambda path: path.stem)
def test_what_draws_of_the_same_prompts_draws_apart(path):
    """Two judges of the same samples, say, or two sets of new prompts after the same seeds, by any seed."""
    for seed in (0, 1):
        steps = [command.flags for command in planning.plan(read_loop(path, seed), SCRIPTS, "cpu")[0]]
        judged = [flags for flags in steps if flags.get("reward") == "judge" and not flags.get("judge_mode")]
        written = [flags for flags in steps if flags.get("mode") in ("instructions", "sampling")]
        draws = [(flags["input_file"], int(flags.get("seed", 0))) for flags in judged]
        draws += [(flags["mode"], flags["name"], flags.get("sysprompt"), int(flags["seed"])) for flags in written]
        assert len({*draws}) == len(draws)


def test_no_stage_of_the_real_model_s_recipes_grows_with_the_data():
    """Built from the hub, the data have a hundred times as many conversations and questions as a sample of them."""
    for path in (path for path in RECIPES if path.stem.startswith("smollm2")):
        flags = [each.flags for each in plan(path) if str(each.flags.get("name", "")).startswith("localdata/")]
        assert len(flags) == 1 + 2 + 2 * 4  # SFT, a sampling a round, two evaluations of each model
        assert all(each.get("limit_size") or each.get("limit_per_task") for each in flags)


def test_the_fixed_recipe_is_plain_self_rewarding_but_for_its_constant():
    fixed, plain = (plan(path) for path in RECIPES if path.stem in ("tiny_fixed", "tiny_srlm"))
    for one, other in zip(fixed, plain, strict=True):
        flags = {name: str(value).replace("tiny/srlm", "tiny/fixed") for name, value in other.flags.items()}
        only = {"fixed_consistency": "0.8"} if flags.get("train_stage") == "dpo" else {}
        assert {name: str(value) for name, value in one.flags.items()} == flags | only


def test_the_loop_s_flags_reach_the_stages_that_have_them():
    recipe = SMALL | {"seed": 5, "sft": SMALL["sft"] | {"bf16": True}}
    wanted = {"train.py": {"seed": 5, "bf16": False}, "infer.py": {"seed": 5, "bf16": False}}
    wanted |= {"rewarding.py": {"bf16": False}, "cal_consistency.py": {}}
    for command in plan(recipe, "cpu", bf16=False):  # the command line wins over the recipe
        assert {name: command.flags[name] for name in ("seed", "bf16") if name in command.flags} == wanted[
            command.script
        ]
    assert [c.title for c in plan(recipe) if "bf16" in c.flags] == ["train M1"]
    devices = {command.script: command.flags.get("device") for command in plan(recipe, "cpu,cpu", "cpu")}
    assert devices == {"train.py": "cpu,cpu", "infer.py": "cpu", "rewarding.py": "cpu", "cal_consistency.py": None}


def test_every_stage_reads_what_an_earlier_one_made():
    made = set()
    for command in plan(SMALL):
        flags = command.flags
        paths = [flags.get(name) for name in ("checkpoint", "ref_model_ckpt", "input_file", "file1", "file2", "name")]
        for path in map(str, filter(None, paths)):
            assert path.startswith("tiny_") or path == "none" or path.removesuffix("/checkpoint-last") in made
        made.add(str(command.output))


def test_rounds_rank_by_the_models_of_the_paper():
    """Current ranking: M_t against M0. Previous: M0's likelihood, later M_{t-1} against M0. DPO starts from M_t."""
    by_title = {command.title: command.flags for command in plan(SMALL | {"iterations": 3, "prompts": ["a", "b", "c"]})}
    m1, m2, m3 = (f"outputs/{root}/checkpoint-last" for root in ("base/M1", "cream/M2", "cream/M3"))
    expected = {
        "round 1: rank by M1": ("dpo", m1, "none"),
        "round 1: rank by M0": ("likelihood", "none", None),
        "round 2: rank by M2": ("dpo", m2, "none"),
        "round 2: rank by M1": ("dpo", m1, "none"),
        "round 3: rank by M3": ("dpo", m3, "none"),
        "round 3: rank by M2": ("dpo", m2, "none"),
    }
    for title, told in expected.items():
        flags = by_title[title]
        assert (flags["reward"], flags["checkpoint"], flags.get("ref_model_ckpt")) == told
    assert [by_title[f"train M{t}"].get("checkpoint") for t in range(1, 5)] == [None, m1, m2, m3]
    assert [by_title[f"round {t}: sample from M{t}"]["name"] for t in (1, 2, 3)] == ["a", "b", "c"]


def test_recipes_of_a_family_share_what_does_not_depend_on_the_pairs():
    outputs = [str(command.output.relative_to("outputs")) for command in plan(SMALL)]
    assert outputs == [
        *("base/M0.evaluation.json", "base/M1", "base/M1.evaluation.json"),
        *("base/round1.samples.json", "base/round1.rewards.current.json", "base/round1.rewards.previous.json"),
        *("cream/round1.pairs.json", "cream/M2", "cream/M2.evaluation.json"),
        *("cream/round2.samples.json", "cream/round2.rewards.current.json", "cream/round2.rewards.previous.json"),
        *("cream/round2.pairs.json", "cream/M3", "cream/M3.evaluation.json"),
    ]


def test_recipes_have_values_per_round():
    commands = {command.title: command.flags for command in plan(SMALL | {"dpo": {"lr": [2e-4, 1e-4], "beta": 1.0}})}
    assert [commands[f"train M{t}"]["lr"] for t in (2, 3)] == [2e-4, 1e-4]


def test_a_recipe_starts_from_a_checkpoint():
    """`start` is M1 wherever M1 is read, and nothing trains it; without `evaluation` nothing is evaluated."""
    own = {key: value for key, value in SMALL.items() if key not in ("sft", "evaluation")} | {"start": "my_m1"}
    trained = {command.title: command.flags for command in plan(SMALL)}
    started = {command.title: command.flags for command in plan(own | {"evaluation": SMALL["evaluation"]})}
    m1 = "outputs/base/M1/checkpoint-last"
    assert started == {
        title: {name: "my_m1" if value == m1 else value for name, value in flags.items()}
        for title, flags in trained.items()
        if title != "train M1"
    }
    assert m1 in [flags.get("checkpoint") for flags in trained.values()]
    assert [command.title for command in plan(own)] == [title for title in started if "accuracy" not in title]


def test_a_recipe_has_several_evaluations():
    """Of every model, each with its flags and a name of its own; also where M1 is given."""
    kinds = {"choice": {"name": "a.json", "scoring": "loglikelihood"}, "text": {"name": "b.json", "gen_max_tokens": 9}}
    commands = plan(SMALL | {"evaluation": kinds})
    evaluated = [command for command in commands if command.flags.get("mode") == "evaluation"]
    assert [each.title for each in evaluated] == [f"accuracy of M{t} ({kind})" for t in range(4) for kind in kinds]
    assert [command.output.name for command in evaluated] == [
        f"M{t}.{kind}.evaluation.json" for t in range(4) for kind in kinds
    ]
    for i, command in enumerate(evaluated):
        assert command.flags.items() >= kinds[("choice", "text")[i % 2]].items()
    others = {command.title: command.flags for command in plan(SMALL) if "accuracy" not in command.title}
    assert {c.title: c.flags for c in commands if c not in evaluated} == others
    given = {key: value for key, value in SMALL.items() if key != "sft"} | {"start": "m", "evaluation": kinds}
    assert [c.flags["checkpoint"] for c in plan(given) if c.title.startswith("accuracy of M1")] == ["m", "m"]


def test_pairs_are_made_with_the_beta_of_their_training():
    """For the cap that they print; of every round, and unless the loop says otherwise."""
    for recipe, betas in (
        (SMALL, [1.0, 1.0]),
        (SMALL | {"dpo": {"beta": [0.5, 0.25]}}, [0.5, 0.25]),
        (SMALL | {"consistency": {"beta": 2.0}}, [2.0, 2.0]),
        (SMALL | {"dpo": {}}, [None, None]),
    ):
        assert [c.flags.get("beta") for c in plan(recipe) if c.script == "cal_consistency.py"] == betas
    for path in (path for path in (*RECIPES, *OF_CREAM) if "tiny" in path.stem):
        assert {c.flags["beta"] for c in plan(path) if c.script == "cal_consistency.py"} == {1.0}
    assert {c.flags["beta"] for c in plan(CONFIGS / "loops/cream.yaml") if c.script == "cal_consistency.py"} == {0.1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"iterations": 3}, "3 iterations need as many prompt sets"),
        ({"iteration": 2}, "unknown key `iteration`; did you mean iterations"),
        ({"model": 7}, "Expected `str`"),
        ({"sft": {"epoch": 2, "lr": [1e-4, 2e-4]}}, "got `array` - at `$.sft.lr`"),
        ({"dpo": {"beta": 1.0, "lr": {"first": 1}}}, "missing required key `then` - at `$.dpo.lr`"),
        ({"dpo": {1: 2}}, "at `key` in `$.dpo`"),
        ({"sft": None}, "M1 needs one of `sft` (the flags of its training, such as {name: tiny_sft, epoch: 2}) and"),
        ({"start": "m1"}, "(a checkpoint that is M1 already); found both"),
        ({"sft": None, "start": "none"}, "`start` is none, so that M1 would be M0"),
        ({"evaluation": {"name": "x", "choice": {}}}, "a map of flags for each of several evaluations; found both"),
        ({"evaluation": {"": {"name": "x"}}}, "`evaluation` has an empty name"),
        ({"evaluation": {"choice": {"name": ["x"]}}}, "got `array` - at `$.evaluation.choice"),
    ],
)
def test_wrong_recipes_are_refused(tmp_path, change, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(SMALL | change))
    with pytest.raises(UserError, match="recipe.yaml") as caught:
        read_loop(path)
    assert message in str(caught.value)


def test_all_mistakes_of_a_recipe_are_listed(tmp_path):
    path, change = tmp_path / "recipe.yaml", {"dpoo": {}, "seed": "one", "keep": {"metrics": "x"}, "zzz": 1, "dpo": [1]}
    path.write_text(yaml.safe_dump(SMALL | change))
    with pytest.raises(UserError) as caught:
        read_loop(path)
    said = [line.removeprefix(f"{path}: ") for line in str(caught.value).splitlines()]
    assert [line.partition(";")[0] for line in said] == [
        "unknown key `dpoo`",
        "unknown key `zzz`",
        "Expected `int`, got `str` - at `$.seed`",
        "Expected `object`, got `array` - at `$.dpo`",
        "unknown key `metrics` - at `$.keep`",
        "missing required key `metric` - at `$.keep`",
    ]
    assert said[0].startswith("unknown key `dpoo`; did you mean dpo") and "; known keys: title, model" in said[1]


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
        read_loop(path)
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
        f"one.yaml: {accuracies} (infer.py): --name is missing: the data that the step reads",
        f"one.yaml: {pairs} (cal_consistency.py): --seed: unknown flag",
        "one.yaml: train M1 (train.py): --epoch: '0' is not a whole number at least 1",
        "one.yaml: train M1 (train.py): --lrr: unknown flag; did you mean --lr, --lora_r, --lora?",
        "one.yaml: train M1 (train.py): --name is missing: the data that the step reads",
        "two.yaml: train M2, train M3 (train.py): --beta: '0' is not a number above 0",
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"one.yaml", "two.yaml", "right.yaml"}


TWICE = ["tiny_prompt_1", "localdata/tiny/prompt.1.json"]  # one file, by two names


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"sft": SMALL["sft"] | {"beta": 1.0}}, "train M1 (train.py): --train_stage sft: --beta belongs to "),
        (
            {"dpo": {"loss": "ipo"}},
            "train M2, train M3 (train.py): --loss ipo with --method consistency_dyn: this loss",
        ),
        ({"dpo": {"method": "original"}}, "(train.py): --method original: the pairs were made for consistency_dyn"),
        ({"dpo": {"simpo_gamma": 1.0}}, "(train.py): --simpo_gamma belongs to --loss simpo"),
        ({"consistency": {"method": "kendall", "rank": "toporder"}}, "--method kendall contradicts --rank toporder"),
        ({"rewarding": {"enable_ref_model": [False, True]}}, "--reward dpo contradicts --enable_ref_model no"),
        ({"evaluation": {"name": "tiny_test", "few_shot_file": "pyproject.toml"}}, "--few_shot K says how many"),
        (
            {"evaluation": {"name": "tiny_prompt_1"}},
            "prompt.1.json holds prompts; the step reads questions with labels",
        ),
        ({"prompts": ["tiny_prompt_1", "tiny_test"]}, "round 2: sample from M2 (infer.py): --name tiny_test: "),
        ({"prompts": ["tiny_prompt_1", "bad.json"]}, "round 2: sample from M2 (infer.py): bad.json: "),
        ({"prompts": ["tiny_prompt_1", "gsm8k_test"]}, "`python prepare_data.py build gsm8k` makes it"),
        ({"evaluation": {"name": "all_test"}}, "`python prepare_data.py build all` makes it"),
        ({"sft": {"name": "oasst_sft"}}, "`python prepare_data.py build oasst1` makes it"),
        ({"sft": None, "start": "folder"}, "folder: not a model folder, it has no config.json; did you mean folder/c"),
        ({"model": "someone/some-model"}, "--model someone/some-model: not on disk, and the hub cannot be reached"),
        ({"prompts": TWICE}, "round 1: sample from M1, round 2: sample from M2: the same prompts (tiny_prompt_1, "),
    ],
)
def test_what_a_later_stage_would_refuse(capsys, tmp_path, monkeypatch, change, problem):
    """Contradicting flags, missing and malformed data: before the first stage, and in the dry run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(names, "ROOT", tmp_path)  # its user may have built all data in the repository itself
    Path("localdata").mkdir()
    for folder in ("localdata/tiny", "assets"):
        Path(folder).symlink_to(CONFIGS.parent / folder)
    Path("pyproject.toml").touch()
    Path("bad.json").write_text('{"a": [{"role": "user", "content": "1 + 1?"}], "b": [{"role": "user"}]}')
    Path("folder/checkpoint-last").mkdir(parents=True)
    Path("own.yaml").write_text(yaml.safe_dump(SMALL | change))
    assert problem in refused(capsys, ["--config", "own.yaml", "--dry_run"])


def test_a_built_in_model_has_to_be_there_where_a_hub_can_be_asked_too(capsys, tmp_path, monkeypatch):
    """Its folder, assets/NAME, looks like a hub's id; a hub's own model is not looked for before its stage."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(names, "ROOT", tmp_path)
    for model, problem in (("SmolLM2", "assets/smollm2 is not there; `make real` makes it"), ("owner/name", None)):
        Path("own.yaml").write_text(yaml.safe_dump(SMALL | {"model": model}))
        listed = refused(capsys, ["--config", "own.yaml", "--dry_run"])  # the data are not there either
        assert (f"--model {model}" in listed) == bool(problem) and (problem or "") in listed


def test_prompts_are_reused_only_where_the_file_says_so(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = SMALL | {"prompts": ["tiny_prompt_1"] * 2}
    Path("one.yaml").write_text(yaml.safe_dump(one | {"reuse_prompts": True}))
    iterate.main(["--device", "cpu", "--config", "one.yaml", "--dry_run"])
    assert len(stages(capsys.readouterr().out)) == 15
    assert read_loop(CONFIGS / "loops/tiny_cream.yaml").fresh == ["samples"]
    (problem,) = planning.plan(load(one_step() | {"fresh": ["tset"]}), SCRIPTS, "cpu")[1]
    assert problem == "fresh: no step has the id tset; did you mean test?"


def test_what_config_cannot_name(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(yaml.safe_dump(SMALL))
    assert "expected a file, found a folder" in refused(capsys, ["--config", str(tmp_path)])
    for value in ("small.yaml,", ",small.yaml", "small.yaml,,small.yaml"):
        assert "expected FILE or FILE,FILE, for example" in refused(capsys, ["--config", value])
    assert "--config is missing" in refused(capsys, [])
    assert "--seed: '-1' is not a whole number in [0, " in refused(capsys, ["--config", "small.yaml", "--seed", "-1"])


# Loops --------------------------------------------------------------------------------------------------------------


def test_a_loop_s_references_and_values_per_round():
    """Written out by hand: what each step of LOOP reads, and where its output goes."""
    m1, tuned = "outputs/own/m1/checkpoint-last", "outputs/own/round{}.tuned/checkpoint-last"
    own = {"checkpoint", "name", "input_file", "file1", "seed", "lr", "output", "output_dir"}
    assert [(c.title, {name: c.flags[name] for name in sorted(own & c.flags.keys())}) for c in plan(LOOP)] == [
        ("m1", {"lr": 2e-4, "name": "tiny_sft", "output_dir": "outputs/own/m1", "seed": 0}),
        *(
            (f"round {t}: {name}", dict(sorted(flags.items())))
            for t, start, more, rewarded, lr in ((1, m1, 7, "more1.jsonl", 3e-4), (2, tuned.format(1), 8, None, 2e-4))
            for name, flags in {
                "samples": {
                    "checkpoint": start,
                    "name": f"tiny_prompt_{t}",
                    "output_dir": f"outputs/own/round{t}.samples.json",
                    "seed": 0,
                },
                "more": {
                    "checkpoint": m1,
                    "name": "tiny_prompt_3",
                    "output_dir": f"outputs/own/more{t}.jsonl",
                    "seed": more,
                },
                "rewards": {
                    "checkpoint": "none" if t == 1 else start,
                    "input_file": f"outputs/own/{rewarded or 'round2.samples.json'}",
                    "output": f"outputs/own/round{t}.rewards.json",
                },
                "pairs": {
                    "file1": f"outputs/own/round{t}.rewards.json",
                    "output": f"outputs/own/round{t}.pairs.json",
                },
                "tuned": {
                    "checkpoint": "none" if t == 1 else start,
                    "lr": lr,
                    "name": f"outputs/own/round{t}.pairs.json",
                    "output_dir": f"outputs/own/round{t}.tuned",
                    "seed": 0,
                },
            }.items()
        ),
        (
            "test",
            {
                "checkpoint": tuned.format(2),
                "name": "tiny_test",
                "output_dir": "outputs/own/test.json",
                "seed": 0,
            },
        ),
    ]


EVALUATE = {"id": "test", "script": "infer.py", "flags": {"mode": "evaluation", "name": "tiny_test"}}


def one_step(**change):
    """A loop that evaluates M0, with a step changed."""
    return {"title": "t", "model": "tiny", "output_dir": "outputs/t", "before": [EVALUATE | change]}


def test_a_loop_of_one_evaluation():
    (command,) = plan(one_step(flags={"mode": "evaluation", "name": "tiny_test", "seed": None, "checkpoint": "none"}))
    assert command.argv() == (
        "--model tiny --device cpu --mode evaluation --name tiny_test --checkpoint none "
        "--output_dir outputs/t/test.json"
    ).split(" ")


def test_a_step_of_prepare_data_has_its_command_and_files_before_its_flags():
    """And neither model nor device, which it has for another of its commands."""
    step = {"id": "eft", "script": "prepare_data.py", "words": ["eft", "${test}"], "flags": {"held_out": 0.5}}
    _, command = plan(one_step() | {"after": [step]})
    assert command.argv() == "eft outputs/t/test.json --held_out 0.5 --output outputs/t/eft.json".split(" ")


def changed(step, **flags):
    """LOOP with flags put over a step's."""
    return LOOP | {"flags": {step: flags}}


@pytest.mark.parametrize(
    ("loop", "problem"),
    [
        (one_step(script="train.sh"), "test: unknown script train.sh (known: train.py, infer.py, "),
        (one_step(id="a b"), "'a b' is not an id"),
        (one_step(id="round"), "'round' is not an id"),
        (one_step(output="../x"), "test: output: '../x.json' is not a file name"),
        (one_step(shared=True), "test: shared outputs lie in base_dir"),
        (one_step(shared={"first": True, "then": "no"}) | {"base_dir": "b"}, "test: shared: yes or no is expected"),
        (one_step() | {"before": []}, "no steps; "),
        (one_step() | {"before": [EVALUATE, EVALUATE]}, "two steps have the id test"),
        (one_step() | {"after": [EVALUATE | {"id": "b", "output": "test"}]}, "two outputs have the name test.json"),
        (changed("tuned", lr=[1e-4]), "tuned: --lr: 1 values for 2 rounds"),
        (changed("m1", lr=[1e-4, 1e-4]), "m1: --lr: has values per round, but the step is not in `repeat`"),
        (changed("m1", lr={"first": 1e-4, "then": 1e-5}), "m1: --lr: has values per round"),
        (changed("tuned", name="${pears}"), "tuned: --name: ${pears}: no step has the id pears; did you mean pairs, "),
        (changed("tuned", name="${pairs"), "tuned: --name: ${pairs is not a reference"),
        (changed("tuned", name="${pairs@last}"), "tuned: --name: ${pairs@last} is not a reference"),
        (changed("tuned", name="${pairs@-1}"), "${pairs@-1}: round 1 has no output 1 rounds before it; `start` gives"),
        (changed("tuned", checkpoint="${tuned@-2}"), "${tuned@-2}: round 1 has no output 2 rounds before it; give"),
        (changed("test", checkpoint="${tuned@-1}"), "${tuned@-1}: an earlier round exists only between steps of"),
        (changed("tuned", checkpoint="${m1@-1}"), "${m1@-1}: an earlier round exists only between steps of `repeat`"),
        (changed("m1", name="${test}"), "m1: --name: ${test}: that step runs later"),
        (changed("m1", name="${round}"), "m1: --name: ${round}: no step has the id round"),
        (changed("samples", name="${pairs}"), "wait for each other: samples -> rewards -> pairs -> samples"),
        (changed("pairs", file2="${pairs}"), "these steps wait for each other: pairs -> pairs"),
        (changed("pairs", output="x.json"), "pairs: --output follows from the id"),
        (changed("pear", beta=1), "flags: no step has the id pear"),
        (one_step(words=["eft", "x.json"]), "test: infer.py has flags only; `words` are for prepare_data.py"),
        (one_step(script="prepare_data.py", flags={}, words=["eft", "${tset}"]), "words: ${tset}: no step has the id"),
        (LOOP | {"start": {"m1": "none"}}, "start: no step of `repeat` has the id m1"),
        (LOOP | {"start": {"tuned": "${pairs}"}}, "${pairs}: that step runs later"),
    ],
)
def test_wrong_loops(loop, problem):
    _, problems = planning.plan(load(loop), SCRIPTS, "cpu")
    assert any(problem in told for told in problems), problems
    assert len(problems) == len(set(problems)) <= 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": 0}, "Expected `int` >= 1 - at `$.rounds`"),
        ({"round": 2}, "unknown key `round`; did you mean rounds"),
        ({"repeat": [EVALUATE | {"flag": {}}]}, "unknown key `flag` - at `$.repeat[0]`; did you mean flags?"),
        ({"repeat": [{"id": "x"}]}, "missing required key `script` - at `$.repeat[0]`"),
        ({"flags": {"test": {"lr": {"first": 1}}}}, "missing required key `then` - at `$.flags.test"),
        ({"flags": {"test": {"lr": [[1]]}}}, "at `$.flags"),
        ({"title": ""}, "'' is not a text"),
        ({"base_dir": "a\0b"}, "is not a text"),
        ({"extends": 7}, "extends: Expected `str`, got `int`"),
        ({"extends": "none.yaml"}, "none.yaml, which is not a file"),
        ({"extends": "loop.yaml"}, "which extends this file"),
    ],
)
def test_malformed_loops_are_refused(tmp_path, change, message):
    path = tmp_path / "loop.yaml"
    path.write_text(yaml.safe_dump(one_step() | change))
    with pytest.raises(UserError) as caught:
        read_loop(path)
    assert str(tmp_path) in str(caught.value) and message in str(caught.value)


def test_a_file_extends_another(tmp_path):
    """Keys replace keys, flags of a step go over its flags one by one, null removes one or all; over several files."""
    files = {
        "a": one_step() | {"flags": {"test": {"gen_n": 4, "top_p": 0.5, "limit_size": 9}}},
        "b": {"extends": "a.yaml", "title": "b", "flags": {"test": {"gen_n": 8, "name": "tiny_val"}}},
        "sub/c": {"extends": "../b.yaml", "output_dir": "outputs/c", "flags": {"test": {"top_p": None, "seed": 3}}},
        "bare": {"extends": "sub/c.yaml", "flags": {"test": None}},
        "lost": {"extends": "list.yaml"},
        "odd": {"extends": "a.yaml", "flags": {"test": 7}},
    }
    (tmp_path / "sub").mkdir()
    (tmp_path / "list.yaml").write_text("[]")
    for name, content in files.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    loop = read_loop(tmp_path / "sub/c.yaml")
    assert (loop.title, loop.model, loop.output_dir) == ("b", "tiny", "outputs/c")
    (command,) = plan(tmp_path / "sub/c.yaml")
    assert command.flags == {
        **{"model": "tiny", "device": "cpu", "seed": 3, "mode": "evaluation", "name": "tiny_val", "gen_n": 8},
        **{"limit_size": 9, "output_dir": "outputs/c/test.json"},
    }
    assert read_loop(tmp_path / "bare.yaml").flags == {}
    for name, message in {"lost": "list.yaml: holds no loop", "odd": "odd.yaml: flags: Expected `object"}.items():
        with pytest.raises(UserError, match=message):
            read_loop(tmp_path / f"{name}.yaml")


def test_inputs_are_looked_for_before_the_first_stage(capsys, tmp_path, monkeypatch):
    """Each file, name and model that no step makes, and that is not there; an earlier loop's outputs will be."""
    monkeypatch.chdir(tmp_path)
    flags = {
        "m1": {"name": "tiny_sftt", "deepspeed": "zero.json"},
        "samples": {"name": ["tiny_prompt_1", "mine.json"], "chat_template": "t.jinja"},
        "rewards": {"ref_model_ckpt": "m0", "checkpoint": "outputs/first/test"},
        "pairs": {"labels": "labels.json", "file2": "outputs/other/rewards.json"},
        "tuned": {"model": "no-such-model"},
        "test": {"few_shot": 2, "few_shot_file": "shots.json", "dry_run": True},
    }
    Path("first.yaml").write_text(yaml.safe_dump(one_step() | {"output_dir": "outputs/first"}))
    Path("bad.yaml").write_text(yaml.safe_dump(LOOP | {"flags": flags}))
    first, *problems = refused(capsys, ["--config", "first.yaml,bad.yaml", "--dry_run"]).splitlines()
    assert first == "error: nothing was started:" and all(line.startswith("bad.yaml: ") for line in problems)
    for text in (
        "m1 (train.py): --name tiny_sftt: neither a file, ",
        "m1 (train.py): --deepspeed zero.json: zero.json does not exist, and no earlier step makes it",
        "round 2: samples (infer.py): --name mine.json: no such file",
        "round 1: samples, round 2: samples (infer.py): --chat_template t.jinja: ",
        "round 1: rewards, round 2: rewards (rewarding.py): --ref_model_ckpt m0: neither a folder ",
        "round 1: rewards, round 2: rewards (rewarding.py): --checkpoint outputs/first/test: neither a folder ",
        "round 1: pairs, round 2: pairs (cal_consistency.py): --labels labels.json: ",
        "round 1: pairs, round 2: pairs (cal_consistency.py): --file2 outputs/other/rewards.json: ",
        "round 1: tuned, round 2: tuned (train.py): --model no-such-model: neither a folder, ",
        "test (infer.py): --few_shot_file shots.json: ",
        "test (infer.py): --dry_run: with it the step makes no output",
    ):
        (problem,) = [line for line in problems if line.startswith(f"bad.yaml: {text}")]
        problems.remove(problem)
    assert problems == [] and {path.name for path in tmp_path.iterdir()} == {"first.yaml", "bad.yaml"}
    Path("bad.yaml").write_text(yaml.safe_dump(one_step(script="prepare_data.py", flags={}, words=["eft", "j.json"])))
    told = refused(capsys, ["--config", "bad.yaml", "--dry_run"])
    assert "test (prepare_data.py): j.json does not exist, and no earlier step makes it" in told
    reader = one_step(script="cal_consistency.py", flags={"file1": "outputs/first/test.json"}) | {"title": "reader"}
    Path("reader.yaml").write_text(yaml.safe_dump(reader))
    iterate.main(["--device", "cpu", "--config", "first.yaml,reader.yaml", "--dry_run"])
    assert len(stages(capsys.readouterr().out)) == 2


def test_rows_of_loops_stand_by_the_names_of_their_models():
    rows = [{"model": "M0", "accuracy": 0.5}, {"model": "round1.test", "accuracy": 0.625, "consistency": 0.75}]
    lines = table([("one", rows), ("a title longer than a column", [{"model": "M1", "accuracy": 1.0}, rows[0]])])
    assert [line.split() for line in lines.splitlines()] == [
        ["model", "one", "a", "title", "longer", "than", "a", "column"],
        ["accuracy", "%", "mean", "C", "accuracy", "%", "mean", "C"],
        ["M0", "50.0", "50.0"],
        ["round1.test", "62.5", "0.75"],
        ["M1", "100.0"],
    ]
    assert len({len(line.rstrip()) for line in lines.splitlines()[:2]}) == 1
    assert table([("one", []), ("two", [])]) == "no evaluation, hence no table"
    chosen = [{"model": "M1", "accuracy": 0.5, "validation": True}]
    lines = table([("one", chosen), ("two", [{"model": "M1", "accuracy": 1.0}])]).splitlines()
    assert [line.split() for line in lines[2:]] == [["M1", "(validation)", "50.0"], ["M1", "100.0"]]


def test_what_pairs_have_for_the_table_are_columns():
    """One loop's, with a status that is a word; an empty place where a row has none."""
    rows = [{"model": "RM0", "accuracy": 0.5}]
    shown = [{"status": "1", "kept %": 12.34}, {"status": "stop", "kept %": 0.0, "kept right %": 99.96}]
    rows += [{"model": f"RM{t}", "accuracy": 0.75, "consistency": 0.9, "shown": own} for t, own in enumerate(shown, 1)]
    lines = table([("SER", rows), ("all labels", [{"model": "RM.labels", "accuracy": 1.0}])]).splitlines()
    assert [line.split() for line in lines[1:]] == [
        "accuracy % mean C status kept % kept right % accuracy % mean C".split(),
        ["RM0", "50.0"],
        ["RM1", "75.0", "0.90", "1", "12.3"],
        ["RM2", "75.0", "0.90", "stop", "0.0", "100.0"],
        ["RM.labels", "100.0"],
    ]
    ends = [line.index(word) + len(word) for line, word in ((lines[1], "kept %"), (lines[3], "12.3"))]
    assert ends[0] == ends[1]


# Results ------------------------------------------------------------------------------------------------------------

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
    commands = plan(SMALL | {"iterations": 1, "base_dir": str(tmp_path), "output_dir": str(tmp_path)})
    last = {"model": "M2", "accuracy": 0.2, "tasks": {"x": 0.2}, "pairs": 7, "consistency": None}
    assert results(commands)[-1] == last
    (tmp_path / name).write_text(json.dumps(value))
    with pytest.raises(UserError, match=f"{name}: damaged"):
        results(commands)


def test_results_of_a_loop_of_pseudo_labels(tmp_path):
    """A reward's accuracy, and what the newest pairs in its training set are like."""
    loop = CONFIGS / "loops/tiny_ser.yaml"
    commands, problems = planning.plan(read_loop(loop, output_root=str(tmp_path)), SCRIPTS, "cpu")
    assert problems == []
    root = tmp_path / "outputs/tiny/ser"
    root.mkdir(parents=True)
    for t in range(4):
        folder = (root if t else root.parent) / f"RM{t}.evaluation"
        folder.mkdir(parents=True)
        (folder / "x.summary.json").write_text(json.dumps({"all": {"all": {"value": 0.5 + 0.1 * t}}}))
        about = {"counts": {"out": t}, "mean_consistency": None if t == 2 else 0.9, "table": {"status": str(t)}}
        (root / f"round{t}.pairs.json.meta.json").write_text(json.dumps(about))
    first, *later = results(commands)
    assert first == {"model": "RM0", "accuracy": 0.5, "tasks": {"pairs": 0.5}}
    assert [(row["model"], row["pairs"], row["consistency"], row["shown"]) for row in later] == [
        ("RM1", 1, 0.9, {"status": "1"}),
        ("RM2", 2, None, {"status": "2"}),
        ("RM3", 3, 0.9, {"status": "3"}),
    ]
    (folder / "x.summary.json").write_text("{}")
    with pytest.raises(UserError, match="x.summary.json: damaged"):
        results(commands)
    (folder / "x.summary.json").unlink()
    with pytest.raises(UserError, match="expected one summary, found 0"):
        results(commands)


def test_the_newest_pairs_of_a_training_set_are_in_the_table():
    """And none where it is a part of a file of pairs, as the seed is."""
    commands = plan(CONFIGS / "loops/tiny_ssrm.yaml")
    trained = [command.flags["name"] for command in commands if command.output.name in ("PM0", "PM1", "PM3")]
    found = [_pairs_of(name, {command.result: command for command in commands}) for name in trained]
    assert [pairs and pairs.output.name for pairs in found] == [None, "round1.pairs.json", "round3.pairs.json"]


# The loop -----------------------------------------------------------------------------------------------------------


def macro_accuracy(world, path):
    """The mean over tasks of the share of correct answers, in percent, from the answers themselves."""
    tasks = defaultdict(list)
    for answer in world.read(path).values():
        tasks[answer["task"]].append(answer["correct"])
    return 100 * fmean(map(fmean, tasks.values()))


def check_table(world, out):
    """Its rows are the accuracies of M0 to M3, once per recipe, and the mean c of the pairs each was trained on."""
    table = [line.replace("!", "").split() for line in out.splitlines() if line[:2] in ("M0", "M1", "M2", "M3")]
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


def check_end(world, out):
    """Two screens, of which the last lines say what came of it and where the page is."""
    lines = out.splitlines()
    assert len(lines) <= 90 and max(map(len, lines)) < 300
    assert lines[-1] == "report: outputs/plain/report.html" and lines[-2].endswith(" s in all")
    ended, c, alarmed = lines[-5:-2]
    best = max(macro_accuracy(world, f"outputs/{own}/M3.evaluation.json") for own in ("cream", "plain"))
    assert f" ended highest: M3 at {best:.1f} %" in ended and "95 % interval" in ended
    assert c.startswith("Mean C") and "small 0." in c and "plain 0." in c
    assert alarmed == "No alarm sounded." or alarmed.startswith("Alarms (!): ")
    page = (world.folder / "outputs/plain/report.html").read_text()
    assert all(f"<p>{escape(line)}</p>" in page for line in (ended, c, alarmed))


def check_logs(world, printed):
    """Beside each output is a log file with the stage's command and all that it said."""
    logs = [path for path in world.folder.glob("outputs/*/*.log") if path.parent.name in ("base", "cream", "plain")]
    texts = [path.read_text() for path in logs]
    assert {each for text in texts for each in stages(text)} == {*printed}
    said = (world.folder / "outputs/cream/M2.log").read_text()
    assert "first example, its trained tokens marked" in said and "step 1/" in said and "checkpoint: " in said


@pytest.fixture(scope="module")
def two_loops(workspace):
    """Two recipes of a family, as in quickstart, after their first run: the command, the stages that it listed before,
    and how it ended."""
    write(workspace, "plain.yaml", PLAIN)
    loop = write(workspace, "small.yaml", SMALL) + ",plain.yaml"
    before = workspace.state()
    printed = stages(workspace.run(loop + " --dry_run").out)
    assert len(printed) == 30 and workspace.state() == before
    return loop, printed, workspace.run(loop)


@pytest.mark.slow
def test_the_loop(workspace, two_loops):
    """They share M0, M1 and round 1's measurements, and end in one table.

    Stages ran side by side, in forks of one process; run one by one, each in its own, the same commands give the same
    weights and answers. Run again, the loop skips everything, in turn.
    """
    loop, printed, first = two_loops
    assert len(titles(first.out)) == 30
    assert first.out.count("    up to date: ") == 6  # of the second recipe: M0, M1, its training, round 1's rankings
    check_table(workspace, first.out)
    check_end(workspace, first.out)
    check_logs(workspace, printed)
    for made in (
        "base/M1/meta.json",
        "base/round1.rewards.previous.json.meta.json",
        "cream/round1.pairs.json.meta.json",
    ):
        command = workspace.read(f"outputs/{made}")["command"]  # not the loop's own
        assert ["python", *command] in map(shlex.split, printed)

    before = workspace.state()
    again = workspace.run(loop)
    assert again.out.count("    up to date: ") == 30 and workspace.state() == before
    check_table(workspace, again.out)
    whole = workspace.run(loop + " --verbose").out
    assert stages(whole) == printed and whole.count("first prompt as the model sees it") == 0
    assert whole.count("is up to date (same settings and inputs)") == 30 and workspace.state() == before
    quiet = workspace.run(loop + " --quiet").out
    assert quiet.splitlines()[1].split() == ["model", "small", "plain"] and titles(quiet) == []

    alone = workspace.run("iterate.py --device cpu --config plain.yaml --until 1")  # which leaves the page of both
    assert (
        "report: outputs/plain/report.plain.html" in alone.out
        and "M3</td>" in (workspace.folder / "outputs/plain/report.plain.html").read_text()
    )
    assert {path: now for path, now in workspace.state().items() if path in before} == before

    for command in stages(workspace.run(loop + " --dry_run --output_root alone").out)[:15]:
        workspace.run(command)
    for model in ("outputs/base/M1", "outputs/cream/M2", "outputs/cream/M3"):
        one, other = (
            load_file(workspace.folder / root / model / "checkpoint-last/model.safetensors") for root in (".", "alone")
        )
        assert one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)
        answers = f"{model}.evaluation.json"
        assert workspace.read(answers) == workspace.read(f"alone/{answers}")


chromium = pytest.fixture(scope="module")(launched)


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
def test_the_report_that_a_loop_writes(workspace, two_loops, chromium, width):
    """All sections without barriers, on a desk in light too; its figures are drawn, on a phone those of accuracy, the
    folded ones once they are asked for; the browser of preferences filters, and follows a link."""
    preferences = "#preferences [data-part=pair]"
    with new_tab(chromium, width) as tab:
        tab.goto((workspace.folder / "outputs/plain/report.html").as_uri())
        assert {"Accuracy", "Consistency", "Rewards", "Preferences"} <= {*tab.locator("main h2").all_inner_texts()}
        every, shown = (tab.locator(f".plot{visible}").count() for visible in ("", ":visible"))
        assert every > shown > 15
        if width == "desk":
            tab.locator("details:has(.plot)").evaluate_all("all => all.forEach((each) => each.open = true)")
        assert draw_all(tab, ".plot" if width == "desk" else "#accuracy .plot") >= 4
        expect(tab, preferences, "M1")
        pairs = tab.locator("#preferences [data-part=count]").inner_text()
        tab.locator("#preferences details").first.evaluate("each => each.open = true")
        tab.locator("#preferences [name=round]").select_option(label="plain: round2")
        expect(tab, preferences, "M2")
        assert tab.locator("#preferences [data-part=count]").inner_text() != pairs
        link = tab.locator(f"{preferences} a").get_attribute("href")
        assert "pair=" in link and "round=" in link
        tab.goto("about:blank")
        tab.goto((workspace.folder / "outputs/plain/report.html").as_uri() + link)
        expect(tab, preferences, "M2")
        assert draw_all(tab, "#accuracy .plot") >= 4
        assert width == "phone" or barriers(tab) == {}
        tab.locator("#theme").click()
        assert tab.evaluate("page.dark()") and barriers(tab) == {}
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.slow
def test_a_loop_of_one_s_own(workspace):
    """A stage that fails ends it; repaired, the same command resumes; run again, all is up to date; the table has the
    one evaluation, of the round that was kept. A changed flag is refused with what to do in a loop."""
    kept = LOOP | {"keep": {"metric": "tuned.loss", "mode": "min", "register": "winner"}}
    kept["after"] = [step | {"flags": step["flags"] | {"checkpoint": "${best}"}} for step in LOOP["after"]]
    loop = write(workspace, "own.yaml", kept)
    blocked = workspace.folder / "outputs/own/round1.tuned"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("in the way")
    failed = workspace.run(loop, code=2)
    assert len(titles(failed.out)) == 5
    assert "error: outputs/own/round1.tuned: is a file, and the run needs a folder of that name" in failed.err
    assert "round 1: tuned ended with 2; the same command resumes from there; where a setting was changed" in failed.err
    blocked.unlink()
    done = workspace.run(loop)
    assert len(titles(done.out)) == 12 and done.out.count("    up to date: ") == 5
    (row,) = [line.split() for line in done.out.splitlines() if line.startswith("test ")]
    losses = [workspace.read(f"outputs/own/round{t}.tuned/meta.json")["last"]["loss"] for t in (1, 2)]
    best = 1 + losses.index(min(losses))
    assert workspace.read("outputs/own/decisions.json")["best"]["round"] == best
    assert os.readlink(workspace.folder / "outputs/own/best") == f"round{best}.tuned/checkpoint-last"
    assert f"round{best}.tuned" in workspace.read("configs/checkpoint.json")["winner"]
    assert f"result: the model of round {best}, tuned.loss {min(losses):.4g}" in done.out
    page = (workspace.folder / "outputs/own/report.html").read_text()
    assert f"Kept: round {best}, round{best}.tuned/checkpoint-last." in page and "lowest tuned.loss" in page
    pairs = workspace.read(f"outputs/own/round{best}.pairs.json.meta.json")
    accuracy = macro_accuracy(workspace, "outputs/own/test.json")
    assert row == ["test", f"{accuracy:.1f}", f"{pairs['mean_consistency']:.2f}"]
    settings = [workspace.read(f"outputs/own/round{t}.tuned/meta.json")["settings"] for t in (1, 2)]
    assert [each["lr"] for each in settings] == [3e-4, 2e-4]

    before = workspace.state()
    again = workspace.run(loop)
    assert again.out.count("    up to date: ") == 12 and workspace.state() == before
    write(workspace, "own.yaml", kept | {"flags": {"more": {"gen_n": 3}}})
    assert "gen_n: 4 -> 3" in (told := workspace.refused(loop)) and "another output_dir than outputs/own," in told
    assert "--gen_n 3" in (again := told.splitlines()[-1]) and again.endswith(" --overwrite")


@pytest.mark.slow
def test_stages_of_big_models_are_processes(workspace):
    """Beyond IN_PROCESS each stage is started; one that fails ends the loop with its exit code."""
    recipe = SMALL | {"base_dir": "outputs/other"}
    (workspace.folder / "outputs/other").mkdir(parents=True)
    (workspace.folder / "outputs/other/M1").write_text("in the way")
    argv = shlex.split(write(workspace, "broken.yaml", recipe))[1:]
    code = f"import iterate; iterate.IN_PROCESS = 0; iterate.main({argv})"
    process = workspace.start(f"-c {shlex.quote(code)}")
    out, _ = process.communicate()
    assert process.returncode == 2
    assert (workspace.folder / "outputs/other/M0.evaluation.json").exists()
    assert (
        "is a file, and the run needs a folder of that name" in out
        and "train M1 ended with 2" in out
        and "rank by M1" not in out
    )
