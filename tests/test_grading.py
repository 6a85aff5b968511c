"""Answers into graded records and back: the vote, the lists, and grading again."""

import pytest

from cream.engines import Completion
from cream.evaluation.few_shot import build_prompt
from cream.evaluation.generation import changes, fill_missing, grade_responses, regrade, strict_accuracies
from cream.evaluation.grade import DEFAULT, Rules
from cream.evaluation.statistics import table_rows
from cream.records import Answer, Item, Prompt, encode

STRICT = Rules(strict=True)
ITEM = Item(uuid="q", question="Tom has 3 bags of 4 apples. How many?", label="12", task="gsm8k", extra={"level": 2})
ASKED = Prompt(uuid="q", messages=build_prompt(ITEM, "task"))


def completion(text, reason="stop"):
    return Completion(text, list(range(len(text.split()))), reason, -1.0)


TEXTS = ["Answer: 7", "Answer: 12.00", "I do not know", "Answer: 12"]


def test_one_answer_has_no_lists():
    row = encode(grade_responses(ITEM, ASKED, [completion("3 * 4 = 12. Answer: 12")], DEFAULT))
    assert row == {
        "uuid": "q",
        "question": ASKED.messages[-1].content,
        "label": "12",
        "task": "gsm8k",
        "responses": "3 * 4 = 12. Answer: 12",
        "final_prediction": "12",
        "correct": True,
        "finish_reason": "stop",
        "num_tokens": 7,
        "level": 2,
    }


def test_several_answers_vote():
    answer = grade_responses(
        ITEM, ASKED, [completion(text) for text in TEXTS[:3]] + [completion(TEXTS[3], "length")], DEFAULT
    )
    assert (answer.responses, answer.num_tokens, answer.finish_reason) == ("Answer: 7", 2, "stop")
    assert answer.all_responses == TEXTS
    assert answer.all_predictions == ["7", "12", "none", "12"]
    assert answer.all_correct == [False, True, False, True]
    assert (answer.final_prediction, answer.correct) == ("12", True)
    assert answer.all_finish_reasons == ["stop", "stop", "stop", "length"] and answer.all_num_tokens == [2, 2, 4, 2]
    assert regrade(answer, DEFAULT) == answer


def test_the_vote_is_as_right_as_the_spelling_that_stands_for_it():
    """Strict rules compare texts: "1,061" is no "1061", whatever its number."""
    item = Item(uuid="q", question=ITEM.question, label="1,061", task="gsm8k")
    texts = ["Answer: 1061", "Answer: 1061"]
    loose, strict = (grade_responses(item, ASKED, [completion(t) for t in texts], rules) for rules in (DEFAULT, STRICT))
    assert (loose.final_prediction, loose.correct) == ("1061", True)
    assert (strict.final_prediction, strict.correct, strict.all_correct) == ("1061", False, [False, False])


def test_no_answer_is_wrong_and_says_why():
    answer = grade_responses(ITEM, ASKED, [], DEFAULT)
    assert (answer.responses, answer.final_prediction, answer.correct) == ("", "none", False)
    assert (answer.finish_reason, answer.num_tokens, answer.all_responses) == (None, None, None)
    assert answer.extra == {"level": 2, "reason": "the prompt does not fit"}


def test_missing_records_are_filled_the_gaps_in_order():
    items = {u: Item(uuid=u, question="2 + 3?", label="5", task="sum") for u in "abcd"}
    prompts = {u: Prompt(uuid=u, messages=build_prompt(item, "none")) for u, item in items.items()}
    rows = (encode(grade_responses(items[u], prompts[u], [completion("Answer: 5")], DEFAULT)) for u in "bd")
    made = list(fill_missing(rows, prompts, items, DEFAULT))
    assert [(row["uuid"], row["correct"]) for row in made] == [("a", False), ("b", True), ("c", False), ("d", True)]
    assert [row.get("reason") for row in made] == ["the prompt does not fit", None] * 2


def test_grading_again_tells_what_changed():
    old = Answer(uuid="q", question="2 + 3?", label="5", responses="Answer: 5", final_prediction="none", correct=False)
    new = regrade(old, DEFAULT)
    assert (new.final_prediction, new.correct) == ("5", True)
    assert changes([old, new], [new, new]) == ["q: none -> 5 (label 5)"]
    assert table_rows([new], task="mine")[0]["task"] == "mine"  # the method's files have no task


def test_released_rules_grade_every_answer():
    """First number of the answer clause, compared as text."""
    texts = ["Answer: 3 * 4 = 12", "Answer: 12", "Answer: 12"]
    answer = grade_responses(ITEM, ASKED, [completion(text) for text in texts], DEFAULT)
    assert answer.all_correct == [True] * 3 and regrade(answer, STRICT).all_correct == [False, True, True]
    assert strict_accuracies([answer]) == {"gsm8k": 1.0}
    assert strict_accuracies([grade_responses(ITEM, ASKED, [completion(texts[0])], DEFAULT)]) == {"gsm8k": 0.0}


@pytest.mark.parametrize("strict", [False, True])
def test_a_file_of_the_released_code_is_graded_again(strict):
    released = Answer(uuid="q", question="2 + 3?", label="5", responses="Answer: 5", final_prediction="5", correct=True)
    assert regrade(released, Rules(strict)) == released
