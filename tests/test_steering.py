"""Steering of loops: which rounds run, which model is the result, what is deleted. Stages are stood in for by functions
that write what a stage's sidecar and summary would say; one small loop runs for real."""

import dataclasses
import json
import os
import shutil
from contextlib import suppress
from functools import partial
from html import escape
from pathlib import Path
from statistics import fmean

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import iterate
from cream.errors import UserError
from cream.evaluation.statistics import summarise, wilson_interval
from cream.files import store
from cream.loops import disk, facts
from cream.loops.alarmed import Alarms
from cream.loops.course import Course
from cream.loops.decisions import NAME
from cream.loops.options import LoopFlags
from cream.loops.outcome import sentences
from cream.loops.plan import TRAIN, Command
from cream.loops.reading import read_loop
from cream.loops.results import table
from cream.loops.trials import Trial, model_of
from cream.reporting import markdown
from cream.reporting.outputs import of_loop, of_places
from cream.reporting.sections import steering

QUESTIONS = 40  # of either task
TRAINED = {"checkpoint": "${train@-1}", "name": "${pairs}", "train_stage": "dpo"}
EVALUATED = {"mode": "evaluation", "name": "tiny_test"}
LOOP = {
    "title": "own",
    "model": "tiny",
    "output_dir": "out",
    "base_dir": "base",
    "rounds": 4,
    "before": [
        {"id": "m1", "script": "train.py", "output": "M1", "shared": True, "flags": {"name": "tiny_sft"}},
        {"id": "m1.accuracy", "script": "infer.py", "shared": True, "flags": EVALUATED | {"checkpoint": "${m1}"}},
    ],
    "start": {"train": "${m1}"},
    "repeat": [
        {
            "id": "samples",
            "script": "infer.py",
            "flags": {"checkpoint": "${train@-1}", "name": "tiny_prompt_1", "seed": "${seed+round}"},
        },
        {
            "id": "rewards",
            "script": "rewarding.py",
            "flags": {"input_file": "${samples}", "checkpoint": "${train@-1}"},
        },
        {
            "id": "before",
            "script": "rewarding.py",
            "flags": {
                "input_file": "${samples}",
                "reward": "likelihood",
                "checkpoint": {"first": "none", "then": "${train@-2}"},
            },
        },
        {"id": "pairs", "script": "cal_consistency.py", "flags": {"file1": "${rewards}", "file2": "${before}"}},
        {"id": "train", "script": "train.py", "output": "M${round+1}", "flags": TRAINED},
        {"id": "accuracy", "script": "infer.py", "flags": EVALUATED | {"checkpoint": "${train}"}},
    ],
    "after": [{"id": "test", "script": "infer.py", "flags": EVALUATED | {"checkpoint": "${best}"}}],
    "keep": {"metric": "accuracy", "start": "m1.accuracy", "patience": 1},
}


KEEP = LOOP["keep"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(iterate, "check_commands", lambda *_: [])  # of every flag: tests/test_iterate.py
    monkeypatch.setattr(iterate, "CHECKPOINTS", tmp_path / "checkpoint.json")
    return tmp_path


def load(change=None):
    Path("loop.yaml").write_text(yaml.safe_dump(LOOP | (change or {})))
    return read_loop(Path("loop.yaml"))


def course_of(change=None, **flags) -> tuple[Course, list[str]]:
    return iterate.prepare(load(change), ["cpu"], None, set(), LoopFlags(**flags))


def play(change=None, right=(), kill=None, pairs=0.9, keep=None, **flags) -> tuple[Course, list[str]]:
    """Run a loop whose model M<t+1> has `right[t]` of 2 * QUESTIONS right; `kill`: before the command of that
    number; returns the course and the titles of what was run."""
    course, problems = course_of(change, keep=keep, **flags)
    assert problems == []
    if keep:
        course.free = disk.Cleaner(tuple(keep.split(",")), iterate.CHECKPOINTS)
    return course, play_through(course, right, kill, pairs)


def play_through(course: Course, right, kill=None, pairs=0.9) -> list[str]:
    """The titles of what was run."""
    titles = []
    for number, command in enumerate(course):
        if number == kill:
            break
        make(command, right, pairs)
        titles.append(command.title)
    return titles


def make(command: Command, right, pairs=0.9) -> None:
    """What a stage would leave, once it has found the models that it reads."""
    for name in ("checkpoint", "ref_model_ckpt"):
        model = command.flags.get(name, "none")
        assert model == "none" or (Path(model) / "model.safetensors").read_text(), f"{command.title} reads {model}"
    if command.output.exists():
        return
    meta = {"settings": {}, "inputs": {}, "command": [command.script, *command.argv()], "wall_seconds": 30}
    if command.script == TRAIN:
        store.write_json(command.output / "checkpoint-7" / "cream.json", {"kind": "policy"})
        (command.output / "checkpoint-7" / "model.safetensors").write_text("w" * 1000)
        (command.output / "checkpoint-last").symlink_to("checkpoint-7")
        store.write_json(command.output / "meta.json", meta | {"last": {"kl": 0.25}})
        return
    rows = [{"uuid": "a", "score": 1}]
    if command.flags.get("mode") == "evaluation":
        t = int(Path(command.flags["checkpoint"]).resolve().parent.name[1:]) - 1
        rows = answers(right[t])
        store.write_json(facts.source(command), {"tasks": summarise(rows)})
    elif command.script == "cal_consistency.py":
        prompt = [{"role": "user", "content": "?"}]
        both = {name: [*prompt, {"role": "assistant", "content": name}] for name in ("selected", "rejected")}
        share = pairs[command.place.round - 1] if isinstance(pairs, list) else pairs
        cs = [0.25 if i >= round(10 * share) else 0.75 for i in range(10)]
        rows = [{"uuid": f"p{i}", "prompt": prompt, **both, "consistency": c} for i, c in enumerate(cs)]
        meta |= {"mean_consistency": fmean(cs), "counts": {"out": 10}}
    store.write_rows(command.output, rows)
    store.write_json(command.output.with_name(f"{command.output.name}.meta.json"), meta)


def answers(right: int) -> list[dict]:
    """Evaluation records of two tasks, of which so many are right, from the first on."""
    return [
        {
            "uuid": f"q{i}",
            "question": f"{i}?",
            "label": "1",
            "task": f"t{i % 2}",
            "responses": "so",
            "final_prediction": "1" if i < right else "2",
            "correct": i < right,
            "num_tokens": 4,
        }
        for i in range(2 * QUESTIONS)
    ]


def decisions():
    return json.loads(Path("out", NAME).read_text())


# Best and last ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "rounds", "best"),
    [
        ([30, 40, 50, 45, 70], 3, 2),  # falls: later rounds are not run
        pytest.param([30, 40, 50, 60, 70], 4, 4, marks=pytest.mark.slow),  # does not fire
        pytest.param([50, 40, 50, 60, 70], 1, 0, marks=pytest.mark.slow),  # M1 stays
        pytest.param([30, 40, 40, 60, 70], 2, 1, marks=pytest.mark.slow),  # a tie is no new best: the earlier one stays
    ],
)
def test_patience_ends_a_loop_and_the_best_round_is_its_result(folder, right, rounds, best):
    course, titles = play(right=right)
    assert (course.round, course.best.round, course.done) == (rounds, best, True)
    assert titles == [each.title for each in course.planned if each.place.round <= rounds]
    assert os.readlink("out/best") == (f"M{best + 1}/checkpoint-last" if best else "../base/M1/checkpoint-last")
    told = decisions()
    assert [each["metric"]["value"] for each in told["rounds"]] == [r / 2 / QUESTIONS for r in right[: rounds + 1]]
    assert told["best"] == {"round": best, "model": os.readlink("out/best"), "registered": None}
    assert (told["stopped"] or {}).get("round") == (rounds if best < rounds else None)
    rows = {row["model"]: row for row in course.results()}
    assert rows["test"]["accuracy"] == right[best] / 2 / QUESTIONS


def test_the_result_is_quoted_on_the_test_set_where_there_is_one(folder):
    def on_validation(step):
        return {**step, "flags": step["flags"] | {"name": "tiny_val"}}

    before = [LOOP["before"][0], on_validation(LOOP["before"][1])]
    repeat = [*LOOP["repeat"][:-1], on_validation(LOOP["repeat"][-1])]
    for change, rest in (
        ({"before": before, "repeat": repeat}, " on tiny_test, chosen by tiny_val (62.5 % there)."),
        ({"output_dir": "again", "after": []}, ", 25.0 points above m1.accuracy at 37.5 % ("),
    ):
        course, _ = play(change, right=[30, 50, 45])
        first, *_ = sentences([course], [Alarms([], set())])
        assert first.startswith(f"own ended with round1.accuracy at 62.5 %{rest}"), first
        labels = table([("own", course.results())]).count("(validation)")
        assert labels == (4 if "before" in change else 0)
        assert first.endswith(", chosen on the same questions (tiny_test).") is not ("before" in change)


@pytest.mark.slow
def test_what_is_decided_is_said_with_its_intervals(folder):
    course, _ = play(right=[30, 44, 40, 60, 70])
    said = [each["text"] for each in decisions()["said"]]
    assert [text.partition(",")[0].partition(" [")[0] for text in said] == [
        "before round 1: m1.accuracy 37.5 %",
        "round 1: accuracy 55.0 %",
        "round 2: accuracy 50.0 %",
        "result: the model of round 1",
    ]
    assert "a new best: +17.5 points [+" in said[1] and "inside" not in said[1]
    assert "no new best: -5.0 points [-10.0, -1.2] against round 1; 1 evaluated round without" in said[2]
    assert said[3].endswith("points [+1.2, +10.0] against round 2; it is out/best")
    _, low, high = facts.read(course.trials[0].command, "t0")[:3]
    assert (low, high) == wilson_interval(15, 40)
    assert [line.partition(":")[0] for line in course.notes()] == ["ended in round 2 of 4", "result"]
    Path("out").rename("far")
    one_more = [30, 44, 43, 60, 70]
    play(right=one_more)
    assert "inside the interval: the two may be equally good" in decisions()["said"][2]["text"]


@pytest.mark.slow
def test_the_report_says_what_was_decided_and_why(folder):
    """In its numbers, its page and its Markdown; of a loop, and of its folder. A loop that decides nothing has no such
    section, whatever an earlier one of its folder decided."""
    change = {"stop_if": {"pairs.below_half": {"above": 0.5}, "pairs.mean_consistency": {"drift": 0.9}}}
    course, _ = play(change, [30, 44, 40, 60, 70])
    run = of_loop(course)
    (decided,), told = steering.collect(run), decisions()
    assert decided == {name: told[name] for name in content(told)} | {"file": "out/decisions.json"}
    assert steering.collect(of_places("all", [Path("out/round1.accuracy.json")])) == [decided]
    html = steering.show([{"title": "<own>", "steering": [decided]}]).html
    assert "&lt;own&gt;" in html and "Ended in round 2: 1 evaluated round without a new best (patience)." in html
    assert "Kept: round 1, M2/checkpoint-last." in html and all(escape(each["text"]) in html for each in told["said"])
    assert "it keeps the round with the highest accuracy; patience 1" in html
    assert "it ends where pairs.below_half is above 0.5; it ends where pairs.mean_consistency drifts" in html
    (plot,) = msgspec.json.decode(
        steering.show([{"title": "own", "steering": [decided]}]).data["steering-figures"]
    ).values()
    measured, kept = plot["data"]
    assert (measured["x"], measured["y"], kept["x"], kept["y"]) == ([0, 1, 2], [37.5, 55.0, 50.0], [1], [55.0])
    assert plot["layout"]["yaxis"]["title"]["text"] == "accuracy, %" and len(measured["error_y"]["array"]) == 3
    (rule, said) = markdown.decisions({"steering": [decided]})
    assert "patience 1" in rule and said.count("\n- ") == len(told["said"]) - 1 and "no new best" in said
    plain = msgspec.structs.replace(course.loop, keep=None, stop_if={})
    undecided = of_loop(Course(plain, course.replan))
    assert steering.collect(undecided) == [] and steering.show([{"title": "t", "steering": []}]) is None
    store.write_json(Path("out", NAME), told | {"rounds": [{"round": 1}]})
    with pytest.raises(UserError, match="decisions.json: damaged: Object missing required field"):
        steering.collect(run)


@pytest.mark.slow
def test_a_finished_loop_runs_again_without_a_change(folder):
    right = [30, 40, 50, 45, 70]
    first, titles = play(right=right)
    before = {path: (path.lstat().st_mtime_ns, path.lstat().st_ino) for path in Path().glob("*/**/*")}
    again, same = play(right=right)
    assert same == titles and again.results() == first.results() and again.notes() == first.notes()
    assert before == {path: (path.lstat().st_mtime_ns, path.lstat().st_ino) for path in before}
    play({"keep": KEEP | {"patience": 2}}, right)  # more patience: it goes on
    assert [each["round"] for each in decisions()["rounds"]] == [0, 1, 2, 3, 4] and decisions()["stopped"] is None


def test_a_loop_with_fewer_rounds_than_before_forgets_what_was_decided_later(folder):
    change, pairs = {"stop_if": {"pairs.below_half": {"above": 0.5}}, "keep": None, "after": []}, [0.9, 0.9, 0.3]
    play(change, [30, 40, 50, 45], pairs=pairs)
    assert decisions()["stopped"]["round"] == 3
    play(change | {"rounds": 2}, [30, 40, 50, 45], pairs=pairs)
    assert (decisions()["stopped"], decisions()["said"]) == (None, [])


@pytest.mark.slow
def test_a_killed_loop_resumes_with_the_same_decisions(folder, monkeypatch):
    """Killed before a command, and before a decision is written, or a file deleted."""
    change = {"rounds": 3, "keep": KEEP | {"patience": 2, "roll_back": True}}
    right, write, unlink = [30, 50, 45, 40], store.write_json, Path.unlink
    course, titles = play(change, right, keep="best,last")
    undisturbed, weights = decisions(), sorted(Path().glob("*/*/*/model.safetensors"))
    left = 0

    def count(do, path, *args, **how):
        nonlocal left
        if path.name in (NAME, "model.safetensors") and (left := left - 1) == -1:
            raise KeyboardInterrupt
        do(path, *args, **how)

    for kind, number in [*(("command", i) for i in range(2, len(titles), 4)), *(("file", i) for i in range(9))]:
        for name in ("out", "base"):
            shutil.rmtree(name)
        left = number if kind == "file" else 1000
        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr(store, "write_json", partial(count, write))
            patch.setattr(Path, "unlink", lambda path, **how: count(unlink, path, **how))
            play_through(course, right, kill=number if kind == "command" else None)
        play_through(course, right)
        assert content(decisions()) == content(undisturbed)
        assert sorted(Path().glob("*/*/*/model.safetensors")) == weights


def content(told: dict) -> dict:
    return {name: told[name] for name in ("loop", "rounds", "said", "stopped", "best", "deleted")}


@given(st.lists(st.integers(0, 80), min_size=1), st.sampled_from(["max", "min"]))
def test_the_best_is_the_first_of_the_extreme_ones(values, mode):
    course = object.__new__(Course)
    course.loop = dataclasses.make_dataclass("L", ["keep"])(dataclasses.make_dataclass("K", ["mode"])(mode))
    course.trials = [Trial(t, t - 1, None, "m", facts.Fact(v)) for t, v in enumerate(values)]
    assert course.best.round == values.index(max(values) if mode == "max" else min(values))


# Where a round starts -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_round_that_rolls_back_reads_the_line_of_the_best(folder):
    """Round 2 is worse than round 1: round 3 samples from M2, and its previous model is the one that M2 is from."""
    change = {"keep": KEEP | {"patience": 2, "roll_back": True}, "rounds": 4}
    course, _ = play(change, [30, 50, 45, 55, 60])
    flags = {each.title: each.flags for each in course.ran}
    m1, m2, m4 = "base/M1/checkpoint-last", "out/M2/checkpoint-last", "out/M4/checkpoint-last"
    read = [
        (flags[f"round {t}: samples"]["checkpoint"], flags[f"round {t}: before"]["checkpoint"]) for t in range(1, 5)
    ]
    assert read == [(m1, "none"), (m2, m1), (m2, m1), (m4, m2)]
    assert [each["starts_from"] for each in decisions()["rounds"]] == [None, 0, 1, 1, 3]
    assert flags["round 3: samples"]["seed"] == "3"


@pytest.mark.slow
def test_a_round_that_rolls_back_to_the_start_is_as_the_first(folder):
    change = {"keep": KEEP | {"patience": 2, "roll_back": True}}
    course, _ = play(change, [30, 20, 35, 40, 50])
    flags = {each.title: each.flags for each in course.ran}
    assert (
        flags["round 2: before"]["checkpoint"] == "none"
        and flags["round 3: before"]["checkpoint"] == "base/M1/checkpoint-last"
    )


# Thresholds ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_threshold_before_training_ends_the_loop_at_once(folder):
    change = {"stop_if": {"pairs.below_half": {"above": 0.5}}, "keep": {"metric": "accuracy"}}
    course, titles = play(change, [30, 40, 50, 60, 70], pairs=[0.9, 0.4, 0.9, 0.9])
    assert titles[-2:] == ["round 2: pairs", "test"] and (course.round, course.best.round) == (1, 1)
    assert decisions()["stopped"] == {"round": 2, "why": "pairs.below_half is 60.0 %, above 50.0"}


@pytest.mark.slow
def test_a_threshold_in_round_1_leaves_no_best(folder):
    change = {"stop_if": {"pairs.mean_consistency": {"below": 0.7}}, "keep": {"metric": "accuracy"}}
    course, titles = play(change, [30, 40], pairs=0.1)
    assert titles[-1] == "round 1: pairs" and course.best is None and not Path("out/best").exists()


@pytest.mark.slow
def test_a_threshold_after_training_lets_the_round_end(folder):
    change = {"stop_if": {"train.kl": {"above": 0.2}}, "keep": KEEP | {"patience": None}}
    course, titles = play(change, [30, 40, 50, 60, 70])
    assert titles[-2:] == ["round 1: accuracy", "test"] and course.best.round == 1


@pytest.mark.slow
def test_drift_is_against_round_1(folder):
    change = {"stop_if": {"pairs.mean_consistency": {"drift": 0.3}}, "keep": KEEP | {"patience": None}}
    course, _ = play(change, [30, 40, 50, 60, 70], pairs=[0.8, 0.7, 0.4, 0.4])
    assert course.round == 2 and "-31 % against 0.65 in round 1" in course.stop.why


@pytest.mark.slow
def test_evaluations_in_every_second_round_and_in_the_last(folder):
    course, titles = play({"eval_every": 2, "rounds": 3}, [30, 40, 50, 60])
    assert [title for title in titles if "accuracy" in title] == [
        "m1.accuracy",
        "round 2: accuracy",
        "round 3: accuracy",
    ]
    change = {"eval_every": 3, "stop_if": {"pairs.below_half": {"above": 0.5}}}
    Path("out").rename("earlier")
    course, titles = play(change, [30, 40, 50, 60, 70], pairs=[0.9, 0.4, 0.9, 0.9])
    assert titles[-3:] == ["round 2: pairs", "round 1: accuracy", "test"]  # what has become the last round


# A part of a loop ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_from_and_until(folder):
    right = [30, 40, 50, 60, 70]
    course, titles = play(right=right, until="1")
    assert titles[-1] == "round 1: accuracy" and not course.done and not Path("out/best").exists()
    assert [each["round"] for each in decisions()["rounds"]] == [0, 1]
    _, titles = play(right=right, until="pairs@2", from_step="2")
    assert titles == [f"round 2: {name}" for name in ("samples", "rewards", "before", "pairs")]
    course, titles = play(right=right, from_step="train@2")
    assert titles[0] == "round 2: train" and course.best.round == 4
    assert len(course.results()) == 1 + 4 + 1 + 1  # with those of earlier rounds
    for flags, problem in (
        ({"from_step": "5"}, "--from 5: the loop has rounds 1 to 4"),
        ({"until": "trian"}, "--until trian: neither a round nor a step; did you mean train?; the steps are"),
        ({"from_step": "3", "until": "2"}, "--from 3 is after --until 2"),
    ):
        assert any(problem in told for told in course_of(**flags)[1])
    Path("out/M3/checkpoint-last").unlink()
    assert "round 2: train has not run: out/M3/checkpoint-last is not there" in course_of(from_step="3")[1][0]


# What is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"keep": KEEP | {"metric": "acuracy"}}, "keep: metric: no step has the id acuracy; did you mean accuracy"),
        ({"keep": KEEP | {"metric": "m1.accuracy"}}, "keep: metric: m1.accuracy is not a step of `repeat`"),
        ({"keep": KEEP | {"metric": "accuracy.tiny_ad"}}, "it has no fact tiny_ad; did you mean tiny_add"),
        ({"keep": KEEP | {"metric": "samples.length"}}, "keep: metric: samples.length: it has no fact length"),
        ({"keep": KEEP | {"metric": "samples.truncated"}}, "samples does not measure a model that a step of `repeat`"),
        ({"keep": KEEP | {"metric": "train.eval_accuracy"}}, "the step holds no records out; --eval_name or"),
        ({"keep": KEEP | {"start": "accuracy"}}, "keep: start: accuracy is not a step before the rounds"),
        ({"stop_if": {"pears": {"above": 1}}}, "stop_if: no step has the id pears; did you mean pairs"),
        ({"stop_if": {"train": {"above": 1}}}, "stop_if: train: which of its facts is missing: train.NAME"),
        ({"keep": None}, "test: --checkpoint: ${best}: no step has the id best"),
        ({"flags": {"samples": {"checkpoint": "${best}"}}}, "${best}: the best round is known after the rounds"),
        (
            {"eval_every": 2, "flags": {"rewards": {"file": "${accuracy}"}}},
            "which most rounds do not have, by eval_every 2",
        ),
        (
            {"keep": KEEP | {"roll_back": True}, "flags": {"samples": {"seed": 1}}},
            "round 2, started again from the same",
        ),
        ({"after": [{"id": "best", "script": "infer.py"}]}, "best is not an id where there is `keep`"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(folder, change, problem, monkeypatch):
    problems = course_of(change)[1]
    assert any(problem in told for told in problems), problems


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": KEEP | {"mode": "most"}}, "Invalid enum value 'most'"),
        ({"keep": KEEP | {"patience": 0}}, "Expected `int` >= 1"),
        ({"keep": {}}, "missing required key `metric`"),
        ({"stop_if": {"accuracy": {}}}, "expected `below`, `above` or `drift`"),
        ({"eval_every": 0}, "Expected `int` >= 1"),
    ],
)
def test_malformed_keys_are_refused(folder, change, message):
    with pytest.raises(UserError) as caught:
        load(change)
    assert message in str(caught.value)


@pytest.mark.slow
def test_a_fact_that_is_not_there_is_said_with_those_that_are(folder):
    with pytest.raises(UserError, match="has no number 'kll'; did you mean kl"):
        play({"stop_if": {"train.kll": {"above": 1}}}, [30, 40])
    Path("base/m1.accuracy.summary.json").write_text('{"tasks": [{"task": "x"}]}')
    with pytest.raises(UserError, match="summary.json: damaged"):
        play(right=[30, 40])
    for held in ({"deleted": 7}, {"loop": {"keep": {"patience": 1}}}, {"loop": {"stop_if": {"x": {"above": "1"}}}}):
        store.write_json(Path("out", NAME), held)
        with pytest.raises(UserError, match="decisions.json: damaged"):
            play(right=[30, 40])


# What stays on disk -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("roll_back", [False, True])
@pytest.mark.parametrize("right", [[30, 50, 45, 40, 55], [60, 50, 45, 40, 50]])
def test_keep_deletes_what_no_step_needs(folder, right, roll_back):
    """`make` looks for each model that a command reads. What was deleted is not made again, and what is shared,
    registered or read by another loop stays."""
    change = {"keep": KEEP | {"patience": None, "roll_back": roll_back}}
    Path("checkpoint.json").write_text(json.dumps({"mine": str(folder / "out/M3/checkpoint-last")}))
    course, titles = play(change, right, keep="best,last")
    there = {path.parent.parent.name for path in Path(".").glob("*/M*/checkpoint-7/model.safetensors")}
    assert there == {"M1", "M3", "M5", f"M{course.best.round + 1}"}
    assert decisions()["deleted"].keys() == {"M2", "M3", "M4", "M5"} - there
    assert (Path("out/M2/checkpoint-last/cream.json")).exists()
    before = Path("out", NAME).read_bytes()
    again, titles = play(change, right, keep="best,last")
    assert Path("out", NAME).read_bytes() == before and again.results() == course.results()
    assert "M2" in there or "round 1: train" not in titles
    if "M2" not in there:
        with pytest.raises(UserError, match="says that it was made by other flags .lr: 1e-06 -> 0.5"):
            play(change | {"flags": {"train": {"lr": 0.5}}}, right)


@pytest.mark.slow
def test_keep_is_refused_where_it_would_delete_the_result(folder):
    for change, keep, problem in (
        (None, "last", "--keep last: the result would be deleted; give best,last"),
        (None, "best,first", "--keep best,first: 'first' is neither best nor last; give best,last"),
        ({"keep": None, "after": []}, "best", "without the key `keep` this loop has no best round; give last"),
    ):
        assert problem in course_of(change, keep=keep)[1][-1]


@pytest.mark.slow
def test_what_the_rest_takes_is_as_in_the_rounds_before(folder, monkeypatch):
    right = [30, 40, 50, 60, 70]
    course, _ = play(right=right, until="2")
    need = disk.estimate(course_of()[0], (), lambda _: None)
    assert len(need.left) == 2 * 6 + 1 and need.seconds == 2 * 6 * 30 and need.unknown == ["test"]
    weights = 2 * 1000
    assert weights < need.bytes < weights + 2 * 10 * 4000
    less = disk.estimate(course_of()[0], ("best", "last"), lambda _: None)
    assert less.bytes <= need.bytes
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: os.terminal_size((1, 1)) and type("U", (), {"free": 10}))
    with pytest.raises(UserError, match="--keep best,last, which deletes"):
        disk.check(course, need)


# The result's name --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_result_is_registered(folder, monkeypatch):
    change = {"keep": KEEP | {"register": "winner"}}
    course, _ = play(change, [30, 40, 50, 45, 70])
    assert json.loads(Path("checkpoint.json").read_text()) == {"winner": str(folder / "out/M3/checkpoint-last")}
    assert course_of(change)[1] == []
    other = {"winner": str(folder / "base/M1/checkpoint-last")}
    Path("checkpoint.json").write_text(json.dumps(other))
    (problem,) = course_of(change)[1]
    assert problem.startswith("keep: register: is registered in") and "for another" not in problem


@pytest.mark.slow
def test_a_dry_run_decides_nothing(folder, capsys):
    """It says what is expected by what is there, and changes nothing; of a loop that has ended it has no more."""
    right = [30, 50, 45, 55, 60]
    play(right=right, until="1")
    before = Path("out", NAME).read_bytes()
    course, _ = course_of()
    course.dry = True
    assert [each.title for each in course] == [each.title for each in course.planned]
    assert Path("out", NAME).read_bytes() == before and not Path("out/best").exists() and not course.notes()
    play(right=right)
    course, _ = course_of()
    assert len(course.expected()) == 2 + 2 * 6 + 1 and not disk.estimate(course, (), lambda _: None).left


def test_a_dry_run_says_what_is_there_and_what_would_be_deleted(folder, caplog):
    change = {"keep": {"metric": "accuracy", "start": "m1.accuracy"}}
    play(change, right=[30, 50, 45, 40, 60], until="3")
    changed = {"flags": {"samples": {"gen_n": 7}}}
    course, _ = course_of(change | changed, keep="best,last")
    with caplog.at_level("INFO", logger="cream"):
        iterate.run(course, dry_run=True, keep=("best", "last"))
    said = caplog.text
    assert "[own 1/27] m1: up to date" in said and "[own 27/27] test\n$ python" in said
    assert "samples: there, but made by other flags (gen_n: None -> 7)" in said
    deleted = [line.split(", ")[0] for line in said.splitlines() if "would delete" in line]
    assert deleted == [f"--keep best,last: would delete the checkpoints of out/{run}" for run in ("M3", "M4")]
    assert "--keep best,last: checkpoints of later rounds are deleted once they are neither best nor last" in said
    assert Path("out/M3/checkpoint-7/model.safetensors").exists()


def test_a_dry_run_compares_what_decides(folder):
    """Not how often something is logged, but a setting; what reads a step that would be made again is there, and left
    to run, as is the model of the best round."""
    play(right=[30, 50, 45])

    def made(**flags):
        course, _ = course_of({"flags": flags})
        need = disk.estimate(course, (), lambda _: None)
        return {each.title: need.made[each.output] for each in course.ran}, [each.title for each in need.left]

    plain, left = made()
    assert {*plain.values()} == {"up to date"} and not left
    assert made(m1={"log_every": 3}, train={"max_tokens_per_batch": 512, "alarm": "kl=off"}) == (plain, [])
    now, left = made(m1={"lr": 1e-4})
    assert left == [*plain] and now.pop("m1").startswith("there, but made by other flags (lr: ")
    assert {*now.values()} == {"there"}
    now, left = made(**{"m1.accuracy": {"name": "localdata/other.json"}})
    assert left == ["m1.accuracy", "test"] and now["m1.accuracy"].endswith("(name: tiny_test -> localdata/other.json)")
    now, left = made(train={"lr": 1e-4})
    assert now["round 1: pairs"] == "up to date" and now["test"] == "there" and "test" in left
    store.write_json(Path("base/M1/meta.json"), json.loads(Path("base/M1/meta.json").read_text()) | {"command": []})
    assert made()[0]["m1"] == "there, but made by other flags (command: not recorded -> train.py)"
    Path("base/M1/meta.json").unlink()
    assert made()[0] == {title: "there" if title != "m1" else "" for title in plain}


def test_what_a_loop_was_steered_by_is_said_in_words():
    """Two bounds of one fact; the best round is kept once the loop has ended."""
    best = {"round": 1, "model": "M2"}
    keep = {"metric": "accuracy", "patience": 2}
    decided = {"loop": {"keep": keep, "stop_if": {"pairs.below_half": {"above": 0.5, "drift": 0.2}}}, "said": []}
    decided |= {"stopped": None, "best": best}
    assert [*steering.rules(decided)][1:] == [
        "patience 2: it ends after 2 evaluated rounds without a new best",
        "it ends where pairs.below_half is above 0.5 or drifts from round 1 by more than 20 %",
    ]
    assert [*steering.ends(decided)] == ["Best so far: round 1, M2."]
    said = [{"round": 1, "text": "result: the model of round 1"}]
    assert [*steering.ends(decided | {"said": said})] == ["Kept: round 1, M2."]


def test_a_loop_that_measures_a_reward_ends(folder):
    """The output of evaluate_reward.py is a folder, whose rows have the sidecar."""
    step = {"id": "measured", "script": "evaluate_reward.py", "flags": {"data": "x.json", "reward_model": "${m1}"}}
    change = {"repeat": [], "rounds": 1, "keep": None, "start": {}, "after": [step]}
    course, problems = course_of(change)
    assert problems == []
    for command in course.planned[:-1]:
        make(command, [30])
    (title,) = of_loop(course).left
    assert title == "measured" and [each.title for each in disk.estimate(course, (), lambda _: None).left] == [title]
    command = course.planned[-1]
    rows = command.output / "x.rows.jsonl"
    store.write_rows(rows, [{"uuid": "a"}])
    meta = {"settings": {}, "inputs": {}, "wall_seconds": 2, "command": [command.script, *command.argv()]}
    store.write_json(rows.with_name(f"{rows.name}.meta.json"), meta)
    run, need = of_loop(course), disk.estimate(course, (), lambda _: None)
    assert run.left == [] and run.outputs[-1].kind == "measured" and not need.left
    assert need.made[command.output] == "up to date"


def test_a_reward_s_measures_are_facts(folder):
    """Of evaluate_reward.py: the score, else the accuracy over all pairs; any place in its summary; the reward model
    that it measures is the round's."""
    estimate = {"value": 0.75, "low": 0.7, "high": 0.8, "n": 40}
    summary = {"all": {"all": estimate}, "calibration": {"all": {"ece": estimate | {"value": 0.1}}}, "rows": 40}
    repeat = [
        LOOP["repeat"][0],
        {"id": "rm", "script": "train.py", "flags": TRAINED | {"name": "x.json", "checkpoint": "${train@-1}"}},
        {"id": "rewards", "script": "rewarding.py", "flags": {"input_file": "${samples}", "reward_model": "${rm}"}},
        {"id": "measured", "script": "evaluate_reward.py", "flags": {"rewards": "${rewards}", "gold": "labels.json"}},
        *LOOP["repeat"][3:],
    ]
    repeat[4] = repeat[4] | {"flags": {"file1": "${rewards}"}}
    course, problems = course_of({"repeat": repeat, "keep": {"metric": "measured"}})
    assert problems == []
    command = next(each for each in course.planned if each.step == "measured")
    assert command.output == Path("out/round1.measured") and command.flags["output_dir"] == "out/round1.measured"
    assert model_of(command, course.planned) == "out/round1.rm/checkpoint-last"
    store.write_json(command.output / "round1.rewards.summary.json", summary)
    assert facts.read(command, "") == facts.Fact(0.75, 0.7, 0.8, share=True)
    assert facts.read(command, "calibration.all.ece") == facts.Fact(0.1, 0.7, 0.8)
    assert facts.read(command, "rows").value == 40
    problems = course_of({"repeat": repeat, "keep": {"metric": "measured.scores"}})[1]
    assert "keep: metric: measured.scores: it has no fact scores; did you mean score" in problems[0]
    store.write_json(command.output / "score.summary.json", summary)
    with pytest.raises(UserError, match="expected one summary of evaluate_reward.py there, found 2"):
        facts.read(command, "")


def test_facts_of_samples_and_of_a_training(folder):
    """Counted by hand; a training's held-out accuracy has its interval."""
    course, _ = course_of()
    samples, train = (next(c for c in course.planned if c.step == name) for name in ("samples", "train"))
    prompt = [{"role": "user", "content": "?"}]
    said = (("a", ["x", "x"], ["stop", "length"], [1, 5]), ("b", ["x", "y"], ["stop", "stop"], [2, 4]))
    names = ("uuid", "responses", "finish_reason", "num_tokens")
    rows = [{"prompt": prompt, **dict(zip(names, each, strict=True))} for each in said]
    store.write_rows(samples.output, rows)
    store.write_json(samples.output.with_name(f"{samples.output.name}.meta.json"), {"counts": {"out": 2}})
    found = [facts.read(samples, name).value for name in ("mean_tokens", "truncated", "distinct")]
    assert found == [3, 0.25, 0.75]
    last = {"eval_accuracy": 0.8, "eval_accuracy_low": 0.7, "eval_accuracy_high": 0.9, "loss": 0.5}
    store.write_json(train.output / "meta.json", {"last": last, "counts": {"mean_c": 0.75}})
    assert facts.read(train, "eval_accuracy") == facts.Fact(0.8, 0.7, 0.9, share=True)
    assert [facts.read(train, name).value for name in ("loss", "last.loss", "mean_c")] == [0.5, 0.5, 0.75]
    assert str(facts.Fact(0.8, 0.7, 0.9, share=True)) == "80.0 % [70.0, 90.0]" and str(facts.Fact(31.25)) == "31.25"
