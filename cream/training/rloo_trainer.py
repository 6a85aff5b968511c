"""trl's RLOOTrainer with this project's prompts, optimiser, learning rate, log and saving; imported where it trains.

What trl 1.16 would do otherwise: render prompts by the tokenizer's template as it is, exempt norms from weight decay,
begin the warm-up at a learning rate of 0, and say in its telemetry that it was used.
"""

import json
import math
import time
from collections.abc import Callable

import torch
from transformers import Trainer, TrainerCallback
from trl import RLOOTrainer

from cream.cli import interrupts
from cream.errors import UserError
from cream.files.raw import atomic, sync, with_filename
from cream.model.hardware import peak_memory
from cream.records import Message
from cream.training.log import lines_until
from cream.training.loop import STATE_EVERY, STATE_SHARE, any_process, learning_rate, save_steps
from cream.training.optim import build_optimizer

OURS = {  # trl's name of a metric -> its name in log.jsonl
    "loss": "loss",
    "reward": "reward",
    "reward_std": "reward_std",
    "unrewarded": "unrewarded",
    "gold": "gold",
    "kl": "kl_per_token",
    "completions/mean_length": "length",
    "completions/clipped_ratio": "truncated",
    "entropy": "entropy",
    "grad_norm": "grad_norm",
    "learning_rate": "lr",
}
IDLE = ("epoch", "num_tokens", "step_time")


class OnlineTrainer(RLOOTrainer):
    """`encode` gives a prompt's ids; `keep(step)` saves after a step. The rest as RLOOTrainer takes it."""

    def __init__(
        self,
        *,
        encode: Callable[[list[Message]], list[int]],
        keep: Callable,
        warmup: int,
        steps: int,
        optim: str,
        **given,
    ):
        self.encode, self.keep, self.warmup, self.steps, self.optim = encode, keep, warmup, steps, optim
        super().__init__(**given)

    def _send_telemetry(self) -> None:
        """None is sent."""

    def _tokenize_prompts(self, prompts: list) -> tuple[list[list[int]], None, dict]:
        return [self.encode([Message(**message) for message in prompt]) for prompt in prompts], None, {}

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """--optim as in every stage."""
        if self.optimizer is None:
            how = self.optim, self.args.learning_rate, self.args.weight_decay
            self.optimizer = build_optimizer(model or self.model, *how)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """The learning rate as in every stage."""
        if self.lr_scheduler is None:
            share = lambda done: learning_rate(done, self.steps, self.warmup)  # noqa: E731
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, share)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _save_checkpoint(self, model, trial) -> None:
        self.keep(self, self.state.global_step)

    def write_state(self) -> None:
        """What transformers resumes from, without the model card that trl adds."""
        Trainer._save_checkpoint(self, self.model, None)


class Watch(TrainerCallback):
    """Decides after each step what is logged and saved, writes log.jsonl, and ends training after a signal.

    A line is written at each save as well, so that no metric is lost where a run resumes; `progress` and `alarms` get
    each line.
    """

    def __init__(self, job, plan, start: int, fits: Callable[[], bool], progress: Callable, alarms: Callable):
        o = job.config.optimisation
        self.path, self.steps, self.prompts, self.every = job.run / "log.jsonl", plan.steps, plan.prompts, o.log_every
        self.saved, self.fits, self.progress, self.alarms = save_steps(plan.steps, o.saves), fits, progress, alarms
        self.trainer: OnlineTrainer | None = None
        self.last: dict[str, float] = {}
        self.saved_at, self.save_every = time.monotonic(), STATE_EVERY
        self.clock, self.at, self.tokens, self.start = time.monotonic(), start, 0, start

    def open(self) -> None:
        """Leave the lines of log.jsonl up to the step that training resumes after."""
        kept = lines_until(self.start, self.path.read_bytes()) if self.path.exists() else b""
        with atomic(self.path) as file:
            file.write(kept)

    def sync(self) -> None:
        """Make the lines so far survive a power cut."""
        with with_filename(self.path):
            sync(self.path)

    def on_train_begin(self, args, state, control, **_) -> None:
        self.tokens = state.num_input_tokens_seen

    def on_step_end(self, args, state, control, **_) -> None:
        step, last = state.global_step, state.global_step == self.steps
        due = time.monotonic() - self.saved_at > self.save_every and self.fits()
        asked, due = any_process(self.trainer.accelerator, interrupts.received(), due)
        control.should_save = step in self.saved or (asked or due) and not last
        control.should_log = control.should_save or last or step == 1 or step % self.every == 0
        control.should_training_stop = last or asked

    def saved_state(self, began: float) -> None:
        """A state was saved, since `began`."""
        self.saved_at = time.monotonic()
        self.save_every = max(STATE_EVERY, STATE_SHARE * (self.saved_at - began))

    def on_log(self, args, state, control, logs: dict, **_) -> None:
        if "loss" not in logs:  # the summary at the end
            return
        step = state.global_step
        if not math.isfinite(logs["grad_norm"]):
            raise UserError(
                f"by step {step} a gradient is not finite; nothing was saved after the last checkpoint. A lower --lr, "
                "or float32 (--bf16 no), may help"
            )
        metrics = {ours: logs[theirs] for theirs, ours in OURS.items() if logs.get(theirs) is not None}
        now = time.monotonic()
        seconds, self.clock = now - self.clock, now
        metrics["prompts_per_second"] = (step - self.at) * self.prompts / seconds
        metrics["tokens_per_second"] = (state.num_input_tokens_seen - self.tokens) / seconds
        metrics["peak_memory_gb"] = peak_memory(args.device) / 1e9
        self.at, self.tokens = step, state.num_input_tokens_seen
        metrics |= {name: value for name, value in logs.items() if name not in OURS and name not in IDLE}
        self.last = metrics
        if state.is_world_process_zero:
            with with_filename(self.path), open(self.path, "a") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")
            self.progress(step, self.steps, metrics)
            self.alarms(step, metrics)
