"""What a training run shows while it lasts."""

import logging
import time
from collections.abc import Callable

from cream.cli import console, screen
from cream.training.heldout import PREFIX

log = logging.getLogger("cream")
SHOWN = ("loss", "margin", "accuracy", "nll", "reward", "gold", "kl_reference", "kl_per_token")
SHOWN += ("length", "entropy", "entropy_sampled", "grad_norm", "lr")  # in a line; log.jsonl has all
SHOWN += tuple(f"{PREFIX}{name}" for name in ("loss", "accuracy", "accuracy_low", "accuracy_high"))
RATE = "_per_second"


class Report:
    """A line for each logged step: its main metrics, the time since training began, and about how long it still takes.
    In a loop, where only the log file has these lines, a bar as well."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.began = clock()
        self.first: tuple[int, float] | None = None  # the first logged step of this run, which may have resumed
        self.shown, self.bar = 0, None

    def __call__(self, step: int, steps: int, metrics: dict[str, float]) -> None:
        now = self.clock()
        self.first = self.first or (step, now)
        values = line(metrics)
        taken = step - self.first[0]  # the first step also compiles and warms up: the estimate is without it
        if 0 < taken and step < steps:
            left = (now - self.first[1]) / taken * (steps - step)
            values += f"  {console.describe_times(now - self.began, left)}"
        log.info("step %d/%d  %s", step, steps, values)
        if screen.in_stage_of_loop():
            self._show(step, steps)

    def _show(self, step: int, steps: int) -> None:
        if self.bar is None:
            self.bar, self.shown = console.bar(steps, "training", "steps", done=step), step
        self.bar.update(step - self.shown)
        self.shown = step
        if step == steps:
            self.bar.close()


def line(metrics: dict[str, float]) -> str:
    """The main metrics of a logged step, and its rate in the stage's own unit, in a line."""
    hidden = ("kl_per_token",) if "margin" in metrics else ()  # of DPO the margin says it
    names = [n for n in metrics if n in SHOWN and n not in hidden]
    values = [f"{n} {metrics[n]:.{4 if n.endswith('loss') else 3}g}" for n in names]
    rates = [f"{metrics[n]:.3g} {n.removesuffix(RATE).replace('_', ' ')}/s" for n in metrics if n.endswith(RATE)]
    return "  ".join([*values, *rates[:1]])
