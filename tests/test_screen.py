"""Where messages go: what the terminal shows by hand and in a loop, and what only a stage's log file has."""

import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from cream.cli import screen
from cream.loops.outcome import outcome, sentences
from cream.loops.plan import Command
from cream.loops.stage_log import StageLog

STAGE = """
import logging, os, subprocess, sys
from pathlib import Path
from cream.cli import console, screen
from cream.cli.console import log
from cream.errors import UserError
from cream.loops.stage_log import StageLog

OTHER = "from cream.cli.console import *; set_up_process(); "
OTHER += "log.info('detail of a child'); log.warning('alarm of a child')"

@console.stage
def inner(argv):
    log.info("a detail")
    log.log(screen.PROGRESS, "3 of 9")
    screen.say_result("a result")
    os.system("echo noise of a library; echo more of it >&2")
    subprocess.run([sys.executable, "-c", OTHER], check=True)
    Path("x.json").write_text("{}")
    log.warning("alarm: \\x1b[31m\\u202e")
    raise UserError("first line\\nlast line")

@console.stage
def outer(argv):
    screen.choose("quiet" in argv, "verbose" in argv)
    log.info("title")
    stage_log = StageLog(Path("x.json"))
    with stage_log.opened("$ python x.py"):
        try:
            inner([])
        except SystemExit as stop:
            assert stop.code == 2
    assert stage_log.wrote()
    log.info("ended")

outer(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("given", ["", "quiet", "verbose"])
def test_a_stage_of_a_loop(tmp_path, repo, given):
    """The terminal has what matters, whichever process says it; the log file has everything."""
    env = os.environ | {"PYTHONPATH": str(repo)}
    argv = [sys.executable, "-c", STAGE, *given.split()]
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    alarms = ["alarm of a child", r"alarm: \x1b[31m\u202e"]
    assert done.stderr.splitlines()[-2:] == ["error: first line", "last line"]
    logged = (tmp_path / "x.log").read_text()
    if given == "verbose":
        assert {"noise of a library", "detail of a child", "a detail", *alarms} <= {*done.stdout.splitlines()}
        assert "more of it" in done.stderr
    else:
        shown = ["title", "3 of 9", *alarms, "ended"] if not given else alarms
        assert done.stdout.splitlines() == shown and "more of it" not in done.stderr
        assert "noise of a library\nmore of it\n" in logged and "error: first line\nlast line\n" in logged
    assert logged.startswith("$ python x.py\na detail\n3 of 9\na result\n")
    assert "detail of a child" in logged and alarms[1] in logged and "title" not in logged


def test_a_stage_that_writes_nothing_leaves_its_log_as_it_was(tmp_path):
    for line in ("first", "second"):
        stage_log = StageLog(tmp_path / "new/run")
        stage_log.path.parent.mkdir(exist_ok=True)
        with open(stage_log.path, "a") as file:
            file.write(f"{line}\n")
        if line == "first":
            (tmp_path / "new/run").mkdir()
            (tmp_path / "new/run/meta.json").touch()
            assert stage_log.wrote() and stage_log.end() == "first"
            before = stage_log.path.stat()
        else:
            assert not stage_log.wrote()
            stage_log.undo()
    assert stage_log.path.read_text() == "first\n" and stage_log.path.stat().st_mtime_ns == before.st_mtime_ns
    other = StageLog(tmp_path / "some/where/x.jsonl")
    other.path.parent.mkdir(parents=True)
    other.path.touch()
    other.undo()
    assert other.path.name == "x.log" and not (tmp_path / "some").exists()


@pytest.mark.parametrize(
    "mode, in_loop, shown",
    [
        (None, False, "INFO PROGRESS SUMMARY WARNING"),
        ("verbose", False, "INFO PROGRESS SUMMARY WARNING"),
        ("quiet", False, "SUMMARY WARNING"),
        (None, True, "PROGRESS WARNING"),
        ("quiet", True, "WARNING"),
    ],
)
def test_what_the_terminal_shows(monkeypatch, mode, in_loop, shown):
    for name, value in ((screen.MODE, mode), (screen.TERMINAL, "1:2" if in_loop else None)):
        monkeypatch.delenv(name, raising=False)
        if value:
            monkeypatch.setenv(name, value)
    levels = {"INFO": logging.INFO, "PROGRESS": screen.PROGRESS, "SUMMARY": screen.SUMMARY, "WARNING": logging.WARNING}
    assert [name for name, level in levels.items() if screen._is_shown(level)] == shown.split()


def test_texts_are_shown_as_texts():
    plain = "schön 2 × 3 ≠ 5\n\tنص 文字 👩\u200d🔬 "
    assert screen.plain(plain) == plain
    assert screen.plain("\x1b]0;x\x07\r\b\u202e\u2028\x9b") == r"\x1b]0;x\x07\r\x08\u202e\u2028\x9b"


def test_quiet_leaves_results(capfd, repo, tmp_path):
    """Of a stage by hand; as a flag it decides nothing, and contradicts --verbose."""
    from report import main

    path = tmp_path / "x.json"
    path.write_text("{}")
    with pytest.raises(SystemExit) as ended:
        main(["lineage", str(path), "--quiet", "--verbose"])
    assert ended.value.code == 2 and "--quiet and --verbose contradict each other" in capfd.readouterr().err
    assert screen.MODE not in os.environ


def step(tmp_path, script, name, about, flags=None, rows=None):
    from cream.files import store

    command = Command(name, script, flags or {}, tmp_path / name)
    if script == "train.py":
        command.output.mkdir()
        store.write_json(command.output / "meta.json", about)
    else:
        store.write_json(tmp_path / f"{name}.meta.json", about)
    if rows:
        store.write_json(tmp_path / f"{name.removesuffix('.json')}.summary.json", {"tasks": rows})
    return command


def test_what_came_of_a_step(tmp_path):
    counts = {"counts": {"out": 300, "dropped": {"constant": 2, "few": 1}}}
    row = {"task": "add", "n": 100, "correct": 50, "accuracy": 0.5, "low": 0.4, "high": 0.6}
    row |= {"unanswered_rate": 0.0, "truncated_rate": 0.25}
    sampled = {"responses": 1800, "distinct": 1305, "truncated": 4}
    rewarded = {"rewarded": {"responses": 1800, "rewarded": 1797, "mean": -1.23456, "tied": 0.025}}
    evaluated = {"mode": "evaluation"}
    for script, about, more, said in [
        ("infer.py", counts, {"flags": evaluated, "rows": [row]},
         "accuracy 50.0 %, 95 % interval 40.0 to 60.0, 300 questions, 25.0 % truncated"),
        ("infer.py", counts | {"sampled": sampled}, {},
         "1800 responses to 300 prompts, 1305 distinct, 4 truncated"),
        ("rewarding.py", counts, {}, "300 prompts, responses without a reward: 3"),  # of an earlier version
        ("rewarding.py", counts | rewarded | {"reuse": {"policy": {"cached": 8}, "reference": {"computed": 12}}}, {},
         "1800 responses to 300 prompts, 3 without a reward, mean reward -1.235, 2.5 % tied, 8 of 20 scores from the "
         "cache"),
        ("rewarding.py", counts | rewarded, {},
         "1800 responses to 300 prompts, 3 without a reward, mean reward -1.235, 2.5 % tied"),
        ("make_pairs.py", counts | {"mean_consistency": 0.7239}, {},
         "300 pairs, mean C 0.724, without a pair: 3 prompts"),
        ("train.py", {"counts": {"trained_on": 299}, "last": {"lr": 1e-5, "loss": 0.39071, "accuracy": 0.95}}, {},
         "trained on 299 records, loss 0.3907, training accuracy 95.0 %"),
        ("infer.py", {}, {"flags": evaluated}, "done"),
    ]:  # fmt: skip
        name = f"{len([*tmp_path.iterdir()])}.json"
        assert outcome(step(tmp_path, script, name, about, **more)) == said


def test_three_sentences(tmp_path, monkeypatch):
    from cream.loops import facts
    from cream.loops.facts import Fact

    row = {"task": "add", "n": 100, "correct": 50, "accuracy": 0.5, "low": 0.4, "high": 0.6}
    flags = {"mode": "evaluation", "name": "test"}
    courses = []
    for title, accuracy, c in (("SRLM", 0.762, [0.72, 0.92]), ("CREAM", 0.819, [0.72, 0.93])):
        (tmp_path / title).mkdir()
        ran = [
            step(tmp_path / title, "infer.py", f"{model}.evaluation.json", {}, flags, [row | {"accuracy": value}])
            for model, value in (("M0", 0.303), ("M3", accuracy))
        ]
        rows = [{"model": f"M{t}", "consistency": each} for t, each in enumerate([None, *c])]
        rows += [{"model": "test", "consistency": c[0]}, {"model": "best", "consistency": c[-1]}]  # again
        rows += [{"model": "RM1", "consistency": 0.99, "shown": {"kept %": 40.0}}]  # not a C
        loop = SimpleNamespace(title=title)
        courses.append(SimpleNamespace(loop=loop, ran=ran, best=None, results=lambda rows=rows: rows))
    monkeypatch.setattr(facts, "difference", lambda *_: Fact(0.057, 0.035, 0.079, share=True))
    found = [SimpleNamespace(fired=[("accuracy of M3", {})] * 2), SimpleNamespace(fired=[])]
    c = "Mean C, how far the two last models rank alike (1 fully, 0.5 by chance): "
    assert [*sentences(courses, found)] == [
        "CREAM ended highest: M3 at 81.9 %, 5.7 points above SRLM M3 at 76.2 % "
        "(95 % interval of the difference +3.5 to +7.9).",
        f"{c}SRLM 0.72 -> 0.92; CREAM 0.72 -> 0.93.",
        "Alarms (!): SRLM, accuracy of M3.",
    ]
    assert [*sentences(courses[1:], found[1:])] == [
        "CREAM ended with M3 at 81.9 %, 5.7 points above M0 at 30.3 % (95 % interval of the difference +3.5 to +7.9).",
        f"{c}CREAM 0.72 -> 0.93.",
        "No alarm sounded.",
    ]
