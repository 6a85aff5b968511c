"""`prepare_data.py rrm`: RRM's augmentation, which makes artefacts (length, format) as frequent in chosen responses as
in rejected ones. Liu et al., "RRM: Robust Reward Model Training Mitigates Reward Hacking", arXiv 2409.13156.

Each pair i gets two partners j and k of other prompts. After i's prompt, both responses of i are better than all four
of j and k, and these four are equally good (`consistency` 1/2): 14 pairs besides the original one.

Departures from the released code (RLHFlow, pair-pm/RRM): partners never have i's prompt or each other's, and are drawn
by a seed; the original pairs are part of the output; records are fields, so that a response may contain any marker;
responses are stripped, so that white space does not tell where one is from.
"""

import logging
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import NamedTuple

import msgspec
import xxhash

from cream.cli import advice
from cream.cli.flags import flag
from cream.cli.screen import say_result
from cream.data.mix import why_dropped
from cream.errors import UserError
from cream.files import journal, store
from cream.pairs.validity import SAME
from cream.records import Message, Pair, Rewards, Samples, encode
from cream.text.held_out import prompt_key

log = logging.getLogger("cream")
ROLES = ("w_i", "l_i", "w_j", "l_j", "w_k", "l_k")  # winner and loser of the three pairs
BETTER = [(on, off) for on in (0, 1) for off in (2, 4, 3, 5)]  # indices of ROLES: chosen, rejected
NEUTRAL = [(2, 3), (4, 5), (2, 4), (2, 5), (4, 3), (3, 5)]
ADDED = [(pair, 1.0) for pair in BETTER] + [(pair, 0.5) for pair in NEUTRAL]  # and the probability that it is right
EASY = "the rewards say it already (--min_error)"
NO_REWARD = "one of its responses has no reward"


@dataclass
class RrmFlags:
    """Augmentation (rrm)"""

    per_pair: int = flag(len(ADDED), "rrm: number of pairs to add to each, chosen by the seed", low=1, high=len(ADDED))
    candidates: bool = flag(
        False, "rrm: write the responses to compare, to be scored by rewarding.py for --rewards, and no pairs"
    )
    rewards: str | None = flag(
        None, "rrm: rewards of the candidates, by which pairs that a model gets right are not added", decides=False
    )
    min_error: float = flag(
        0.2,
        "rrm: with --rewards, add pairs only where |sigma(reward difference) - label| is at least this",
        low=0,
        high=1,
    )


class Response(NamedTuple):
    """A response without white space around it, and whether it has no end-of-turn token."""

    text: str
    truncated: bool


# Pure functions -------------------------------------------------------------------------------------------------------


def partners(prompts: Sequence[int], seed: int) -> list[tuple[int, int]]:
    """For each pair i, given the hash of its prompt, indices (j, k) of pairs of two other prompts. Every pair is j once
    and k once, so that each response is as often added as chosen as it is as rejected.

    With pairs of one prompt side by side in a random order of prompts, at most m of each, whoever is m to N - m places
    further on (round a circle) has another prompt; j and k are a and b places on, drawn so that this holds for all
    three. Raises UserError if one prompt has more than a third of the pairs.
    """
    draw = random.Random(seed)
    order = sorted(
        range(len(prompts)), key=lambda i: (xxhash.xxh3_64_intdigest(prompts[i].to_bytes(8, "big"), seed), i)
    )
    n, m = len(prompts), max(Counter(prompts).values(), default=0)
    if n < 3 or n < 3 * m:
        raise UserError(
            f"one prompt has {m} of {n} pairs; rrm needs partners of two other prompts for each, so at most a third"
        )
    a = draw.randint(m, n - 2 * m)
    b = draw.randint(a + m, n - m)
    found: list[tuple[int, int]] = [(0, 0)] * n
    for place, i in enumerate(order):
        found[i] = order[(place + a) % n], order[(place + b) % n]
    return found


def responses_of(pair: Pair) -> tuple[Response, Response]:
    """The chosen and the rejected response."""
    both = (pair.selected, pair.selected_truncated), (pair.rejected, pair.rejected_truncated)
    chosen, rejected = (Response(turns[-1].content.strip(), truncated) for turns, truncated in both)
    return chosen, rejected


def added(
    pair: Pair, responses: Sequence[Response], names: tuple[str, str], chosen: Sequence[int] | None = None
) -> Iterator[tuple[int, Pair]]:
    """(number, pair) of those to add to a pair, of its six `responses`, in the order of ROLES; `names`: the uuids of j
    and k; `chosen`: their numbers in ADDED. Without those of two equal texts."""
    for number in range(len(ADDED)) if chosen is None else chosen:
        (one, other), right = ADDED[number]
        better, worse = responses[one], responses[other]
        if better.text == worse.text:
            continue
        told = {"selected": ROLES[one], "rejected": ROLES[other], "j": names[0], "k": names[1]}
        yield (
            number,
            Pair(
                uuid=f"{pair.uuid}#rrm{number:02d}",
                prompt=pair.prompt,
                selected=[*pair.prompt, Message("assistant", better.text)],
                rejected=[*pair.prompt, Message("assistant", worse.text)],
                consistency=right,
                selected_truncated=better.truncated,
                rejected_truncated=worse.truncated,
                source_prompt=pair.source_prompt,
                extra={"rrm": told},
            ),
        )


def stripped(pair: Pair) -> Pair:
    """A pair with stripped responses; log-probabilities are those of the text that it had."""
    both = {}
    for name, response in zip(("selected", "rejected"), responses_of(pair), strict=True):
        if getattr(pair, name)[-1].content != response.text:
            both |= {name: [*pair.prompt, Message("assistant", response.text)], f"{name}_logp": None}
    return msgspec.structs.replace(pair, **both) if both else pair


def error_of(number: int, rewards: Sequence[float | None]) -> float | None:
    """|P - P*| of an added pair: P = sigma(r_chosen - r_rejected) by the rewards of the six responses, P* its label;
    None where a reward is unknown."""
    (one, other), right = ADDED[number]
    if rewards[one] is None or rewards[other] is None:
        return None
    d = rewards[one] - rewards[other]
    return abs((1 / (1 + exp(-d)) if d >= 0 else exp(d) / (1 + exp(d))) - right)


# The command ----------------------------------------------------------------------------------------------------------


def make(path: Path, flags: RrmFlags, seed: int, output: Path | None, run) -> None:
    """Write the pairs of a file and those that are added to them, or the candidates, one record per pair."""
    if flags.candidates and flags.rewards:
        raise UserError("--candidates writes what --rewards needs; give one of them")
    if flags.rewards is None and flags.min_error != RrmFlags.min_error:
        raise UserError("--min_error compares with --rewards, which are not given")
    store.refuse_other_kind("rrm:", path, Pair, "which prepare_data.py import and make_pairs.py write")
    word = "candidates" if flags.candidates else "rrm"
    target = output or path.with_name(f"{path.name.partition('.json')[0]}.{word}.json")
    provenance = run.provenance()
    provenance.output("pairs", path)
    settings = {"rrm": word, "seed": seed, "per_pair": flags.per_pair, "on_bad_record": run.on_bad_record}
    if flags.rewards:
        provenance.output("rewards", Path(flags.rewards))
        settings |= {"min_error": flags.min_error}
    each = journal.Output(target, settings, provenance, overwrite=run.overwrite)
    if each.up_to_date:
        say_result("%s is up to date (same settings and inputs); skipping", target)
        return
    pairs = []
    for pair in store.read(path, Pair, skip=run.skip):
        if reason := why_dropped(pair):
            each.drop(reason)
        else:
            pairs.append(pair)
    drawn = partners([prompt_key(pair) for pair in pairs], seed)
    rewards = _rewards(Path(flags.rewards), run.skip) if flags.rewards else None
    if run.dry_run:
        log.info("dry run: would write %s; nothing was written", target)
        return
    with each:
        if run.skip:
            each.reject(store.rejected(path, Pair))
        if flags.candidates:
            rows = (encode(_candidates(pairs, i, drawn)) for i in range(len(pairs)))
        else:
            rows = map(encode, _augmented(pairs, drawn, flags, seed, rewards, each))
        count = each.finish(rows)
    say_result("%s: %d records of %d pairs", target, count, len(pairs))
    for reason, number in each.dropped.items():
        log.info("  %d skipped: %s", number, reason)
    if flags.candidates:
        advice.say("next: python rewarding.py --input_file %s --reward …, then rrm with --rewards", target)


def _six(pairs: Sequence[Pair], i: int, drawn: Sequence[tuple[int, int]]) -> list[Response]:
    return [response for index in (i, *drawn[i]) for response in responses_of(pairs[index])]


def _candidates(pairs: Sequence[Pair], i: int, drawn: Sequence[tuple[int, int]]) -> Samples:
    """The six responses that follow the prompt of pair i, for a reward model to score."""
    texts, truncated = zip(*_six(pairs, i, drawn), strict=True)
    reasons = ["length" if each else "stop" for each in truncated]
    return Samples(uuid=pairs[i].uuid, prompt=pairs[i].prompt, responses=[*texts], finish_reason=reasons)


def _rewards(path: Path, skip: bool) -> dict[str, tuple[list[float | None], list[str]]]:
    """uuid -> the rewards of its candidates and their texts."""
    store.refuse_other_kind("--rewards", path, Rewards, "which rewarding.py writes for rrm --candidates")
    return {each.uuid: (each.reward, each.responses()) for each in store.read(path, Rewards, skip=skip)}


def _augmented(
    pairs: Sequence[Pair],
    drawn: Sequence[tuple[int, int]],
    flags: RrmFlags,
    seed: int,
    rewards: dict[str, tuple[list[float | None], list[str]]] | None,
    output: journal.Output,
) -> Iterator[Pair]:
    """Each pair, and those that are added to it."""
    for i, pair in enumerate(pairs):
        yield stripped(pair)
        six, (j, k) = _six(pairs, i, drawn), drawn[i]
        known = _rewards_of(pair, six, rewards, flags.rewards)
        ordered = sorted(range(len(ADDED)), key=lambda n: xxhash.xxh3_64_intdigest(f"{pair.uuid}#{n}".encode(), seed))
        chosen = sorted(ordered[: flags.per_pair])
        count = 0
        for number, made in added(pair, six, (pairs[j].uuid, pairs[k].uuid), chosen):
            count += 1
            error = None if known is None else error_of(number, known)
            if known is None or error is not None and error >= flags.min_error:
                yield made
            else:
                output.drop(NO_REWARD if error is None else EASY)
        if count < len(chosen):
            output.drop(SAME, len(chosen) - count)


def _rewards_of(pair: Pair, six: Sequence[Response], rewards: dict | None, path: str | None) -> list | None:
    """The rewards of a pair's candidates. Raises UserError if they are of other responses."""
    if rewards is None:
        return None
    if pair.uuid not in rewards:
        raise UserError(f"{path}: has no record {pair.uuid!r}; it should be of the candidates of the same pairs")
    numbers, texts = rewards[pair.uuid]
    if texts != [response.text for response in six]:
        raise UserError(
            f"{path}: record {pair.uuid!r} is of other responses; --candidates was of another --seed, or of other pairs"
        )
    return numbers
