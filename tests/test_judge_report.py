"""How good a judge is: each figure against scipy, or a few lines of plain Python, and on public judgements."""

import json
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau, spearmanr

from cream.errors import UserError
from cream.evaluation import judges
from cream.evaluation.bootstrap import ratio_interval
from cream.evaluation.judges import Judged
from cream.records import Item, Message, Record, Rewards

score = st.none() | st.integers(0, 3).map(float)
rows = st.lists(st.lists(st.tuples(score, score), min_size=1, max_size=5), min_size=1, max_size=6)


def judged(rewards):
    return Judged([f"p{i}" for i in range(len(rewards))], rewards, [[1] * len(row) for row in rewards])


@settings(max_examples=60)
@given(rows)
def test_against_gold(table):
    rewards, gold = [[r for r, _ in row] for row in table], [[g for _, g in row] for row in table]
    found = judges.against_gold(judged(rewards), gold)
    right, taus, rhos, orders, best = [], [], [], [], []
    top = max((r for row in rewards for r in row if r is not None), default=0)
    for row in table:
        both = [(r, g) for r, g in row if r is not None and g is not None]
        for (r, g), (s, h) in combinations(both, 2):
            if g != h:
                right.append(0.5 if r == s else float((r > s) == (g > h)))
        known = [g for _, g in row if g is not None]
        best += [g == max(known) for r, g in row if r == top and g is not None]
        if len(known) > 1:
            same = all((r > s) == (g > h) and (r < s) == (g < h) for (r, g), (s, h) in combinations(both, 2))
            orders.append(same and len(both) == len(known))
        if len(both) > 1:
            if all(len(set(column)) > 1 for column in zip(*both, strict=True)):
                taus.append(kendalltau(*zip(*both, strict=True)).statistic)
                rhos.append(spearmanr(*zip(*both, strict=True)).statistic)
    for (value, low, high, n), wanted in zip(found.values(), (right, orders, best, rhos, taus), strict=True):
        assert n == len(wanted)
        if wanted:
            assert value == pytest.approx(np.mean(wanted), abs=1e-9) and low <= value + 1e-9 and value <= high + 1e-9


def test_an_interval_draws_prompts():
    """Of 200 prompts with a pair each it is that of a proportion; with 10 equal pairs each it is no narrower."""
    rng = np.random.default_rng(0)
    one = rng.random(200) < 0.7
    value, low, high = ratio_interval(one, [1] * 200)
    assert (value, high - low) == (one.mean(), pytest.approx(2 * 1.96 * (0.7 * 0.3 / 200) ** 0.5, rel=0.15))
    assert ratio_interval(10 * one, [10] * 200) == pytest.approx((value, low, high))
    assert np.isnan(ratio_interval([0.0], [0])).all()


def test_ties_and_flips():
    assert judges.ties([[1.0, 1.0, 2.0], [3.0, 3.0, None], [5.0], []]) == (2, 4, 1, 2)
    always_a, clear, half = [[None, 1.0], [1.0, None]], [[None, 0.9], [0.2, None]], [[None, 0.5], [0.2, None]]
    gone = [[None, None], [0.2, None]]
    changed, sure, asked, shares = judges.flips([always_a, clear, half, gone])
    assert (changed, sure, asked) == ([1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0])
    assert shares == [1.0, 1.0, 0.9, 0.2, 0.5, 0.2]


def ordinal_alpha(scores):
    """Krippendorff's alpha by its definition: 1 - observed / expected disagreement, over ordered pairs of values."""
    units = [[v for v in unit if v is not None] for unit in scores]
    units = [unit for unit in units if len(unit) > 1]
    values = sorted({v for unit in units for v in unit})
    count = {v: sum(unit.count(v) for unit in units) for v in values}

    def apart(a, b):
        low, high = sorted((a, b))
        return (sum(count[v] for v in values if low <= v <= high) - (count[a] + count[b]) / 2) ** 2

    n = sum(count.values())
    observed = (
        sum(sum(apart(a, b) for i, a in enumerate(u) for j, b in enumerate(u) if i != j) / (len(u) - 1) for u in units)
        / n
    )
    expected = sum(count[a] * count[b] * apart(a, b) for a in values for b in values if a != b) / (n * (n - 1))
    return 1 - observed / expected


@settings(max_examples=40)
@given(st.lists(st.lists(score, min_size=3, max_size=3), min_size=2, max_size=12))
def test_agreement_is_krippendorffs_alpha(scores):
    pytest.importorskip("krippendorff")
    found = judges.alpha(scores)
    several = [[v for v in unit if v is not None] for unit in scores]
    if len({v for unit in several if len(unit) > 1 for v in unit}) < 2:
        assert found is None
    else:
        assert found == pytest.approx(ordinal_alpha(scores), abs=1e-9)


def rewards_of(uuid, values, **more):
    prompt = [Message("user", "?")]
    texts = [[*prompt, Message("assistant", "x" * (i + 1))] for i in range(len(values))]
    return Rewards(uuid=uuid, prompt=prompt, response=texts, reward=values, **more)


def test_the_report():
    found = judges.collect([
        rewards_of("a", [1.0, 2.0, 3.0], parts={"scores": [[1.0, None], [2.0, 2.0], [3.0, 3.0]]}),
        rewards_of("b", [None, 2.0], parts={"scores": [None, [2.0, 2.0]]}),
    ])  # fmt: skip
    gold = judges.gold_ranks(found, [Record(uuid="a", extra={"ranks": [2, 1, 0]})])
    assert gold == [[-2.0, -1.0, 0.0], [None, None]]
    text = "\n".join(judges.describe(found, gold))
    assert "2 prompts; 4 of 5 responses have a reward" in text
    assert "parsed: 7 of 8 (87.5 %) of the judgements" in text and "scores: 1: 1, 2: 4, 3: 2" in text
    assert "Spearman of reward and characters within a prompt 1.000 (1.000 to 1.000), 1 prompts" in text
    assert "pairwise accuracy: 1.000 (1.000 to 1.000) (3)" in text
    assert "against gold: 3 of 3 (100.0 %) of the pairs" in text
    compared = judges.collect([rewards_of("a", [0.5, 0.5], preferences=[[None, 1.0], [1.0, None]])])
    assert "in 1.000 (1.000 to 1.000) of 1 pairs" in "\n".join(judges.describe(compared))
    half = rewards_of("b", [0.5] * 3, preferences=[[None, 1.0, None], [0.0, None, None], [None] * 3])
    compared = judges.collect([rewards_of("a", [None] * 2, preferences=[[None] * 2] * 2), half])
    assert "parsed: 1 of 4 (25.0 %) of the pairs of responses have a choice" in "\n".join(judges.describe(compared))


def test_gold_of_other_responses_is_refused():
    found = judged([[1.0, 2.0]])
    for ranks in ([1], [1, "x"], "12", [1, True]):
        with pytest.raises(UserError, match=r"expected `ranks`, a list of 2 numbers"):
            judges.gold_ranks(found, [Record(uuid="p0", extra={"ranks": ranks})])
    with pytest.raises(UserError, match="none of its uuids"):
        judges.gold_ranks(found, [Record(uuid="q", extra={"ranks": [0, 1]})])
    with pytest.raises(UserError, match="none of its uuids"):
        judges.gold_labels(found, {})


def test_gold_labels():
    found = judged([[1.0, 2.0, 0.0], [1.0]])
    found.responses = [["Answer: 5", "Answer: 6", "no idea"], ["x"]]
    item = Item(uuid="p0", question="2 + 3?", label="5", task="gsm8k")
    assert judges.gold_labels(found, {"p0": item}) == [[1.0, 0.0, None], [None]]


@pytest.mark.parametrize("name, unparsed", [("GPT-4_Rating", 0), ("ChatGPT_CoT", 1)])
def test_public_judgements_by_models(shared, monkeypatch, name, unparsed):
    """AutoAlign's 100 comparisons in both orders, as one judge that is asked twice: against the figures that its own
    code computed of them, and against scikit-learn and scipy."""
    monkeypatch.delitem(sys.modules, "sklearn")  # conftest.py keeps it from transformers
    metrics = pytest.importorskip("sklearn.metrics")
    start = str(shared / "data" / "judge" / f"judge_Natural_{name}_")
    items, wanted = (json.loads(Path(f"{start}{part}.json").read_text()) for part in ("result", "statistics"))
    labels = [str(item["label"]) for item in items]
    orders = [[item["results"][0][f"swap = {swap}"]["winner"] for item in items] for swap in (False, True)]
    records, gold = [], []
    for i, (label, *said) in enumerate(zip(labels, *orders, strict=True)):
        scores = [[None if each is None else float(each == own) for each in said] for own in "12"]
        rewards = [np.mean([each for each in own if each is not None]) for own in scores]
        first = [[None, scores[0][0]], [scores[1][1], None]]
        records.append(rewards_of(f"q{i}", rewards, parts={"scores": scores}, preferences=first))
        gold.append(Record(uuid=f"q{i}", extra={"ranks": [int(label != own) for own in "12"]}))
    found = judges.collect(records)
    ranks = judges.gold_ranks(found, gold)

    agree = [metrics.accuracy_score(labels, [each or "none" for each in said]) for said in orders]
    assert [f"{100 * share:.1f}%" for share in agree] == [wanted[f"correct_{n}"].split("= ")[1] for n in (False, True)]
    known = [[each for each in said if each] for said in zip(*orders, strict=True)]
    right = [metrics.accuracy_score([label] * len(said), said) for label, said in zip(labels, known, strict=True)]
    told = judges.against_gold(found, ranks)
    assert told["pairwise accuracy"][::3] == (pytest.approx(np.mean(right), abs=1e-9), 100)
    taus = [kendalltau(*pair).statistic for pair in zip(found.rewards, ranks, strict=True) if len(set(pair[0])) > 1]
    assert told["Kendall"][::3] == (pytest.approx(np.mean(taus), abs=1e-9), len(taus))
    assert judges.alpha(found.scores) == pytest.approx(ordinal_alpha(found.scores), abs=1e-9)
    changed, clear, _, _ = judges.flips(found.first)
    same = sum(a == b for a, b in zip(*orders, strict=True))
    assert sum(clear) == 100 - unparsed and sum(clear) - sum(changed) == same == int(wanted["equal"].split()[0])


def test_public_judgements_by_people(shared):
    """PandaLM's 378 comparisons by three people: two as a judge that is asked twice, against the third."""
    prefers = {0: (0.5, 0.5), 1: (1.0, 0.0), 2: (0.0, 1.0)}
    records, gold = [], []
    for line in (shared / "data" / "pref" / "pandalm_human.jsonl").read_text().splitlines():
        item = json.loads(line)
        *asked, third = (prefers[each] for each in item["annotators"])
        scores = [list(each) for each in zip(*asked, strict=True)]
        records.append(rewards_of(item["id"], [sum(each) / 2 for each in scores], parts={"scores": scores}))
        gold.append(Record(uuid=item["id"], extra={"ranks": [-value for value in third]}))
    found = judges.collect(records)
    ranks = judges.gold_ranks(found, gold)
    right, orders, best, taus = [], [], [], []
    for (a, b), (g, h) in zip(found.rewards, ranks, strict=True):
        right += [] if g == h else [0.5 if a == b else float((a > b) == (g > h))]
        orders.append(np.sign(a - b) == np.sign(g - h))
        best += [own == max(g, h) for reward, own in ((a, g), (b, h)) if reward == 1.0]
        taus += [] if a == b or g == h else [kendalltau([a, b], [g, h]).statistic]
    values = [value[::3] for value in judges.against_gold(found, ranks).values()]
    wanted = [(np.mean(each), len(each)) for each in (right, orders, best, taus, taus)]
    assert len(records) == 378 and len(right) > 300 and values == [pytest.approx(each, abs=1e-9) for each in wanted]
    pytest.importorskip("krippendorff")
    assert judges.alpha(found.scores) == pytest.approx(ordinal_alpha(found.scores), abs=1e-9)


def test_no_two_edges_of_a_histogram_look_alike():
    text = judges._histogram([5.001, 5.002, 5.0035, 5.01])
    edges = [edge for each in text.split(", ") for edge in each.partition(":")[0].split(" to ")]
    assert len({*edges}) == judges.BINS + 1
