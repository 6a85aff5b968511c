"""Log-probabilities of the responses to many prompts, by one model: the worker of most passes."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from cream.cli import interrupts
from cream.cli.flags import flag
from cream.scoring.driver import Model
from cream.scoring.pool import Pool

log = logging.getLogger("cream")
CACHED = True  # its results enter the score cache


@dataclass
class Options:
    """Log-probabilities"""

    max_length: int = flag(
        4096, "limit on tokens of prompt and response together; longer responses are skipped, never truncated", low=2
    )
    max_tokens_per_batch: int | None = flag(
        None,
        "tokens per batch, with a prompt counted once for all its responses; none: as many as fit in memory, at "
        "most 4096 on a CPU and 65536 on a GPU (more is no faster)",
        low=1,
        decides=False,
    )
    batch_size: int | None = flag(
        None, "batch size as in the released code: rows of --max_length tokens", low=1, decides=False
    )


@dataclass(slots=True)
class Group:
    """A prompt's responses. `complete` is false for a truncated one; `sampled` may hold the sampler's own (log π,
    tokens) of each, None where its text does not give the sampled tokens back. `known`: cached values of this prompt's
    responses under the model that scores, digest of a response's tokens -> log π."""

    uuid: str
    prompt: list
    answers: list[str]
    complete: list[bool]
    sampled: list[tuple[float, int] | None] | None = None
    known: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class Scored:
    """A group's scores: per response log π in nats, summed, or None; scored tokens; why it has none."""

    logprob: list[float | None]
    num_tokens: list[int]
    reason: list[str | None]


@dataclass(slots=True)
class Found:
    """A group's scores; the new ones among them, digest of a response's tokens -> log π; and how many responses' were
    `computed`, `cached`, or the `sampler`'s."""

    scored: Scored
    computed: dict[str, float]
    sources: Counter[str]


class Scorer:
    """Scores groups by the model that `load` gives, called when the first response is not `known`.

    A response that does not fit `limit` tokens is not truncated: it gets no score, with the reason. `chunk` groups are
    computed together; cached values serve only where they leave nothing to compute, so that the batches, and with them
    the rounding, never depend on what an earlier run has cached.
    """

    def __init__(self, load: Callable[[], Any], chat, *, limit: int, chunk: int):
        self.load, self.chat, self.limit, self.chunk = load, chat, limit, chunk
        self._loaded = None

    def __call__(self, groups: Iterable[Group]) -> Iterator[tuple[str, Found]]:
        """(uuid, Found) of each group, in their order; equal responses to a prompt are computed once."""
        groups = iter(groups)
        while chunk := list(islice(groups, self.chunk)):
            if interrupts.received():  # it may be incomplete: a resumed run computes it whole
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
        for (rows, reasons), ids, (values, sources), new in zip(encoded, digests, taken, computed, strict=True):
            sources["computed"] += len(new)
            values |= new
            scored = _scored(rows, reasons, [values.get(digest) for digest in ids])
            found.append(Found(scored, {d: v for d, v in new.items() if math.isfinite(v)}, sources))
        return found

    def _compute(self, missing: list[dict]) -> list[dict[str, float]]:
        """digest -> log π of the missing rows of each group."""
        if not any(missing):
            return [{} for _ in missing]
        if self._loaded is None:  # a pass whose scores are all cached needs no model
            self._loaded = self.load()
        values = iter(self._loaded.score([list(m.values()) for m in missing if m]))
        return [dict(zip(m, next(values), strict=True)) if m else {} for m in missing]


def chunk_of(pool: Pool, count: int) -> int:
    """Groups of `count` that are computed together, or skipped together by a resumed run."""
    return pool.batch(count)


def setup(model: Model, options: Options, chunk: int, done: Container[str] = ()) -> Callable[[str], Scorer]:
    """What a pool makes a replica's Scorer with, of `chunk` groups at a time, those that are `done` included."""
    return partial(scorer, *arguments(model, options), chunk, model.pool.group)


def arguments(model: Model, options: Options) -> tuple:
    """(folder, chat, dtype, tokens of a row, tokens of a batch or None) of a replica's worker; the log says which."""
    limit = model.limit(options.max_length)
    budget = options.batch_size * limit if options.batch_size else options.max_tokens_per_batch
    log.info("%s; at most %d tokens of prompt and response together", model.precision.reason, limit)
    return model.folder, model.chat, model.precision.dtype, limit, budget


def scorer(
    folder: Path, chat, dtype, limit: int, max_tokens: int | None, chunk: int, group: int, device: str
) -> Scorer:
    """A Scorer by the model in `folder`, which `group` devices of a kind hold together. `max_tokens` bounds a batch;
    None: as many as fit in memory."""

    def load():
        import torch

        from cream.scoring.team import Local, Team

        if group > 1:
            return Team(folder, dtype, device, max_tokens, group)
        return Local(folder, dtype, torch.device(device), max_tokens)

    return Scorer(load, chat, limit=limit, chunk=chunk)


def as_row(found: Found) -> dict:
    """A result as the journal has it."""
    return asdict(found.scored)


def from_row(row: dict, group: Group) -> Scored | None:
    """The scores in a journal's row; None where they are not of this group's responses."""
    return Scored(**row) if len(row["logprob"]) == len(group.answers) else None


def show_first(model: Model, groups: Iterable[Group], options: Options) -> None:
    """Print the first response that fits, its scored tokens marked."""
    limit = model.limit(options.max_length)
    tokens = next((tokens for group in groups for tokens in encode(group, model.chat, limit)[0] if tokens), None)
    if tokens:
        log.info("first response as the model sees it, its scored tokens marked:\n%s", model.chat.show(tokens))


def _split(groups: list[Group], digests: list[list], rows: list[list]) -> tuple[list, list[dict]]:
    """Per group the values of `_known`, and digest -> tokens of the responses left to compute."""
    taken = [_known(*each) for each in zip(groups, digests, rows, strict=True)]
    return taken, [
        {digest: row for digest, row in zip(ids, own, strict=True) if row and digest not in values}
        for ids, own, (values, _) in zip(digests, rows, taken, strict=True)
    ]


def _known(group: Group, digests: list[str | None], rows: list) -> tuple[dict[str, float], Counter[str]]:
    """digest -> log π of the responses that need no pass, and how many come from where."""
    found = {digest: group.known[digest] for digest in digests if digest in group.known}
    sources = Counter(cached=len(found))
    for digest, row, sampled in zip(digests, rows, group.sampled or [None] * len(rows), strict=True):
        if row and digest not in found and sampled and sampled[1] == row.num_response_tokens:
            found[digest] = sampled[0]
            sources["sampler"] += 1
    return found, sources


def _scored(rows: list, reasons: list[str | None], values: list[float | None]) -> Scored:
    broken = [value is not None and not math.isfinite(value) for value in values]
    return Scored(
        [None if bad else value for value, bad in zip(values, broken, strict=True)],
        [0 if tokens is None else tokens.num_response_tokens for tokens in rows],
        ["not a finite number" if bad else why for why, bad in zip(reasons, broken, strict=True)],
    )


def encode(group: Group, chat, limit: int) -> tuple[list, list[str | None]]:
    """Per response its Tokens or None, and the reason for None."""
    rows = chat.encode_within_limit(group.prompt, group.answers, group.complete, limit)
    reasons: list[str | None] = [None] * len(rows)
    texts: dict[tuple[int, ...], str] = {}
    for i, tokens in enumerate(rows):
        if isinstance(tokens, str):
            reasons[i] = tokens
        elif texts.setdefault(tuple(tokens.ids), group.answers[i]) != group.answers[i]:
            reasons[i] = "the same tokens as another response"  # a template that trims, say
        elif not tokens.num_response_tokens:
            reasons[i] = "no token to score"
    return [None if why else tokens for tokens, why in zip(rows, reasons, strict=True)], reasons
