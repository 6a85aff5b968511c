"""Records: each layout reads and writes back, errors say where, and nothing a user added is lost."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cream.errors import UserError
from cream.evaluation.tasks import Question
from cream.records import (
    AS_LIST,
    Answer,
    Conversation,
    Item,
    Message,
    Pair,
    Prompt,
    Ratings,
    Rewards,
    Samples,
    Steps,
    decode,
    encode,
    kind_of,
)

USER = {"role": "user", "content": "Tom has 3 bags of 4 apples. How many?"}
RIGHT = {"role": "assistant", "content": "3*4=12. Answer: 12"}
WRONG = {"role": "assistant", "content": "Answer: 7"}

# One value of each layout, as the method's files have it.
LAYOUTS = {
    Conversation: [USER, RIGHT],
    Prompt: [USER],
    Samples: {"prompt": [USER], "responses": ["3*4=12. Answer: 12", "Answer: 7"]},
    Rewards: {
        "prompt": [USER],
        "response": [[USER, RIGHT], [USER, WRONG]],
        "score": [-9.1, None],
        "ref_score": [-12.3, -13.2],
        "reward": [3.2, None],
    },
    Pair: {"prompt": [USER], "selected": [USER, RIGHT], "rejected": [USER, WRONG], "consistency": 0.9},
    Ratings: {"messages": [USER, RIGHT], "ratings": {"helpsteer-helpfulness": 0.9, "helpsteer-verbosity": None}},
    Steps: {"prompt": [USER], "steps": ["3*4=12.", "Answer: 13"], "labels": [1.0, 0.0]},
    Item: {"question": "Which gas?\nA. oxygen\nB. neon", "label": "A"},
    Answer: {
        "question": "Tom has …?",
        "label": "12",
        "responses": "… Answer: 12",
        "final_prediction": "12",
        "correct": True,
    },
}

SEVERAL = {
    "all_responses": ["… Answer: 12", "Answer: 7", "Answer: 12"],
    "all_predictions": ["12", "7", "12"],
    "all_correct": [True, False, True],
    "all_finish_reasons": ["stop"] * 3,
    "all_num_tokens": [9, 4, 4],
}
FIRST = {"finish_reason": "stop", "num_tokens": 9}


def changed(kind, **keys):
    return {**LAYOUTS[kind], **keys}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_layout_is_recognised_read_and_written_back(kind):
    value = LAYOUTS[kind]
    assert kind_of(value) is kind
    expected = {"messages": value} if kind in AS_LIST else value
    assert encode(decode(kind, "u1", value, "f.json")) == {"uuid": "u1", **expected}


@pytest.mark.parametrize("kind", [kind for kind in LAYOUTS if kind not in AS_LIST])
def test_unknown_keys_are_carried_along(kind):
    mine = {"source": "gsm8k", "extra": {"level": 3}, "tags": [None, 1]}  # a user may call a key `extra`
    record = decode(kind, "u1", changed(kind, **mine), "f.json")
    assert record.extra == mine
    assert encode(record) == {"uuid": "u1", **LAYOUTS[kind], **mine}


def test_a_users_key_never_takes_a_computed_ones_place():
    """Extras travel from layout to layout; `correct` in a test item must not grade its answer."""
    item = decode(Item, "u1", {"question": "1 + 1?", "label": "2", "correct": True, "level": 3}, "f.json")
    answer = Answer(
        uuid="u1", question="1 + 1?", label="2", responses="3", final_prediction="3", correct=False, extra=item.extra
    )
    row = encode(answer)
    assert (row["correct"], row["input_correct"], row["level"]) == (False, True, 3)
    assert decode(Answer, "u1", row, "f.json").extra == {"input_correct": True, "level": 3}


def test_several_answers_to_one_question():
    value = changed(Answer, **FIRST, **SEVERAL)
    assert encode(decode(Answer, "u1", value, "f.json")) == {"uuid": "u1", **value}
    least = changed(Answer, **{key: SEVERAL[key] for key in ("all_responses", "all_predictions", "all_correct")})
    assert encode(decode(Answer, "u1", least, "f.json")) == {"uuid": "u1", **least}


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"all_correct": None}, "`all_responses` needs `all_correct`"),
        ({"all_responses": None}, "`all_finish_reasons` needs `all_responses`"),
        ({"all_predictions": ["12"]}, "`all_predictions` has 1 entries for 3 in `all_responses`"),
        ({"all_num_tokens": [9, 4]}, "`all_num_tokens` has 2 entries for 3"),
        ({"responses": "Answer: 7"}, "`responses` is not the first of `all_responses`"),
        ({"num_tokens": 4}, "`num_tokens` is not the first of `all_num_tokens`"),
        ({"all_responses": ["… Answer: 12"]}, "$.all_responses"),
        ({"all_correct": [True, False, 1]}, "$.all_correct[2]"),
        ({"all_finish_reasons": ["stop", "stop", "eos"]}, "$.all_finish_reasons[2]"),
    ],
)
def test_lists_of_several_answers_belong_together(keys, named):
    with pytest.raises(UserError) as error:
        decode(Answer, "u1", changed(Answer, **FIRST, **SEVERAL) | keys, "f.json")
    assert named in str(error.value)


def test_a_null_consistency_is_written_and_an_absent_one_is_null():
    record = decode(Pair, "u1", changed(Pair, consistency=None), "f.json")
    assert encode(record)["consistency"] is None
    absent = {key: v for key, v in LAYOUTS[Pair].items() if key != "consistency"}
    assert decode(Pair, "u1", absent, "f.json") == record


def test_rewards_of_a_judge_have_parts_texts_and_preferences_but_no_log_probabilities():
    plain = {key: v for key, v in LAYOUTS[Rewards].items() if key not in ("score", "ref_score")}
    judged = {
        "parts": {"judge": [[4.0, 3.0, None], None]},
        "texts": {"judge": ["Score: 4", None]},
        "preferences": [[None, 0.9], [0.1, None]],
        "logprob": [-3.5, None],
        "source_prompt": [USER],
    }
    record = decode(Rewards, "u1", plain | judged, "f.json")
    assert record.score is None and encode(record) == {"uuid": "u1", **plain, **judged}


@given(st.lists(st.sampled_from("sua"), max_size=6).map("".join))
def test_turns_alternate_after_an_optional_system_message(roles):
    names = {"s": "system", "u": "user", "a": "assistant"}
    messages = [{"role": names[role], "content": "x"} for role in roles]
    for kind, pattern in ((Conversation, "s?(ua)+"), (Prompt, "s?(ua)*u")):
        if re.fullmatch(pattern, roles):
            assert len(decode(kind, "u", messages, "f").messages) == len(roles)
        else:
            with pytest.raises(UserError):
                decode(kind, "u", messages, "f")


@pytest.mark.parametrize(
    "kind, value, named",
    [
        (Prompt, [{"role": "robot", "content": "x"}], "robot"),
        (Prompt, [{"role": "user"}], "content"),
        (Prompt, [{"role": "user", "content": " \n"}], "empty"),
        (Prompt, [], "user turn"),
        (Prompt, "text", "object"),
        (Conversation, {"messages": [USER, {"role": "assistant", "content": 5}]}, "$.messages[1].content"),
        (Samples, changed(Samples, responses="one"), "$.responses"),
        (Samples, changed(Samples, prompt=[USER, RIGHT]), "already has its response"),
        (Samples, changed(Samples, finish_reason=["stop"]), "`finish_reason` has 1 entries for 2"),
        (Samples, changed(Samples, finish_reason=["stop", "eos"]), "$.finish_reason[1]"),
        (Rewards, changed(Rewards, prompt=[USER, RIGHT]), "already has its response"),
        (Rewards, changed(Rewards, reward=[1.0]), "`reward` has 1 entries for 2"),
        (Rewards, changed(Rewards, reward=[1.0, "high"]), "$.reward[1]"),
        (Rewards, changed(Rewards, response=[[USER, RIGHT], [USER]]), "response 1"),
        (Rewards, changed(Rewards, response=[[USER, RIGHT], [{**USER, "content": "Other?"}, WRONG]]), "response 1"),
        (Rewards, changed(Rewards, response=[[USER, RIGHT], []]), "response 1"),
        (Pair, changed(Pair, rejected=[{**USER, "content": "Other?"}, WRONG]), "`rejected`"),
        (Pair, changed(Pair, consistency=1.5), "1.5"),
        (Rewards, changed(Rewards, parts={"judge": [4.0]}), "`parts.judge` has another number of entries"),
        (Rewards, changed(Rewards, texts={"judge": ["4"]}), "`texts.judge` has another number of entries"),
        (Rewards, changed(Rewards, parts={"judge": [4.0, "high"]}), "$.parts[...][1]"),
        (Rewards, changed(Rewards, preferences=[[None, 0.5]]), "`preferences` has 1 entries for 2"),
        (Rewards, changed(Rewards, preferences=[[None, 0.5], [0.5, 0.5]]), "null on its diagonal"),
        (Rewards, changed(Rewards, source_prompt=[RIGHT]), "turn 0"),
        (Item, {"question": "2 + 3?"}, "label"),
        (Item, None, "null"),
        (Question, changed(Item, label="Z"), "label 'Z' is none of its options A, B"),
    ],
)
def test_an_error_names_file_record_and_place(kind, value, named):
    with pytest.raises(UserError) as error:
        decode(kind, "gsm8k-12", value, "data/f.json")
    for part in ("data/f.json", "gsm8k-12", named):
        assert part in str(error.value)


@pytest.mark.parametrize("value", [3, None, "x", {}, [], [3], {"messages": 5}, {"responses": []}])
def test_foreign_values_have_no_layout(value):
    assert kind_of(value) is None


def test_an_evaluations_answers_are_graded_already():
    """Those of other code may ask in forms that are not known here."""
    assert decode(Answer, "u", changed(Answer, question="Which?\n(a) x\n(b) y", label="a"), "f").label == "a"


def test_answers_are_the_last_turns():
    assert decode(Rewards, "u", LAYOUTS[Rewards], "f").responses() == [RIGHT["content"], WRONG["content"]]
    assert decode(Prompt, "u", [USER], "f").messages == [Message("user", USER["content"])]


@pytest.mark.parametrize(
    ("kind", "keys", "named"),
    [
        (Ratings, {"messages": [USER]}, "ends without an assistant's turn"),
        (Ratings, {"ratings": {"helpsteer-helpfulness": None}}, "`ratings` has no number"),
        (Ratings, {"ratings": {}}, "`ratings` has no number"),
        (Steps, {"prompt": [USER, RIGHT]}, "a prompt ends with a user's turn"),
        (Steps, {"steps": [], "labels": []}, "$.steps"),
        (Steps, {"steps": ["3*4=12.", " \n"]}, "$.steps[1]"),
        (Steps, {"labels": [1.0]}, "`labels` has 1 entries for 2 in `steps`"),
        (Steps, {"labels": [None, None]}, "no step has a label"),
        (Steps, {"labels": [1.0, -1.0]}, "$.labels[1]"),
    ],
)
def test_ratings_and_steps_that_hold_nothing_to_learn_from_are_refused(kind, keys, named):
    with pytest.raises(UserError, match=re.escape(named)):
        decode(kind, "u1", changed(kind, **keys), "f.json")
