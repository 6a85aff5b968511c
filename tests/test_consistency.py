"""Consistency against the figures of the method, and its statistics against hand-worked ones."""

import itertools
import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from cream.consistency import RANKS, Tally, consistency, margin_cap, shuffled
from cream.errors import UserError
from cream.losses import preference_loss

ORDER = [1, 2, 3, 4, 5]


@pytest.mark.parametrize("previous, c", [(ORDER, 1.0), (ORDER[::-1], 0.0), ([2, 1, 3, 4, 5], 0.9)])
def test_the_three_rankings_of_the_method(previous, c):
    assert consistency([ORDER], [previous])[0] == [c]


def test_all_rankings_of_five_average_one_half_and_take_eleven_values():
    every = np.array(list(itertools.permutations(ORDER)), dtype=float)
    c, tau = consistency(np.broadcast_to(np.array(ORDER, float), every.shape), every)
    np.testing.assert_allclose(tau, [stats.kendalltau(ORDER, row).statistic for row in every], atol=1e-12)
    # Mahonian numbers: how many permutations of 5 have 0, 1, ... 10 inversions
    assert tuple(Tally(c).histogram) == (1, 4, 9, 15, 20, 22, 20, 15, 9, 4, 1)
    assert Tally(c).mean == pytest.approx(0.5)
    assert Tally(c).below_half == (1 + 4 + 9 + 15 + 20) / 120


@pytest.mark.parametrize("rank", RANKS)
def test_one_with_itself_and_null_without_a_ranking(rank):
    c, statistic = consistency([ORDER, [3, 3, 3, 3, 3]], [ORDER, ORDER], rank)
    np.testing.assert_array_equal(c, [1, np.nan])
    np.testing.assert_array_equal(statistic, [1, np.nan])


def test_each_rank_maps_to_zero_and_one():
    for rank in RANKS:
        assert consistency([ORDER], [ORDER[::-1]], rank)[0] == [0]
    assert consistency([ORDER], [[1, 3, 2, 4, 5]], "spearman")[0] == [pytest.approx(0.95)]  # rho = 1 - 6*2/120
    assert consistency([ORDER], [[1, 3, 2, 4, 5]], "toporder")[0] == [1]


def test_an_unknown_rank_names_the_known_ones():
    with pytest.raises(UserError, match="kendal.*did you mean kendall.*toporder"):
        consistency([ORDER], [ORDER], "kendal")


@given(st.lists(st.one_of(st.floats(0, 1), st.just(math.nan)), max_size=30), st.integers(0, 2**32))
def test_shuffling_keeps_the_values_and_the_nulls_in_place(values, seed):
    c = np.array(values, dtype=float)
    reassigned = shuffled(c, seed)
    np.testing.assert_array_equal(np.isnan(reassigned), np.isnan(c))
    np.testing.assert_array_equal(np.sort(reassigned), np.sort(c))
    np.testing.assert_array_equal(shuffled(c, seed), reassigned)
    np.testing.assert_array_equal(c, np.array(values, dtype=float))  # the argument is left alone


def test_each_seed_shuffles_otherwise():
    c = np.linspace(0, 1, 50)
    assert len({tuple(shuffled(c, seed)) for seed in range(5)} | {tuple(c)}) == 6


def test_statistics_equal_the_standard_library():
    c = [0.9, 0.4, 0.5, 1.0, 0.0]
    got = Tally([*c, math.nan, math.nan])
    assert (got.n, got.nulls, got.below_half) == (5, 2, 2 / 5)
    assert got.mean == pytest.approx(statistics.mean(c)) and got.std == pytest.approx(statistics.stdev(c))
    assert tuple(got.histogram) == (1, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1)


@given(st.lists(st.lists(st.one_of(st.floats(0, 1), st.just(math.nan)), max_size=8), max_size=6))
def test_blocks_add_up_to_the_statistics_of_all(blocks):
    added, c = Tally(), [x for block in blocks for x in block if not math.isnan(x)]
    for block in blocks:
        added.add(block)
    assert (added.n, added.nulls) == (len(c), sum(map(len, blocks)) - len(c))
    assert added.mean == (pytest.approx(statistics.mean(c), abs=1e-12) if c else None)
    assert added.std == (pytest.approx(statistics.stdev(c), abs=1e-7) if len(c) > 1 else None)
    assert added.below_half == (sum(x < 0.5 for x in c) / len(c) if c else None)
    assert added.histogram.tolist() == [sum(round(10 * x) == tenth for x in c) for tenth in range(11)]


def test_values_are_float64_and_counts_whole():
    narrow = np.float32([0.1, 0.1, 0.7])
    assert shuffled(narrow, 0).dtype == margin_cap(narrow, 1.0).dtype == np.float64
    assert Tally(narrow).mean == pytest.approx(np.float64(narrow).mean(), abs=1e-15)
    assert Tally(narrow).histogram.dtype == np.int64


def test_statistics_of_one_value_and_of_none():
    one, none = Tally([0.7, math.nan]), Tally([math.nan])
    assert (one.n, one.mean, one.std, one.below_half) == (1, 0.7, None, 0.0)
    assert (none.n, none.nulls, none.mean, none.std, none.below_half) == (0, 1, None, None, None)
    assert not none.histogram.any()
    assert Tally([]).n == 0


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_the_loss_is_flat_at_the_margin_cap(beta):
    c = torch.tensor([0.1, 0.4, 0.5, 0.7, 0.9])
    margin = torch.tensor(margin_cap(c.numpy(), beta), dtype=torch.float32, requires_grad=True)
    zero = torch.zeros(5)
    preference_loss(margin, zero, beta, c)[0].sum().backward()
    assert margin.grad.abs().max() < 1e-6
    with np.errstate(divide="raise"):  # nor a warning
        np.testing.assert_array_equal(margin_cap([0.0, 1.0, math.nan], beta), [-np.inf, np.inf, np.nan])
