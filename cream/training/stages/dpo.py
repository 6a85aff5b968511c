"""(Consistency-regularised) direct preference optimisation, and other losses of a preference pair (cream/losses.py).

The reference is the policy that training starts from, its log-probabilities known before the first step (reference.py).
CREAM (arXiv 2410.12735, Algorithm 1): C·L_DPO + (1-C)·L_reversed, with C the set's mean consistency (`consistency_avg`)
or the prompt's own (`consistency_dyn`); `original` is C = 1 (arXiv 2305.18290, eq. 7). The loss mask of a conversation
are its spans (Tokens): here the one response, its end of turn included.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from math import nan
from typing import TYPE_CHECKING

from cream.cli.flags import flag
from cream.errors import UserError
from cream.records import METHODS, Pair
from cream.text.chat import Chat, Tokens
from cream.training.heldout import HeldOutOptions

if TYPE_CHECKING:
    from torch import Tensor

    from cream.model.batches import Batch

log = logging.getLogger("cream")
RECORDS = (Pair,)
LOSSES = ("sigmoid", "hinge", "ipo", "simpo")
PER_TOKEN = ("ipo", "simpo")  # published, or in use, with mean log-probabilities per token
WITHOUT_REFERENCE = ("simpo",)
GAMMA = 0.5  # of --simpo_gamma


@dataclass
class Options(HeldOutOptions):
    """Preference training (DPO)"""

    method: str | None = flag(
        None,
        "C of a pair in the loss: 1 (original), its own (consistency_dyn) or the average over all pairs "
        "(consistency_avg); none: as recorded with the pairs, else original",
        choices=METHODS,
    )
    beta: float = flag(
        0.1, "strength of the pull to the reference: h = beta x difference of log-ratios (SPIN's lambda)", above=0
    )
    fixed_consistency: float | None = flag(
        None, "use this C for every pair instead of its own (a control)", low=0, high=1
    )
    allow_reversed: bool = flag(
        False, "train although most pairs have C < 1/2, so that their rejected responses become likelier", decides=False
    )
    loss: str = flag(
        "sigmoid",
        "loss of a pair's margin h: sigmoid, DPO's -log sigma(h); hinge, SLiC's max(0, 1 - h); ipo, (h / beta - "
        "1 / (2 beta))^2; simpo, -log sigma(h - gamma) without a reference",
        choices=LOSSES,
    )
    simpo_gamma: float | None = flag(
        None, "simpo: the target margin (its paper: 0.5 to 1.6 with --beta 2 to 2.5); none: 0.5", low=0
    )
    rpo_alpha: float = flag(
        0.0,
        "RPO: adds this weight times the chosen response's mean loss per token (-log pi); with C, C times that plus "
        "1 - C times the rejected response's",
        low=0,
    )
    length_normalize: bool | None = flag(
        None,
        "compute margins from mean instead of summed log-probabilities; none: yes for ipo and simpo, no for the others",
    )


@dataclass(slots=True)
class Example:
    """A pair's two responses after their shared prompt, the C it is trained with, the reference's log π of both (nats,
    summed over the response), and the consistency that its record holds."""

    chosen: Tokens
    rejected: Tokens
    consistency: float = 1.0
    reference: Sequence[float] = (nan, nan)
    recorded: float | None = None


class Stage:
    """DPO: a step's loss is the mean over all pairs of the global batch."""

    model = "logprobs"
    unit = "pairs"
    made_for_policy = True

    def __init__(self, options: Options, about: dict):
        self.options = self.held_out = o = options
        o.check()
        self.prepared, self.mean = False, None  # mean: of the C's that the pairs hold which are trained on
        self.cap: float | None = None  # of the mean margin h, at which the loss is least: logit of a C common to all
        self.method = _method(o.method, about.get("method"))
        self.gamma = GAMMA if o.simpo_gamma is None else o.simpo_gamma
        self.token_means = o.loss in PER_TOKEN if o.length_normalize is None else o.length_normalize
        self.reference = None if o.loss in WITHOUT_REFERENCE else "reference"
        target = {"ipo": "1 / (2 beta)", "simpo": self.gamma and f"--simpo_gamma {self.gamma:g}"}.get(o.loss)
        self.mirrored = not target
        self._check(target)
        self.settings = {"method": self.method, "beta": o.beta, "fixed_consistency": o.fixed_consistency}
        if o.loss != "sigmoid" or o.rpo_alpha or self.token_means:  # else it is the loss of every earlier version
            self.settings |= {"loss": o.loss, "rpo_alpha": o.rpo_alpha, "length_normalize": self.token_means}
            self.settings |= {"simpo_gamma": self.gamma} if o.loss == "simpo" else {}
        self.settings |= o.settings()
        self.label = self.method if o.loss == "sigmoid" else f"{self.method}-{o.loss}"
        reference = "reference: the policy that training starts from" if self.reference else "no reference"
        unit = "nats per token" if self.token_means else "nats"
        how = f"method {self.method}, loss {o.loss}, beta {o.beta:g}"
        self.summary = f"{how}, {reference}; the log has margins in beta x {unit}"

    def _check(self, target: str | None) -> None:
        """Raises UserError for a flag that would decide nothing, and for C with a loss that has a `target`."""
        o = self.options
        if o.simpo_gamma is not None and o.loss != "simpo":
            raise UserError(f"--simpo_gamma belongs to --loss simpo, but the loss is {o.loss}")
        by_method = self.method != "original" and o.fixed_consistency is None
        if target and (by_method or o.fixed_consistency not in (None, 1)):
            c = f"--method {self.method}" if by_method else f"--fixed_consistency {o.fixed_consistency:g}"
            free = ", or --simpo_gamma 0" if o.loss == "simpo" else ""
            raise UserError(
                f"--loss {o.loss} with {c}: this loss pulls every margin to a target ({target}) and its mirror image "
                "to the opposite one, so that their mixture by C is not defined; give --fixed_consistency 1 (C = 1 for "
                f"every pair), or --loss sigmoid or hinge{free}"
            )

    def prepare(
        self, records: Iterable[Pair], chat: Chat, limit: int, dropped: Counter[str]
    ) -> list[tuple[str, Example]]:
        """(uuid, example) of every pair whose two responses fit `limit` tokens; the others are counted in `dropped`.

        The examples' reference is what the pairs hold, NaN where they hold none.
        """
        kept = []
        for record in records:
            texts = [record.selected[-1].content, record.rejected[-1].content]
            complete = [not record.selected_truncated, not record.rejected_truncated]
            chosen, rejected = chat.encode_within_limit(record.prompt, texts, complete, limit, sampled=record.sampled)
            reasons = [row for row in (chosen, rejected) if isinstance(row, str)]
            if reasons:
                dropped[reasons[0]] += 1
            elif not chosen.num_response_tokens or not rejected.num_response_tokens:
                dropped["no token to train on"] += 1
            elif texts[0] == texts[1] or chosen.ids == rejected.ids:
                dropped["both responses are the same"] += 1
            else:
                logps = tuple(nan if v is None else v for v in (record.selected_logp, record.rejected_logp))
                kept.append((record.uuid, Example(chosen, rejected, 1.0, logps, record.consistency)))
        self._weigh([example for _, example in kept])
        return kept

    def _weigh(self, examples: Sequence[Example]) -> None:
        """Set every example's C. The mean is over the pairs that are trained on, which are prepared first; a pair whose
        c is null takes it. Held-out pairs, which come later, are weighed alike."""
        fixed, recorded = self.options.fixed_consistency, [e.recorded for e in examples if e.recorded is not None]
        first, self.prepared = not self.prepared, True
        if first and fixed is None and self.method != "original" and examples and not recorded:
            raise UserError(
                f"--method {self.method}: no pair has a consistency; cal_consistency.py --file2 gives them one"
            )
        if fixed is None:
            fixed = 1.0 if self.method == "original" else None
        if first and recorded:
            self.mean = sum(recorded) / len(recorded)
        mean = self.mean
        for example in examples:
            own = None if self.method == "consistency_avg" else example.recorded
            example.consistency = fixed if fixed is not None else mean if own is None else own
        in_reverse = sum(example.consistency < 0.5 for example in examples)
        if first and 2 * in_reverse > len(examples) and not self.options.allow_reversed:
            c = f"mean C {mean:.3f}" if fixed is None else f"--fixed_consistency {fixed:g}"
            raise UserError(
                f"{in_reverse} of {len(examples)} pairs have C < 1/2 ({c}) and would be trained in reverse, to prefer "
                "the rejected response. Check that both rankings are of the right models and have the right sign; "
                "--allow_reversed trains all the same"
            )

    def facts(self, examples: Sequence[Example]) -> dict[str, object]:
        """How many pairs there are, and with which C they are trained."""
        recorded = [e.recorded for e in examples if e.recorded is not None]
        used = [example.consistency for example in examples]
        mean, reverse = sum(used) / len(used), sum(c < 0.5 for c in used)
        if self.options.loss == "sigmoid" and len({*used}) == 1 and 0.5 < mean < 1:
            self.cap = math.log(mean / (1 - mean))
        source = self.method if self.options.fixed_consistency is None else "--fixed_consistency"
        log.info(
            "%d pairs, method %s: trained with a mean C of %.3f, %s in reverse (C < 1/2)",
            len(used),
            source,
            mean,
            reverse or "none",
        )
        return {
            "pairs": len(used),
            "pairs_without_c": len(used) - len(recorded),
            "mean_c": sum(recorded) / len(recorded) if recorded else None,
            "mean_c_used": mean,
            "trained_in_reverse": reverse,
        }

    def group(self, example: Example) -> list[Tokens]:
        """The chosen response, then the rejected one."""
        return [example.chosen, example.rejected]

    def weight(self, example: Example) -> int:
        """One pair."""
        return 1

    def loss(self, model, batch: Batch, examples: Sequence[Example]) -> tuple[Tensor, dict[str, Tensor]]:
        """Summed over the pairs; log-probabilities are sums over response tokens, end-of-turn included. `kl`, in nats
        per response: log π_ref - log π on the pairs' responses, KL(reference || policy) as far as these are drawn from
        the reference at random."""
        import torch

        from cream import losses
        from cream.model.batches import send

        chosen, rejected = batch.response_sums(model(batch)).view(-1, 2).unbind(1)
        lengths = [[max(1, tokens.num_response_tokens) for tokens in self.group(example)] for example in examples]
        rows = [(*e.reference, e.consistency, *counts) for e, counts in zip(examples, lengths, strict=True)]
        *references, c, chosen_tokens, rejected_tokens = send(torch.tensor(rows), chosen.device).unbind(1)
        c = c if self.mirrored else None
        scores = ratios = [chosen, rejected]
        if self.reference:
            scores = ratios = [losses.log_ratio(*each) for each in zip(ratios, references, strict=True)]
        if self.token_means:
            scores = [scores[0] / chosen_tokens, scores[1] / rejected_tokens]
        values, margins = losses.preference_loss(*scores, self.options.beta, c, self._loss())
        metrics = {
            "margin": margins.sum(),
            "accuracy": (margins > 0).float().sum(),
            "logp_chosen": chosen.sum(),
            "logp_rejected": rejected.sum(),
        }
        if self.reference:
            metrics |= {
                "ratio_chosen": ratios[0].sum(),
                "ratio_rejected": ratios[1].sum(),
                "ratio_abs": (ratios[0].abs() + ratios[1].abs()).sum() / 2,
                "kl": -(ratios[0] + ratios[1]).sum() / 2,
                "kl_per_token": -(ratios[0] / chosen_tokens + ratios[1] / rejected_tokens).sum() / 2,
            }
        if self.options.rpo_alpha:
            nll = losses.likelihood_loss(chosen / chosen_tokens, rejected / rejected_tokens, c)
            metrics["nll"] = nll.sum()
            values = values + self.options.rpo_alpha * nll
        total = values.sum()
        return total, {name: value.detach() for name, value in ({"loss": total} | metrics).items()}

    def _loss(self) -> Callable[[Tensor], Tensor]:
        """The loss of --loss, of a margin h."""
        from cream import losses

        own = {"ipo": {"beta": self.options.beta}, "simpo": {"gamma": self.gamma}}
        return partial(getattr(losses, self.options.loss), **own.get(self.options.loss, {}))

    def check_first(self, metrics: dict[str, float], tolerance: float) -> None:
        """At the first step policy == reference, so that every log-ratio is 0 and the loss is that of h = 0; nothing is
        known of it without a reference."""
        if not self.reference or metrics["ratio_abs"] <= tolerance:
            return
        import torch

        first = self._loss()(torch.zeros(())).item()
        more = " and the likelihood term" if self.options.rpo_alpha else ""
        raise UserError(
            f"at the first step the policy differs from its own reference by {metrics['ratio_abs']:.3g} nats on "
            f"average (loss {metrics['loss']:.4f}, expected {first:.4f}{more}): likely causes are "
            "dropout, another dtype or attention kernel, or weights that changed on disk; nothing was trained"
        )


def _method(given: str | None, recorded: str | None) -> str:
    """--method, or what the sidecar of the pairs has. Raises UserError where they contradict each other."""
    if given and recorded and given != recorded:
        raise UserError(
            f"--method {given}: the pairs were made for {recorded}; leave --method out, or make the pairs again"
        )
    return given or recorded or "original"
