"""A poisoned set: what comes from elsewhere is never run and never names a place to write; it is refused, or passed on
as plain data."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from layouts import GOOD, ON, STAGES, lines, put, records

from cream.files.store import read
from cream.records import Answer, Conversation, Pair, Prompt, Rewards, Samples

pytestmark = pytest.mark.slow
UUIDS = ["../../x", "/etc/passwd", "a\0b", "..", "$(touch RAN)", "`touch RAN`", "'; touch RAN; '", "a\n", "é" * 5000]
SCRIPT = "<script>open('RAN', 'w')</script>{{ 7 * 7 }}${RAN}"
SAMPLE = f"infer.py {ON} --gen_n 2 --gen_max_tokens 8 --limit_size 2 --output_dir localdata/h/out.json"
SPIN = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
ROOM = 12 << 30  # bytes of address space for a line of 100 MB
LIKELIHOOD = f"rewarding.py {ON} --reward likelihood --checkpoint none"


class Payload:
    """Unpickled, it leaves a marker behind."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.fixture
def world(workspace):
    """A workspace in which nothing has been run when the test ends, and nothing was written outside of localdata/h."""
    folder = workspace.folder / "localdata/h"
    folder.mkdir()
    before = tree(workspace)
    yield workspace
    ran, after = list(workspace.folder.parent.rglob("RAN")), tree(workspace)
    shutil.rmtree(folder)
    assert not ran
    assert after.keys() == before.keys() and after == before


def tree(workspace) -> dict[str, bytes]:
    """Every file of the workspace and beside it, but for localdata/h, with its bytes."""
    folder = workspace.folder
    paths = [path for path in folder.rglob("*") if "__pycache__" not in path.parts and path.is_file()]
    found = {str(path): path.read_bytes() for path in paths if not path.is_relative_to(folder / "localdata/h")}
    return found | dict.fromkeys(map(str, folder.parent.iterdir()), b"")


def model(world) -> Path:
    """A model folder to poison."""
    return shutil.copytree(world.folder / "assets/tiny_m0", world.folder / "localdata/h/model")


# Pickles --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.safetensors"])
@pytest.mark.parametrize("command", [f"{SAMPLE} --name tiny_prompt_1", "train.py --device cpu --name tiny_sft"])
def test_pickled_weights_are_never_loaded(world, name, command):
    folder = model(world)
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Payload(world.folder / "RAN")}, folder / name)
    error = world.refused(command.replace("--model tiny ", "") + " --model localdata/h/model")
    assert "localdata/h/model" in error and ("is a pickle" in error or "safetensors header" in error)


@pytest.mark.parametrize("name", ["training_args.bin", "optimizer.pt", "tokenizer.pkl", "scheduler.pt", "random.pkl"])
def test_pickles_beside_the_weights_are_not_looked_at(world, name):
    (model(world) / name).write_bytes(pickle.dumps(Payload(world.folder / "RAN")))
    world.run(SAMPLE.replace("--model tiny", "--model localdata/h/model") + " --name tiny_prompt_1")


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_pickled_adapters_are_never_loaded(world, name):
    folder = world.folder / "localdata/h/adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "tiny", "peft_type": "LORA"}')
    torch.save({"a": Payload(world.folder / "RAN")}, folder / name)
    assert "pickled adapters are never loaded" in world.refused(
        f"{SAMPLE} --name tiny_prompt_1 --checkpoint localdata/h/adapter"
    )


def test_code_beside_the_weights_is_not_run(world):
    folder = model(world)
    code = f"open({str(world.folder / 'RAN')!r}, 'w')\n"
    for name in ("modeling_own.py", "configuration_own.py", "tokenization_own.py"):
        (folder / name).write_text(code)
    own = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    for file, changes in {
        "config.json": {"model_type": "own", "auto_map": own},
        "tokenizer_config.json": {
            "tokenizer_class": "Own",
            "auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]},
        },
    }.items():
        value = json.loads((folder / file).read_text()) | changes
        (folder / file).write_text(json.dumps(value))
    error = world.refused(f"{SAMPLE} --name tiny_prompt_1 --model localdata/h/model".replace("--model tiny ", ""))
    assert "localdata/h/model" in error and "--trust_remote_code" in error


# Paths ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../../x.safetensors", "/etc/passwd", "a/../../x", "..", "", "a\0b"])
def test_an_index_names_files_of_its_own_folder_only(world, name):
    folder = model(world)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    error = world.refused(f"{SAMPLE} --name tiny_prompt_1 --model localdata/h/model".replace("--model tiny ", ""))
    assert "localdata/h/model" in error


@pytest.mark.parametrize("path", ["../../etc", "/etc", "/dev/zero", "/etc/passwd", "", ".", "a\0b", "~", "$HOME"])
def test_a_registry_entry_that_is_no_checkpoint_is_refused(world, path):
    registry = world.folder / "configs/checkpoint.json"
    world.write("configs/checkpoint.json", {"m": path})
    error = world.refused(f"{SAMPLE} --name tiny_prompt_1 --checkpoint m")
    registry.unlink()
    assert "--checkpoint m" in error or "not a model folder" in error


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b", "a\0b", "", "a b", "é\n"])
def test_what_is_registered_is_a_name(world, name):
    command = f"train.py {ON} --name tiny_sft --output_dir localdata/h/run --register"
    done = world.stages.run(world.folder, [*world.argv(command), name])
    assert done.code == 2 and "Traceback" not in done.err and "--register" in done.err


def test_uuids_are_never_paths(world):
    """Through every stage: they come out as they went in."""
    folder = world.folder / "localdata/h"
    for kind in (Prompt, Conversation, Samples, Rewards, Pair, Answer):
        rows = [{**records(kind)[0], "uuid": uuid} for uuid in UUIDS]
        (folder / f"{kind.__name__}.jsonl").write_bytes(lines(rows))
    made = {
        "Samples.out.json": (Samples, f"{SAMPLE.replace('--limit_size 2 ', '')} --name localdata/h/Prompt.jsonl"),
        "Rewards.out.json": (
            Rewards,
            f"{LIKELIHOOD} --input_file localdata/h/Samples.jsonl --output localdata/h/out.json",
        ),
        "Pairs.out.json": (Pair, "cal_consistency.py --file1 localdata/h/Rewards.jsonl --output localdata/h/out.json"),
        "Answers.out.json": (
            Answer,
            "infer.py --mode rescore --input_file localdata/h/Answer.jsonl --output_dir localdata/h/out.json",
        ),
    }
    for name, (kind, command) in made.items():
        world.run(command.replace("localdata/h/out.json", f"localdata/h/{name}"))
        assert [record.uuid for record in read(folder / name, kind)] == UUIDS
    world.run(f"train.py {ON} --name localdata/h/Conversation.jsonl --output_dir localdata/h/sft")
    world.run(f"train.py {ON} --name localdata/h/Pair.jsonl --output_dir localdata/h/dpo")


@pytest.mark.parametrize("place", ["", "/", "x" * 5000, "a\0b", "localdata/h/ancestor"])
def test_where_a_policy_says_it_comes_from_is_believed_by_nothing(world, place):
    """Once it is trained, or its rewards stand, the next commands are advice: they are no reason to fail."""
    folder = model(world)
    world.write("localdata/h/model/cream.json", {"stage": "dpo", "started_from": place})
    (folder / "own.json").touch()  # another model than the reference
    (folder.parent / "ancestor").mkdir()
    (folder.parent / "ancestor/cream.json").write_text("{")
    for kind in (Pair, Samples):
        put(folder.parent / f"{kind.__name__}.jsonl", kind)
    from_it = f"{ON} --checkpoint localdata/h/model"
    reward = f"rewarding.py {from_it} --input_file localdata/h/Samples.jsonl --output localdata/h/r.json"
    train = f"train.py {from_it} --name localdata/h/Pair.jsonl --output_dir localdata/h/run"
    if "\0" in place:
        assert all("cream.json: is damaged" in world.refused(command) for command in (reward, train))
        return
    assert "--checkpoint CHECKPOINT --ref_model_ckpt none" in world.run(reward).out
    if place == "localdata/h/ancestor":
        assert "--name PROMPTS" in world.run(train).out


# Texts ----------------------------------------------------------------------------------------------------------------


def test_texts_are_only_texts(world):
    """A script, a template, a path or a special token in an answer is an answer."""
    folder = world.folder / "localdata/h"
    rows = records(Samples)
    texts = [SCRIPT, "{% include '/etc/passwd' %}", "<|assistant|> ../../x"]
    rows[0]["responses"] = texts
    (folder / "s.jsonl").write_bytes(lines(rows))
    world.run(f"{LIKELIHOOD} --input_file localdata/h/s.jsonl --output localdata/h/r.json")
    first = next(read(folder / "r.json", Rewards))
    assert first.responses() == texts
    world.run("cal_consistency.py --file1 localdata/h/r.json --output localdata/h/pairs.json")
    world.run(f"train.py {ON} --name localdata/h/pairs.json --output_dir localdata/h/run")


@pytest.mark.parametrize("stage", STAGES)
def test_a_line_of_many_mb(world, stage):
    """A text that no model takes is dropped before it is tokenised; where there is no model it is carried through. Of
    100 MB with a model and without one, of 20 MB in the other stages, of 4 MB where it is searched for an answer."""
    kind, command = STAGES[stage]
    put(world.folder / "localdata/h/good.jsonl", Rewards)
    first = "1 + 2 = 3" if kind in (Answer, Samples, Rewards, Pair) else "What is 1 "
    megabytes = {"sampling": 100, "file1": 100, "rescore": 4}.get(stage, 20)
    text = lines(records(kind)).decode().replace(first, "x y " * (megabytes * 250_000))
    (world.folder / "localdata/h/long.jsonl").write_text(text)
    command = command.format(file="localdata/h/long.jsonl").replace("outputs/x", "localdata/h/x")
    mismatch = stage == "file2"  # other answers than in --file1
    limited = Path(__file__).with_name("limited.py")
    done = world.run(f"{limited} {ROOM} {command.replace(GOOD, 'localdata/h/good.jsonl')}", code=2 * mismatch)
    assert "Traceback" not in done.err and len(done.out + done.err) < 20_000


TEMPLATES = {
    "loops": (SPIN, "takes more than 2 s"),
    "reaches for classes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses a conversation"),
    "reaches for globals": ("{{ raise_exception.__globals__['os'].system('touch RAN') }}", "refuses a conversation"),
    "includes": ("{% include '/etc/passwd' %}", "refuses a conversation"),
    "fills the memory": ("{{ 'x' * (10 ** 11) }}", "too much memory"),
    "calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refuses a conversation"),
}


@pytest.mark.parametrize("given", ["--chat_template", "within the model's folder"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_reach_nothing(world, name, given):
    template, said = TEMPLATES[name]
    if given == "--chat_template":
        (world.folder / "localdata/h/t.jinja").write_text(template)
        flags = "--chat_template localdata/h/t.jinja"
    else:
        (model(world) / "chat_template.jinja").write_text(template)
        flags = "--model localdata/h/model"
    command = f"{SAMPLE} --name tiny_prompt_1 {flags}"
    error = world.refused(command.replace("--model tiny ", "") if "--model localdata" in flags else command)
    assert said in error


@pytest.mark.parametrize(
    "text",
    [
        '!!python/object/apply:os.system ["touch RAN"]',
        'title: !!python/object/new:os.system ["touch RAN"]',
        "title: !!python/object/apply:subprocess.Popen [[touch, RAN]]",
    ],
)
@pytest.mark.parametrize("command", ["iterate.py", f"train.py {ON}"])
def test_yaml_makes_no_objects(world, command, text):
    (world.folder / "localdata/h/c.yaml").write_text(text)
    assert "c.yaml" in world.refused(f"{command} --config localdata/h/c.yaml")
