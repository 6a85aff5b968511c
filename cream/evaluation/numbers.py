"""Numbers in a text: digits and markup of many kinds made plain, what is one number, and its value.

A label is a number only as a whole (`label_number`); an answer's number is found within a sentence (`numbers_in`).
"""

import re
import unicodedata
from decimal import Decimal, Inexact, localcontext
from functools import lru_cache

# How digits are written elsewhere, before Unicode's compatibility forms (full width, no-break blanks) become plain. A
# comma is a decimal sign only after groups of three: "3,5" alone is two numbers.
DIGITS = [
    (
        re.compile(r"(?<![\d.,])\d{1,3}(?:[.'’\u2009\u202f\xa0 ]\d{3})+,\d{1,2}(?![\d,])"),  # 1.234,50 and 1 234,50
        lambda number: re.sub(r"[^\d,]", "", number[0]).replace(",", "."),
    ),
    (  # 1'234, 1{,}234, 1\,234, 1,\!234, 1\text{,}234
        re.compile(
            r"(?<=\d)(?:['’_\u2009\u202f\xa0]|(?:\\text)?\{,\}|\{\\,\}|,?\s?\\!|,?\\(?:[,:; ]|thinspace\s?))"
            r"(?=\d{3}(?!\d))"
        ),
        "",
    ),
    (re.compile("([⁺⁻]?[⁰¹²³⁴-⁹]+)"), r"^\1"),
    (re.compile("(?<=\\d)(?=[¼-¾⅐-⅞])"), " "),  # 2½
]
TEXT = r"\\(?:text(?:bf|rm|it|sf|normal)?|math(?:rm|bf|it|sf)|operatorname|mbox|underline)\b"
# LaTeX and markdown to plain text, in this order.
MARKUP = [
    (re.compile("⁄"), "/"),  # in ½
    (re.compile(r"\\[()\[\],;:! ]|\\(?:left|right|(?:display|text)style|q?quad)(?![A-Za-z])"), " "),
    (re.compile(r"\*\*|`+|(?<![^\W_])_+|_+(?![^\W_])"), " "),
    (re.compile(r"</answer>", re.IGNORECASE), "\n"),
    (re.compile(r"\\(?:times|cdot)(?![A-Za-z])"), "*"),
    (re.compile(r"\\(?:num|SI|qty)\s*\{([^{}]*)\}(?:\s*\{([^{}]*)\})?"), r"\1 \2"),
    (re.compile(rf"(?<=\d)\s*(?={TEXT}\s*\{{)"), " "),  # a unit
    *[(re.compile(rf"{TEXT}\s*\{{([^{{}}]*)\}}"), r"\1")] * 2,  # one within another
    (re.compile(r"(?<=\d)\s*(?=\\(?:[dtcs]|nice)?frac)"), " "),
    (re.compile(r"\\(?:[dtcs]|nice)?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))"), r"\1\2/\3\4"),
    (re.compile(r"\{\s*([-+]?\d+)\s*\\over\s*(\d+)\s*\}"), r"\1/\2"),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"\\f?box(?:ed)?\s*\{((?:[^{}]|\{[^{}]*\})*)\}"), r"\\boxed \1\n"),  # a box is a line of its own
    (re.compile(r"(\\[A-Za-z]+)(?=\d)"), r"\1 "),  # \approx5
    (re.compile(r"(?:(?<![\w.^])|(?<=\d[xX]))10\^\s*\{?\s*([-+−]?\d{1,2})(?!\d|\.\d)\}?"), r"1e\1"),
]
UNUSUAL = re.compile(r"[^\x00-\x7f]|[\\{_*`^<]|\d'|,\d")  # without any of these, no pattern above matches
NUMERAL = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)"
NUMBER = re.compile(
    rf"""
    (?P<sign>(?<![\w)\]%.^])[-−–](?=[$€£¥₹]?\.?\d))?  # a sign, not the minus of a difference
    [$€£¥₹]?
    (?<![\w^])(?<!\^[-−{{])(?<!\^\{{-)(?<!\d\.)      # not the 2 of H2O, x^2, x^-2 or version 1.2
    (?P<whole>\d+[ ]+(?=\d+/\d))?                 # the 2 of 2 1/2
    (?P<numeral>{NUMERAL})
    (?:(?:\s*[xX×*·⋅]\s*1)?[eE](?P<e>[-+−]?\d{{1,2}})(?!\w))?
    (?:\s*/\s*[$€£¥₹]?(?P<over>{NUMERAL}))?
    """,
    re.VERBOSE,
)
# What may follow the number of a label: a sign, a known unit, or words after a space, of which none is another number.
UNIT = re.compile(
    r"\s*(?:%|°[CF]?|\^\s*(?:\\circ|∘|°)\s*[CF]?|\\(?:circ|degrees?)\b|[€£¥₹])"
    r"|(?:[ckdm]?m|k?g|mg|[mc]?l|mL|min|s|hrs?|mph|km/h|m/s|ft|in|lbs?|oz)(?:\^-?\d)?"
    r"|(?:[\s/*·-]+(?:[^\W\d_]{2,}|[mgshL])\.?(?:\^-?\d)?){1,6}"
)
NO_UNIT = set(
    "or and to plus minus times over divided by if when is root squared cubed factorial mod infinity infty not but "
    "except more less than half halves quarter quarters third thirds lakh lakhs crore crores gross myriad googol sqrt "
    "sin cos tan cot csc sinh cosh tanh arcsin arccos arctan log exp lim alpha beta gamma delta epsilon zeta eta theta "
    "iota kappa lambda omicron rho sigma tau upsilon phi chi omega varphi vartheta".split()
)
LARGE = r"(?:thir|four|fif|six|seven|eigh|nine)teen|hundred|thousand|\w+illi(?:on|ard)"
TENS = "(?:twen|thir|for|fif|six|seven|eigh|nine)t"
NUMERAL_WORD = re.compile(
    rf"(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|{TENS}y|dozen|score|{LARGE})s?"
    rf"|(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|{TENS}ie|{LARGE})ths?"
)
# Words of two letters, and of three without a vowel, are products of variables unless they are known.
VARIABLES = re.compile(r"[a-z]{2}|[b-df-hj-np-tv-z]{3}|[abcxyz]{3}")
KNOWN = set(
    "mm cm dm km nm um kg mg ug lb oz ft in yd mi ml cl dl hr am pm kb mb gb tb hz kw mw kv mv ma pa kj ev db ha cc sq "
    "cu px pt qt rs kr us tv cd of on at an as so up mph kmh rpm bpm fps mpg kwh hrs yrs wks lbs kgs cms mms kms mls "
    "yds fts pts pcs tsp tbs sqm mhz ghz khz gbp chf jpy cny hkd dkk pln tvs cds dvd".split()
)


@lru_cache(1024)
def label_number(text: str) -> str | None:
    """The number that a label is, as `answers.extract_number` writes it; None unless all of the text is one number.

    "$1,234.50", "\\frac{3}{4}", "5\\text{ cm}", "72 square feet", "90^\\circ" and "50\\%" (50) are; not "2\\sqrt{3}",
    "3:4", "3, 5, 7", "x^2+1", "2 million".
    """
    text = re.sub(
        r"\\boxed(?![A-Za-z])|[{}]", "", plain_text(re.sub(r"^\$(.*)\$$", r"\1", text.strip(), flags=re.DOTALL))
    ).strip()
    number = NUMBER.match(text.removeprefix("+"))
    if number is None:
        return None
    unit = text.removeprefix("+")[number.end() :].rstrip(" .$")
    words = [word.casefold() for word in re.findall(r"[^\W\d_]+", unit)]
    return None if unit and not UNIT.fullmatch(unit) or any(map(_no_unit, words)) else value_of(number)


def _no_unit(word: str) -> bool:
    """Whether a word after a number makes it another number, or something that is none."""
    variables = VARIABLES.fullmatch(word) and word not in KNOWN
    return bool(variables or word in NO_UNIT or NUMERAL_WORD.fullmatch(word))


def numbers_equal(a: str, b: str) -> bool:
    """Whether two numbers, as `answers.extract_number` writes them, are equal as decimals: "18.00" equals "18".

    Raises decimal.InvalidOperation when one of them is not a number.
    """
    return Decimal(a.replace(",", "")) == Decimal(b.replace(",", ""))


def plain_text(text: str) -> str:
    """The text with digits as "1234.5", and without LaTeX and markdown."""
    if not UNUSUAL.search(text):
        return text
    for pattern, replacement in DIGITS:
        text = pattern.sub(replacement, text)
    text = unicodedata.normalize("NFKC", text)
    for pattern, replacement in MARKUP:
        text = pattern.sub(replacement, text)
    return text


def value_of(number: re.Match) -> str | None:
    """The plain decimal of a NUMBER match; None for a division by zero."""
    with localcontext(prec=len(number[0]) + 110) as context:  # room for every digit, and for an exponent of 99
        value = Decimal(f"{number['numeral'].replace(',', '')}e{(number['e'] or '0').replace('−', '-')}")
        if number["over"]:
            divisor = Decimal(number["over"].replace(",", ""))
            if not divisor:
                return None
            context.clear_flags()
            value /= divisor
            value = round(value, 3) if context.flags[Inexact] else value
        value += Decimal(number["whole"] or 0)
        digits = format(-value if number["sign"] else value, "f")
    return (digits.rstrip("0").rstrip(".") if "." in digits else digits) if value else "0"


def numbers_in(text: str) -> list[str]:
    """The numbers of a plain text, as plain decimals."""
    return [value for match in NUMBER.finditer(text) if (value := value_of(match)) is not None]
