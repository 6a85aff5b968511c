"""Examples in front of a question: which are drawn, and how they are written."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cream.errors import UserError
from cream.evaluation.few_shot import build_prompt, draw, places, write_solution
from cream.evaluation.tasks import TASKS
from cream.files import store
from cream.records import Item, Message
from cream.text.prompts import SYSPROMPTS


def item(uuid, question=None, label="5", task="sum", **extra):
    return Item(uuid=uuid, question=question or f"How many are {uuid}?", label=label, task=task, extra=extra)


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("examples") / "train.json"
    store.write(path, [item(f"e{i}") for i in range(40)])
    return path


@given(seed=st.integers(0, 50), k=st.integers(1, 40))
def test_a_draw_is_k_of_the_examples_and_goes_on_with_a_larger_k(file, seed, k):
    drawn = draw({"sum": file}, [], k, seed)["sum"]
    assert len({e.uuid for e in drawn}) == k
    assert drawn == draw({"sum": file}, [], 40, seed)["sum"][:k]


def test_seeds_draw_other_examples(file):
    firsts = {tuple(e.uuid for e in draw({"sum": file}, [], 2, seed)["sum"]) for seed in range(40)}
    assert len(firsts) > 30


def test_the_order_of_the_file_does_not_matter(file, tmp_path):
    store.write(tmp_path / "other.json", [item(f"e{i}") for i in reversed(range(40))])
    assert draw({"sum": file}, [], 5, 0) == draw({"sum": tmp_path / "other.json"}, [], 5, 0)


def test_neither_the_questions_nor_copies_nor_other_tasks(tmp_path):
    path = tmp_path / "train.json"
    rows = [item("a", "What is 2 + 3?"), item("b", "what is  2 + 3?"), item("c", "What is 1 + 4?")]
    store.write(path, [*rows, item("d", task="difference"), item("e", task=None)])
    drawn = draw({"sum": path}, [item("q", "What is 1 + 4? ")], 2, 0)["sum"]
    assert {e.uuid for e in drawn} == {"a", "e"}
    with pytest.raises(UserError, match=r"has 2 examples for sum \(besides 2 that are asked or repeated\)"):
        draw({"sum": path}, [item("q", "What is 1 + 4?")], 3, 0)


def test_all_that_is_missing_is_told_at_once(file, tmp_path):
    with pytest.raises(UserError) as error:
        draw({"sum": file, "other": file, "third": tmp_path / "none.json"}, [], 2, 0)
    assert "0 examples for other" in str(error.value) and "none.json does not exist" in str(error.value)
    assert "for sum" not in str(error.value)


def test_malformed_examples_are_skipped_only_if_asked(tmp_path):
    path = tmp_path / "train.jsonl"
    good = '{"uuid": "b", "question": "What is 2 + 3?", "label": 5}\n'
    unlabelled = good.replace('"b"', '"a"').replace("5", '"x"')
    for bad, told in (('{"uuid": "a"}\n', "question"), (unlabelled, "'a'.*label 'x'")):
        path.write_text(bad + good)
        with pytest.raises(UserError, match=f"train.jsonl, line 1: .*{told}"):
            draw({"sum": path}, [], 1, 0)
    assert [e.uuid for e in draw({"sum": path}, [], 1, 0, skip=True)["sum"]] == ["b"]


def test_where_examples_lie():
    data, own = Path("data/all_test.json"), {task: Path(f"data/{task}/test.json") for task in TASKS}
    assert places(["siqa", "mine"], None, data, own) == {
        "siqa": Path("data/siqa/train.json"),
        "mine": Path("data/train.json"),
    }
    assert places(["siqa"], None, data, {}) == {"siqa": Path("data/train.json")}
    assert places(["siqa", "mine"], "x.jsonl", data, own) == dict.fromkeys(["siqa", "mine"], Path("x.jsonl"))


@pytest.mark.parametrize(
    ("example", "turn"),
    [
        (item("a", label="B"), "Answer: B"),
        (item("a", label=12), "Answer: 12"),
        (item("a", label=" 12 "), "Answer: 12"),
        (item("a", label="12", solution="3 * 4 = 12"), "3 * 4 = 12\nAnswer: 12"),
        (item("a", label="12", solution="3 * 4 = 12\n#### 12"), "3 * 4 = 12\nAnswer: 12"),
        (item("a", label="12", solution=" "), "Answer: 12"),
        (item("a", label="12", solution=None), "Answer: 12"),
    ],
)
def test_worked(example, turn):
    assert write_solution(example) == turn


def test_examples_are_asked_as_the_question_is():
    asked = item("q", task="gsm8k")
    turns = build_prompt(asked, "auto", [item("a", label="12", task="gsm8k", solution="3 * 4 = 12")])
    assert turns == [
        Message("user", f"How many are a?\n\n{SYSPROMPTS['task']}"),
        Message("assistant", "3 * 4 = 12\nAnswer: 12"),
        *build_prompt(asked, "auto"),
    ]
    assert [m.content for m in build_prompt(item("q", task="tiny_add"), "auto", [item("a")])] == [
        "How many are a?",
        "Answer: 5",
        "How many are q?",
    ]
