"""What online training saves after a step: a checkpoint as of every stage, and what trl resumes from."""

from __future__ import annotations

import copy
import logging
import shutil
import time
from pathlib import Path

import torch
from transformers import GenerationConfig

from cream.cli.screen import PROGRESS
from cream.errors import UserError
from cream.model.checkpoint import stored_dtype
from cream.training import state
from cream.training.job import Job
from cream.training.launch import given_world, is_first_process
from cream.training.parallel import gather_weights
from cream.training.saving import save_checkpoint

log = logging.getLogger("cream")


def check_state(job: Job, saved: state.Saved | None) -> Path | None:
    """The folder to resume from. Raises UserError where its files are not what was saved, or other processes did."""
    if saved is None:
        return None
    world = given_world() or len(job.config.device.devices())
    if saved.processes != world:
        raise UserError(
            f"{job.run}: its state was saved by {saved.processes} processes, and here are {world}: resume with as "
            f"many; {state.FROM_SCRATCH}"
        )
    folder = job.run / "state" / f"checkpoint-{saved.step}"
    state.check(folder, saved)
    log.log(PROGRESS, "resuming after step %d", saved.step)
    return folder


class Keep:
    """Saves after a step: a checkpoint where one is due, and what to resume from."""

    def __init__(self, job: Job, chat, model, watch, steps: int):
        self.job, self.chat, self.model, self.watch, self.steps = job, chat, model, watch, steps
        save_dtype = job.config.optimisation.save_dtype
        self.dtype = stored_dtype(job.start) if save_dtype == "auto" else getattr(torch, save_dtype)
        self.own = copy.deepcopy(model.config), model.generation_config

    def for_sampling(self):
        """The model, which ends a response where infer.py does. trl changes its configs: `own` are saved."""
        tokenizer = self.chat.tokenizer
        own = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
        self.model.generation_config = GenerationConfig(eos_token_id=list(self.chat.stop_ids), **own)
        return self.model

    def __call__(self, trainer, step: int) -> None:
        """After a step; all processes must call."""
        began, first = time.monotonic(), is_first_process()
        if first:
            self.watch.sync()
        if step in self.watch.saved:
            self._checkpoint(trainer, step)
        if step == self.steps:
            return
        folder = self.job.run / "state" / f"checkpoint-{step}"
        if first:
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed while saving
        trainer.accelerator.wait_for_everyone()
        trainer.write_state()
        trainer.accelerator.wait_for_everyone()
        if first:
            state.seal(self.job.run, folder, state.Saved(step, trainer.accelerator.num_processes, {}))
        self.watch.saved_state(began)

    def _checkpoint(self, trainer, step: int) -> None:
        weights = self._weights(trainer)
        if not is_first_process():
            return
        model = self.model
        trained = model.config, model.generation_config
        model.config, model.generation_config = self.own
        try:
            save_checkpoint(self.job, self.chat, step, self.dtype, model, weights)
        finally:
            model.config, model.generation_config = trained

    def _weights(self, trainer) -> dict[str, torch.Tensor] | None:
        """The adapters, or under ZeRO all weights; None where the model has them itself."""
        model = trainer.accelerator.unwrap_model(trainer.model)
        if self.job.deepspeed is not None:
            return gather_weights(trainer.accelerator, model, trainer.model_wrapped.zero_optimization_stage())
        if self.job.config.lora.lora:
            return {name: value.cpu() for name, value in model.state_dict().items() if "lora_" in name}
        return None
