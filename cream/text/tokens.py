"""Token ids with their loss mask: the spans of tokens that are scored or trained on."""

from array import array
from dataclasses import dataclass

import xxhash


@dataclass(slots=True, frozen=True)
class Tokens:
    """Ids of a rendered conversation and, as the loss mask, per assistant turn the half-open span [start, end) of its
    response tokens; all other tokens are masked.

    >>> Tokens(ids=[1, 7, 8, 9, 2], spans=[(3, 5)])  # BOS, two prompt tokens, one response token, end of turn
    """

    ids: list[int]
    spans: list[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_response_tokens(self) -> int:
        """How many tokens are scored or trained on."""
        return sum(end - start for start, end in self.spans)

    def digest(self) -> str:
        """16 hex digits of xxh3-64 over ids and spans: equal for equal tokens with equal spans."""
        flat = array("q", [*self.ids, -1, *(end for span in self.spans for end in span)])
        return xxhash.xxh3_64_hexdigest(flat.tobytes())

    def predicted(self) -> list[int]:
        """Indices of the tokens that are scored or trained on, without the first one, which nothing predicts."""
        return [t for start, end in self.spans for t in range(max(start, 1), end)]


def describe_length(limit: int) -> str:
    """The reason to drop a row with too many tokens."""
    return f"longer than {limit} tokens"


def show_spans(tokenizer, tokens: Tokens) -> str:
    """The tokens as text, the scored ones between ⟦ and ⟧."""
    parts, at = [], 0
    for start, end in tokens.spans:
        scored = tokenizer.decode(tokens.ids[start:end])
        parts += [tokenizer.decode(tokens.ids[at:start]), "⟦", scored, "⟧"]
        at = end
    return "".join(parts) + f"\n({len(tokens)} tokens, {tokens.num_response_tokens} of them scored)"
