"""Pair choice against a plain loop over the definition, one prompt at a time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cream.pairs import PAIRS, admissible, distinct, extremes, oracle

NAN = float("nan")


@st.composite
def groups(draw):
    """P prompts of N answers: rewards (NaN for none), texts, truncated, correct. Ties and equal texts are common."""
    prompts, answers = draw(st.integers(1, 4)), draw(st.integers(1, 6))

    def table(entry):
        return draw(st.lists(st.lists(entry, min_size=answers, max_size=answers), min_size=prompts, max_size=prompts))

    rewards = table(st.one_of(st.sampled_from([-1.0, 0.0, 2.5, NAN]), st.floats(-9, 9)))
    return np.array(rewards), table(st.sampled_from("abcde")), table(st.booleans()), table(st.booleans())


def usable(rewards, texts, truncated):
    """Indices that may enter a pair, by the definition: rewarded, not truncated, first such answer of its text."""
    kept = []
    for i, reward in enumerate(rewards):
        if reward == reward and not truncated[i] and texts[i] not in [texts[j] for j in kept]:
            kept.append(i)
    return kept


@given(groups())
def test_extremes_equal_the_loop(group):
    rewards, texts, truncated, _ = group
    choice = PAIRS["extremes"](admissible(rewards, texts, truncated))
    for p, row in enumerate(rewards.tolist()):
        kept = usable(row, texts[p], truncated[p])
        if len(kept) < 2:
            expected = (-1, -1, extremes.FEWER_THAN_TWO)
        elif len({row[i] for i in kept}) == 1:
            expected = (-1, -1, extremes.ALL_EQUAL)
        else:
            expected = (max(kept, key=row.__getitem__), min(kept, key=row.__getitem__), None)
        assert (choice.chosen[p], choice.rejected[p], choice.reason[p]) == expected


@given(groups())
def test_oracle_equals_the_loop(group):
    rewards, texts, truncated, correct = group
    choice = PAIRS["oracle"](admissible(rewards, texts, truncated), np.array(correct))
    for p, row in enumerate(rewards.tolist()):
        kept = usable(row, texts[p], truncated[p])
        right, wrong = [i for i in kept if correct[p][i]], [i for i in kept if not correct[p][i]]
        if len(kept) < 2:
            expected = (-1, -1, extremes.FEWER_THAN_TWO)
        elif not right:
            expected = (-1, -1, oracle.NONE_CORRECT)
        elif not wrong:
            expected = (-1, -1, oracle.NONE_WRONG)
        else:
            expected = (max(right, key=row.__getitem__), min(wrong, key=row.__getitem__), None)
        assert (choice.chosen[p], choice.rejected[p], choice.reason[p]) == expected


@given(groups(), st.booleans())
def test_a_pair_never_has_equal_texts(group, keep_truncated):
    rewards, texts, truncated, correct = group
    kept = admissible(rewards, texts, None if keep_truncated else truncated)
    for choice in (PAIRS["extremes"](kept), PAIRS["oracle"](kept, np.array(correct))):
        for p in range(len(rewards)):
            assert choice.reason[p] or texts[p][choice.chosen[p]] != texts[p][choice.rejected[p]]


def test_an_equal_text_with_another_reward_does_not_pair_with_itself():
    """Padding noise gives one text two rewards; unfiltered, it was both best and worst."""
    kept = admissible([[1.0001, 0.5, 1.0]], [["same", "other", "same"]])
    np.testing.assert_array_equal(kept, [[1.0001, 0.5, NAN]])
    assert admissible([[1.0001, 1.0]], [["same", "same"]]).tolist()[0][0] == 1.0001
    assert PAIRS["extremes"](admissible([[1.0001, 1.0]], [["same", "same"]])).reason[0] == extremes.FEWER_THAN_TWO


def test_the_oracle_overrules_the_reward():
    choice = oracle.choose(np.array([[5.0, -5.0, 9.0, -9.0]]), np.array([[False, True, False, True]]))
    assert (choice.chosen[0], choice.rejected[0]) == (1, 0)


def test_a_repeated_text_counts_where_it_is_first_usable():
    assert distinct(["a", "a", "b", "a"], [False, True, True, True]) == [False, True, True, False]
    assert distinct([], []) == []


def test_ragged_rows_and_no_prompts():
    kept = admissible([[1.0, 2.0, NAN], [3.0, NAN, NAN]], [["x", "y"], ["x"]])
    assert PAIRS["extremes"](kept).reason.tolist() == [None, extremes.FEWER_THAN_TWO]
    assert PAIRS["extremes"](np.empty((0, 5))).chosen.shape == (0,)
    assert PAIRS["extremes"](np.empty((2, 0))).reason.tolist() == [extremes.FEWER_THAN_TWO] * 2
    with pytest.raises(ValueError):
        admissible([[1.0, 2.0]], [])
