"""What became of prompts and responses while pairs were made, and what the pairs are like."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from cream.alarms import share
from cream.cli.screen import say_result
from cream.consistency import Tally, margin_cap
from cream.pairs.choice import Choice
from cream.pairs.gold import Gold
from cream.ranking import Array, padded
from cream.records import Pair, Rewards

log = logging.getLogger("cream")


@dataclass
class Lengths:
    """How rewards go with lengths in scored tokens, over the usable responses to prompts that have a pair."""

    counted: bool = True  # no record without them so far
    pairs: int = 0
    longer: float = 0.0  # tokens, chosen minus rejected, summed over pairs
    products: Array = field(default_factory=lambda: np.zeros(3))  # sums of xx, xy, yy: reward x and length y, centred

    def add(self, records: Sequence[Rewards], usable: Sequence[list[int]], pairs: Sequence[list[Choice]]) -> None:
        """Count a block of prompts, each with its pairs; rewards and lengths are centred per prompt."""
        self.counted &= all(record.num_tokens is not None for record in records)
        rows = [row for row in zip(records, usable, pairs, strict=True) if row[2]]
        if not self.counted or not rows:
            return
        for record, _, some in rows:
            self.pairs += len(some)
            self.longer += sum(record.num_tokens[pair.chosen] - record.num_tokens[pair.rejected] for pair in some)
        both = (padded([getattr(r, name)[i] for i in kept] for r, kept, _ in rows) for name in ("reward", "num_tokens"))
        x, y = (values - np.nanmean(values, axis=1, keepdims=True) for values in both)
        self.products += [np.nansum(x * x), np.nansum(x * y), np.nansum(y * y)]

    @property
    def longer_by(self) -> float | None:
        """Tokens by which chosen responses are longer than rejected ones on average; None where lengths are unknown."""
        return self.longer / self.pairs if self.counted and self.pairs else None

    @property
    def bias(self) -> float | None:
        """Pearson's r of reward and length within prompts; None where lengths are unknown or do not vary."""
        xx, xy, yy = self.products
        return float(xy / np.sqrt(xx * yy)) if self.counted and xx * yy > 0 else None


@dataclass
class PairSet:
    """Pairs in the order of the prompts, and what became of every response and prompt.

    `pairs` yields them once; all else is of the prompts that it has been through, so of all when it has ended.
    """

    pairs: Iterator[Pair] = iter(())
    of: str = "responses"  # what `responses` counts
    trusted: bool = False  # whether all pairs are trusted fully, so that nothing is said of C
    prompts: int = 0
    count: int = 0  # pairs
    dropped: Counter[str] = field(default_factory=Counter)  # prompts without a pair, by reason
    unmatched: Counter[str] = field(default_factory=Counter)  # records of one file only: no prompts here
    responses: Counter[str] = field(default_factory=Counter)  # in all (""), and those that enter no pair, by reason
    c: Tally = field(default_factory=Tally)  # of the prompts; of the confidences of the pairs, if `own`
    own: bool = False  # whether the strategy states confidences of its own
    without_c: int = 0  # prompts with a constant previous ranking
    lengths: Lengths = field(default_factory=Lengths)
    gold: Gold = field(default_factory=Gold)
    facts: Callable[[], dict] = dict  # the strategy's, for the sidecar, when `pairs` has ended

    def report(self, beta: float | None) -> None:
        """Log it; `beta` is that of the margin cap, None where training does not use C."""
        reasons = (f"{count} {reason}" for reason, count in self.responses.items() if reason)
        log.info("%s", ", ".join([f"{self.responses['']} {self.of}", *reasons]))
        paired = self.prompts - self.dropped.total()
        say_result("%d pairs%s", self.count, "" if paired == self.count else f" from {paired} prompts")
        for reason, count in (self.dropped + self.unmatched).items():
            log.info("  no pair from %d prompt%s: %s", count, "s" * (count > 1), reason)
        if self.without_c:
            text = "  %d prompts without c (the previous ranking is constant): training takes the mean"
            log.info(text, self.without_c)
        if (longer_by := self.lengths.longer_by) is not None:
            bias = "undefined" if self.lengths.bias is None else f"{self.lengths.bias:+.2f}"
            text = "chosen minus rejected responses: %+.1f tokens on average; correlation of reward and length %s"
            log.info(text, longer_by, bias)
        if table := self.facts().get("table"):
            shown = (f"{name} {value if isinstance(value, str) else f'{value:.1f}'}" for name, value in table.items())
            log.info("pseudo-labels: %s", ", ".join(shown))
        elif self.gold.pairs:
            text = "gold values: the chosen response is the better one in %.1f %% of %d pairs"
            log.info(text, 100 * self.gold.accuracy, self.gold.pairs)
        if not self.trusted:
            self._report_consistency(beta)

    def _report_consistency(self, beta: float | None) -> None:
        c, unit = self.c, "pairs" if self.own else "prompts"
        if c.mean is None:
            log.info("no %s has a consistency", unit[:-1])
            return
        spread = "undefined" if c.std is None else f"{c.std:.3f}"
        below = 100 * c.below_half
        text = "C of %d %s: mean %.3f, standard deviation %s, below 1/2: %.1f %%"
        say_result(text, c.n, unit, c.mean, spread, below)
        for i, count in enumerate(c.histogram):
            log.info("  %.1f  %6d  %s", i / 10, count, "#" * round(40 * count / max(c.histogram)))
        if beta is not None and c.mean < 1:
            cap = float(margin_cap(c.mean, beta))
            text = (
                "trained with the mean C and --beta %g, log-ratio margins stop at logit(C) / beta = %.3g nats "
                "(`margin` in the training log is beta times that: %.3g)"
            )
            log.info(text, beta, cap, beta * cap)

    def alarm_facts(self, used: bool) -> dict[str, float | None]:
        """For alarms; `used`: whether training uses C."""
        facts = {"no_pair": share(self.dropped.total(), self.prompts)}
        facts |= {"length_bias": None if self.lengths.bias is None else abs(self.lengths.bias)}
        if self.trusted or self.own or self.c.mean is None:
            return facts
        low, high = mean_interval(self.c)
        facts |= {"c_contradicts": high} if high < 0.5 else {"c_undecided": low}
        return facts | ({"c_below_half": self.c.below_half} if used else {})


def mean_interval(c: Tally) -> tuple[float, float]:
    """About the 95 % interval of a mean C: two standard errors on both sides."""
    error = 0.0 if c.std is None else 2 * c.std / c.n**0.5
    return c.mean - error, c.mean + error
