"""The scripts of the study on a real model: statistics against scipy's, tables of a few records, flags, exit codes."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from layouts import records, whole
from scipy.stats import pearsonr

from cream.evaluation.statistics import wilson_interval
from cream.files.provenance import meta_path
from cream.records import Item, Pair, Rewards

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import engine_agreement  # noqa: E402
import real_study  # noqa: E402
from options import Options  # noqa: E402


def numbers(text):
    """The centre and the interval of "0.1 [0.0, 0.2]"."""
    return [float(word) for word in text.replace("[", "").replace("]", "").replace(",", "").split()]


@pytest.fixture
def rows(tmp_path, monkeypatch, capsys):
    """The rows that a part prints, of six prompts: two of GSM8K, two of SIQA, and two of no file of questions; both
    rankings have the first response first, which is right, and the longest."""
    for which in ("current", "previous"):
        path = tmp_path / f"round1.rewards.{which}.json"
        path.write_bytes(whole(Rewards, [row | {"num_tokens": [9, 5, 4]} for row in records(Rewards)]))
        meta_path(path).write_text(json.dumps({"settings": {"reward": "dpo"}}))
    (tmp_path / "round1.pairs.json").write_bytes(whole(Pair, records(Pair)))
    for source, items in {"gsm8k": records(Item)[:2], "siqa": records(Item)[2:4]}.items():
        (tmp_path / source).mkdir()
        (tmp_path / source / "train.json").write_bytes(whole(Item, items))
    monkeypatch.setattr(real_study, "DATA", tmp_path)
    for places in ("ROUNDS", "PAIRS"):
        monkeypatch.setattr(real_study, places, {"1": tmp_path / "round1"})

    def printed(part):
        real_study.PARTS[part]()
        lines = capsys.readouterr().out.splitlines()[2:]
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]

    return printed


def test_prompts_are_counted_under_their_source(rows):
    """As OASST's only those that no file of questions has; a source without a file has no row."""
    n = {row[2]: (row[3], row[4]) for row in rows("consistency") if row[1] == "mean"}
    mean = "1.00 [1.00, 1.00]"
    assert n == {"all": ("6", mean), "OASST": ("2", mean), "SIQA": ("2", mean), "GSM8K": ("2", mean)}


def test_labels_and_lengths_of_a_few_records(rows):
    ((_, gsm8k, *_), (_, everything, chosen, rejected, apart, decided), (_, choices, *_)) = rows("labels")
    assert (gsm8k, everything, choices, apart) == ("GSM8K", "all", "multiple choice", "4")
    assert [numbers(cell)[0] for cell in (chosen, rejected, decided)] == [100, 0, 100]
    assert [numbers(row[-1])[0] for row in rows("length")] == [9 - 4] * 4


def test_a_correlation_within_groups_is_scipy_s_but_for_their_means():
    """Of one group it is Pearson's. With several, a group's mean is known from the others' residuals no more: of 5 000
    groups of two with independent values the interval has to hold 0 in 95 of 100 studies."""
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(2, 30))
    expected = pearsonr(x, x + y)
    low, high = expected.confidence_interval(0.95)
    assert numbers(real_study.correlation([(x, x + y)])) == pytest.approx([expected.statistic, low, high], abs=0.006)
    covered = 0
    for _ in range(300):
        _, low, high = numbers(real_study.correlation([*draw.normal(size=(40, 2, 3))]))
        covered += low <= 0 <= high
    assert 0.91 * 300 <= covered <= 0.985 * 300


def test_the_interval_of_a_mean_accuracy():
    """Of one task Wilson's, about; of two equal ones narrower by the root of two."""
    task = {"correct": 120, "n": 300, "accuracy": 0.4}
    one, two = (numbers(real_study.macro([task] * count + [task])) for count in (1, 2))
    assert one == pytest.approx([40, *(100 * each for each in wilson_interval(120, 300))], abs=0.5)
    assert (two[2] - two[1]) * 2**0.5 == pytest.approx(one[2] - one[1], rel=0.05)


def test_unknown_parts_are_refused(capsys):
    parser = Options("")
    parser.add_parts({"a": None, "b": None})
    assert parser.parse_args([]).parts == ["a", "b"] and parser.parse_args(["--parts", "b,a"]).parts == ["b", "a"]
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--parts", "a,lenght"])
    assert stop.value.code == 2 and "'lenght' is not one of a, b" in capsys.readouterr().err


@pytest.mark.parametrize("call", [real_study.stage, engine_agreement.run])
def test_a_command_that_fails_says_why_once(call, capfd):
    with pytest.raises(SystemExit) as stop:
        call("infer.py", mode="no-such-mode")
    assert stop.value.code == 2
    message = capfd.readouterr().err
    assert "infer.py: --mode: 'no-such-mode' is not one of" in message and "Traceback" not in message


def test_engines_are_compared_in_a_folder_for_each_model_and_data_set(monkeypatch, tmp_path):
    flags = ["--model", "smollm2", "--name", "localdata/small/prompt.3.json", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["engine_agreement.py", *flags])
    monkeypatch.setitem(engine_agreement.MODES, "evaluation", lambda args: folders.append(args.output))
    folders = []
    engine_agreement.main()
    assert folders == [tmp_path / "smollm2-localdata_small_prompt.3.json"]
