"""Which of an item's options a sentence names, by their labels or by their texts, and which of those it denies."""

import re

VERB_OR_END = re.compile(
    r"\W*(?:$|(?:is|was|are|and|or|nor|but|because|since|as|so|for|which|not|seems|would|could|can|must|over|describes)\b)"
)
CALLED = re.compile(r"(?:[(\[]|\b(?:option|choice|letter)\s*[\"']?)$", re.IGNORECASE)
HEAD = re.compile(
    r"(?:\W|\b(?:so|therefore|thus|i|choose|pick|select|the|my|correct|best|right|option|choice|letter|number|answer|is|"
    r"would|must|be)\b)*$",
    re.IGNORECASE,
)
DENIED_BEFORE = re.compile(
    r"(?:\b(?:not|neither|nor|cannot)|n['’]t)\s+(?:be\s+)?(?:option\s+)?(?:[(\[]?\w[)\]]?\s+n?or\s+)?[(\[]?$",
    re.IGNORECASE,
)
DENIED_AFTER = re.compile(r"[)\]]?\s+(?:is|was)(?:n['’]t|\s+(?:wrong|incorrect|false|not))\b", re.IGNORECASE)
# The same around an option's text, in words as `words_of` gives them, where "isn't" is "isn t ".
JOINT = r"(?:and / )?(?:or|and|nor|/|&) (?:an? |the )?"
TEXT_DENIED_BEFORE = re.compile(
    r"(?:\b(?:not|neither|nor|cannot|rather than|instead of)|n t) (?:be )?"
    r"(?:(?:either|option|the|an|\w) ){0,2}$"  # a letter: "not (B) neon"
)
TEXT_DENIED_AFTER = re.compile(
    r"(?:(?:is|was|are|were) (?:wrong|incorrect|false)|can(?:not| t) be"
    r"|(?:is|was|are|were)(?:n t| not) (?:correct|right|it|(?:the|an) (?:\w+ )?answer)) "
)
ARTICLE = re.compile(r"^(?:an?|the)\s+(?=\S)", re.IGNORECASE)
# After a list, within its sentence: "B, A and C are wrong"; but not in "A, C, since B is not a metal".
LIST_DENIED = (
    r"(?:(?!\b(?:because|since|as|while|but|so|they|which|that|this|others|rest)\b)(?:\([^()]{0,80}\)|[^.;!?(])){0,80}"
    r"\b(?:(?:is|are|was|were)(?:n['’]t|\s+(?:(?:all|both|also)\s+)?(?:wrong|incorrect|false|not))"
    r"|cannot|can['’]t|don['’]t)\b"
)
OPEN = r"[(\[\"'“‘]?"
CLOSED = r"[)\]}%?!\"'’”]*\s*"
PRONOUN = re.compile(r",?\s+(?!(?:is|or|and|because|since|not)\b)[a-z]", re.IGNORECASE)  # after "I", but for the label
WHOLE = r"(?![\w%-]|['’]\w|\.\w|/\d)"  # a label, not the letter that opens a word: "e.g.", "i.e.", "for"
REFUSAL = re.compile(
    r"\bnone\b(?!\s+of\s+the\s+others?\b)|\bneither\b(?!.{1,200}\bbut\b)"
    r"|\bno\s+(?:correct\s+|right\s+|valid\s+)?(?:option|answer|choice)|\bcannot\s+be\s+(?:determined|known)|\bnot\s+enough\b",
    re.IGNORECASE,
)


def mentions(sentence: str, options: dict[str, str]) -> list[tuple[int, str]]:
    """(position, label) of each label that `sentence` names and does not deny, in order.

    Any case, letters and digits: in brackets, before ")", after "option", before the option's own text, or opening
    the sentence with nothing, punctuation or a verb behind it. A bare capital counts anywhere, but "A" before any other
    word is the article, and "I" the pronoun.
    """
    by_folded = {label.casefold(): label for label in options}
    any_label = "|".join(map(re.escape, options))
    texts = {label: words_of(text) for label, text in options.items()}
    named = []
    stand_alone = rf"(?<![\w.°-])(?<!\w['’])(?<!\$(?=\d))(?:{any_label})(?![\w%-]|['’]\w|\.\d|/\d)"
    lettered = [
        re.escape(text)
        for _, text in _longest_first(options)
        if " " in text.strip() and re.search(stand_alone, text, re.IGNORECASE)
    ]  # in "a plant cell", "carbon [C]" no label is named
    blank = re.compile("|".join(lettered) or "(?!)", re.IGNORECASE)
    for match in re.finditer(stand_alone, blank.sub(lambda text: "_" * len(text[0]), sentence), re.IGNORECASE):
        label = by_folded[match[0].casefold()]
        before = sentence[max(0, match.start() - 60) : match.start()]  # windows keep "A A A …" linear
        after = sentence[match.end() : match.end() + 300]
        with_text = _opens(after, texts[label])
        if DENIED_BEFORE.search(before) or DENIED_AFTER.match(after):
            continue
        if with_text and TEXT_DENIED_AFTER.match(words_of(after)[len(texts[label]) :]):  # "A) oxygen is wrong"
            continue
        verb_or_end = VERB_OR_END.match(after)
        if label == "I" and not with_text and PRONOUN.match(after):
            continue
        if (
            (match[0].isupper() and (label != "A" or verb_or_end or re.match(r"\s*[^\w\s]", after)))
            or re.match(r"[)\]]", after)
            or CALLED.search(before)
            or (HEAD.match(before) and (verb_or_end or (label.isalpha() and re.match(r"[.:,;]", after))))
            or with_text
        ):
            named.append((match.start(), label))
    return named


def hedge(sentence: str, end: int, label: str, options: dict[str, str], numbers: bool = False) -> re.Match | None:
    """What joins the option whose label or text ends at `end` to another one, up to that one's end at least.

    "A or B", "A) oxygen, B) neon", "oxygen, neon (B)". After a comma alone the other one must end the list or be
    followed by a third: in "oxygen, neon is inert" nothing is joined. Nor is it in "oxygen, a gas", which says what
    oxygen is, where "gas" is an option: an article must be the option's own, unless the first has one as well. Nor by
    what explains an option: "D, 6 and 6" where all are `numbers`, "C, oxygen and carbon", "all of these, oxygen, neon".
    """
    labels = "|".join(re.escape(key) for key in options if key != label) or "(?!)"
    article, own = r"(?:an?\s|the\s)?", ARTICLE.sub("", options[label])
    others = [text for key, text in _longest_first(options) if key != label and words_of(text)]
    bare = [ARTICLE.sub("", text) for text in others]
    both = re.compile(  # "A) oxygen", "oxygen (A)": the option's label and its text
        rf"[)\].:,]*\s*[(\[]?{_any_of([own], article)}|{CLOSED}[(\[]{re.escape(label)}", re.IGNORECASE
    ).match(sentence, end)
    labelled = sentence[:end].endswith(label) and not own.endswith(label) and not both
    has_one = re.compile(rf"\W{{0,9}}(?:an?|the)\s{{1,9}}{re.escape(own)}", re.IGNORECASE).fullmatch(sentence, 0, end)
    other = _any_of(bare, article)
    listed = other if has_one else _any_of([] if numbers else [*others, *bare])
    last = r"(?=\W*$)" if labelled else ""
    comma = "(?!)" if re.match(r"(?:all|both)\s+of\b", own, re.IGNORECASE) else ","
    pattern = rf"""
        {CLOSED}
        (?: (?: / | & | (?:,\s*)? (?:and\s*/\s*)? or\b | and\b ) \s*
            (?: (?:option\s+)? (?: {OPEN} (?-i:{labels}) \b | [(\[] (?:{labels}) [)\]] ) | {OPEN} {other} )
          | {comma} \s* (?: and\s | &\s* )?
            (?: (?:option\s+)? {OPEN} (?:{labels}) {WHOLE} (?: [)\].:,]* \s* [(\[]? {other} )?
              | {OPEN} (?: {other} \s* [(\[] (?:{labels}) | {listed} {last} ) )
            {CLOSED} (?: [.;!?] | $ | (?: [,/&] | or\b | and\b ) (?!{LIST_DENIED}) )
        )"""
    return re.compile(pattern, re.IGNORECASE | re.VERBOSE).match(sentence, both.end() if both else end)


def _any_of(texts: list[str], before: str = "") -> str:
    """A pattern of any of these texts, whole, after another pattern."""
    return rf"(?:{before}(?:{'|'.join(map(re.escape, texts)) or '(?!)'})(?!\w|[.,/]\d))"


def refuses(sentence: str, options: dict[str, str]) -> bool:
    """Whether it says that no option is right, other than by an option's own text ("neither of them")."""
    if not REFUSAL.search(sentence):
        return False
    said = f" {words_of(sentence)}"
    return not any(REFUSAL.search(text) and f" {words_of(text)}" in said for text in options.values())


def option_texts(sentence: str, options: dict[str, str]) -> list[tuple[int, set[str]]]:
    """(position in its words, labels) of the option texts in `sentence`, in order, but for denied ones.

    Texts that "or", "and" join are one entry, affirmed or denied together. Of texts that overlap, the first and then
    the longest counts.
    """
    by_words = {words_of(text): label for label, text in reversed(_longest_first(options))}
    any_text = "|".join(re.escape(own) for own in sorted(by_words, key=len, reverse=True) if own)
    words, found = words_of(sentence), []
    for match in re.finditer(rf"(?<!\S)(?:{any_text})", words) if any_text else ():
        label, (start, end) = by_words[match[0]], match.span()
        if found and re.fullmatch(JOINT, words[found[-1][1] : start]):
            start, _, joined = found.pop()
            found.append((start, end, joined | {label}))
        else:
            found.append((start, end, {label}))
    return [
        (start, joined)
        for start, end, joined in found
        if not TEXT_DENIED_BEFORE.search(words[max(0, start - 40) : start])
        and not TEXT_DENIED_AFTER.match(words[end : end + 40])
    ]


def opening_option(sentence: str, texts: list[tuple[int, set[str]]], options: dict[str, str]) -> str | None:
    """The option whose text opens a sentence, "" where it opens a list of several ("oxygen, neon"); None where no text
    does, or one that "or", "and" join to another. `texts`: of `option_texts`."""
    if not texts or texts[0][0] or len(texts[0][1]) > 1:
        return None
    (label,) = texts[0][1]
    words = r"\W{0,9}".join(map(re.escape, words_of(options[label]).split()))
    opening = re.match(rf"\W*(?:(?:an?|the)\s+)?{words}", sentence, re.IGNORECASE)
    return "" if opening and hedge(sentence, opening.end(), label, options) else label


def words_of(text: str) -> str:
    """Lower-case words and signed numbers, a blank after each, no article in front: "The Oxygen." is "oxygen "."""
    words = re.findall(r"(?:(?<!\w)[-+](?=\d))?\w+|[/&]", text.casefold().replace("−", "-"))
    return "".join(f"{word} " for word in (words[1:] if words[:1] in (["a"], ["an"], ["the"]) and words[1:] else words))


def _opens(text: str, words: str) -> bool:
    """Whether a text begins with these words, as `words_of` gives them."""
    return bool(words) and words.split(" ", 1)[0] in text.casefold() and words_of(text).startswith(words)


def _longest_first(options: dict[str, str]) -> list[tuple[str, str]]:
    return sorted(options.items(), key=lambda item: -len(item[1]))
