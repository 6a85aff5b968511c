"""The one training loop, on accelerate.

A step's gradient is the mean over the whole global batch (pairs for DPO, response tokens for SFT), whatever the
packing, accumulation or number of processes: every rank plans the same global batch and takes every world-size-th
micro-batch of it; each rank gets the same number of micro-batches (an empty one carries zero weight), so that
collectives never hang.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from cream.cli import interrupts
from cream.model.batches import by_tokens
from cream.model.hardware import Budget, budget, keep_freed_memory, numel
from cream.training import state
from cream.training.heldout import HeldOut
from cream.training.log import Log
from cream.training.options import Optimisation
from cream.training.parallel import Replicas, Shards

log = logging.getLogger("cream")
STATE_EVERY = 1800.0  # at most so many seconds of training are lost if the process is killed
STATE_SHARE = 20  # and at least so many times what saving the last one took


def global_batches(count: int, size: int, epochs: int, seed: int) -> Iterator[list[int]]:
    """Indices of each step's examples: a seeded permutation per epoch, cut into `size`; its last may be short."""
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(count).tolist()
        for start in range(0, count, size):
            yield order[start : start + size]


def micro_batches(shapes: Sequence[tuple[int, int]], max_tokens: int, world: int, rank: int) -> list[list[int]]:
    """This rank's share of a global batch, in micro-batches of at most `max_tokens`; [] stands for an empty one.

    shapes: (rows, width) of every example. There are as few micro-batches as the budget allows, the same number for
    each rank, and they are as even as that many can be.
    """
    plan = by_tokens(shapes, max_tokens)
    number = -(-len(plan) // world) * world
    low, high = 0, max_tokens
    while high - low > 1:
        middle = (low + high) // 2
        if len(finer := by_tokens(shapes, middle)) <= number:
            plan, high = finer, middle
        else:
            low = middle
    return [*plan, *([[]] * (-len(plan) % world))][rank::world]


def common_budget(
    accelerator: Accelerator, weights: Replicas | Shards, max_tokens: int | None, moments: int = 8
) -> Budget:
    """Tokens of a micro-batch: `max_tokens`, or as many as fit in the memory of each process; the same number for all,
    so that all plan the same micro-batches. `moments`: the optimiser's bytes a trained weight."""
    device = accelerator.device
    mine = budget(max_tokens, weights.whole.model, device, training=True, shards=weights.shards, moments=moments)
    tokens = int(accelerator.gather(torch.tensor([mine.tokens], device=device)).min())
    return Budget(tokens, common=accelerator.num_processes > 1 or isinstance(weights, Shards))


def save_steps(steps: int, saves: int) -> set[int]:
    """The steps (counted from 1) after which a checkpoint is saved: `saves` of them, evenly, the last step included."""
    return {math.ceil(steps * k / saves) for k in range(1, saves + 1)}


def learning_rate(done: int, steps: int, warmup: int) -> float:
    """Share of the peak rate in the step after `done` of `steps`: linear up over `warmup` steps, then cosine to 0."""
    if done < warmup:
        return (done + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / max(1, steps - warmup)))


def train(
    accelerator: Accelerator,
    weights: Replicas | Shards,
    stage,
    examples: Sequence,
    flags: Optimisation,
    seed: int,
    tokens: Budget,
    run: Path,
    save: Callable[[int], None],
    progress: Callable[[int, int, dict], None] = lambda step, steps, metrics: None,
    check_first: Callable[[dict], None] = lambda metrics: None,
    held_out: HeldOut | None = None,
) -> dict[str, float]:
    """Train `weights` on `examples` by `stage`'s loss; returns the last logged metrics.

    `tokens` bound a micro-batch, `save(step)` writes a checkpoint, `check_first` sees the first step's metrics,
    `held_out` examples are looked at before each checkpoint and as often as they say. An interrupted run resumes from
    its last saved state in `run`, which is saved with each checkpoint but the last, and where these are long in coming;
    a signal to any process saves it after the step in flight and ends all by Interrupted.
    """
    size = flags.global_batch(accelerator.num_processes)
    plan = list(global_batches(len(examples), size, flags.epoch, seed))
    batches = GlobalBatches(accelerator, weights, stage, examples, tokens)
    resumed = state.resume(accelerator, weights, run)
    start = resumed.step
    logger = Log(accelerator, run, start, len(plan), flags.log_every, stage.unit, progress)
    logger.resume_from(resumed.sums, resumed.total)
    saved = save_steps(len(plan), flags.saves)
    warmup = math.ceil(flags.warmup_step_ratio * len(plan))
    weights.model.train()
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    saved_at, every = time.monotonic(), STATE_EVERY
    with interrupts.deferred():
        for step, indices in enumerate(plan[start:], start + 1):
            total = batches.backward(indices, logger)
            lr = flags.lr * learning_rate(step - 1, len(plan), warmup)
            norm = weights.step(lr, flags.max_grad_norm)
            logger.end_step(step, total, norm, lr, check_first if step == 1 else None)
            if step == start + 1:
                weights.check_equal()
            if held_out and held_out.due(step, step in saved):
                logger.held_out(step, partial(held_out, accelerator, weights, tokens.tokens))
            due = time.monotonic() - saved_at > every and state.fits(run, weights.whole, flags.moment_bytes)
            asked, due = any_process(accelerator, interrupts.received(), due)
            if step in saved or asked or due:
                logger.check_finite(step)
                logger.sync()
            if step in saved:
                save(step)
            if step < len(plan) and (asked or due or step in saved):
                began = time.monotonic()
                state.save(accelerator, run, step, *logger.since_line())
                saved_at = time.monotonic()
                every = max(STATE_EVERY, STATE_SHARE * (saved_at - began))
            if asked and step < len(plan):
                accelerator.wait_for_everyone()
                interrupts.raise_interrupted(agreed=True)
    return logger.last


def any_process(accelerator: Accelerator, *flags: bool) -> list[bool]:
    """Whether each flag is set in any of the processes, so that all do the same."""
    if accelerator.num_processes == 1:
        return list(flags)
    return accelerator.gather(torch.tensor([flags], device=accelerator.device)).any(dim=0).tolist()


class GlobalBatches:
    """The gradient of a global batch: what its examples cost, and in which micro-batches it is computed."""

    def __init__(self, accelerator: Accelerator, weights: Replicas | Shards, stage, examples: Sequence, tokens: Budget):
        self.accelerator, self.weights, self.stage, self.examples = accelerator, weights, stage, examples
        self.budget, model = tokens, weights.whole
        self.shapes = [model.shape(stage.group(example)) for example in examples]
        self.scored = [sum(t.num_response_tokens for t in stage.group(example)) for example in examples]
        self.flops = model.flops()
        trained = sum(numel(p) for p in model.parameters() if p.requires_grad)
        self.passes = 2 + trained / sum(map(numel, model.parameters()))  # forward; of inputs; of weights

    def backward(self, indices: Sequence[int], logger: Log) -> int:
        """Add the mean gradient over these examples of the global batch; returns what the mean is over.

        Out of memory, the whole step is done again with half the tokens a micro-batch, where the budget allows it.
        """
        total = sum(self.stage.weight(self.examples[i]) for i in indices)
        while True:
            try:
                computed = self._micro_batches(indices, total)
                break
            except RuntimeError as error:
                self.budget.halve(error)
                self.weights.zero_grad()
        for metrics in computed:
            logger.add(metrics)
        tokens = sum(self.shapes[i][0] * self.shapes[i][1] for i in indices)
        scored = sum(self.scored[i] for i in indices)
        logger.add_work(tokens, self.passes * (tokens * self.flops[0] + scored * self.flops[1]))
        return total

    def _micro_batches(self, indices: Sequence[int], total: int) -> list[dict[str, torch.Tensor]]:
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        mine = micro_batches([self.shapes[i] for i in indices], self.budget.tokens, world, rank)
        slopes, computed = None, []
        if hasattr(self.stage, "of_all"):
            slopes, metrics = self._of_all(indices, mine)
            computed.append({name: value * total / world for name, value in metrics.items()})
        for number, chunk in enumerate(mine, 1):
            weight = 1.0 if chunk else 0.0  # an empty one: some example, of no weight
            members = [self.examples[indices[i]] for i in chunk or [0]]
            more = () if slopes is None else (slopes[chunk or [0]] * total,)
            with self.weights.micro_batch(last=number == len(mine)):
                with self.accelerator.autocast():  # for packing, too, which asks what products run in
                    batch = self.weights.whole.pack([self.stage.group(example) for example in members])
                    loss, metrics = self.stage.loss(
                        self.weights.model, batch.to(self.accelerator.device), members, *more
                    )
                self.weights.backward(loss * (weight * world / total))
            computed.append({name: weight * value.float() for name, value in metrics.items()})
        return computed

    def _of_all(self, indices: Sequence[int], mine: list[list[int]]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The slopes of the stage's term of the whole global batch, (examples, responses, outputs): its derivatives by
        the head's outputs, which are computed once more for it, without gradients; and its metrics.

        The chain rule does the rest: the gradient of sum(slopes x outputs), taken micro-batch by micro-batch on
        whatever process, is the term's (gradient caching, arXiv 2101.06983, §3).
        """
        examples = [self.examples[i] for i in indices]
        outputs = outputs_of(self.accelerator, self.weights.whole, self.stage, examples, mine).requires_grad_()
        term, metrics = self.stage.of_all(outputs, examples)
        (slopes,) = torch.autograd.grad(term, outputs)
        return slopes, {name: value.detach() for name, value in metrics.items()}


@torch.no_grad()
def outputs_of(accelerator: Accelerator, model, stage, examples: Sequence, mine: list[list[int]]) -> torch.Tensor:
    """A head's outputs for all responses of the examples, (examples, responses, outputs); `mine` are this process's
    micro-batches. What is drawn for dropout is drawn again afterwards."""
    device, own = accelerator.device, []
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for chunk in mine:
            groups = [stage.group(examples[i]) for i in chunk or [0]]
            with accelerator.autocast():
                outputs = model(model.pack(groups).to(device)).float()
            own += zip(chunk, outputs.view(len(groups), -1, outputs.shape[-1]).tolist(), strict=False)
    values = dict(gather_object(own))
    return torch.tensor([values[i] for i in range(len(examples))], device=device)
