"""The log of a training run: metrics and speed, without making the device wait between the lines."""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from accelerate import Accelerator

from cream.errors import UserError
from cream.files.raw import atomic, sync, with_filename
from cream.model.hardware import matrix_rate, peak_memory


def lines_until(step: int, data: bytes) -> bytes:
    """The lines of a log up to a step; a line that a kill or a full disk truncated is skipped."""
    kept = []
    for line in data.splitlines(keepends=True):
        with suppress(ValueError):
            if json.loads(line)["step"] <= step:
                kept.append(line.rstrip(b"\r\n") + b"\n")
    return b"".join(kept)


class Log:
    """Sums a step's metrics on the device, and every `every` steps writes their means to log.jsonl and trackers.

    A run that resumes continues from what `since_line` gave when its state was saved, by `resume_from`.
    """

    def __init__(self, accelerator: Accelerator, run: Path, start: int, steps: int, every: int, unit: str, progress):
        self.accelerator, self.unit, self.steps = accelerator, unit, steps
        self.every, self.progress = every, progress
        self.sums: dict[str, torch.Tensor] = {}
        self.total = self.computed = self.tokens = self.flops = 0  # computed: since the start or the resumption
        self.last: dict[str, float] = {}
        self.finite = torch.ones((), dtype=torch.bool, device=accelerator.device)
        self.rate = None
        if accelerator.device.type == "cuda":
            dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
            self.rate = matrix_rate(accelerator.device, dtype) * accelerator.num_processes
        self.clock = time.monotonic()
        self.path = run / "log.jsonl"
        if accelerator.is_main_process:
            kept = lines_until(start, self.path.read_bytes()) if self.path.exists() else b""
            with atomic(self.path) as file:
                file.write(kept)

    def add(self, metrics: dict[str, torch.Tensor]) -> None:
        """Sums of a micro-batch."""
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0) + value

    def since_line(self) -> tuple[dict[str, float], int]:
        """The metrics' sums over all processes since the last line, and what their mean is over; all must call."""
        if not self.sums:
            return {}, 0
        return dict(zip(self.sums, self._reduced().tolist(), strict=True)), self.total

    def resume_from(self, sums: dict[str, float], total: int) -> None:
        """Continue the sums from there."""
        own = float(self.accelerator.is_main_process)  # the others' shares are in the sums of the first process
        self.sums = {name: torch.tensor(own * value, device=self.finite.device) for name, value in sums.items()}
        self.total = total

    def _reduced(self) -> torch.Tensor:
        return self.accelerator.reduce(torch.stack(list(self.sums.values())), "sum")

    def add_work(self, tokens: int, flops: float) -> None:
        """Tokens and floating-point operations of a global batch, all processes together."""
        self.tokens += tokens
        self.flops += flops

    def check_finite(self, step: int) -> None:
        """Raises UserError when a gradient norm was not finite: what was trained since is worthless."""
        if not self.finite:
            raise UserError(
                f"by step {step} a gradient is not finite; nothing was saved after the last checkpoint. A lower --lr, "
                "or float32 (--bf16 no), may help"
            )

    def sync(self) -> None:
        """Make the lines so far survive a power cut: a run that resumes after this step does not write them again."""
        if self.accelerator.is_main_process:
            with with_filename(self.path):
                sync(self.path)

    def held_out(self, step: int, evaluate: Callable[[], dict[str, float]]) -> None:
        """A line of metrics of held-out examples after a step; the time that these take counts in no rate."""
        began = time.monotonic()
        metrics = evaluate()
        self.clock += time.monotonic() - began
        self.last = self.last | metrics
        self._write(step, metrics)

    def _write(self, step: int, metrics: dict[str, float]) -> None:
        self.accelerator.log(metrics, step=step)
        if self.accelerator.is_main_process:
            with with_filename(self.path), open(self.path, "a") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")
            self.progress(step, self.steps, metrics)

    def end_step(self, step: int, total: int, norm, lr: float, check: Callable | None) -> None:
        """After a step's backward passes; `check` sees the metrics before they are written."""
        self.total += total
        self.computed += total
        self.finite &= torch.as_tensor(norm, device=self.finite.device).isfinite()
        if step % self.every and step != self.steps and check is None:
            return
        means = self._reduced() / self.total
        metrics = dict(zip(self.sums, means.tolist(), strict=True))
        metrics |= {"grad_norm": float(norm), "lr": lr}
        self.check_finite(step)
        if check is not None:
            check(metrics)
        metrics |= self._speed()
        self.sums, self.last = {}, metrics
        self.total = self.computed = self.tokens = self.flops = 0
        self._write(step, metrics)

    def _speed(self) -> dict[str, float]:
        """Rates since the last line, of all processes together; peak memory of this one; MFU where a GPU trains."""
        now = time.monotonic()
        seconds, self.clock = now - self.clock, now
        speed = {f"{self.unit}_per_second": self.computed / seconds, "tokens_per_second": self.tokens / seconds}
        speed["peak_memory_gb"] = peak_memory(self.accelerator.device) / 1e9
        return speed if self.rate is None else speed | {"mfu": self.flops / seconds / self.rate}
