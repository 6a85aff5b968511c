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
from collections.abc import Callable, Iterator
from itertools import chain, pairwise

from cream.evaluation.mentions import HEAD, hedge, mentions, opening_option, option_texts, refuses
from cream.evaluation.numbers import NUMBER, numbers_equal, numbers_in, plain_text, value_of

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
    return first_answer(plain_text(text), _number)


def _number(text: str) -> str | None:
    if not MARKER.search(text):
        return next(reversed(numbers_in(_without_last_questions(text)) or numbers_in(text)), None)
    return next((number for clause in _clauses(text) if (number := _result(clause))), None)


def extract_choice(text: str, options: dict[str, str]) -> str | None:
    """The label, one of `options` (label -> option text, not empty), that `text` answers with; None when with none.

    An answer may be the label, the option's text, or both. One that hedges ("A or B") or refuses ("none of the
    options") gives none. Without a marker: the last label that the text names and does not deny; then its last
    sentence's option text.
    """
    text, options = plain_text(text), {label: plain_text(option) for label, option in options.items()}
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
        if numbers := numbers_in(part):
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
        if NUMBERS_LISTED.fullmatch(clause) and len({*numbers_in(clause)} & {*values.values()}) > 1:
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
    values = {label: value_of(number) for label, number in numbers.items() if number}
    return values if len(values) == len(options) and None not in values.values() else {}
