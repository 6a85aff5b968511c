"""Is a text like one of many others? ROUGE-L (Lin, "ROUGE", ACL 2004 workshop), by rouge-score, of few pairs only.

F = 2 L / (m + n), with L the longest common subsequence of two lists of m and n tokens. It has at most as many tokens
as the lists have in common, c, each counted as often as both have it: so F <= 2 c / (m + n). An inverted index gives c
for all others at once, and F is computed only where that bound is above the limit.
"""

from array import array
from collections import Counter
from collections.abc import Iterable
from functools import cache

import numpy as np

ROUNDING = 1e-9  # by which the bound may be below F


def rouge_l(first: str, second: str) -> float:
    """ROUGE-L F of two texts in [0, 1], without stemming; 0 for a text without a letter from a to z or a digit."""
    return _scorer().score(first, second)["rougeL"].fmeasure


class Similar:
    """Texts, and which of them another one is like: those with a ROUGE-L above `limit`."""

    def __init__(self, limit: float, texts: Iterable[str] = ()):
        self.limit, self.texts = limit, []
        self._lengths = array("i")
        self._index: dict[str, tuple[array, array]] = {}  # token -> the texts that have it, and how often each does
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        """One more text."""
        tokens = _tokens(text)
        for token, count in Counter(tokens).items():
            places, counts = self._index.setdefault(token, (array("i"), array("i")))
            places.append(len(self.texts))
            counts.append(count)
        self._lengths.append(len(tokens))
        self.texts.append(text)

    def find(self, text: str) -> str | None:
        """One of the texts that this one is like; None if there is none."""
        bounds = self._bounds(_tokens(text))
        likely = np.flatnonzero(bounds > self.limit - ROUNDING)
        ordered = likely[np.argsort(-bounds[likely], kind="stable")]  # the first is the likeliest
        return next((self.texts[i] for i in ordered if rouge_l(self.texts[i], text) > self.limit), None)

    def _bounds(self, tokens: list[str]) -> np.ndarray:
        """Per text an upper bound of its ROUGE-L with these tokens."""
        common = np.zeros(len(self.texts), dtype=np.int32)
        for token, count in Counter(tokens).items():
            if token in self._index:
                places, counts = (np.frombuffer(each, dtype=np.int32) for each in self._index[token])
                common[places] += np.minimum(counts, count)
        return 2 * common / np.maximum(np.asarray(self._lengths) + len(tokens), 1)


@cache
def _scorer():
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False)


def _tokens(text: str) -> list[str]:
    """As the scorer takes them: runs of a to z and digits, in lower case."""
    from rouge_score.tokenize import tokenize

    return tokenize(text, None)
