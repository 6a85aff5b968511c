"""The one training loop, on accelerate.

A step's gradient is the mean over the whole global batch (pairs for DPO, answer tokens for SFT), whatever the packing,
accumulation or number of processes: every rank plans the same global batch and takes every world-size-th micro-batch of
it; each rank gets the same number of micro-batches (an empty one carries zero weight), so that collectives never hang.
"""

import logging
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from cream.batches import by_tokens
from cream.errors import UserError
from cream.hardware import budget, flops_per_token, out_of_memory
from cream.logprobs import LogProbs
from cream.training.log import Log

log = logging.getLogger("cream")


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    `batch_size` examples per process and step, in micro-batches of at most `max_tokens` tokens (None: what the memory
    carries); `saves` checkpoints spread evenly, the last at the end; learning rate: linear warm-up over `warmup_ratio`
    of the steps, then cosine to 0.
    """

    epochs: int = 1
    batch_size: int = 2
    max_tokens: int | None = None
    lr: float = 1e-6
    weight_decay: float = 0.01
    warmup_ratio: float = 0.1
    max_grad_norm: float = 1.0
    saves: int = 1
    log_every: int = 10
    seed: int = 0


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
    model: LogProbs,
    stage,
    examples: Sequence,
    schedule: Schedule,
    run: Path,
    save: Callable[[object, int], None],
    progress: Callable[[int, int, dict], None] = lambda step, steps, metrics: None,
) -> dict[str, float]:
    """Train `model` on `examples` by `stage`'s loss; returns the last logged metrics.

    `save(model, step)` writes a checkpoint. A run that was interrupted goes on from its last saved state in `run`.
    """
    size = schedule.batch_size * accelerator.num_processes
    plan = list(global_batches(len(examples), size, schedule.epochs, schedule.seed))
    batches = GlobalBatches(accelerator, model, stage, examples, schedule.max_tokens)
    model, optimizer, scheduler = _prepare(accelerator, model, schedule, len(plan))
    start = _resume(accelerator, run)
    logger = Log(accelerator, run, start, len(plan), schedule.log_every, stage.unit, progress)
    saved = save_steps(len(plan), schedule.saves)
    model.train()
    for step, indices in enumerate(plan[start:], start + 1):
        total = batches.backward(model, indices, logger)
        norm = accelerator.clip_grad_norm_(model.parameters(), schedule.max_grad_norm)
        logger.end_step(step, total, norm, scheduler.get_last_lr()[0], stage.check_first if step == 1 else None)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=False)  # some gradients are added where they stand
        if step == start + 1:
            _check_equal(accelerator, model)
        if step in saved:
            logger.check_finite(step)
            save(model, step)
            if step < len(plan):
                _save_state(accelerator, run, step)
    accelerator.end_training()
    if accelerator.is_main_process:
        shutil.rmtree(run / "state", ignore_errors=True)
    return logger.last


class GlobalBatches:
    """The gradient of a global batch: what its examples cost, and in which micro-batches it is computed."""

    def __init__(self, accelerator: Accelerator, model: LogProbs, stage, examples: Sequence, max_tokens: int | None):
        self.accelerator, self.stage, self.examples, self.pack = accelerator, stage, examples, model.pack
        self.shapes = [model.shape(stage.group(example)) for example in examples]
        self.scored = [sum(t.num_answer_tokens for t in stage.group(example)) for example in examples]
        recompute = getattr(model.policy, "is_gradient_checkpointing", False)
        device = accelerator.device
        self.budget = budget(max_tokens, model.policy, device, training=True, recompute=recompute)
        tokens = torch.tensor([self.budget.tokens], device=device)
        self.budget.tokens = int(accelerator.gather(tokens).min())  # all plan the same micro-batches
        self.flops = flops_per_token(model.policy)
        trained = [p.numel() * p.requires_grad for p in model.parameters()]
        self.passes = 2 + sum(trained) / sum(p.numel() for p in model.parameters())  # forward; of inputs; of weights

    def backward(self, model, indices: Sequence[int], logger: Log) -> int:
        """Add the mean gradient over these examples of the global batch; returns what the mean is over.

        Out of memory, the whole step is done again with half the tokens a micro-batch; with several processes, which
        would wait for each other, it is an error.
        """
        total = sum(self.stage.weight(self.examples[i]) for i in indices)
        while True:
            try:
                found = self._micro_batches(model, indices, total)
                break
            except RuntimeError as error:
                if self.accelerator.num_processes > 1 and out_of_memory(error):
                    raise UserError(
                        f"out of memory with {self.budget.tokens} tokens a micro-batch; give a smaller "
                        "--max_tokens_per_batch"
                    ) from None
                self.budget.halve(error)
                model.zero_grad(set_to_none=False)
        for metrics in found:
            logger.add(metrics)
        tokens = sum(self.shapes[i][0] * self.shapes[i][1] for i in indices)
        scored = sum(self.scored[i] for i in indices)
        logger.worked(tokens, self.passes * (tokens * self.flops[0] + scored * self.flops[1]))
        return total

    def _micro_batches(self, model, indices: Sequence[int], total: int) -> list[dict[str, torch.Tensor]]:
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        mine = micro_batches([self.shapes[i] for i in indices], self.budget.tokens, world, rank)
        found = []
        for number, chunk in enumerate(mine, 1):
            weight = 1.0 if chunk else 0.0  # an empty one: some example, of no weight
            members = [self.examples[indices[i]] for i in chunk or [0]]
            batch = self.pack([self.stage.group(example) for example in members]).to(self.accelerator.device)
            with nullcontext() if number == len(mine) else self.accelerator.no_sync(model):
                with self.accelerator.autocast():
                    loss, metrics = self.stage.loss(model, batch, members)
                self.accelerator.backward(loss * (weight * world / total))
            found.append({name: weight * value.float() for name, value in metrics.items()})
        return found


def _prepare(accelerator: Accelerator, model, schedule: Schedule, steps: int):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=schedule.lr, weight_decay=schedule.weight_decay, fused=True)
    warmup = math.ceil(schedule.warmup_ratio * steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: learning_rate(done, steps, warmup))
    if accelerator.distributed_type == DistributedType.NO:
        model.accumulate_in_place()
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(scheduler)  # not prepared: a prepared one steps world-size times
    return model, optimizer, scheduler


def _check_equal(accelerator: Accelerator, model) -> None:
    """After a step all processes hold the same weights; raises UserError where a gradient was not shared."""
    total = sum(p.detach().sum().double() for p in model.parameters() if p.requires_grad).reshape(1)
    totals = accelerator.gather(total)
    if not torch.equal(totals, totals[:1].expand_as(totals)):
        raise UserError(f"the processes hold different weights after a step: their sums are {totals.tolist()}")


# Interruption: the last saved state of the libraries, replaced only by a newer whole one ------------------------------


def _save_state(accelerator: Accelerator, run: Path, step: int) -> None:
    folder = run / "state" / str(step)
    accelerator.save_state(str(folder))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (run / "state" / "whole").write_text(str(step))
        for older in (run / "state").iterdir():
            if older.is_dir() and older != folder:
                shutil.rmtree(older)


def _resume(accelerator: Accelerator, run: Path) -> int:
    marker = run / "state" / "whole"
    if not marker.exists():
        return 0
    step = int(marker.read_text())
    accelerator.load_state(str(run / "state" / str(step)))
    if accelerator.is_main_process:
        log.info("resuming after step %d", step)
    return step
