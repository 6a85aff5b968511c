"""evaluate_reward.py: benchmark files as samples, the command on the tiny loop's outputs, and what it refuses."""

import json
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from cream.data import benchmarks
from cream.data.reading import Place
from cream.errors import UserError
from cream.evaluation.rewards import rows
from cream.evaluation.rewards.accuracy import choose_benchmark
from cream.files import store
from cream.records import Message, Pair, Rewards, Samples

LOOP = "outputs/loop"
LABELS = "localdata/tiny/labels.json"
ROWS = "outputs/measured/current.rows.jsonl"
SAMPLES = Path(__file__).parents[2] / "shared/data"
NUMBERED = {"id": 7, "prompt": "What is 1 + 1?", "chosen": "2", "rejected": "3", "subset": "hep-go"}
FOUR = {"id": "9", "prompt": "1 + 1?", "chosen": ["2"], "rejected": ["3", "4", "5"], "num_correct": 1, "subset": "Math"}
TIED = {
    "id": "tied:0",
    "prompt": "a prime",
    "chosen": ["2", "3"],
    "rejected": ["4"],
    "num_correct": 2,
    "subset": "Ties",
}
PROBLEM = {"prompt": "1 + 1?", "answers": ["2", "two", "3"], "labels": [1, 1, 0], "final": ["2", "2.0", "3"]}


def write(path, *found):
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def read(path, **more):
    dropped, rejected = Counter(), []
    found = list(benchmarks.read(Place(str(path)), None, dropped, rejected, more.get("skip", False)))
    return found, dropped, rejected


# Files ----------------------------------------------------------------------------------------------------------------


def test_benchmark_rows_become_samples(tmp_path):
    one, other = read(write(tmp_path / "a.jsonl", NUMBERED, NUMBERED | {"subset": "hep-js"}))[0]
    assert (one.uuid, other.uuid, one.responses) == ("hep-go-7", "hep-js-7", ["2", "3"])
    assert one.prompt == [Message("user", "What is 1 + 1?")]
    assert {key: one.extra[key] for key in ("gold", "subset", "id")} == {"gold": [1, 0], "subset": "hep-go", "id": 7}
    four, tied = read(write(tmp_path / "b.jsonl", FOUR, TIED))[0]
    assert (four.responses, four.extra["gold"]) == (["2", "3", "4", "5"], [1, 0, 0, 0])
    assert (tied.uuid, tied.extra["id"], tied.extra["gold"]) == ("Ties-tied:0", "tied:0", [1, 1, 0])
    (problem,) = read(write(tmp_path / "c.jsonl", PROBLEM))[0]
    row = rows.unrewarded(problem)
    assert (row.gold, row.finals[0] == row.finals[1], row.subset) == ([1, 1, 0], True, "all")


def test_preferences_of_any_form_become_samples(tmp_path):
    spoken = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    sharegpt = {"chosen": spoken, "rejected": [spoken[0], {"from": "gpt", "value": "What?"}]}
    (one,), dropped, _ = read(write(tmp_path / "a.jsonl", sharegpt, sharegpt | {"rejected": spoken}))
    assert one.responses == ["Hello", "What?"] and dropped.total() == 1
    said = [Message("user", "Hi")]
    both = {"selected": [*said, Message("assistant", "a")], "rejected": [*said, Message("assistant", "b")]}
    store.write(tmp_path / "b.json", [Pair(uuid="u", prompt=said, **both, rejected_truncated=True)])
    (one,) = read(tmp_path / "b.json")[0]
    assert (one.responses, one.finish_reason, one.extra["gold"]) == (["a", "b"], ["stop", "length"], [1, 0])
    for confidence, gold in ((0.9, [1, 0]), (0.5, [0, 0]), (0.2, [0, 1])):  # as the pair is trained on
        store.write(tmp_path / "b.json", [Pair(uuid="u", prompt=said, **both, consistency=confidence)])
        assert read(tmp_path / "b.json")[0][0].extra["gold"] == gold
    store.write(tmp_path / "c.json", [Samples(uuid="u", prompt=said, responses=["a", "b"], extra={"ranks": [2, 1]})])
    assert rows.unrewarded(read(tmp_path / "c.json")[0][0]).gold == [-2, -1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (NUMBERED | {"chosen": None}, "lacks chosen"),
        (FOUR | {"id": "10", "rejected": None}, "a response is missing"),
        (FOUR | {"id": "10", "num_correct": 2}, "1 chosen responses, but num_correct is 2"),
        (PROBLEM | {"labels": [1]}, "labels, a number for each"),
        ({"prompt": "Hi"}, "which say of no response that it is better"),
        (PROBLEM | {"labels": [1, "x", 0]}, "a number for each response"),
    ],
)
def test_rows_without_gold_are_refused(tmp_path, row, message):
    good = FOUR if "num_correct" in row else {}
    path = write(tmp_path / "a.jsonl", *filter(None, (good, row)))
    with pytest.raises(UserError, match=message):
        choose_benchmark("auto", list(map(rows.unrewarded, read(path)[0])))


def test_malformed_rows_are_skipped_if_asked(tmp_path):
    path = write(tmp_path / "a.jsonl", FOUR, FOUR | {"id": "10", "rejected": [None]}, FOUR)
    found, _, rejected = read(path, skip=True)
    assert [sample.uuid for sample in found] == ["Math-9"]
    assert [bad["reason"] for bad in rejected] == [
        "expected chosen and rejected, texts: a response is missing",
        "uuid 'Math-9' occurs twice",
    ]


@pytest.mark.skipif(not SAMPLES.exists(), reason="public samples are not part of the repository")
def test_public_samples():
    found = read(SAMPLES / "reward/rewardbench_like.jsonl")[0]
    assert len(found) == 657 and len({sample.extra["subset"] for sample in found}) == 5
    with pytest.raises(UserError, match="is not one of RewardBench's .3 of 5 subsets are not"):
        choose_benchmark("auto", list(map(rows.unrewarded, found)))
    for path in (SAMPLES / "pref/upstream_samples").iterdir():
        assert len(read(path)[0]) == 8


# Rewards --------------------------------------------------------------------------------------------------------------


def rewards(uuid="u", reward=(1.0, 2.0), **more):
    prompt = [Message("user", "Hi")]
    texts = [[*prompt, Message("assistant", text)] for text in "abcd"[: len(reward)]]
    return Rewards(uuid=uuid, prompt=prompt, response=texts, reward=[*reward], **more)


def test_rewards_are_matched_with_their_responses():
    data = [Samples(uuid="u", prompt=[Message("user", "Hi")], responses=["a", "b"], extra={"gold": [1, 0]})]
    (row,) = rows.collect([rewards(), rewards("other")], data, rows.own_gold, False)
    assert (row.gold, row.lengths, row.log_odds(0, 1, 0.5)) == ([1, 0], [1, 1], -0.5)
    (judged,) = rows.collect([rewards(preferences=[[None, 0.9], [0.3, None]])], data, rows.own_gold, False)
    assert judged.log_odds(0, 1, 0.5) == pytest.approx(np.log(0.8 / 0.2))  # by its own comparisons, in both orders
    for record, message in (
        (rewards(reward=(1.0,)), "a response is missing"),
        (rewards("other"), "1 of 1 prompts have no rewards, 'u' is one"),
        (rewards(reward=(None, 1.0), reason=["not a finite number", None]), "NaN or infinite"),
    ):
        with pytest.raises(UserError, match=message):
            rows.collect([record], data, rows.own_gold, False)
    with pytest.raises(UserError, match="no gold values"):
        rows.collect([rewards()], None, rows.own_gold, False)
    with pytest.raises(UserError, match="has no num_tokens"):
        rows.collect([rewards()], data, rows.own_gold, True)


# The command ----------------------------------------------------------------------------------------------------------


def test_finished_rewards_and_labels(looped):
    """Best-of-N of the tiny loop's rewards, against brute force; the other model's on the same responses."""
    done = looped.run(
        f"evaluate_reward.py --rewards {LOOP}/current.jsonl --against {LOOP}/previous.jsonl --gold {LABELS} "
        "--output_dir outputs/measured"
    )
    assert "weighted majority softmax" in done.out and "McNemar p" in done.out
    folder = looped.folder / "outputs/measured"
    found = json.loads((folder / "current.summary.json").read_text())
    lines = [json.loads(line) for line in (folder / "current.rows.jsonl").read_text().splitlines()]
    assert found["rows"] == len(lines) == 24 and found["benchmark"] is None
    best = [
        [g[max(some, key=r.__getitem__)] for some in combinations(range(4), 2)]
        for g, r in ((line["gold"], line["rewards"]) for line in lines)
    ]
    two = found["best_of_n"]["by_n"][1]
    assert two["best"]["value"] == pytest.approx(np.mean(best)) and two["n"] == 2
    right = [r[i] > r[j] for line in lines for r, g in ((line["rewards"], line["gold"]),)
             for i in range(4) for j in range(4) if g[i] > g[j]]  # fmt: skip
    assert found["all"]["all"]["value"] == pytest.approx(np.mean(right)) and found["all"]["all"]["n"] == len(right)
    assert found["against"]["all"]["all"]["a"] == pytest.approx(found["all"]["all"]["value"])
    again = looped.run(
        f"evaluate_reward.py --rewards {LOOP}/current.jsonl --against {LOOP}/previous.jsonl --gold {LABELS} "
        "--output_dir outputs/measured"
    )
    assert (
        "is up to date" in again.out
        and again.out.replace(f"\n{ROWS} is up to date (same settings and inputs)\n", "") == done.out
    )
    looped.run(f"report.py verify {ROWS}")


def test_a_benchmark_is_rewarded_and_measured(looped):
    asked = "Tom has 3 apples. He buys 4 more. How many apples does Tom have now?"
    given = {"prompt": asked, "chosen": "3 + 4 = 7", "rejected": "3 + 4 = 8"}
    found = [given | {"id": i, "subset": name} for i in range(2) for name in ("hep-go", "math-prm", "alpacaeval-easy")]
    write(looped.folder / "bench.jsonl", *found)
    command = (
        "evaluate_reward.py --device cpu --model tiny --reward dpo --data bench.jsonl --beta 0.1 "
        f"--checkpoint {LOOP}/m1/checkpoint-last"
    )
    out = looped.run(command).out
    assert "Reasoning (4 of 1431 rows)" in out and "RewardBench score" not in out
    assert "computed" in out and "is up to date" in looped.run(command).out
    folder = looped.folder / "outputs/reward_eval/bench"
    (rewards_file,) = folder.glob("*dpo*none.json")
    summary = json.loads(rewards_file.with_suffix(".summary.json").read_text())
    assert summary["sections"]["Reasoning"]["missing"] and not summary["complete"]
    assert summary["rewards"]["settings"]["reward"] == "dpo" and summary["calibration"]["beta"] == 0.1
    for row in map(json.loads, rewards_file.with_suffix(".rows.jsonl").read_text().splitlines()):
        better = row["rewards"][0] - row["rewards"][1]
        assert row["result"] == float(better > 0) and row["p"] == pytest.approx(1 / (1 + np.exp(-0.1 * better)))


def test_what_it_refuses(looped):
    write(looped.folder / "odd.jsonl", NUMBERED, NUMBERED | {"subset": "hep-golang", "id": 8})
    run = "evaluate_reward.py --device cpu --model tiny"
    assert "did you mean hep-go" in looped.refused(f"{run} --data odd.jsonl --reward likelihood")
    assert not (looped.folder / "outputs/reward_eval/odd").exists()
    measured = f"evaluate_reward.py --rewards {LOOP}/current.jsonl"
    assert "would have no effect" in looped.refused(f"{measured} --reward dpo --gold {LABELS}")
    assert "no gold values" in looped.refused(measured)
    text = (looped.folder / LOOP / "current.jsonl").read_text()
    number = json.loads(text.splitlines()[0])["reward"][0]
    (looped.folder / "nan.jsonl").write_text(text.replace(f'"reward":[{number}', '"reward":[NaN', 1))
    assert "nan.jsonl, line 1" in looped.refused(f"evaluate_reward.py --rewards nan.jsonl --gold {LABELS}")
    assert "--data is missing" in looped.refused("evaluate_reward.py")
    run = f"evaluate_reward.py --data {LOOP}/pairs.json --reward_model"
    assert "without --reward it is dpo, and --reward_model belongs to" in looped.refused(f"{run} nothing")
    assert "neither a folder" in looped.refused(f"{run} nothing --reward odin")


def test_a_reward_that_no_response_has(looped):
    write(looped.folder / "long.jsonl", {"prompt": "How many? " * 3000, "chosen": "5", "rejected": "6"})
    done = looped.run("evaluate_reward.py --device cpu --model tiny --data long.jsonl --reward likelihood")
    assert "0 of 2 responses rewarded" in done.out and "2 of 2 responses have no reward" in done.out
