"""The study of reward models: annotators who prefer long responses, accuracy by kind of pair, tables with intervals."""

import random
import sys
from pathlib import Path

import pytest
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import reward_study as study  # noqa: E402

from cream.evaluation.rewards.rows import Row  # noqa: E402
from cream.records import Message, Pair  # noqa: E402


def pair(number):
    prompt = [Message("user", f"problem {number}")]
    return Pair(
        uuid=str(number),
        prompt=prompt,
        selected=[*prompt, Message("assistant", "Answer: 12")],
        rejected=[*prompt, Message("assistant", "Answer: 13")],
    )


def test_annotators_take_the_longer_response_in_half_of_the_pairs():
    """Of two responses of one length the longer one is wrong in (1 - 1/5) / 2 of the pairs, and half of those are
    mislabelled; right labels stay, and both kinds of annotators see the same responses."""
    pairs = [pair(number) for number in range(4000)]
    right, misled = ([*study.annotated(pairs, random.Random(0), kind)] for kind in (False, True))
    assert {one.selected[-1].content[-2:] for one in right} == {"12"}
    assert {one.selected[-1].content.count("Listen.") for one in right} == {*range(study.MOST_OPENINGS + 1)}
    wrong = [one for one in misled if one.selected[-1].content.endswith("13")]
    assert len(wrong) / len(pairs) == pytest.approx(0.2, abs=0.03)
    assert all(len(one.selected[-1].content) > len(one.rejected[-1].content) for one in wrong)
    texts = [[{one.selected[-1].content, one.rejected[-1].content} for one in some] for some in (right, misled)]
    assert texts[0] == texts[1]


def test_accuracy_by_who_shows_the_working():
    """Each pair of a right and a wrong response counts once, in its kind; a tie is half right."""
    rows = [Row("a", "all", "a", [3.0, 1.0, 2.0, 2.0], [1, 0, 1, 0], [1] * 4)]
    found = study.accuracies(rows, {"a": [True, False, False, True]})
    kinds = {"working beats none": 100, "both with working": 100, "both without": 100, "none beats working": 50}
    assert found == {"all": 87.5} | kinds


def test_a_table_has_the_interval_over_worlds_and_paired_differences():
    worlds = [
        {"A": {"N = 1": a, "length": 0.5}, "B": {"N = 1": b}} for a, b in ((60.0, 50.0), (64.0, 53.0), (70.0, 61.0))
    ]
    lines = study.report(worlds, [("A", "B")]).splitlines()[4:]
    low, high = stats.t.interval(0.95, 2, 194 / 3, stats.sem([60, 64, 70]))
    assert lines[0] == f"| A | 64.7 [{low:.1f}, {high:.1f}] | 0.50 [0.50, 0.50] |"
    assert lines[1].endswith("|  |")
    low, high = stats.t.interval(0.95, 2, 10, stats.sem([10, 11, 9]))
    assert lines[2] == f"| A - B | +10.0 [{low:+.1f}, {high:+.1f}] |  |"
