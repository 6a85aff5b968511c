"""How the weights being trained lie on the processes: a replica on each, or shards of them (ZeRO).

Both offer what the loop needs: micro-batches, a step, and whole weights to save.
"""

import logging
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedType

from cream.errors import UserError
from cream.files import store
from cream.model.backbone import Backbone
from cream.model.products import forget_casts
from cream.training.optim import build_optimizer
from cream.training.options import check_compiler
from cream.training.state import UNIVERSAL

log = logging.getLogger("cream")
PART = 1 << 20  # weights that are summed at a time


class Replicas:
    """The whole model on every process; gradients are averaged in the step's last backward pass (DDP)."""

    shards = 1

    def __init__(self, accelerator: Accelerator, model: Backbone, lr: float, weight_decay: float, optim: str = "adamw"):
        if accelerator.distributed_type == DistributedType.NO:
            model.accumulate_in_place()
        self.accelerator, self.whole = accelerator, model
        self.model, self.optimizer = accelerator.prepare(model, build_optimizer(model, optim, lr, weight_decay))

    def micro_batch(self, last: bool) -> AbstractContextManager:
        """Around a forward and a backward pass; gradients are shared after the `last` of a step."""
        return nullcontext() if last else self.accelerator.no_sync(self.model)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the loss's gradient to the step's."""
        self.accelerator.backward(loss)

    def zero_grad(self) -> None:
        """Forget the gradient."""
        self.optimizer.zero_grad(set_to_none=False)  # some gradients are added in place

    def step(self, lr: float, max_norm: float) -> torch.Tensor:
        """Clip, update at this learning rate; returns the gradient's norm before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), max_norm)
        forget_casts(self.model)  # before the step, which needs memory of its own; nothing is cast until it has ended
        self.optimizer.step()
        self.zero_grad()
        return norm

    def check_equal(self) -> None:
        """After a step all processes hold the same weights; raises UserError where a gradient was not shared."""
        if self.accelerator.num_processes == 1:
            return
        trained = [p.detach().flatten() for p in self.model.parameters() if p.requires_grad]
        parts = (part for p in trained for part in p.split(PART))  # on a CPU a sum in float64 copies all of its tensor
        total = sum(part.sum(dtype=torch.float64) for part in parts).reshape(1)  # bfloat16 would hide a difference
        totals = self.accelerator.gather(total)
        if not torch.equal(totals, totals[:1].expand_as(totals)):
            raise UserError(f"the processes hold different weights after a step: their sums are {totals.tolist()}")

    def load(self, folder: Path, processes: int) -> None:
        """A state that as many, or other numbers of, processes saved: all had the same."""
        self.accelerator.load_state(str(folder))

    def weights(self) -> None:
        """The whole model has them all."""


class Shards:
    """ZeRO by DeepSpeed (arXiv 1910.02054): gradients and optimiser states in shards (stage 2), weights too (3).

    Under bfloat16 the weights are bfloat16, their float32 masters part of the optimiser's shards.
    """

    def __init__(self, accelerator: Accelerator, model: Backbone, lr: float, weight_decay: float, optim: str = "adamw"):
        import deepspeed

        self.accelerator, self.whole = accelerator, model
        self.model, self.optimizer = accelerator.prepare(model, build_optimizer(model, optim, lr, weight_decay))
        self.shards, self.stage = accelerator.num_processes, self.model.zero_optimization_stage()
        if self.stage == 3:
            for parameter in model.head_parameters():
                deepspeed.zero.register_external_parameter(model, parameter)  # read without the head being called
            model.choose_layout()

    def micro_batch(self, last: bool) -> AbstractContextManager:
        """Around a forward and a backward pass. Gradients are shared in each, as their shards must be."""
        self.model.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """Add the loss's gradient to the step's."""
        self.model.backward(loss)

    def step(self, lr: float, max_norm: float) -> float:
        """Clip (by the engine's own setting, which is `max_norm`), update; returns the norm before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.model.step()
        return float(self.model.get_global_grad_norm())

    def check_equal(self) -> None:
        """Raises UserError where, after a step, processes that hold whole weights hold different ones."""
        if self.stage < 3:
            Replicas.check_equal(self)

    def load(self, folder: Path, processes: int) -> None:
        """A state that another number of processes saved goes through DeepSpeed's universal form."""
        if processes == self.accelerator.num_processes:
            self.accelerator.load_state(str(folder))
            return
        other = f"resume with {processes} processes, or train from scratch by --resume no"
        if self.accelerator.is_main_process:
            log.info("the state is of %d processes: its shards are put together again", processes)
            convert = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
            where = ["--input_folder", str(folder / "pytorch_model"), "--output_folder", str(folder / UNIVERSAL)]
            shutil.rmtree(folder / UNIVERSAL, ignore_errors=True)  # of a conversion that was killed
            done = subprocess.run([*convert, *where], capture_output=True, text=True)
            if done.returncode:
                why = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
                raise UserError(
                    f"{folder}: DeepSpeed cannot convert the state of {processes} processes: {why}; {other}"
                )
        self.accelerator.wait_for_everyone()
        loaded, _ = self.model.load_checkpoint(str(folder), tag=UNIVERSAL)
        if loaded is None:
            raise UserError(f"{folder}: DeepSpeed did not load the state; {other}")

    def weights(self) -> dict[str, torch.Tensor] | None:
        """As `gather_weights`."""
        return gather_weights(self.accelerator, self.whole.model, self.stage)


def gather_weights(accelerator: Accelerator, model, stage: int) -> dict[str, torch.Tensor] | None:
    """A model's whole weights by name under this stage of ZeRO, float32 masters where they are trained, on the CPU: for
    the first process, which alone gets them; all must call."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    whole = {}
    for name, parameter in model.named_parameters():
        value = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
        with deepspeed.zero.GatheredParameters([parameter], enabled=value is None and stage == 3):
            value = parameter if value is None else value
            if accelerator.is_main_process:
                whole[name] = value.detach().to("cpu", copy=True)
    if not accelerator.is_main_process:
        return None
    saved = model.state_dict().keys()
    return whole | {n: b.detach().cpu() for n, b in model.named_buffers() if n in saved}


@contextmanager
def whole_models(accelerator: Accelerator) -> Iterator[None]:
    """Within it transformers loads models whole, which it would put into shards under ZeRO-3."""
    from transformers.integrations import deepspeed

    deepspeed.unset_hf_deepspeed_config()
    yield
    if settings := getattr(accelerator.state.deepspeed_plugin, "dschf", None):
        deepspeed.set_hf_deepspeed_config(settings)


# DeepSpeed's settings -------------------------------------------------------------------------------------------------

OURS = {  # settings that train.py's flags make, and which flag
    "train_batch_size": "--train_bsz",
    "train_micro_batch_size_per_gpu": "--max_tokens_per_batch",
    "gradient_accumulation_steps": "--grad_accum",
    "gradient_clipping": "--max_grad_norm",
    "optimizer": "--lr and --weight_decay",
    "scheduler": "--lr and --warmup_step_ratio",
}


PARTS = ("zero_optimization", "fp16", "bf16", "checkpoint")


def read_settings(path: str) -> dict:
    """The DeepSpeed configuration in a file, checked; from here on DeepSpeed finds the ninja that it compiles with."""
    settings = store.read_json(Path(path))
    check_settings(settings, path)
    if compiles(settings):
        check_compiler(f"--deepspeed {path}: DeepSpeed compiles its optimizer on the CPU and")
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return settings


def check_settings(settings: object, where: str) -> None:
    """Raises UserError where a DeepSpeed configuration sets what is train.py's to set, or no ZeRO stage."""
    parts = [settings, *(settings.get(name, {}) for name in PARTS)] if isinstance(settings, dict) else [settings]
    if not all(isinstance(part, dict) for part in parts):
        raise UserError(f"{where}: expected one object of DeepSpeed's settings, in it objects {', '.join(PARTS)}")
    for name, flag in OURS.items():
        if settings.get(name, "auto") != "auto":
            raise UserError(f"{where}: {name} is set by {flag}; omit it, or write 'auto'")
    stage = settings.get("zero_optimization", {}).get("stage")
    if stage not in (1, 2, 3):
        raise UserError(f"{where}: zero_optimization.stage: expected 1, 2 or 3, found {stage}")
    for name, plain in (("fp16", (None, "auto", False)), ("bf16", (None, "auto"))):
        if settings.get(name, {}).get("enabled") not in plain:
            raise UserError(f"{where}: {name}.enabled: --bf16 decides whether training is in bfloat16 or in float32")


def compiles(settings: dict) -> bool:
    """Whether DeepSpeed compiles a part of itself: AdamW on a CPU, for what is offloaded."""
    offload = settings["zero_optimization"].get("offload_optimizer")
    return isinstance(offload, dict) and offload.get("device") not in (None, "none")


def compiling() -> list[Path]:
    """Lock files of processes that compile a part of DeepSpeed: whoever needs the part waits until the file is gone,
    and a process that is killed while compiling leaves it behind."""
    from torch.utils.cpp_extension import get_default_build_root

    return sorted(Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()).rglob("lock"))


def quiet_deepspeed() -> None:
    """Without a part that each run on a CPU would compile, for half a minute, and that serves inference alone; without
    warnings of its own calls."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def plugin(settings: dict, max_grad_norm: float, universal: bool) -> DeepSpeedPlugin:
    """accelerate's plugin for a configuration that `check_settings` let pass; `universal`: the state that is to be
    loaded was saved by another number of processes."""
    quiet_deepspeed()
    whole = settings | {
        "train_micro_batch_size_per_gpu": 1,  # of no consequence: the loss is scaled by us, once for a whole step
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "bf16": settings.get("bf16", {}) | {"enabled": "auto"},  # as mixed_precision says
    }
    whole.pop("train_batch_size", None)
    if universal:
        whole["checkpoint"] = settings.get("checkpoint", {}) | {"load_universal": True}
    return DeepSpeedPlugin(hf_ds_config=whole)
