"""Answers into graded records and back: the vote, the lists, and grading again."""

import re
import string

import pytest
from msgspec import structs

from cream.engines import Completion
from cream.errors import UserError
from cream.evaluation.few_shot import build_prompt
from cream.evaluation.generation import changes, fill_missing, grade_responses, regrade, strict_accuracies
from cream.evaluation.grade import DEFAULT, Rules, options_of, strip_labels
from cream.evaluation.numbers import label_number
from cream.evaluation.statistics import format_table, table_rows
from cream.evaluation.tasks import grade
from cream.records import Answer, Item, Prompt, decode, encode

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


def test_the_rule_for_all_items_is_not_kept_in_their_records():
    """Graded by math-verify and then by its task, a record is what it was; an item's own grader stays."""
    for own in (None, "math"):
        item = Item(uuid="q", question="2 + 3?", label="5", grader=own)
        rules = Rules(grader="math")
        asked = grade_responses(item, ASKED, [completion("Answer: $4 + 1$")], rules)
        assert (asked.grader, asked.correct) == (own, True)
        task = regrade(asked, DEFAULT)
        assert (task.grader, task.final_prediction) == (own, asked.final_prediction if own else "1")
        assert regrade(task, rules) == asked
    formula = grade_responses(structs.replace(ITEM, label=r"\sqrt{2}"), ASKED, [completion(r"\boxed{\sqrt2}")], rules)
    assert (formula.correct, strict_accuracies([formula], "math")) == (True, {"gsm8k": 0.0})


# Labels ---------------------------------------------------------------------------------------------------------------

ONE_NUMBER = {
    "1234": ("1,234", "1'234", r"1{,}234", r"1\,234", r"1,\!234", r"1\;234", r"1\text{,}234", r"\num{1234}", "$1234$"),
    "0.75": (r"\frac{3}{4}", r"\frac34", r"\dfrac{3}{4}", r"{3 \over 4}", "3/4", "¾", ".75", r"\boxed{0.75}"),
    "-1.5": ("-1.50", "−1.5", r"-\frac{3}{2}", r"-1\frac{1}{2}", "-$1.50"),
    "5": (
        "5.",
        "+5",
        "5 cm",
        "5cm^2",
        r"5\text{ cm}",
        r"5\,\mathrm{m/s}^2",
        "5 square feet",
        "5 km/h",
        "€5",
        r"5^\circ",
    ),
    "50": (r"50\%", "50 %", "50 percent", "50°", r"\text{50}"),
    "300000": (r"3 \times 10^5", "3e5", r"3 \cdot 10^{5}", r"3\times10^{5}", r"3\cdot10^5", "3x10^5"),
    "7": ("7 months", "7 men", "7 psi", "7 pm", "7 US dollars", "7 GBP", "7 kWh", "7 TVs", "7 lbs", "7 cups of tea")
    + ("7 paths", "7 mph", "7 days per week", "7 sq ft", "7 teeth", "7 canteens", "7 tons", "7 eggs", "7 km", "7 yrs"),
}
NOT_ONE = r"""2\sqrt{3}; x^2+1; 3:4; 3, 5, 7; 6 - 5i; (-\infty, 5]; (2,3); 10:30; 2x; 2\pi; 5 or 6; 2^3; 5!; x = 5
2 million; 3 dozen; 5-7; 2023-05-01; 0.\overline{3}; \frac{\pi}{2}; \frac{1}{2}x; 1,23; H2O; 3 + 4
\{1\}; 5 \pm 2; 1 2; 7th; 1/0
2 xy; 3 ab; 2 xyz; 2 abc; 3\cdot xy; 2 theta; 2 mu; 5 sixths; 1 eighth; 2 fifteenths; 7 twentieths; 3 hundredths
5 quintillion; 3 thousands; 3 lakh; 2 crores; 2 gross; 5 bn; 5 below zero; 5 ten; 4 cot"""
NOT_ONE = re.split(r"; |\n", NOT_ONE)


def test_a_label_is_a_number_only_as_a_whole():
    for number, spellings in ONE_NUMBER.items():
        assert {spelling: label_number(spelling) for spelling in spellings} == dict.fromkeys(spellings, number)
    assert {label: label_number(label) for label in NOT_ONE} == dict.fromkeys(NOT_ONE)
    for label in NOT_ONE:
        with pytest.raises(UserError, match="is not a number.*--grader math"):
            grade("How much?", label, "Answer: 5")


EQUAL = [  # label, response, whether it is right
    (r"2\sqrt{3}", r"The answer is $\boxed{2\sqrt{3}}$.", True),
    (r"2\sqrt{3}", r"$\boxed{\sqrt{12}}$", True),
    (r"2\sqrt{3}", "Answer: 3", False),
    ("x^2+1", "Answer: $1 + x^2$", True),
    ("x^2+1", "Answer: 1", False),
    ("3:4", "Answer: 3:4", True),
    ("3:4", "Answer: 4", False),
    ("3, 5, 7", "Answer: 7, 3, 5", True),
    ("3, 5, 7", "Answer: 7", False),
    ("6 - 5i", "So it is \\(6 - 5i\\).", True),
    (r"(-\infty, 5]", r"\boxed{(-\infty, 5]}", True),
    (r"(-\infty, 5]", r"\boxed{(-\infty, 5)}", False),
    (r"\frac{\pi}{2}", "<answer>$\\pi/2$</answer>", True),
    (r"\text{Evelyn}", r"\boxed{\text{Evelyn}}", True),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", True),
    ("12", r"\boxed{11} is wrong, \boxed{12} right", True),  # math-verify would join them to a set
    ("{11, 12}", r"\boxed{11}, \boxed{12}", False),
    ("12", "<think>\\boxed{12}</think>I cannot say.", False),
    ("12", "\\boxed{12}\n\nUser: and 4 more?\nAssistant: \\boxed{16}", True),
    (r"50\%", "Answer: 50", True),  # as math-verify has it
    ("12", "", False),
    # a number in words, as without math-verify
    ("18", "The answer is **18**.", True),
    ("18", "Answer: __18__", True),
    ("18", "Answer: 18 apples.", True),
    ("18", "The answer is 18 dollars.", True),
    ("18", "So he has 18 apples.", True),
    ("18", "He pays $20 and gets $2 back, so 18 in all", True),
    ("18", "Answer: 17 apples.", False),
    (r"5\text{ apples}", "5 apples", True),
    (".5", "Answer: **.5**", True),
    # displayed, marked up
    (r"2\sqrt{3}", "Answer:\n\\[\n2\\sqrt{3}\n\\]", True),
    (r"2\sqrt{3}", "The final answer is:\n$$\n2\\sqrt{3}\n$$\nI hope it helps.", True),
    (r"2\sqrt{3}", "**Final Answer:**\n\n\\[ 2\\sqrt{3} \\]", True),
    (r"2\sqrt{3}", r"Answer: `2\sqrt{3}`.", True),
    (r"2\sqrt{3}", r"Answer: x = $2\sqrt{3}$, which costs $5 for \$3.", True),
    (r"2\sqrt{3}", r"Answer: $2\sqrt{3}$. I hope the final answer is correct.", True),
    # truncated in a box
    ("18", r"Therefore it is \boxed", False),
    ("18", "Therefore it is \\boxed \n", False),
    ("18", r"$\boxed{18}$, again \boxed", True),
    ("18", r"$\boxed{18}$, again \boxed{", True),
    ("18", r"$\boxed 18$", True),
    (r"2\sqrt{3}", r"<answer>\boxed</answer>", False),
]


@pytest.mark.parametrize(("label", "response", "right"), EQUAL)
def test_formulas_by_math_verify(label, response, right):
    assert grade("What is it?", label, response, grader="math")[1] == right


def test_what_math_verify_does_not_read_is_refused():
    for label in ("Paris", "the first one", r"\frac{1}{", ""):
        with pytest.raises(UserError, match="not a formula"):
            grade("What is it?", label, "", grader="math")
    assert grade(LETTERED, "B", "Answer: Ann", grader="math") == ("b", True)  # multiple choice stays what it is


# Options --------------------------------------------------------------------------------------------------------------

LETTERED = "Who was it?\nA. (A) Tom\nB. (B) Ann\nC. (C) Max"


@pytest.mark.parametrize(
    ("texts", "bare"),
    [
        (["A)60", "B)75"], ["60", "75"]),
        (["(A)4", "(B)5", "(C)6"], ["4", "5", "6"]),
        (["A. Tom", "B. Ann"], ["Tom", "Ann"]),
        (["a) Tom", "b) Ann"], ["Tom", "Ann"]),
        (["1) red", "2) blue"], ["red", "blue"]),
        (["A: Tom", "B: Ann"], ["Tom", "Ann"]),
        ([f"{letter}) {i}" for i, letter in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZ")], [str(i) for i in range(26)]),
        (["1.5", "2.5"], None),
        (["1:2", "2:3"], None),
        (["A. Lincoln", "G. Washington"], None),
        (["B) Tom", "A) Ann"], None),
        (["A) Tom", "Ann"], None),
        (["A)", "B)"], None),
        (["A", "B"], None),
    ],
)
def test_options_lose_their_own_labels(texts, bare):
    found, labels = strip_labels(texts)
    assert found == (bare or texts) and (labels is None) == (bare is None)
    question = "\n".join(["Which?", *(f"{chr(65 + i)}. {text}" for i, text in enumerate(texts))])
    assert [*options_of(question).values()] == (bare or texts)


def test_twenty_six_options_in_lines():
    for labels in (string.ascii_uppercase, [str(i) for i in range(1, 27)]):
        for form in ("{}. x{}", "{}) x{}", "({})x{}"):
            question = "\n".join(["Which?", *(form.format(label, label) for label in labels)])
            assert options_of(question) == {label: f"x{label}" for label in labels}
            assert grade(question, labels[25], f"Answer: {labels[25]}") == (labels[25].lower(), True)


# Thoughts -------------------------------------------------------------------------------------------------------------


def test_lengths_of_thought_and_final_text():
    texts = ["<think> 3 or 4? </think> Answer: 12", "<think> the answer is 12", "Answer: 12"]
    completions = [completion(texts[0]), completion(texts[1], "length"), completion(texts[2])]
    count = {texts[0]: 4, texts[1]: 5}

    def tokens(ids, text):
        return count.get(text)

    answer = grade_responses(ITEM, ASKED, completions, DEFAULT, count=tokens)
    assert answer.all_predictions == ["12", "none", "12"]
    assert (answer.thought_tokens, answer.all_thought_tokens) == (4, [4, 5, None])
    (row,) = table_rows([answer])
    assert row["mean_thought_tokens"] == 3 and row["mean_final_tokens"] == pytest.approx(5 / 3)
    assert row["in_thought_rate"] == pytest.approx(1 / 3) and "of thought" in format_table([row])
    alone = grade_responses(ITEM, ASKED, completions[:1], DEFAULT, count=tokens)
    plain = grade_responses(ITEM, ASKED, completions[2:], DEFAULT, count=tokens)
    assert alone.all_thought_tokens is None and plain.thought_tokens is None
    assert (
        table_rows([alone, plain])[0]["mean_thought_tokens"] == 2
        and "mean_thought_tokens" not in table_rows([plain])[0]
    )


def test_a_response_that_begins_within_its_thought():
    """The template opened it: without a closing tag nothing is answered, here and when the file is graded again."""
    cut = grade_responses(ITEM, ASKED, [completion("The answer is 12", "length")], DEFAULT, opened=True)
    assert (cut.final_prediction, cut.thought_opened) == ("none", True)
    assert regrade(decode(Answer, "q", encode(cut), "f"), DEFAULT) == cut
    assert regrade(cut, Rules(tags=())).final_prediction == "12"
    assert regrade(cut, STRICT).final_prediction == "12"  # the released code knows no thoughts
    closed = grade_responses(ITEM, ASKED, [completion("7?</think>12")], DEFAULT, opened=True)
    assert closed.final_prediction == "12"


def test_labels_of_other_types_are_graded_apart():
    """The number 18 and the text "18.0" are equal to 18.0, and no response is right for all three by strict rules."""
    labels, text = [18, 18.0, "18", "18.0", 18], "#### 18"
    assert [grade("How many?", label, text, strict=True)[1] for label in labels] == [True, False, True, False, True]
    assert all(grade("How many?", label, text)[1] for label in labels)
    assert not grade("A) 18 B) 19?", "B", text)[1] and grade("How many?", "18", text)[1]
