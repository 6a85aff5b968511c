"""Scores of compared responses: against scipy's maximum of the same likelihood, and what holds of any comparisons."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import log_expit

from cream.preferences import NOT_JOINED, PRIOR, SCORES, bradley_terry, comparisons, win_rates
from cream.rewards.base import reward_by_preferences

P = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1))


@st.composite
def matrices(draw, value=P, least=2):
    n = draw(st.integers(least, 5))
    return [[None if i == j else draw(value) for j in range(n)] for i in range(n)]


def stated(preferences, i, j):
    """P(i is better than j) by definition: the mean over the orders that are known."""
    both = [preferences[i][j], None if preferences[j][i] is None else 1 - preferences[j][i]]
    known = [p for p in both if p is not None]
    return sum(known) / len(known) if known else None


def groups(preferences):
    """Sets of indices that chains of comparisons join, by merging until nothing changes."""
    n = len(preferences)
    found = [{i} for i in range(n)]
    for i in range(n):
        for j in range(n):
            if i != j and stated(preferences, i, j) is not None:
                a, b = (next(group for group in found if k in group) for k in (i, j))
                if a is not b:
                    found = [group for group in found if group is not a and group is not b] + [a | b]
    return found


def likeliest(preferences):
    """The strengths by a general optimiser: of the penalised likelihood, written out pair by pair."""
    n = len(preferences)

    def loss(s):
        total = PRIOR / 2 * float(s @ s)
        for i in range(n):
            for j in range(i):
                if (p := stated(preferences, i, j)) is not None:
                    total -= p * log_expit(s[i] - s[j]) + (1 - p) * log_expit(s[j] - s[i])
        return total

    return minimize(loss, np.zeros(n), method="BFGS", options={"gtol": 1e-9}), loss


@settings(max_examples=40)
@given(matrices())
def test_strengths_are_the_maximum_of_the_likelihood(preferences):
    own = np.array(bradley_terry(preferences))
    found, loss = likeliest(preferences)
    assert loss(own) <= found.fun + 1e-9  # at least as good as scipy's, which stops early where it is flat
    for i, s in enumerate(own):  # and stationary
        q = sum(stated(preferences, i, j) - 1 / (1 + math.exp(own[j] - s)) for j in range(len(own)) if j != i)
        assert q == pytest.approx(PRIOR * s, abs=1e-8)


@settings(max_examples=40)
@given(matrices(st.floats(0.1, 0.9)))
def test_without_certainty_the_prior_hardly_matters(preferences):
    assert bradley_terry(preferences) == pytest.approx(likeliest(preferences)[0].x, abs=1e-4)


def test_strengths_of_a_hand_worked_case():
    """Of two responses the difference is the log-odds, ln 3; of three in a row, all odds 3, twice that to the third."""
    two = bradley_terry([[None, 0.75], [None, None]])
    assert two[0] - two[1] == pytest.approx(math.log(3), abs=1e-3) and two[0] == -two[1]
    chain = bradley_terry([[None, 0.75, None], [0.25, None, 0.75], [None, 0.25, None]])
    assert chain == pytest.approx([math.log(3), 0, -math.log(3)], abs=2e-3)


@given(matrices(st.one_of(st.none(), P)))
def test_a_win_rate_is_over_known_comparisons_in_both_orders(preferences):
    """An unknown comparison is neither a loss nor a tie."""
    n, found = len(preferences), win_rates(preferences)
    for i, rate in enumerate(found):
        known = [p for j in range(n) if j != i and (p := stated(preferences, i, j)) is not None]
        if rate is not None:  # it is in the largest group, and so are all with which it is compared
            assert rate == pytest.approx(sum(known) / len(known), abs=1e-8)
    if all(stated(preferences, i, j) is not None for i in range(n) for j in range(i)):
        assert sum(found) == pytest.approx(n / 2)


@given(matrices(st.one_of(st.none(), P), least=0), st.sampled_from([*SCORES]))
def test_only_the_largest_joined_group_has_scores(preferences, name):
    found = SCORES[name](preferences)
    joined = max(groups(preferences), key=lambda group: (len(group), -min(group)), default=set())
    expected = joined if len(joined) > 1 else set()
    assert {i for i, value in enumerate(found) if value is not None} == expected
    if expected and name == "bradley_terry":
        assert sum(value for value in found if value is not None) == pytest.approx(0, abs=1e-6)


@given(matrices(st.one_of(st.none(), P)), st.sampled_from([*SCORES]), st.randoms(use_true_random=False))
def test_the_order_of_responses_does_not_matter(preferences, name, rng):
    order = list(range(len(preferences)))
    rng.shuffle(order)
    if len({len(group) for group in groups(preferences)}) < len(groups(preferences)):
        return  # two groups of one size, of which the first response decides
    moved = SCORES[name]([[preferences[i][j] for j in order] for i in order])
    found = SCORES[name](preferences)
    for at, i in enumerate(order):
        assert (moved[at] is None) == (found[i] is None)
        assert moved[at] is None or moved[at] == pytest.approx(found[i], abs=1e-7)


@pytest.mark.parametrize("name", SCORES)
def test_certain_judges_give_finite_scores_in_their_order(name):
    order = [2, 0, 3, 1]
    preferences = [[None if i == j else float(order[i] < order[j]) for j in range(4)] for i in range(4)]
    found = SCORES[name](preferences)
    assert all(map(math.isfinite, found)) and sorted(range(4), key=lambda i: -found[i]) == [1, 3, 0, 2]


@pytest.mark.parametrize("name", SCORES)
def test_equal_responses_have_equal_scores(name):
    """To the last bit: they are a tie for ranks and pairs. A judge that always says A prefers none."""
    three = 1 / 3
    preferences = [[None, three, 0.1], [1 - three, None, 0.7], [0.9, 0.3, None]]
    cycle = [[None, 0.9, 0.1], [0.1, None, 0.9], [0.9, 0.1, None]]
    always_a = [[None if i == j else 1.0 for j in range(3)] for i in range(3)]
    assert len({*SCORES[name](preferences)}) == 3
    for even in (cycle, always_a):
        assert len({*SCORES[name](even)}) == 1


def test_comparisons_are_antisymmetric_and_keep_what_is_unknown():
    p = comparisons([[None, 0.8, None], [0.4, None, 0.25], [None, None, None]])
    assert p[0, 1] == pytest.approx(0.7) and p[1, 0] == pytest.approx(0.3)
    assert (p[1, 2], p[2, 1]) == (0.25, 0.75) and np.isnan(p[[0, 2, 0], [2, 0, 0]]).all()


@pytest.mark.parametrize("name", SCORES)
def test_rewards_by_preferences_say_why_they_are_missing(name):
    better = {("a", "b"): 0.9, ("b", "a"): 0.2, ("a", "c"): None}
    found = reward_by_preferences(["a", "b", "c", None], better, name)
    assert found.reward[0] > found.reward[1] and found.reward[2:] == [None, None]
    assert found.reason == [None, None, NOT_JOINED, NOT_JOINED]
    assert found.preferences == [[None, 0.9, None, None], [0.2, None, None, None], [None] * 4, [None] * 4]
    assert reward_by_preferences(["a", "b"], {}, name).reward == [None, None]
    assert reward_by_preferences([], {}, name).reward == []


@pytest.mark.parametrize("name", SCORES)
def test_a_response_that_is_there_twice_counts_once(name):
    better = {("a", "b"): 0.9, ("b", "c"): 0.8, ("c", "a"): 0.3}
    once, twice = (reward_by_preferences(list(texts), better, name).reward for texts in ("abc", "abcb"))
    assert twice == [*once, once[1]]
