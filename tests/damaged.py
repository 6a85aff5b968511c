"""Damaged files other than record files: sidecars, journals, run folders, registries, model folders, recipes."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from layouts import GOOD, ON, put

from cream.files.append_log import add_checksum
from cream.files.fingerprints import fingerprint_file
from cream.files.journal import FORMAT
from cream.records import Conversation, Pair, Prompt, Rewards, Samples

NO_JSON = {"no JSON": b"{", "a list": b"[]", "a number": b"7", "no UTF-8": b"\xff\xfe{}", "brackets": b"[" * 200_000}
MODEL = "localdata/damaged/model"
OUT = "localdata/damaged/out.json"


class Damage(NamedTuple):
    """How to damage a workspace (whose folder localdata/damaged is empty), the command that meets it, what its message
    has to hold."""

    name: str
    make: Callable[[Path], object]
    command: str
    said: str


def _put(path: str, value: object) -> Callable[[Path], object]:
    """What writes bytes, or a JSON value, to a path."""
    data = value if isinstance(value, bytes) else json.dumps(value).encode()

    def make(root: Path):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)

    return make


def _all(*makers: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda root: [make(root) for make in makers]


def sidecars() -> Iterator[Damage]:
    """X.meta.json of what a stage reads."""
    commands = {
        Samples: f"rewarding.py {ON} --reward likelihood --checkpoint none --dry_run --input_file",
        Rewards: f"cal_consistency.py --dry_run --file2 {GOOD} --file1",
        Pair: f"train.py {ON} --dry_run --name",
    }
    types = {
        f"{key}: {value!r}": {key: value}
        for key, values in {
            "settings": ([], 7),
            "inputs": ([], {"data": 7}),
            "sources": ("x", {"data": None}),
            "output": (7,),
            "policy": (7, {}, {"model": 1, "checkpoint": None, "fingerprint": "x"}),
            "scored": ([],),
            "method": (7,),
            "unverified": ("x",),
        }.items()
        for value in values
    }
    for kind, command in commands.items():
        file = f"localdata/damaged/{kind.__name__}.json"
        for name, value in (NO_JSON | types).items():
            make = _all(lambda root, file=file, kind=kind: put(root / file, kind), _put(f"{file}.meta.json", value))
            yield Damage(f"sidecar of {kind.__name__}, {name}", make, f"{command} {file}", f"{file}.meta.json")
        folder = _all(
            lambda root, file=file, kind=kind: put(root / file, kind),
            lambda root, file=file: (root / f"{file}.meta.json").mkdir(),
        )
        yield Damage(f"sidecar of {kind.__name__}, a folder", folder, f"{command} {file}", f"{file}.meta.json")
    yield from _liars(commands)


def _liars(commands: dict[type, str]) -> Iterator[Damage]:
    """Sidecars that are well formed and make no sense."""

    def beside(kind: type, **about):
        def make(root: Path):
            path = put(root / f"localdata/damaged/{kind.__name__}.json", kind)
            _put(f"{path}.meta.json", {"output": fingerprint_file(path)} | about)(root)

        return make

    samples, pairs = "localdata/damaged/Samples.json", "localdata/damaged/Pair.json"
    data = {"sources": {"data": "../tiny/prompt.1.json"}}
    yield Damage("prompts without a hash", beside(Samples, **data), f"{commands[Samples]} {samples}", samples)
    yield Damage("unknown method", beside(Pair, method="mine"), f"{commands[Pair]} {pairs}", f"{pairs}.meta.json")
    missing = {"policy": {"model": "tiny", "checkpoint": None, "fingerprint": "0" * 32}}
    yield Damage("another policy", beside(Pair, **missing), f"{commands[Pair]} {pairs}", pairs)


def journals() -> Iterator[Damage]:
    """X.partial of what a stage is about to write, and what tells of an unfinished or finished run."""
    headers = NO_JSON | {
        "empty object": {},
        "no inputs": {"settings": {}},
        "numbers": {"settings": 1, "inputs": 2},
        "another's": {"settings": {"seed": 9}, "inputs": {"data": "x"}},
        "lists": {"settings": [], "inputs": []},
    }
    commands = {
        Prompt: f"infer.py {ON} --gen_max_tokens 8 --output_dir {OUT} --name",
        Samples: f"rewarding.py {ON} --reward likelihood --checkpoint none --output {OUT} --input_file",
    }
    for kind, command in commands.items():
        file = f"localdata/damaged/{kind.__name__}.json"
        for name, value in headers.items():
            data = (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n"
            first = data if isinstance(value, bytes) else add_checksum({"journal": FORMAT} | value)
            valid = lambda root, file=file, kind=kind: put(root / file, kind)  # noqa: E731
            make = _all(valid, _put(f"{OUT}.partial", first))
            yield Damage(f"journal of {kind.__name__}, {name}", make, f"{command} {file}", "out.json")
            make = _all(valid, _put(OUT, b"{}"), _put(f"{OUT}.meta.json", data))
            yield Damage(f"own sidecar of {kind.__name__}, {name}", make, f"{command} {file}", "out.json")
    train = f"train.py {ON} --name localdata/damaged/sft.json --train_bsz 2 --output_dir localdata/damaged/run"
    valid = lambda root: put(root / "localdata/damaged/sft.json", Conversation)  # noqa: E731
    for name, value in headers.items():
        make = _all(valid, _put("localdata/damaged/run/args.json", value))
        yield Damage(f"args.json, {name}", make, train, "localdata/damaged/run")
        make = _all(make, _put("localdata/damaged/run/meta.json", value))
        yield Damage(f"meta.json, {name}", make, train, "localdata/damaged/run")


def registries() -> Iterator[Damage]:
    """configs/checkpoint.json and dataset.json."""
    bad = NO_JSON | {"numbers": {"m": 1}, "nulls": {"m": None}, "nested": {"m": {}}, "nowhere": {"m": "no/such"}}
    for name, value in bad.items():
        sample = f"infer.py {ON} --dry_run --name tiny_prompt_1 --checkpoint m"
        make = _put("configs/checkpoint.json", value)
        yield Damage(f"checkpoints, {name}", make, sample, "checkpoint.json")
        train = f"train.py {ON} --dry_run --name m"
        said = "no/such" if name == "nowhere" else "dataset.json"
        yield Damage(f"datasets, {name}", _put("configs/dataset.json", value), train, said)
        register = f"train.py {ON} --dry_run --name tiny_sft --register m"
        yield Damage(f"registering, {name}", make, register, "checkpoint.json")


def models() -> Iterator[Damage]:
    """Model folders that are not whole, or not what they seem."""
    small = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
    changes = {
        f"{name}, {how}": _put(f"{MODEL}/{name}", value)
        for name in (*small, "cream.json", "model.safetensors.index.json")
        for how, value in {"empty": b"", **NO_JSON}.items()
    }
    changes |= {f"no {name}": _remove(name) for name in ("config.json", "tokenizer.json", "model.safetensors")}
    changes |= {
        "no template": _remove("chat_template.jinja"),
        "empty tokenizer object": _put(f"{MODEL}/tokenizer.json", {}),
        "empty config": _put(f"{MODEL}/config.json", {}),
        "unknown type": _put(f"{MODEL}/config.json", {"model_type": "nobody's"}),
        "type is a number": _put(f"{MODEL}/config.json", {"model_type": 7}),
        "weights, header cut": _cut("model.safetensors", 100),
        "weights, cut": _cut("model.safetensors", 50_000),
        "weights, empty": _put(f"{MODEL}/model.safetensors", b""),
        "weights, huge header": _put(f"{MODEL}/model.safetensors", b"\xff" * 8 + b"{}"),
        "weights, none": _put(f"{MODEL}/model.safetensors", (2).to_bytes(8, "little") + b"{}"),
        "index, shard missing": _put(f"{MODEL}/model.safetensors.index.json", {"weight_map": {"a": "b.safetensors"}}),
        "index, a number": _put(f"{MODEL}/model.safetensors.index.json", {"weight_map": {"a": 7}}),
        "pickled": lambda root: (root / MODEL / "model.safetensors").rename(root / MODEL / "pytorch_model.bin"),
        "weights are a folder": _all(_remove("model.safetensors"), lambda r: (r / MODEL / "model.safetensors").mkdir()),
    }
    for value in ({}, "x"):
        changes[f"model_max_length: {value}"] = _setting("tokenizer_config.json", "model_max_length", value)
    for key, values in {
        "num_hidden_layers": ("x", -1, None, 10**12),
        "hidden_size": (0, 7, "x", []),
        "vocab_size": (1, "x", 10**12),
        "num_attention_heads": (0, 3),
        "max_position_embeddings": ("x",),
        "rope_parameters": ("x", {"rope_type": "nobody's"}),
        "hidden_act": ("nobody's", 7),
        "architectures": ("x", 7),
        "dtype": ("nobody's",),
        "text_config": (7,),
    }.items():
        changes |= {f"config {key}: {value!r}": _setting("config.json", key, value) for value in values}
    changes |= {f"cream.json {value}": _put(f"{MODEL}/cream.json", value) for value in _about()}
    for name, change in changes.items():
        make = _all(lambda root: shutil.copytree(root / "assets/tiny_m0", root / MODEL), change)
        command = f"infer.py --device cpu --model {MODEL} --limit_size 2 --gen_max_tokens 8 --name tiny_prompt_1"
        yield Damage(f"model, {name}", make, f"{command} --output_dir {OUT}", MODEL)


def _about() -> list[dict]:
    typed = [{"kind": 7}, {"kind": "nobody's"}, {"kind": "reward_model"}, {"head": []}, {"chat_template": 7}]
    return [{"settings": 7}, {"fingerprint": 7}, {"fingerprint": "0" * 32}, {"stage": []}, {"unverified": {}}, *typed]


def _remove(name: str) -> Callable[[Path], object]:
    return lambda root: (root / MODEL / name).unlink()


def _cut(name: str, size: int) -> Callable[[Path], object]:
    return lambda root: (root / MODEL / name).write_bytes((root / MODEL / name).read_bytes()[:size])


def _setting(file: str, key: str, value: object) -> Callable[[Path], object]:
    def make(root: Path):
        path = root / MODEL / file
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))

    return make


def recipes() -> Iterator[Damage]:
    """What iterate.py is given."""
    good = {
        "title": "t",
        "model": "tiny",
        "iterations": 1,
        "prompts": ["tiny_prompt_1"],
        "base_dir": "outputs/r",
        "output_dir": "outputs/r/own",
        "sft": {"name": "tiny_sft"},
    }
    texts = {
        "empty": b"",
        "blanks": b" \n\n",
        "a list": b"[]",
        "a tab": b"title:\tx\n\tmodel: y",
        "no UTF-8": b"title: \xff\xfe",
        "control characters": b"title: \x00\x01",
        "no such date": b"title: 2020-13-01",
        "brackets": b"title: " + b"[" * 20_000,
        "no such truth": b"title: !!bool x",
        "no digits": b'title: !!int ""',
        "no number": b"title: !!float ''",
        "no moment": b"title: !!timestamp x",
        "no such character": b'title: "\\UFFFFFFFF"',
        "an object of Python's": b'!!python/object/apply:os.system ["touch localdata/damaged/ran"]',
        "a name of Python's": b"title: !!python/name:os.system",
        "two documents": b"title: x\n---\ntitle: y",
        "an unknown anchor": b"title: *x",
        "laughs": b"a: &a [x, x, x, x, x, x, x, x, x]\n"
        + b"".join(b"%c: &%c [%s]\n" % (c, c, b", ".join([b"*%c" % (c - 1)] * 9)) for c in b"bcdefgh")
        + b"title: *h",
        "not closed": b"title: {",
    }
    values = {f"no {key}": {k: v for k, v in good.items() if k != key} for key in good}
    for key, wrong in {
        "title": (7, None, [], "a\0b", "", "\ud800"),
        "model": (7, None, "no-such-model"),
        "iterations": (0, -1, 2, "two", 1.5, True),
        "prompts": ([], "tiny_prompt_1", [7], [None], ["a\0b"]),
        "base_dir": (7, None, "a\0b"),
        "seed": (-1, "x", 2**40),
        "sft": ([], 7, {"epoch": [1]}, {"epoch": "two"}, {"no_such_flag": 1}, {"lr": -1}, {7: 1}),
        "dpo": ({"beta": 0}, {"method": "mine"}),
        "evaluation": ({"mode": "mine"},),
        "start": (7, [], "none", "m1"),
        "reuse_prompts": ("maybe",),
        "colour": ("red",),
    }.items():
        values |= {f"{key}: {value}": good | {key: value} for value in wrong}
    step = {"id": "test", "script": "infer.py", "flags": {"mode": "evaluation", "name": "tiny_test"}}
    loop = {"title": "t", "model": "tiny", "output_dir": "outputs/r", "before": [step]}
    for key, wrong in {
        "before": (
            7,
            None,
            [],
            [7],
            [[step]],
            {"id": "x"},
            [step, step],
            [step | {"script": "rm"}],
            [step | {"id": "../x"}],
        ),
        "repeat": (7, [None], [step | {"shared": "maybe"}], [step | {"output": "a\0b"}], [step | {"flags": {"x": {}}}]),
        "rounds": (0, 10**30, "two", None),
        "start": ([], {"test": 7}, {"nobody": "none"}),
        "flags": ([], {"test": []}, {"nobody": {}}, {"test": {"seed": "${test}"}}, {"test": {"name": "${" * 9}}),
        "extends": ([], "", "recipe.yaml", ".", "none.yaml"),
    }.items():
        values |= {f"loop, {key}: {value}": loop | {key: value} for value in wrong}
    for name, value in (texts | values).items():
        make = _put("localdata/damaged/recipe.yaml", value)
        said = "no-such-model" if name.endswith("no-such-model") else "recipe.yaml"
        yield Damage(f"recipe, {name}", make, "iterate.py --config localdata/damaged/recipe.yaml", said)
    yield Damage("recipe, missing", lambda root: None, "iterate.py --config localdata/damaged/none.yaml", "none.yaml")
    yield Damage(
        "recipe, a folder",
        lambda root: (root / "localdata/damaged/r.yaml").mkdir(),
        "iterate.py --config localdata/damaged/r.yaml",
        "r.yaml",
    )
