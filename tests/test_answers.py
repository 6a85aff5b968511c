"""Answer extraction against hand-written vectors and real solutions whose correctness was graded by others."""

import json
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cream.evaluation.answers import (
    extract_choice,
    extract_choice_strict,
    extract_number,
    extract_number_strict,
    numbers_equal,
)

SOLUTIONS = Path(__file__).parents[1] / "../shared/data/prm/orm_gsm8k_solutions.jsonl"

GASES = {"A": "oxygen", "B": "neon", "C": "helium", "D": "argon"}
FIVE = GASES | {"E": "krypton"}
DIGITS = {"1": "a solid", "2": "a liquid", "3": "a gas", "4": "a plasma"}
CELLS = {"A": "an animal cell", "B": "a plant cell", "C": "none of the above"}
TINY = {"A": "Tom", "B": "Mary", "C": "same"}

# (text, released rule, wanted): the released CREAM code's behaviour was recorded by running it
RELEASED_NUMBERS = [
    ("Answer: x = 3 + 4 = 7", "3", "7"),
    ("Answer: 5 (not 6). Answer: 6", "5", "6"),
    ("Answer: $1,234.50", "1234.5", "1234.5"),
    ("Answer: 2/3", "2", "0.667"),
    ("It costs 1e3", "3", "1000"),
]
RELEASED_CHOICES = [
    ("Answer: (B) because it is a good option", GASES, "A", "B"),
    ("Answer: **B**", GASES, "B", "B"),
    ("Answer: option B", GASES, "B", "B"),
    ("Answer: A or B? Final Answer: C", GASES, "A", "C"),
    ("Answer: E", FIVE, None, "E"),
    ("Answer: 3", DIGITS, None, "3"),
]

NUMBERS = [
    # markers
    ("Answer: 12", "12"),
    ("answer:12", "12"),
    ("ANSWER: 12", "12"),
    ("**Answer:** 12", "12"),
    ("**Answer**: 12", "12"),
    ('{"answer": 12}', "12"),
    ("3 * 4 = 12\n#### 12", "12"),
    ("The answer is 12.", "12"),
    ("So the answer is: 12 apples", "12"),
    ("The answer would be 12", "12"),
    ("### Final Answer\n\n12", "12"),
    ("Final answer: 12", "12"),
    ("The final answer is $\\boxed{540}$. I hope it is correct.", "540"),
    ("\\boxed{x = 7} as 3 + 4 is what we add", "7"),
    ("\\[ \\boxed{\\text{18}} \\]", "18"),
    ("\\boxed{3 \\times 10^{2}} and 5", "300"),
    ("\\boxed{12", "12"),
    ("Answer:\n\n12", "12"),
    # the last marker wins; a marker that leads nowhere passes to the one before; none at all is no answer
    ("Answer: 5. Wait, that is wrong. Answer: 6", "6"),
    ("Answer: 12. I hope this answer is helpful.", "12"),
    ("Answer: 5? No, it is 6.", "6"),
    ("So 12 is my final answer.", "12"),
    ("3 + 4 is 7. Answer:", None),
    ("There are 3 cats. Answer: it cannot be known", None),
    # what the clause is
    ("Answer: 12 apples. Tom is 5 years old.", "12"),
    ("Answer: 12 apples\nTom is 5 years old", "12"),
    ("Answer: 18 dollars for 7 days", "18"),
    ("Answer: 12 (3 boxes of 4)", "12"),
    ("Answer: 12 because there are 3 boxes of 4", "12"),
    ("Answer: 5, not 6", "5"),
    ("Answer: (12)", "12"),
    ("Answer: 3 + 4 = 7 apples for 2 boys", "7"),
    ("Answer: 3 apples and 4 pears makes 7", "7"),
    ("Answer: Mr. Smith has 12 apples.", "12"),
    ("The answer is as follows:\n3 + 4 = 7", "7"),
    ("Answer: In 5 years Tom will be 12", "12"),
    ("Answer: 25 cm^2", "25"),
    ("Answer: 25 cm2 of H2O", "25"),
    # how numbers are written
    ("Answer: 18.00", "18"),
    ("Answer: 18.50 dollars", "18.5"),
    ("Answer: .5", "0.5"),
    ("Answer: 007", "7"),
    ("Answer: -0.0", "0"),
    ("Answer: 1,234,567", "1234567"),
    ("Answer: $5", "5"),
    ("Answer: -$5", "-5"),
    ("Answer: $-5", "-5"),
    ("Answer: −5", "-5"),
    ("Answer: \\$1{,}234", "1234"),
    ("Answer: $1\\,234$", "1234"),
    ("Answer: 50%", "50"),
    ("Answer: 1e3", "1000"),
    ("Answer: 1.5E-2", "0.015"),
    ("Answer: 1.5 x 10^3", "1500"),
    ("Answer: $2 \\times 10^{4}$", "20000"),
    ("Answer: 3/4", "0.75"),
    ("Answer: 1/16", "0.0625"),
    ("Answer: -2/3", "-0.667"),
    ("Answer: 2 1/2 cups", "2.5"),
    ("Answer: \\frac{3}{4}", "0.75"),
    ("Answer: $\\boxed{\\dfrac{2}{3}}$", "0.667"),
    ("Answer: 18/20 = 0.9", "0.9"),
    ("Answer: 5/0", None),
    ("Answer: 123456789012345678901234567890.10", "123456789012345678901234567890.1"),
    # no marker: the last number
    ("He pays 3 and then 4, that makes 7 dollars.", "7"),
    ("5-3", "3"),
    ("the pairs (1,2)", "2"),
    ("A: 3,000", "3000"),
    ("no numbers here", None),
    ("", None),
]

CHOICES = [
    # the label in its many dresses
    ("Answer: B", GASES, "B"),
    ("answer: b", GASES, "B"),
    ("Answer: B.", GASES, "B"),
    ("Answer: (b)", GASES, "B"),
    ("Answer: [B]", GASES, "B"),
    ("Answer: 'B'", GASES, "B"),
    ("Answer: _B_", GASES, "B"),
    ("Answer: B) neon", GASES, "B"),
    ("Answer: B. neon. A is too reactive.", GASES, "B"),
    ("Answer: B neon", GASES, "B"),
    ("Answer: B: neon", GASES, "B"),
    ("**Answer:** (B)", GASES, "B"),
    ("The correct answer is (B).", GASES, "B"),
    ("The answer is option b", GASES, "B"),
    ("Answer: The correct option is B because A reacts", GASES, "B"),
    ("The final answer is $\\boxed{B}$", GASES, "B"),
    ("The final answer is $\\boxed{\\text{(B)}}$", GASES, "B"),
    ("#### B", GASES, "B"),
    ('{"answer": "B"}', GASES, "B"),
    ("Answer: A", GASES, "A"),
    ("Answer: A.", GASES, "A"),
    ("Answer: A because it burns", GASES, "A"),
    ("Answer: A is correct", GASES, "A"),
    ("5 > 3. Answer: A", TINY, "A"),
    ("Answer: A Tom", TINY, "A"),
    ("Answer : C", TINY, "C"),
    # digits
    ("Answer: (3) a gas", DIGITS, "3"),
    ("Answer: 3. a gas", DIGITS, "3"),
    ("Answer: option 3", DIGITS, "3"),
    ("Answer: 1.5 litres", DIGITS, None),
    ("Answer: it holds 3 litres", DIGITS, None),
    # only the item's own options
    ("Answer: E", GASES, None),
    ("Answer: D", TINY, None),
    ("Answer: 1", GASES, None),
    # the option's text
    ("Answer: oxygen", GASES, "A"),
    ("Answer: Oxygen, because neon is inert.", GASES, "A"),
    ("Answer: the gas is oxygen.", GASES, "A"),
    ("Answer: A plant cell", CELLS, "B"),
    ("Answer: same", TINY, "C"),
    ("Answer: none of the above", CELLS, "C"),
    ("Answer: either oxygen or neon", GASES, None),
    ("Answer: Mt. Kea. Lake Como is no mountain.", {"A": "Lake Como", "B": "Mt. Kea"}, "B"),
    ("Answer: B and D", {"A": "B and D", "B": "fur", "C": "fat", "D": "ears"}, "A"),
    ("Answer: Al_{2}O_{3}", {"A": "Al_{2}O", "B": "Al_{2}O_{3}"}, "B"),
    ("Answer: -2", {"A": "+2", "B": "-2"}, "B"),
    ("(B) 0°C", {"A": "100°C", "B": "0°C", "C": "32°C"}, "B"),
    ("Answer: it must be neither of both", {"A": "oxygen", "B": "neither of both"}, "B"),
    # the article, the contraction, the denied
    ("Answer: a good question", GASES, None),
    ("Answer: A good conductor, so D", GASES, "D"),
    ("Answer: I'd say B", GASES, "B"),
    ("Answer: not A but B", GASES, "B"),
    ("Answer: It isn't (A), it is (B)", GASES, "B"),
    ("Answer: B, not A", GASES, "B"),
    # hedging and refusing
    ("Answer: A or B", GASES, None),
    ("Answer: A and B", GASES, None),
    ("Answer: A/B", GASES, None),
    ("Answer: A, B", GASES, None),
    ("Answer: (A) or (B)", GASES, None),
    ("Answer: none of the options", GASES, None),
    ("(A) is a gas. Answer: none of these", GASES, None),
    ("Answer: neither A nor B", GASES, None),
    ("Answer: A or B? I think C.", GASES, "C"),
    ("Answer: B, none of the others fit", GASES, "B"),
    # several markers
    ("Answer: A. Wait, no. Answer: B", GASES, "B"),
    ("Answer: B. I hope this answer is helpful.", GASES, "B"),
    ("Answer:", GASES, None),
    ("The answer is clear from the passage. So (B).", GASES, "B"),
    # no marker
    ("B", GASES, "B"),
    ("(B)", GASES, "B"),
    ("b)", GASES, "B"),
    ("A", GASES, "A"),
    ("Oxygen burns, so (A) is out. I choose D.", GASES, "D"),
    ("So it is B. (D) is wrong.", GASES, "B"),
    ("I pick B because a noble gas is inert", GASES, "B"),
    ("A noble gas does not react.", GASES, None),
    ("Vitamin-C and D-day", GASES, None),
    ("It is neon.", GASES, "B"),
    ("None of the options fits.", GASES, None),
    ("I do not know.", GASES, None),
    ("", GASES, None),
]


@pytest.mark.parametrize(("text", "released", "wanted"), RELEASED_NUMBERS)
def test_numbers_of_the_released_code(text, released, wanted):
    assert extract_number_strict(text) == released
    assert extract_number(text) == wanted


@pytest.mark.parametrize(("text", "options", "released", "wanted"), RELEASED_CHOICES)
def test_choices_of_the_released_code(text, options, released, wanted):
    assert extract_choice_strict(text) == released
    assert extract_choice(text, options) == wanted


@pytest.mark.parametrize(("text", "wanted"), NUMBERS)
def test_number(text, wanted):
    assert extract_number(text) == wanted


@pytest.mark.parametrize(("text", "options", "wanted"), CHOICES)
def test_choice(text, options, wanted):
    assert extract_choice(text, options) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("#### 5\nAnswer: 6", "5"),  # `####` is tried before "answer:", wherever they stand
        ("### Step 1\nAnswer: 6", "1"),
        ("Answer: none, then answer: 1,0", "10"),  # commas go whatever they separate
        ("The answer is 18.00 and 3", "18"),
        ("7 is it. Answer: unknown", None),
        ("5 apples - 3 = 2", "2"),
        ("nothing", None),
    ],
)
def test_strict_number(text, wanted):
    assert extract_number_strict(text) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("answer: c.", "C"), ("Answer: A. Answer: B", "A"), ("(B), a fact", "A"), ("Answer:\nD", "D"), ("none", None)],
)
def test_strict_choice(text, wanted):
    assert extract_choice_strict(text) == wanted


def test_numbers_equal_as_decimals():
    assert numbers_equal("18.00", "18") and numbers_equal("1,080", "1080") and numbers_equal("-0", "0")
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


@given(st.text(alphabet=st.sampled_from("AaBb12(). ,/-$\\{}#*^\n:?xe=") | st.characters(), max_size=80))
def test_any_text_gives_a_plain_decimal_or_an_own_option_or_nothing(text):
    for prefix in ("", "Answer: "):
        number = extract_number(prefix + text)
        assert number is None or format(Decimal(number), "f") == number
        assert extract_choice(prefix + text, GASES) in {None, *GASES}
        assert extract_choice(prefix + text, DIGITS) in {None, *DIGITS}


@pytest.mark.skipif(not SOLUTIONS.exists(), reason="the GSM8K solutions are not here")
def test_agreement_with_the_graded_gsm8k_solutions():
    rows = [json.loads(line) for line in SOLUTIONS.read_text().splitlines()]
    answers = [(extract_number(row["solution"]), row) for row in rows]
    agree = sum((a is not None and numbers_equal(a, row["gold"])) == row["is_correct"] for a, row in answers)
    assert len(rows) > 1000 and agree / len(rows) >= 0.995
