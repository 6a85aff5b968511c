"""Intervals against scipy; the summary against counts made by hand."""

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from cream.evaluation.statistics import COLUMNS, format_table, mean_std, paired_difference, summarise, wilson_interval

VALUES = st.floats(-1e3, 1e3)
CONFIDENCE = st.sampled_from((0.5, 0.9, 0.95, 0.999))


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), CONFIDENCE)
def test_wilson_is_scipys(counts, confidence):
    scipys = scipy.stats.binomtest(*counts).proportion_ci(confidence, method="wilson")
    assert wilson_interval(*counts, confidence) == pytest.approx((scipys.low, scipys.high), abs=1e-12)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_no_proportion_no_interval(successes, n):
    with pytest.raises(ValueError, match="no proportion"):
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


@pytest.mark.parametrize(("a", "b"), [([1.0], [2.0]), ([1.0, 2.0], [1.0]), ([], [])])
def test_no_pairs_no_difference(a, b):
    with pytest.raises(ValueError, match="paired"):
        paired_difference(a, b)


def record(task, correct, prediction="a", finish="stop"):
    return {"task": task, "correct": correct, "final_prediction": prediction, "finish_reason": finish}


RECORDS = [
    record("siqa", True),
    record("gsm8k", False, "none", "length"),
    record("siqa", False, "none", None),
    record("siqa", True),
    {"task": "siqa", "correct": True, "final_prediction": "b"},
]


def test_summary_counts_per_task_and_averages_over_tasks():
    siqa, gsm8k, macro = summarise(RECORDS)
    low, high = wilson_interval(3, 4)
    assert tuple(siqa[key] for key in COLUMNS) == ("siqa", 4, 3, 0.75, low, high, 1, 0)
    assert (gsm8k["n"], gsm8k["accuracy"], gsm8k["unanswered"], gsm8k["truncated"]) == (1, 0.0, 1, 1)
    average = (3 / 4 + 0) / 2  # over tasks, not 3/5 over items
    assert tuple(macro[key] for key in COLUMNS) == ("macro", 5, 3, average, None, None, 2, 1)


def test_one_task_has_no_macro_average_and_none_no_rows():
    assert [row["task"] for row in summarise(RECORDS[2:])] == ["siqa"]
    assert summarise([]) == []


def test_table():
    table = format_table(summarise(RECORDS)).splitlines()
    assert len({len(line) for line in table}) == 1
    assert [line.split() for line in table[1:]] == [
        ["siqa", "4", "3", "75.0", "30.1", "to", "95.4", "1", "0"],
        ["gsm8k", "1", "0", "0.0", "0.0", "to", "79.3", "1", "1"],
        ["macro", "5", "3", "37.5", "2", "1"],
    ]
