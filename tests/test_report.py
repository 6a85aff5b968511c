"""The report: its numbers are those of other commands, and its page is self-contained and shows any text as text."""

import http.client
import json
import logging
import re
import threading
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from unittest.mock import Mock
from xml.etree import ElementTree

import msgspec
import numpy as np
import pytest
from scipy.stats import kendalltau, spearmanr
from workspace import LOOP

import iterate
from cream.consistency import Tally, margin_cap
from cream.errors import UserError
from cream.evaluation.compare import compare, join
from cream.evaluation.statistics import interval_of_mean
from cream.files import store
from cream.files.provenance import read_meta
from cream.loops.course import Course
from cream.loops.loop import Loop
from cream.records import Answer, Pair, Rewards
from cream.reporting import export, figures, markdown, report, watch
from cream.reporting.collect import FORMAT, collect, sections
from cream.reporting.figures import Series, lines
from cream.reporting.numbers import by_bins, histogram, mean, rank_correlation
from cream.reporting.outputs import Run, of_places, task_of
from cream.reporting.page import Section, build, format_number, table, table_of_runs
from cream.reporting.report import Files, beside_larger, write_all
from cream.reporting.sections import accuracy, rewards, summary, training

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)> \"'&\u202e\u0007 [x](javascript:y) | `$a$`" + "w" * 300


class Seen(HTMLParser):
    """A page's elements: (tag, attributes) in order, and its visible text."""

    def __init__(self, html: str):
        super().__init__()
        self.elements, self.text, self._in = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._in.append(tag)

    def handle_endtag(self, tag):
        while self._in and self._in.pop() != tag:
            pass

    def handle_data(self, data):
        if not {"script", "style"} & {*self._in}:
            self.text.append(data)

    def all(self, tag: str) -> list[dict]:
        return [attrs for each, attrs in self.elements if each == tag]


def check_self_contained(html: str) -> Seen:
    """Nothing is loaded from elsewhere, and the policy would forbid it; ids are unique; nothing hostile is markup."""
    seen = Seen(html)
    for _, attrs in seen.elements:
        for name in ("src", "href", "action", "data", "srcset", "poster", "xlink:href"):
            assert attrs.get(name, "#").startswith(("#", "data:")), attrs
        assert not any(name.startswith("on") for name in attrs), attrs
    (policy,) = [each["content"] for each in seen.all("meta") if each.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ") and "connect-src 'none'" in policy and "http" not in policy
    assert "unsafe" not in policy.partition("script-src")[2].partition(";")[0]
    ids = [attrs["id"] for _, attrs in seen.elements if "id" in attrs]
    assert len(ids) == len({*ids})
    return seen


# The page -------------------------------------------------------------------------------------------------------------


def test_a_page_shows_hostile_text_as_text():
    html = build(HOSTILE, [Section("one", HOSTILE, table([HOSTILE, "n"], [[HOSTILE, 1234567], [None, 0.5]], HOSTILE))])
    seen = check_self_contained(html)
    assert len(seen.all("script")) == 1 and not seen.all("img")
    assert "".join(seen.text).count(HOSTILE) == 7  # title twice, link, heading, caption, head, cell
    assert "<td></td>" in html and '<th scope="col" class=number>' in html
    (frame,) = [each for each in seen.all("div") if each.get("class") == "scroll"]
    assert (frame["tabindex"], frame["role"], frame["aria-label"]) == ("0", "group", HOSTILE)
    numbers = {1500: "1\u202f500", 0.12345: "0.1235", 1234.5: "1234", 12345.6: "12\u202f346", 9999.6: "10\u202f000"}
    assert {number: format_number(number) for number in numbers} == numbers


def test_data_are_packed_and_scripts_named_by_their_hash():
    parts = [Section(name, name, "", {f"{name}-data": b"[1]"}, "same();", libraries={"lib": "big();"}) for name in "ab"]
    html = build("t", parts)
    assert html.count("same();") == 1 and "big();" not in html and html.count('id="lib"') == 1
    assert html.count("'sha256-") == 3  # the page's own script, the shared one, the library
    assert "connect-src 'self'" in build("t", parts, version="1") and 'data-watched="1"' in build(
        "t", parts, version="1"
    )


def test_what_would_break_a_page_is_refused():
    for wrong in ([Section("a", "", "", scripts="x = '</script>'")], [Section("a", "", "")] * 2):
        with pytest.raises(ValueError):
            build("t", wrong)


def test_a_figure_has_units_a_table_and_no_markup_of_names():
    few = lines(
        "f", "Title", "About.", [Series(HOSTILE, [HOSTILE, "b"], [1, None], [0.5, None], [2, None])], "x, s", "y, %"
    )
    named = lines("f", "Title", "About.", [Series("a", [1], [1])], HOSTILE, HOSTILE)
    assert "<" not in json.dumps(named.plot["layout"]) and named.columns[1] == HOSTILE
    assert few.plot["layout"]["xaxis"]["title"]["text"] == "x, s" and few.columns == ("", "x, s", "y, %", "from", "to")
    assert few.rows == [(HOSTILE, HOSTILE, 1, 0.5, 2), (HOSTILE, "b", None, None, None)]
    assert "<" not in json.dumps(few.plot["data"]) and len(few.plot["data"][0]["name"]) < 80
    seen = Seen(figures.section("s", "S", "", [few]).html)
    (place,) = [attrs for attrs in seen.all("div") if attrs.get("class") == "plot"]
    assert place["role"] == "img" and place["aria-label"] == "Title. About." and len(seen.all("table")) == 1
    long = lines("g", "", "", [Series("s", range(1001), range(1001))], "", "")
    assert len(long.rows) == 167 and long.rows[1][1] == 6  # every sixth


def test_figures_of_a_kind_are_side_by_side_and_some_are_folded():
    kinds = ("mean", "c-0", "length", "c-1", "sum-2", "top")
    made = [lines(name, f"{name}, of all", "", [Series("s", [1], [1])], "", "") for name in kinds]
    shown = figures.section("s", "S", "", made[:5], "<p>tables</p>", made[5:])
    places = [[each["id"] for each in Seen(part).all("div") if each.get("class") == "plot"]
              for part in shown.html.split('<div class="figures">')[1:]]  # fmt: skip
    assert places == [["mean"], ["c-0", "c-1"], ["length", "sum-2"], ["top"]]
    assert "<details><summary>1 more figure: top</summary>" in shown.html
    assert {*json.loads(shown.data["s-figures"])} == {*kinds}


def test_a_line_joins_evaluations_of_the_same_questions():
    """Those of the best model, on a test set, come last on the axis, wherever their run has them."""

    def tested(name: str, data: str) -> dict:
        tasks = [{"task": task, "n": 80, "correct": 20, "accuracy": 0.25, "low": 0.1, "high": 0.4} for task in "ab"]
        macro = {"task": "macro", "n": 160, "correct": 40, "accuracy": 0.25, "low": 0.2, "high": 0.3}
        more = dict.fromkeys(("unanswered_rate", "truncated_rate", "mean_tokens"))
        return {"name": name, "data": data, "questions": data, "tasks": [{**row, **more} for row in (*tasks, macro)]}

    names = [["M1", "M2"], ["M1", "M2", "M3"]]
    runs = [
        {
            "title": f"run {i}",
            "accuracy": {"evaluations": [*(tested(name, "val") for name in own), tested("t", "test")]},
        }
        for i, own in enumerate(names)
    ]
    for run, marked in zip(runs, (["M2"], []), strict=True):
        run["accuracy"]["differences"], run["alarms"] = [], {"models": marked}
    shown = accuracy.show(runs, [])
    assert shown.html.count("<td>! M2</td>") == 4 and "! an alarm" in shown.html  # the mean, and of each task
    plot = json.loads(shown.data["accuracy-figures"])["accuracy-1"]
    assert plot["layout"]["xaxis"]["categoryarray"] == ["M1", "M2", "M3", "t"]
    assert [(each["name"], each["x"]) for each in plot["data"]] == [
        *(("run 0, val", names[0]), ("run 0, test", ["t"]), ("run 1, val", names[1]), ("run 1, test", ["t"])),
    ]
    assert plot["data"][0]["error_y"]["array"][0] == plot["data"][0]["error_y"]["arrayminus"][0] == 5


def test_what_runs_share_and_what_was_reused():
    """Shared outputs count once, in a row of their own; scores by where they are from."""
    base = {"script": "train.py", "finished": True, "records": 1, "dropped": 0, "tokens": None, "memory_gb": None}
    base |= {"reuse": None, "resumed": None}

    def stage(name: str, seconds: float, shared: list[str], **more) -> dict:
        return {**base, "name": name, "path": name, "seconds": seconds, "shared_with": shared, **more}

    scored = {"script": "rewarding.py", "reuse": {"policy": {"computed": 5, "cached": 7}, "reference": {"cached": 1}}}
    trained = {"reuse": {"reference": {"data": 3}}, "resumed": 2}
    runs = [
        ("a<b", [stage("M1", 4.0, ["two"]), stage("r1", 1.5, [], **scored), stage("M2", 2.0, [], **trained)]),
        ("two", [stage("M1", 4.0, ["a<b"]), stage("M3", 3.0, [])]),
    ]
    numbers = [{"title": title, "training": {"curves": [], "left": [], "stages": stages}} for title, stages in runs]
    shown = training.show(numbers)
    assert "<p>a&lt;b and two share 1 output, made once, in 4.0 s.</p>" in shown.html
    bars = json.loads(shown.data["training-figures"])["time"]["data"]
    assert [(each["name"], each["x"], each["y"]) for each in bars] == [
        ("shared by several", ["train.py"], [4.0]),
        ("a&lt;b", ["rewarding.py", "train.py"], [1.5, 2.0]),
        ("two", ["train.py"], [3.0]),
    ]
    rows = [re.sub(r"<[^>]+>", "|", row).strip("|") for row in shown.html.split("<tr>")]
    for row in ("a&lt;b||responses, for rewards||13||5||8||0", "a&lt;b||examples, for training||3||0||0||3"):
        assert any(each.startswith(row) for each in rows)
    for own in numbers:
        own["training"]["stages"] = [stage("M1", None, ["two", "a<b"], **trained)]
    shown = training.show([*numbers, {"title": "left", "training": {"curves": [], "left": ["x"], "stages": []}}]).html
    assert "share 1 output, made once.</p>" in shown and "<td>shared by several</td><td>examples" in shown
    assert shown.count("examples, for training") == 1


def test_a_card_shows_hostile_text_as_text():
    from markdown_it import MarkdownIt

    row = {"task": HOSTILE, "n": 1, "accuracy": 0.5, "low": None, "high": None}
    run = {"title": HOSTILE, "accuracy": {"evaluations": [{"name": HOSTILE, "tasks": [row]}], "differences": []}}
    keep = {"metric": HOSTILE, "mode": "max"}
    decided = {"loop": {"keep": keep}, "said": [{"round": 1, "text": HOSTILE}], "stopped": None, "best": None}
    run["alarms"] = {"fired": [{"stage": HOSTILE, "text": HOSTILE, "page": "docs/x.md#y"}], "models": [HOSTILE]}
    run |= {"consistency": {"pairs": []}, "training": {"curves": []}, "steering": [decided]}
    run["lineage"] = {
        "nodes": [],
        "edges": [],
        "outputs": [{"path": "", "settings": {}, "versions": {"torch": HOSTILE}}],
    }
    html = MarkdownIt("commonmark").enable("table").render(markdown.card({"runs": [run]}))
    seen = Seen(html)
    assert not {"script", "img", "a", "code", "em"} & {tag for tag, _ in seen.elements}
    shown = " ".join(HOSTILE.replace("\u202e", " ").replace("\u0007", " ").split())
    assert "".join(seen.text).count(shown) == 8 and len(seen.all("td")) == 5


# Numbers --------------------------------------------------------------------------------------------------------------


def test_numbers_are_those_of_numpy_and_scipy():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=200).round(1), rng.normal(size=200)
    y[3] = np.nan
    assert mean(y)["n"] == 199 and mean(y)["mean"] == pytest.approx(np.nanmean(y))
    half = 1.96 * np.nanstd(y, ddof=1) / np.sqrt(199)
    assert mean(y)["high"] == pytest.approx(np.nanmean(y) + half) and mean([1.0])["low"] is None
    assert rank_correlation(x, y) == pytest.approx(spearmanr(x, y, nan_policy="omit").statistic)
    assert rank_correlation([1, 1], [1, 2]) is None
    bins = by_bins(x, y)
    assert sum(each["n"] for each in bins) == 199 and len(bins) <= 10
    assert sum(each["n"] * each["mean"] for each in bins) == pytest.approx(np.nansum(y))
    assert all(a["x"] < b["x"] for a, b in zip(bins, bins[1:], strict=False))
    assert sum(histogram(y)["counts"]) == 199 and histogram([]) == {"middles": [], "counts": []}


@pytest.mark.parametrize(
    ("uuid", "task"),
    [("gsm8k-train-0012", "gsm8k-train"), ("oasst-000017#2", "oasst"), ("a1b2", "a1b"), ("7", "all"), ("x", "x")],
)
def test_the_task_of_a_prompt_without_label_is_in_its_uuid(uuid, task):
    turn = [msgspec.convert({"role": "user", "content": "q"}, Pair.__annotations__["prompt"].__args__[0])]
    reply = msgspec.convert({"role": "assistant", "content": "a"}, type(turn[0]))
    assert task_of(Pair(uuid=uuid, prompt=turn, selected=[*turn, reply], rejected=[*turn, reply])) == task


# Served -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path):
    """(ask, file, builds): `ask` a path of a served page that is made of one file."""
    file, builds = tmp_path / "a.json", []
    file.write_text("1")

    def made(version: str) -> str:
        builds.append(version)
        if file.read_text() == "bad":
            raise UserError("damaged")
        return f"page {file.read_text()}"

    server = watch.serve(watch.Watched(made, lambda: [file, tmp_path / "gone"]), token="secret")
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def ask(path: str, method: str = "GET", **headers):
        link = http.client.HTTPConnection(*server.server_address)
        link.request(method, path, headers=headers)
        answer = link.getresponse()
        found = answer.status, answer.read().decode()
        link.close()
        return found

    ask.address = server.server_address[0]
    yield ask, file, builds
    server.shutdown()
    server.server_close()


def test_a_watched_page_is_for_those_who_know_its_url(server):
    ask, _, builds = server
    assert ask.address == "127.0.0.1" and ask("/secret/") == (200, "page 1")
    assert ask("/secret/?x=1")[0] == 200
    for path in ("/", "/secret", "/wrong/", "/secret/../", "/secret/a.json", "/SECRET/", "/secr%65t/"):
        assert ask(path)[0] == 404, path
    assert ask("/secret/", Host="evil.example")[0] == 404
    for method in ("POST", "PUT", "DELETE", "HEAD", "OPTIONS"):
        assert ask("/secret/", method)[0] == 501
    assert len(builds) == 1


def test_a_watched_page_is_built_again_when_a_file_changes(server):
    ask, file, builds = server
    first, old = ask("/secret/")[1], ask("/secret/version")[1]
    assert ask("/secret/")[1] == first and builds == [old]
    file.write_text("22")
    assert ask("/secret/version")[1] != old and ask("/secret/") == (200, "page 22")
    file.write_text("bad")
    assert ask("/secret/") == (503, "not now: damaged")
    file.write_text("4444")
    assert ask("/secret/") == (200, "page 4444")


# A loop ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reported(looped):
    """A workspace with the report of a finished tiny loop, and its numbers."""
    done = looped.run(
        f"report.py html {LOOP} --output outputs/r.html --json outputs/r.json --markdown outputs/r.md "
        "--labels localdata/tiny/labels.json"
    )
    assert "report: outputs/r.html" in done.out
    return looped, looped.read("outputs/r.json")


def test_accuracies_and_differences_are_those_of_other_commands(reported):
    world, numbers = reported
    (run,) = numbers["runs"]
    found = {each["name"]: each for each in run["accuracy"]["evaluations"]}
    assert [*found] == ["m0", "m1", "m2"] and numbers["report"] == FORMAT and numbers["between"] == []
    for name, each in found.items():
        tasks = world.read(f"{LOOP}/{name}.summary.json")["tasks"]
        bounds = dict(zip(("low", "high"), interval_of_mean(tasks), strict=True))
        assert each["tasks"] == [*tasks[:-1], tasks[-1] | bounds]
    differences = run["accuracy"]["differences"]
    assert [(each["a"], each["b"]) for each in differences] == [("m0", "m1"), ("m1", "m2"), ("m0", "m2")]
    a, b = ([*store.read(world.folder / LOOP / f"{name}.json", Answer)] for name in ("m0", "m1"))
    assert differences[0]["tasks"] == compare(join(a, b))


def test_consistency_is_that_of_the_pairs(reported):
    world, numbers = reported
    found, folder = numbers["runs"][0]["consistency"], world.folder / LOOP
    (pairs,) = found["pairs"]
    made, about = [*store.read(folder / "pairs.json", Pair)], read_meta(folder / "pairs.json")
    tally = Tally([np.nan if each.consistency is None else each.consistency for each in made])
    assert pairs["pairs"] == len(made) == about["counts"]["out"]
    assert pairs["c"]["mean"] == tally.mean == pytest.approx(about["mean_consistency"])
    assert pairs["c"]["histogram"] == tally.histogram.tolist() and pairs["c"]["below_half"] == tally.below_half
    assert sum(each["n"] for each in pairs["tasks"].values()) == tally.n
    assert {*pairs["tasks"]} == {"tiny_add", "tiny_sub", "tiny_compare"}
    assert sum(each["n"] for each in pairs["labels"]["by_c"]) == pairs["labels"]["pairs"] > 0
    current, previous = (
        {each.uuid: each.reward for each in store.read(folder / f"{name}.jsonl", Rewards)}
        for name in ("current", "previous")
    )
    taus = [kendalltau(current[uuid], previous[uuid]).statistic for uuid in current]
    (agreement,) = found["agreement"]
    assert agreement["tau"]["mean"] == pytest.approx(np.nanmean(taus))
    (trained,), run = found["trained"], read_meta(folder / "m2")
    assert trained["share_in_reverse"] == run["counts"]["trained_in_reverse"] / run["counts"]["pairs"]
    assert trained["margin"] == run["last"]["margin"] / run["settings"]["beta"]
    assert trained["cap"] == float(margin_cap(run["counts"]["mean_c_used"], run["settings"]["beta"]))


def test_rewards_training_and_lineage_are_as_recorded(reported):
    world, numbers = reported
    run, folder = numbers["runs"][0], world.folder / LOOP
    (pairs,) = run["rewards"]["pairs"]
    margins = [each.margin for each in store.read(folder / "pairs.json", Pair)]
    assert pairs["chosen"]["mean"] - pairs["rejected"]["mean"] == pytest.approx(np.mean(margins))
    for each in run["rewards"]["rewards"]:
        assert each["responses"] == 24 * 4 and each["length"]["unit"] == "tokens"
    curves = {each["name"]: each for each in run["training"]["curves"]}
    assert {*curves} == {"m1", "m2"}
    for name, each in curves.items():
        assert each["log"] == [json.loads(line) for line in (folder / name / "log.jsonl").read_text().splitlines()]
    stages = {each["path"]: each for each in run["training"]["stages"]}
    assert len(stages) == 9 and all(each["finished"] and each["seconds"] > 0 for each in stages.values())
    reuse = {Path(path).name: each["reuse"] for path, each in stages.items() if each["reuse"]}
    assert {*reuse} == {"current.jsonl", "previous.jsonl", "m2"} and {*reuse["previous.jsonl"]["policy"]} == {"cached"}
    nodes, edges = run["lineage"]["nodes"], run["lineage"]["edges"]
    names = {(nodes[a]["name"], nodes[b]["name"]) for a, b in edges}
    assert {("pairs", "m2"), ("m1", "m2"), ("current", "pairs"), ("m1", "samples"), ("m2", "m2")} <= names
    assert all(a < b for a, b in edges)


def test_the_page_is_self_contained_and_is_made_of_the_numbers(reported):
    world, numbers = reported
    html = (world.folder / "outputs/r.html").read_text()
    seen = check_self_contained(html)
    names = ["summary", "accuracy", "consistency", "rewards", "training", "preferences", "lineage"]
    assert [each["id"] for each in seen.all("section")] == names
    plots = [attrs for attrs in seen.all("div") if attrs.get("class") == "plot"]
    assert len(plots) == len(seen.all("figure")) > 15 and all(each["aria-label"] for each in plots)
    for part in html.split("<figure>")[1:]:
        assert "<table>" in part.partition("</figure>")[0]
    assert all(section.html in html for section in sections(numbers))
    card = (world.folder / "outputs/r.md").read_text()
    assert "### Evaluation" in card and "| m2 | train.py | pairs, m1 |" in card


def test_a_report_replaces_only_reports(reported):
    world, _ = reported
    assert "report: outputs/r.html" in world.run(f"report.py html {LOOP}/m0.json --output outputs/r.html").out
    for flags in (
        f"--json {LOOP}/pairs.json",
        f"--output outputs/r.html --markdown {LOOP}/m0.json",
        "--output scripts/setup.sh",
    ):
        assert "give another name" in (err := world.refused(f"report.py html {LOOP} {flags}")) or "end in" in err
    assert "no such file" in world.refused("report.py html outputs/nowhere")
    assert "not an output" in world.refused("report.py html scripts/setup.sh")
    assert "none of its outputs" in world.refused("report.py html configs/recipes/tiny_cream.yaml")


def test_any_files_are_a_run_with_what_they_were_made_from(loop, monkeypatch):
    monkeypatch.chdir(loop)
    by_files = of_places("few", [Path(LOOP, "pairs.json"), Path(LOOP, "m2/checkpoint-last")])
    by_folder = of_places("all", [Path(LOOP)])
    assert {each.path.resolve() for each in by_files.outputs} == {each.path.resolve() for each in by_folder.outputs}
    order = [each.name for each in by_folder.outputs]
    assert order.index("samples") < order.index("current") < order.index("pairs") and order.count("m2") == 2
    assert {*by_files.models.values()} == {"m0", "m1", "m2"}


def write_output(path: Path, rows: list[dict], **about) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({str(i): row for i, row in enumerate(rows)}))
    about = {"settings": {}, "inputs": {}, **about}
    path.with_name(f"{path.name}.meta.json").write_text(json.dumps(about))


def test_what_is_made_by_hand_is_named_and_its_alarms_are_listed(tmp_path):
    """By the registered name of the model; of two files of one name with the folder. An alarm of a training's pairs
    concerns the model."""
    turn, fired = {"role": "user", "content": "q"}, {"alarm": "no_pair", "value": 0.75, "threshold": 0.5}
    pair = {"prompt": [turn], "selected": [turn, turn], "rejected": [turn, turn]}
    write_output(tmp_path / "round1/pairs.json", [pair], output="p1", alarms=[fired])
    write_output(tmp_path / "round2/pairs.json", [pair], output="p2")
    about = {"settings": {}, "inputs": {"data": "p1"}, "output": "m2", "command": ["train.py", "--register", "my_m2"]}
    for name in ("meta.json", "args.json"):
        (tmp_path / "dpo/long-name-1a2b").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"dpo/long-name-1a2b/{name}").write_text(json.dumps(about))
    item = {"question": "q", "label": "1", "responses": "", "final_prediction": "1", "correct": True}
    for model, folder in (("m2", "long-name-1a2b-test"), ("m1", "my_m1-test")):
        words = ["infer.py", "--name", "test"]
        write_output(tmp_path / f"{folder}/results.json", [item], command=words, inputs={"policy": model, "data": "d"})
    run = of_places("all", [tmp_path])
    assert {each.name for each in run.of("pairs")} == {"round1/pairs", "round2/pairs"}
    assert [each.name for each in run.of("training")] == ["my_m2"] and run.models["m2"] == "my_m2"
    assert {each.name for each in run.of("evaluation")} == {"my_m1", "my_m2"}
    write_output(tmp_path / "second/results.json", [item], inputs={"policy": "m2", "data": "d"})
    names = {each.name for each in of_places("all", [tmp_path]).of("evaluation")}
    assert names == {"my_m1", "long-name-1a2b-test", "second"}
    found = summary.alarms_of(run)
    assert found.models == {"my_m2"} and summary.say([run], [found]) == ["Alarms (!): pairs round1/pairs."]
    numbers = [{"title": title, "alarms": summary.collect(found)} for title in ("<a>", "b")]
    html = summary.show(numbers, summary.say([run], [found])).html
    assert html.count("<li>") == 1 and "<strong>&lt;a&gt;, b, pairs round1/pairs</strong>: 75 % of prompts" in html
    assert "See docs/troubleshooting.md#few-pairs" in html
    write_output(tmp_path / "round2/pairs.json", [pair], output="p2", alarms=[{"alarm": 1}])
    with pytest.raises(UserError, match=r"is damaged.*alarms"):
        of_places("all", [tmp_path])
    write_output(tmp_path / "round2/pairs.json", [pair], output="p2", reuse={"policy": 3})
    with pytest.raises(UserError, match=r"is damaged.*reuse"):
        of_places("all", [tmp_path])
    write_output(tmp_path / "round2/pairs.json", [pair], output="p2", settings={"train_stage": []})
    found = {each.name: each for each in of_places("all", [tmp_path]).of("pairs")}
    assert found["round2/pairs"].settings == {"train_stage": []} and found["round2/pairs"].stage is None


def test_a_page_of_more_runs_is_kept(tmp_path):
    path, one = tmp_path / "report.html", [Run('a, "b"', [])]
    both = [*one, Run("c", [])]
    assert beside_larger(path, one, ["x"]) == path
    path.write_text(build("t", [], runs=[run.title for run in both]))
    assert beside_larger(path, both, ["x", "y"]) == beside_larger(path, [Run("d", [])], ["z"]) == path
    assert beside_larger(path, one, ["x"]) == tmp_path / "report.x.html"
    assert beside_larger(path, [one[0], Run("d", [])], ["x", "y"]) == tmp_path / "report.x-y.html"
    many = [Run(f"{i}, ø", []) for i in range(2000)]
    path.write_text(build("t", [], runs=[run.title for run in many]))
    assert path.stat().st_size > 20_000 and beside_larger(path, many[:9], ["x"]).name == "report.x.html"
    report._check_free(path, ".html")  # an earlier report, whatever the number of its runs
    assert '<th scope="col">run' not in table_of_runs(False, ("run", "n"), [("a", 1)])


@pytest.mark.slow
def test_hostile_names_are_shown_as_text(tmp_path):
    """Evaluations of elsewhere, whose task, uuid and file name are markup."""
    for name in ("<b>a", "<b>b"):
        rows = [
            {"uuid": f"{HOSTILE}{i}", "question": HOSTILE, "label": "1", "task": HOSTILE, "responses": HOSTILE}
            | {"final_prediction": "1", "correct": (i + len(name)) % 3 > 0}
            for i in range(8)
        ]
        (tmp_path / f"{name}.json").write_text(json.dumps({row["uuid"]: row for row in rows}))
    run = of_places(HOSTILE, sorted(tmp_path.iterdir()))
    numbers = collect([run, Run("other", run.outputs[:1])])
    seen = check_self_contained(build(HOSTILE, sections(numbers)))
    assert not {"img", "b"} & {tag for tag, _ in seen.elements}
    assert HOSTILE in "".join(seen.text) and "<b>a" in "".join(seen.text)
    assert numbers["runs"][0]["accuracy"]["differences"][0]["tasks"][0]["n"] == 8


def test_verdicts_and_measured_rewards_are_counted(tmp_path):
    """Two prompts of three responses: five of six scores parsed, three different; one comparison changes with the
    order; four measured pairs, the two that are certain right."""
    turn = {"role": "user", "content": "q"}
    about = {"prompt": [turn], "response": [[turn, {"role": "assistant", "content": f"a{i}"}] for i in range(3)]}
    half = [[None, 0.9, 0.2], [0.8, None, 0.4], [0.7, 0.6, None]]
    rows = [
        {**about, "reward": [3.0, 3.0, 4.0], "parts": {"scores": [[3.0], [3.0], [4.0]]}, "preferences": half},
        {
            **about,
            "reward": [1.0, 3.0, None],
            "parts": {"scores": [[1.0], [3.0], [None]]},
            "reason": [None, None, "odd"],
        },
    ]
    (tmp_path / "judged.json").write_text(json.dumps(dict(zip("ab", rows, strict=True))))
    measured = [{"uuid": str(i), "p": p} for i, p in enumerate((0.9, 0.9, 0.6, 0.4))] + [{"uuid": "x", "p": None}]
    (tmp_path / "m.rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in measured))
    (tmp_path / "m.summary.json").write_text('{"rows": 4}')
    found = rewards.collect(of_places("judges", sorted(tmp_path.glob("*[sd].json*"))))
    (judged,) = found["rewards"]
    scores, compared = judged["judge"]["scores"], judged["judge"]["comparisons"]
    assert (scores["asked"], scores["parsed"], scores["rate"]) == (6, 5, 5 / 6)
    assert scores["histogram"] == {"middles": [1, 3, 4], "counts": [1, 3, 1]}
    assert (compared["in_both_orders"], compared["clear"], compared["changed"]) == (3, 3, 1)
    assert judged["without"] == {"odd": 1} and judged["ties"]["equal"] == 1
    (one,) = found["measured"]
    assert one["summary"] == {"rows": 4} and [(each["n"], each["mean"]) for each in one["by_confidence"]] == [
        (2, 0.5),
        (2, 1.0),
    ]


def test_a_training_that_still_runs_is_shown(tmp_path):
    """Its log may end in half a line; a loop lists what is not finished."""
    (tmp_path / "M1").mkdir()
    (tmp_path / "M1/args.json").write_text('{"settings": {"train_stage": "sft"}, "inputs": {}}')
    (tmp_path / "M1/log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    run = replace(of_places("t", [tmp_path]), planned=[("train M1", tmp_path / "M1"), ("last", tmp_path / "gone.json")])
    found = training.collect(run)
    assert found["left"] == ["train M1", "last"] and not found["stages"][0]["finished"]
    assert found["curves"][0]["log"] == [{"step": 1, "loss": 2.0}]


def test_a_finished_loop_is_not_lost_with_its_report(tmp_path, caplog, monkeypatch):
    loop = Loop(title="t", model="tiny", output_dir=str(tmp_path))
    log = logging.getLogger("cream")
    monkeypatch.setattr(log, "propagate", True)
    with caplog.at_level("INFO"):
        for error in (ImportError("No module named 'plotly'"), ValueError("odd")):
            monkeypatch.setattr(report, "write_all", Mock(side_effect=error))
            iterate.report([Course(loop, lambda *_: ([], []))])
    assert [each.message for each in caplog.records] == [
        "no report: No module named 'plotly'; make setup installs what is missing",
        "no report: ValueError: odd",
    ]


def test_without_plotly_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "plotly.graph_objects", None)
    monkeypatch.chdir(tmp_path)
    rows = {
        "a": {"question": "q", "label": "1", "responses": "", "final_prediction": "1", "correct": True, "uuid": "a"}
    }
    Path("a.json").write_text(json.dumps(rows))
    with pytest.raises(ImportError):
        write_all(Files("r.html"), [of_places("a", [Path("a.json")])])
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.slow
def test_figures_are_drawn_by_a_browser(tmp_path):
    try:
        browser = export.find_browser()
    except UserError as error:
        pytest.skip(str(error))
    few = lines("f-1", "A < B", "", [Series("a", [1, 2], [3, 4])], "x", "y")
    drawn = export.write_figures([figures.section("s", "S", "", [few])], tmp_path / "new", browser)
    assert {path.name for path in drawn} == {"f-1.svg", "f-1.png"}
    assert "A < B" in "".join(ElementTree.parse(tmp_path / "new/f-1.svg").getroot().itertext())
    assert (tmp_path / "new/f-1.png").read_bytes().startswith(b"\x89PNG")


def test_a_missing_browser_is_one_message(monkeypatch):
    monkeypatch.setenv("BROWSER_PATH", "/nowhere/chrome")
    with pytest.raises(UserError, match="BROWSER_PATH=/nowhere/chrome is not a program"):
        export.find_browser()
