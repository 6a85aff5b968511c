"""Measures of rewards: each against an independent computation, and the RewardBenches' published numbers."""

import importlib
import math
import sys
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cream.errors import UserError
from cream.evaluation.bootstrap import Draws, mean_of
from cream.evaluation.grade import majority
from cream.evaluation.rewards import best_of_n as bon
from cream.evaluation.rewards import calibration, correlation, rewardbench, rewardbench2
from cream.evaluation.rewards.accuracy import Results, choose_benchmark
from cream.evaluation.rewards.measure import How, compare, summarise
from cream.evaluation.rewards.rows import Row


def ones(values):
    return np.ones((1, len(values)))


def ties_score(rows):
    parts = rewardbench2.tie_parts(rows)
    return rewardbench2.ties_score(parts, ones(parts))[0]


# RewardBench ----------------------------------------------------------------------------------------------------------

A = {"ref:0": ([2, 1], 1), "tied:0": ([3, 2.5, 0], 2)}
B = A | {"ref:1": ([0.5, 1, 0.2], 1), "tied:1": ([4, 1, 0.5, -1], 2)}
C = {"ref:0": ([2, 1], 1), "tied:0": ([3, 3, 0], 2)}


def test_the_ties_score_has_the_packages_values():
    """Vectors of the official function; of release 0.1.4 for C, where the spread is 0."""
    assert ties_score(A) == pytest.approx(1.0076159415595576, abs=1e-15)
    assert ties_score(B) == pytest.approx(0.6496919675518493, abs=1e-15)
    assert ties_score(C) == 1.0
    assert np.isnan(ties_score({"ref:0": ([2, 1], 1), "tied:0": ([3, 0], 1)}))  # the package's nan
    assert ties_score(B | {"tied:1": ([4, None, 0.5, -1], 2)}) == pytest.approx(ties_score(A) - 0.5, abs=1e-15)


def test_a_row_of_rewardbench_2_shares_a_tie():
    assert [rewardbench2.share_of_best(r) for r in ([3, 1, 2, 0], [3, 3, 1, 3], [1, 2, 0, 0], [3, None, 0, 0])] == [
        1,
        1 / 3,
        0,
        0,
    ]


def test_weights_and_sections():
    assert {name: sum(w.values()) for name, w in rewardbench.SECTIONS.items()} == {
        "Chat": 358,
        "Chat Hard": 456,
        "Safety": 740,
        "Reasoning": 1968,
    }
    assert sum(rewardbench.ROWS.values()) == 2985 and sum(rewardbench2.DOMAINS.values()) == 1865
    assert rewardbench.SECTIONS["Safety"]["xstest-should-respond"] == 250  # two released scripts swap them
    assert [len(names) for names in rewardbench.LENGTHS.values()] == [3, 9, 11]
    weights = rewardbench.section_weights("Chat", {"mt-bench-easy": 3, "mt-bench-med": 1})
    assert rewardbench.weighted({"mt-bench-easy": 1.0, "mt-bench-med": 0.0}, weights) == 0.75
    assert rewardbench.section_weights("Safety", {}) == {} and rewardbench.weighted({}, {}) is None
    assert rewardbench.section_weights("Chat", dict.fromkeys(rewardbench.WEIGHTS, 1)) == rewardbench.SECTIONS["Chat"]


def test_the_leaderboard_score():
    """ArmoRM's published columns give its published score; a missing section gives none."""
    armo = dict(zip(rewardbench.SECTIONS, (96.9, 76.8, 92.2, 97.3), strict=True))
    assert rewardbench.leaderboard(armo, 74.3) == pytest.approx(88.97, abs=0.05)
    assert rewardbench.leaderboard(armo) == pytest.approx(90.8)
    assert rewardbench.leaderboard(armo | {"Safety": None}) is None
    assert rewardbench.prior_mean({"shp": 1.0}) is None


# Pairs ----------------------------------------------------------------------------------------------------------------

log_odds = st.lists(st.sampled_from([-3.0, -1.0, -0.25, 0.0, 0.25, 1.0, 2.0, 4.0]), min_size=2, max_size=12)


def repeated(weights, *arrays):
    """Weighted items as that many items."""
    return [np.repeat(array, weights) for array in arrays]


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_calibration_of_weighted_pairs_is_that_of_repeated_ones(data):
    d = np.array(data.draw(log_odds))
    weights = np.array(data.draw(st.lists(st.integers(0, 3), min_size=len(d), max_size=len(d)).filter(any)))
    (some,) = repeated(weights, d)
    for name, measure in calibration.measures(d).items():
        if name != "ece_equal_mass":  # whose bins are of all pairs
            again = calibration.measures(some)[name](ones(some))
            assert measure(weights[None].astype(float)) == pytest.approx(again, nan_ok=True), name


@settings(max_examples=40)
@given(log_odds)
def test_calibration_by_hand(values):
    d = np.array(values)
    found = {name: measure(ones(d))[0] for name, measure in calibration.measures(d).items()}
    p = [1 / (1 + math.exp(-v)) for v in values]
    conf, right = [max(q, 1 - q) for q in p], [(v > 0) + (v == 0) / 2 for v in values]
    bins = {}
    for c, r in zip(conf, right, strict=True):
        bins.setdefault(next(b for b in range(10) if c < 0.55 + b / 20 or b == 9), []).append((c, r))
    gaps = [abs(sum(r - c for c, r in some)) for some in bins.values()]
    assert found["ece"] == pytest.approx(sum(gaps) / len(d))
    assert found["mce"] == pytest.approx(max(g / len(some) for g, some in zip(gaps, bins.values(), strict=True)))
    assert found["brier"] == pytest.approx(np.mean([(1 - q) ** 2 for q in p]))
    assert found["nll"] == pytest.approx(np.mean([-math.log(q) for q in p]))
    assert found["accuracy_at_100"] == pytest.approx(np.mean(right))


def test_against_scikit_learn(monkeypatch):
    monkeypatch.delitem(sys.modules, "sklearn", raising=False)
    metrics = pytest.importorskip("sklearn.metrics")
    curve = importlib.import_module("sklearn.calibration").calibration_curve
    rng = np.random.default_rng(0)
    d = rng.normal(1, 2, 500).round(1)
    d = d[d != 0]
    p, right = calibration.probability(d), d > 0
    conf = calibration.probability(abs(d))
    found = {name: measure(ones(d))[0] for name, measure in calibration.measures(d).items()}
    side = rng.random(len(d)) < 0.5  # which of both responses is called the first
    first = np.where(side, p, 1 - p)
    assert found["brier"] == pytest.approx(metrics.brier_score_loss(side, first))
    assert found["nll"] == pytest.approx(metrics.log_loss(side, first))
    assert found["auroc"] == pytest.approx(metrics.roc_auc_score(right, conf))
    share, mean = curve(right, 2 * conf - 1, n_bins=10)
    sizes = np.histogram(2 * conf - 1, 10, (0, 1))[0]
    assert found["ece"] == pytest.approx(sizes[sizes > 0] @ abs(share - (mean + 1) / 2) / len(d))
    for name in [name for name in sys.modules if name.split(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)


def test_selective_accuracy_takes_part_of_equal_confidences():
    d = np.array([4.0, -3, 1, 1, -1, 1])  # by confidence: right, wrong, then four of which three are right
    measures = calibration.measures(d)
    assert measures["accuracy_at_50"](ones(d))[0] == pytest.approx((1 + 0 + 0.75) / 3)
    assert measures["accuracy_at_80"](ones(d))[0] == pytest.approx((1 + 2.8 * 0.75) / 4.8)


def test_the_temperature_that_made_the_labels_is_found():
    rng = np.random.default_rng(0)
    d = np.abs(rng.normal(0, 4, 4000))
    d = np.where(rng.random(4000) < calibration.probability(d / 2.5), d, -d)
    assert calibration.fit_temperature(d) == pytest.approx(2.5, rel=0.1)
    assert calibration.fit_temperature(np.array([1.0, 2.0])) == pytest.approx(math.exp(-3), rel=1e-3)  # the bound


# Correlations ---------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 3)), min_size=2, max_size=10))
def test_weighted_correlations(rows):
    x, y, weights = (np.array(column) for column in zip(*rows, strict=True))
    u, v = repeated(weights, x.astype(float), y.astype(float))
    w = weights[None].astype(float)
    if len(u) < 2 or len(set(u)) < 2 or len(set(v)) < 2:
        assert len(u) < 2 or np.isnan(correlation.pearson(w, x, y)).all()
        return
    assert correlation.pearson(w, x, y)[0] == pytest.approx(stats.pearsonr(u, v).statistic)
    assert correlation.spearman(w, x, y)[0] == pytest.approx(stats.spearmanr(u, v).statistic)


def test_partial_correlation_is_that_of_the_residuals():
    rng = np.random.default_rng(0)
    z = rng.normal(size=50)
    x, y = z + rng.normal(size=50), rng.normal(size=50) - z
    left = [v - np.polyval(np.polyfit(z, v, 1), z) for v in (x, y)]
    assert correlation.partial(ones(z), x, y, z)[0] == pytest.approx(stats.pearsonr(*left).statistic)
    assert correlation.partial(ones(z), x, y, 0 * z)[0] == pytest.approx(stats.pearsonr(x, y).statistic)
    assert np.isnan(correlation.partial(ones(z), z, y, z)[0])


# Best-of-N ------------------------------------------------------------------------------------------------------------

responses = st.lists(
    st.tuples(st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.sampled_from(["1", "2", "3", "none"])), min_size=1, max_size=6
)


@settings(max_examples=40, deadline=None)
@given(responses)
def test_best_of_n_is_the_mean_over_all_subsets(found):
    rewards, answers = zip(*found, strict=True)
    gold = [float(answer == "1") for answer in answers]
    finals = [None if answer == "none" else answer for answer in answers]
    for n in range(1, len(found) + 1):
        best, oracle, vote, weighted = [], [], [], []
        for some in combinations(range(len(found)), n):
            top = max(rewards[i] for i in some)
            best.append(np.mean([gold[i] for i in some if rewards[i] == top]))
            oracle.append(max(gold[i] for i in some))
            own = [answers[i] for i in some]
            vote.append(gold[some[majority(own)]])
            sums = {a: sum(rewards[i] for i in some if answers[i] == a) for a in own if a != "none"}
            first = max(sums, key=sums.get, default=None)
            weighted.append(float(first == "1"))
        assert bon.expected_best(rewards, gold, n) == pytest.approx(np.mean(best))
        assert bon.oracle(gold, n) == pytest.approx(np.mean(oracle))
        wrong = len(gold) - int(sum(gold))
        assert bon.oracle(gold, n) == pytest.approx(1 - math.comb(wrong, n) / math.comb(len(gold), n))
        assert bon.vote(finals, gold, n) == pytest.approx(np.mean(vote))
        assert bon.vote(finals, gold, n, bon.WEIGHTS["reward"], rewards) == pytest.approx(np.mean(weighted))


def test_best_of_n_by_hand():
    assert bon.expected_best([1, 2, 3, 4], [0, 1, 0, 1], 2) == pytest.approx(2 / 3)
    assert bon.sizes(6) == [1, 2, 4, 6] and bon.sizes(1) == [1]
    assert bon.kl(1) == 0 and bon.kl(16) == pytest.approx(math.log(16) - 15 / 16)
    assert bon.chances(1000, 64).sum() == pytest.approx(1)
    some = bon.subsets(40, 8, seed=1)  # too many for all of them
    assert some.shape == (bon.MOST, 8) and (np.diff(some) > 0).all()
    assert np.bincount(some.ravel()) == pytest.approx(np.full(40, 200), abs=60)
    assert bon.WEIGHTS["softmax"](np.array([[0.0, math.log(3)]])) == pytest.approx(np.array([[1 / 3, 1]]))
    assert bon.WEIGHTS["sigmoid"](np.array([[0.0, math.log(3)]])) == pytest.approx(np.array([[0.5, 0.75]]))


# Draws ----------------------------------------------------------------------------------------------------------------


def test_draws_are_of_prompts_within_subsets():
    draws = Draws(["a", "a", "b", "c", "d"], ["x", "x", "x", "y", "y"], resamples=300)
    weights = np.concatenate([*draws.weights()])
    assert weights.shape == (300, 5) and (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, [0, 2]].sum(axis=1) == 2).all() and (weights[:, 3:].sum(axis=1) == 2).all()
    assert {*weights[:, 0]} == {0, 1, 2}


def test_an_interval_has_the_width_of_its_standard_error():
    values = np.random.default_rng(0).normal(size=400)
    found = Draws(range(400)).estimate(mean_of(values))
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert Draws([]).estimate(mean_of(values)) == (None, None, None, 0)


# The summary ----------------------------------------------------------------------------------------------------------


def pair(uuid, d, subset="all", lengths=(1, 1), **more):
    return Row(uuid, subset, uuid, [d, 0.0] if d is not None else [None, 0.0], [1.0, 0.0], [*lengths], **more)


def test_a_subset_is_never_called_the_benchmark():
    rows = [pair(f"{name}{i}", 1.0, name) for name in rewardbench.WEIGHTS for i in range(2)]
    found = summarise(rows, choose_benchmark("auto", rows), How())
    assert found["benchmark"] == "RewardBench" and not found["complete"] and "score" not in found
    assert found["score_of_this_subset"]["score"]["value"] == 1
    assert found["sections"]["Reasoning"]["weights"] == "official" and found["sections"]["Reasoning"]["of"] == 1431
    fewer = summarise([row for row in rows if row.subset != "math-prm"], "rewardbench", How())
    assert (
        fewer["sections"]["Reasoning"] | {"missing": ["math-prm"], "weights": "rows", "n": 12}
        == fewer["sections"]["Reasoning"]
    )
    chat = summarise([row for row in rows if row.subset in rewardbench.SECTIONS["Chat"]], "rewardbench", How())
    assert "score_of_this_subset" not in chat and [*chat["sections"]] == ["Chat"]


def test_the_whole_benchmark_has_its_score():
    rng = np.random.default_rng(0)
    rows = [pair(f"{s}{i}", float(rng.normal(0.5)), s) for s, n in rewardbench.ROWS.items() for i in range(n)]
    rows += [pair(f"{s}{i}", 1.0 - 2 * (i < 1), s) for s in rewardbench.PRIOR for i in range(4)]
    results = Results.of(rows, "rewardbench")
    own = {s: np.mean([r.rewards[0] > 0 for r in rows if r.subset == s]) for s in rewardbench.WEIGHTS}
    sections = [
        sum(own[s] * w for s, w in weights.items()) / sum(weights.values()) for weights in rewardbench.SECTIONS.values()
    ]
    assert results.complete()
    measures = results.measures()
    assert results.value(measures["score"]["score"]) == pytest.approx(np.mean(sections))
    assert results.value(measures["score"]["score with prior sets"]) == pytest.approx((2 * sum(sections) + 0.75) / 9)
    estimate = results.estimate("score", "score", measures["score"]["score"])
    assert 0.01 < estimate.high - estimate.low < 0.06


def test_ties_of_rewards():
    rows = [pair("a", 0.0), pair("b", 1.0)]
    assert summarise(rows, None, How())["all"]["all"]["value"] == 0.5
    half = summarise(rows, None, How(ties="half"))
    assert half["all"]["all"]["value"] == 0.75 and half["subsets"]["all"]["ties"] == 1


def test_a_response_without_a_reward_makes_its_pair_wrong():
    found = summarise([pair("a", None, reasons=("too long",)), pair("b", 1.0)], None, How())
    assert found["all"]["all"]["value"] == 0.5 and found["calibration"]["pairs"] == 1
    assert found["unrewarded"] == {"responses": 1, "reasons": {"too long": 1}}


def test_rewardbench_2():
    rows = [
        Row(f"{d}{i}", d, "", [1.0, 0, 0, float(i)], [1.0, 0, 0, 0], [1] * 4)
        for d in rewardbench2.DOMAINS
        for i in range(2)
        if d != "Ties"
    ]
    rows += [
        Row(n, "ties", n, [*map(float, r)], [1.0] * c + [0.0] * (len(r) - c), [1] * len(r)) for n, (r, c) in B.items()
    ]
    found = summarise(rows, choose_benchmark("auto", rows), How())
    assert found["subsets"]["Math"]["value"] == 0.75 and found["ties"] == "1/c"
    assert found["subsets"]["Ties"]["value"] == pytest.approx(0.6496919675518493)
    assert found["score_of_this_subset"]["score"]["value"] == pytest.approx((5 * 0.75 + 0.6496919675518493) / 6)
    assert found["subsets"]["Ties"]["high"] == pytest.approx(1.0076159415595576)  # both draws are of the first prompt


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([pair("a", 1.0, "hep-go"), pair("b", 1.0, "mine")], "its subset 'mine' is not one of RewardBench"),
        ([Row("a", "Math", "", [1.0, 2, 3], [0, 1, 0], [1] * 3)], "the correct responses first"),
        ([Row("a", "hep-go", "", [1.0, 2, 3], [1, 0, 0], [1] * 3)], "one chosen and one rejected"),
        ([Row("a", "Ties", "9", [1.0, 2, 3], [1, 0, 0], [1] * 3)], "ids of Ties are ref:N and tied:N, found '9'"),
    ],
)
def test_other_rows_are_refused(rows, message):
    with pytest.raises(UserError, match=message):
        choose_benchmark("auto", rows)
    assert choose_benchmark("none", rows) is None


def test_a_reward_by_length_is_found_out():
    rng = np.random.default_rng(0)
    rows = []
    for i in range(120):
        length = rng.integers(10, 100, 2)
        rows.append(pair(f"r{i}", float(length[0] - length[1]) / 30, lengths=length.tolist()))
    found = summarise(rows, None, How())["length"]
    assert found["spearman_of_differences"]["value"] == pytest.approx(1)
    assert found["accuracy_longer_minus_shorter"]["value"] == 1
    assert found["pearson_within_prompt"]["value"] > 0.95
    longer = np.mean([r.lengths[0] > r.lengths[1] for r in rows] + [0.5 * (r.lengths[0] == r.lengths[1]) for r in rows])
    assert found["accuracy_of_longer_is_better"]["value"] == pytest.approx(2 * longer, abs=0.02)
    constant = summarise([pair("a", 1.0), pair("b", 1.0)], None, How())["length"]
    assert constant["pearson"]["value"] is None and constant["spearman_of_differences"]["low"] is None


def test_calibration_is_of_pairs_that_no_temperature_was_fitted_on():
    rng = np.random.default_rng(0)
    rows = [pair(f"r{i}", float(v)) for i, v in enumerate(rng.normal(1, 3, 300))]
    found = summarise(rows, None, How())["calibration"]
    assert (
        found["temperature"] > 1 and found["held_out_after"]["nll"]["value"] < found["held_out_before"]["nll"]["value"]
    )
    assert found["fitted_on"] + found["held_out_before"]["nll"]["n"] == 300
    assert found["held_out_after"]["auroc"] == found["held_out_before"]["auroc"]
    scaled = summarise(rows, None, How(beta=0.5))["calibration"]
    assert scaled["temperature"] == pytest.approx(found["temperature"] / 2, rel=1e-3)


def test_two_rewards():
    a = [pair(f"r{i}", 1.0 if i < 60 else -1.0) for i in range(100)]
    b = [pair(f"r{i}", 1.0 if i >= 20 else -1.0) for i in range(100)]
    found = compare(a, b, None, How())["all"]["all"]
    assert found["value"] == pytest.approx(0.2) and (found["a"], found["b"]) == (0.6, 0.8)
    assert (found["only_a"], found["only_b"]) == (20, 40)
    assert found["p"] == pytest.approx(stats.binomtest(20, 60).pvalue)
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * math.sqrt((0.6 - 0.04) / 100), rel=0.15)


def test_best_of_n_of_a_file():
    rows = [
        Row(f"r{i}", "all", "", [1.0, 2, 3, 4], [0.0, 1, 0, 1], [1, 2, 3, 4], finals=["0", "1", "0", "1"])
        for i in range(3)
    ]
    rows.append(Row("short", "all", "", [1.0, None], [0.0, 1], [1, 1], finals=["0", "1"]))
    found = summarise(rows, None, How())["best_of_n"]
    assert (found["prompts"], found["skipped"]) == (3, 1) and [row["n"] for row in found["by_n"]] == [1, 2, 4]
    two = found["by_n"][1]
    assert two["best"]["value"] == pytest.approx(2 / 3) and two["oracle"]["value"] == pytest.approx(5 / 6)
    assert two["gap_closed"]["value"] == pytest.approx((2 / 3 - 1 / 2) / (5 / 6 - 1 / 2))
    assert found["by_n"][2]["length_of_best"]["value"] == pytest.approx(4 / 2.5)
    assert found["by_n"][2]["majority"]["value"] == 0 and found["by_n"][2]["weighted_majority_softmax"]["value"] == 1


def test_a_vote_does_not_weigh_less_than_nothing():
    rows = [Row("r", "all", "", [1.0, -2, 3], [0.0, 1, 0], [1, 2, 3], finals=["0", "1", "0"])]
    with pytest.raises(UserError, match="record 'r' has a reward of -2, and a vote cannot weigh less"):
        summarise(rows, None, How(votes="reward"))
