"""Options, prompts, grading and votes, on the forms that real items have; a task that is added."""

import json
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cream.errors import UserError
from cream.evaluation.grade import majority, options_of
from cream.evaluation.tasks import TASKS, data_files, find_task, grade
from cream.text.prompts import SYSPROMPTS, apply

DATA = Path(__file__).parents[1] / "../shared/data/eval_cream_layout"
OPTIONS = {"arc-easy": {2, 3, 4, 5}, "arc-challenge": {3, 4, 5}, "openbookqa": {4}, "siqa": {3}, "gsm8k": {0}}

GAS = "Which gas do we breathe?\nA. oxygen\nB. neon\nC. helium"
COMPARE = "Tom has 28 books and Mary has 33. Who has more? A) Tom B) Mary C) same"
SUM = "Tom has 28 books and gets 33 more. How many now?"


@pytest.mark.parametrize(
    ("question", "wanted"),
    [
        (GAS, {"A": "oxygen", "B": "neon", "C": "helium"}),
        ("Which?\nA) oxygen\nB) neon", {"A": "oxygen", "B": "neon"}),
        ("Which?\n(A) oxygen\n(B) neon", {"A": "oxygen", "B": "neon"}),
        ("Which?\n1. oxygen\n2. neon\n3. argon", {"1": "oxygen", "2": "neon", "3": "argon"}),
        ("Which?\n" + "\n".join(f"{c}. gas {c}" for c in "ABCDE"), {c: f"gas {c}" for c in "ABCDE"}),
        (COMPARE, {"A": "Tom", "B": "Mary", "C": "same"}),
        ("Who? (A) Tom (B) Mary Ann", {"A": "Tom", "B": "Mary Ann"}),
        ("Steps:\n1. heat\n2. cool\nWhich is first?\nA. heat\nB. cool", {"A": "heat", "B": "cool"}),
        ("Which?\nA. see B) below\nB. neon", {"A": "see B) below", "B": "neon"}),
        ("Which?\nA. oxygen\nC. helium", {}),  # a gap
        ("Which?\nB. oxygen\nC. helium", {}),  # does not begin at A
        ("Which?\nA. oxygen", {}),  # one is no choice
        ("He paid (1) 5 dollars. A. Smith and B. Jones got 3.", {}),
        (SUM, {}),
    ],
)
def test_options(question, wanted):
    assert options_of(question) == wanted


def test_the_suffix_stays_outside_the_options():
    for question in (GAS, COMPARE):
        assert options_of(apply("task", question)) == options_of(question)
        assert apply("task", question).startswith(question) and apply("task", question).endswith(SYSPROMPTS["task"])
    assert "step by step" in SYSPROMPTS["task"] and "`Answer:`" in SYSPROMPTS["task"]


def test_prompts_by_name():
    assert apply("none", SUM) == SUM
    assert apply("task", SUM) == f"{SUM}\n\n{SYSPROMPTS['task']}"
    with pytest.raises(UserError, match="did you mean task"):
        apply("tsak", SUM)


@pytest.mark.parametrize(
    ("question", "label", "response", "wanted", "strict"),
    [
        (GAS, "A", "Answer: oxygen", ("a", True), ("none", False)),
        (GAS, "a", "Answer: A", ("a", True), ("a", True)),
        (GAS, "B", "Answer: (B) because it is a good option", ("b", True), ("a", False)),
        (GAS, "B", "Answer: D", ("none", False), ("d", False)),
        (GAS, "B", "hm", ("none", False), ("none", False)),
        ("Which?\n1. oxygen\n2. neon", "2", "Answer: 2", ("2", True), ("none", False)),
        (COMPARE, "B", "2 < 3. Answer: B", ("b", True), ("b", True)),
        (SUM, "61", "8 + 3 = 11, carry 1. 2 + 3 + 1 = 6. Answer: 61", ("61", True), ("61", True)),
        (SUM, 61, "Answer: 61.00", ("61", True), ("61", True)),
        (SUM, "1,061", "Answer: 1061", ("1061", True), ("1061", False)),  # released: equality of strings
        (SUM, "61", "Answer: 28 + 33 = 61", ("61", True), ("28", False)),
        (SUM, "61", "no idea", ("none", False), ("none", False)),
    ],
)
def test_grade(question, label, response, wanted, strict):
    assert grade(question, label, response) == wanted
    assert grade(question, label, response, strict=True) == strict
    assert grade(apply("task", question), label, response) == wanted  # a result file holds the question with its suffix


@pytest.mark.parametrize(("question", "label"), [(GAS, "E"), (SUM, "oxygen"), (SUM, "")])
def test_a_label_that_cannot_be_graded_is_an_error(question, label):
    with pytest.raises(UserError, match="label"):
        grade(question, label, "Answer: A")


def test_a_label_is_told_in_short():
    with pytest.raises(UserError) as error:
        grade(GAS, "x" * 5000, "")
    assert len(str(error.value)) < 400


def test_blanks_within_an_option_are_read_in_linear_time():
    """A pattern that goes on from each of them again would take hours."""
    blanks = " " * 1_000_000
    for lines in (f"A. a{blanks}b\nB. c", f"A) a{blanks}b B) c"):
        assert options_of(f"Which?\n{lines}") == {"A": f"a{blanks}b", "B": "c"}


@pytest.mark.parametrize(
    ("predictions", "winner"),
    [
        (["18"], 0),
        (["7", "18", "18.00"], 1),  # one number, two spellings
        (["7", "18.0", "18.00", "7"], 0),  # a tie: what came first
        (["1800", "7", "1,800"], 0),
        (["none", "none", "none", "b"], 3),  # no answer has no vote
        (["none", "a", "b", "b"], 2),
        (["none", "none"], 0),
        (["a", "b", "c", "c", "b"], 1),
        (["e", "1", "e"], 0),  # a letter is no number
        (["-0", "5", "0"], 0),
        (["nan", "inf", "nan"], 0),
        (["0.667", "0.6667", "0.667"], 0),
    ],
)
def test_majority(predictions, winner):
    assert majority(predictions) == winner


@given(st.lists(st.sampled_from(["1", "1.0", "2", "2.00", "3", "none"]), min_size=1, max_size=9))
def test_majority_counts_values_and_takes_the_first_of_equals(predictions):
    values = [None if p == "none" else Decimal(p) for p in predictions]
    given_by = {v: values.count(v) for v in values if v is not None}
    best = [i for i, v in enumerate(values) if v is not None and given_by[v] == max(given_by.values())]
    assert majority(predictions) == (best[0] if best else 0)


def test_nobody_no_vote():
    with pytest.raises(ValueError, match="needs a prediction"):
        majority([])


@pytest.mark.slow
@pytest.mark.skipif(not DATA.exists(), reason="the five tasks are not here")
@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if task.IN_ALL_TEST])
def test_every_real_item_can_be_answered(task):
    folder = task.replace("_", "-")
    items = json.loads((DATA / folder / "test.json").read_text())
    for item in items:
        question, label = item["question"], item["label"]
        options = options_of(question)
        assert len(options) in OPTIONS[folder] and TASKS[task].grade(question, label, "") == ("none", False)
        for answer in {label, f"({label})", options.get(label, label)}:
            assert grade(apply("task", question), label, f"Let me think.\nAnswer: {answer}")[1], (item, answer)
        for other, text in [(key, text) for key, text in options.items() if key != label][:1]:
            assert not grade(question, label, f"Answer: {other}")[1]
            assert not grade(question, label, f"Answer: {other}. {text}")[1]


# Tasks as data --------------------------------------------------------------------------------------------------------


def test_a_task_is_found_by_its_name_and_by_those_of_its_parts():
    for name in ("arc_easy", "arc-easy", "arc_easy_hard"):
        assert find_task(name) is TASKS["arc_easy"]
    assert find_task("tiny_add") is find_task("tiny") is TASKS["tiny"]
    assert find_task("tinted") is find_task("mine") is find_task(None) and find_task("mine") not in TASKS.values()


def test_the_rule_of_a_task_decides():
    """Where the data fits another rule only, its label is refused rather than taken for something else."""
    listed = "Which step is second?\n1. heat\n2. cool"
    assert grade(listed, "2", "Answer: cool") == grade(listed, "2", "Answer: cool", task="siqa") == ("2", True)
    assert grade(listed, "2", "Answer: cool", task="gsm8k") == ("none", False)
    with pytest.raises(UserError, match="label '61' is given, but the question has no options"):
        grade(SUM, "61", "", task="siqa")
    assert grade(GAS, "A", "Answer: A", task="gsm8k")[0] == "a"  # a letter cannot be anything else
    with pytest.raises(UserError, match="label 'A' is not a number"):
        grade(SUM, "A", "", task="gsm8k")


def test_their_files_are_data_sets_by_name():
    files = data_files()
    assert files["all_test"] == "localdata/all_test.json" and files["gsm8k_train"] == "localdata/gsm8k/train.json"
    assert {name for name in files if name.endswith("_test")} == {"all_test", *(f"{name}_test" for name in TASKS)}
    assert "tiny_train" not in files


OPPOSITES = '''
"""A made-up task."""

from cream.errors import UserError

TEST = "localdata/opposites/test.json"
TRAIN = "localdata/opposites/solved.json"
IN_ALL_TEST = False
SYSPROMPT = "none"
CONTEXT = "The opposite of {} is"


def grade(question, label, response, strict=False):
    if label not in ("A", "B"):
        raise UserError(f"label {label!r} is not A or B")
    return "strictly any" if strict else "any", True
'''


@pytest.fixture(scope="module")
def opposites(workspace):
    """The workspace with one more task: its file, and its line in TASKS (with the import); and its data."""
    folder = workspace.folder / "cream/evaluation/tasks"
    (folder / "opposites.py").write_text(OPPOSITES)
    listing = folder / "__init__.py"
    text = listing.read_text().replace("import arc_challenge", "import opposites, arc_challenge")
    text = text.replace(
        "TASKS: dict[str, ModuleType] = {\n", 'TASKS: dict[str, ModuleType] = {\n    "opposites": opposites,\n'
    )
    listing.write_text(text)
    words = {"wet": ("dry", "red"), "old": ("six", "new"), "up": ("down", "in")}
    items = [
        {"uuid": word, "question": f"{word}\nA. {a}\nB. {b}", "label": "B" if word == "old" else "A"}
        for word, (a, b) in words.items()
    ]
    workspace.write("localdata/opposites/test.json", items[:2])
    workspace.write("localdata/opposites/solved.json", items[2:])
    return workspace


EVALUATE = "infer.py --device cpu --model tiny --mode evaluation --name opposites_test --output_dir outputs/"


def test_a_new_task_is_evaluated_by_generation(opposites):
    """By its own rule, its own examples and no suffix, though its items do not name their task."""
    opposites.run(f"{EVALUATE}generated.json --gen_max_tokens 4 --few_shot 1")
    records = opposites.read("outputs/generated.json")
    assert [*records] == ["wet", "old"]
    assert {(r["task"], r["final_prediction"], r["correct"]) for r in records.values()} == {("opposites", "any", True)}
    asked = opposites.read("outputs/generated.summary.json")["first_prompt"]
    assert asked.endswith(
        "<user>up\nA. down\nB. in<end><assistant>Answer: A<end><user>wet\nA. dry\nB. red<end><assistant>"
    )
    opposites.run("infer.py --mode rescore --input_file outputs/generated.json --extraction strict")
    again = opposites.read("outputs/generated.rescored-strict.json")
    assert {r["final_prediction"] for r in again.values()} == {"strictly any"}


def test_a_new_task_is_evaluated_by_log_likelihood(opposites):
    opposites.run(f"{EVALUATE}compared.json --scoring loglikelihood --few_shot 1")
    records = opposites.read("outputs/compared.json")
    assert [r["task"] for r in records.values()] == ["opposites"] * 2
    assert all(r["option_logprob"].keys() == {"A", "B"} for r in records.values())
    asked = opposites.read("outputs/compared.summary.json")["first_prompt"]
    assert asked.endswith("The opposite of up is down\n\nThe opposite of wet is")


def test_a_new_task_rewards_and_chooses_pairs_by_its_rule(opposites):
    """Gold labels and the Oracle grade as the evaluation does, though the items do not name their task."""
    prompt = [{"role": "user", "content": "wet?"}]
    opposites.write("outputs/s.json", {"wet": {"prompt": prompt, "responses": ["dry", "no idea"]}})
    labels = "--labels localdata/opposites/test.json"
    opposites.run(f"rewarding.py --input_file outputs/s.json --reward labels {labels} --output outputs/r.json")
    record = opposites.read("outputs/r.json")["wet"]
    assert record["reward"] == [1.0, 1.0] and record["texts"] == {"extracted": ["any", "any"]}
    oracle = f"make_pairs.py --strategy oracle --rewards outputs/r.json {labels} --output outputs/p.json"
    assert "no pair from 1 prompt: no wrong response" in opposites.run(oracle, code=2).out


def test_a_label_that_a_new_task_cannot_grade_is_refused(opposites):
    items = opposites.read("localdata/opposites/test.json")
    opposites.write("localdata/opposites/test.json", [items[0] | {"label": 7}])
    assert "record 'wet': label 7 is not A or B" in opposites.refused(f"{EVALUATE}refused.json")
