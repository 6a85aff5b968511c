"""Paired differences between two evaluations: statistics against brute force, rates by simulation, the command."""

import json
import shutil
from fractions import Fraction
from functools import cache
from math import comb, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs
from workspace import LOOP, ON

from cream.errors import UserError
from cream.evaluation.compare import COLUMNS, compare, flip_row, format_comparison, format_flips, join
from cream.evaluation.statistics import bootstrap_difference, mcnemar
from cream.files import store
from cream.records import Answer, Item

# Statistics -----------------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_sums_the_binomials_tails(only_a, only_b):
    n, less = only_a + only_b, min(only_a, only_b)
    tail = sum(Fraction(comb(n, k), 2**n) for k in range(less + 1))
    assert mcnemar(only_a, only_b) == mcnemar(only_b, only_a) == pytest.approx(float(min(1, 2 * tail)), rel=1e-9)


def test_mcnemar_of_many():
    assert mcnemar(0, 0) == 1
    assert mcnemar(100_000, 100_000) == 1 and 0 < mcnemar(1000, 1200) < 1e-4


@pytest.mark.parametrize(
    "counts", [[(5, 12, 60)], [(0, 8, 40)], [(30, 30, 60)], [(3, 9, 30), (20, 10, 200)], [(0, 0, 5), (1, 4, 10)]]
)
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_the_bootstrap_is_that_of_resampled_items(counts, confidence):
    """Against indices of items drawn with replacement, by another generator."""
    rng, resamples = np.random.default_rng(1), 20_000
    means = np.zeros(resamples)
    for only_a, only_b, n in counts:
        outcomes = np.repeat([-1, 1, 0], [only_a, only_b, n - only_a - only_b])
        means += outcomes[rng.integers(n, size=(resamples, n))].mean(axis=1) / len(counts)
    wanted = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    found = bootstrap_difference(counts, confidence, resamples=resamples, seed=2)
    step = 1 / min(n for *_, n in counts) / len(counts)  # a quantile of a lattice may fall on either neighbour
    assert found == pytest.approx(wanted, abs=step + 1e-9)
    assert found == bootstrap_difference(counts, confidence, resamples=resamples, seed=2)
    assert found != bootstrap_difference([(n - 3, 1, n) for *_, n in counts], confidence, resamples, seed=2)


def test_bootstrap_at_the_edges():
    assert bootstrap_difference([(0, 0, 7)]) == (0, 0)
    assert bootstrap_difference([(0, 7, 7)]) == bootstrap_difference([(0, 1, 1)]) == (1, 1)
    for counts in ([], [(0, 0, 0)], [(4, 4, 7)], [(-1, 2, 7)]):
        with pytest.raises(ValueError, match="at least one item"):
            bootstrap_difference(counts)


# Their rates ----------------------------------------------------------------------------------------------------------

DRAWS = 1000
TOLERANCE = 3.3 * sqrt(0.05 * 0.95 / DRAWS)  # of a rate of 95 % in so many draws: passed by chance once in 1000
SITUATIONS = [  # items, accuracies of A and B, correlation of being right
    (50, 0.5, 0.5, 0.0),
    (50, 0.5, 0.5, 0.6),
    (50, 0.3, 0.5, 0.3),
    (200, 0.8, 0.8, 0.5),
    (200, 0.4, 0.5, 0.7),
    (1000, 0.6, 0.6, 0.9),
    (1000, 0.2, 0.25, 0.5),
]
quick_mcnemar = cache(mcnemar)


def drawn(n, p_a, p_b, correlation, rng) -> np.ndarray:
    """(DRAWS, 2) items that only A, only B has right."""
    both = p_a * p_b + correlation * sqrt(p_a * (1 - p_a) * p_b * (1 - p_b))
    assert max(0, p_a + p_b - 1) <= both <= min(p_a, p_b)
    return rng.multinomial(n, [p_a - both, p_b - both, 1 - p_a - p_b + 2 * both], size=DRAWS)[:, :2]


@pytest.mark.slow
@pytest.mark.parametrize("situation", SITUATIONS, ids=str)
def test_the_interval_covers_and_mcnemar_rejects_at_their_stated_rates(situation):
    n, p_a, p_b, _ = situation
    found = drawn(*situation, np.random.default_rng(n)).tolist()
    intervals = (bootstrap_difference([(a, b, n)], resamples=2000, seed=i) for i, (a, b) in enumerate(found))
    covered = np.mean([low - 1e-9 <= p_b - p_a <= high + 1e-9 for low, high in intervals])
    rejected = np.mean([quick_mcnemar(a, b) <= 0.05 for a, b in found])
    print(f"{situation}: the 95 % interval covers {100 * covered:.1f} %, McNemar rejects {100 * rejected:.1f} %")
    assert abs(covered - 0.95) <= TOLERANCE
    assert rejected <= 0.05 + TOLERANCE if p_a == p_b else rejected > 0.2


@pytest.mark.slow
def test_the_macro_interval_covers_at_its_stated_rate():
    rng, tasks = np.random.default_rng(0), [(50, 0.3, 0.5, 0.3), (400, 0.7, 0.65, 0.6), (100, 0.5, 0.5, 0.5)]
    draws = np.stack([drawn(*task, rng) for task in tasks], axis=1).tolist()
    truth = np.mean([p_b - p_a for _, p_a, p_b, _ in tasks])
    hits = 0
    for i, counts in enumerate(draws):
        flips = [(a, b, n) for (a, b), (n, *_) in zip(counts, tasks, strict=True)]
        low, high = bootstrap_difference(flips, resamples=2000, seed=i)
        hits += low <= truth <= high
    print(f"three tasks: the 95 % interval of the macro difference covers {100 * hits / DRAWS:.1f} %")
    assert abs(hits / DRAWS - 0.95) <= TOLERANCE


def test_mcnemar_never_rejects_more_true_nulls_than_stated():
    """Exactly, not by simulation, given a number of discordant items."""
    for level in (0.05, 0.01):
        rates = [
            2 * sum(comb(n, k) for k in range((n + 1) // 2) if quick_mcnemar(k, n - k) <= level) / 2**n
            for n in (*range(1, 25), 100, 200)
        ]
        assert 0.5 * level < max(rates) <= level


# Joining and the table ------------------------------------------------------------------------------------------------


def answer(uuid, correct, task="siqa", label="B", question="Which?", prediction="a", text="Answer: A"):
    return Answer(
        uuid=uuid,
        question=question,
        label=label,
        task=task,
        responses=text,
        final_prediction=prediction,
        correct=correct,
    )


def several(task, *outcomes):
    """Two evaluations of one task, from strings of outcomes: "AB" both right, "A" only A, "" neither."""
    return [[answer(f"{task}-{i}", name in outcome, task) for i, outcome in enumerate(outcomes)] for name in "AB"]


def test_rows_of_two_tasks_by_hand():
    first, second = (
        several("siqa", "AB", "A", "B", "B", ""),
        several("gsm8k", "A", "AB", "", "", "", "", "", "", "", ""),
    )
    joined = join(first[0] + second[0], second[1][::-1] + first[1])  # matched by uuid, not by position
    siqa, gsm8k, macro, everything = compare(joined)
    assert all(tuple(row) == COLUMNS for row in (siqa, gsm8k, macro, everything))
    keys = ("n", "accuracy_a", "accuracy_b", "difference", "only_a", "only_b", "p")
    assert [siqa[key] for key in keys] == [5, 0.4, 0.6, pytest.approx(0.2), 1, 2, 1.0]
    assert [gsm8k[key] for key in keys] == [10, 0.2, 0.1, pytest.approx(-0.1), 1, 0, 1.0]
    assert [macro[key] for key in keys] == [15, *map(pytest.approx, (0.3, 0.35, 0.05)), 2, 2, None]
    assert [everything[key] for key in keys] == [15, 4 / 15, 4 / 15, 0, 2, 2, 1.0]
    assert (macro["low"], macro["high"]) == bootstrap_difference([(1, 2, 5), (1, 0, 10)])
    assert (everything["low"], everything["high"]) == bootstrap_difference([(2, 2, 15)])
    table = format_comparison([siqa, gsm8k, macro]).splitlines()
    assert len({len(line) for line in table[:-1]}) == 1
    assert table[1].split()[:5] == ["siqa", "5", "40.0", "60.0", "+20.0"] and table[3].split()[-1] == "2"
    assert table[-1].startswith("fewer than 5 items flipped in siqa, gsm8k, macro")


def test_one_task_has_one_row_and_files_without_tasks_are_one():
    for task, wanted in (("siqa", "siqa"), (None, "all")):
        (row,) = compare(join(*several(task, "A", "B", "B", "B", "B", "AB", "")))
        assert row["task"] == wanted and row["n"] == 7 and "fewer" not in format_comparison([row])
    (task, *_), *_ = join([answer("x", True, None)], [answer("x", True, "siqa")]).items
    assert task == "siqa"


def test_items_of_one_file_only_are_named_and_skipped():
    joined = join([answer("x", True), answer("y", True)], [answer("z", True), answer("y", False)])
    assert [a.uuid for _, a, _ in joined.items] == ["y"]
    assert (joined.only_a, joined.only_b, joined.reworded) == (["x"], ["z"], 0)
    assert [a.uuid for _, a, _ in joined.flipped()] == ["y"]


def test_a_question_may_have_another_suffix_only():
    plain, asked = answer("x", True), answer("x", True, question="Which?\n\nThink step by step.")
    assert join([plain], [asked]).reworded == join([asked], [plain]).reworded == 1
    with pytest.raises(UserError, match=r"'x' asks 'Which\?' in A and 'Who\?' in B"):
        join([plain], [answer("x", True, question="Who?")])


def test_what_cannot_be_compared():
    with pytest.raises(UserError, match="'x' has the label 'B' in A and 'C' in B"):
        join([answer("x", True)], [answer("x", True, label="C")])
    assert join([answer("x", True, label="18")], [answer("x", True, label=18)]).items
    with pytest.raises(UserError, match="no uuid is in both files"):
        join([answer("x", True)], [answer("y", True)])


def test_flips_side_by_side():
    long = "so we add " * 100 + "\n\nAnswer: B"
    a, b = [answer("x", False), answer("y", True)], [answer("x", True, text=long), answer("y", False)]
    text = format_flips(join(a, b).flipped(), show=1).splitlines()
    assert text[0] == "only A right: 1 items" and text[5] == "only B right: 1 items"
    assert text[6:9] == ["  x (siqa): Which?", "    label B", "    by A: a; response: Answer: A"]
    assert (
        text[9].startswith("    by B: a; response: … ")
        and text[9].endswith("so we add Answer: B")
        and len(text[9]) < 230
    )
    assert format_flips(join(a, b).flipped(), show=0).splitlines()[1] == "only B right: 1 items, the first 0"


def test_of_several_answers_the_one_that_won_the_vote_is_shown():
    texts, predictions = ["Answer: A", "Answer: B", "so B"], ["a", "b", "b"]
    several = {"all_responses": texts, "all_predictions": predictions, "all_correct": [False, True, True]}
    vote = structs.replace(answer("x", True, prediction="b"), **several)
    (item,) = join([answer("x", False)], [vote]).flipped()
    assert format_flips([item], show=1).splitlines()[-1] == "    by B: b; response: Answer: B"
    assert [flip_row(*item)[name]["responses"] for name in "ab"] == ["Answer: A", "Answer: B"]
    assert flip_row(*item)["b"]["final_prediction"] == "b"


# The command ----------------------------------------------------------------------------------------------------------

A, B = f"{LOOP}/m0.json", f"{LOOP}/m1.json"  # the base model and M1, evaluated on the same 60 items


@pytest.mark.slow
def test_two_evaluations_are_compared(looped):
    done = looped.run(f"report.py compare {A} {B} --show 2 --output outputs/flips.jsonl")
    before, after = ({a.uuid: a.correct for a in store.read(looped.folder / path, Answer)} for path in (A, B))
    flipped = {uuid for uuid in before if before[uuid] != after[uuid]}
    rows = [json.loads(line) for line in (looped.folder / "outputs/flips.jsonl").read_text().splitlines()]
    assert flipped == {row["uuid"] for row in rows} and len(flipped) >= 3
    assert all(row["a"]["correct"] == before[row["uuid"]] != row["b"]["correct"] for row in rows)
    everything = next(line for line in done.out.splitlines() if line.startswith("all items")).split()
    only_a, only_b = (sum(outcome[u] for u in flipped) for outcome in (before, after))
    difference = 100 * (sum(after.values()) - sum(before.values())) / 60
    assert [everything[2], everything[-1]] == ["60", f"{mcnemar(only_a, only_b):.2g}"]
    assert f"{difference:+.1f}" in everything
    assert {"tiny_add", "tiny_sub", "tiny_compare"} < {line.split()[0] for line in done.out.splitlines() if line}
    assert f"only A right: {only_a} items" in done.out and f"only B right: {only_b} items" in done.out
    sidecar = json.loads((looped.folder / "outputs/flips.jsonl.meta.json").read_text())
    assert sidecar["comparison"][-1]["n"] == 60 and {*sidecar["inputs"]} == {"a", "b"}
    assert "is up to date" in looped.run(f"report.py compare {A} {B} --output outputs/flips.jsonl").out
    assert "its settings or inputs differ" in looped.refused(f"report.py compare {B} {A} --output outputs/flips.jsonl")
    assert "all files are as recorded" in looped.run("report.py verify outputs/flips.jsonl").out


@pytest.mark.slow
def test_evaluations_are_found(looped):
    """By their folder, by the run or checkpoint that they are of, or by its registered name."""
    m0, m1, m2 = "assets/tiny_m0", f"{LOOP}/m1", f"{LOOP}/m2/checkpoint-last"
    looped.write("configs/checkpoint.json", {"second": m2})
    wanted = looped.run(f"report.py compare {B} {LOOP}/m2.json").out
    for a, b in ((m1, m2), (m1, "second"), (B, "second")):
        assert looped.run(f"report.py compare {a} {b}").out == wanted
    assert looped.run(f"report.py compare {m0} {m1}").out == looped.run(f"report.py compare {A} {B}").out
    quick = f"infer.py {ON} --mode evaluation --name tiny_test --limit_size"
    looped.run(f"{quick} 4 --gen_max_tokens 8 --checkpoint {m1}/checkpoint-last --output_dir outputs/evaluation/few")
    assert looped.run(f"report.py compare {m1} second").out == wanted  # the two with the same settings
    copies = [looped.folder / f"{LOOP}/copy.json{end}" for end in ("", ".meta.json")]
    for copy in copies:
        shutil.copyfile(copy.with_name(copy.name.replace("copy", "m1")), copy)
    found = looped.run(f"report.py compare {m1} second").out  # one of two that are alike in all
    assert found.replace("copy.json", "m1.json") == wanted
    for copy in copies:
        copy.unlink()
    assert "only in B" in looped.run(f"report.py compare outputs/evaluation/few {B}").out
    looped.run(f"{quick} 60 --gen_max_tokens 40 --checkpoint second --output_dir outputs/evaluation/short")
    looped.run(f"{quick} 60 --gen_max_tokens 40 --checkpoint {m1}/checkpoint-last --output_dir {LOOP}/s.json")
    several = looped.refused(f"report.py compare {m1} second")
    assert "several evaluations are of the same data" in several and "second: " in several and "loop/s.json" in several
    shutil.rmtree(looped.folder / "outputs/evaluation")
    for path in (looped.folder / LOOP).glob("s.json*"):
        path.unlink()
    for words, message in {
        f"{m0} {LOOP}": f"error: {LOOP}: neither a result file, nor the folder of an evaluation",
        "first second": "error: first: no such file or folder, nor a registered checkpoint. An evaluation is made by",
        f"outputs/evaluation/none/results.json {B}": "--mode evaluation --checkpoint CHECKPOINT --name DATA",
    }.items():
        assert message in looped.refused(f"report.py compare {words}")
    (looped.folder / LOOP / "m0.json").rename(looped.folder / "m0.json")
    assert f"{m0}: no evaluation of this checkpoint is in outputs/; make one:" in looped.refused(
        f"report.py compare {m0} second"
    )
    (looped.folder / "m0.json").rename(looped.folder / LOOP / "m0.json")


@pytest.mark.slow
def test_flipped_items_are_evaluation_data(looped):
    looped.run(f"report.py compare {A} {B} --output outputs/again.json")
    items = list(store.read(looped.folder / "outputs/again.json", Item))
    done = looped.run(f"infer.py {ON} --mode evaluation --name outputs/again.json --gen_max_tokens 48")
    before = {answer.uuid: answer.correct for answer in store.read(looped.folder / A, Answer)}
    macro = next(line for line in done.out.splitlines() if line.startswith("macro")).split()
    assert macro[1:3] == [str(len(items)), str(sum(before[item.uuid] for item in items))]  # graded as the first time


@pytest.mark.slow
def test_a_file_of_the_released_code_is_compared(looped):
    """Which has no sidecar, no task, and one item more here; the settings of the two are not known."""
    records = json.loads((looped.folder / A).read_text())
    keys = ("question", "label", "responses", "final_prediction", "correct", "uuid")
    released = {uuid: {key: record[key] for key in keys} for uuid, record in records.items()}
    first = next(iter(released))
    released["extra"] = released[first] | {"uuid": "extra"}
    (looped.folder / "outputs/released.json").write_text(json.dumps(released))
    done = looped.run(f"report.py compare outputs/released.json {B}")
    assert "released.json.meta.json: it is used unverified" in done.out
    assert "1 items are only in A and skipped: extra" in done.out and "tiny_sub" in done.out
    released[first]["label"] = "none"
    (looped.folder / "outputs/released.json").write_text(json.dumps(released))
    assert f"'{first}' has the label 'none' in A" in looped.refused(f"report.py compare outputs/released.json {B}")


@pytest.mark.slow
def test_what_else_is_not_alike_is_told(looped):
    few = "--mode evaluation --name tiny_test --limit_size 50 --gen_max_tokens 40"
    looped.run(f"infer.py {ON} {few} --output_dir outputs/less.json")
    done = looped.run(f"report.py compare {A} outputs/less.json --show 0")
    assert "10 items are only in A" in done.out and "gen_max_tokens: 48 -> 40" in done.out
    looped.run(f"infer.py --mode rescore --input_file {A} --extraction strict --output_dir outputs/strict.json")
    done = looped.run(f"report.py compare {A} outputs/strict.json --show 0")
    assert "A -> B: extraction: default -> strict" in done.out and "None" not in done.out


@pytest.mark.slow
def test_mistakes_are_refused(looped):
    assert "compare A B, card CHECKPOINT, or judge FILE" in looped.refused(f"report.py compare {A}")
    assert "no such file" in looped.refused(f"report.py compare {A} outputs/nowhere.json")
    assert "flags are not" in looped.refused(f"report.py compare {A} {B} --sho 3")
    assert "takes no flags" in looped.refused(f"report.py lineage {A} --show 3")
    assert "expected" in looped.refused("report.py")
    assert "prompt.1.json holds prompts; it" in looped.refused(f"report.py compare {A} localdata/tiny/prompt.1.json")
    changed = looped.folder / "outputs/changed.json"
    changed.write_bytes((looped.folder / A).read_bytes().replace(b'"correct":true', b'"correct":false', 1))
    (looped.folder / "outputs/changed.json.meta.json").write_bytes((looped.folder / f"{A}.meta.json").read_bytes())
    assert "was changed since it was made" in looped.refused(f"report.py compare outputs/changed.json {B}")
    assert "--force: outputs/changed.json" in looped.run(f"report.py compare outputs/changed.json {B} --force").out
    records = json.loads((looped.folder / A).read_text())
    del next(iter(records.values()))["correct"]
    (looped.folder / "outputs/damaged.json").write_text(json.dumps(records))
    assert "--on_bad_record skip" in looped.refused(f"report.py compare outputs/damaged.json {B}")
    before = looped.state()
    skipping = f"report.py compare outputs/damaged.json {B} --on_bad_record skip --output outputs/part.jsonl"
    done = looped.run(f"{skipping} --dry_run")
    assert "1 malformed records are skipped" in done.out and "1 items are only in B" in done.out
    assert looped.state() == before
    looped.run(skipping)
    assert "correct" in (looped.folder / "outputs/part.jsonl.rejected.jsonl").read_text()
    changed.write_text("[1]")
    (looped.folder / "outputs/changed.json.meta.json").unlink()
    assert "expected an object" in looped.refused(f"report.py compare outputs/changed.json {B}")
