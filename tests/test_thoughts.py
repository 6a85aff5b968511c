"""Responses of reasoning models: where the thought ends and the final text begins."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cream.errors import UserError
from cream.text.thoughts import USUAL, ThoughtFlags, opens_thought, parse_tags, split_thought

SPLITS = [  # text, thought, final text, whether the last thought is closed
    ("It is 4.", None, "It is 4.", True),
    ("", None, "", True),
    ("<think>3?</think>It is 4.", "3?", "It is 4.", True),
    ("\n<think>\n3?\n</think>\n\nIt is 4.", "\n\n3?\n", "\n\nIt is 4.", True),
    ("<think></think>4", "", "4", True),
    ("3?</think>4", "3?", "4", True),
    ("<think>3?", "3?", "", False),
    ("<think>", "", "", False),
    ("Well. <think>3?</think>4", "Well. 3?", "4", True),
    ("Well, 48? <think>3?", "Well, 48? 3?", "", False),
    ("<think>a</think>b<think>c</think>d", "ac", "bd", True),
    ("<think>a</think>b<think>c", "ac", "b", False),
    ("<think>a</think>b</think>c", "ab", "c", True),
    ("<think>a<think>b</think>c", "a<think>b", "c", True),
    ("<think>a</thinking>b</think>c", "a</thinking>b", "c", True),
    ("[THINK]a[/THINK]b", "a", "b", True),
    ("<|START_THINKING|>a<|END_THINKING|>b", "a", "b", True),
    ("<|channel>thought\na<channel|>b", "thought\na", "b", True),
    (
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b",
        "a<|end|><|start|>assistant",
        "b",
        True,
    ),
    ("<|channel|>analysis<|message|>a", "a", "", False),
]


@pytest.mark.parametrize(("text", "thought", "final", "closed"), SPLITS)
def test_thought_and_final_text(text, thought, final, closed):
    assert split_thought(text) == (thought, final, closed)


def test_a_template_may_have_opened_the_thought():
    assert opens_thought("<|im_start|>assistant\n<think>\n") and opens_thought("[THINK]", (("[THINK]", "[/THINK]"),))
    assert not opens_thought("<think>\n\n</think>\n\n") and not opens_thought("<think>", ())
    assert split_thought("3?", opened=True) == ("3?", "", False)
    assert split_thought("3?</think>4", opened=True) == ("3?", "4", True)
    assert split_thought("3?<think>5</think>4", opened=True) == ("3?<think>5", "4", True)


def test_tags_by_flag():
    assert ThoughtFlags().tags == USUAL == parse_tags("Usual")
    assert parse_tags("<a> </a>, [b] [/b]") == (("<a>", "</a>"), ("[b]", "[/b]"))
    assert parse_tags("usual, <a> </a>") == (*USUAL, ("<a>", "</a>"))
    assert split_thought("<think>3?</think>4", parse_tags(None), opened=True) == (None, "<think>3?</think>4", True)
    assert split_thought("<a>3?</a>4", parse_tags("<a> </a>")) == ("3?", "4", True)
    for bad in ("<think>", "<a> </a>,", "<a> <a>", "<a> </a>,<b> </a>", "a b c", " "):
        with pytest.raises(UserError, match="--thinking_tags .*pairs separated by commas"):
            ThoughtFlags(bad)


@given(st.lists(st.sampled_from(["<think>", "</think>", "[THINK]", "[/THINK]", "a", "b "])).map("".join), st.booleans())
def test_nothing_is_lost_but_tags(text, opened):
    thought, final, closed = split_thought(text, opened=opened)
    assert sorted(_bare((thought or "") + final)) == sorted(_bare(text))
    assert (thought is None) == (not opened and _bare(text) == text)
    assert closed or thought is not None


def _bare(text: str) -> str:
    return re.sub(r"</?think>|\[/?THINK\]", "", text)
