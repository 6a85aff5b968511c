"""Held-out examples: what a stage's loss and metrics are on records that no step trains on, while training.

They come from a file of their own, or are a share of the data's prompts. A prompt is never on both sides: neither its
records nor another wording of it in case, punctuation or white space, nor a conversation that continues it.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cream.cli.flags import flag
from cream.errors import UserError
from cream.evaluation.statistics import wilson_interval
from cream.records import Record
from cream.text.held_out import held_out, prompt_key

log = logging.getLogger("cream")
PREFIX = "eval_"  # of a metric's name
LEAKED = "held-out record whose prompt is trained on"


@dataclass
class HeldOutOptions:
    """Held-out records"""

    eval_name: str | None = flag(
        None,
        "held-out records, as --name has the data: their loss and accuracy, with its 95 % interval, are logged while "
        "training; those whose prompt is trained on are skipped",
        decides=False,
    )
    eval_share: float = flag(
        0.0, "instead of --eval_name: the share of the data's prompts that is held out of training", low=0, below=1
    )
    eval_every: int | None = flag(
        None, "steps between two such evaluations; none: at each checkpoint, as always", low=1, decides=False
    )

    @property
    def any(self) -> bool:
        """Whether records are held out."""
        return self.eval_name is not None or self.eval_share > 0

    def check(self) -> None:
        """Raises UserError where these flags contradict each other."""
        if self.eval_name is not None and self.eval_share:
            raise UserError("--eval_name and --eval_share: give one of them")
        if self.eval_every is not None and not self.any:
            raise UserError("--eval_every needs held-out records: --eval_name or --eval_share")

    def settings(self) -> dict[str, object]:
        """{flag: value} that decide the weights: what is held out of the data."""
        return {"eval_share": self.eval_share} if self.eval_share else {}


def split(records: Sequence[Record], share: float, seed: int) -> tuple[list[Record], list[Record]]:
    """(trained on, held out): the records of about a `share` of the prompts. Raises UserError unless some are left."""
    keys = [prompt_key(record) for record in records]
    out = held_out(keys, share, seed)
    both = [*zip(records, keys, strict=True)]
    return [record for record, key in both if key not in out], [record for record, key in both if key in out]


def without_trained(held: Iterable[Record], trained: Iterable[Record], dropped: Counter[str]) -> list[Record]:
    """The held-out records whose prompt is not trained on; the others are counted in `dropped`."""
    keys = {prompt_key(record) for record in trained}
    kept = []
    for record in held:
        if prompt_key(record) in keys:
            dropped[LEAKED] += 1
        else:
            kept.append(record)
    return kept


class HeldOut:
    """A stage's held-out examples. Called with the accelerator, the weights and a micro-batch's tokens, by all
    processes, it gives {metric: mean}, with the Wilson interval of an accuracy (eval_accuracy_low, _high)."""

    def __init__(self, stage, rows: Sequence[tuple[str, object]], every: int | None):
        self.stage, self.rows, self.every = stage, rows, every  # (uuid, example)
        self.examples = [example for _, example in rows]
        self.last: dict[str, float] = {}

    def due(self, step: int, saved: bool) -> bool:
        """Whether they are looked at after this step, at which a checkpoint is `saved` or not."""
        return bool(self.examples) and (saved or self.every is not None and step % self.every == 0)

    def __call__(self, accelerator, weights, tokens: int) -> dict[str, float]:
        import torch

        from cream.training.loop import micro_batches, outputs_of

        model, stage, examples = weights.whole, self.stage, self.examples
        shapes, place = [model.shape(stage.group(example)) for example in examples], accelerator.process_index
        mine, n = micro_batches(shapes, tokens, accelerator.num_processes, place), sum(map(stage.weight, examples))
        model.eval()
        with torch.no_grad():
            totals, computed = Counter(), [self._loss(accelerator, model, chunk) for chunk in mine]
            if hasattr(stage, "of_all"):
                _, metrics = stage.of_all(outputs_of(accelerator, model, stage, examples, mine), examples)
                totals.update({name: n * value.item() for name, value in metrics.items()})
        model.train()
        sums = torch.stack([torch.stack([*metrics.values()]) for metrics in computed]).double().sum(0)
        totals.update(dict(zip(computed[0], accelerator.reduce(sums, "sum").tolist(), strict=True)))
        self.last = {PREFIX + name: total / n for name, total in totals.items()} | {PREFIX + "n": n}
        if "accuracy" in totals:
            low, high = wilson_interval(min(totals["accuracy"], n), n)
            self.last |= {PREFIX + "accuracy_low": low, PREFIX + "accuracy_high": high}
        return self.last

    def _loss(self, accelerator, model, chunk: list[int]) -> dict:
        """The stage's metrics, summed over the examples of a micro-batch; 0 for an empty one."""
        members = [self.examples[i] for i in chunk or [0]]
        with accelerator.autocast():
            batch = model.pack([self.stage.group(example) for example in members]).to(accelerator.device)
            _, metrics = self.stage.loss(model, batch, members)
        return {name: bool(chunk) * value.float() for name, value in metrics.items()}
