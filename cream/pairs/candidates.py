"""Pairs whose better response is known from its origin, so that nothing is rewarded: SFT data against samples, samples
of one prompt against those of another."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from cream.pairs.choice import PairUuids, pair_uuid
from cream.pairs.report import PairSet
from cream.records import FinishReason, Message, Pair, Samples, ended_turn

TRUNCATED = "truncated response"
EQUAL = "both responses equal"
REPEATED = "equal to an earlier pair"
NO_RESPONSE = "no response"


class Response(NamedTuple):
    """A response; of a sample how it ended, its index among those of its prompt, and its number of sampled tokens, if
    known."""

    text: str
    finish_reason: FinishReason | None = None
    index: int | None = None
    tokens: int | None = None


class Candidate(NamedTuple):
    """A possible pair; `skipped`: why the strategy does not want it."""

    chosen: Response
    rejected: Response
    skipped: str | None = None


class Candidates(NamedTuple):
    """A prompt's possible pairs, the most wanted first."""

    uuid: str
    prompt: list[Message]
    pairs: list[Candidate]
    source_prompt: list[Message] | None = None
    extra: dict = {}


def samples_of(sample: Samples) -> list[Response]:
    """A prompt's samples."""
    count = len(sample.responses)
    ended, tokens = sample.finish_reason or [None] * count, sample.num_tokens or [None] * count
    return list(map(Response, sample.responses, ended, range(count), tokens))


def build_candidates(
    prompts: Iterable[Candidates | str], keep_truncated: bool = False, most: int | None = None
) -> PairSet:
    """Each prompt's candidates, without those that are skipped, truncated (unless `keep_truncated`), of equal texts, or
    there already; `most` of a prompt. In place of a prompt's candidates there may be the reason why it has none.

    What becomes of candidates and prompts is counted as the pairs are gone through. That raises UserError where a
    prompt has the uuid of another's further pair.
    """
    pair_set = PairSet(of="possible pairs", trusted=True)
    pair_set.pairs = _draw(pair_set, prompts, keep_truncated, most)
    return pair_set


def _draw(
    pair_set: PairSet, prompts: Iterable[Candidates | str], keep_truncated: bool, most: int | None
) -> Iterator[Pair]:
    uuids = PairUuids()
    for prompt in prompts:
        pair_set.prompts += 1
        if isinstance(prompt, str):
            pair_set.dropped[prompt] += 1
            continue
        kept, texts, reasons = [], set(), []
        for pair in prompt.pairs:
            both = pair.chosen.text, pair.rejected.text
            if reason := pair.skipped or _reason(pair, keep_truncated) or (REPEATED if both in texts else None):
                reasons.append(reason)
            else:
                kept.append(pair)
                texts.add(both)
        pair_set.responses.update(["" for _ in prompt.pairs] + reasons)
        if not kept:
            pair_set.dropped[reasons[0] if reasons else NO_RESPONSE] += 1
        kept = kept[:most]
        uuids.check(prompt.uuid, len(kept))
        for number, pair in enumerate(kept, 1):
            pair_set.count += 1
            yield _pair(prompt, pair_uuid(prompt.uuid, number), pair)


def _reason(pair: Candidate, keep_truncated: bool) -> str | None:
    if not keep_truncated and "length" in (pair.chosen.finish_reason, pair.rejected.finish_reason):
        return TRUNCATED
    return EQUAL if pair.chosen.text == pair.rejected.text else None


def _pair(prompt: Candidates, uuid: str, pair: Candidate) -> Pair:
    chosen, rejected, _ = pair
    return Pair(
        uuid=uuid,
        prompt=prompt.prompt,
        selected=[*prompt.prompt, Message("assistant", chosen.text)],
        rejected=[*prompt.prompt, Message("assistant", rejected.text)],
        selected_index=chosen.index,
        rejected_index=rejected.index,
        selected_truncated=not ended_turn(chosen.finish_reason),
        rejected_truncated=not ended_turn(rejected.finish_reason),
        source_prompt=prompt.source_prompt,
        extra=prompt.extra,
    )
