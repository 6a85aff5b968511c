"""Ranks and rank agreement against scipy, one prompt at a time, and against the paper's own cases."""

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from cream import ranking
from cream.ranking import constant, kendall, padded, shared, spearman, top_order

STATISTICS = [kendall, spearman, top_order]


def random_rankings(prompts, answers, seed):
    """Pairs of (P, N) arrays in which ties, absent answers and constant rows are all common."""
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, answers, size=(2, prompts, answers)).astype(float)
    a[rng.random(a.shape) < 0.1] = np.nan
    b[rng.random(b.shape) < 0.1] = np.nan
    return a, b


def by_scipy(function, a, b):
    """The same statistic one prompt at a time, on the answers that both rankings have."""
    values = np.full(len(a), np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy warns of constant input, and returns NaN
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            both = ~np.isnan(x) & ~np.isnan(y)
            if both.sum() >= 2:
                values[i] = function(x[both], y[both]).statistic
    return values


@pytest.mark.slow
@pytest.mark.parametrize("ours, theirs", [(kendall, stats.kendalltau), (spearman, stats.spearmanr)])
def test_equals_scipy_on_ten_thousand_rankings_with_ties(ours, theirs):
    undefined = 0
    for answers, prompts in [(2, 1000), (3, 2000), (5, 5000), (9, 2000)]:
        a, b = random_rankings(prompts, answers, seed=answers)
        expected = by_scipy(theirs, a, b)
        undefined += np.isnan(expected).sum()
        np.testing.assert_allclose(ours(a, b), expected, atol=1e-12)
    assert undefined > 100, "the sample was to hold undefined cases too"


def test_chunks_leave_no_seam(monkeypatch):
    a, b = random_rankings(1000, 5, seed=1)
    whole = kendall(a, b), spearman(a, b)
    monkeypatch.setattr(ranking, "COMPARISONS_AT_ONCE", 7 * 25)  # 7 prompts at a time: 142 chunks and a rest of 6
    for once, chunked in zip(whole, (kendall(a, b), spearman(a, b)), strict=True):
        np.testing.assert_array_equal(once, chunked)


@pytest.mark.parametrize(
    "at_once, responses, step", [(175, 5, 7), (174, 5, 6), (24, 5, 1), (10, 10, 1), (4, 1, 4), (4, 0, 4)]
)
def test_a_chunk_has_as_many_prompts_as_fit(monkeypatch, at_once, responses, step):
    monkeypatch.setattr(ranking, "COMPARISONS_AT_ONCE", at_once)
    chunks = [(chunk.start, chunk.stop) for chunk in ranking._chunks(20, responses)]
    assert chunks == [(start, start + step) for start in range(0, 20, step)]


@pytest.mark.parametrize(
    "current, previous, agree",
    [
        ((1, 4, 2, 3), (1, 2, 4, 3), 0),  # the winners differ; comparing the listed first and last said 1
        ((4, 1, 2, 3), (4, 1, 3, 2), 1),  # best and worst agree; comparing the listed first and last said 0
        ((1, 2, 3, 3), (1, 2, 3, 3), 1),
        ((1, 2, 3, 3), (1, 2, 4, 3), 0),  # either 3 may become the chosen answer, and only one is previous's best
        ((1, 2, 4, 3), (1, 2, 3, 3), 1),
        ((1, 2, 3, 4), (4, 3, 2, 1), 0),
        ((1, 2, np.nan, 4), (1, 2, 9, 4), 1),  # an answer that one lacks leaves both
        ((1, 1, 1, 1), (1, 2, 3, 4), np.nan),
        ((1, 2, 3, 4), (1, 1, 1, 1), np.nan),
    ],
)
def test_top_order(current, previous, agree):
    np.testing.assert_array_equal(top_order([current], [previous]), [agree])


def test_top_order_is_each_prompts_own():
    assert top_order([[1, 2, 3]] * 3, [[1, 2, 3], [3, 2, 1], [1, 2, 4]]).tolist() == [1, 0, 1]


@pytest.mark.parametrize("statistic", STATISTICS)
def test_undefined_without_a_ranking(statistic):
    a = [[1, 1, 1], [1, 2, 3], [np.nan, np.nan, 3], [np.nan] * 3, [1, 2, np.nan]]
    b = [[1, 2, 3], [2, 2, 2], [1, 2, 3], [1, 2, 3], [np.nan, 2, 3]]
    assert np.isnan(statistic(a, b)).all()
    assert statistic(np.empty((0, 5)), np.empty((0, 5))).shape == (0,)
    assert np.isnan(statistic(np.empty((3, 0)), np.empty((3, 0)))).all()


@pytest.mark.parametrize("statistic", STATISTICS)
def test_an_undefined_prompt_is_no_reason_to_warn(statistic):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(statistic([[1, 1], [np.nan, 1]], [[1, 2], [1, 2]])).all()


def test_shared_arrays_are_float64():
    narrow = np.float32([[1, np.nan, 3]])
    assert [x.dtype for x in shared(narrow, narrow)] == [np.float64] * 2


def test_constant_tells_which_ranking_is_missing():
    current, previous = shared([[1, 1, 2], [1, 2, 3], [1, 2, 3]], [[1, 2, np.nan], [7, 7, 7], [1, 2, 2]])
    assert constant(current).tolist() == [True, False, False]  # the 2 left with previous's NaN
    assert constant(previous).tolist() == [False, True, False]


def test_infinite_rewards_keep_their_order():
    assert kendall([[-np.inf, 0, 1, np.inf]], [[1, 2, 3, 4]]) == 1


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"\(1, 2\) and \(1, 3\)"):
        kendall([[1, 2]], [[1, 2, 3]])


def test_padded_rows_are_not_shifted():
    np.testing.assert_array_equal(
        padded([[1.0, None, 3.0], [], [4.0]]), [[1, np.nan, 3], [np.nan] * 3, [4, np.nan, np.nan]]
    )
    assert padded([]).shape == (0, 0) and padded([[], []]).shape == (2, 0)


REWARD = st.one_of(st.integers(-3, 3).map(float), st.floats(-1e3, 1e3), st.just(float("nan")))


@st.composite
def two_rankings(draw):
    prompts, answers = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    rows = st.lists(st.lists(REWARD, min_size=answers, max_size=answers), min_size=prompts, max_size=prompts)
    return np.array(draw(rows)), np.array(draw(rows))


@pytest.mark.parametrize("ours, theirs", [(kendall, stats.kendalltau), (spearman, stats.spearmanr)])
@given(rankings=two_rankings())
def test_equals_scipy(ours, theirs, rankings):
    np.testing.assert_allclose(ours(*rankings), by_scipy(theirs, *rankings), atol=1e-12)


@pytest.mark.parametrize("statistic", STATISTICS)
@given(rankings=two_rankings(), data=st.data())
def test_order_of_answers_and_of_prompts_is_irrelevant(statistic, rankings, data):
    a, b = rankings
    expected = statistic(a, b)
    answers = data.draw(st.permutations(range(a.shape[1])))
    np.testing.assert_array_equal(statistic(a[:, answers], b[:, answers]), expected)
    prompts = data.draw(st.permutations(range(len(a))))
    np.testing.assert_array_equal(statistic(a[prompts], b[prompts]), expected[prompts])


@pytest.mark.parametrize("statistic", [kendall, spearman])
@given(rankings=two_rankings())
def test_symmetric_odd_and_bounded(statistic, rankings):
    a, b = rankings
    value = statistic(a, b)
    np.testing.assert_array_equal(statistic(b, a), value)
    np.testing.assert_array_equal(statistic(a, -b), -value)
    assert (np.abs(value[~np.isnan(value)]) <= 1).all()


@given(rankings=two_rankings())
def test_skipping_a_prompt_changes_no_other(rankings):
    a, b = rankings
    for statistic in STATISTICS:
        np.testing.assert_array_equal(statistic(a[1:], b[1:]), statistic(a, b)[1:])
