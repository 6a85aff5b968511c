"""Intervals against scipy, pass@k against all subsets; the summary against counts made by hand."""

import math
import re
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from cream.evaluation.statistics import (
    aligned,
    bootstrap_difference,
    format_percent,
    format_table,
    interval_of_mean,
    mean_std,
    paired_difference,
    pass_at_k,
    summarise,
    wilson_interval,
)

VALUES = st.floats(-1e3, 1e3)
CONFIDENCE = st.sampled_from((0.5, 0.9, 0.95, 0.999))


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), CONFIDENCE)
def test_wilson_is_scipys(counts, confidence):
    scipys = scipy.stats.binomtest(*counts).proportion_ci(confidence, method="wilson")
    low, high = wilson_interval(*counts, confidence)
    assert (low, high) == pytest.approx((scipys.low, scipys.high), abs=1e-12)
    assert 0 <= low <= high <= 1


def test_no_rounding_leaves_the_unit_interval():
    for n in range(1, 200):
        assert wilson_interval(0, n)[0] >= 0 and wilson_interval(n, n)[1] <= 1


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_no_proportion_no_interval(successes, n):
    with pytest.raises(ValueError, match="not a proportion"):
        wilson_interval(successes, n)


@given(st.lists(VALUES, min_size=2, max_size=30))
def test_mean_std_is_numpys(values):
    assert mean_std(values) == pytest.approx((np.mean(values), np.std(values, ddof=1)), abs=1e-9)


def test_mean_std_of_few():
    mean, std = mean_std([3.0])
    assert mean == 3 and math.isnan(std)
    with pytest.raises(ValueError, match="no values"):
        mean_std([])


@given(st.lists(st.tuples(VALUES, VALUES), min_size=2, max_size=30), CONFIDENCE)
def test_paired_difference_is_scipys(pairs, confidence):
    a, b = zip(*pairs, strict=True)
    mean, low, high = paired_difference(a, b, confidence)
    differences = np.subtract(a, b)
    assert mean == pytest.approx(differences.mean(), abs=1e-9)
    if differences.std() > 1e-6:  # below that scipy warns of lost precision
        scipys = scipy.stats.ttest_rel(a, b).confidence_interval(confidence)
        assert (low, high) == pytest.approx((scipys.low, scipys.high), rel=1e-6, abs=1e-6)


def test_intervals_are_of_95_percent_unless_told():
    assert wilson_interval(3, 7) == wilson_interval(3, 7, 0.95)
    assert paired_difference([1, 3, 4], [2, 2, 1]) == paired_difference([1, 3, 4], [2, 2, 1], 0.95)
    counts = [(5, 12, 61), (31, 19, 97), (7, 11, 53)]
    assert bootstrap_difference(counts) == bootstrap_difference(counts, 0.95, resamples=10_000, seed=0)


def test_the_interval_of_a_mean_over_tasks_is_the_normal_one():
    rows = [{"task": "a", "correct": 300, "n": 1000}, {"task": "b", "correct": 160, "n": 200}]
    half = 1.96 * (0.3 * 0.7 / 1000 + 0.8 * 0.2 / 200) ** 0.5 / 2
    assert interval_of_mean([*rows, {"task": "macro"}]) == pytest.approx((0.55 - half, 0.55 + half), abs=0.003)
    assert interval_of_mean([]) == interval_of_mean([{"task": "a", "correct": 0, "n": 0}]) == (None, None)


@pytest.mark.parametrize(("a", "b"), [([1.0], [2.0]), ([1.0, 2.0], [1.0]), ([], [])])
def test_no_pairs_no_difference(a, b):
    with pytest.raises(ValueError, match="paired"):
        paired_difference(a, b)


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_answer(n):
    for correct in range(n + 1):
        answers = [True] * correct + [False] * (n - correct)
        for k in range(1, n + 1):
            subsets = list(combinations(answers, k))
            assert pass_at_k(n, correct, k) == pytest.approx(float(Fraction(sum(map(any, subsets)), len(subsets))))


@given(st.integers(1, 12), st.integers(0, 100), st.data())
def test_pass_at_k_is_unbiased(n, percent, data):
    """Its mean over the binomial number of correct answers is the chance that one of k samples is right."""
    k, p = data.draw(st.integers(1, n)), percent / 100
    chances = scipy.stats.binom.pmf(range(n + 1), n, p)
    mean = sum(chance * pass_at_k(n, c, k) for c, chance in enumerate(chances))
    assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-9)


@pytest.mark.parametrize(("n", "correct", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5), (0, 0, 1)])
def test_what_cannot_be_drawn(n, correct, k):
    with pytest.raises(ValueError, match="cannot be drawn"):
        pass_at_k(n, correct, k)


def record(task, correct, prediction="a", finish="stop", tokens=None):
    return {
        "task": task,
        "correct": correct,
        "final_prediction": prediction,
        "finish_reason": finish,
        "num_tokens": tokens,
    }


RECORDS = [
    record("siqa", True, tokens=10),
    record("gsm8k", False, "none", "length", tokens=7),
    record("siqa", False, "none", None),
    record("siqa", True, tokens=20),
    {"task": "siqa", "correct": True, "final_prediction": "b"},
]


def test_summary_counts_per_task_and_averages_over_tasks():
    siqa, gsm8k, macro = summarise(RECORDS)
    low, high = wilson_interval(3, 4)
    assert siqa == {
        "task": "siqa",
        "n": 4,
        "correct": 3,
        "accuracy": 0.75,
        "low": low,
        "high": high,
        "unanswered": 1,
        "unanswered_rate": 0.25,
        "truncated": 0,
        "truncated_rate": 0,
        "mean_tokens": 15,
    }
    assert (gsm8k["n"], gsm8k["accuracy"], gsm8k["unanswered"], gsm8k["truncated"]) == (1, 0.0, 1, 1)
    assert macro == {
        "task": "macro",
        "n": 5,
        "correct": 3,
        "accuracy": 0.375,  # (3/4 + 0) / 2, over tasks; not 3/5 over items
        "low": None,
        "high": None,
        "unanswered": 2,
        "unanswered_rate": 0.625,
        "truncated": 1,
        "truncated_rate": 0.5,
        "mean_tokens": 11,
    }


def test_one_task_has_no_macro_average_and_none_no_rows():
    assert [row["task"] for row in summarise(RECORDS[2:])] == ["siqa"]
    assert summarise([]) == []


def test_items_that_are_all_wrong_tell_how_many_responses_they_have():
    (one,) = summarise([record("siqa", False)] * 2)
    assert one["accuracy"] == 0 and "pass_at" not in one
    (two,) = summarise([several("siqa", [False, False], False, tokens=(1, 2))])
    assert two["pass_at"] == {"1": 0, "2": 0}


def test_table():
    table = format_table(summarise(RECORDS)).splitlines()
    assert len({len(line) for line in table}) == 1
    assert [line.split() for line in table[1:]] == [
        ["siqa", "4", "3", "75.0", "30.1", "to", "95.4", "25.0", "0.0", "15.0"],
        ["gsm8k", "1", "0", "0.0", "0.0", "to", "79.3", "100.0", "100.0", "7.0"],
        ["macro", "5", "3", "37.5", "62.5", "50.0", "11.0"],
    ]
    assert re.split(r" {2,}", table[0]) == [*HEADER[:3], "accuracy %", *HEADER[4:]]


HEADER = ["task", "n", "correct", "accuracy of vote %", "95 % interval", "unanswered %", "truncated %", "tokens"]


def test_texts_to_the_left_numbers_to_the_right():
    assert aligned([["task", "n"], ["a", "10"], ["gsm8k", "5"]]).splitlines() == ["task    n", "a      10", "gsm8k   5"]
    (row,) = summarise([record("a", True)])
    assert format_table([row]).splitlines()[1].split() == ["a", "1", "1", "100.0", "20.7", "to", "100.0", "0.0", "0.0"]


def test_accuracies_in_one_line():
    assert format_percent({"siqa": 0.5, "gsm8k": 1 / 3}) == "siqa 50.0, gsm8k 33.3"


def several(task, correct, vote, prediction="a", ends=None, tokens=(1, 2, 3, 4)):
    return record(task, vote, prediction) | {
        "all_correct": correct,
        "all_finish_reasons": ends or ["stop"] * len(correct),
        "all_num_tokens": list(tokens),
    }


VOTES = [
    several("gsm8k", [True, True, False, False], True),  # pass@1, 2, 4: 1/2, 5/6, 1
    several("gsm8k", [False] * 4, False, "none", ["stop", "length", "length", "stop"], (5, 6, 7, 8)),  # 0, 0, 0
    several("gsm8k", [True] * 4, True),  # 1, 1, 1
    record("gsm8k", False, "none", None),  # did not fit: 0, 0, 0
    several("siqa", [False, True, False, False], False),  # 1/4, 1/2, 1
]


def test_summary_of_several_answers():
    gsm8k, siqa, macro = summarise(VOTES)
    assert (gsm8k["n"], gsm8k["correct"], gsm8k["accuracy"], gsm8k["answers"]) == (4, 2, 0.5, 4)
    assert (gsm8k["low"], gsm8k["high"]) == wilson_interval(2, 4)
    per_item = {"1": [1 / 2, 0, 1, 0], "2": [5 / 6, 0, 1, 0], "4": [1, 0, 1, 0]}
    for j, values in per_item.items():
        assert gsm8k["pass_at"][j] == pytest.approx(np.mean(values))
        assert gsm8k["pass_at_error"][j] == pytest.approx(scipy.stats.sem(values))
    assert (gsm8k["unanswered"], gsm8k["unanswered_rate"]) == (2, 0.5)
    assert (gsm8k["truncated"], gsm8k["truncated_rate"]) == (2, 0.125)
    assert gsm8k["mean_tokens"] == (10 + 26 + 10) / 12  # what has no answer has no length
    assert siqa["pass_at"] == {"1": 0.25, "2": 0.5, "4": 1} and set(siqa["pass_at_error"].values()) == {None}
    assert macro["pass_at"]["1"] == pytest.approx((3 / 8 + 1 / 4) / 2) and macro["accuracy"] == 0.25
    assert macro["pass_at_error"] == dict.fromkeys("124")


def test_the_error_of_a_macro_average_is_that_of_independent_tasks():
    rows = summarise([*VOTES, several("siqa", [True] * 4, True)])
    tasks = [row["pass_at_error"]["1"] for row in rows[:2]]
    assert rows[2]["pass_at_error"]["1"] == pytest.approx(math.hypot(*tasks) / 2)


def test_a_task_whose_prompts_do_not_fit_passes_never():
    siqa, gsm8k, macro = summarise([several("siqa", [True, False], True), record("gsm8k", False, "none", None)])
    assert gsm8k["pass_at"] == {"1": 0, "2": 0} and gsm8k["answers"] == 2
    assert macro["pass_at"] == {"1": 0.25, "2": 0.5}


def test_items_with_one_answer_have_no_pass_at_more():
    assert all("pass_at" not in row for row in summarise([several("siqa", [True, False], True), record("siqa", True)]))


def test_pass_at_every_power_of_two_and_k():
    correct = [[True, *[False] * (k - 1)] for k in (2, 3, 8, 9)]
    rows = [summarise([several("t", each, True, tokens=[1] * len(each))])[0]["pass_at"] for each in correct]
    assert [list(row) for row in rows] == [["1", "2"], ["1", "2", "3"], ["1", "2", "4", "8"], ["1", "2", "4", "8", "9"]]


def test_table_of_several_answers():
    header, gsm8k, siqa, macro = format_table(summarise(VOTES)).splitlines()
    assert re.split(r" {2,}", header) == [*HEADER[:5], *(f"pass@{j} %" for j in (1, 2, 4)), *HEADER[5:]]
    assert "37.5 ± 23.9" in gsm8k and "25.0  " in siqa and macro.split()[:5] == ["macro", "5", "2", "25.0", "31.2"]
