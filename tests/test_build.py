"""Two files of rewards -> pairs, against scipy and a plain loop: every prompt for itself, matched by its uuid."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from cream import store
from cream.errors import UserError
from cream.pairs.build import build
from cream.records import Item, Message, Rewards


def record(uuid, reward, texts=None, cut=()):
    """Answers "a", "b", … with these rewards; those at the indices `cut` ended by length."""
    prompt = [Message("user", f"Question {uuid}?")]
    texts = texts or [chr(ord("a") + i) for i in range(len(reward))]
    return Rewards(
        uuid=uuid,
        prompt=prompt,
        response=[[*prompt, Message("assistant", text)] for text in texts],
        reward=reward,
        score=[None if r is None else r - 10 for r in reward],
        ref_score=[-10.0] * len(reward),
        finish_reason=["length" if i in cut else "stop" for i in range(len(reward))],
    )


@st.composite
def files(draw):
    """Two models' rewards of the same answers: ragged, with ties, nulls, repeated texts, and answers cut short."""
    value = st.one_of(st.none(), st.sampled_from([-2.0, 0.0, 1.5]), st.floats(-50, 50))
    current, previous = [], []
    for i in range(draw(st.integers(0, 6))):
        count = draw(st.integers(0, 5))
        texts = draw(st.lists(st.sampled_from("abcdefgh"), min_size=count, max_size=count))
        cut = draw(st.sets(st.integers(0, 4), max_size=2))
        for file in (current, previous):
            file.append(record(f"p{i}", draw(st.lists(value, min_size=count, max_size=count)), texts, cut))
    return current, draw(st.permutations(previous))


def expected(current, previous, keep_truncated):
    """(chosen, rejected, c) of one prompt by the definition; None where it has no pair."""
    kept = []
    for i, text in enumerate(current.answers()):
        cut = current.finish_reason[i] == "length" and not keep_truncated
        if not cut and current.reward[i] is not None and text not in [current.answers()[j] for j in kept]:
            kept.append(i)
    kept = [i for i in kept if previous.reward[i] is not None]
    first, second = ([file.reward[i] for i in kept] for file in (current, previous))
    if len(set(first)) < 2:
        return None
    tau = scipy.stats.kendalltau(first, second).statistic if len(set(second)) > 1 else math.nan
    c = None if math.isnan(tau) else pytest.approx((tau + 1) / 2)
    return max(kept, key=current.reward.__getitem__), min(kept, key=current.reward.__getitem__), c


@given(files(), st.booleans())
def test_pairs_equal_scipy_and_a_loop(pair_of_files, keep_truncated):
    current, previous = pair_of_files
    made = build(current, previous, keep_truncated=keep_truncated)
    by_uuid = {r.uuid: r for r in previous}
    wanted = {r.uuid: expected(r, by_uuid[r.uuid], keep_truncated) for r in current}
    assert [p.uuid for p in made.pairs] == [uuid for uuid, pair in wanted.items() if pair]
    for pair in made.pairs:
        chosen, rejected, c = wanted[pair.uuid]
        source = next(r for r in current if r.uuid == pair.uuid)
        assert (pair.selected_index, pair.rejected_index, pair.consistency) == (chosen, rejected, c)
        assert (pair.selected, pair.rejected) == (source.response[chosen], source.response[rejected])
        assert pair.margin == source.reward[chosen] - source.reward[rejected] > 0
        assert (pair.selected_logp, pair.rejected_logp) == (source.score[chosen], source.score[rejected])
        assert pair.selected_truncated == (source.finish_reason[chosen] == "length")
        assert (pair.tau is None) == (c is None)
    assert len(made.pairs) + made.dropped.total() == len(current)
    assert made.without_c == sum(pair is not None and pair[2] is None for pair in wanted.values())
    assert made.answers["answers"] == sum(len(r.response) for r in current)


@given(files(), st.data())
def test_one_skipped_prompt_changes_no_other(pair_of_files, data):
    """The released code zipped values back by position, so that one skip moved every later prompt's consistency."""
    current, previous = pair_of_files
    if not current:
        return
    skipped = data.draw(st.integers(0, len(current) - 1))
    others = [p for p in build(current, previous).pairs if p.uuid != current[skipped].uuid]
    broken = record(current[skipped].uuid, [None] * len(current[skipped].reward), current[skipped].answers() or None)
    assert build([*current[:skipped], broken, *current[skipped + 1 :]], previous).pairs == others
    assert build([*current[:skipped], *current[skipped + 1 :]], previous).pairs == others


def test_what_leaves_the_rankings_is_counted():
    current = [record("p", [1.0, None, 9.0, 2.0, 3.0, 4.0], ["a", "b", "c", "d", "a", "e"], cut=[2])]
    previous = [record("p", [1.0, 7.0, 0.0, 5.0, 9.0, None], ["a", "b", "c", "d", "a", "e"])]
    made = build(current, previous)
    assert made.answers == {
        "answers": 6,
        "without a reward": 1,
        "cut at the length limit": 1,
        "repeat another": 1,
        "without a reward by the previous model": 1,
    }
    (pair,) = made.pairs  # what is left are a and d
    assert (pair.selected_index, pair.rejected_index, pair.consistency) == (3, 0, 1.0)
    (kept,) = build(current, previous, keep_truncated=True).pairs
    assert (kept.selected_index, kept.selected_truncated, kept.consistency) == (2, True, pytest.approx(1 / 3))


def test_length_bias_is_told():
    rows = [("p", [1.0, 2.0, 4.0], [5, 9, 8]), ("q", [0.0, -3.0, 9.0], [20, 31, 2])]
    current = [record(uuid, rewards, ["a", "b", "c"]) for uuid, rewards, _ in rows]
    assert build(current, None).length_bias is None  # a file from elsewhere has no lengths
    for item, (_, _, lengths) in zip(current, rows, strict=True):
        item.num_tokens = lengths
    made = build(current, None)
    assert made.longer_by == ((8 - 5) + (2 - 31)) / 2
    centred = [
        (r - np.mean(rewards), n - np.mean(lengths))
        for _, rewards, lengths in rows
        for r, n in zip(rewards, lengths, strict=True)
    ]
    assert made.length_bias == pytest.approx(np.corrcoef(np.array(centred).T)[0, 1])


def test_without_a_previous_model_c_is_one():
    made = build([record("p", [1.0, 2.0]), record("q", [3.0, 3.0]), record("r", [1.0])], None)
    assert [pair.consistency for pair in made.pairs] == [1.0]
    assert made.without_c == 0 and made.dropped.total() == 2


def test_a_constant_previous_ranking_leaves_a_pair_without_c():
    made = build([record("p", [1.0, 2.0]), record("q", [1.0, 2.0])], [record("p", [5.0, 5.0]), record("q", [1.0, 2.0])])
    assert [pair.consistency for pair in made.pairs] == [None, 1.0]
    assert made.without_c == 1 and made.consistency.mean == 1.0


def test_mean_log_probabilities_are_no_reference():
    """train.py may take selected_logp for log π summed over the answer; a mean must not pass for one."""
    (pair,) = build([record("p", [1.0, 2.0])], None, summed=False).pairs
    assert pair.selected_logp is None and pair.rejected_logp is None


def test_shuffling_moves_c_and_nothing_else():
    current = [record(f"p{i}", [1.0, 2.0, 3.0]) for i in range(20)]
    previous = [record(f"p{i}", [1.0, 2.0, 3.0] if i < 10 else [3.0, 2.0, 1.0]) for i in range(20)]
    plain, control = build(current, previous).pairs, build(current, previous, shuffle_seed=1).pairs
    assert [p.consistency for p in plain] == [1.0] * 10 + [0.0] * 10 != [p.consistency for p in control]
    assert sorted(p.consistency for p in control) == [0.0] * 10 + [1.0] * 10
    assert [(p.selected, p.rejected) for p in plain] == [(p.selected, p.rejected) for p in control]


def test_the_oracle_asks_the_labels():
    texts = ["Answer: 12", "Answer: 7", "So it is 12. Answer: 12", "Answer: 9"]
    labels = {uuid: Item(uuid=uuid, question="3 x 4?", label="12") for uuid in "pq"}
    current = [record("p", [1.0, 9.0, 2.0, 8.0], texts), record("q", [1.0, 2.0], texts[1::2])]
    made = build(current, current, labels=labels)
    (pair,) = made.pairs
    assert (pair.selected_index, pair.rejected_index, pair.margin) == (2, 3, -6.0)
    assert list(made.dropped.values()) == [1]
    with pytest.raises(UserError, match="'q'"):
        build(current, current, labels={"p": labels["p"]})


@pytest.mark.parametrize("other", [[], [record("p", [1.0, 2.0], ["a", "other"])], [record("p", [1.0])]])
def test_other_answers_are_refused_by_uuid(other):
    with pytest.raises(UserError, match="'p'.*--file2"):
        build([record("p", [1.0, 2.0])], other)


def test_no_prompts_make_no_pairs():
    made = build([], [])
    assert made.pairs == [] and made.consistency.mean is None


def test_results_do_not_depend_on_the_hash_seed(tmp_path, repo):
    current = [record(f"p{i}", [float(i * j % 7) for j in range(5)], list("abcda")) for i in range(30)]
    previous = [
        record(f"p{i}", [float(i * j % 5) if i % 4 else None for j in range(5)], list("abcda")) for i in range(30)
    ]
    store.write(tmp_path / "current.json", current)
    store.write(tmp_path / "previous.json", previous)
    outputs = []
    for seed in ("0", "1", "2"):
        target = tmp_path / f"pairs.{seed}.json"
        flags = {"file1": "current.json", "file2": "previous.json", "output": target, "shuffle_consistency": 3}
        words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
        command = [sys.executable, str(repo / "cal_consistency.py"), *words]
        subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONHASHSEED": seed}, check=True)
        outputs.append(target.read_bytes())
    assert len(set(outputs)) == 1 and outputs[0].count(b'"consistency"') > 10
