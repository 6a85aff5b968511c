"""Answer extraction against hand-written vectors and real solutions whose correctness was graded by others."""

import json
import re
import unicodedata
from decimal import Decimal
from fractions import Fraction

import pytest
from hard_answers import (
    CHOICES,
    COUNTS,
    DIGITS,
    GASES,
    LATEX,
    MANY_OPTIONS,
    MARKS,
    NUMBERS,
    RUN_ON,
    THOUGHTS,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from cream.evaluation import numbers
from cream.evaluation.answers import (
    extract_choice,
    extract_choice_strict,
    extract_number,
    extract_number_strict,
)
from cream.evaluation.formulas import extract_formula
from cream.evaluation.grade import options_of
from cream.evaluation.numbers import numbers_equal
from cream.text.thoughts import split_thought


def released_number(text: str) -> str | None:
    """The released rule for numbers, from its description: an oracle for the strict mode."""
    text, parts, which = text.strip().lower(), [], 0
    for marker in ("####", "###", "answer:", "answer is"):
        if not parts and marker in text:
            parts = text.split(marker)[1:]
    if not parts:
        parts, which = [text], -1
    for part in parts:
        if numbers := re.findall(r"-?[\d]+(?:\.[\d]*)?", part.replace(",", "")):
            value = float(numbers[which])
            return f"{value:.0f}" if value.is_integer() and value else str(value) if value else "0"
    return None


def released_choice(text: str) -> str | None:
    """That for multiple choice: the letter right after the first "answer:" that has one, else the last of any."""
    text = text.strip().lower()
    for marker in re.finditer(r"\banswer:\s*", text, re.IGNORECASE):
        letter, behind = text[marker.end() :][:1], text[marker.end() :][1:2]
        if letter in set("abcd") and not re.match(r"\w", behind):
            return letter.upper()
    words = [word for word in re.split(r"\W+", text) if word in set("abcd")]
    return words[-1].upper() if words else None


@pytest.mark.parametrize(("text", "released", "wanted"), NUMBERS)
def test_number(text, released, wanted):
    assert extract_number(text) == wanted
    assert extract_number_strict(text) == released_number(text) == released


@pytest.mark.parametrize(("text", "options", "released", "wanted"), CHOICES)
def test_choice(text, options, released, wanted):
    assert extract_choice(text, options) == wanted
    assert extract_choice_strict(text) == released_choice(text) == released


@pytest.mark.parametrize(("text", "options", "wanted"), [*THOUGHTS, *MARKS, *LATEX, *RUN_ON, *MANY_OPTIONS])
def test_the_final_text_is_read_up_to_what_is_added(text, options, wanted):
    final = split_thought(text).final
    assert (extract_choice(final, options) if options else extract_number(final)) == wanted


def test_the_table_holds_what_the_released_rule_misreads():
    vectors = [*NUMBERS, *CHOICES]
    misread = sum(released != wanted for *_, released, wanted in vectors)
    print(f"{len(vectors)} hard cases ({len(NUMBERS)} numbers): the released rule misreads {misread}")
    assert len(vectors) == len({str(vector) for vector in vectors}) >= 150 and misread >= 100


MARKERS = ("####", "###", "Answer:", "answer: ", "answer is", "answers", "none", "\n", ". ", ", ", "(", ")", "İ")
PARTS = (*MARKERS, "12", "-3.50", "1,234", "0.00001", "1" * 400, "9" * 20, "٣", "A", "b", "(C)", "d.", "E", "x", "_")
texts = st.lists(st.sampled_from(PARTS) | st.text(max_size=3), max_size=12).map("".join)


@settings(max_examples=500)
@given(texts)
def test_strict_is_the_released_rule_on_any_text(text):
    assert extract_number_strict(text) == released_number(text)
    assert extract_choice_strict(text) == released_choice(text)


def test_numbers_equal_as_decimals():
    assert (
        numbers_equal("18.00", "18")
        and numbers_equal("1,080", "1080")
        and numbers_equal("1080", "1,080")
        and numbers_equal("-0", "0")
    )
    assert not numbers_equal("0.1", "0.10000000000000000001")


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**12), max_value=10**12))
def test_a_written_number_is_found_whatever_its_dress(value):
    for text in (f"Answer: {value}", f"so we have 99.\n#### {value:,}", f"\\boxed{{{value}}}", f"it costs ${value}"):
        assert Decimal(extract_number(text)) == value


@given(st.integers(-(10**9), 10**9), st.integers(1, 10**6))
def test_a_fraction_is_exact_or_rounded_to_three_places(numerator, denominator):
    found = Fraction(extract_number(f"Answer: {numerator}/{denominator}"))
    error = abs(found - Fraction(numerator, denominator))
    assert error <= Fraction(1, 2000)
    if set(_prime_factors(Fraction(numerator, denominator).denominator)) <= {2, 5}:
        assert error == 0


def _prime_factors(n: int) -> list[int]:
    factors, p = [], 2
    while n > 1:
        while n % p == 0:
            factors.append(p)
            n //= p
        p += 1
    return factors


@given(st.text(alphabet=st.sampled_from("AaBb12(). ,/-$\\{}#*^\n:?xe=½²⁻٣_'–\u00a0") | st.characters(), max_size=80))
def test_any_text_gives_a_plain_decimal_or_an_own_option_or_nothing(text):
    for prefix in ("", "Answer: "):
        number = extract_number(prefix + text)
        assert number is None or format(Decimal(number), "f") == number
        assert extract_choice(prefix + text, GASES) in {None, *GASES}
        assert extract_choice(prefix + text, DIGITS) in {None, *DIGITS}
        assert extract_choice(prefix + text, COUNTS) in {None, *COUNTS}


LOOPS = r"A |A or |not A |B, |Answer: |{|\boxed{|\text{|(|1|1,|12 |1/|10^|? |_|²|.|..., |.5, |4,  |4 ; ".split("|")


LOOPS += [
    "Is it 4? ",
    "<answer>",
    "<answer>1</answer>",
    "Q: x\n",
    "Question: x\n",
    "user\n\n",
    "</s>",
    "<think>",
    "</think>",
]
LOOPS += ["\n\nHow much will it be then? ", "\n\nAnswer: x\nQuestion:\n", "$x$ "]
LOOPS += [" ", "\t", "\n", " \n", "question ", "Human: x\n", "\\(", "\\[", "\\boxed", "$"]


@pytest.mark.slow
@pytest.mark.parametrize("loop", LOOPS)
def test_a_model_that_repeats_itself_is_read_in_linear_time(loop):
    """As far as a test can show that without a clock: what grows with the square would take minutes here."""
    for opening, end in (("", ""), ("Answer: ", ""), ("Answer: ", " and so on"), ("- " * 5_000, "")):
        text = opening + loop * (20_000 // len(loop)) + end
        assert extract_choice(text, GASES) in {None, *GASES}
        assert extract_choice(text, COUNTS) in {None, *COUNTS}
        extract_number(text)
        extract_formula(text)
        split_thought(text)


def test_agreement_with_the_graded_gsm8k_solutions(shared):
    rows = [json.loads(line) for line in open(shared / "data/prm/orm_gsm8k_solutions.jsonl")]
    found = {}
    for row in rows:
        answer = extract_number(row["solution"])
        if (answer is not None and numbers_equal(answer, row["gold"])) != row["is_correct"]:
            found[row["id"]] = (answer, row["gold"])
    right = sum(row["is_correct"] for row in rows)
    print(f"{len(rows) - len(found)} of {len(rows)} grades agree ({right} are right); the others: {found or 'none'}")
    assert len(rows) == 1280 and found == {}


@pytest.mark.slow
def test_the_options_texts_of_real_items(shared):
    """Given, each is read as its option; denied, never; beside a denied one it still is; in a list it is no answer."""
    files = sorted((shared / "data/eval_cream_layout").glob("*/test.json"))
    items = [(options_of(item["question"]), item["label"]) for file in files for item in json.loads(file.read_text())]
    items = [(options, label) for options, label in items if label in options]
    denied, taken = 0, []
    for options, label in items:
        texts = {key: text.rstrip(".") for key, text in options.items()}
        for form in ("Answer: {}", "The answer is {}."):
            assert extract_choice(form.format(texts[label]), options) == label
        for key in options.keys() - {label}:
            assert extract_choice(f"Answer: not {options[key]}", options) != key
            assert extract_choice(f"Answer: It is {texts[label]}, not {texts[key]}.", options) == label
            denied += 1
            for form in ("{0}, {1}", "{2}) {0}, {3}) {1}"):
                text = form.format(texts[label], texts[key], label, key)
                taken += [text] if extract_choice(f"Answer: {text}", options) else []
    print(f"{len(items)} items, all read as given; {denied} options denied, none of them taken; of lists, {len(taken)}")
    assert len(items) == 1517 and denied == 4050
    assert taken == ["accomplished, accomplished"]  # an item with two options of one text


@given(st.text(alphabet=st.sampled_from("0123459 .,:'’_-+/\\{}*`^<>$%½²⁄\u202fＡxetfrac()\n"), max_size=30))
def test_usual_texts_are_plain_already(text):
    """What is returned at once is what all of the patterns leave."""
    plain = text
    for pattern, replacement in numbers.DIGITS:
        plain = pattern.sub(replacement, plain)
    plain = unicodedata.normalize("NFKC", plain)
    for pattern, replacement in numbers.MARKUP:
        plain = pattern.sub(replacement, plain)
    assert numbers.plain_text(text) == plain
