"""Near-duplicates and contamination: how many runs of 13 words a text shares with others. Pure functions.

A text's words are its runs of letters and digits in lower case, and signs that change a question (3 + 4 is not 3 * 4,
C# is not C); other punctuation and white space do not count. Its grams are its runs of N = 13 words. A shorter text has
one gram, all its words, which it shares only with texts of the same words.

- contaminated: at least one gram occurs in a test question (Brown et al., "Language Models are Few-Shot Learners",
  arXiv 2005.14165, appendix C: N between 8 and 13 by the test set, 13 where training data is filtered).
- near-duplicate: at least NEAR = 1/2 of its grams occur in earlier texts that were kept. One changed word in the middle
  of a 40-word text leaves 15 of 28 grams; two texts with a common beginning share less.
"""

import re
from collections.abc import Container, Iterable, Iterator, Set

import xxhash

from cream.records import Conversation, Item, Prompt, Record

N = 13
NEAR = 0.5
WORD = re.compile(r"[^\W_]+|[+*/=<>%^#]|-(?=[\s]*\d)")
CONTAMINATED = f"shares {N} words in a row with a test question"
EQUAL = "the same words as an earlier one"
SIMILAR = f"near-duplicate: at least half of its runs of {N} words occur in earlier ones"


def prompt_text(record: Record) -> str:
    """What a record asks: its question with its options, or the user's turns of its prompt."""
    if isinstance(record, Item):
        return record.question
    messages = record.messages if isinstance(record, Conversation | Prompt) else record.prompt
    return "\n".join(message.content for message in messages if message.role == "user")


def words(text: str) -> list[str]:
    """The words of a text; if it has none (an emoji, say), the text itself."""
    return WORD.findall(text.lower()) or [text.strip()]


def whole(text: str) -> int:
    """xxh3-64 hash of all words of a text."""
    return _hash(words(text))


def grams(text: str, n: int = N) -> set[int]:
    """xxh3-64 hashes of the runs of n words of a text, or of all its words if it has fewer."""
    listed = words(text)
    return {_hash(listed[i : i + n]) for i in range(max(1, len(listed) - n + 1))}


def share(own: Set[int], others: Set[int]) -> float:
    """|own ∩ others| / |own|, in [0, 1]: Broder's containment ("On the resemblance and containment of documents", 1997)
    of a text in all others together. `own` is not empty."""
    return len(own & others) / len(own)


def first_shared(text: str, others: Container[int]) -> tuple[int, str] | None:
    """The first gram of a text that is in `others`: its hash and its words; None if there is none."""
    listed = words(text)
    runs = (listed[i : i + N] for i in range(max(1, len(listed) - N + 1)))
    return next(((own, " ".join(run)) for run in runs if (own := _hash(run)) in others), None)


def sift(texts: Iterable[str], tests: Set[int]) -> Iterator[str | None]:
    """For each text, in order, the reason to skip it, or None: it is kept, and later ones are compared with it.

    `tests`: grams of the test questions. EQUAL takes precedence over SIMILAR.
    """
    texts_seen: set[int] = set()
    grams_seen: set[int] = set()
    for text in texts:
        own, every = grams(text), whole(text)
        if own & tests:
            yield CONTAMINATED
        elif every in texts_seen:
            yield EQUAL
        elif share(own, grams_seen) >= NEAR:
            yield SIMILAR
        else:
            texts_seen.add(every)
            grams_seen |= own
            yield None


def _hash(run: list[str]) -> int:
    return xxhash.xxh3_64_intdigest(" ".join(run).encode(errors="surrogatepass"))
