"""Advantages against a few lines of plain Python, and what holds for all of them."""

import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cream.advantages import all_equal, deviation, divided, group_relative, leave_one_out, shaped

NUMBERS = st.floats(-1e3, 1e3)
GROUPS = st.lists(NUMBERS | st.none(), min_size=2, max_size=9).filter(lambda g: sum(r is not None for r in g) > 1)


def known(values):
    return [v for v in values if v is not None]


@settings(max_examples=30)
@given(GROUPS)
def test_leave_one_out_is_over_the_mean_of_the_others(rewards):
    found = leave_one_out(rewards)
    for i, r in enumerate(rewards):
        others = known(rewards[:i] + rewards[i + 1 :])
        assert found[i] is None if r is None else found[i] == pytest.approx(r - sum(others) / len(others), abs=1e-9)
    assert sum(known(found)) == pytest.approx(0, abs=1e-8)


@settings(max_examples=30)
@given(GROUPS)
def test_group_relative_is_over_the_mean_and_grpo_over_the_deviation(rewards):
    found, n = group_relative(rewards), len(known(rewards))
    mean = math.fsum(known(rewards)) / n
    spread = math.sqrt(math.fsum((r - mean) ** 2 for r in known(rewards)) / (n - 1))
    assert deviation(rewards) == pytest.approx(spread, abs=1e-9)
    for r, a, scaled in zip(rewards, found, divided(found, spread), strict=True):
        assert (a is None) == (scaled is None) == (r is None)
        assert r is None or a == pytest.approx(r - mean, abs=1e-9)
        assert r is None or scaled == pytest.approx(a / (spread + 1e-4))
    ratios = zip(known(leave_one_out(rewards)), known(found), strict=True)
    assert all(own == pytest.approx(n / (n - 1) * a, abs=1e-9) for own, a in ratios)


@pytest.mark.parametrize("value", [0.1, 1 / 3, -7.7])
def test_equal_rewards_have_exactly_no_advantage(value):
    group = [value, None, value, value]
    assert all_equal(group) and not all_equal([value, value + 1])
    assert leave_one_out(group) == group_relative(group) == [0, None, 0, 0]
    assert divided(group_relative(group), deviation(group)) == [0, None, 0, 0]


@pytest.mark.parametrize("alone", [[1.0], [1.0, None], [None, None]])
def test_one_reward_has_nothing_to_be_compared_with(alone):
    for advantage in (leave_one_out, group_relative):
        with pytest.raises(ValueError, match="an advantage compares two"):
            advantage(alone)


def test_shapes_of_a_files_rewards():
    groups = [[1.0, None, 4.0], [-2.0, 7.0]]
    flat = [1.0, 4.0, -2.0, 7.0]
    mean, spread = statistics.mean(flat), statistics.stdev(flat)
    assert shaped(groups) == groups
    assert shaped(groups, "centred") == [[1 - mean, None, 4 - mean], [-2 - mean, 7 - mean]]
    (a, _, b), (c, d) = shaped(groups, "standard")
    assert [a, b, c, d] == pytest.approx([(r - mean) / spread for r in flat])
    (a, none, b), (c, d) = shaped(groups, "sigmoid", baseline=0.3)
    assert none is None and [a, b, c, d] == pytest.approx([1 / (1 + math.exp(-r)) - 0.3 for r in flat])
    assert shaped(groups, low=0, high=5) == [[1.0, None, 4.0], [0, 5]]
    assert shaped([[-1e4, 1e4]], "sigmoid") == [[0.0, 1.0]]  # nothing overflows
    assert shaped([[None]], "standard") == [[None]] and shaped([[2.0, 2.0]], "standard") == [[0.0, 0.0]]


def test_a_constant_decides_no_advantage_unless_rewards_are_clipped():
    group = [0.3, -1.2, 2.0, 0.9]
    for baseline in (0.0, 0.5):
        (moved,) = shaped([group], "sigmoid", baseline=baseline)
        assert leave_one_out(moved) == pytest.approx(leave_one_out(shaped([group], "sigmoid")[0]))
    sers = [2 * (max(r, 0.5) - 0.5) / (1 - 0.5) - 1 for r in shaped([group], "sigmoid")[0]]  # clipped at its baseline
    (cut,) = shaped([group], "sigmoid", baseline=0.5, low=0.0)
    assert [4 * a for a in leave_one_out(cut)] == pytest.approx(leave_one_out(sers))
