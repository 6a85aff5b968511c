"""Options, prompts, grading and votes, on the forms that real items have."""

import json
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cream.errors import UserError
from cream.evaluation.tasks import TASKS, grade, majority, options_of
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
@pytest.mark.parametrize("task", TASKS)
def test_every_real_item_can_be_answered(task):
    folder = task.replace("_", "-")
    items = json.loads((DATA / folder / "test.json").read_text())
    for item in items:
        question, label = item["question"], item["label"]
        options = options_of(question)
        assert len(options) in OPTIONS[folder]
        for answer in {label, f"({label})", options.get(label, label)}:
            assert grade(apply("task", question), label, f"Let me think.\nAnswer: {answer}")[1], (item, answer)
        for other, text in options.items():
            if other != label:
                assert not grade(question, label, f"Answer: {other}")[1]
                assert not grade(question, label, f"Answer: {other}. {text}")[1]
