"""Stages side by side: what waits for what, what is shown, how a failure and a signal end them. Stages are stood in for
by functions that write their output; tests/test_iterate.py runs real ones."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch  # noqa: F401 - before the forks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cream.cli import interrupts, screen
from cream.loops.loop import Loop
from cream.loops.plan import Command
from cream.loops.running import Stage
from cream.loops.side_by_side import SideBySide

LOOP = Loop(title="own", model="tiny", output_dir="out")
LONG = 20.0  # seconds; a test that waits for it has failed


def stage(number: int, reads=(), total=9, **flags) -> Stage:
    """One whose output is out/NUMBER.json, of those that it reads."""
    flags = {"model": "tiny", "input": ",".join(f"out/{each}.json" for each in reads)} | flags
    return Stage(Command(f"step {number}", "x.py", flags, Path(f"out/{number}.json")), LOOP, number, total)


def write(command: Command, loop: Loop) -> None:
    """A stage that finds what it reads, and then has an output."""
    for path in filter(None, command.flags["input"].split(",")):
        assert Path(path).read_text() == path
    command.output.write_text(str(command.output))


def wait_for(path: str) -> None:
    end = time.monotonic() + LONG
    while not Path(path).exists():
        assert time.monotonic() < end, f"{path} does not come"
        time.sleep(0.005)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    return tmp_path


@pytest.fixture
def shown(caplog):
    """The messages so far."""
    caplog.set_level(logging.INFO, "cream")
    return lambda: "\n".join(caplog.messages)


def play(stages, start=write, count=2) -> None:
    with SideBySide(start, count, lambda: None) as runner:
        for each in stages:
            runner.run(each)
        runner.wait()


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(reads=st.lists(st.sets(st.integers(0, 7), max_size=3), min_size=1, max_size=8), count=st.integers(2, 4))
def test_each_stage_finds_what_it_reads(folder, reads, count):
    """Whatever reads what: no output is missing at the end, and none is read before it is there."""
    for old in Path("out").iterdir():
        old.unlink()
    play([stage(i, {each for each in read if each < i}) for i, read in enumerate(reads)], count=count)
    assert {int(path.stem) for path in Path("out").glob("*.json")} == {*range(len(reads))}


def test_what_does_not_wait_runs_at_the_same_time(folder):
    """Each of two ends only when the other one has begun."""

    def meet(command, loop):
        command.output.write_text(str(command.output))
        wait_for(f"out/{1 - int(command.output.stem)}.json")

    play([stage(0), stage(1)], meet)


def test_the_longest_chain_goes_first_and_no_more_run_than_may(folder):
    """Of 0 and 1, which nothing reads, and 2 -> 3 -> 4, one after another."""

    def note(command, loop):
        with open("order", "a") as file:
            file.write(f"{command.output.stem} ")
        write(command, loop)

    play([stage(0), stage(1), stage(2), stage(3, [2]), stage(4, [3])], note, count=1)
    assert Path("order").read_text().split() == ["2", "3", "0", "1", "4"]


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (stage(1), stage(1)),
        (stage(1), stage(2, checkpoint="out/1/checkpoint-last")),
        (stage(1), stage(2, gold="out/1.scores.jsonl")),
        (stage(1, register="mine"), stage(2, checkpoint="mine")),
        (stage(1, register="mine"), stage(2, register="mine")),
        (stage(1, checkpoint="mine"), stage(2, register="mine")),
        (stage(1, input_file="s.json"), stage(2, input_file="s.json", checkpoint="none")),
        (stage(1), stage(2, checkpoint=os.path.abspath("out/../out/1"))),
        (stage(1), stage(2, data="out")),
    ],
)
def test_what_waits_for_another(first, then):
    """For its output, by any path, a file beside that, a name that either registers, and a cache that both use."""
    runner = SideBySide(write, 2, lambda: None)
    runner.run(first)
    runner.run(then)
    runner.run(stage(12, [11]))
    assert [job.needs for job in runner.jobs] == [[], runner.jobs[:1], []]


def test_what_two_loops_make_alike_is_made_once(folder, shown):
    def once(command, loop):
        with open("order", "a") as file:
            file.write("x")
        write(command, loop)

    play([stage(1), stage(2, [1]), stage(1, total=5)], once)
    assert Path("order").read_text() == "xx"
    assert "[own 1/5] step 1\n    up to date: done; " in shown()


def test_lines_come_with_the_name_of_their_stage(folder, shown, capfd):
    """Alarms on stdout and errors on stderr, also one whose line does not end; what a stage prints is in its log."""

    def say(command, loop):
        os.write(1, b"for the log")
        logging.getLogger("cream").warning("an alarm of %s", command.title)
        screen.show_error("the end")
        os.write(screen.out_stream().fileno(), b"half a line")
        write(command, loop)

    play([stage(1), stage(2)], say)
    told = capfd.readouterr().err.splitlines()
    for name in ("[own 1/9]", "[own 2/9]"):
        title = f"step {name[5]}"
        lines, errors = ([line for line in text if line.startswith(name)] for text in (shown().splitlines(), told))
        assert lines == [f"{name} an alarm of {title}", f"{name} half a line", f"{name} {title}"]
        assert errors == [f"{name} the end"]
        assert "for the log" in Path(f"out/{name[5]}.log").read_text()


@pytest.mark.parametrize(("how", "code"), [("exit", 2), ("raise", 1), ("die", 137)])
def test_a_failure_ends_the_loop_once_the_others_have_ended(folder, capfd, how, code):
    """With its exit code. What reads its output does not begin."""

    def fail(command, loop):
        if command.output.stem == "1":
            wait_for("out/2.begun")
            if how == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "raise":
                raise ValueError("of a library")
            return 2
        Path("out/2.begun").touch()
        wait_for("out/1.log")
        write(command, loop)

    with pytest.raises(SystemExit) as stop:
        play([stage(1), stage(2), stage(3, [1])], fail)
    told = capfd.readouterr().err
    assert stop.value.code == code and Path("out/2.json").exists() and not Path("out/3.json").exists()
    assert f"step 1 ended with {code}; the same command resumes from there" in told
    assert ("ValueError: of a library" in told) == (how == "raise")


def test_a_signal_ends_it_once_the_stages_have_ended_what_they_do(folder):
    """They get it, too, and nothing new begins."""

    def work(command, loop):
        Path(f"out/{command.output.stem}.begun").touch()
        if command.output.stem == "1":
            wait_for("out/2.begun")
            os.kill(os.getppid(), signal.SIGTERM)
        with interrupts.deferred():
            end = time.monotonic() + LONG
            while not interrupts.received():
                assert time.monotonic() < end
                time.sleep(0.005)
            write(command, loop)
        interrupts.check()

    with pytest.raises(interrupts.Interrupted), interrupts.listening():
        play([stage(1), stage(2), stage(3)], work)
    assert sorted(path.name for path in Path("out").glob("*.json")) == ["1.json", "2.json"]


@pytest.mark.parametrize("how", ["exit", "signal"])
@pytest.mark.parametrize("what", [None, "step 1"])
def test_the_last_stage_s_failure_is_not_missed(folder, how, what):
    """Nor a signal while it runs, whether all are waited for or it alone."""

    def fail(command, loop):
        if how == "exit":
            return 2
        os.kill(os.getppid(), signal.SIGTERM)
        with interrupts.deferred():
            while not interrupts.received():
                time.sleep(0.005)

    wanted = SystemExit if how == "exit" else interrupts.Interrupted
    with pytest.raises(wanted), interrupts.listening(), SideBySide(fail, 2, lambda: None) as runner:
        runner.run(only := stage(1))
        runner.wait(what and only.command)


def test_long_loops_are_ranked_at_once(folder):
    """By the longest chain, of which there are more than can be counted: each stage reads the two before it."""
    runner = SideBySide(write, 2, lambda: None)
    for number in range(60):
        runner.run(stage(number, [each for each in (number - 1, number - 2) if each >= 0]))
    for job in runner.jobs:
        job.ended = True
    runner.wait()
    assert [job.height for job in runner.jobs] == [*reversed(range(60))]


def test_an_exception_leaves_no_process_behind(folder):
    """Also one between two waits, as a loop that reads a fact raises it."""

    def stay(command, loop):
        if command.output.stem == "1":
            Path("pid").write_text(str(os.getpid()))
            time.sleep(LONG)
        wait_for("pid")
        write(command, loop)

    with pytest.raises(MemoryError), SideBySide(stay, 2, lambda: None) as runner:
        runner.run(stage(1))
        runner.run(stage(2))
        runner.wait(stage(2).command)
        raise MemoryError
    pid = int(Path("pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_no_descriptor_is_left_open(folder):
    before = len(os.listdir("/proc/self/fd"))
    play([stage(number) for number in range(5)])
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.slow
def test_a_fork_tokenises_after_the_imports(repo):
    """They start no thread that a fork would wait for: tokenizers' are started by the first text."""
    code = """
import multiprocessing, sys
from pathlib import Path
from cream.cli import console
console.set_up_process()
from cream.loops.side_by_side import import_for_models
import_for_models([Path("assets/tiny_m0")])
def tokenise():
    from transformers import AutoTokenizer
    assert len(AutoTokenizer.from_pretrained("assets/tiny_m0")(["a", "b"] * 50)["input_ids"]) == 100
process = multiprocessing.get_context("fork").Process(target=tokenise)
process.start()
process.join(100)
sys.exit(process.exitcode if not process.is_alive() else process.kill() or 9)
"""
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "true", "PYTHONPATH": str(repo)}
    assert subprocess.run([sys.executable, "-c", code], cwd=repo, env=environment).returncode == 0
