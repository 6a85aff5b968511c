"""The one training loop, on accelerate.

A step's gradient is the mean over the whole global batch (pairs for DPO, answer tokens for SFT), whatever the packing,
accumulation or number of processes: every rank plans the same global batch and takes every world-size-th micro-batch of
it; each rank gets the same number of micro-batches (an empty one carries zero weight), so that collectives never hang.
"""

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from cream.errors import UserError

log = logging.getLogger("cream")


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    `micro_batch` examples per process and backward pass, `accumulation` of them per step; `saves` checkpoints spread
    evenly, the last at the end; learning rate: linear warm-up over `warmup_ratio` of the steps, then cosine to 0.
    """

    epochs: int = 1
    micro_batch: int = 2
    accumulation: int = 1
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


def micro_batches(indices: Sequence[int], lengths: Sequence[int], size: int, world: int, rank: int) -> list[list[int]]:
    """This rank's share of a global batch, in micro-batches of like length; [] stands for an empty one."""
    ordered = sorted(indices, key=lambda i: (-lengths[i], i))
    chunks = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    chunks += [[]] * (-len(chunks) % world)
    return chunks[rank::world]


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
    model,
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
    world, rank = accelerator.num_processes, accelerator.process_index
    lengths = [stage.length(example) for example in examples]
    size = schedule.micro_batch * schedule.accumulation * world
    plan = list(global_batches(len(examples), size, schedule.epochs, schedule.seed))
    model, optimizer, scheduler = _prepare(accelerator, model, schedule, len(plan))
    start = _resume(accelerator, run)
    logger = _Log(accelerator, run, start, len(plan), schedule.log_every, stage.unit, progress)
    saved = save_steps(len(plan), schedule.saves)
    model.train()
    for step, indices in enumerate(plan[start:], start + 1):
        total = sum(stage.weight(examples[i]) for i in indices)
        mine = micro_batches(indices, lengths, schedule.micro_batch, world, rank)
        for number, chunk in enumerate(mine, 1):
            with nullcontext() if number == len(mine) else accelerator.no_sync(model):
                loss, metrics = _forward(accelerator, model, stage, examples, chunk or indices[:1])
                weight = 1.0 if chunk else 0.0
                accelerator.backward(loss * (weight * world / total))
            logger.add(metrics, weight)
        norm = accelerator.clip_grad_norm_(model.parameters(), schedule.max_grad_norm)
        logger.end_step(step, total, norm, scheduler.get_last_lr()[0], stage.check_first if step == 1 else None)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step == start + 1:
            _check_equal(accelerator, model)
        if step in saved:
            logger.check_finite(step)
            save(model, step)
            _save_state(accelerator, run, step)
    accelerator.end_training()
    if accelerator.is_main_process:
        shutil.rmtree(run / "state", ignore_errors=True)
    return logger.last


def _forward(accelerator, model, stage, examples, chunk):
    members = [examples[i] for i in chunk]
    with accelerator.autocast():
        return stage.loss(model, stage.collate(members).to(accelerator.device), members)


def _prepare(accelerator: Accelerator, model, schedule: Schedule, steps: int):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=schedule.lr, weight_decay=schedule.weight_decay)
    warmup = math.ceil(schedule.warmup_ratio * steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: learning_rate(done, steps, warmup))
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(scheduler)  # not prepared: a prepared one steps world-size times
    return model, optimizer, scheduler


def _check_equal(accelerator: Accelerator, model) -> None:
    """After a step all processes hold the same weights; raises UserError where a gradient was not shared."""
    total = sum(p.detach().double().sum() for p in model.parameters() if p.requires_grad).reshape(1)
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


class _Log:
    """Sums a step's metrics on the device, and every `every` steps writes their means to log.jsonl and trackers."""

    def __init__(self, accelerator: Accelerator, run: Path, start: int, steps: int, every: int, unit: str, progress):
        self.unit = unit
        self.accelerator, self.steps, self.every, self.progress = accelerator, steps, every, progress
        self.sums: dict[str, torch.Tensor] = {}
        self.total = 0
        self.last: dict[str, float] = {}
        self.finite = torch.ones((), dtype=torch.bool, device=accelerator.device)
        self.clock = time.monotonic()
        self.path = run / "log.jsonl"
        if accelerator.is_main_process:
            lines = self.path.read_text().splitlines() if self.path.exists() else []
            kept = [line for line in lines if json.loads(line)["step"] <= start]
            self.path.write_text("".join(line + "\n" for line in kept))

    def add(self, metrics: dict[str, torch.Tensor], weight: float) -> None:
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0) + weight * value.float()

    def check_finite(self, step: int) -> None:
        """Raises UserError when a gradient norm was not finite: what was trained since is worthless."""
        if not self.finite:
            raise UserError(
                f"by step {step} a gradient is not finite; nothing was saved after the last checkpoint. A lower --lr, "
                "or float32 (--bf16 no), may help"
            )

    def end_step(self, step: int, total: int, norm, lr: float, check: Callable | None) -> None:
        self.total += total
        self.finite &= torch.as_tensor(norm, device=self.finite.device).isfinite()
        if step % self.every and step != self.steps and check is None:
            return
        sums = self.accelerator.reduce(torch.stack(list(self.sums.values())), "sum") / self.total
        metrics = dict(zip(self.sums, sums.tolist(), strict=True))
        metrics |= {"grad_norm": float(norm), "lr": lr}
        self.check_finite(step)
        if check is not None:
            check(metrics)
        now = time.monotonic()
        metrics[f"{self.unit}_per_second"] = self.total / (now - self.clock)
        self.sums, self.total, self.clock, self.last = {}, 0, now, metrics
        self.accelerator.log(metrics, step=step)
        if self.accelerator.is_main_process:
            with open(self.path, "a") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")
            self.progress(step, self.steps, metrics)
