"""Pseudo-labels: pairs whose better response a reward model names, as far as it is sure of it.

A pair is two responses to a prompt, in training from few labels those of an unlabelled pair (prepare_data.py split).
Its better response is the one that the model prefers, whatever the data say, and P, the model's probability of that, is
the pair's confidence. Which pairs are kept:

    --rule confidence   P >= --threshold, and > 1/2 (SSRM, semi-supervised reward modelling, arXiv 2409.06903). With
                        Bradley-Terry rewards P(i is better than j) = sigmoid((r_i - r_j) / temperature); a model that
                        compared the responses states P itself, of which the mean over both orders counts
    --rule ser          SER's filter of the rewards of either response (cream/pairs/ser.py)

Departure: the released SSRM keeps what is confident, and labels it as the data do (conf_threshold.py): with P = .05
that the given winner is better, it stays the winner. Its > is >= here, so that a threshold of 1 can be met.
"""

import logging
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import exp, isnan

from cream.cli.flag_fields import IF_GIVEN
from cream.cli.flags import flag
from cream.errors import UserError
from cream.pairs import ser
from cream.pairs.choice import Choice
from cream.pairs.gold import Gold
from cream.pairs.inputs import REWARDS
from cream.preferences import comparisons
from cream.records import Item, Rewards

log = logging.getLogger("cream")
INPUTS = {"rewards": REWARDS}  # no previous ranking: the confidence is the model's own
NONE_SURE = "no pair as sure as --threshold"
NONE_PASSES = "no pair passes SER's filter"
OF_SER = ("status", "p_high", "p_low", "p_gap", "min_share", "centre")


@dataclass
class Options:
    """--strategy threshold"""

    threshold: float = flag(
        0.7,
        "keep pairs with at least this confidence, the probability that the chosen response is the better one",
        low=0.5,
        high=1,
    )
    rule: str = flag(
        "confidence",
        "confidence: keep by --threshold; ser: by the rewards of both responses, as p = sigmoid((reward - centre) / "
        "temperature)",
        choices=("confidence", "ser"),
        decides=IF_GIVEN,
    )
    temperature: float = flag(
        1.0, "rewards are divided by this before they are probabilities", above=0, decides=IF_GIVEN
    )
    status: str = flag(
        "paper",
        "ser: keep 1, pairs with one p above --p_high and one below --p_low; 2, those whose p differ by more than "
        "--p_gap; union, either, as the released code; paper, 1 if enough pairs of the file meet it, else 2 if enough "
        "meet that, else none",
        choices=ser.STATUSES,
        decides=IF_GIVEN,
    )
    p_high: float = flag(0.55, "ser: p of a good response is above this", low=0, high=1, decides=IF_GIVEN)
    p_low: float = flag(0.45, "ser: p of a bad response is below this", low=0, high=1, decides=IF_GIVEN)
    p_gap: float = flag(0.3, "ser: p of responses that are far apart differ by more", low=0, high=1, decides=IF_GIVEN)
    min_share: float = flag(
        0.02, "ser: the share of the pairs that is enough, at least one pair", low=0, high=1, decides=IF_GIVEN
    )
    centre: bool = flag(
        True, "ser: the centre is the median of the file's rewards; no: 0, as in the paper", decides=IF_GIVEN
    )
    pool: Gold = field(init=False, default_factory=Gold)  # all pairs, as the model orders them
    pairs: int = field(init=False, default=0)  # the number of these
    found: ser.Survey | None = field(init=False, default=None)  # by `survey`


def check(options: Options) -> None:
    """Raises UserError where thresholds are out of order, or belong to the other rule."""
    idle = ("threshold",) if options.rule == "ser" else OF_SER
    plain = Options()
    if other := [f"--{name}" for name in idle if getattr(options, name) != getattr(plain, name)]:
        raise UserError(f"{', '.join(other)}: not of --rule {options.rule}")
    if options.p_low > options.p_high:
        raise UserError(
            f"--p_low {options.p_low:g} is above --p_high {options.p_high:g}: a response may be good or bad"
        )


def survey(pool: Iterable[tuple[Rewards, Sequence[int]]], options: Options) -> None:
    """SER's filter depends on the whole file: its centre, and with --status paper the status."""
    if options.rule != "ser":
        return
    rewards, first, second = array("d"), array("d"), array("d")
    for record, usable in pool:
        own = _absolute(record, usable)
        rewards.extend(own)
        for a, b in combinations(own, 2):
            first.append(a)
            second.append(b)
    wanted = ser.Filter(options.status, options.p_high, options.p_low, options.p_gap, 0.0, options.temperature)
    found = ser.survey(rewards, first, second, wanted, centred=options.centre, least=options.min_share)
    options.found = found
    text = (
        "SER's filter: status %s; status 1 is met by %.1f %% of %d pairs, status 2 by %.1f %%; median reward %.4g, %s"
    )
    centre = "the centre" if options.centre else "and the centre 0"
    log.info(text, found.filter.status, 100 * found.f1, len(first), 100 * found.f2, found.offset, centre)


def choose(record: Rewards, usable: Sequence[int], item: Item | None, options: Options) -> list[Choice] | str:
    """The pairs that the rule keeps, chosen being what the model prefers; 1/2 is no pair."""
    pairs = []
    for i, j, p in _preferences(record, usable, options.temperature):
        options.pairs += 1
        options.pool.add(record, i, j)
        if options.rule == "ser":
            sure = options.found.filter.keeps(record.reward[i], record.reward[j])
        else:
            sure = p >= options.threshold
        if sure and p > 0.5:
            pairs.append(Choice(i, j, p))
    return pairs or (NONE_PASSES if options.rule == "ser" else NONE_SURE)


def facts(options: Options, kept: int, gold: Gold) -> dict:
    """What the sidecar says of the labels, and what a loop's table shows of that."""
    about = {"rule": options.rule, "pairs": options.pairs, "kept": kept}
    if found := options.found:
        about |= {"status": found.filter.status, "f1": found.f1, "f2": found.f2}
        about |= {"centre": found.filter.centre, "offset": found.offset}
    shares = {"kept %": kept / options.pairs if options.pairs else None}
    shares |= {"pool right %": options.pool.accuracy, "kept right %": gold.accuracy}
    table = {name: 100 * share for name, share in shares.items() if share is not None}
    about |= {"accuracy": {"pool": options.pool.accuracy, "kept": gold.accuracy}}
    return {"pseudo_labels": about, "table": ({"status": found.filter.status} if found else {}) | table}


def _absolute(record: Rewards, usable: Sequence[int]) -> list[float]:
    """The rewards of the usable responses. Raises UserError where they are those of comparisons."""
    if record.preferences is not None:
        raise UserError(
            f"record {record.uuid!r}: its rewards are of comparisons; SER's filter takes the reward of each response "
            "by itself. Give --rule confidence"
        )
    return [record.reward[i] for i in usable]


def _preferences(record: Rewards, usable: Sequence[int], temperature: float) -> Iterator[tuple[int, int, float]]:
    """(i, j, P(i is better than j) >= 1/2) of every two responses that the model compared: from the record's
    `preferences` where it has them, else from the rewards."""
    compared = None if record.preferences is None else comparisons(record.preferences)
    if compared is not None and temperature != 1:
        raise UserError(f"record {record.uuid!r}: has preferences, which --temperature does not change; omit it")
    for i, j in combinations(usable, 2):
        if compared is None:
            if record.reward[i] < record.reward[j]:
                i, j = j, i
            yield i, j, 1 / (1 + exp(min(0.0, (record.reward[j] - record.reward[i]) / temperature)))
            continue
        if not isnan(p := float(compared[i, j])):
            yield (i, j, p) if p >= 0.5 else (j, i, 1 - p)
