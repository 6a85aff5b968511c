"""The rules of the command line: what every script accepts, what it refuses and with which words."""

import contextlib
import dataclasses
import io
import json
import os
import shlex
import subprocess
import sys
from dataclasses import field
from enum import Enum
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import iterate
from cream.cli.console import command
from cream.cli.flag_fields import IF_GIVEN
from cream.cli.flags import OWNERS, as_dict, as_words, chosen, deciding, flag, one_of, parse, try_parse
from cream.errors import UserError

SCRIPTS = {script: iterate.config_of(script) for script in iterate.STAGES}


class Rank(Enum):
    kendall = "kendalltau"
    spearman = "spearmanr"
    TopOrder = "toporder"


class SysPrompt(Enum):
    none = ""
    task = "Let us think step by step."


@dataclasses.dataclass
class Sampling:
    """Generation

    The second paragraph is for readers of the source.
    """

    gen_n: int = flag(5, "answers per prompt")
    top_p: float = flag(0.95, "nucleus mass: 95% of it")
    sysprompt: SysPrompt = flag(SysPrompt.none, "text appended to the question")
    limit_size: int | None = flag(None, "records to read")

    def __post_init__(self):
        if self.gen_n < 1:
            raise UserError(f"--gen_n {self.gen_n}: at least one answer is needed")


@dataclasses.dataclass
class Lora:
    """LoRA"""

    lora: bool = flag(False, "train adapters", aliases=("enable",))
    lora_r: int = flag(32, "rank", aliases=("r",))
    dropout: float | None = flag(0.1, "dropout")

    def __post_init__(self):
        if self.lora_r < 1:
            raise UserError(f"--lora_r {self.lora_r}: a rank is positive")


@dataclasses.dataclass
class Config:
    device: str = flag("cpu", "devices")
    checkpoint: str | None = flag(None, "where to start")
    rank: Rank = flag(Rank.kendall, "statistic")
    stage: str | None = flag(None, "stage", choices=("sft", "DPO"))
    enable_ref_model: bool = flag(True, "with reference", aliases=("enable_ref",))
    bf16: bool | None = flag(None, "none: where the device has it")
    sampling: Sampling = field(default_factory=Sampling)
    lora: Lora = field(default_factory=lambda: Lora(lora_r=8))


def run(*argv, cls=Config):
    return parse(cls, list(argv), description="Does things.", example="  run.py --gen_n 3  # 100%")


def refused(capsys, *argv, cls=Config) -> str:
    """The lines on stderr when a command line is refused."""
    with pytest.raises(SystemExit) as stop:
        run(*argv, cls=cls)
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    return err


def write(folder, text, name="flags.yaml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("script", "flag", "hint"),
    [
        ("train.py", "--learning_rate", "; did you mean --lr?"),
        ("train.py", "--num-train-epochs", "; did you mean --epoch?"),
        ("train.py", "--batch_size", "; did you mean --train_bsz?"),
        ("infer.py", "--batch_size", "; did you mean --max_tokens_per_batch?"),
        ("infer.py", "--max_new_tokens", "; did you mean --gen_max_tokens?"),
        ("rewarding.py", "--dataset", "; did you mean --input_file?"),
        ("rewarding.py", "--output_file", "; did you mean --output?"),
        ("train.py", "--output_file", "; did you mean --output_dir?"),
        ("rewarding.py", "--learning_rate", "; --lr belongs to train.py"),
        ("rewarding.py", "--beta", "; --beta belongs to train.py, cal_consistency.py and make_pairs.py"),
        ("cal_consistency.py", "--gen_n", "; --gen_n belongs to train.py and infer.py"),
        ("rewarding.py", "--rewrad", "; did you mean --reward, --valid_reward, --reward_model?"),
        ("rewarding.py", "--qqq", ""),
    ],
)
def test_unknown_flags_that_are_known_elsewhere(script, flag, hint):
    (problem,) = try_parse(SCRIPTS[script], [flag, "1"])[1]
    assert problem == f"{flag}: unknown flag{hint}"


def test_flags_belong_to_the_scripts_that_are_named():
    for name, owners in OWNERS.items():
        having = [script for script, cls in SCRIPTS.items() if name in as_dict(cls())]
        assert name == "overwrite" or [script for script in SCRIPTS if script in owners] == having, name


def test_defaults_are_the_dataclass_own():
    assert run() == Config()
    assert run().lora.lora_r == 8  # set by the factory, not by the field of Lora


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        ("--gen_n 7", "gen_n", 7),
        ("--gen_n=7", "gen_n", 7),
        ("--limit_size -7", "limit_size", -7),
        ("--top_p -1e-5", "top_p", -1e-5),
        ("--top_p -.5", "top_p", -0.5),
        ("--top_p=-2", "top_p", -2.0),
        ("--lora", "lora", True),
        ("--lora --gen_n 7", "lora", True),
        ("--enable", "lora", True),
        ("--enable_ref no", "enable_ref_model", False),
        ("-r 4", "lora_r", 4),
        ("-r=4", "lora_r", 4),
        ("--rank SPEARMAN", "rank", "spearman"),
        ("--rank toporder", "rank", "TopOrder"),
        ("--stage dpo", "stage", "DPO"),
        ("--stage SFT", "stage", "sft"),
        ("--sysprompt none", "sysprompt", "none"),
        ("--checkpoint None", "checkpoint", None),
        ("--checkpoint null", "checkpoint", None),
        ("--limit_size NONE", "limit_size", None),
        ("--dropout none", "dropout", None),
        ("--bf16 none", "bf16", None),
        ("--bf16", "bf16", True),
        ("--stage none", "stage", None),
        ("--checkpoint -", "checkpoint", "-"),
        ("--checkpoint=--odd=name", "checkpoint", "--odd=name"),
    ],
)
def test_accepted_forms(argv, name, value):
    assert as_dict(run(*argv.split()))[name] == value


@pytest.mark.parametrize("word", ["yes", "true", "1", "on"])
@pytest.mark.parametrize("spelled", [str.lower, str.upper, str.title])
def test_words_for_true(word, spelled):
    assert run("--lora", spelled(word)).lora.lora is True


@pytest.mark.parametrize("word", ["no", "false", "0", "off"])
@pytest.mark.parametrize("spelled", [str.lower, str.upper, str.title])
def test_words_for_false(word, spelled):
    assert run(f"--enable_ref={spelled(word)}").enable_ref_model is False


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--gen_m 3", "--gen_m: unknown flag; did you mean --gen_n"),
        ("--gen-n 3", "--gen-n: unknown flag; did you mean --gen_n"),
        ("--gen_m=3", "--gen_m: unknown flag; did you mean --gen_n"),
        ("-gen_n 3", "-gen_n: unknown flag; did you mean --gen_n"),
        ("--common.device cpu", "--common.device: unknown flag"),
        ("--check x", "--check: unknown flag; flags are not abbreviated, write --checkpoint\n"),
        ("--enable_r no", "not abbreviated, write --enable_ref_model or --enable_ref\n"),
        ("--no-lora", "--no-lora: unknown flag; did you mean --lora"),
        ("-r4", "-r4: unknown flag"),
        ("-- x", "--: unknown flag"),
        ("--gen_n 3 --gen_n 3", "--gen_n: given twice\n"),
        ("--gen_n 3 --gen_n", "--gen_n: given twice\n"),
        ("--enable_ref no --enable_ref_model no", "--enable_ref_model: given twice, first as --enable_ref\n"),
        ("--gen_n", "--gen_n: needs a value: a whole number"),
        ("--stage --lora", "--stage: needs a value: one of sft, DPO\n"),
        ("stray", "stray: belongs to no flag"),
        ("--gen_n 3 4", "4: belongs to no flag"),
        ("--gen_n 3.5", "--gen_n: '3.5' is not a whole number"),
        ("--checkpoint=", "--checkpoint: '' is not text: it is empty"),
        ("--device a\0b", r"--device: 'a\x00b' is not text"),
        ("--device \udcff.json", r"--device: '\udcff.json' is not text"),
        ("--gen_n=", "--gen_n: '' is not a whole number"),
        ("--top_p high", "--top_p: 'high' is not a number"),
        ("--top_p nan", "--top_p: 'nan' is not a number"),
        ("--top_p -inf", "--top_p: '-inf' is not a number"),
        ("--lora maybe", "--lora: 'maybe' is not yes or no"),
        ("--rank kendal", "--rank: 'kendal' is not one of kendall, spearman, TopOrder; did you mean kendall?"),
        ("--rank kendalltau", "did you mean kendall?"),
        ("--stage dop", "--stage: 'dop' is not one of sft, DPO; did you mean DPO?"),
        ("--device none", "--device: cannot be none, it needs text"),
        ("--gen_n Null", "--gen_n: cannot be Null, it needs a whole number"),
        ("--gen_n 0", "--gen_n 0: at least one answer is needed"),
    ],
)
def test_refusals(capsys, argv, message):
    err = refused(capsys, *argv.split())
    assert message in err
    assert "Traceback" not in err
    assert err.count("\n") == 2  # the one problem, and where to find the flags


def test_all_problems_are_told_at_once(capsys, tmp_path):
    path = write(tmp_path, "top_p: high\nbeta: 1\n")
    err = refused(capsys, "--gen_m", "3", "--rank", "x", "--gen_n", "--lora", "1", "2", "--config", path)
    problems = (
        "2: belongs to no flag",
        "--gen_m: unknown",
        "--rank: 'x'",
        "--gen_n: needs",
        f"{path}: top_p: 'high'",
        f"{path}: beta: unknown",
    )
    for problem in problems:
        assert problem in err
    assert err.count("\n") == len(problems) + 1


def test_user_errors_of_all_groups_are_told(capsys):
    err = refused(capsys, "--gen_n", "0", "-r", "0")
    assert "at least one answer" in err
    assert "a rank is positive" in err


def test_user_error_of_the_whole(capsys):
    @dataclasses.dataclass
    class Whole:
        sampling: Sampling = field(default_factory=Sampling)

        def __post_init__(self):
            if self.sampling.limit_size == self.sampling.gen_n:
                raise UserError("no two alike")

    assert run("--limit_size", "4", cls=Whole).sampling.limit_size == 4
    assert "no two alike" in refused(capsys, "--limit_size", "5", cls=Whole)


@dataclasses.dataclass
class Bounded:
    """Numbers"""

    count: int = flag(2, "how many", low=1)
    share: float = flag(0.5, "which part", low=0, high=1)
    mass: float | None = flag(None, "nucleus", above=0, high=1)
    dropout: float = flag(0, "left out", low=0, below=1)
    rate: float = flag(1e-6, "how fast", above=0)
    floor: int = flag(0, "how deep", high=0)
    loss: float = flag(-1, "how far", below=0)


@pytest.mark.parametrize(
    ("name", "inside", "outside", "limits"),
    [
        ("count", ["1", "1" + "0" * 400], ["0", "-3", "x"], "a whole number at least 1"),
        ("share", ["0", "1", "0.3"], ["-1e-9", "1.0001", "inf", "nan"], "a number in [0, 1]"),
        ("mass", ["1e-300", "1"], ["0", "-0.0", "1.5"], "a number in (0, 1]"),
        ("dropout", ["0", "0.999"], ["1", "-0.1"], "a number in [0, 1)"),
        ("rate", ["1e-300", "1e300"], ["0", "-1", "inf"], "a number above 0"),
        ("floor", ["0", "-9"], ["1"], "a whole number at most 0"),
        ("loss", ["-1e-300"], ["0", "-inf"], "a number below 0"),
    ],
)
def test_ranges(capsys, tmp_path, name, inside, outside, limits):
    """At the command line and in a file; the refusal names flag, value and range, and --help has the range too."""
    for text in inside:
        value = as_dict(run(f"--{name}={text}", cls=Bounded))[name]
        assert value == type(value)(text)
    for text in outside:
        assert f"--{name}: {text!r} is not {limits}\n" in refused(capsys, f"--{name}", text, cls=Bounded)
        path = write(tmp_path, f"{name}: {text}")
        assert f"{path}: {name}: {text!r} is not {limits}\n" in refused(capsys, "--config", path, cls=Bounded)
    with pytest.raises(SystemExit):
        run("--help", cls=Bounded)
    assert f"({limits.partition('number ')[2]}; default" in " ".join(capsys.readouterr().out.split())


def test_a_range_is_not_for_none():
    assert run("--mass", "none", cls=Bounded).mass is None


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        (int, flag(0, "", low=1)),
        (float, flag(1.0, "", below=1)),
        (str, flag("", "", low=1)),
        (bool, flag(True, "", low=1)),
    ],
)
def test_a_range_that_its_default_misses_raises_at_once(kind, field):
    with pytest.raises(TypeError, match="Wrong.odd"):
        run(cls=dataclasses.make_dataclass("Wrong", [("odd", kind, field)]))


def test_problems_are_those_that_parse_prints(capsys, tmp_path):
    path = write(tmp_path, "gen_n: x\n")
    for argv in ([], ["--gen_m", "3", "--rank", "x"], ["--gen_n", "0", "-r", "0"], ["--config", path]):
        problems = try_parse(Config, argv)[1]
        assert capsys.readouterr() == ("", "")
        if problems:
            assert [line.partition(": ")[2] for line in refused(capsys, *argv).splitlines()[:-1]] == problems
        else:
            assert argv == [] and run() == Config()


def test_required_flag(capsys):
    @dataclasses.dataclass
    class Needs:
        input_file: str = flag(dataclasses.MISSING, "sampling output")

    assert run("--input_file", "a.json", cls=Needs).input_file == "a.json"
    assert "--input_file is required: sampling output" in refused(capsys, cls=Needs)
    assert "is required" not in refused(capsys, "--input_file", cls=Needs)  # it was given, without its value


def test_fields_outside_init_are_no_flags(capsys):
    @dataclasses.dataclass
    class Derived:
        devices: str = flag("0,1", "ids")
        world_size: int = field(init=False)

        def __post_init__(self):
            self.world_size = len(self.devices.split(","))

    assert run("--devices", "0,1,2", cls=Derived).world_size == 3
    assert as_dict(Derived()) == {"devices": "0,1"}
    assert "--world_size: unknown flag" in refused(capsys, "--world_size", "2", cls=Derived)


@dataclasses.dataclass
class Again:
    """Once more"""

    top_n: int = flag(1, "", aliases=("gen_n",))


@pytest.mark.parametrize(("kind", "default"), [(Again, None), (list, None), (int | str, 0), (bytes, b"")])
def test_wrong_dataclasses_raise_at_once(kind, default):
    factory = Again if kind is Again else lambda: default
    cls = dataclasses.make_dataclass(
        "Wrong",
        [("extra", kind, field(default_factory=factory)), ("sampling", Sampling, field(default_factory=Sampling))],
    )
    with pytest.raises(TypeError, match="defined twice|cannot be"):
        run(cls=cls)


@pytest.mark.parametrize("name", ["help", "config", "print_config", "h", "load_args_path"])
def test_names_of_the_parser_are_taken(name):
    with pytest.raises(TypeError, match="defined twice"):
        run(cls=dataclasses.make_dataclass("Wrong", [(name, int, flag(1, ""))]))


YAML = """
# a comment
gen_n: 3
top_p: 1e-6          # a string to YAML 1.1
device: 0            # text to us
enable_ref: no
lora: true
dropout: ~
checkpoint: "none"
limit_size:
rank: Spearman
sysprompt: none
r: 4
"""
JSON = json.dumps(
    indent="\t",
    obj={
        "gen_n": 3,
        "top_p": 1e-6,
        "device": 0,
        "enable_ref": False,
        "lora": True,
        "dropout": None,
        "checkpoint": "none",
        "limit_size": None,
        "rank": "Spearman",
        "sysprompt": "none",
        "r": 4,
    },
)
FROM_FILE = Config(
    device="0",
    rank=Rank.spearman,
    enable_ref_model=False,
    sampling=Sampling(gen_n=3, top_p=1e-6),
    lora=Lora(lora=True, lora_r=4, dropout=None),
)


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.yaml", YAML), ("a.yml", YAML), ("a.json", JSON), ("bom.yaml", "\ufeff" + YAML), ("bom.json", "\ufeff" + JSON)],
)
@pytest.mark.parametrize("spelling", ["--config", "--load_args_path"])
def test_config_file(capsys, tmp_path, name, text, spelling):
    path = write(tmp_path, text, name)
    assert run(spelling, path) == FROM_FILE
    assert capsys.readouterr().err == (
        f"from {path}: gen_n=3, top_p=1e-06, device=0, enable_ref_model=no, lora=yes, dropout=none, checkpoint=none, "
        "limit_size=none, rank=spearman, sysprompt=none, lora_r=4\n"
    )


def test_command_line_wins_over_the_file_and_only_what_came_from_it_is_listed(capsys, tmp_path):
    path = write(tmp_path, "gen_n: 3\nenable_ref: no\nr: 2\n")
    config = run("--gen_n", "4", "--config", path, "--enable_ref_model")
    assert (config.sampling.gen_n, config.enable_ref_model, config.lora.lora_r) == (4, True, 2)
    assert capsys.readouterr().err == f"from {path}: lora_r=2\n"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "beta: 1", "{path}: beta: unknown flag"),
        ("a.yaml", "gen: 1", "{path}: gen: unknown flag; flags are not abbreviated, write gen_n\n"),
        ("a.yaml", "--gen_n: 1", "{path}: --gen_n: unknown flag; did you mean gen_n"),
        ("a.yaml", "config: b.yaml", "{path}: config: unknown flag"),
        ("a.yaml", "gen_n: yes", "{path}: gen_n: 'yes' is not a whole number"),
        ("a.yaml", "lora: 2", "{path}: lora: '2' is not yes or no"),
        ("a.yaml", "device:", "{path}: device: cannot be null, it needs text"),
        ("a.yaml", "device: [0, 1]", "{path}: device: needs a single value: text"),
        ("a.yaml", "device: {a: 1}", "{path}: device: needs a single value: text"),
        ("a.json", '{"device": [0]}', "{path}: device: needs a single value: text"),
        ("a.json", r'{"device": "a\u0000b"}', r"{path}: device: 'a\x00b' is not text"),
        ("a.json", r'{"device": "\ud800"}', r"{path}: device: '\ud800' is not text"),
        ("a.yaml", 'device: ""', "{path}: device: '' is not text"),
        ("a.yaml", r'device: "\UFFFFFFFF"', "--config {path}: is not YAML"),
        ("a.json", '{"lora": {}}', "{path}: lora: needs a single value: yes or no"),
        ("a.json", '{"top_p": NaN}', "{path}: top_p: 'NaN' is not a number"),
        ("a.yaml", "gen_n: 1\ngen_n: 2", "{path}: gen_n: given twice\n"),
        ("a.json", '{"gen_n": 1, "gen_n": 1}', "{path}: gen_n: given twice\n"),
        ("a.yaml", "r: 1\nlora_r: 1", "{path}: lora_r: given twice, first as r\n"),
        ("a.yaml", "- gen_n", "--config {path}: holds no map of flags"),
        ("a.yaml", "", "--config {path}: holds no map of flags"),
        ("a.json", '[["gen_n", 1]]', "--config {path}: holds no map of flags"),
        ("a.yaml", "gen_n: [", "--config {path}: is not YAML"),
        ("a.yaml", "gen_n: 1\n---\ngen_n: 2", "--config {path}: is not YAML"),
        ("a.json", "{'gen_n': 1}", "--config {path}: is not JSON"),
        ("a.json", "[" * 100_000, "--config {path}: is nested too deeply"),
        ("a.yaml", "[" * 5_000, "--config {path}: is nested too deeply"),
        ("a.txt", "gen_n: 1", "--config {path}: the name must end in .yaml, .yml, .json"),
    ],
)
def test_wrong_config_files(capsys, tmp_path, name, text, message):
    path = write(tmp_path, text, name)
    err = refused(capsys, "--config", path)
    assert message.format(path=path) in err
    assert "Traceback" not in err


def test_unreadable_config_files(capsys, tmp_path):
    assert "cannot be read: No such file" in refused(capsys, "--config", str(tmp_path / "absent.yaml"))
    (tmp_path / "folder.json").mkdir()
    assert "cannot be read: Is a directory" in refused(capsys, "--config", str(tmp_path / "folder.json"))
    (tmp_path / "bytes.yaml").write_bytes(b"device: \xff")
    assert "bytes.yaml: 'utf-8' codec" in refused(capsys, "--config", str(tmp_path / "bytes.yaml"))
    assert "--config: '' is not text" in refused(capsys, "--config", "")


def test_the_file_that_a_run_keeps_holds_its_flags(capsys, tmp_path):
    """train.py's args.json: {"settings": ..., "inputs": ..., "flags": {...}}."""
    flags = as_dict(FROM_FILE)
    kept = {"settings": {"gen_n": 4, "processes": 2}, "inputs": {"data": "xxh3:0"}, "flags": flags}
    for text, name in ((json.dumps(kept), "args.json"), (yaml.safe_dump(kept), "args.yaml")):
        assert run("--config", write(tmp_path, text, name)) == FROM_FILE
    assert run("--config", write(tmp_path, '{"flags": {}}', "args.json")) == Config()
    path = write(tmp_path, '{"flags": {"beta": 1}}', "args.json")
    assert f"{path}: beta: unknown flag" in refused(capsys, "--config", path)
    path = write(tmp_path, '{"flags": [["gen_n", 1]]}', "args.json")
    assert f"{path}: flags: unknown flag" in refused(capsys, "--config", path)


def test_yaml_tags_construct_nothing(capsys, tmp_path):
    path = write(tmp_path, f"device: !!python/object/apply:os.mkdir [{tmp_path}/made]")
    assert "needs a single value" in refused(capsys, "--config", path)
    assert not (tmp_path / "made").exists()


texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(
    lambda text: text.lower() not in ("none", "null")
)
numbers = st.floats(allow_nan=False, allow_infinity=False)
configs = st.builds(
    Config,
    device=texts,
    checkpoint=st.none() | texts | st.sampled_from(["yes", "1e-6", "~", "0", " x ", "a: b", "- a", "#", "2020-01-01"]),
    rank=st.sampled_from(Rank),
    stage=st.sampled_from([None, "sft", "DPO"]),
    enable_ref_model=st.booleans(),
    bf16=st.none() | st.booleans(),
    sampling=st.builds(
        Sampling,
        gen_n=st.integers(1),
        top_p=numbers,
        sysprompt=st.sampled_from(SysPrompt),
        limit_size=st.none() | st.integers(),
    ),
    lora=st.builds(Lora, lora=st.booleans(), lora_r=st.integers(1), dropout=st.none() | numbers),
)


@settings(deadline=None)
@given(config=configs)
def test_printed_config_read_back_is_the_same(config, tmp_path_factory):
    """Through the command line, then twice through files: YAML as --print_config wrote it, and JSON."""
    argv = [f"--{name}={'none' if value is None else value}" for name, value in as_dict(config).items()]
    assert run(*argv) == config
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as stop:
        run(*argv, "--print_config")
    assert stop.value.code == 0
    folder = tmp_path_factory.mktemp("round")
    with contextlib.redirect_stderr(io.StringIO()):
        assert run("--config", write(folder, out.getvalue())) == config
        assert run("--config", write(folder, json.dumps(as_dict(config)), "a.json")) == config


def test_as_dict_is_flat_and_plain():
    assert as_dict(Config()) == {
        "device": "cpu",
        "checkpoint": None,
        "rank": "kendall",
        "stage": None,
        "enable_ref_model": True,
        "bf16": None,
        "gen_n": 5,
        "top_p": 0.95,
        "sysprompt": "none",
        "limit_size": None,
        "lora": False,
        "lora_r": 8,
        "dropout": 0.1,
    }


def test_print_config_resolves_the_file(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        run("--config", write(tmp_path, YAML), "--print_config", "--gen_n", "9")
    assert stop.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out) == as_dict(FROM_FILE) | {"gen_n": 9}


@pytest.mark.parametrize("given_flag", ["--help", "--print_config"])
def test_a_reader_that_has_ended_is_no_error(given_flag):
    """`train.py --help | head -1`."""
    read, write = os.pipe()
    command = [sys.executable, iterate.__file__.replace("iterate", "train"), given_flag]
    process = subprocess.Popen(command, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    os.close(read)
    assert process.communicate() == (None, b"") and process.returncode == 0


@pytest.mark.parametrize("argv", ["--help", "-h", "--gen_n 3 --help", "--help --unknown", "--gen_n --help"])
def test_help(capsys, monkeypatch, argv):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        run(*argv.split())
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert out.index("Does things.") < out.index("\noptions:") < out.index("--device TEXT")
    assert out.index("\nLoRA:") < out.index("\nConfiguration:") < out.index("--config TEXT, --load_args_path TEXT")
    assert out.index("--enable_ref") < out.index("\nGeneration:") < out.index("--gen_n N") < out.index("\nLoRA:")
    assert "The second paragraph" not in out
    for line in (
        "answers per prompt (default 5)",
        "nucleus mass: 95% of it (default 0.95)",
        "devices (default cpu)",
        "statistic (one of kendall, spearman, TopOrder; default kendall)",
        "where to start (default none)",
        "train adapters (default no)",
        "rank (default 8)",
        "stage (one of sft, DPO; default none)",
    ):
        assert line in out
    assert "--lora_r N, -r N" in out
    assert out.endswith("\nexample:\n  run.py --gen_n 3  # 100%\n")


@pytest.mark.slow
def test_help_does_not_wait_for_torch():
    """Of any script; all are looked at in one process."""
    modules = sorted({script.removesuffix(".py") for script in iterate.SCRIPTS} | {"report", "train_armo", "iterate"})
    code = f"import sys, importlib; [importlib.import_module(m) for m in {modules}]; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(iterate.__file__).parent).returncode == 0


def test_a_script_ends_without_traceback_and_imports_nothing_heavy(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import dataclasses, sys\n"
        "from cream.cli.flags import flag, parse\n"
        "@dataclasses.dataclass\n"
        "class Config:\n"
        "    lr: float = flag(1e-6, 'learning rate')\n"
        "try:\n"
        "    print(parse(Config, description='x', example='y'))\n"
        "finally:\n"
        "    assert not {'torch', 'transformers', 'yaml', 'numpy'} & set(sys.modules)\n"
    )
    ran = [
        subprocess.run(
            [sys.executable, script, *argv],
            capture_output=True,
            text=True,
            check=False,
            env={"PYTHONPATH": ":".join(sys.path)},
        )
        for argv in (["--lr", "2"], ["--help"], ["--Lr"])
    ]
    assert [each.returncode for each in ran] == [0, 0, 2]
    assert ran[0].stdout == "Config(lr=2.0)\n"
    assert ran[1].stderr == ""
    assert ran[2].stderr.startswith("script.py: --Lr: unknown flag; did you mean --lr")


# The scripts' own flags -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", SCRIPTS.values(), ids=lambda cls: cls.__name__)
def test_every_number_has_a_range(cls):
    """No number but a reward may be negative, and each refusal says what it may be. Which flags are numbers, their
    refusals tell."""
    numbers, rewards = 0, {"missing_reward", "reward_clip_low", "reward_clip_high"}
    for name in as_dict(cls()).keys() - rewards:
        if any(" number" in problem for problem in try_parse(cls, [f"--{name}=x"])[1]):
            numbers += 1
            (problem,) = try_parse(cls, [f"--{name}=-1"])[1]
            assert problem.startswith(f"--{name}: '-1' is not a") and not problem.endswith(" number")
    assert numbers


@pytest.mark.parametrize(
    ("script", "inside", "outside"),
    [
        ("train.py", "--fixed_consistency 1", "--fixed_consistency 1.1"),
        ("train.py", "--warmup_step_ratio 0", "--warmup_step_ratio 1.1"),
        ("train.py", "--save_eval_step_ratio 0.5", "--save_eval_step_ratio 0"),
        ("train.py", "--lora_dropout 0", "--lora_dropout 1"),
        ("train.py", "--max_length 2", "--max_length 1"),
        ("train.py", "--master_port 65535", "--master_port 65536"),
        ("train.py", "--seed 4294967295", "--seed 4294967296"),
        ("train.py", "--weight_decay 0", "--lr 0"),
        ("infer.py", "--top_p 1", "--top_p 0"),
        ("infer.py", "--gen_temperature 0", "--gen_n 0"),
        ("infer.py", "--top_k 0 --min_p 1", "--top_k -1"),
        ("infer.py", "--repetition_penalty 10", "--repetition_penalty 0"),
        ("infer.py", "--stop=---,###", "--stop ###,"),
        ("infer.py", "--gen_temperature 2", "--gen_temperature 2.1"),
        ("infer.py", "--gpu_memory_utilization 1", "--gpu_memory_utilization 1.01"),
        ("rewarding.py", "--limit_size 1", "--limit_size 0"),
        ("cal_consistency.py", "--shuffle_consistency 0", "--beta 0"),
        ("make_pairs.py", "--threshold 1 --margin 0", "--threshold 1.01"),
        ("make_pairs.py", "--threshold 0.5", "--threshold 0.49"),
        ("make_pairs.py", "--max_pairs_per_prompt 1", "--max_pairs_per_prompt 0"),
    ],
)
def test_ranges_of_the_scripts(script, inside, outside):
    assert try_parse(SCRIPTS[script], inside.split())[1] == []
    (problem,) = try_parse(SCRIPTS[script], outside.split())[1]
    assert problem.startswith(outside.split()[0])


@pytest.mark.parametrize("text", ["---", "-e", "-1e-5", "###", "--top_p", "a b", "=", "\\n,\\,"])
def test_a_value_is_given_as_it_is_read(text):
    """One that looks like a flag too: on a command line, in a loop, in the next command."""
    (config, problems) = try_parse(SCRIPTS["infer.py"], as_words("stop", text))
    assert not problems and config.sampling.stop == text
    assert try_parse(SCRIPTS["infer.py"], shlex.split(command("infer.py", stop=text))[2:])[0].sampling.stop == text


def test_a_script_has_no_flag_that_it_does_not_use():
    run_flags = {
        name: {"seed", "debug", "overwrite", "dry_run"} & as_dict(cls()).keys() for name, cls in SCRIPTS.items()
    }
    assert run_flags == {
        "train.py": {"seed", "debug", "overwrite", "dry_run"},
        "infer.py": {"seed", "debug", "overwrite", "dry_run"},
        "rewarding.py": {"seed", "debug", "overwrite", "dry_run"},
        "cal_consistency.py": {"overwrite", "dry_run"},
        "make_pairs.py": {"seed", "overwrite", "dry_run"},
    }


def test_sysprompt_none_is_a_word_of_its_own():
    cls = SCRIPTS["infer.py"]
    assert cls().sampling.sysprompt == "auto"
    for word in ("none", "task", "auto"):
        assert run("--sysprompt", word, cls=cls).sampling.sysprompt == word


# Flags of a choice by name ------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Judge:
    """The judge's"""

    samples: int = flag(3, "judgements of a response", low=1)
    seed: int = flag(0, "seed of what is random", low=0)


@dataclasses.dataclass
class Human:
    """The human's"""

    file: str | None = flag(None, "their ratings", decides=False)
    seed: int = flag(0, "seed of what is random", low=0)


@dataclasses.dataclass
class Choosing:
    """Choosing"""

    source: str = flag("judge", "who rates", choices=("judge", "human"))
    options: one_of({"judge": Judge, "human": Human}) = field(default_factory=one_of({"judge": Judge, "human": Human}))


def test_a_flag_that_two_choices_share_is_one_and_reaches_both():
    config = run("--seed", "7", "--samples", "2", cls=Choosing)
    assert (config.options.judge, config.options.human) == (Judge(2, 7), Human(None, 7))
    assert chosen(config.options, "judge", "--source") == Judge(2, 7)


def test_a_flag_of_another_choice_is_refused():
    config = run("--source", "human", "--samples", "2", cls=Choosing)
    with pytest.raises(UserError, match="--source human: --samples belongs to --source judge"):
        chosen(config.options, "human", "--source")


def test_a_flag_that_two_choices_define_otherwise_is_a_mistake_of_ours():
    @dataclasses.dataclass
    class Other:
        """Another's"""

        seed: int = flag(1, "another seed", low=0)

    cls = one_of({"judge": Judge, "other": Other})
    with pytest.raises(TypeError, match="defined twice"):
        run(cls=cls)


def test_what_decides_an_output_is_a_property_of_its_flag():
    config = run("--source", "human", "--file", "f.json", "--seed", "7", cls=Choosing)
    assert deciding(config) == {"source": "human", "samples": 3, "seed": 7}

    @dataclasses.dataclass
    class Newer:
        """Newer"""

        shots: int = flag(0, "a flag that older outputs do not know", decides=IF_GIVEN, low=0)

    assert deciding(run(cls=Newer)) == {} and deciding(run("--shots", "2", cls=Newer)) == {"shots": 2}
