"""Rows of any table become records, and records the rows of other tools."""

import json
import re
import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cream.data import forms, layouts, preferences, questions, table
from cream.data.columns import parse_columns, plan
from cream.data.messages import Keys
from cream.errors import UserError
from cream.evaluation.grade import options_of
from cream.files import store
from cream.pairs.validity import EMPTY, PROMPTS
from cream.records import Conversation, Item, Pair, Prompt, Samples, decode, encode


@pytest.mark.parametrize(
    "answer, texts, labels, first, expected",
    [
        ("3", ["u", "v", "w"], ["1", "2", "3"], None, "C"),  # ARC's old labels
        ("E", list("vwxyz"), list("ABCDE"), None, "E"),
        ("1", ["u", "v", "w"], None, 1, "A"),  # SIQA
        (1, ["u", "v", "w"], None, 0, "B"),  # MMLU
        ("b", ["u", "v"], ["a", "b"], None, "B"),
        ("v", ["u", "v"], None, None, "B"),
        ("B", ["u", "v"], None, None, "B"),
        ("3", ["2", "3"], None, None, "B"),  # a text
        (5, ["2", "5"], None, None, "B"),
        ("b", ["u", "v"], list("AB"), None, "B"),
        ("v", ["u", "v"], list("AB"), None, "B"),
        (1, ["u", "v"], list("AB"), 0, "B"),
        ("A", ["B", "A"], list("AB"), None, "A"),  # the label says it
        ("A", ["A", "B"], None, None, "A"),  # letter and text say the same
        ("u\n v", ["t", "u v"], None, None, "B"),
        ("1", ["0", "1"], None, 1, "A"),  # a number, since --first_answer says so
    ],
)
def test_the_right_option_becomes_a_letter(answer, texts, labels, first, expected):
    assert questions.letter(answer, texts, labels, first) == expected


@pytest.mark.parametrize(
    "answer, labels, first",
    [("D", list("ABC"), None), ("4", None, 1), ("-1", None, 0), ("D", None, 1), ("2", None, None)],
)
def test_an_answer_that_is_no_option_is_refused(answer, labels, first):
    with pytest.raises(ValueError, match="the answer"):
        questions.letter(answer, ["u", "v", "w"], labels, first)


@pytest.mark.parametrize(
    "answer, texts, told",
    [
        (1, ["1", "2", "3", "4"], "--first_answer"),  # MMLU's index, of the second
        ("1", ["1", "2", "3", "4"], "--first_answer"),
        (0, ["1", "0"], "--first_answer"),
        ("A", ["B", "A"], r"A \(B\) and B \(A\)"),
        ("b", ["b", "a"], r"A \(b\) and B \(a\)"),
        ("u", ["u", "u"], r"A \(u\) and B \(u\)"),
    ],
)
def test_an_answer_that_may_be_two_options_is_refused(answer, texts, told):
    with pytest.raises(ValueError, match=told):
        questions.letter(answer, texts, None, None)


@pytest.mark.parametrize(
    "text, expected", [(" 1,234", "1234"), ("12,345,678.5", "12345678.5"), ("-3", "-3"), ("1,23", "1,23"), ("4", "4")]
)
def test_numbers_lose_the_commas_between_thousands(text, expected):
    assert questions.number(text) == expected


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


def asked_and(**keys):
    return {"messages": [user("q"), {**said("a"), **keys}]}


PAIR = {"prompt": [user("q")], "selected": [user("q"), said("good")], "rejected": [user("q"), said("bad")]}
SYSTEM = {"role": "system", "content": "s"}
ROWS = {
    "messages": ({"messages": [user("q"), said("a")]}, Conversation, {"messages": [user("q"), said("a")]}),
    "a prompt's messages": ({"messages": [user("q")]}, Prompt, {"messages": [user("q")]}),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
        Conversation,
        {"messages": [SYSTEM, user("q"), said("a")]},
    ),
    "alpaca": (
        {"instruction": "do", "input": "this", "output": "a"},
        Conversation,
        {"messages": [user("do\n\nthis"), said("a")]},
    ),
    "alpaca without input": (
        {"instruction": " do ", "input": "", "output": "a", "system": "", "history": []},
        Conversation,
        {"messages": [user(" do "), said("a")]},
    ),
    "alpaca's history": (
        {"instruction": "q2", "output": "a2", "history": [["q1", "a1"]], "system": "s"},
        Conversation,
        {"messages": [SYSTEM, user("q1"), said("a1"), user("q2"), said("a2")]},
    ),
    "prompt and completion": (
        {"prompt": "q", "completion": "a"},
        Conversation,
        {"messages": [user("q"), said("a")]},
    ),
    "prompt": ({"prompt": [SYSTEM, user("q")]}, Prompt, {"messages": [SYSTEM, user("q")]}),
    "texts": ({"prompt": "q", "chosen": "good", "rejected": "bad"}, Pair, PAIR),
    "trl": ({"prompt": [user("q")], "chosen": [said("good")], "rejected": [said("bad")]}, Pair, PAIR),
    "trl, implicit prompt": ({"chosen": [user("q"), said("good")], "rejected": [user("q"), said("bad")]}, Pair, PAIR),
    "ultrafeedback": (
        {"prompt": "q", "chosen": [user("q"), said("good")], "rejected": [user("q"), said("bad")]},
        Pair,
        PAIR,
    ),
    "ultrafeedback_binarized": (
        {
            "prompt": "q",
            "messages": [user("q"), said("good")],  # the chosen conversation
            "chosen": [user("q"), said("good")],
            "rejected": [user("q"), said("bad")],
        },
        Pair,
        {**PAIR, "input_prompt": "q"},
    ),
    "sharegpt's pairs": (
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        Pair,
        PAIR,
    ),
    "arc": (
        {"question": "q?", "choices": {"text": ["u", " v\n w"], "label": ["1", "2"]}, "answerKey": "2"},
        Item,
        {"question": "q?\nA. u\nB. v w", "label": "B"},
    ),
    "a list of choices": (
        {"question": "q?", "choices": [{"text": "u", "label": "A"}, {"text": "v", "label": "B"}], "answerKey": "A"},
        Item,
        {"question": "q?\nA. u\nB. v", "label": "A"},
    ),
    "gsm8k": (
        {"question": "q?", "answer": "3*3=<<3*3=9>>9\n#### 1,009"},
        Item,
        {"question": "q?", "label": "1009", "solution": "3*3=9\n#### 1,009"},
    ),
    "options by their labels": (
        {"question": "q?", "options": {"A": "u", "B": "v", "C": None}, "answer": "b"},
        Item,
        {"question": "q?\nA. u\nB. v", "label": "B"},
    ),
    "options that are numbers": (
        {"question": "q?", "options": [10, 20], "answer": 20},
        Item,
        {"question": "q?\nA. 10\nB. 20", "label": "B"},
    ),
    "our own pairs": ({**PAIR, "consistency": None}, Pair, PAIR),
    "our own questions": (
        {"question": "q?\nA. u\nB. v", "label": "B", "task": "siqa"},
        Item,
        {"question": "q?\nA. u\nB. v", "label": "B", "task": "siqa"},
    ),
    "a number": ({"question": "q?", "answer": 7}, Item, {"question": "q?", "label": 7}),
}


def read_all(rows: list[dict], columns: str = "", first=None, keys=Keys(), best=None, grader=None):  # noqa: B008
    kind, names = plan(parse_columns(columns), rows[0], "rows")
    return list(table.records(rows, kind, names, "rows", "rows", table.Reading(first, keys, best or {}, grader)))


def read(row: dict, *args, **options):
    (made,) = read_all([row], *args, **options)
    return made


@pytest.mark.parametrize("row, kind, expected", ROWS.values(), ids=ROWS)
def test_what_a_row_becomes(row, kind, expected):
    made = read(row)
    assert type(made) is kind
    assert encode(made) == {"uuid": "rows-000000", **({"consistency": None} if kind is Pair else {}), **expected}


ASKED = {"question": "q", "answer": "A", "prompt": "q"}


@pytest.mark.parametrize(
    "row, columns, told",
    [
        *(({"messages": [{key: role, "content": "q"}]}, "", f"role {role!r} is none of") for key, role in (
            ("role", ["user"]), ("role", {"a": 1}), ("from", ["human"]), ("role", 7), ("role", None)
        )),
        ({"prompt": "q", "chosen": [{"role": [], "content": "a"}], "rejected": "b"}, "", "role None is none of"),
        ({"prompt": "q", "response": {"role": ["gpt"], "content": "a"}}, "", "role ['gpt'] is none of"),
        (asked_and(weight=[1]), "", "weight [1]: a turn is trained on"),
        (asked_and(content=[{"type": ["text"], "text": "a"}]), "", "a part of type ['text']"),
        ({"prompt": "q", "history": 7}, "", "history: expected a list of pairs of texts, found 7"),
        ({"prompt": "q", "history": "past"}, "", "history: expected a list of pairs of texts, found 'past'"),
        ({"prompt": "q", "history": {"ab": 1}}, "", "history: expected a list of pairs of texts, found {'ab': 1}"),
        ({"prompt": "q", "history": ["ab"]}, "", "history: expected pairs of texts, found 'ab'"),
        *(({**ASKED, "choices": {"text": ["u", "v"], "label": labels}}, "", "a label of an option is not a text") for
          labels in ([["A"], ["B"]], 3, [{}, {}], [None, None])),
        ({"prompt": "q", "responses": ["a", "b"], "s": [10**400, 1]}, "responses=responses,score=s", "is not a number"),
    ],
)  # fmt: skip
def test_values_of_other_types_are_named(row, columns, told):
    made = read(row, columns)
    assert isinstance(made, table.Bad) and told in made.reason


def test_a_column_map_joins_and_looks_into_columns_and_the_rest_travels_along():
    siqa = {"context": "A left.", "question": "Why?", "answerA": "u", "answerB": "v", "label": "2", "kind": "social"}
    made = read(siqa, "question=context+question, choices=answerA+answerB,answer=label", 1)
    assert encode(made) == {
        "uuid": "rows-000000",
        "question": "A left. Why?\nA. u\nB. v",
        "label": "B",
        "kind": "social",
    }
    original = {"question": {"stem": "q?", "choices": [{"text": "u", "label": "A"}, {"text": "v", "label": "B"}]}}
    made = read({**original, "answerKey": "B"}, "question=question.stem,choices=question.choices")
    assert (made.question, made.label, made.extra) == ("q?\nA. u\nB. v", "B", {})
    assert [read({"id": own, "prompt": "q"}).uuid for own in (0, 7, "", None)] == ["0", "7", *["rows-000000"] * 2]
    ultrachat = {"prompt": "q", "messages": [user("q"), said("a")], "label": 1}
    assert read(ultrachat).extra == {"prompt": "q", "label": 1}  # of which a conversation has no use
    assert read({"text": "q", "n": None, "weight": 0.5, "key": "k1"}, "prompt=text,uuid=key").extra == {"weight": 0.5}


def test_what_the_messages_make_needless_travels_along():
    pair = {"prompt": "p", "chosen": "good", "rejected": "bad", "history": [["a", "b"]], "system": "t"}
    made = read({**pair, "messages": [SYSTEM, user("q")]})
    assert made.prompt == read({"messages": [SYSTEM, user("q")]}).messages
    assert made.extra == {"input_prompt": "p", "history": [["a", "b"]], "system": "t"}
    assert read({"messages": [user("q")], "system": "t"}).extra == {}
    asked = read({**pair, "messages": [user("q")]}, "prompt=prompt")  # a map comes before messages that it leaves out
    assert [m.content for m in asked.prompt] == ["t", "a", "b", "p"] and asked.extra == {"messages": [user("q")]}
    answered = read({"prompt": "p", "response": "a", "messages": [user("q")]}, "prompt=prompt,response=response")
    assert answered.messages[0].content == "p" and answered.extra == {"input_messages": [user("q")]}


# Keys of messages -----------------------------------------------------------------------------------------------------


RUDE = [user("Hi"), {**said("Rude."), "weight": 0}, user("q"), {**said("a"), "weight": 1}]


@pytest.mark.parametrize(
    "row, named",
    [
        ({"messages": RUDE}, "--ignore_keys weight trains on it"),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "train": False}]},
            "'train'",
        ),
        (asked_and(trainable=False), "'trainable'"),
        (asked_and(masked=True), "'masked'"),
        (asked_and(weight=0.5), "weight 0.5: a turn is trained on"),
        ({"messages": [{**user("q"), "train": True}, said("a")]}, "by its 'train' the user's turn is to be trained on"),
        ({"prompt": "q", "chosen": [{**said("a"), "weight": 0}], "rejected": "b"}, "but either response of a pair is"),
        ({"prompt": "q", "chosen": "a", "rejected": {**said("b"), "train": False}}, "--ignore_keys train trains on it"),
        ({"chosen": [user("q"), {**said("a"), "masked": 1}], "rejected": [user("q"), said("b")]}, "by its 'masked'"),
        ({"messages": RUDE[:2], "chosen": [said("Rude.")], "rejected": "b"}, "by its 'weight'"),
        (asked_and(tool_calls=[{"name": "f"}]), "tool_calls: calls of tools cannot be"),
        (asked_and(function_call={"name": "f"}), "function_call: calls of tools"),
        ({"messages": [user("q"), {"role": "tool", "content": "x", "tool_call_id": "1"}]}, "tool_call_id"),
        (asked_and(reasoning_content="t"), "--thought_key reasoning_content puts it into the response"),
        (asked_and(thinking="t", name="b"), "a thought besides their text, thinking, name: --thought_key thinking"),
        (asked_and(mood="glad", at=3), "mood, at: records have no such keys; --ignore_keys mood,at drops them"),
        ({"prompt": "q", "chosen": [{**said("a"), "reasoning": "t"}], "rejected": "b"}, "--thought_key reasoning"),
        ({"conversation": [{"input": "q", "output": "a", "score": 1}]}, "--ignore_keys score"),
        ({"messages": [{**user(""), "content": [{"type": "image"}]}]}, "a part of type 'image'"),
    ],
)
def test_keys_of_messages_that_records_do_not_have_are_named(row, named):
    made = read(row)
    assert isinstance(made, table.Bad) and named in made.reason


@pytest.mark.parametrize(
    "row, keys, expected",
    [
        (asked_and(weight=1), Keys(), "a"),
        (asked_and(train=True, weight=1.0, masked=False), Keys(), "a"),
        (asked_and(tool_calls=None, function_call={}, annotations=[], refusal="", name=None), Keys(), "a"),
        (asked_and(content=[{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]), Keys(), "a b"),
        ({"messages": RUDE}, Keys(frozenset({"weight"})), "a"),
        (asked_and(reasoning_content="t"), Keys(frozenset({"reasoning_content"})), "a"),
        (asked_and(reasoning_content="\nt\n"), Keys(thought="reasoning_content"), "<think>\nt\n</think>\n\na"),
        (asked_and(thinking="t", content="\n\na"), Keys(thought="thinking"), "<think>\nt\n</think>\n\na"),
        (asked_and(mood="glad", thinking=""), Keys(frozenset({"mood"}), "thinking"), "a"),
        (asked_and(thinking=" \n"), Keys(thought="thinking"), "a"),
        (asked_and(thinking="", content="<think>x</think>a"), Keys(thought="thinking"), "<think>x</think>a"),
        ({"conversation": [{"input": "p", "output": "x"}, {"input": "q", "output": "a"}]}, Keys(), "a"),
    ],
)
def test_keys_of_messages_are_honoured(row, keys, expected):
    made = read(row, keys=keys)
    assert isinstance(made, Conversation) and made.messages[-1].content == expected and not made.extra


def test_turns_that_are_not_trained_on_may_precede_a_prompt_or_a_pair():
    prompt = RUDE[:3]
    assert isinstance(read({"messages": prompt}), Prompt)
    pair = {"messages": prompt, "chosen": "a", "rejected": "b"}
    assert read(pair).prompt[1].content == "Rude."
    assert read({**pair, "chosen": RUDE, "rejected": [*prompt, said("b")]}).selected[-1].content == "a"
    assert read({"prompt": "q", "chosen": RUDE[1:2], "rejected": "b"}, keys=Keys(frozenset({"weight"}))).extra == {}


def test_a_thought_in_a_column_of_its_own():
    row = {"prompt": "q", "response": "a", "reasoning": "t"}
    assert read(row).extra == {"reasoning": "t"}
    made = read(row, "thought=reasoning")
    assert made.messages[-1].content == "<think>\nt\n</think>\n\na" and not made.extra
    assert "another one besides" in read({**row, "response": "<think>x</think>a"}, "thought=reasoning").reason
    for blank in ("", "\n ", None):  # an empty cell of a .csv file, say
        for text in ("a", "\n\na", "<think>x</think>a"):
            made = read({**row, "reasoning": blank, "response": text}, "thought=reasoning")
            assert made.messages[-1].content == text
    assert "not text: 7" in read({**row, "reasoning": 7}, "thought=reasoning").reason


def test_messages_of_record_files_may_have_other_keys_that_are_null(tmp_path):
    """In each file by uuid, whatever holds the messages."""
    nulls = {"name": None, "tool_calls": None}
    asked, answered, bad = {**user("q"), **nulls}, {**said("a"), **nulls}, {**said("b"), **nulls}
    pair = {"prompt": [asked], "selected": [asked, answered], "rejected": [asked, bad]}
    samples = {"prompt": [asked], "responses": ["a"], "finish_reason": ["stop"], "note": [{"by": None}]}
    of = {Conversation: {"messages": [asked, answered]}, Prompt: [asked], Pair: pair, Samples: samples}
    for kind, record in of.items():
        path = tmp_path / f"{kind.__name__}.json"
        path.write_text(json.dumps({"u": record}))
        (made,) = store.read(path, kind)
        assert made.uuid == "u" and not any("name" in key for key in encode(made))
    assert made.extra == {"note": [{"by": None}]}
    path.write_text(json.dumps({"u": [{**asked, "at": 0}]}))
    with pytest.raises(UserError, match="unknown field `at`"):
        list(store.read(path, Prompt))


def test_messages_of_record_files_have_no_other_keys(tmp_path):
    path = tmp_path / "own.jsonl"
    for key in ("weight", "train", "tool_calls", "reasoning_content"):
        path.write_text(json.dumps({"uuid": "u", **asked_and(**{key: 0})}))
        with pytest.raises(UserError, match=f"unknown field `{key}`"):
            list(store.read(path, Conversation))


# Preferences ----------------------------------------------------------------------------------------------------------


GOOD_BAD = {"prompt": "q", "response1": "bad", "response2": "good"}
PUBLIC = {  # a row (or rows with one prompt) of each data set of LAYOUTS
    "SHP": [{"history": "q", "human_ref_A": "good", "human_ref_B": "bad", "labels": 1, "score_ratio": 2.0}],
    "PKU-SafeRLHF": [{"prompt": "q", "response_0": "bad", "response_1": "good", "better_response_id": 1}],
    "HelpSteer3": [{**GOOD_BAD, "context": [user("q")], "overall_preference": 2, "prompt": None}],
    "HelpSteer, HelpSteer2": [{"prompt": "q", "response": r, "helpfulness": s} for r, s in (("bad", 1), ("good", 4))],
    "Nectar": [
        {
            "prompt": "\n\nHuman: q\n\nAssistant: ",
            "answers": [{"answer": a, "rank": r} for a, r in (("so", 2.0), ("bad", 7.0), ("good", 1.0))],
        }
    ],
    "UltraFeedback": [
        {
            "instruction": "q",
            "completions": [
                {"response": r, "overall_score": s} for r, s in (("bad", 2), ("good", 8.5), ("none", None))
            ],
        }
    ],
    "Chatbot Arena": [
        {
            "conversation_a": [user("q"), said("bad")],
            "conversation_b": [user("q"), said("good")],
            "winner": "model_b",
        }
    ],
    "PandaLM": [{**GOOD_BAD, "annotators": [2, 1, 2]}],
    "trl's unpaired preferences": [
        {"prompt": [user("q")], "completion": [said(text)], "label": label}
        for text, label in (("good", True), ("bad", False))
    ],
}


def flags_of(text: str) -> tuple[str, dict[str, int]]:
    words = [part for word in shlex.split(text) for part in word.split("=", word.startswith("--"))]
    flags = dict(zip(words[::2], words[1::2], strict=True))
    return flags["--columns"], preferences.parse_best(flags["--best"]) if "--best" in flags else {}


@pytest.mark.parametrize("name, value", [("score", 4.5), ("score", "1"), ("rating", 0), ("reward", -2.5), ("rank", 1)])
def test_a_number_that_says_how_good_a_response_is_has_to_be_given_its_meaning(name, value):
    """Not trained on as if all responses were good."""
    row = {"prompt": "q", "response": "a", name: value}
    with pytest.raises(UserError, match=f"{name} is .* seems to say how good .*={name} makes a pair .* copy={name}"):
        read(row)
    assert read(row, f"copy={name}").extra == {name: value}
    assert read(row | {name: "high"}).extra == {name: "high"}  # no number
    assert read({"prompt": "q", name: value}).extra == {name: value}  # of a prompt


@pytest.mark.parametrize("name", layouts.LAYOUTS)
def test_public_preferences_are_recognised_and_read(name, repo):
    known, flags = layouts.flags_for(PUBLIC[name][0])
    columns, best = flags_of(flags)
    assert known == name and flags in (repo / "docs/data.md").read_text()
    (made,) = read_all(PUBLIC[name], columns, best=best)
    texts = [made.prompt[0].content, made.selected[-1].content, made.rejected[-1].content]
    assert isinstance(made, Pair) and texts == ["q", "good", "bad"]


HH = "\n\nHuman: q1\n\nAssistant: a1\n\nHuman: q2\n\nAssistant: "


def test_every_command_of_the_documented_list_is_one(repo):
    rows = re.findall(r"^\| .* \| `(--columns .*)` \|$", (repo / "docs/data.md").read_text(), re.MULTILINE)
    assert len(rows) >= 13
    for row in rows:
        columns, best = flags_of(row)
        assert parse_columns(columns) and ("best=" in columns) == bool(best)


def test_transcripts_are_turns():
    made = read({"chosen": HH + "good", "rejected": HH + "bad"})
    assert [m.content for m in made.prompt] == ["q1", "a1", "q2"]
    assert (made.selected[-1].content, made.rejected[-1].content) == ("good", "bad")
    assert read({"prompt": HH, "chosen": "good", "rejected": "bad"}).prompt == made.prompt
    assert read({"prompt": HH}).messages == made.prompt
    assert read({"messages": HH + "a"}).messages[-1].content == "a"
    assert read({"chosen": HH + "good", "rejected": HH.replace("q1", "p") + "b"}).reason == PROMPTS


ROW = {"prompt": "q", "a": "good", "b": "bad"}


@pytest.mark.parametrize(
    "extra, columns, best, expected",
    [
        ({"s": [0.1, 0.9]}, "responses=b+a,score=s", {}, ("good", "bad")),
        ({"s": "0.5", "t": "-1"}, "responses=a+b,score=s+t", {}, ("good", "bad")),
        ({"s": True, "t": False}, "responses=a+b,score=s+t", {}, ("good", "bad")),
        ({"s": 2, "t": 1}, "responses=b+a,rank=s+t", {}, ("good", "bad")),
        ({"w": "a"}, "responses=a+b,best=w", {"a": 1, "b": 2}, ("good", "bad")),
        ({"w": 1.0}, "responses=b+a,best=w", {"1": 2, "0": 1}, ("good", "bad")),
        ({"w": False}, "responses=b+a,best=w", {"false": 2}, ("good", "bad")),
        ({"list": ["good", "so", "bad"]}, "chosen=list.0,rejected=list.-1", {}, ("good", "bad")),
        ({"s": 1, "t": 1}, "responses=a+b,score=s+t", {}, preferences.TIED),
        ({"s": 1, "t": None}, "responses=a+b,score=s+t", {}, preferences.TIED),
        ({"w": "tie"}, "responses=a+b,best=w", {"tie": 0}, preferences.TIED),
        ({"w": None}, "responses=a+b,best=w", preferences.parse_best("a=1,=0"), preferences.TIED),
        ({"keep": "no", "chosen": "x", "rejected": "y"}, "keep=keep", {}, "keep says no"),
        ({"w": "c"}, "responses=a+b,best=w", {"a": 1}, "best is 'c': --best says which response each value means"),
        ({"w": 1}, "responses=a+b,best=w", {}, "say --best 1=1,…"),
        ({"s": "high", "t": 1}, "responses=a+b,score=s+t", {}, "score 'high' is not a number"),
        ({"s": "nan", "t": 1}, "responses=a+b,score=s+t", {}, "score 'nan' is not a number"),
        ({"s": [1]}, "responses=a+b,score=s", {}, "2 responses, but 1 scores"),
        ({"list": ["x"]}, "chosen=list.0,rejected=list.4", {}, "list.4: there is no element 4 of 1"),
        ({"keep": "rarely"}, "response=a,keep=keep", {}, "keep is 'rarely', neither yes nor no"),
    ],
)
def test_the_better_response_is_the_one_that_a_column_says(extra, columns, best, expected):
    made = read({**ROW, **extra}, columns, best=best)
    if isinstance(expected, str):
        assert expected in made.reason
    else:
        assert (made.selected[-1].content, made.rejected[-1].content) == expected


def test_ranked_responses_keep_all_of_them():
    row = {
        "id": 7,
        "prompt": "2 + 3?",
        "ranked": ["5", "6", "7"],
        "order": [0, "1", None],
        "chosen": "5",
        "rejected": "7",
    }
    made = read(row, "responses=ranked,ranks=order")
    assert isinstance(made, Samples) and made.responses == ["5", "6", "7"] and made.prompt[0].content == "2 + 3?"
    assert (made.uuid, made.extra) == ("7", {"chosen": "5", "rejected": "7", "ranks": [0, 1, None]})
    for name, value, told in (("order", [0, 1], "3 responses, but 2 ranks"), ("ranked", "5", "expected a list of two")):
        assert told in str(read(row | {name: value}, "responses=ranked,ranks=order"))


def test_rows_of_one_prompt_make_a_pair_of_the_best_and_the_worst():
    rows = [
        {"id": f"r{i}", "prompt": p, "response": r, "score": s, "by": "me", "model": r.upper()}
        for i, (p, r, s) in enumerate(
            [("p", "so", 2), ("q", "x", 1), ("p", "bad", 1), ("p", "good", 3), ("q", "y", 1), ("s", "z", None)]
        )
    ]
    pair, *skipped = read_all(rows, "score=score")
    assert (pair.uuid, pair.selected[-1].content, pair.rejected[-1].content) == ("r3", "good", "bad")
    numbers = {"chosen_score": 3, "rejected_score": 1}
    assert pair.extra == {"score": [3, 1], "by": "me", "model": ["GOOD", "BAD"], **numbers}
    assert [each.reason for each in skipped] == [preferences.TIED] * 2
    (pair,) = read_all([{"messages": [user("q"), said(t)], "label": t == "a"} for t in "ba"], "score=label")
    assert pair.selected[-1].content == "a" and pair.uuid == "rows-000001"


@pytest.mark.parametrize(
    "row, columns, told",
    [
        ({"prompt": "q", "completion": "a", "label": False}, "", "label is False"),
        ({"prompt": "q", "completion": "a", "label": 0}, "", "label is 0"),
        ({"messages": [user("q"), said("a")], "label": True}, "", "label is True"),
        ({"instruction": "q", "output": "a", "kto_tag": "false"}, "", "kto_tag is 'false'"),
        (
            {"question": "q", "solution": "a", "is_correct": False},
            "prompt=question,response=solution",
            "keep=is_correct",
        ),
        ({"messages": [user("q"), said("a")], "tools": [{"name": "f"}]}, "", "declares tools"),
    ],
)
def test_a_column_that_changes_what_a_row_means_is_not_copied_without_a_word(row, columns, told):
    with pytest.raises(UserError, match=told):
        read(row, columns)
    (name,) = row.keys() & {"label", "kto_tag", "is_correct", "tools"}
    assert read(row, ",".join(filter(None, [columns, f"copy={name}"]))).extra[name] == row[name]


@pytest.mark.parametrize("text", ["1", "1=3", "a=1,a=2", "a=x", "a=1,"])
def test_meanings_of_best_that_are_refused(text):
    with pytest.raises(UserError, match="expected value=1"):
        preferences.parse_best(text)


# Bad rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"messages": [{"role": "tool", "content": "x"}]}, "role 'tool' is none of"),
        ({"messages": [user("q"), user("q")]}, "is the user's, expected the assistant's"),
        ({"messages": "q"}, None),
        ({"prompt": [user(["q"])]}, "turn is not text"),
        ({"prompt": "q", "chosen": None, "rejected": "b"}, "lacks chosen and rejected"),
        ({"prompt": [user("q"), said("b")], "chosen": [said("c")], "rejected": [said("d")]}, "is not the chosen one"),
        ({"messages": [user("q"), said("d")], "chosen": "c", "rejected": "d"}, "is not the chosen one"),
        ({"prompt": [user("q"), said("b")], "chosen": [], "rejected": [said("d")]}, "is not the chosen one"),
        ({"question": "q", "choices": ["u", " "], "answer": "u"}, "blank"),
        ({"question": "q", "choices": ["u"], "answer": "u"}, "1 options"),
        ({"question": "", "answer": "7"}, "question"),
        ({"question": "q", "choices": "u", "answer": "u"}, "not a text"),
        ({"question": "q", "choices": ["u", True], "answer": "u"}, "not a text"),
        ({"question": "q", "answer": "red"}, "label 'red' is not a number, and it has no option lines"),
        ({"question": "q", "answer": "x2"}, "label 'x2' is not a number, and it has no option lines"),
        ({"question": "q\nA. u\nB. v", "answer": "C"}, "label 'C' is none of its options A, B"),
        ({"instruction": "q", "output": "a", "history": ["q"]}, "pairs of texts"),
    ],
)
def test_a_row_that_makes_no_record_says_why(row, reason):
    made = read(row)
    if reason is None:
        assert made == Prompt(uuid="rows-000000", messages=made.messages)
    else:
        assert reason in made.reason and made.where == "rows, row 0" and json.loads(made.data) == row


CELLS = {"consistency": "0.75", "tau": "-1e-1", "margin": "2", "selected_index": "3.0", "selected_truncated": "True"}
TYPED = {"consistency": 0.75, "tau": -0.1, "margin": 2.0, "selected_index": 3, "selected_truncated": True}
ASKED = {"prompt": "q", "chosen": "good", "rejected": "bad"}


def test_numbers_of_pairs_may_be_texts_as_in_a_csv_file():
    made = read({**ASKED, **CELLS, "rejected_index": "", "score": "0.5", "extra": "x"})
    assert {**encode(made), "uuid": 0} == {"uuid": 0, **PAIR, **TYPED, "score": "0.5", "extra": "x"}
    assert read({**ASKED, "consistency": ""}).consistency is None


@pytest.mark.parametrize(
    "cells, reason",
    [
        ({"consistency": "high"}, r"consistency: Expected `float | null`, got `str`, found 'high'; rename the column"),
        ({"consistency": "1.5"}, "consistency: Expected `float` <= 1.0, found '1.5'"),
        ({"margin": "nan"}, "margin: Expected `float`"),
        ({"selected_index": "0.5"}, "selected_index: Expected `int | null`"),
        ({"prompt": """[{'role': 'user', 'content': 'q'}]"""}, "messages are written as a text"),
        ({"chosen": """ [{"from": "gpt", "value": "a"}]\n"""}, "messages are written as a text"),
    ],
)
def test_cells_that_hold_no_such_number_or_a_list_say_so(cells, reason):
    assert reason in read({**ASKED, **cells}).reason


def test_all_rows_are_of_one_layout_and_their_uuids_are_unique():
    rows = [{"id": "x", "messages": m} for m in ([user("q"), said("a")], [user("q")], [user("p"), said("a")])]
    good, prompt, double = table.records(rows, *plan({}, rows[0], "rows"), "rows", "rows")
    assert isinstance(good, Conversation) and good.uuid == "x"
    assert prompt.reason == "its layout is another (prompts) than that of earlier ones (conversations)"
    assert double.reason == "uuid 'x' occurs twice"


@pytest.mark.parametrize(
    "text, told",
    [
        ("promt=x", "did you mean prompt"),
        ("prompt", "expected field=column"),
        ("prompt=a,prompt=b", "each field once"),
        ("response=a,completion=b", "each field once"),
    ],
)
def test_column_maps_that_are_refused(text, told):
    with pytest.raises(UserError, match=told):
        parse_columns(text)


def test_columns_that_are_not_there_are_named_with_those_that_are():
    with pytest.raises(UserError, match=r"no column 'txt', for prompt; did you mean text\? It has: label, text"):
        plan({"prompt": "txt"}, ["text", "label"], "rows")
    with pytest.raises(UserError, match="make no record. Needed: chosen and rejected"):
        plan({}, ["uuid"], "rows")
    with pytest.raises(UserError, match="answer of --columns is not used with prompt and response"):
        plan({"answer": "c"}, ["prompt", "response", "c"], "rows")


def test_lettered_options_are_read_back_as_options():
    made = read({"question": "q?", "choices": {"text": ["1. u", "B. v", "w"], "label": ["1", "2", "3"]}, "answer": "1"})
    assert options_of(made.question) == {"A": "1. u", "B": "B. v", "C": "w"}


@pytest.mark.parametrize("answer", ["C", "c", "(C)", "C)", "80", "C)80"])
@pytest.mark.parametrize("form", ["{0}){1}", "({0}){1}", "{0}. {1}", "{0}: {1}"])
def test_options_that_bring_their_letters(form, answer):
    """As AQuA-RAT's and AGIEval's: each letter once, and the text without it."""
    choices = [form.format(letter, number) for letter, number in zip("ABCDE", (60, 75, 80, 90, 100), strict=True)]
    answer = choices[2] if answer == "C)80" else answer
    made = read({"question": "q?", "options": choices, "answer": answer})
    assert made.question == "q?\nA. 60\nB. 75\nC. 80\nD. 90\nE. 100" and made.label == "C"
    assert read({"question": "q?", "choices": {"text": choices, "label": list("ABCDE")}, "answer": "C"}) == made


def test_up_to_26_options():
    texts = [f"x{i}" for i in range(26)]
    made = read({"question": "q?", "choices": texts, "answer": "x25"})
    assert made.label == "Z" and [*options_of(made.question).values()] == texts
    assert "27 options" in read({"question": "q?", "choices": [*texts, "y"], "answer": "x25"}).reason


def test_formulas_as_answers_are_said_to_be():
    row = {"question": "q?", "answer": r"2\sqrt{3}", "grader": "Ann"}
    assert "--grader math" in read(row).reason
    made = read(row, grader="math")
    assert (made.label, made.grader, made.extra) == (r"2\sqrt{3}", "math", {"input_grader": "Ann"})
    assert encode(made)["grader"] == "math"
    assert read({"question": "q?", "choices": ["u", "v"], "answer": "u"}, grader="math").grader is None
    assert "not a formula" in read({"question": "q?", "answer": "in Paris"}, grader="math").reason


# Forms ----------------------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
ANSWER = st.text(st.characters(exclude_categories=["Cs"]))


@st.composite
def conversations(draw, ending: str):
    """Messages that end with a user's or an assistant's turn."""
    system = [SYSTEM] if draw(st.booleans()) else []
    past = [m for q, a in draw(st.lists(st.tuples(TEXT, ANSWER), max_size=2)) for m in (user(q), said(a))]
    return [*system, *past, user(draw(TEXT)), *([said(draw(ANSWER))] if ending == "assistant" else [])]


@pytest.mark.parametrize("form", forms.FORMS)
@given(st.data())
def test_what_is_exported_comes_back_without_loss(form, data):
    prompt = data.draw(conversations("user"))
    good, bad = data.draw(ANSWER), data.draw(ANSWER)
    extra = {"consistency": 0.75, "tau": 0.5, "margin": 1.5, "source": "x"}
    for record, kind in (
        ({"messages": prompt, "source": "x"}, Prompt),
        ({"messages": [*prompt, said(good)]}, Conversation),
        ({"prompt": prompt, "selected": [*prompt, said(good)], "rejected": [*prompt, said(bad)], **extra}, Pair),
    ):
        made = decode(kind, "u1", record, "here")
        row = json.loads(json.dumps(forms.export_row(made, form)))
        empty = kind is Pair and not (good.strip() and bad.strip() and all(m["content"].strip() for m in prompt))
        assert read(row) == (table.Skipped(EMPTY) if empty else made)


def test_the_forms_as_their_tools_document_them():
    pair = decode(Pair, "u1", {**PAIR, "consistency": 0.5, "chosen": 3}, "here")
    assert forms.export_row(pair, "trl") == {
        "uuid": "u1",
        "prompt": [user("q")],
        "chosen": [said("good")],
        "rejected": [said("bad")],
        "consistency": 0.5,
        "input_chosen": 3,
    }
    asked = decode(Prompt, "u1", [SYSTEM, user("q1"), said("a1"), user("q2")], "here")
    spoken = [("system", "s"), ("human", "q1"), ("gpt", "a1"), ("human", "q2")]
    assert forms.export_row(asked, "sharegpt")["conversations"] == [
        {"from": who, "value": text} for who, text in spoken
    ]
    assert forms.export_row(asked, "alpaca") == {
        "uuid": "u1",
        "instruction": "q2",
        "input": "",
        "system": "s",
        "history": [["q1", "a1"]],
    }
    with pytest.raises(UserError, match="have a trl form, not questions with labels"):
        forms.export_row(Item(uuid="u", question="q", label="1"), "trl")
