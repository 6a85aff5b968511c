"""Pair strategies against a plain loop over their definition, one prompt at a time."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cream.alarms import check
from cream.consistency import Tally
from cream.errors import UserError
from cream.pairs import PAIRS, all_pairs, extremes, oracle, random, threshold
from cream.pairs.build import FEWER_THAN_TWO, NO_MARGIN, NONE_CHOSEN, Rules, build, usable
from cream.pairs.choice import Choice
from cream.pairs.report import PairSet
from cream.records import Item, Message, Pair, Rewards

LABEL = Item(question="Which?\nA. oxygen\nB. neon", label="A")
VALUE = st.one_of(st.sampled_from([-1.0, 0.0, 2.5, None]), st.floats(-9, 9))
REWARDED = [name for name, strategy in PAIRS.items() if hasattr(strategy, "choose")]
UUID = st.sampled_from(["p", "p#1", "q", "r", "a long one", "é"])


def record(uuid, reward, texts=None, truncated=(), preferences=None, num_tokens=None):
    prompt = [Message("user", f"Question {uuid}?")]
    texts = texts or [chr(ord("a") + i) for i in range(len(reward))]
    return Rewards(
        uuid=uuid,
        prompt=prompt,
        response=[[*prompt, Message("assistant", text)] for text in texts],
        reward=reward,
        preferences=preferences,
        num_tokens=num_tokens,
        finish_reason=["length" if i in truncated else "stop" for i in range(len(reward))],
    )


@st.composite
def prompts(draw, value=VALUE, most=6):
    """Prompts of up to six responses, graded by the label A: ties, nulls, truncated and equal texts are common."""
    made = []
    for uuid in draw(st.lists(UUID, unique=True, min_size=1, max_size=4)):
        count = draw(st.integers(0, most))
        rewards, letters = (draw(st.lists(each, min_size=count, max_size=count)) for each in (value, LETTERS))
        texts = [f"Because {letter}. Answer: {letter[0]}" for letter in letters]
        made.append(record(uuid, rewards, texts, draw(st.sets(st.integers(0, 5), max_size=2))))
    return made


LETTERS = st.sampled_from(["A1", "A2", "A3", "B1", "B2", "B3"])


@st.composite
def matrices(draw):
    """One prompt's rewards and preferences: probabilities that a model states, not always the same in both orders."""
    count = draw(st.integers(2, 5))
    p = st.one_of(st.none(), st.sampled_from([0.0, 0.5, 0.7, 1.0]), st.floats(0, 1))
    rows = [[None if i == j else draw(p) for j in range(count)] for i in range(count)]
    return record("p", draw(st.lists(st.floats(-9, 9), min_size=count, max_size=count)), preferences=rows)


def kept_of(one):
    """Indices that may enter a pair, by the definition: rewarded, not truncated, first such response of its text."""
    kept = []
    for i, text in enumerate(one.responses()):
        complete = one.finish_reason[i] == "stop"
        if one.reward[i] is not None and complete and text not in [one.responses()[j] for j in kept]:
            kept.append(i)
    return kept


def chosen(name, records, options=None, **rules):
    """{uuid: [(chosen, rejected, confidence), …], or why there is none}, as the strategy's pairs are written."""
    labels = {one.uuid: LABEL for one in records}
    found = {}
    for one in records:  # alone, since a reason has no uuid
        made = build([one], None, Rules(PAIRS[name], options or PAIRS[name].Options(), **rules), labels=labels)
        pairs = [(p.selected_index, p.rejected_index, p.consistency) for p in made.pairs]
        assert made.count == len(pairs) and made.dropped.total() == (not pairs)
        found[one.uuid] = pairs or next(iter(made.dropped))
    return found


def indices(pairs):
    return pairs if isinstance(pairs, str) else [pair[:2] for pair in pairs]


@given(prompts())
def test_extremes_equal_the_loop(records):
    found = chosen("extremes", records)
    for one in records:
        kept, reward = kept_of(one), one.reward
        if len(kept) < 2:
            expected = FEWER_THAN_TWO
        elif len({reward[i] for i in kept}) == 1:
            expected = extremes.ALL_EQUAL
        else:
            expected = [(max(kept, key=reward.__getitem__), min(kept, key=reward.__getitem__))]
        assert indices(found[one.uuid]) == expected


@given(prompts())
def test_oracle_equals_the_loop(records):
    found = chosen("oracle", records)
    for one in records:
        kept, reward = kept_of(one), one.reward
        right = [i for i in kept if one.responses()[i].endswith("A")]
        wrong = [i for i in kept if one.responses()[i].endswith("B")]
        if len(kept) < 2:
            expected = FEWER_THAN_TWO
        elif not right:
            expected = oracle.NONE_CORRECT
        elif not wrong:
            expected = oracle.NONE_WRONG
        else:
            expected = [(max(right, key=reward.__getitem__), min(wrong, key=reward.__getitem__))]
        assert indices(found[one.uuid]) == expected


def test_the_oracle_overrules_the_reward():
    texts = ["Answer: B", "Answer: A", "It is B.", "It is A."]
    (pair,) = oracle.choose(record("p", [5.0, -5.0, 9.0, -9.0], texts), [0, 1, 2, 3], LABEL, None)
    assert pair == (1, 0, None)


def test_the_oracle_grades_by_the_items_task():
    """Without one a question with options is multiple choice, and both were right."""
    item = Item(question="Which?\n1. a solid\n2. a liquid", label="2", task="gsm8k")
    texts = ["Answer: a liquid", "Answer: 2"]
    assert oracle.choose(record("p", [1.0, 0.0], texts), [0, 1], item, None) == [(1, 0, None)]


@given(prompts(), st.one_of(st.none(), st.sampled_from([0.0, 1.0, 2.5]), st.floats(0, 9)))
def test_all_pairs_equal_the_loop(records, margin):
    found = chosen("all_pairs", records, margin=margin)
    for one in records:
        kept, reward = kept_of(one), one.reward
        pairs = [(i, j) for i in kept for j in kept if reward[i] > reward[j]]
        wide = [(i, j) for i, j in pairs if margin is None or reward[i] - reward[j] >= margin]
        if wide:
            assert sorted(indices(found[one.uuid])) == sorted(wide)
        else:
            reasons = (FEWER_THAN_TWO, len(kept) < 2), (all_pairs.ALL_EQUAL, not pairs), (NO_MARGIN, True)
            assert found[one.uuid] == next(reason for reason, holds in reasons if holds)


@given(prompts(), st.floats(0.5, 1))
def test_threshold_by_rewards_equals_the_loop(records, least):
    found = chosen("threshold", records, threshold.Options(least))
    for one in records:
        kept, pairs = kept_of(one), {}
        for i, j in itertools.permutations(kept, 2):
            p = 1 / (1 + math.exp(one.reward[j] - one.reward[i]))
            if one.reward[i] != one.reward[j] and p > 0.5 and p >= least:
                pairs[i, j] = pytest.approx(p)
        if pairs:
            assert {(i, j): p for i, j, p in found[one.uuid]} == pairs
        else:
            assert found[one.uuid] == (FEWER_THAN_TWO if len(kept) < 2 else threshold.NONE_SURE)


@given(matrices(), st.floats(0.5, 1))
def test_threshold_by_preferences_equals_the_loop(one, least):
    pairs = {}
    for i, j in itertools.permutations(range(len(one.reward)), 2):
        there, back = one.preferences[i][j], one.preferences[j][i]
        known = np.array([np.nan if there is None else there, np.nan if back is None else 1 - back])
        if not np.isnan(known).all() and (p := np.nanmean(known)) > 0.5 and (p >= least or abs(p - least) < 1e-12):
            pairs[i, j] = p
    found = chosen("threshold", [one], threshold.Options(least))["p"]
    found = {} if isinstance(found, str) else {(i, j): p for i, j, p in found}
    on_the_edge = {pair for pair, p in pairs.items() if abs(p - least) < 1e-12 or p - 0.5 < 1e-12}
    assert found.keys() - on_the_edge == pairs.keys() - on_the_edge
    assert all(p == pytest.approx(pairs[pair]) and p >= least for pair, p in found.items())


def test_a_preference_is_the_mean_of_both_orders():
    """Always the first one shown is no preference; whom the rewards favour is not asked."""
    biased, sure = [[None, 0.9], [0.9, None]], [[None, 0.2], [0.9, None]]
    assert chosen("threshold", [record("p", [9.0, 0.0], preferences=biased)]) == {"p": threshold.NONE_SURE}
    ((i, j, p),) = chosen("threshold", [record("p", [9.0, 0.0], preferences=sure)])["p"]
    assert (i, j, p) == (1, 0, pytest.approx(0.85))
    one_order = [[None, 0.2], [None, None]]
    assert chosen("threshold", [record("p", [9.0, 0.0], preferences=one_order)])["p"] == [(1, 0, 0.8)]
    as_sure = chosen("threshold", [record("p", [9.0, 0.0], preferences=one_order)], threshold.Options(0.8))
    assert as_sure["p"] == [(1, 0, 0.8)]
    unasked = [[None, None], [None, None]]
    assert chosen("threshold", [record("p", [9.0, 0.0], preferences=unasked)]) == {"p": threshold.NONE_SURE}


def test_far_rewards_are_certain_and_no_overflow():
    assert chosen("threshold", [record("p", [-1e300, 1e300])])["p"] == [(1, 0, 1.0)]


@given(prompts(), st.integers(0, 2**32 - 1), st.randoms())
def test_random_pairs_do_not_depend_on_order_or_company(records, seed, shuffler):
    def pairs(some):
        return {p.uuid: (p.selected, p.rejected) for p in build(some, None, Rules(random, random.Options(seed))).pairs}

    whole = pairs(records)
    assert whole.keys() == {one.uuid for one in records if len(kept_of(one)) > 1}
    mixed = list(records)
    shuffler.shuffle(mixed)
    assert pairs(mixed) == whole == {uuid: pair for one in records for uuid, pair in pairs([one]).items()}


def test_random_pairs_are_as_likely_in_each_order_and_change_with_the_seed():
    records = [record(f"p{i}", [1.0, 2.0, 2.0]) for i in range(3000)]
    draws = [
        [(p.selected_index, p.rejected_index) for p in build(records, None, Rules(random, random.Options(seed))).pairs]
        for seed in (0, 1)
    ]
    counts = Counter(draws[0])
    assert counts.keys() == {*itertools.permutations(range(3), 2)}
    assert sum((n - 500) ** 2 / 500 for n in counts.values()) < 20.5  # chi-squared of 5 degrees, p = 0.001
    assert 0.1 < np.mean([a == b for a, b in zip(*draws, strict=True)]) < 0.24  # 1/6 by chance


@given(prompts(), st.sampled_from(REWARDED), st.one_of(st.none(), st.integers(1, 3)), st.booleans())
def test_what_holds_of_all_pairs(records, name, most, keep_truncated):
    rules = Rules(PAIRS[name], PAIRS[name].Options(), most=most, keep_truncated=keep_truncated)
    made = build(records, None, rules, labels={one.uuid: LABEL for one in records}, size=2)
    pairs, by_uuid = list(made.pairs), {one.uuid: one for one in records}
    assert len({pair.uuid for pair in pairs}) == len(pairs) == made.count
    assert made.dropped.total() + len({pair.prompt[0].content for pair in pairs}) == made.prompts == len(records)
    found = {}
    for pair in pairs:
        source = next(one for one in records if one.prompt == pair.prompt)
        found.setdefault(source.uuid, []).append(pair)
        assert pair.selected[-1].content != pair.rejected[-1].content
        assert pair.selected == source.response[pair.selected_index]
        assert pair.rejected == source.response[pair.rejected_index]
        assert pair.margin == source.reward[pair.selected_index] - source.reward[pair.rejected_index]
        if name in ("extremes", "all_pairs", "threshold"):
            assert pair.margin > 0
        assert keep_truncated or not (pair.selected_truncated or pair.rejected_truncated)
    for uuid, some in found.items():
        assert [p.uuid for p in some] == [uuid, *(f"{uuid}#{n}" for n in range(2, len(some) + 1))]
        assert len(some) <= (most or math.inf)
        order = [(p.consistency if name == "threshold" else 1, p.margin) for p in some]
        assert order == sorted(order, reverse=True)
        assert uuid in by_uuid


@given(prompts(), st.sampled_from(["all_pairs", "threshold"]), st.integers(1, 3))
def test_fewer_pairs_of_a_prompt_are_the_first_of_all(records, name, most):
    """So that a uuid names the same pair, however many are kept; all_pairs' first is that of extremes."""
    every, few = chosen(name, records), chosen(name, records, most=most)
    assert few == {uuid: pairs if isinstance(pairs, str) else pairs[:most] for uuid, pairs in every.items()}
    if name == "all_pairs":
        one = {uuid: pairs if isinstance(pairs, str) else pairs[:1] for uuid, pairs in every.items()}
        assert one == chosen("extremes", records)


@pytest.mark.parametrize("order", [1, -1])
def test_a_prompt_that_is_named_as_a_further_pair_is_refused(order):
    records = [record("p", [1.0, 2.0, 2.0]), record("p#2", [1.0, 2.0])][::order]
    for size in (1, 1024):
        with pytest.raises(UserError, match="'p#2'.*UUID#2"):
            list(build(records, None, Rules(all_pairs), size=size).pairs)
    assert [p.uuid for p in build(records, None, Rules(all_pairs, most=1)).pairs] == ["p", "p#2"][::order]
    assert [p.uuid for p in build(records, None).pairs] == ["p", "p#2"][::order]


def test_a_margin_leaves_wide_pairs():
    one = record("p", [0.0, 1.0, 3.0])
    assert indices(chosen("all_pairs", [one], margin=2.0)["p"]) == [(2, 0), (2, 1)]
    assert chosen("extremes", [one], margin=3.5)["p"] == NO_MARGIN
    lower = record("p", [5.0, 1.0], ["Answer: B", "Answer: A"])
    assert (
        indices(chosen("oracle", [lower])["p"]) == [(1, 0)] and chosen("oracle", [lower], margin=0.0)["p"] == NO_MARGIN
    )


def test_of_equal_margins_the_higher_rewards_come_first():
    assert indices(chosen("all_pairs", [record("p", [0.0, 1.0, 2.0])])["p"]) == [(2, 0), (2, 1), (1, 0)]


def test_pairs_of_a_strategy_of_ones_own():
    """The surest first, one that is surely wrong last; or none at all."""

    class Stated:
        INPUTS = {"rewards": True}
        pairs = [Choice(0, 1, 0.0), Choice(1, 2, 0.5), Choice(0, 2, 0.9)]

        def choose(self, record, usable, item, options):
            return self.pairs

    strategy, one = Stated(), record("p", [3.0, 2.0, 1.0])
    made = build([one], None, Rules(strategy))
    found = [(p.selected_index, p.rejected_index, p.consistency) for p in made.pairs]
    assert found == [(0, 2, 0.9), (1, 2, 0.5), (0, 1, 0.0)]
    assert made.own and (made.c.n, made.c.mean) == (3, pytest.approx(1.4 / 3))  # of the pairs
    assert made.without_c == 0
    strategy.pairs = []
    made = build([one], None, Rules(strategy))
    assert list(made.pairs) == [] and made.dropped == {NONE_CHOSEN: 1}


def test_a_pair_holds_all_of_its_record():
    one = record("p", [1.0, 4.0, None], truncated=[0])
    one.score, one.source_prompt, one.extra = [-1.0, -2.0, None], "Solve it.", {"level": 2}
    (pair,) = build([one], None, Rules(keep_truncated=True)).pairs
    assert pair == Pair(
        uuid="p",
        prompt=one.prompt,
        selected=one.response[1],
        rejected=one.response[0],
        consistency=1.0,
        tau=1.0,
        selected_index=1,
        rejected_index=0,
        margin=3.0,
        selected_logp=-2.0,
        rejected_logp=-1.0,
        selected_truncated=False,
        rejected_truncated=True,
        source_prompt="Solve it.",
        extra={"level": 2},
    )
    one.finish_reason = None  # of a file from elsewhere
    (pair,) = build([one], None).pairs
    assert not pair.selected_truncated and not pair.rejected_truncated


def test_a_response_that_a_stop_string_ended_is_whole_and_has_no_end_of_turn():
    one = record("p", [1.0, 4.0, 2.0], truncated=[2])
    one.finish_reason[1] = "stop_string"
    assert usable(one, one.reward, False, Counter()) == [0, 1]
    (pair,) = build([one], None).pairs
    assert (pair.selected_index, pair.selected_truncated, pair.rejected_truncated) == (1, True, False)


def test_a_strategy_states_confidences_or_reads_a_previous_ranking():
    class Both:
        __name__, INPUTS = "both", {"rewards": True, "previous": False}

        def choose(self, record, usable, item, options):
            return [(extremes.best_against_worst([2.0, 1.0], [0, 1], [0, 1]))._replace(confidence=0.9)]

    with pytest.raises(ValueError, match="both reads `previous`.*states its own"):
        list(build([record("p", [2.0, 1.0])], None, Rules(Both())).pairs)


def test_an_equal_text_with_another_reward_does_not_pair_with_itself():
    """Padding noise gives one text two rewards; unfiltered, it was both best and worst."""
    one = record("p", [1.0001, 0.5, 1.0], ["same", "other", "same"])
    assert usable(one, one.reward, False, Counter()) == [0, 1]
    assert chosen("extremes", [record("p", [1.0001, 1.0], ["same", "same"])]) == {"p": FEWER_THAN_TWO}


def test_a_repeated_text_counts_where_it_is_first_rewarded_and_whole():
    one, counts = record("p", [None, 1.0, 2.0, 3.0, 4.0], list("aaaba"), truncated=[1]), Counter()
    assert usable(one, one.reward, False, counts) == [2, 3]
    assert usable(one, one.reward, False, counts) == [2, 3]
    assert counts == {"": 10, "without a reward": 2, "truncated": 2, "equal to an earlier one": 2}
    assert usable(one, one.reward, True, Counter()) == [1, 3]


def test_what_the_previous_model_did_not_reward_leaves_and_so_do_its_repetitions():
    one, counts = record("p", [1.0, 2.0, 3.0], list("aab")), Counter()
    assert usable(one, [None, 5.0, 6.0], False, counts) == [2]
    assert counts == {"": 3, "without a reward by the previous model": 1, "equal to an earlier one": 1}


def test_lengths_of_several_pairs_are_of_all_of_them():
    made = build([record("p", [1.0, 2.0, 4.0], num_tokens=[5, 9, 8])], None, Rules(all_pairs))
    assert len(list(made.pairs)) == 3
    assert not made.own and (made.c.n, made.c.mean) == (1, 1.0)  # of the prompt
    assert made.lengths.longer_by == ((8 - 5) + (8 - 9) + (9 - 5)) / 3
    assert made.lengths.bias == pytest.approx(np.corrcoef([1, 2, 4], [5, 9, 8])[0, 1])


@pytest.mark.parametrize(
    ("values", "alarm"),
    [
        ([0.1, 0.2, 0.1, 0.2], "c_contradicts"),
        ([0.3], "c_contradicts"),
        ([0.2, 0.9, 0.4, 0.6, 0.5], "c_undecided"),
        ([0.1, 1.0, 0.9, 0.5], "c_undecided"),  # few, and far apart
        ([0.54] * 1000, "c_undecided"),  # many, yet they hardly agree
        ([0.4, 0.5, 0.4, 0.6], "c_undecided"),
        ([0.8, 0.7, 0.9], None),
        ([1.0, 1.0], None),
        ([0.7], None),
    ],
)
def test_a_doubtful_mean_sets_off_an_alarm(values, alarm):
    pairs = PairSet(c=Tally(values))
    fired = [each["alarm"] for each in check(pairs.alarm_facts(used=False))]
    assert fired == [alarm] * (alarm is not None)
    below = sum(value < 0.5 for value in values) / len(values)
    assert ("c_below_half" in {each["alarm"] for each in check(pairs.alarm_facts(used=True))}) is (below > 0.3)
    assert not check(PairSet(c=Tally(values), own=True).alarm_facts(used=True))


@pytest.mark.parametrize(
    ("c", "beta", "line"),
    [
        (
            0.7,
            0.1,
            "--beta 0.1, log-ratio margins stop at logit(C) / beta = 8.47 nats (`margin` in the training log is",
        ),
        (0.7, 1.0, "= 0.847 nats (`margin` in the training log is beta times that: 0.847)"),
        (0.7, None, None),  # --method original
        (1.0, 0.1, None),  # no cap
    ],
)
def test_the_cap_and_the_unit_of_the_logged_margin(caplog, c, beta, line):
    with caplog.at_level("INFO", logger="cream"):
        PairSet(c=Tally([c] * 4), count=4, prompts=4).report(beta)
    assert ("nats" in caplog.text) is (line is not None) and (line or "") in caplog.text
