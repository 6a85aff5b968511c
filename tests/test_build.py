"""Two files of rewards -> pairs, against scipy and a plain loop: every prompt for itself, matched by its uuid."""

import math
import os
import re
import subprocess
import sys
import weakref
from contextlib import suppress

import msgspec
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from cream.consistency import Tally, shuffled
from cream.errors import UserError
from cream.files import store
from cream.pairs import PAIRS
from cream.pairs.build import FEWER_THAN_TWO, Rules, build, consistencies
from cream.pairs.match import MISSING, OTHER
from cream.records import RANKS, Item, Message, Rewards


def record(uuid, reward, texts=None, cut=(), num_tokens=None):
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
        num_tokens=num_tokens,
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
        lengths = draw(st.lists(st.integers(1, 40), min_size=count, max_size=count))
        for file in (current, previous):
            file.append(record(f"p{i}", draw(st.lists(value, min_size=count, max_size=count)), texts, cut, lengths))
    return current, draw(st.permutations(previous))


def pairs_of(current, previous, rules=None, **options):
    return list(build(current, previous, rules or Rules(), **options).pairs)


def expected(current, previous, keep_truncated):
    """(chosen, rejected, c) of one prompt by the definition; None where it has no pair."""
    kept = []
    for i, text in enumerate(current.responses()):
        cut = current.finish_reason[i] == "length" and not keep_truncated
        if not cut and current.reward[i] is not None and text not in [current.responses()[j] for j in kept]:
            kept.append(i)
    kept = [i for i in kept if previous.reward[i] is not None]
    first, second = ([file.reward[i] for i in kept] for file in (current, previous))
    if len(set(first)) < 2:
        return None
    tau = scipy.stats.kendalltau(first, second).statistic if len(set(second)) > 1 else math.nan
    c = None if math.isnan(tau) else pytest.approx((tau + 1) / 2)
    return max(kept, key=current.reward.__getitem__), min(kept, key=current.reward.__getitem__), c


@given(files(), st.booleans(), st.sampled_from([1, 3, 1024]))
def test_pairs_equal_scipy_and_a_loop(pair_of_files, keep_truncated, size):
    current, previous = pair_of_files
    made = build(current, previous, Rules(keep_truncated=keep_truncated), size=size)
    pairs = list(made.pairs)
    by_uuid = {r.uuid: r for r in previous}
    wanted = {r.uuid: expected(r, by_uuid[r.uuid], keep_truncated) for r in current}
    assert [p.uuid for p in pairs] == [uuid for uuid, pair in wanted.items() if pair]
    for pair in pairs:
        chosen, rejected, c = wanted[pair.uuid]
        source = next(r for r in current if r.uuid == pair.uuid)
        assert (pair.selected_index, pair.rejected_index, pair.consistency) == (chosen, rejected, c)
        assert (pair.selected, pair.rejected) == (source.response[chosen], source.response[rejected])
        assert pair.margin == source.reward[chosen] - source.reward[rejected] > 0
        assert (pair.selected_logp, pair.rejected_logp) == (source.score[chosen], source.score[rejected])
        assert pair.selected_truncated == (source.finish_reason[chosen] == "length")
        assert (pair.tau is None) == (c is None)
    assert made.count == len(pairs) == len(current) - made.dropped.total()
    assert made.without_c == sum(pair is not None and pair[2] is None for pair in wanted.values())
    assert made.responses[""] == sum(len(r.response) for r in current)


@pytest.mark.slow
@given(files(), st.data())
def test_one_skipped_prompt_changes_no_other(pair_of_files, data):
    """The released code zipped values back by position, so that one skip moved every later prompt's consistency."""
    current, previous = pair_of_files
    if not current:
        return
    skipped = data.draw(st.integers(0, len(current) - 1))
    others = [p for p in pairs_of(current, previous) if p.uuid != current[skipped].uuid]
    broken = record(current[skipped].uuid, [None] * len(current[skipped].reward), current[skipped].responses() or None)
    assert pairs_of([*current[:skipped], broken, *current[skipped + 1 :]], previous) == others
    assert pairs_of([*current[:skipped], *current[skipped + 1 :]], previous) == others


@pytest.mark.slow
@given(files(), st.sampled_from(RANKS), st.booleans(), st.booleans(), st.booleans(), st.sampled_from([None, 0]))
def test_blocks_leave_no_seam(pair_of_files, rank, alone, keep_truncated, oracle, seed):
    """Whatever is asked for, blocks of 1 and of 3 prompts give what the whole file at once gives."""
    current, previous = pair_of_files
    previous = None if alone else previous
    rules = Rules(PAIRS["oracle" if oracle else "extremes"], rank=rank, keep_truncated=keep_truncated)
    labels = {record.uuid: Item(uuid=record.uuid, question="?\nA. x\nB. y", label="A") for record in current}
    outcomes = []
    for size in (1, 3, 1024):
        own = consistencies(current, previous, rules, size=size)
        reassigned = None if seed is None else shuffled(own, seed)
        made = build(current, previous, rules, reassigned=reassigned, labels=labels if oracle else None, size=size)
        pairs = list(made.pairs)
        found, expected = made.c, Tally(own if seed is None else reassigned)
        assert (found.n, found.nulls, *found.histogram) == (expected.n, expected.nulls, *expected.histogram)
        for name in ("mean", "std", "below_half"):
            assert getattr(found, name) == pytest.approx(getattr(expected, name), abs=1e-12)
        counts = made.count, made.prompts, made.responses, made.dropped, made.without_c, made.lengths.longer_by
        outcomes.append((pairs, counts, pytest.approx(made.lengths.bias, abs=1e-9)))
    assert outcomes[0][:2] == outcomes[1][:2] == outcomes[2][:2]
    assert made.lengths.bias == outcomes[0][2] == outcomes[1][2]


@pytest.mark.parametrize("name", ["extremes", "all_pairs", "threshold", "random"])
def test_few_records_are_held_at_a_time(name):
    """Those of the block that is gone through and of the one that is being ranked, however many prompts there are."""

    class Watched(Rewards, weakref=True):
        pass

    watched = []

    def file(seed):
        for i, rewards in enumerate(np.random.default_rng(seed).uniform(0, 9, (200, 3)).tolist()):
            whole = Watched(**msgspec.structs.asdict(record(f"p{i}", rewards)))
            watched.append(weakref.ref(whole))
            yield whole

    rules = Rules(PAIRS[name], PAIRS[name].Options())
    held = [sum(w() is not None for w in watched) for _ in build(file(0), file(1), rules, size=4).pairs]
    assert len(watched) == 400 and len(held) >= 200 - 20 * (name == "threshold") and max(held) < 3 * 4


def test_what_leaves_the_rankings_is_counted():
    current = [record("p", [1.0, None, 9.0, 2.0, 3.0, 4.0], ["a", "b", "c", "d", "a", "e"], cut=[2])]
    previous = [record("p", [1.0, 7.0, 0.0, 5.0, 9.0, None], ["a", "b", "c", "d", "a", "e"])]
    made = build(current, previous)
    (pair,) = made.pairs  # what is left are a and d
    assert made.responses == {
        "": 6,
        "without a reward": 1,
        "truncated": 1,
        "equal to an earlier one": 1,
        "without a reward by the previous model": 1,
    }
    assert (pair.selected_index, pair.rejected_index, pair.consistency) == (3, 0, 1.0)
    (kept,) = pairs_of(current, previous, Rules(keep_truncated=True))
    assert (kept.selected_index, kept.selected_truncated, kept.consistency) == (2, True, pytest.approx(1 / 3))


def test_length_bias_is_told():
    rows = [("p", [1.0, 2.0, 4.0], [5, 9, 8]), ("q", [0.0, -3.0, 9.0], [20, 31, 2])]
    made = build([record(uuid, rewards, num_tokens=lengths) for uuid, rewards, lengths in rows], None, size=1)
    assert len(list(made.pairs)) == 2
    assert made.lengths.longer_by == ((8 - 5) + (2 - 31)) / 2
    centred = [
        (r - np.mean(rewards), n - np.mean(lengths))
        for _, rewards, lengths in rows
        for r, n in zip(rewards, lengths, strict=True)
    ]
    assert made.lengths.bias == pytest.approx(np.corrcoef(np.array(centred).T)[0, 1])


def test_length_bias_is_untold_without_lengths():
    """A file from elsewhere has none, or not all."""
    known, unknown = record("p", [1.0, 2.0], num_tokens=[3, 4]), record("q", [1.0, 2.0])
    for current in ([known, unknown], [unknown, known], [unknown], []):
        made = build(current, None, size=1)
        assert len(list(made.pairs)) == len(current)
        assert made.lengths.bias is None and made.lengths.longer_by is None


def test_without_a_previous_model_c_is_one():
    made = build([record("p", [1.0, 2.0]), record("q", [3.0, 3.0]), record("r", [1.0])], None)
    assert [pair.consistency for pair in made.pairs] == [1.0]
    assert made.without_c == 0 and made.dropped.total() == 2


def test_a_constant_previous_ranking_leaves_a_pair_without_c():
    made = build([record("p", [1.0, 2.0]), record("q", [1.0, 2.0])], [record("p", [5.0, 5.0]), record("q", [1.0, 2.0])])
    assert [pair.consistency for pair in made.pairs] == [None, 1.0]
    assert made.without_c == 1 and made.c.mean == 1.0


def test_mean_log_probabilities_are_no_reference():
    """train.py may take selected_logp for log π summed over the answer; a mean must not pass for one."""
    (pair,) = pairs_of([record("p", [1.0, 2.0])], None, summed=False)
    assert pair.selected_logp is None and pair.rejected_logp is None


def test_shuffling_moves_c_and_nothing_else():
    current = [record(f"p{i}", [1.0, 2.0, 3.0]) for i in range(20)]
    previous = [record(f"p{i}", [1.0, 2.0, 3.0] if i < 10 else [3.0, 2.0, 1.0]) for i in range(20)]
    reassigned = shuffled(consistencies(current, previous), seed=1)
    plain, control = pairs_of(current, previous), pairs_of(current, previous, reassigned=reassigned, size=3)
    assert [p.consistency for p in plain] == [1.0] * 10 + [0.0] * 10 != [p.consistency for p in control]
    assert sorted(p.consistency for p in control) == [0.0] * 10 + [1.0] * 10
    assert [(p.selected, p.rejected) for p in plain] == [(p.selected, p.rejected) for p in control]


def test_the_oracle_asks_the_labels():
    texts = ["Answer: 12", "Answer: 7", "So it is 12. Answer: 12", "Answer: 9"]
    labels = {uuid: Item(uuid=uuid, question="3 x 4?", label="12") for uuid in "pq"}
    current = [record("p", [1.0, 9.0, 2.0, 8.0], texts), record("q", [1.0, 2.0], texts[1::2])]
    made = build(current, current, Rules(PAIRS["oracle"]), labels=labels)
    (pair,) = made.pairs
    assert (pair.selected_index, pair.rejected_index, pair.margin) == (2, 3, -6.0)
    assert list(made.dropped.values()) == [1]
    with pytest.raises(UserError, match="'q'"):
        pairs_of(current, current, Rules(PAIRS["oracle"]), labels={"p": labels["p"]})


def test_few_records_are_held_for_consistencies():
    class Watched(Rewards, weakref=True):
        pass

    watched, held = [], []

    def file():
        for i in range(100):
            whole = Watched(**msgspec.structs.asdict(record(f"p{i}", [1.0, 2.0])))
            watched.append(weakref.ref(whole))
            held.append(sum(w() is not None for w in watched))
            yield whole

    assert len(consistencies(file(), file(), size=4)) == 100 and len(held) == 200 and max(held) < 3 * 4


@pytest.mark.parametrize("go_through", [pairs_of, consistencies])
@pytest.mark.parametrize(
    "other, said",
    [([], "is missing"), ([record("p", [1.0, 2.0], ["a", "other"])], "has other responses")]
    + [([record("p", [1.0])], "has other responses")],
)
def test_other_answers_are_refused_by_uuid(go_through, other, said):
    for name in ({}, {"name": "--file2"}):
        message = f"record 'p' {said} in {name.get('name', 'the previous ranking')}; both must rank the same samples"
        with pytest.raises(UserError, match=f"^{message}$"):
            go_through([record("p", [1.0, 2.0])], other, **name)


def test_other_answers_are_skipped_and_counted_where_that_is_allowed():
    current = [record(uuid, [1.0, 2.0]) for uuid in "pqrs"]
    previous = [record("r", [1.0, 2.0], ["a", "other"]), record("s", [1.0, 2.0])]
    made = build(current, previous, allow=(MISSING, OTHER))
    assert [pair.uuid for pair in made.pairs] == ["s"] and made.unmatched == {MISSING: 2, OTHER: 1}
    assert consistencies(current, previous, allow=(MISSING, OTHER)).tolist() == [1]
    with pytest.raises(UserError, match="'p' is missing"):
        consistencies(current, previous, allow=(OTHER,))


def test_further_records_of_the_previous_model_are_no_mistake():
    previous = [record(uuid, [2.0, 1.0]) for uuid in "xpy"]
    (pair,) = pairs_of([record("p", [1.0, 2.0])], previous)
    assert (pair.uuid, pair.consistency) == ("p", 0.0)


@given(st.lists(st.sampled_from("pqrxy"), max_size=8), st.sampled_from(["", "p", "pq", "pqr"]), st.booleans())
def test_what_may_stand_twice_in_the_previous_file_is_looked_for(uuids, current, allowed):
    """Whenever it does; and never where the previous file has the same prompts, in whatever order."""
    current, previous = ([record(uuid, [1.0, 2.0]) for uuid in names] for names in (current, uuids))
    asked = []
    for go_through in (pairs_of, consistencies):
        asked.append(0)
        with suppress(UserError):  # a prompt that is missing
            allow = (MISSING,) if allowed else ()
            go_through(current, previous, allow=allow, check=lambda: asked.append(asked.pop() + 1))
    if len(set(uuids)) < len(uuids):
        assert all(asked)
    elif sorted(uuids) == [record.uuid for record in current]:
        assert not any(asked)


def test_another_order_is_no_reason_to_look():
    def check():
        raise AssertionError("looked for what is there twice")

    current, previous = ([record(uuid, [1.0, 2.0]) for uuid in uuids] for uuids in ("pqrs", "srqp"))
    assert len(pairs_of(current, previous, check=check)) == 4


def test_one_that_waits_and_one_at_the_end_may_be_the_same():
    looked = []
    previous = [record(uuid, [1.0, 2.0]) for uuid in "xpx"]
    assert len(pairs_of([record("p", [1.0, 2.0])], previous, check=lambda: looked.append(True))) == 1 and looked


def test_the_rank_decides_what_consistency_is():
    current, previous = [1.0, 2.0, 3.0, 4.0], [1.0, 4.0, 2.0, 3.0]
    wanted = {"spearman": scipy.stats.spearmanr(current, previous).statistic, "toporder": 0.0}
    wanted["kendall"] = scipy.stats.kendalltau(current, previous).statistic
    for rank in RANKS:
        (pair,) = pairs_of([record("p", current)], [record("p", previous)], Rules(rank=rank))
        assert pair.tau == pytest.approx(wanted[rank])
        assert pair.consistency == pytest.approx(0 if rank == "toporder" else (wanted[rank] + 1) / 2)


def test_no_prompts_make_no_pairs():
    made = build([], [])
    assert list(made.pairs) == [] and made.count == 0 and made.c.mean is None


@pytest.fixture
def stage(tmp_path, repo):
    """cal_consistency.py with these flags in a folder of its own: the finished process."""

    def run(**flags):
        words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
        command = [sys.executable, str(repo / "cal_consistency.py"), *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    return run


BAD_ENDS = {
    "malformed": ("file1", '{"uuid": "last", "prompt": 3}\n', "'last'.*prompt"),
    "malformed and unmatched": ("file2", '{"uuid": "last"\n', "line 1501"),
    "doubled": ("file1", "{first}\n", "'p0' occurs twice"),
    "doubled by the previous model": ("file2", "{first}\n", "'p0' occurs twice"),
    "missing": ("file1", "{last}\n", "'last' is missing in --file2"),
}


@pytest.mark.parametrize(("flag", "line", "message"), BAD_ENDS.values(), ids=BAD_ENDS)
@pytest.mark.parametrize("more", [{}, {"shuffle_consistency": 0}], ids=["one pass", "two passes"])
def test_a_bad_last_record_leaves_nothing_behind(tmp_path, stage, flag, line, message, more):
    """1500 good records, of which the first 1024 have been written by the time that the last is read."""
    for seed, name in enumerate(("file1", "file2")):
        rewards = np.random.default_rng(seed).random((1500, 2)).tolist()
        store.write(tmp_path / f"{name}.jsonl", (record(f"p{i}", row) for i, row in enumerate(rewards)))
    with open(tmp_path / f"{flag}.jsonl", "r+") as file:
        first = file.readline().strip()
        file.seek(0, os.SEEK_END)
        file.write(line.replace("{first}", first).replace("{last}", first.replace('"p0"', '"last"')))
    done = stage(file1="file1.jsonl", file2="file2.jsonl", output="new/folder/pairs.jsonl", **more)
    assert done.returncode == 2 and re.search(message, done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"file1.jsonl", "file2.jsonl"}


@pytest.mark.parametrize("more", [{}, {"on_bad_record": "skip", "force": "yes"}], ids=["refused", "all the same"])
def test_what_is_malformed_after_other_answers_does_not_hide_them(tmp_path, stage, more):
    store.write(tmp_path / "file1.jsonl", [record("p", [1.0, 2.0]), record("q", [1.0, 2.0])])
    store.write(tmp_path / "file2.jsonl", [record("p", [1.0, 2.0], ["x", "y"]), *[record("q", [1.0, 2.0])] * 2])
    (tmp_path / "file2.jsonl").write_text((tmp_path / "file2.jsonl").read_text().replace("\n", "\ngarbage\n", 1))
    done = stage(file1="file1.jsonl", file2="file2.jsonl", output="pairs.jsonl", **more)
    assert "Traceback" not in done.stderr
    if more:
        assert done.returncode == 0 and "1 prompt: other responses in the previous ranking" in done.stdout
    else:
        assert done.returncode == 2 and "'q' occurs twice" in done.stderr


@pytest.mark.parametrize("line", ["", "garbage\n"], ids=["good", "bad"])
def test_a_dry_run_reads_it_all_and_writes_nothing(tmp_path, stage, line):
    store.write(tmp_path / "file1.jsonl", [record("p", [1.0, 2.0])])
    with open(tmp_path / "file1.jsonl", "a") as file:
        file.write(line)
    done = stage(file1="file1.jsonl", output="pairs.jsonl", dry_run="yes")
    assert done.returncode == (2 if line else 0), done.stderr
    assert "line 2" in done.stderr if line else "1 pairs" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["file1.jsonl"]


def test_a_loop_of_links_is_a_users_error(tmp_path, stage):
    store.write(tmp_path / "file1.jsonl", [record("p", [1.0, 2.0])])
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    done = stage(file1="file1.jsonl", output="loop.jsonl")
    assert done.returncode == 2 and "loop" in done.stderr and "Traceback" not in done.stderr


def test_no_pair_at_all_is_reported_and_nothing_written(tmp_path, stage):
    store.write(tmp_path / "flat.jsonl", [record("p", [1.0, 1.0]), record("q", [None, 1.0])])
    done = stage(file1="flat.jsonl")
    assert done.returncode == 2 and "no pair can be made" in done.stderr
    assert "no pair from 1 prompt: all rewards equal" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["flat.jsonl"]


def test_the_sidecar_tells_what_only_the_end_knows(tmp_path, stage):
    current, previous = ([record(uuid, rewards) for uuid in "pqr"] for rewards in ([1.0, 2.0], [2.0, 1.0]))
    previous[1].reward, current[2].reward = [5.0, 5.0], [None, 1.0]
    store.write(tmp_path / "current.jsonl", current)
    store.write(tmp_path / "previous.jsonl", reversed(previous))
    done = stage(file1="current.jsonl", file2="previous.jsonl", output="pairs.jsonl")
    assert done.returncode == 0, done.stderr
    meta = store.read_json(tmp_path / "pairs.jsonl.meta.json")
    assert (meta["mean_consistency"], meta["without_consistency"]) == (0.0, 1)
    assert meta["counts"] == {"out": 2, "dropped": {FEWER_THAN_TWO: 1}}


@pytest.mark.slow
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
