"""infer.py --mode evaluation as a command: several answers that vote, examples in front of each question."""

import json
import os
import select
import signal
from collections import Counter
from itertools import combinations

import pytest

from cream.evaluation.tasks import grade

ON = "infer.py --device cpu --model tiny --mode evaluation --name tiny_test --gen_max_tokens 40"
VOTE = f"{ON} --max_tokens_per_batch 700 --gen_n 4 --gen_temperature 1.0 --top_p 1.0 --output_dir outputs/"
FOLDER = "outputs/evaluation/tiny-tiny_test"
COUNT = 15


@pytest.fixture(scope="module")
def world(workspace):
    """Some questions of each kind; of the SFT data a file of examples with their solutions."""
    workspace.shorten("localdata/tiny/test.json", COUNT)
    rows = []
    for uuid, (question, answer) in workspace.read("localdata/tiny/sft.json").items():
        solution, _, label = answer["content"].rpartition(" Answer: ")
        task = "_".join(uuid.split("-")[:2])
        rows.append({"uuid": uuid, "question": question["content"], "label": label, "task": task, "solution": solution})
    workspace.write("localdata/tiny/train.json", rows)
    return workspace


@pytest.fixture(scope="module")
def votes(world):
    """What the evaluation with four answers a question printed."""
    return world.run(VOTE + "votes.json").out


def summary(world, path):
    return {row["task"]: row for row in world.read(path)["tasks"]}


# Several answers ------------------------------------------------------------------------------------------------------


def test_each_question_has_four_answers_and_their_vote(world, votes):
    records = world.read("outputs/votes.json")
    assert len(records) == COUNT and any(len({*r["all_responses"]}) > 1 for r in records.values())
    for r in records.values():
        assert [grade(r["question"], r["label"], text) for text in r["all_responses"]] == list(
            zip(r["all_predictions"], r["all_correct"], strict=True)
        )
        firsts = [r[name][0] for name in ("all_responses", "all_finish_reasons", "all_num_tokens")]
        assert [r["responses"], r["finish_reason"], r["num_tokens"]] == firsts
        counts = Counter(p for p in r["all_predictions"] if p != "none")
        best = [p for p in r["all_predictions"] if counts[p] == max(counts.values(), default=0)]
        assert r["final_prediction"] == best[0]  # the tiny world's numbers have one spelling
        assert r["correct"] == (r["final_prediction"] == r["label"].lower())


def test_their_summary(world, votes):
    """Worked out again: the vote's accuracy, and pass@j as the share of subsets of each question's answers."""
    records = world.read("outputs/votes.json").values()
    rows = summary(world, "outputs/votes.summary.json")
    macro = rows.pop("macro")
    for task, row in rows.items():
        group = [r for r in records if r["task"] == task]
        assert row["accuracy"] == pytest.approx(sum(r["correct"] for r in group) / len(group))
        for j in (1, 2, 4):
            shares = [[any(s) for s in combinations(r["all_correct"], j)] for r in group]
            assert row["pass_at"][str(j)] == pytest.approx(sum(sum(s) / len(s) for s in shares) / len(group))
        answers = [count for r in group for count in r["all_num_tokens"]]
        assert row["mean_tokens"] == pytest.approx(sum(answers) / len(answers))
    assert macro["pass_at"]["4"] == pytest.approx(sum(row["pass_at"]["4"] for row in rows.values()) / len(rows))
    assert 0 < macro["pass_at"]["1"] < macro["pass_at"]["4"] < 1
    facts = world.read("outputs/votes.summary.json")
    assert (facts["gen_n"], facts["greedy"], facts["few_shot"]) == (4, False, 0)
    assert "accuracy of vote %" in votes and "pass@4 %" in votes and "majority vote of 4 responses" in votes


def test_the_same_votes_again_stand_and_other_settings_are_refused(world, votes):
    before = world.state()
    assert "is up to date" in world.run(VOTE + "votes.json").out
    assert world.state() == before
    for flags, difference in (("--seed 1", "seed: 0 -> 1"), ("--gen_max_tokens 41", "gen_max_tokens: 40 -> 41")):
        assert difference in world.refused((VOTE + "votes.json").replace("--gen_max_tokens 40 ", "") + f" {flags}")
    assert "gen_n: 4 -> 3" in world.refused((VOTE + "votes.json").replace("--gen_n 4", "--gen_n 3"))


@pytest.mark.slow
def test_a_killed_vote_goes_on(world, votes):
    process = world.stages.start(world.folder, world.argv(VOTE + "killed.json"))
    journal = world.folder / "outputs/killed.json.partial"
    while not journal.exists() or journal.read_bytes().count(b"\n") < 3:
        assert not select.select([process], [], [], 0.002)[0], "it ended before it was killed"
    signal.pidfd_send_signal(process, signal.SIGKILL)
    os.close(process)
    assert world.stages.end().code == -signal.SIGKILL
    assert "resuming: " in world.run(VOTE + "killed.json").out
    for name in ("{}.json", "{}.summary.json"):
        assert world.read("outputs/" + name.format("killed")) == world.read("outputs/" + name.format("votes"))


@pytest.mark.slow
def test_one_answer_is_greedy_whatever_else_is_asked_for(world):
    """The spec's trap: --gen_n 1 kept the sampling temperature. Flags that do not apply decide nothing."""
    done = world.run(ON)
    assert "one response per question, greedy\n" in done.out
    hot = world.run(f"{ON} --gen_temperature 1.5 --dry_run").out
    assert "greedy: --gen_temperature without effect\n" in hot
    for flags in (
        "--gen_n 1 --gen_temperature 1.5",
        "--seed 3",
        "--gen_n 4 --gen_temperature 0",
        "--gen_n 4 --do_sample no",
    ):
        assert "is up to date" in world.run(f"{ON} {flags}").out, flags
    assert "all_responses" not in next(iter(world.read(f"{FOLDER}/results.json").values()))
    assert world.read(f"{FOLDER}/summary.json")["greedy"]
    assert f"{FOLDER}-n4/results.json" in world.run(f"{ON} --gen_n 4 --dry_run").out  # beside the greedy one


def test_rescore_grades_every_answer_again(world, votes):
    done = world.run("infer.py --mode rescore --input_file outputs/votes.json")
    assert f"0 of {COUNT} predictions changed" in done.out and "pass@4 %" in done.out
    assert world.read("outputs/votes.rescored-default.json") == world.read("outputs/votes.json")
    world.run("infer.py --mode rescore --input_file outputs/votes.json --extraction strict")
    for r in world.read("outputs/votes.rescored-strict.json").values():
        strict = [grade(r["question"], r["label"], text, strict=True) for text in r["all_responses"]]
        assert strict == list(zip(r["all_predictions"], r["all_correct"], strict=True))
        assert (r["final_prediction"], r["correct"]) in strict


def test_a_limit_per_task_takes_the_first_questions_of_each(world):
    """Of a file whose tasks are mixed; another limit is another output, and sampling has no tasks."""
    tasks = ["a", "b", "a", "a", None, "b", "c"]
    items = [{"uuid": f"u{i}", "question": f"What is {i} + 1?", "label": i + 1, "task": t} for i, t in enumerate(tasks)]
    world.write("localdata/tasks.json", items)
    command = f"{ON} --output_dir outputs/tasks.json".replace("tiny_test", "localdata/tasks.json")
    world.run(f"{command} --limit_per_task 2")
    assert list(world.read("outputs/tasks.json")) == ["u0", "u1", "u2", "u4", "u5", "u6"]
    assert "limit_per_task: 2 -> 1" in world.refused(f"{command} --limit_per_task 1")
    assert "is up to date" in world.run(f"{command} --limit_per_task 2").out
    world.run(f"{command} --limit_per_task 2 --limit_size 3 --overwrite")
    assert list(world.read("outputs/tasks.json")) == ["u0", "u1", "u2"]
    sampling = "infer.py --device cpu --model tiny --name tiny_prompt_1 --limit_per_task 2"
    assert "--limit_per_task: prompts have no task" in world.refused(sampling)


def test_a_prompt_that_does_not_fit_has_no_answers(world):
    done = world.run(VOTE + "short.json --max_length 24 --limit_size 12")
    records = world.read("outputs/short.json")
    none = [r for r in records.values() if "reason" in r]
    assert 0 < len(none) < 12 and f"{len(none)} of 12 questions count as wrong" in done.out
    assert all("all_responses" not in r and not r["correct"] and r["final_prediction"] == "none" for r in none)
    assert all(len(r["all_responses"]) == 4 for r in records.values() if "reason" not in r)
    assert {row["answers"] for row in world.read("outputs/short.summary.json")["tasks"]} == {4}


# Examples -------------------------------------------------------------------------------------------------------------

SHOTS = f"{ON} --few_shot 2 --output_dir outputs/"


@pytest.fixture(scope="module")
def shots(world):
    """What the evaluation with two examples printed."""
    return world.run(SHOTS + "shots.json").out


def test_two_examples_stand_in_front_of_every_question(world, shots):
    examples = {row["uuid"]: row for row in world.read("localdata/tiny/train.json")}
    drawn = world.read("outputs/shots.json.meta.json")["few_shot"]
    records = world.read("outputs/shots.json")
    assert drawn.keys() == {r["task"] for r in records.values()}
    assert all(len({*uuids}) == 2 and {examples[u]["task"] for u in uuids} == {task} for task, uuids in drawn.items())
    first = world.read("localdata/tiny/test.json")[0]
    turns = "".join(
        f"<user>{examples[u]['question']}<end><assistant>{examples[u]['solution']}\nAnswer: {examples[u]['label']}<end>"
        for u in drawn[first["task"]]
    )
    asked = world.read("outputs/shots.summary.json")["first_prompt"]
    assert turns in asked and asked.endswith(f"<user>{first['question']}<end><assistant>"), asked
    assert records[first["uuid"]]["question"] == first["question"]
    assert world.read("outputs/shots.summary.json")["few_shot"] == 2
    for task, uuids in drawn.items():
        assert f"{task}: 2 examples from " in shots and ", ".join(uuids) in shots


@pytest.mark.slow
def test_the_examples_file_and_the_seed_decide(world, shots):
    assert "is up to date" in world.run(SHOTS + "shots.json").out
    assert "is up to date" in world.run(SHOTS + "shots.json --few_shot_file localdata/tiny/train.json").out
    assert "seed: 0 -> 1" in world.refused(SHOTS + "shots.json --seed 1")
    assert "few_shot: 2 -> 3" in world.refused((SHOTS + "shots.json").replace("few_shot 2", "few_shot 3"))
    world.write("localdata/other.json", world.read("localdata/tiny/train.json")[1:])
    assert "examples: " in world.refused(SHOTS + "shots.json --few_shot_file localdata/other.json")
    done = world.run(f"{ON} --few_shot 2 --gen_n 4 --dry_run")
    assert f"{FOLDER}-2shot-n4/results.json" in done.out


def test_a_question_is_never_its_own_example(world):
    """With the questions themselves as examples none is left, and the message says so."""
    error = world.refused(f"{ON} --few_shot 2 --few_shot_file localdata/tiny/test.json --output_dir outputs/x.json")
    assert "has 0 examples for tiny_add (besides 5 that are asked or repeated)" in error


REFUSED = {
    "no file": (f"{ON} --few_shot 2 --few_shot_file localdata/none.json", "localdata/none.json does not exist"),
    "too few": (f"{ON} --few_shot 500", "examples for tiny_add"),
    "sampling": ("infer.py --model tiny --name tiny_prompt_1 --few_shot 2", "in --mode evaluation"),
    "no number": (f"{ON} --few_shot_file localdata/tiny/train.json", "--few_shot K"),
    "prompts": (f"{ON} --few_shot 2 --few_shot_file localdata/tiny/prompt.1.json", "expected: Evaluation data"),
}


@pytest.mark.parametrize(("command", "message"), REFUSED.values(), ids=REFUSED)
def test_examples_that_cannot_be_are_refused(world, command, message):
    assert message in world.refused(command)


def test_an_example_with_a_label_that_is_no_answer_is_refused(world):
    rows = [{"uuid": f"e{i}", "question": f"What is {i} + 1?", "label": "oxygen"} for i in range(3)]
    world.write("localdata/labels.json", rows)
    error = world.refused(f"{ON} --few_shot 2 --few_shot_file localdata/labels.json")
    assert "label 'oxygen' is not a number" in error


def test_examples_of_each_task_lie_beside_its_questions(world):
    """all_test takes every task's own train.json; a missing one is named."""
    items = world.read("localdata/tiny/test.json")
    for task, tiny in {"gsm8k": "tiny_add", "openbookqa": "tiny_compare"}.items():
        own = [{k: v for k, v in item.items() if k != "task"} for item in items if item["task"] == tiny]
        train = [r for r in world.read("localdata/tiny/train.json") if r["task"] == tiny]
        world.write(f"localdata/{task}/test.json", own)
        world.write(f"localdata/{task}/train.json", [{k: v for k, v in r.items() if k != "task"} for r in train])
    command = ON.replace("tiny_test", "all_test") + " --few_shot 1 --output_dir outputs/all.json"
    world.run(command)
    drawn = world.read("outputs/all.json.meta.json")["few_shot"]
    assert [uuids[0].split("-")[1] for uuids in (drawn["gsm8k"], drawn["openbookqa"])] == ["add", "compare"]
    assert len(json.loads((world.folder / "outputs/all.json.meta.json").read_text())["inputs"]) == 5
    (world.folder / "localdata/gsm8k/train.json").unlink()
    error = world.refused(command.replace("all.json", "other.json"))
    assert "gsm8k/train.json does not exist" in error and "openbookqa" not in error


# What is asked --------------------------------------------------------------------------------------------------------


def items(count, **changes):
    """Questions of a made-up task."""
    return [{"uuid": f"q{i}", "question": f"{i} + 2 = ?", "label": i + 2, **changes} for i in range(count)]


def test_a_label_that_cannot_be_one_is_told_before_anything_is_spent(world):
    bad = {"uuid": "late", "question": "Which?\nA. x\nB. y", "label": "C"}
    world.write("localdata/late.json", [*items(3), bad])
    command = f"{ON.replace('tiny_test', 'localdata/late.json')} --output_dir outputs/late.json"
    error = world.refused(command)
    assert "late.json" in error and "'late'" in error and "none of its options A, B" in error
    world.run(f"{command} --on_bad_record skip")
    assert world.read("outputs/late.json").keys() == {"q0", "q1", "q2"}
    (row,) = map(json.loads, (world.folder / "outputs/late.json.rejected.jsonl").read_text().splitlines())
    assert row["uuid"] == "late" and "none of its options" in row["reason"]


def test_a_summary_never_replaces_an_input(world):
    world.write("localdata/x.summary.json", items(2))
    command = f"{ON.replace('tiny_test', 'localdata/x.summary.json')} --output_dir localdata/x.json"
    assert "x.summary.json is an input, and would be replaced" in world.refused(command)


def test_a_task_that_all_test_lacks_is_named(world):
    """Its own file stands, but all_test.json, which decides, has none of it; a file elsewhere of that name is no set of
    all tasks."""
    world.write("localdata/gsm8k/test.json", items(3))
    world.write("localdata/arc-easy/test.json", [{"uuid": "a", "question": "Which?\nA. x\nB. y", "label": "B"}])
    world.write("localdata/all_test.json", items(3))
    command = ON.replace("tiny_test", "all_test") + " --dry_run"
    out = world.run(command).out
    assert "task arc_easy is not evaluated: " in out and "all_test.json has none of its questions" in out
    assert "task gsm8k" not in out and "siqa/test.json does not exist" in out
    world.write("outputs/other/all_test.json", items(3))
    assert "is not evaluated" not in world.run(command.replace("all_test", "outputs/other/all_test.json")).out
    for name in ("gsm8k/test.json", "arc-easy/test.json", "all_test.json"):
        (world.folder / "localdata" / name).unlink()


def test_rescore_reads_the_final_text_and_compares_formulas(world):
    """The thought weighs 48, or is never closed; labels that only look like a number are refused, or formulas."""
    texts = {
        "closed": "<think>The answer is 48.</think>72",
        "open": "<think>Answer: 72",
        "run_on": "Answer: 72\n\nQ: 4?",
    }
    about = {"question": "How many?", "label": "72", "task": "x", "final_prediction": "none", "correct": False}
    answers = {uuid: {"uuid": uuid, **about, "responses": text} for uuid, text in texts.items()}
    world.write("outputs/r1.json", answers)

    def predictions(flags, name):
        world.run(f"infer.py --mode rescore --input_file outputs/r1.json --output_dir outputs/{name}.json {flags}")
        return [row["final_prediction"] for row in world.read(f"outputs/{name}.json").values()]

    assert predictions("", "usual") == ["72", "none", "72"]
    assert predictions("--thinking_tags none", "whole") == ["48", "72", "72"]
    assert predictions("--thinking_tags '<x> </x>'", "other") == ["48", "72", "72"]
    answers = {"f": {"uuid": "f", **about, "label": r"2\sqrt{3}", "responses": r"\boxed{\sqrt{12}}"}}
    world.write("outputs/r2.json", answers)
    assert "--grader math" in world.refused("infer.py --mode rescore --input_file outputs/r2.json")
    world.run("infer.py --mode rescore --input_file outputs/r2.json --grader math")
    graded = world.read("outputs/r2.rescored-default-math.json")["f"]
    assert (graded["correct"], graded["final_prediction"], "grader" in graded) == (True, "sqrt(12)", False)


def test_rescore_names_what_it_cannot_grade(world, votes):
    answers = world.read("outputs/votes.json")
    last = [*answers][-1]
    answers[last]["label"] = "Z"
    world.write("outputs/foreign.json", answers)
    error = world.refused("infer.py --mode rescore --input_file outputs/foreign.json")
    assert f"outputs/foreign.json: record '{last}': question" in error and "label 'Z' is none of its options" in error
    done = world.run("infer.py --mode rescore --input_file outputs/foreign.json --on_bad_record skip")
    assert f"of {len(answers) - 1} predictions changed" in done.out
    assert world.read("outputs/foreign.rescored-default.json").keys() == answers.keys() - {last}
    rejected = world.folder / "outputs/foreign.rescored-default.json.rejected.jsonl"
    assert [json.loads(line)["uuid"] for line in rejected.read_text().splitlines()] == [last]


@pytest.mark.parametrize("flags", ["--length_norm none", "--gen_n 2", "--limit_size 3", "--limit_per_task 3"])
def test_rescore_says_what_does_not_apply(world, votes, flags):
    error = world.refused(f"infer.py --mode rescore --input_file outputs/votes.json {flags}")
    assert flags.split()[0] in error and "not apply" in error
