"""From few labels: the filters of pseudo-labels against plain Python, the parts of a pair file, joined training sets,
and the commands from a pair file to the next training set."""

import json
import math
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_pairs import record

import iterate
import make_pairs
import prepare_data
from cream.data import join, split
from cream.errors import UserError
from cream.files import store
from cream.loops.plan import plan
from cream.loops.reading import read_loop
from cream.pairs import ser, threshold
from cream.pairs.build import Rules, build, survey
from cream.pairs.ser import Filter
from cream.records import Message, Pair, Rewards, Samples
from cream.text.held_out import prompt_key

P = st.one_of(st.sampled_from([0.3, 0.45, 0.5, 0.55, 0.6]), st.floats(0.01, 0.99))
EIGHTHS = st.integers(-64, 64).map(lambda n: n / 8)  # so that sums and differences are exact


def logit(p):
    return math.log(p / (1 - p))


def label(pool, previous=None, **flags):
    """Pairs of a pool by --strategy threshold, its facts, and what was counted."""
    options = threshold.Options(**flags)
    threshold.check(options)
    rules = Rules(threshold, options)
    survey(pool, previous, rules)
    made = build(pool, previous, rules)
    return list(made.pairs), made.facts()["pseudo_labels"], made


def scored(*rewards, gold=None):
    """A pool with these rewards of each pair, uuids p0, p1 …"""
    pool = [record(f"p{i}", list(both)) for i, both in enumerate(rewards)]
    for one, values in zip(pool, gold or (), strict=gold is not None):
        one.extra = {"gold": values}
    return pool


def released(j, k):
    """rm_loop_filter_by_self.py: which of the two wins, None where the pair stays in the pool."""
    if (j > 0.55 and k < 0.45) or (j - k) > 0.3:
        return 0
    if (k > 0.55 and j < 0.45) or (k - j) > 0.3:
        return 1
    return None


# SER's filter ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("j", "k", "kept"),
    [
        (0.56, 0.44, {"1", "union"}),
        (0.55, 0.44, set()),
        (0.30, 0.61, {"1", "2", "union"}),
        (0.65, 0.35, {"1", "union"}),  # .30000000000000004 apart
        (0.50, 0.80, set()),  # likewise, and .3 in truth
        (0.56, 0.87, {"2", "union"}),
        (0.50, 0.50, set()),
    ],
)
def test_the_filter_by_hand(j, k, kept):
    for a, b in ((j, k), (k, j)):
        found = {s for s in ("1", "2", "union", ser.STOP) if Filter(s).keeps(logit(a), logit(b))}
        assert found == kept
        for status in kept:
            (pair,), _, _ = label(scored((logit(a), logit(b))), rule="ser", status=status, centre=False)
            assert (pair.selected_index, pair.rejected_index) == ((0, 1) if a > b else (1, 0))
            assert pair.consistency == pytest.approx(1 / (1 + math.exp(-abs(logit(a) - logit(b)))))


@pytest.mark.slow
@settings(max_examples=40)
@given(st.lists(st.tuples(P, P), min_size=1, max_size=8))
def test_union_is_the_released_rule(both):
    """So is a status for every pair by itself: 1 where it is met, else 2."""
    edges = [x for j, k in both for x in (j - 0.55, k - 0.55, j - 0.45, k - 0.45, abs(j - k) - 0.3)]
    assume(all(x == 0 or abs(x) > 1e-8 for x in edges))
    pairs, facts, _ = label(scored(*(map(logit, one) for one in both)), rule="ser", status="union", centre=False)
    winners = {f"p{i}": winner for i, one in enumerate(both) if (winner := released(*one)) is not None}
    assert {pair.uuid: pair.selected_index for pair in pairs} == winners
    assert (facts["kept"], facts["pairs"], facts["status"]) == (len(winners), len(both), "union")
    one_by_one = [any(Filter(status).keeps(*map(logit, one)) for status in "12") for one in both]
    assert sum(map(bool, one_by_one)) == len(winners)


@pytest.mark.slow
@settings(max_examples=40)
@given(st.lists(st.tuples(EIGHTHS, EIGHTHS), min_size=1, max_size=8), EIGHTHS, st.sampled_from(ser.STATUSES))
def test_a_constant_changes_nothing_where_rewards_are_centred(rewards, constant, status):
    made = [
        label(scored(*([r + more for r in both] for both in rewards)), rule="ser", status=status)
        for more in (0, constant)
    ]
    assert [(p.uuid, p.selected_index, p.consistency) for p in made[0][0]] == [
        (p.uuid, p.selected_index, p.consistency) for p in made[1][0]
    ]
    first, moved = (facts for _, facts, _ in made)
    assert moved["centre"] == moved["offset"] == first["offset"] + constant
    assert moved["offset"] == np.median([r + constant for both in rewards for r in both])


def test_without_a_centre_an_offset_costs_the_pairs():
    """The simulation of the docs: rewards from N(offset, 1)."""
    draws = np.random.default_rng(0).normal(size=(20_000, 2))
    shares = {
        offset: [float(Filter(status).keeps(*(draws + offset).T).mean()) for status in ("1", "2", "union")]
        for offset in (0, 2, 4)
    }
    expected = {0: (0.354, 0.329, 0.418), 2: (0.027, 0.096, 0.099), 4: (0.000, 0.001, 0.001)}
    for offset, values in expected.items():
        assert shares[offset] == pytest.approx(values, abs=0.012)


@pytest.mark.parametrize(
    ("rewards", "flags", "status"),
    [
        ([(1.0, -1.0)] * 2 + [(0.0, 0.1)] * 98, {}, "1"),
        ([(1.0, -1.0)] * 2 + [(0.0, 0.1)] * 99, {}, "stop"),  # less than 2 %
        ([(1.0, -1.0)] * 2 + [(0.0, 0.1)] * 99, {"min_share": 0.01}, "1"),
        ([(3.0, 0.5), (0.1, 0.3)], {"centre": False}, "2"),
        ([(0.1, 0.2)], {}, "stop"),
        ([(0.1, 0.2)], {"min_share": 0.0}, "stop"),  # one pair at least
        ([(9.0, -9.0)], {"status": "2"}, "2"),
        ([(0.1, 0.2)], {"status": "1"}, "1"),
    ],
)
def test_the_status_of_a_pool(rewards, flags, status):
    pairs, facts, made = label(scored(*rewards), rule="ser", **flags)
    assert facts["status"] == status and (status != "stop" or not pairs)
    assert len(pairs) + made.dropped[threshold.NONE_PASSES] == len(rewards)


def test_the_temperature_divides_before_the_sigmoid():
    pairs, facts, _ = label(scored((1.0, -1.0), (0.3, -0.3)), rule="ser", temperature=2.0, centre=False)
    assert [p.uuid for p in pairs] == ["p0"] and pairs[0].consistency == pytest.approx(1 / (1 + math.exp(-1)))
    assert facts["f1"] == 0.5 and not Filter("1", temperature=0.5).keeps(0.05, -0.05)
    assert Filter("union", temperature=1e-9).keeps(1e300, -1e300)  # no overflow


def test_every_two_of_more_responses_are_a_pair_and_missing_rewards_are_none():
    pool = [record("a", [2.0, None, -2.0, 0.0]), record("b", [1.0, None]), record("c", [0.1, 0.0])]
    pairs, facts, made = label(pool, rule="ser", status="union")
    values = [2.0, -2.0, 0.0, 0.1, 0.0]
    kept = [bool(Filter("union", centre=0.0).keeps(a, b)) for a, b in [*combinations(values[:3], 2), (0.1, 0.0)]]
    assert facts["offset"] == 0.0 and (facts["pairs"], facts["kept"]) == (4, sum(kept)) == (4, len(pairs))
    assert made.responses["without a reward"] == 2


# SSRM's rule, and gold ------------------------------------------------------------------------------------------------


def test_a_pseudo_label_is_the_models_never_the_datas():
    """The released SSRM keeps the given winner where the model is sure of the other one."""
    (pair,), facts, _ = label([record("p", [0.05, 0.95], preferences=[[None, 0.05], [0.95, None]])], threshold=0.8)
    assert (pair.selected_index, pair.rejected_index, pair.consistency) == (1, 0, pytest.approx(0.95))
    assert pair.selected[-1].content == "b" and facts == {
        "rule": "confidence",
        "pairs": 1,
        "kept": 1,
        "accuracy": {"pool": None, "kept": None},
    }
    even = [record("p", [0.5, 0.5], preferences=[[None, 0.9], [0.9, None]])]
    assert label(even, threshold=0.5)[0] == [] and label(scored((1.0, 1.0)), threshold=0.5)[0] == []


@pytest.mark.slow
@settings(max_examples=40)
@given(
    st.lists(st.tuples(EIGHTHS, EIGHTHS), min_size=1, max_size=8), st.sampled_from(["ser", "confidence"]), st.randoms()
)
def test_gold_decides_nothing_and_counts_what_is_right(rewards, rule, draw):
    gold = [draw.choice([[1, 0], [0, 1], [0, 0]]) for _ in rewards]
    with_gold, facts, made = label(scored(*rewards, gold=gold), rule=rule)
    without, _, _ = label(scored(*rewards), rule=rule)
    assert [(p.uuid, p.selected_index) for p in with_gold] == [(p.uuid, p.selected_index) for p in without]
    better = {f"p{i}": values.index(1) for i, values in enumerate(gold) if 1 in values}
    right = [better[p.uuid] == p.selected_index for p in with_gold if p.uuid in better]
    assert (made.gold.pairs, made.gold.right) == (len(right), sum(right))
    by_model = {f"p{i}": int(b > a) for i, (a, b) in enumerate(rewards)}
    of_pool = [by_model[uuid] == winner for uuid, winner in better.items() if len({*rewards[int(uuid[1:])]}) > 1]
    ties = [0 == winner for uuid, winner in better.items() if len({*rewards[int(uuid[1:])]}) == 1]
    every = of_pool + ties  # of two equal rewards the first counts as the better one
    assert facts["accuracy"]["pool"] == (pytest.approx(sum(every) / len(every)) if every else None)


@pytest.mark.parametrize("gold", ["42", [1], [1, None], {"a": 1}, None])
def test_other_values_called_gold_are_nobodys_business(gold):
    _, facts, made = label(scored((1.0, 0.0), gold=[gold]))
    assert made.gold.pairs == 0 and facts["accuracy"] == {"pool": None, "kept": None}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"rule": "ser", "p_low": 0.6}, "--p_low 0.6 is above --p_high 0.55"),
        ({"rule": "ser", "threshold": 0.8}, "--threshold: not of --rule ser"),
        ({"p_gap": 0.2, "centre": False}, "--p_gap, --centre: not of --rule confidence"),
    ],
)
def test_flags_that_contradict_each_other(flags, message):
    with pytest.raises(UserError, match=message):
        threshold.check(threshold.Options(**flags))


@pytest.mark.parametrize("flags", [{"rule": "ser"}, {"temperature": 2.0}])
def test_rewards_of_comparisons_have_no_place_in_it(flags):
    compared = [record("p", [0.9, 0.1], preferences=[[None, 0.9], [0.1, None]])]
    with pytest.raises(UserError, match="record 'p': .*(--rule confidence|--temperature does not change)"):
        label(compared, **flags)


# Parts of a pair file -------------------------------------------------------------------------------------------------


def pair(uuid, prompt, good="good", bad="bad", **more):
    asked = [Message("user", prompt)]
    both = ([*asked, Message("assistant", text)] for text in (good, bad))
    return Pair(uuid=uuid, prompt=asked, **dict(zip(("selected", "rejected"), both, strict=True)), **more)


@pytest.mark.slow
@settings(max_examples=40)
@given(
    st.sets(st.integers(0, 2**64 - 1), min_size=3, max_size=60),
    st.floats(0.01, 1),
    st.sampled_from([0, 0.2, 1, 2]),
    st.integers(0, 9),
)
def test_no_prompt_is_in_two_parts(prompts, share, out, seed):
    try:
        parts = split.assign(prompts, share, out, seed)
    except UserError as error:
        assert "none would be left" in str(error)
        return
    assert sorted(key for part in parts.values() for key in part) == sorted(prompts)
    rest = len(prompts) - len(parts["held_out"])
    assert len(parts["seed"]) == max(1, round(share * rest)) and (out < 1 or len(parts["held_out"]) == out)


def test_an_unlabelled_pair_does_not_show_which_response_is_better():
    pairs = [
        pair(f"u{i}", f"{i}?", consistency=None, margin=2.0, selected_index=3, extra={"chosen_score": 5, "gold": "x"})
        for i in range(600)
    ]
    found = [split.unlabelled(one, 1) for one in pairs]
    first = Counter(sample.responses[0] for sample in found)
    assert abs(first["good"] - 300) < 75
    for one, sample in zip(pairs, found, strict=True):
        assert sample.extra == {"gold": [int(text == "good") for text in sample.responses]}
        assert (sample.uuid, sample.prompt, sorted(sample.responses)) == (one.uuid, one.prompt, ["bad", "good"])
    assert [s.responses for s in found] != [split.unlabelled(one, 2).responses for one in pairs]
    reversed_, even = pair("u", "?", consistency=0.2), pair("u", "?", consistency=0.5, rejected_truncated=True)
    sample = split.unlabelled(reversed_, 0)
    assert dict(zip(sample.responses, sample.extra["gold"], strict=True)) == {"good": 0, "bad": 1}
    sample = split.unlabelled(even, 0)
    assert sample.extra["gold"] == [0, 0]
    assert dict(zip(sample.responses, sample.finish_reason, strict=True)) == {"good": "stop", "bad": "length"}


# Training sets --------------------------------------------------------------------------------------------------------


def test_the_first_file_with_a_uuid_has_the_word():
    """Labels of people, then the newest pseudo-labels, then older ones."""
    human = [pair("a", "1?")]
    newest = [pair("a", "1?", "bad", "good"), pair("b", "2?", "bad", "good", consistency=0.9)]
    older = [human[0], pair("b", "2?"), pair("c", "3?")]
    counts, dropped = [0] * 3, Counter()
    found = list(join.first_of([iter(human), iter(newest), iter(older)], set(), counts, dropped))
    assert found == [human[0], newest[1], older[2]] and counts == [1, 1, 1]
    assert dropped == {join.EARLIER: 3}
    left = list(join.first_of([iter(older)], {"b"}, [0], dropped))
    assert [one.uuid for one in left] == ["a", "c"] and dropped[join.WITHOUT] == 1


# Command lines --------------------------------------------------------------------------------------------------------


def run(script, line):
    script.main(line.split())


def refused(capsys, script, line):
    with pytest.raises(SystemExit) as end:
        run(script, line)
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.mark.slow
def test_from_pairs_to_the_next_training_set(tmp_path, monkeypatch, capsys):
    """Split; rewards that are sure and right of two thirds; pseudo-labels; joined. And of a pool in which the model is
    sure of no pair an empty file, so that the seed alone is trained on."""
    monkeypatch.chdir(tmp_path)
    store.write(tmp_path / "p.dpo.json", [pair(f"u{i}", f"How much is {i}?") for i in range(40)])
    run(prepare_data, "split p.dpo.json --seed_share 0.25 --held_out 8 --seed 3 --output_dir d")
    parts = {
        part: list(store.read(tmp_path / f"d/p.{ending}", Samples if part == "pool" else Pair))
        for part, ending in split.ENDINGS.items()
    }
    assert {part: len(own) for part, own in parts.items()} == {"seed": 8, "pool": 24, "held_out": 8}
    assert len({prompt_key(one) for own in parts.values() for one in own}) == 40
    run(prepare_data, "split p.dpo.json --part pool --seed_share 0.25 --held_out 8 --seed 3 --output one.json")
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "d/p.pool.samples.json").read_bytes()

    def rewards(name, value):
        made = [
            Rewards(
                uuid=s.uuid,
                prompt=s.prompt,
                response=[[*s.prompt, Message("assistant", text)] for text in s.responses],
                reward=[7.0 + value(i) * (1 if text == "good" else -1) for text in s.responses],
                extra=s.extra,
            )
            for i, s in enumerate(parts["pool"])
        ]
        store.write(tmp_path / name, made)

    rewards("r.json", lambda i: (2.0, 1.0, -0.01)[i % 3])
    capsys.readouterr()
    label_it = "--strategy threshold --rule ser --output pseudo.json"
    run(make_pairs, f"{label_it} --rewards r.json")
    told = capsys.readouterr().out
    assert "status 1 is met by 66.7 % of 24 pairs" in told and "median reward 7" in told
    assert "pseudo-labels: status 1, kept % 66.7, pool right % 66.7, kept right % 100.0" in told
    about = json.loads((tmp_path / "pseudo.json.meta.json").read_text())
    assert about["pseudo_labels"]["kept"] == 16 and about["table"]["pool right %"] == pytest.approx(200 / 3)
    assert about["settings"]["rule"] == "ser" and "status" not in about["settings"]  # the default's
    run(prepare_data, "join d/p.seed.dpo.json pseudo.json d/p.seed.dpo.json --output train.json")
    train = list(store.read(tmp_path / "train.json", Pair))
    assert train[:8] == parts["seed"] and {one.uuid for one in train[8:]} < {s.uuid for s in parts["pool"]}
    assert len(train) == 24 and all(one.selected[-1].content == "good" for one in train)
    run(prepare_data, "join d/p.pool.samples.json --without pseudo.json --output left.json")
    assert len(list(store.read(tmp_path / "left.json", Samples))) == 8

    rewards("flat.json", lambda i: 0.01)
    none = label_it.replace("pseudo", "none")
    assert "--allow_empty yes" in refused(capsys, make_pairs, f"{none} --rewards flat.json")
    assert not (tmp_path / "none.json").exists()
    run(make_pairs, f"{none} --rewards flat.json --allow_empty yes")
    assert "the file is empty" in "".join(capsys.readouterr())
    about = json.loads((tmp_path / "none.json.meta.json").read_text())
    assert about["table"]["status"] == "stop" and about["counts"]["out"] == 0
    run(prepare_data, "join d/p.seed.dpo.json none.json --output seed_alone.json")
    assert list(store.read(tmp_path / "seed_alone.json", Pair)) == parts["seed"]

    for script, line, message in (
        (prepare_data, "split p.dpo.json --output x.json", "give --part"),
        (prepare_data, "split p.dpo.json --part held_out", "needs --held_out"),
        (prepare_data, "split p.dpo.json --part pool --seed_share 1", "leave none for the part pool"),
        (prepare_data, "split r.json", "holds prompts with rewards"),
        (prepare_data, "join none.json --output x.json", "no record is left of none.json"),
        (prepare_data, "join p.dpo.json r.json", "r.json: holds prompts with rewards, and p.dpo.json preference pairs"),
        (prepare_data, "join p.dpo.json x.json", "x.json: no such file"),
        (make_pairs, "--strategy threshold --rule ser --p_high 0.3 --rewards r.json", "is above --p_high 0.3"),
        (make_pairs, "--strategy extremes --rule ser --rewards r.json", "--rule belongs to --strategy threshold"),
    ):
        assert message in refused(capsys, script, line)


@pytest.mark.slow
def test_a_pool_may_lose_what_was_kept(tmp_path):
    """As docs/few_labels.md has it: each round labels what earlier ones have not kept."""
    base = Path(__file__).parents[1] / "configs/loops/tiny_ser.yaml"
    loop = yaml.safe_load(base.with_name("ser.yaml").read_text())
    left = {"id": "left", "script": "prepare_data.py", "words": ["join", "${left@-1}"]}
    left["flags"] = {"without": {"first": None, "then": "${pairs@-1}"}}
    changed = {
        "extends": str(base),
        "start": loop["start"] | {"left": "${pool}"},
        "repeat": [left, *loop["repeat"]],
        "flags": {"rewards": {"input_file": "${left}"}},
    }
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(changed))
    scripts = {script: iterate.config_of(script) for script in iterate.SCRIPTS}
    commands, problems = plan(read_loop(tmp_path / "x.yaml"), scripts, "cpu")
    own = "outputs/tiny/ser/round"
    assert problems == []
    assert [command.argv() for command in commands if command.output.name.endswith("left.json")] == [
        ["join", "outputs/tiny/ser.pool.json", "--output", f"{own}1.left.json"],
        ["join", f"{own}1.left.json", "--without", f"{own}1.pairs.json", "--output", f"{own}2.left.json"],
        ["join", f"{own}2.left.json", "--without", f"{own}2.pairs.json", "--output", f"{own}3.left.json"],
    ]
    read = [command.flags["input_file"] for command in commands if command.script == "rewarding.py"]
    assert read == [f"{own}{t}.left.json" for t in (1, 2, 3)]
