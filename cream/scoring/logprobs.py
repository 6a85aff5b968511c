"""Log-probabilities of the responses to many prompts, by one model: the worker of most passes."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from cream.cli import interrupts


@dataclass(slots=True)
class Group:
    """A prompt's answers. `complete` is false for an answer that was cut at the length limit; `sampled` may hold the
    sampler's own (log π, tokens) of each, None where its text does not give the sampled tokens back. `known`: what is
    kept of this prompt's answers under the model that scores, digest of an answer's tokens -> log π."""

    uuid: str
    prompt: list
    answers: list[str]
    complete: list[bool]
    sampled: list[tuple[float, int] | None] | None = None
    known: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class Scored:
    """What one pass found for a group: per answer log π in nats, summed, or None; scored tokens; why it has none."""

    logprob: list[float | None]
    num_tokens: list[int]
    reason: list[str | None]


@dataclass(slots=True)
class Found:
    """What a pass found for a group: `computed` has what is new of it, digest of an answer's tokens -> log π; `whence`
    counts the answers whose log π was computed, kept, or the sampler's."""

    scored: Scored
    computed: dict[str, float]
    whence: Counter[str]


class Scorer:
    """Scores groups by the model that `load` gives, which is called when the first answer is not `known` by its group.

    An answer that does not fit `limit` tokens is not cut: it gets no score, with the reason. `chunk` groups are
    computed together; what is known of them serves only where it leaves nothing to compute, so that the batches, and
    with them the rounding, never depend on what an earlier run has kept.
    """

    def __init__(self, load: Callable[[], Any], chat, *, limit: int, chunk: int):
        self.load, self.chat, self.limit, self.chunk = load, chat, limit, chunk
        self._loaded = None

    def __call__(self, groups: Iterable[Group]) -> Iterator[tuple[str, Found]]:
        """(uuid, what is found) of each group, in their order; equal answers to a prompt are computed once."""
        groups = iter(groups)
        while chunk := list(islice(groups, self.chunk)):
            if interrupts.asked():  # it may be cut short: a resumed run computes it whole
                return
            yield from zip([group.uuid for group in chunk], self._find(chunk), strict=True)

    def close(self) -> None:
        """Let the model go."""
        if self._loaded is not None:
            self._loaded.close()
        self._loaded = None

    def _find(self, groups: list[Group]) -> list[Found]:
        encoded = [encode(group, self.chat, self.limit) for group in groups]
        digests = [[row and row.digest() for row in rows] for rows, _ in encoded]
        tokens = [rows for rows, _ in encoded]
        taken, missing = _split(groups, digests, tokens)
        if any(missing):
            taken, missing = _split([replace(group, known={}) for group in groups], digests, tokens)
        found = []
        computed = self._compute(missing)
        for (rows, reasons), ids, (values, whence), new in zip(encoded, digests, taken, computed, strict=True):
            whence["computed"] += len(new)
            values |= new
            scored = _scored(rows, reasons, [values.get(digest) for digest in ids])
            found.append(Found(scored, {d: v for d, v in new.items() if math.isfinite(v)}, whence))
        return found

    def _compute(self, missing: list[dict]) -> list[dict[str, float]]:
        """digest -> log π of the missing rows of each group."""
        if not any(missing):
            return [{} for _ in missing]
        if self._loaded is None:  # a pass whose scores are all kept needs no model
            self._loaded = self.load()
        values = iter(self._loaded.score([list(m.values()) for m in missing if m]))
        return [dict(zip(m, next(values), strict=True)) if m else {} for m in missing]


def scorer(
    folder: Path, chat, dtype, limit: int, max_tokens: int | None, chunk: int, group: int, device: str
) -> Scorer:
    """What a pool makes for each of its replicas: a Scorer by the model in `folder`, which `group` devices of a kind
    hold together. `max_tokens` bounds a batch; None: what the memory carries."""

    def load():
        import torch

        from cream.scoring.team import Local, Team

        if group > 1:
            return Team(folder, dtype, device, max_tokens, group)
        return Local(folder, dtype, torch.device(device), max_tokens)

    return Scorer(load, chat, limit=limit, chunk=chunk)


def _split(groups: list[Group], digests: list[list], rows: list[list]) -> tuple[list, list[dict]]:
    """Per group what `_known` says, and digest -> tokens of the answers that it leaves to compute."""
    taken = [_known(*each) for each in zip(groups, digests, rows, strict=True)]
    return taken, [
        {digest: row for digest, row in zip(ids, own, strict=True) if row and digest not in values}
        for ids, own, (values, _) in zip(digests, rows, taken, strict=True)
    ]


def _known(group: Group, digests: list[str | None], rows: list) -> tuple[dict[str, float], Counter[str]]:
    """digest -> log π of the answers that need no pass, and where they come from."""
    found = {digest: group.known[digest] for digest in digests if digest in group.known}
    whence = Counter(kept=len(found))
    for digest, row, sampled in zip(digests, rows, group.sampled or [None] * len(rows), strict=True):
        if row and digest not in found and sampled and sampled[1] == row.num_answer_tokens:
            found[digest] = sampled[0]
            whence["sampler"] += 1
    return found, whence


def _scored(rows: list, reasons: list[str | None], values: list[float | None]) -> Scored:
    broken = [value is not None and not math.isfinite(value) for value in values]
    return Scored(
        [None if bad else value for value, bad in zip(values, broken, strict=True)],
        [0 if tokens is None else tokens.num_answer_tokens for tokens in rows],
        ["not a finite number" if bad else why for why, bad in zip(reasons, broken, strict=True)],
    )


def encode(group: Group, chat, limit: int) -> tuple[list, list[str | None]]:
    """Per answer its Tokens or None, and the reason for None."""
    rows = chat.fitting(group.prompt, group.answers, group.complete, limit)
    reasons: list[str | None] = [None] * len(rows)
    texts: dict[tuple[int, ...], str] = {}
    for i, tokens in enumerate(rows):
        if isinstance(tokens, str):
            reasons[i] = tokens
        elif texts.setdefault(tuple(tokens.ids), group.answers[i]) != group.answers[i]:
            reasons[i] = "the same tokens as another answer"  # a template that trims, say
        elif not tokens.num_answer_tokens:
            reasons[i] = "no token to score"
    return [None if why else tokens for tokens, why in zip(rows, reasons, strict=True)], reasons
