"""Log-probabilities of the responses to many prompts, by one model: the worker of most passes."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path

from cream.cli import interrupts
from cream.cli.flags import flag
from cream.files.provenance import POLICY
from cream.scoring.cache import SCORER
from cream.scoring.driver import Model
from cream.scoring.pool import Pool
from cream.text.rendering import Refused
from cream.text.steps import SignTokens
from cream.text.tokens import Tokens

log = logging.getLogger("cream")
CACHED = SCORER  # of what the score cache has of its results
ALIKE = 64  # tokens that two groups begin with if they are laid out as one; few, and they are not worth the company


@dataclass
class Options:
    """Log-probabilities"""

    max_length: int = flag(
        4096, "limit on tokens of prompt and response together; longer responses are skipped, never truncated", low=2
    )
    max_tokens_per_batch: int | None = flag(
        None,
        "tokens per batch, with a prompt counted once for all its responses; none: as many as fit in memory, at "
        "most 4096 on a CPU and 65536 on a GPU (more is no faster); on a CPU up to 16384 for one prompt's responses",
        low=1,
        decides=False,
    )
    batch_size: int | None = flag(
        None,
        "instead of --max_tokens_per_batch, as in the released code: this many times --max_length tokens",
        low=1,
        decides=False,
    )


@dataclass(slots=True)
class Group:
    """A prompt's responses. `complete` is false for a truncated one; `sampled` may hold the sampler's own (log π,
    tokens) of each, None where its text does not give the sampled tokens back. `cached`: values of this prompt's
    responses under the model that scores, digest of a response's tokens -> log π, or outputs. `verbatim`: the responses
    were sampled, and follow the prompt as they are; else the chat template writes them. `opened`: each begins within a
    thought, which its prompt opened."""

    uuid: str
    prompt: list
    responses: list[str]
    complete: list[bool]
    sampled: list[tuple[float, int] | None] | None = None
    cached: dict[str, float | list] = field(default_factory=dict)
    verbatim: bool = False
    opened: bool = False


@dataclass(slots=True)
class Scored:
    """A group's scores: per response log π in nats, summed, or None; scored tokens; why it has none. For the score
    cache: the new ones by digest, `computed`, and how many are computed, cached, or the sampler's."""

    logprob: list[float | None]
    num_tokens: list[int]
    reason: list[str | None]
    computed: dict[str, float] = field(default_factory=dict, compare=False)
    sources: Counter[str] = field(default_factory=Counter, compare=False)


class Scorer:
    """A pool's worker: the model in `folder`, which `group` devices of a kind hold together. It is loaded when the
    first response is not `cached`. `max_tokens` bounds a batch; None: as many as fit in memory.

    A response that does not fit `limit` tokens is not truncated: it gets no score, with the reason. `chunk` groups are
    computed together; cached values serve only where they leave nothing to compute, so that the batches, and with them
    the rounding, never depend on what an earlier run has cached.
    """

    kind = POLICY  # what the model must be
    signs: SignTokens | None = None  # where it is their log-odds that are read

    def __init__(
        self, folder: Path, chat, dtype, limit: int, max_tokens: int | None, chunk: int, group: int, device: str
    ):
        self.chat, self.limit, self.chunk = chat, limit, chunk
        self._how, self._group, self._loaded = (folder, dtype, device, max_tokens), group, None

    def __call__(self, groups: Iterable[Group]) -> Iterator[tuple[str, Scored]]:
        """(uuid, scores) of each group, in their order; equal responses to a prompt are computed once."""
        return in_chunks(groups, self.chunk, self._score)

    def close(self) -> None:
        if self._loaded is not None:
            self._loaded.close()
        self._loaded = None

    def _score(self, groups: list[Group]) -> list[Scored]:
        rows, reasons = zip(*map(self._encode, groups), strict=True)
        digests = [[tokens and tokens.digest() for tokens in own] for own in rows]
        for cached in (True, False):
            known = [_known(*of, cached) for of in zip(groups, rows, digests, strict=True)]
            missing = [
                {digest: tokens for digest, tokens in zip(keys, own, strict=True) if tokens and digest not in values}
                for keys, own, (values, _) in zip(digests, rows, known, strict=True)
            ]
            if not any(missing):
                break
        scored = []
        each = zip(rows, digests, reasons, known, self._compute(missing), strict=True)
        for own, keys, why, (values, sources), new in each:
            values, sources["computed"] = values | new, len(new)
            found, why = keep_finite([digest and values.get(digest) for digest in keys], why)
            computed = {digest: value for digest, value in new.items() if _is_finite(value)}
            scored.append(self._result(own, found, why, computed, sources))
        return scored

    def _encode(self, group: Group) -> tuple[list, list[str | None]]:
        """Per response its Tokens or None, and the reason for None."""
        return encode(group, self.chat, self.limit)

    def _result(self, rows: list, values: list, reasons: list, computed: dict, sources: Counter) -> Scored:
        """Of a group, whose responses have these tokens and values."""
        counts = [tokens.num_response_tokens if tokens else 0 for tokens in rows]
        return Scored(values, counts, reasons, computed, sources)

    def _load(self):
        """The model, with `score` and `close`."""
        from cream.scoring.team import Local, Team

        return (Team if self._group > 1 else Local)(*self._how, self._group, self.kind, self.signs)

    def _compute(self, missing: list[dict]) -> list[dict]:
        """digest -> value of the missing rows of each group."""
        if not any(missing):
            return [{} for _ in missing]
        if self._loaded is None:  # a pass whose scores are all cached needs no model
            self._loaded = self._load()
        groups = join_groups([list(rows.values()) for rows in missing if rows])
        values = chain.from_iterable(self._loaded.score(groups))
        return [{digest: next(values) for digest in rows} for rows in missing]


def join_groups(groups: Iterable[list[Tokens]]) -> list[list[Tokens]]:
    """The groups, neighbours that begin alike as one, so that their beginning is computed once: a judge's rubric and
    question, say, or the examples of a few-shot prompt."""
    joined: list[list[Tokens]] = []
    for rows in groups:
        if joined and joined[-1][-1].ids[:ALIKE] == rows[0].ids[:ALIKE] and len(rows[0]) > ALIKE:
            joined[-1] += rows
        else:
            joined.append([*rows])
    return joined


def in_chunks(groups: Iterable[Group], size: int, compute: Callable[[list[Group]], Iterable]) -> Iterator[tuple]:
    """(uuid, result) of each group, in their order, of which `size` are computed together."""
    groups = iter(groups)
    while chunk := list(islice(groups, size)):
        if interrupts.received():  # it may be incomplete: a resumed run computes it whole
            return
        yield from zip([group.uuid for group in chunk], compute(chunk), strict=True)


NOT_FINITE = "not a finite number"  # the reason of a value that is NaN or infinite


def keep_finite(values: list, reasons: list[str | None]) -> tuple[list, list[str | None]]:
    """Both, with None and a reason in place of the values that are not finite numbers, or lists with such a number."""
    broken = [value is not None and not _is_finite(value) for value in values]
    kept = [None if bad else value for value, bad in zip(values, broken, strict=True)]
    return kept, [NOT_FINITE if bad else why for why, bad in zip(reasons, broken, strict=True)]


def _is_finite(value: float | list) -> bool:
    return all(map(_is_finite, value)) if isinstance(value, list) else math.isfinite(value)


def chunk_of(pool: Pool, count: int) -> int:
    return pool.batch(count)


def setup(model: Model, options: Options, chunk: int, done: Container[str] = ()) -> Callable[[str], Scorer]:
    return partial(Scorer, *arguments(model, options), chunk, model.pool.group)


def arguments(model: Model, options: Options) -> tuple:
    """(folder, chat, dtype, tokens of a row, tokens of a batch or None) of a replica's worker; the log says which."""
    limit = model.limit(options.max_length)
    budget = options.batch_size * limit if options.batch_size else options.max_tokens_per_batch
    log.info("%s; at most %d tokens of prompt and response together", model.precision.reason, limit)
    return model.folder, model.chat, model.precision.dtype, limit, budget


def as_row(scored: Scored, chat=None) -> dict:
    return {"logprob": scored.logprob, "num_tokens": scored.num_tokens, "reason": scored.reason}


def from_row(row: dict, group: Group) -> Scored | None:
    return Scored(**row) if len(row["logprob"]) == len(group.responses) else None


def show_first(model: Model, groups: Iterable[Group], options: Options, how: Callable | None = None) -> None:
    """Print the first response's tokens, as `how` makes them of a group; None: as `encode` does."""
    limit, how = model.limit(options.max_length), how or encode
    tokens = next((tokens for group in groups for tokens in how(group, model.chat, limit)[0] if tokens), None)
    if tokens:
        log.info("first response as the model sees it, its scored tokens marked:\n%s", model.chat.show(tokens))


def _known(group: Group, rows: list, digests: list, cached: bool) -> tuple[dict[str, float], Counter[str]]:
    """digest -> log π of the responses that need no pass, `cached` or the sampler's own, and how many of each.
    `digests`: of the responses' tokens, `rows`."""
    values, sources = {}, Counter()
    if cached:
        values = {digest: group.cached[digest] for digest in digests if digest in group.cached}
        sources["cached"] = len(values)
    for digest, tokens, sampled in zip(digests, rows, group.sampled or [None] * len(rows), strict=True):
        if tokens and digest not in values and sampled and sampled[1] == tokens.num_response_tokens:
            values[digest] = sampled[0]
            sources["sampler"] += 1
    return values, sources


def encode(group: Group, chat, limit: int) -> tuple[list, list[str | None]]:
    """Per response its Tokens or None, and the reason for None."""
    try:
        rows = chat.encode_within_limit(group.prompt, group.responses, group.complete, limit, sampled=group.verbatim)
    except Refused as error:
        rows = [str(error)] * len(group.responses)
    reasons: list[str | None] = [None] * len(rows)
    texts: dict[tuple[int, ...], str] = {}
    for i, tokens in enumerate(rows):
        if isinstance(tokens, str):
            reasons[i] = tokens
        elif texts.setdefault(tuple(tokens.ids), group.responses[i]) != group.responses[i]:
            reasons[i] = "the same tokens as another response"  # a template that trims, say
        elif not tokens.num_response_tokens:
            reasons[i] = "no token to score"
    return [None if why else tokens for tokens, why in zip(rows, reasons, strict=True)], reasons
