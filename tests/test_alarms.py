"""Alarms: their thresholds, the page that explains them, what training's lines set off, sidecars and a loop's table."""

import json
import math
import re
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cream.alarms import ALARMS, LIMITS, PAGE, WINDOW, AlarmFlags, Watch, check, drift, line, over_optimised, sound
from cream.errors import UserError
from cream.loops.alarmed import Alarms, alarms, describe_alarms
from cream.loops.plan import Command
from cream.loops.results import table
from cream.rewards.ties import Ties

REPO = Path(__file__).resolve().parent.parent
TEXT = (REPO / PAGE).read_text()


# The page -------------------------------------------------------------------------------------------------------------


def test_the_page_has_every_alarm_with_its_threshold_and_its_heading():
    rows = re.findall(r"^\| `(\w+)` \| (above|below) ([\d.]+) \|", TEXT, re.MULTILINE)
    expected = [(name, "above" if a.above else "below", a.limit) for name, a in ALARMS.items()]
    assert [(name, side, float(limit)) for name, side, limit in rows] == expected
    headings = re.findall(r"^### (.*)$", TEXT, re.MULTILINE)
    slugs = [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]
    assert len({*slugs}) == len(slugs) >= 30 and {alarm.anchor for alarm in ALARMS.values()} <= {*slugs}


def test_the_errors_that_the_page_quotes_are_in_the_code():
    files = [*REPO.glob("*.py"), *REPO.glob("cream/**/*.py")]
    said = re.sub(r'"\s*\n\s*f?"', "", "\n".join(file.read_text() for file in files))  # texts of several lines
    quoted = re.findall(r"^> (.*)$", TEXT, re.MULTILINE)
    parts = [part.strip() for quote in quoted for part in quote.split("…") if len(part.strip()) > 5]
    assert len(quoted) > 15 and [part for part in parts if part not in said] == []


def test_every_text_says_the_value_and_the_threshold():
    for name, alarm in ALARMS.items():
        text = line({"alarm": name, "value": 0.75, "threshold": 0.5, "step": 7})
        assert "after step 7; see docs/troubleshooting.md#" in text and re.search("0.75|75 %|75.0 points", text), name
        assert re.search("0.5|50%|threshold 50", text) and alarm.text.count("{limit") == 1
    assert line({"alarm": "of_another_version", "value": 2.0, "threshold": 1.0}).startswith(
        "alarm: of_another_version is 2"
    )


# Thresholds -----------------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(st.sampled_from([*ALARMS]), st.floats(-100, 100), st.floats(-100, 100))
def test_an_alarm_sounds_beyond_its_threshold_only(name, value, limit):
    beyond = value > limit if ALARMS[name].above else value < limit
    fired = check({name: value, "loss": 1e9}, {name: limit})
    assert fired == [{"alarm": name, "value": value, "threshold": limit}] * beyond
    assert not check({name: None}) and not check({name: math.nan}) and not check({name: value}, {})


def test_thresholds_from_the_command_line():
    assert AlarmFlags().limits() == LIMITS
    limits = AlarmFlags("truncated=0.4, kl = off").limits()
    assert limits == {**{n: v for n, v in LIMITS.items() if n != "kl"}, "truncated": 0.4}
    for text, message in {
        "truncate=1": "did you mean truncated",
        "kl": "expected kl=NUMBER or kl=off",
        "kl=x": "expected kl=NUMBER",
    }.items():
        with pytest.raises(UserError, match=message):
            AlarmFlags(text)


def test_an_alarm_is_a_line_of_the_log(caplog):
    assert sound({"truncated": 0.25, "distinct": 0.9})[0]["alarm"] == "truncated"
    (text,) = [record.getMessage() for record in caplog.records]
    assert text.startswith("alarm: 25 % of responses are truncated") and text.endswith(f"{PAGE}#truncated-responses")


# Training -------------------------------------------------------------------------------------------------------------


def fired(lines, **how) -> dict[str, int]:
    """Alarm -> after which step, of logged lines."""
    watch = Watch(**how)
    for step, metrics in enumerate(lines, 1):
        watch(step, metrics)
    again = Watch(**how)
    for step, metrics in enumerate(lines, 1):
        again(step, metrics, quiet=True)
    assert again.fired == watch.fired
    return {each["alarm"]: each["step"] for each in watch.fired}


def test_lines_of_a_healthy_training_set_off_none():
    lines = [{"loss": 0.6, "grad_norm": 1 + i % 3, "kl": i, "entropy": 2 - i / 20, "length": 90 + i} for i in range(20)]
    assert fired([each | {"accuracy": 0.9, "margin": 1.0, "eval_loss": 0.5} for each in lines], cap=1.0) == {}


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([{"kl": 21.0}, {"kl": 30.0}], {"kl": 1}),
        ([{"truncated": 0.0}, {"truncated": 0.2}], {"truncated": 2}),
        ([{"entropy": 2.0}, {"entropy": 0.5}], {"entropy_left": 2}),
        ([{"kl_reference_k1": 21.0, "entropy_sampled": 2.0}, {"entropy_sampled": 0.5}], {"kl": 1, "entropy_left": 2}),
        ([{"length": 100.0}, {"length": 160.0}], {"length_drift": 2}),
        ([{"length": 100.0}, {"length": 60.0}], {"length_drift": 2}),
        ([{"grad_norm": 1.0}] * WINDOW + [{"grad_norm": 11.0}], {"grad_spike": WINDOW + 1}),
        ([{"grad_norm": 1.0}] * (WINDOW - 1) + [{"grad_norm": 11.0}], {}),  # too few to compare with
        ([{"accuracy": 1.0, "margin": 5.0}, {"accuracy": 1.0, "margin": 12.0}], {"saturated": 2}),
        ([{"accuracy": 0.9, "margin": 12.0}], {}),
        ([{"eval_loss": 0.5}, {"eval_loss": 0.4}, {"eval_loss": 0.5}], {"overfit": 3}),
    ],
)
def test_lines_that_set_off_an_alarm(lines, expected):
    assert fired(lines) == expected


def test_margins_beyond_the_cap():
    assert fired([{"margin": 0.9}, {"margin": 1.3}], cap=1.0) == {"margin_of_cap": 2} and fired([{"margin": 9.0}]) == {}


def test_gold_falls_while_the_reward_rises():
    rise = [i / 20 for i in range(20)]
    tent = [min(i, 20 - i) / 20 for i in range(20)]
    assert over_optimised(tent, rise) == pytest.approx(sum(tent[8:13]) / 5 - sum(tent[-5:]) / 5)
    assert over_optimised(tent, tent) == 0  # the reward fell as well
    assert over_optimised(rise, rise) == 0 and over_optimised(tent[:9], rise[:9]) is None
    assert "over_optimised" in fired([{"gold": g, "reward": r} for g, r in zip(tent, rise, strict=True)])
    assert drift(2.0, 1.0) == drift(1.0, 2.0) == 2 and drift(None, 1.0) is drift(1.0, 0.0) is None


# Rewards --------------------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.lists(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from([None, 0.0, 1.0, 2.0])), max_size=6)))
def test_ties_are_counted_among_distinct_responses(prompts):
    prompts = [[*dict(rows).items()] for rows in prompts]  # equal responses have equal rewards
    ties, flat, several, tied, distinct, none = Ties(), 0, 0, 0, 0, 0
    for rows in prompts:
        ties.add([reward for _, reward in rows], [text for text, _ in rows])
        values = [reward for _, reward in rows if reward is not None]
        none += len(rows) - len(values)
        distinct += len(values)
        shared = {i for i, j in combinations(range(len(values)), 2) if values[i] == values[j]}
        shared |= {j for i, j in combinations(range(len(values)), 2) if values[i] == values[j]}
        tied, several = tied + len(shared), several + (len(values) > 1)
        flat += len(values) > 1 and all(value == values[0] for value in values)
    facts, total = ties.facts(ranked=True), sum(map(len, prompts))
    assert facts["no_reward"] == (none / total if total else None)
    assert facts["flat_rewards"] == (flat / several if several else None)
    assert facts["tied_rewards"] == (tied / distinct if distinct else None)
    assert [*ties.facts(ranked=False)] == ["no_reward"]
    known = [value for rows in prompts for _, value in rows if value is not None]
    summary = ties.summary()
    assert (summary["responses"], summary["rewarded"], summary["tied"]) == (total, len(known), facts["tied_rewards"])
    assert summary["mean"] == (pytest.approx(sum(known) / len(known)) if known else None)


# A loop ---------------------------------------------------------------------------------------------------------------


def loop(folder: Path, accuracies: list[float]) -> list[Command]:
    """Rounds of samples, pairs, training and evaluation; round 1's samples have an alarm."""
    commands, start = [], None
    for t, accuracy in enumerate(accuracies):
        made = [
            Command(f"samples {t}", "infer.py", {"mode": "sampling", "checkpoint": start}, folder / f"s{t}.json"),
            Command(f"pairs {t}", "make_pairs.py", {"samples": str(folder / f"s{t}.json")}, folder / f"p{t}.json"),
            Command(
                f"train {t}", "train.py", {"name": str(folder / f"p{t}.json"), "checkpoint": start}, folder / f"m{t}"
            ),
        ]
        start = made[-1].result
        flags = {"mode": "evaluation", "checkpoint": start, "name": "test"}
        commands += [*made, Command(f"test {t}", "infer.py", flags, folder / f"M{t}.evaluation.json")]
        tasks = [{"task": task, "accuracy": accuracy, "n": 100} for task in ("a", "b", "macro")]
        (folder / f"M{t}.evaluation.summary.json").write_text(json.dumps({"tasks": tasks}))
    (folder / "s1.json.meta.json").write_text(json.dumps({"alarms": check({"truncated": 0.5})}))
    return commands


def test_a_loop_gathers_the_alarms_of_its_stages(tmp_path):
    commands = loop(tmp_path, [0.5, 0.8, 0.75, 0.6])
    found = alarms(commands)
    assert found.models == {"M1", "M3"}  # not M2: its samples are good, and 0.75 is within the interval
    (_, truncated), (title, drop) = found.fired
    assert truncated["alarm"] == "truncated" and title == "test 3"
    half = 1.959964 * math.sqrt(2 * 0.75 * 0.25 / 100) / 2
    assert drop["value"] == pytest.approx(0.75 - half - 0.6)
    assert alarms(commands, {}).models == {"M1"}
    within = [each["value"] for _, each in alarms(commands, {"accuracy_drop": -0.05}).fired[1:]]
    assert within == pytest.approx([0.8 - 1.959964 * math.sqrt(2 * 0.8 * 0.2 / 100) / 2 - 0.75, drop["value"]])
    (tmp_path / "s1.json.meta.json").write_text('{"alarms": [{"alarm": 7}]}')
    with pytest.raises(UserError, match="s1.json.meta.json: is damaged"):
        alarms(commands)


@pytest.mark.parametrize(
    ("means", "kinds", "models", "alarm"),
    [
        ([1.0, 2.0], ["orm", "orm"], ["rm", "rm"], "over_optimised_round"),
        ([2.0, 1.0], ["orm", "orm"], ["rm", "rm"], "accuracy_drop"),  # the reward fell, too
        ([1.0, 2.0], ["judge", "orm"], ["rm", "rm"], "accuracy_drop"),  # other units
        ([1.0, 2.0], ["dpo", "dpo"], ["m0", "m1"], "accuracy_drop"),  # by the policy itself
        ([1.0, None], ["orm", "orm"], ["rm", "rm"], "accuracy_drop"),  # of an earlier version
        ([1.0, 2.0], ["orm", "orm"], [None, None], "accuracy_drop"),  # nothing says what scored
    ],
)
def test_accuracy_falls_while_the_reward_of_the_training_rises(tmp_path, means, kinds, models, alarm):
    """M0 and M1 are sampled and rewarded in rounds 1 and 2; those of the previous model, which rise, train nothing."""
    commands = loop(tmp_path, [0.8, 0.5, 0.5])
    (tmp_path / "s1.json.meta.json").unlink()
    for t, (mean, kind, model) in enumerate(zip(means, kinds, models, strict=True), 1):
        for name, value in (("current", mean), ("previous", t)):
            output = tmp_path / f"{name}{t}.json"
            commands.append(Command(name, "rewarding.py", {"input_file": str(tmp_path / f"s{t}.json")}, output))
            about = {"reward": kind, "inputs": {"input_file": f"s{t}"} | ({"policy": model} if model else {})}
            about |= {"rewarded": {"responses": 2, "rewarded": 2, "mean": value, "tied": 0.0}} if value else {}
            (tmp_path / f"{name}{t}.json.meta.json").write_text(json.dumps(about))
        flags = {"file1": str(tmp_path / f"current{t}.json"), "file2": str(tmp_path / f"previous{t}.json")}
        commands.append(Command("pairs", "cal_consistency.py", flags, tmp_path / f"own{t}.json"))
    ((title, fired),) = alarms(commands).fired
    assert (title, fired["alarm"]) == ("test 1", alarm) and fired["value"] == pytest.approx(0.3 - 0.0554, abs=1e-3)
    off = {name: limit for name, limit in LIMITS.items() if name != "over_optimised_round"}
    assert [each["alarm"] for _, each in alarms(commands, off).fired] == ["accuracy_drop"]


def test_the_table_marks_models_and_lists_alarms_once():
    rows = [{"model": "M0", "accuracy": 0.5}, {"model": "M1", "accuracy": 0.625, "consistency": 0.75}]
    lines = table([("one", rows), ("two", rows)], [{"M1"}, set()]).splitlines()
    assert lines[3].split() == ["M1", "!62.5", "0.75", "62.5", "0.75"]
    assert [each.replace("!", " ") for each in lines] == table([("one", rows), ("two", rows)]).splitlines()
    each = Alarms([("round 1", check({"kl": 30.0})[0])], {"M1"})
    assert describe_alarms(["one"], [each])[0].startswith("! round 1: alarm: the KL")
    both = describe_alarms(["one", "two", "three"], [each, Alarms([], set()), each])
    assert len(both) == 1 and both[0].startswith("! one, three, round 1: ")


# Stages ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_stages_record_alarms_which_decide_nothing(quick):
    world, loop = quick, "outputs/loop"
    about = {
        name: world.read(f"{loop}/{name}.meta.json")["alarms"]
        for name in ("samples.jsonl", "current.jsonl", "pairs.json", "m1.json")
    }
    assert about["current.jsonl"] == []
    sampled = world.read(f"{loop}/samples.jsonl.meta.json")["sampled"]
    assert sampled["responses"] == 96 and 0 < sampled["distinct"] <= 96 and sampled["mean_tokens"] > 1
    pairs = (
        f"cal_consistency.py --file1 {loop}/current.jsonl --file2 {loop}/previous.jsonl --output outputs/alarmed.json"
    )
    out = world.run(f"{pairs} --alarm no_pair=-1,c_undecided=1,c_contradicts=1").out
    assert (
        "alarm: 0 % of prompts have no pair (threshold -100 %)" in out
        or "of prompts have no pair (threshold -100 %)" in out
    )
    assert "mean C is not clearly above 1/2" in out
    made = world.read("outputs/alarmed.json.meta.json")
    assert [each["alarm"] for each in made["alarms"]][:1] == ["no_pair"] and "alarm" not in made["settings"]
    assert world.read("outputs/alarmed.json") == world.read(f"{loop}/pairs.json")
    assert "is up to date" in world.run(f"{pairs} --alarm no_pair=off").out
    assert "did you mean no_pair" in world.refused(f"{pairs} --alarm no_pairs=1")
