"""How a stage ends: what a user can fix is one message and exit code 2, all else keeps its traceback."""

import importlib.util
import io
import os
import signal
import subprocess
import sys

import pytest
import torch

from cream.cli import console, screen
from cream.cli.interrupts import Interrupted
from cream.errors import UserError


def ends(error):
    @console.stage
    def main(argv):
        raise error

    with pytest.raises(SystemExit) as ended:
        main([])
    return ended.value.code


@pytest.mark.parametrize(
    "error, code, said",
    [
        (UserError("a.json: no such file"), 2, "error: a.json: no such file\n"),
        (OSError(28, "No space left on device", "a.json"), 2, "error: a.json: No space left on device\n"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore"), 2, "out of memory: CUDA out"),
        (MemoryError(), 2, "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 2, "out of memory"),
    ],
)
def test_what_a_user_can_fix_ends_in_one_line(capsys, error, code, said):
    assert ends(error) == code
    printed = capsys.readouterr().err
    assert said in printed and printed.count("\n") == 1 and "Traceback" not in printed


@pytest.mark.parametrize(
    "error, code", [(KeyboardInterrupt(), 130), (Interrupted(signal.SIGINT), 130), (Interrupted(signal.SIGTERM), 143)]
)
def test_an_interrupt_says_how_to_resume(capsys, monkeypatch, error, code):
    monkeypatch.setattr("sys.argv", ["/somewhere/infer.py", "--name", "a file.json"])
    assert ends(error) == code
    printed = capsys.readouterr().err
    assert "finished work is kept" in printed and "\n  python infer.py --name 'a file.json'\n" in printed


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), OSError("an error without a file"), KeyError("x")])
def test_a_bug_keeps_its_traceback(error):
    @console.stage
    def main(argv):
        raise error

    with pytest.raises(type(error)):
        main([])


def test_progress_without_a_terminal(caplog):
    """A line now and then, with what is left; none of work that is over soon, and none at the end."""
    now = [0.0]
    progress = console.Progress(100, "sampling", "prompts", clock=lambda: now[0])
    with caplog.at_level("INFO", logger="cream"):
        for second in range(100):
            now[0] = 2.0 * (second + 1)
            progress.update()
    lines = [record.message for record in caplog.records]
    assert lines[:2] == [
        "sampling: 15 of 100 prompts, 30 s, about 2.83 min left",
        "sampling: 30 of 100 prompts, 60 s, about 2.33 min left",
    ]
    assert len(lines) == 6
    now[0] = 0.0
    resumed = console.Progress(14, "training", "steps", done=4, clock=lambda: now[0])
    caplog.clear()
    with caplog.at_level("INFO", logger="cream"):
        now[0] = 30.0
        resumed.update()  # neither what was done before nor what warms up says anything about speed
        now[0] = 60.0
        resumed.update(5)
    assert [record.message for record in caplog.records] == [
        "training: 5 of 14 steps, 30 s",
        "training: 10 of 14 steps, 60 s, about 24 s left",
    ]
    with console.bar(3, "sampling", "prompts") as bar:  # pytest's stderr is no terminal
        bar.update()


def test_a_bar_says_no_time_left_before_its_second_update(monkeypatch):
    now, stream = [0.0], io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(screen, "err_stream", lambda: stream)
    with console.bar(300, "sampling", "prompts") as bar:
        bar._time, bar.start_t, bar.last_print_t, bar.mininterval = (lambda: now[0]), 0.0, 0.0, 0.0
        for now[0] in (60.0, 60.5, 61.0):
            bar.update()
            lines = str(bar)
            assert ("<" in lines) == (now[0] > 60), lines
    assert "3/300 [01:01<02:28,  2.00 prompts/s]" in lines  # 297 at 2 a second


@pytest.mark.parametrize(
    "passed, left, said",
    [
        (0.4, 59.6, "0 s, about 60 s left"),
        (119, 120, "119 s, about 2 min left"),
        (7e3, 1e5, "117 min, about 27.8 h left"),
    ],
)
def test_durations(passed, left, said):
    assert console.describe_times(passed, left) == said


@pytest.mark.parametrize("script", ["train.py", "infer.py", "prepare_data.py", "report.py", "iterate.py"])
def test_without_the_environment(repo, script):
    """-S: without the packages of this environment."""
    done = subprocess.run([sys.executable, "-S", "-E", script, "--help"], cwd=repo, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert "make setup" in done.stderr and "xxhash" in done.stderr and done.stderr.count("\n") == 1


UNHEARD = """
import os, signal, sys
from cream.cli import console, interrupts

@console.stage
def main(argv):
    console.log.info("begun")
    sys.stdin.readline()
    with interrupts.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        console.log.info("in flight")
        open(sys.argv[1], "w").close()
    interrupts.check()

main()
"""


def test_an_interrupt_that_nobody_hears_finishes_what_is_in_flight(tmp_path, repo):
    """`python infer.py 2>&1 | tee log`: Ctrl-C ends tee as well, and with it who reads stdout and stderr."""
    argv = [sys.executable, "-c", UNHEARD, str(tmp_path / "kept")]
    pipe = subprocess.PIPE
    process = subprocess.Popen(argv, cwd=repo, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT)
    assert process.stdout.readline() == b"begun\n"
    process.stdout.close()
    process.stdin.close()
    assert process.wait() == 143 and (tmp_path / "kept").exists()


def test_transformers_finds_no_library_that_it_would_import_in_vain(monkeypatch):
    monkeypatch.delitem(sys.modules, "sklearn", raising=False)
    console.set_up_process()
    assert importlib.util.find_spec("sklearn") is None


def test_lines_that_nobody_reads_are_lost_without_a_word(repo):
    """`| head`: the pipe's other end is closed before the first line."""
    code = "import sys; from cream.cli.console import *; set_up_process(); log.info('a'); print('on', file=sys.stderr)"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], cwd=repo, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.stderr.startswith("on\n") and "Traceback" not in done.stderr
