"""The data of the report's browser of preferences: rows, texts, both rankings, labels, what the page has room for."""

import gzip
import json
from pathlib import Path

import pytest

from cream.errors import UserError
from cream.files import store
from cream.records import Item, Message, Pair, Rewards
from cream.reporting import blocks, browser
from cream.reporting.browser import Group, section
from cream.reporting.page import build

HOSTILE = [
    "<script>document.title = 'TAKEN'</script><img src=x onerror=\"document.title = 'TAKEN'\">",
    "</script></textarea></title><!-- <b>&amp;&lt;",
    "x" * 10_000,
    "\u202egnirts desrever\u2066 שלום",
    "\u2028\u0000\ud7ff\ufffe\U0001f9e0",
]
Q = [Message("system", "Be brief."), Message("user", "What is 2 + 2?")]
ANSWERS = ["Answer: 4", "Answer: 5", "4", "Answer: 4", "Answer: 40"]


def rewards(uuid: str, answers=ANSWERS, **fields) -> Rewards:
    """A rewards record; the last responses have the lowest rewards."""
    fields.setdefault("reward", [float(-i) for i in range(len(answers))])
    responses = [[*Q, Message("assistant", text)] for text in answers]
    extra = fields.pop("extra", {})
    record = Rewards(uuid=uuid, prompt=Q, response=responses, **fields)
    record.extra = extra
    return record


def pair(uuid: str, texts=ANSWERS, chosen=0, rejected=4, index=True, **fields) -> Pair:
    sides = [[*Q, Message("assistant", texts[at])] for at in (chosen, rejected)]
    places = {"selected_index": chosen, "rejected_index": rejected} if index else {}
    return Pair(uuid=uuid, prompt=Q, selected=sides[0], rejected=sides[1], **places, **fields)


@pytest.fixture
def group(tmp_path):
    """Writes records into files, and returns their group."""

    def make(pairs, current=None, previous=None, **fields) -> Group:
        files = {"pairs": pairs, "rewards": current, "previous": previous}
        paths = {name: tmp_path / f"{name}.jsonl" for name, records in files.items() if records is not None}
        for name, path in paths.items():
            store.write(path, files[name])
        return Group("round 1", **paths, **fields)

    return make


def index_of(made) -> dict:
    return json.loads(made.data["preferences-index"])


def texts_of(made, number: int = 0) -> dict:
    return json.loads(gzip.decompress(made.data[f"preferences-{number}"]))


def test_a_row_for_each_pair_and_for_a_prompt_without_one(group):
    pairs = [pair("a", consistency=0.8, tau=0.6, margin=4.0), pair("a#2", chosen=1, rejected=2, consistency=1 / 3)]
    made = section([group(pairs, [rewards("a"), rewards("b")])])
    rows = index_of(made)["rows"]
    assert rows["uuid"] == ["a", "a#2", "b"] and rows["item"] == [0, 0, 1]
    assert rows["chosen"] == [0, 1, None] and rows["rejected"] == [4, 2, None]
    assert rows["c"] == [0.8, 0.33333, None] and rows["margin"] == [4.0, None, None] and rows["tau"][0] == 0.6
    assert rows["snippet"] == ["What is 2 + 2?"] * 3


def test_each_text_is_written_once(group):
    texts = texts_of(section([group([], [rewards("a"), rewards("b")])]))
    assert sorted(texts["strings"]) == sorted({"Be brief.", Q[1].content, *ANSWERS})
    assert [texts["strings"][at] for at in texts["responses"][1]] == ANSWERS
    assert texts["prompt"][0] == ["system", 0, "user", 1]


def test_both_rankings_with_the_responses_that_both_have(group):
    current = rewards("a", reward=[5.0, 4.0, 3.0, 2.0, None], finish_reason=["stop", "length", "stop", "stop", "stop"])
    current.reason = [None, None, None, None, "too long"]
    previous = rewards("a", reward=[1.0, 2.0, 3.25, 4.0, 5.0])
    texts = texts_of(section([group([pair("a")], [current], [previous])]))
    assert texts["reward"] == [[5.0, 4.0, 3.0, 2.0, None]] and texts["previous"] == [[1.0, 2.0, 3.25, 4.0, 5.0]]
    assert texts["ranked"] == [[0, 2]]  # 1 is truncated, 3 repeats 0, 4 has no reward
    assert texts["strings"][texts["reason"][0][4]] == "too long"
    texts = texts_of(section([group([pair("a")], [current], [previous], keep_truncated=True)]))
    assert texts["ranked"] == [[0, 1, 2]]


def test_labels_say_which_responses_are_right(group):
    labels = {"a": Item(uuid="a", question=Q[1].content, label="4", task="gsm8k")}
    made = section([group([pair("a")], [rewards("a"), rewards("b")])], labels)
    rows, texts = index_of(made)["rows"], texts_of(made)
    assert texts["gold"] == [[1, 0, 1, 1, 0], None]
    assert rows["chosen_right"] == [1, None] and rows["rejected_right"] == [0, None]
    rows = index_of(section([group([pair("a#2", chosen=1, index=False)])], labels))["rows"]
    assert rows["chosen_right"] == [0] and rows["rejected_right"] == [0]


def test_gold_values_in_the_records_serve_as_labels(group):
    current = [rewards("a", extra={"gold": [1, 0, 0, 1, 0]}), rewards("b", extra={"gold": [0.3, 2, 1, 0, 0.9]})]
    rows = index_of(section([group([pair("a"), pair("b")], [*current, rewards("c", extra={"gold": "x"})])]))["rows"]
    assert rows["chosen_right"] == [1, None, None] and rows["rejected_right"] == [0, None, None]


def test_texts_and_parts_of_a_judge_and_tokens(group):
    n = len(ANSWERS)
    parts = {"scores": [[3, None, 4]] * n, "token_log_ratio": [[0.123456, -1.0], *[None] * (n - 1)]}
    record = rewards("a", parts=parts, texts={"judge_1": ["Score: 3", *[None] * (n - 1)]})
    record.extra = {"tokens": [["Answer", ": 4"], *[None] * (n - 1)]}
    texts = texts_of(section([group([pair("a")], [rewards("z"), record])]))
    assert texts["parts"][0] is None and texts["parts"][1]["token_log_ratio"][0] == [0.12346, -1.0]
    assert texts["strings"][texts["texts"][1]["judge_1"][0]] == "Score: 3"
    assert texts["pieces"][1][0] == ["Answer", ": 4"]


def test_pairs_without_rewards_show_their_own_two_responses(group):
    made = section([group([pair("spin-1", index=False), pair("spin-2", index=False)])])
    rows, texts = index_of(made)["rows"], texts_of(made)
    assert rows["chosen"] == [0, 0] and rows["rejected"] == [1, 1]
    assert [texts["strings"][at] for at in texts["responses"][0]] == [ANSWERS[0], ANSWERS[4]]
    assert "reward" not in texts


def test_a_chosen_response_from_elsewhere_is_appended_without_a_reward(group):
    odd = pair("a", texts=["a person's response", ANSWERS[1]], chosen=0, rejected=1, index=False)
    made = section([group([odd], [rewards("a")])])
    rows, texts = index_of(made)["rows"], texts_of(made)
    assert (rows["chosen"], rows["rejected"]) == ([5], [1]) and texts["reward"][0][5] is None
    assert texts["strings"][texts["responses"][0][5]] == "a person's response"


def test_rare_names_are_no_tasks(group):
    uuids = [*(f"gsm8k-train-{i}" for i in range(5)), *(f"f{i}c0-ab{i}" for i in range(4))]
    rows = index_of(section([group([], [rewards(uuid) for uuid in uuids])]))["rows"]
    assert rows["tasks"] == ["gsm8k-train", "other"] and rows["task"] == [0] * 5 + [1] * 4


def test_prompts_that_have_no_room_are_skipped_at_equal_distances(group, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 100)  # a few prompts a block
    numbered = [rewards(f"q-{i}", [f"{i} {n} " + "abc" * 10 for n in range(5)]) for i in range(200)]
    whole = section([group([], numbered)])
    size = len(build("", [whole]))
    half = section([group([], numbered)], limit=size // 3)
    said = index_of(half)["prompts"]
    assert said["all"] == 200 and 20 < said["shown"] < 120
    kept = [int(uuid.rpartition("-")[2]) for uuid in index_of(half)["rows"]["uuid"]]
    steps = {b - a for a, b in zip(kept, kept[1:], strict=False)}
    assert len(kept) == said["shown"] and kept[-1] > 180 and max(steps) < 20
    assert len(half.data) - 1 == len(index_of(half)["blocks"]) < len(whole.data) - 1
    tiny = blocks.Blocks(10)
    for prompt in browser.read(group([], numbered), {}, {}):
        tiny.add(0, prompt)
    assert len(tiny._blocks) < 5  # never many more in memory than there is room for


def test_a_pair_of_other_rewards_is_a_mistake(group):
    with pytest.raises(UserError, match="pair 'elsewhere' is of no prompt"):
        section([group([pair("elsewhere")], [rewards("a")])])


def test_a_prompt_that_is_not_in_the_previous_ranking_is_counted(group):
    made = section([group([pair("a")], [rewards("a"), rewards("b")], [rewards("b")])])
    assert index_of(made)["prompts"] == {"shown": 1, "all": 1, "skipped": {"not in the previous ranking": 1}}


def test_hostile_texts_are_nowhere_but_in_the_compressed_data(group):
    current = [rewards(f"{text[:50]}<b>", [text, *ANSWERS[1:]]) for text in HOSTILE]
    hostile = group([], current)._replace(title=HOSTILE[0], models=(HOSTILE[0], HOSTILE[1]))
    page = build(HOSTILE[1], [section([hostile])])
    assert "TAKEN" not in page and "</textarea>" not in page and page.count("<h1>") == 1


def test_paths_in_the_page_are_relative_to_the_working_folder(group, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = index_of(section([group([], [rewards("a")])]))
    assert made["groups"][0]["source"] == str(Path("pairs.jsonl"))
