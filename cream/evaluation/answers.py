"""What a response gives as its final answer: a number, or the label of one of the question's options.

`extract_number` and `extract_choice` are the rules that evaluation uses. The `_strict` pair follows the released CREAM
code (evaluate.py, commit de1d04b) for comparison with published numbers; its known errors are part of it. Cases of
every kind, with what both give, are in tests/hard_answers.py.

The rule, for both kinds: the last final-answer marker wins (`####`, "answer:", "the answer is", "final answer",
\\boxed{}), and the answer is in the first sentence after it that gives one. If that text gives none, the marker before
it is asked, and so on; a response whose markers lead nowhere ("Answer: it cannot be known") stays unanswered. Only a
response without any marker is searched as a whole, from its end. Questions are read after all else. Text between
<answer> and </answer> comes before any other marker, and once an answer has been given, what a model adds as a new
question or turn of the user is not read.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator
from decimal import Decimal, Inexact, localcontext
from functools import lru_cache
from itertools import chain, pairwise

from cream.evaluation.mentions import HEAD, hedge, mentions, opening_option, option_texts, refuses

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
MARKER = re.compile(
    r"####|<answer>|\\boxed(?![A-Za-z])\s*\{?"
    r"|\b(?:final\s+)?answers?[\"']?\s*(?:[:：=]|(?:is|would\s+be|should\s+be|must\s+be)\b\s*:?)"
    r"|\bfinal\s+answer\b(?!\s*(?:[.!?,]|$))"
    r"|^[#\s]{0,9}answer[ \t]*$",
    re.IGNORECASE | re.MULTILINE,
)
# Those that stand at no intermediate result ("the answer to the first part is 40").
STRONG = re.compile(r"####|<answer>|\\boxed(?![A-Za-z])|\bfinal\s+answer\b", re.IGNORECASE)
ANSWER_MARKS = re.compile(r"<answer>\s*([^\n<]+)", re.IGNORECASE)
# What a model adds after its answer: the next turn of a user, in a chat format or in words, or a question of its own,
# under a heading or as a paragraph, unless it asks about the answer just given.
CHAT_TURN = re.compile(
    r"<\|(?:im_start|start_header_id|user|endoftext|eot_id|im_end|end|return)\|>|<end_of_turn>|</s>"
    r"|(?<=\S)(?:user|assistant)[ \t]*\n\n|^[ \t]*Q:",
    re.IGNORECASE | re.MULTILINE,
)
USER_TURN = re.compile(r"^[ \t]*+\W{0,4}(?:user|human)\b\W{0,4}(?::|$)(?P<asks>[^\n]*\?[ \t]*$)?", re.I | re.M)
REPLY = re.compile(r"^[ \t]*+\W{0,4}(?:assistant|model|A)\b\W{0,4}(?::|$)", re.IGNORECASE | re.MULTILINE)
ADDED = re.compile(
    r"^[ \t]*+[#*>-]{0,6}+[ \t]*+(?:(?:another|new|next)[ \t]+)?(?:question|problem|exercise|example|task|instruction)"
    r"[ \t]*+\#?\d{0,4}+[*_]{0,2}+[ \t]*+(?:[:：.]|$)"
    r"|\n[ \t]*\n(?![ \t]*\W{0,2}(?:wait|hmm+|but|hold|is|are|am|was|does|did|do|let|shall|should|so|or|really|right"
    r"|correct|why|can|could|would|however|actually|what[ \t]+if|how[ \t]+(?:do|can)|check|verify|ha(?:ve|s)|if)\b)"
    r"[^\n?]{20,600}\?[ \t]*(?=\n|\Z)",
    re.IGNORECASE | re.MULTILINE,
)
# A full stop ends a sentence after a digit or a word of two letters: not in "B. oxygen", not in "U.S. law".
SENTENCE_END = re.compile(r"(?:(?<=[!?;])|(?<=\d\.)|(?<=[^.\s]{2}\.))\s+|\n+")

WORD = re.compile(r"\w")
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
REMARK = re.compile(r"\([^()]*\)|\b(?:because|since|not|instead\s+of|rather\s+than)\b.*", re.IGNORECASE)
COMPUTES = re.compile(r"\d\s*[-−+*×÷x]\s*[$\d]|\b(?:is|makes?|gives?|equals?|totals?|leaves?)\b", re.IGNORECASE)

# Where all options are numbers: those that are denied, and "4 or 5".
A_NUMBER = r"(?<![\d.,/])[-−–]?[$€£¥₹]?\.?\d[\d.,/]{0,30}"
NUMBER_DENIED = re.compile(
    rf"(?:\b(?:not|neither|nor|cannot)|n['’]t)\s+(?:be\s+)?{A_NUMBER}(?:\s+n?or\s+{A_NUMBER})?"
    rf"|{A_NUMBER}%?\s+(?:is|was)(?:n['’]t|\s+(?:wrong|incorrect|false|not))\b",
    re.IGNORECASE,
)
NUMBERS_JOINED = re.compile(r"\d%?(?:\s*,)?\s*(?:\b(?:and\s*/\s*)?(?:or|and)\b|&)\s*\D?\.?\d", re.IGNORECASE)
A_VALUE = r"\d(?:[\d./]|,(?=\d))*+"
NUMBERS_LISTED = re.compile(rf"\W*+{A_VALUE}[)$]?(?:\s?%?\s?,\s+[-−–$€£¥₹(]?\.?{A_VALUE}[)$]?)+\W*")


def extract_number(text: str) -> str | None:
    """The number that `text` gives as its answer, as a plain decimal ("1,234.50" -> "1234.5"), None when it gives none.

    Fractions that have no finite decimal are rounded to three places ("2/3" -> "0.667"). Without a marker the answer is
    the last number of the text.
    """
    return first_answer(_plain(text), _number)


def _number(text: str) -> str | None:
    if not MARKER.search(text):
        return next(reversed(_numbers(_without_last_questions(text)) or _numbers(text)), None)
    return next((number for clause in _clauses(text) if (number := _result(clause))), None)


def extract_choice(text: str, options: dict[str, str]) -> str | None:
    """The label, one of `options` (label -> option text, not empty), that `text` answers with; None when with none.

    An answer may be the label, the option's text, or both. One that hedges ("A or B") or refuses ("none of the
    options") gives none. Without a marker: the last label that the text names and does not deny; then its last
    sentence's option text.
    """
    text, options = _plain(text), {label: _plain(option) for label, option in options.items()}
    options = {label: option.rstrip(" .") or option for label, option in options.items()}
    for label, option in options.items():  # "Mt. McKinley" is one sentence
        options[label] = re.sub(r"[.!?;](?=\s)", "", option)
        text = text.replace(option, options[label])
    return first_answer(text, lambda part: _option(part, options)) or None


def _option(text: str, options: dict[str, str]) -> str | None:
    """As `_choice`, of a whole text."""
    for clause in _clauses(text):
        if (choice := _choice(clause, options)) is not None:
            return choice
    if MARKER.search(text):
        return None
    sentences = [*filter(WORD.search, SENTENCE_END.split(_without_last_questions(text)))]
    for sentence in reversed(sentences):
        if named := mentions(sentence, options):
            last, label = named[-1]
            numbers = bool(_numeric(options))
            hedged = (hedge(sentence, at + len(other), other, options, numbers) for at, other in named[:-1])
            return "" if any(hedge and hedge.end() > last for hedge in hedged) else label
        if refuses(sentence, options):
            return ""
    return _text_choice(sentences[-1], options) if sentences else None


@lru_cache(1024)
def label_number(text: str) -> str | None:
    """The number that a label is, as `extract_number` writes it; None unless all of the text is one number.

    "$1,234.50", "\\frac{3}{4}", "5\\text{ cm}", "72 square feet", "90^\\circ" and "50\\%" (50) are; not "2\\sqrt{3}",
    "3:4", "3, 5, 7", "x^2+1", "2 million".
    """
    text = re.sub(
        r"\\boxed(?![A-Za-z])|[{}]", "", _plain(re.sub(r"^\$(.*)\$$", r"\1", text.strip(), flags=re.DOTALL))
    ).strip()
    number = NUMBER.match(text.removeprefix("+"))
    if number is None:
        return None
    unit = text.removeprefix("+")[number.end() :].rstrip(" .$")
    words = [word.casefold() for word in re.findall(r"[^\W\d_]+", unit)]
    return None if unit and not UNIT.fullmatch(unit) or any(map(_no_unit, words)) else _value(number)


def _no_unit(word: str) -> bool:
    """Whether a word after a number makes it another number, or something that is none."""
    variables = VARIABLES.fullmatch(word) and word not in KNOWN
    return bool(variables or word in NO_UNIT or NUMERAL_WORD.fullmatch(word))


def extract_number_strict(text: str) -> str | None:
    """The released rule: the first number after the first marker; without a marker the last number of the text.

    Markers are tried in the order `####`, `###`, "answer:", "answer is". No fractions, no exponents; a number passes
    through a float ("0.00001" -> "1e-05").
    """
    text = text.lower()
    marker = next((m for m in ("####", "###", "answer:", "answer is") if m in text), None)
    tail = text if marker is None else text.split(marker, 1)[1].replace(marker, "\n")
    numbers = re.findall(r"-?\d+\.?\d*", tail.replace(",", ""))
    if not numbers:
        return None
    value = float(numbers[-1 if marker is None else 0])
    return str(int(value) if value.is_integer() else value)


def extract_choice_strict(text: str) -> str | None:
    """The released rule: the first "answer:" before a letter A to D, else the last stand-alone A to D, in any case."""
    text = text.lower()
    if found := re.search(r"\banswer:\s*([a-d])\.?\b", text, re.IGNORECASE):
        return found[1].upper()
    return next((letter.upper() for letter in reversed(re.findall(r"\b[a-d]\b", text))), None)


def numbers_equal(a: str, b: str) -> bool:
    """Whether two numbers, as `extract_number` writes them, are equal as decimals: "18.00" equals "18".

    Raises decimal.InvalidOperation when one of them is not a number.
    """
    return Decimal(a.replace(",", "")) == Decimal(b.replace(",", ""))


def _plain(text: str) -> str:
    for pattern, replacement in DIGITS:
        text = pattern.sub(replacement, text)
    text = unicodedata.normalize("NFKC", text)
    for pattern, replacement in MARKUP:
        text = pattern.sub(replacement, text)
    return text


def first_answer(text: str, read: Callable[[str], str | None]) -> str | None:
    """What `read` makes of a text, or of the part that answers before the model adds a turn of the user, or a question
    of its own. Text between <answer> and </answer> is read before the rest of its part.

    A turn ends an answer without a marker as well; a question only one with a marker, and where any part has a STRONG
    one, only such a part.
    """
    text = _before_turn(text, read)
    starts = [0, *(match.start() for match in ADDED.finditer(text)), len(text)]
    marker = STRONG if STRONG.search(text) else MARKER
    parts = [text[a:b] for a, b in pairwise(starts) if marker.search(text, a, b)] if len(starts) > 2 else []
    for part in (*parts, text):
        marked = (f"Answer: {match}" for match in reversed(ANSWER_MARKS.findall(part)))
        for each in chain(marked, [part]):
            if (answer := read(each)) is not None:
                return answer
    return None


def _before_turn(text: str, read: Callable[[str], str | None]) -> str:
    """The text up to the first turn of the user after an answer.

    A line such as "Human: 2 legs" may belong to the response: where it asks nothing, and no reply follows, it is a turn
    only after a marker, and not if a STRONG one is still to come.
    """
    start = len(text) - len(text.lstrip()) + 1
    chat, spoken = CHAT_TURN.search(text, start), USER_TURN.search(text, start)
    if spoken and not spoken["asks"] and not REPLY.search(text, spoken.end()):
        given, to_come = STRONG.search(text, 0, spoken.start()), STRONG.search(text, spoken.end())
        if not given and (to_come or not MARKER.search(text, 0, spoken.start())):
            spoken = None
    end = min((turn.start() for turn in (chat, spoken) if turn), default=len(text))
    answered = MARKER.search(text, 0, end) or read(text[:end]) is not None
    return text[:end] if answered else text


def _without_last_questions(text: str) -> str:
    """The text without the questions that it ends with; as it is if there is nothing else."""
    end, first = len(text), WORD.search(text)
    for start in reversed([0, *(match.end() for match in SENTENCE_END.finditer(text))]):
        if WORD.search(text, start, end):
            if not text[start:end].rstrip(" *\n").endswith("?"):
                return text[:end]
            end = start
        if not first or start <= first.start():
            break
    return text


def _clauses(text: str) -> Iterator[str]:
    """Sentences after the last marker, then those from the one before up to it, and so on; questions after the rest,
    and in particular a marker within one ("Shall I say why the answer is not 48?")."""
    end, questions = len(text), []
    for marker in reversed(list(MARKER.finditer(text))):
        for sentence in filter(WORD.search, SENTENCE_END.split(text[marker.end() : end])):
            if sentence.rstrip().endswith("?"):
                questions.append(sentence)
            else:
                yield sentence
        end = marker.start()
    yield from questions


def _value(number: re.Match) -> str | None:
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


def _numbers(text: str) -> list[str]:
    return [value for match in NUMBER.finditer(text) if (value := _value(match)) is not None]


def _result(clause: str) -> str | None:
    """The number that an answer clause arrives at.

    It is after the last "=" ("5 = 2 + 3": before it) and outside remarks ("5 (not 6)", "12 because …"). A clause
    that opens with a number and computes nothing further means that number ("18 dollars for 7 days"); any other means
    its last.
    """
    plain = REMARK.sub(" ", clause)
    before, _, after = plain.rpartition("=")
    result = before if COMPUTES.search(after) and not COMPUTES.search(before) else after
    for part in (result, plain, clause):
        if numbers := _numbers(part):
            opens = not re.search(r"\w", part[: NUMBER.search(part).start()])
            return numbers[0 if opens and not COMPUTES.search(part) else -1]
    return None


def _choice(clause: str, options: dict[str, str]) -> str | None:
    """The label that an answer clause names; "" when it hedges or refuses, None when it speaks of no option."""
    named = mentions(clause, options)
    headed = bool(named) and HEAD.match(clause[: named[0][0]])
    numbers = bool(_numeric(options))
    opening = None if numbers else opening_option(clause, option_texts(clause, options), options)
    if opening is not None and not headed:
        return opening
    if not headed and refuses(clause, options):
        return ""
    if named:
        at, label = named[0]
        return "" if hedge(clause, at + len(label), label, options, numbers) else label
    return _text_choice(clause, options)


def _text_choice(clause: str, options: dict[str, str]) -> str | None:
    """The label whose text or, where all options are numbers, whose value a clause gives; as `_choice` does."""
    if values := _numeric(options):
        clause = NUMBER_DENIED.sub(" ", clause)
        joined = NUMBERS_JOINED.search(clause)
        if joined and ("or" in joined[0].lower() or not COMPUTES.search(clause)):
            return ""
        if NUMBERS_LISTED.fullmatch(clause) and len({*_numbers(clause)} & {*values.values()}) > 1:
            return ""
        result = _result(clause)
        equal = [label for label, value in values.items() if result and numbers_equal(result, value)]
        return equal[0] if len(equal) == 1 else None
    found = option_texts(clause, options)
    labels = set().union(*(labels for _, labels in found))
    return labels.pop() if len(labels) == 1 else opening_option(clause, found, options) or "" if labels else None


def _numeric(options: dict[str, str]) -> dict[str, str]:
    """Label -> value where every option's text is a number; else {}."""
    numbers = {label: NUMBER.fullmatch(text.rstrip(" .%")) for label, text in options.items()}
    values = {label: _value(number) for label, number in numbers.items() if number}
    return values if len(values) == len(options) and None not in values.values() else {}
