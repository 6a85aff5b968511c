"""The weights that a run starts from."""

import logging
import os

import torch

from cream.cli import preflight
from cream.files import store
from cream.files.folders import stated_kind
from cream.files.provenance import REWARD_MODEL
from cream.model.checkpoint import check_saving
from cream.model.hardware import free_memory
from cream.model.load import load_policy, load_with_head
from cream.model.logprobs import LogProbs
from cream.model.lora import add_lora
from cream.model.reward_head import Heads, choose_pad
from cream.training.job import Job
from cream.training.launch import given_world

log = logging.getLogger("cream")
MODELS = {"logprobs": LogProbs, "heads": Heads}  # a stage's `model` -> the wrapper that its loss is computed with


def load_trained(job: Job, chat, dtype: torch.dtype, device: torch.device):
    """The weights that are trained, once they are known to fit in memory; refused if they could not be saved."""
    o, lora = job.config.optimisation, job.config.lora
    check_memory(job, dtype, device)
    model = load_start(job, chat, dtype, device)
    check_saving(model, chat.tokenizer)
    if o.grad_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    if lora.lora:
        model = add_lora(model, lora.lora_r, lora.lora_alpha, lora.lora_dropout)
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        log.info("LoRA: r %d, alpha %g, %d trained parameters", lora.lora_r, lora.lora_alpha, count)
    return model


def check_memory(job: Job, dtype: torch.dtype, device: torch.device) -> None:
    """Raises UserError where the weights and what their training keeps would not fit."""
    lora, zero = job.config.lora, (job.deepspeed or {}).get("zero_optimization", {})
    offload = "offload_optimizer" in zero or "offload_param" in zero
    shards, moments = (given_world() or 1, zero.get("stage", 0)), job.config.optimisation.moment_bytes
    need = preflight.memory_of_training(job.start, not lora.lora, *shards, dtype.itemsize, offload, moments)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1
    preflight.check_memory(need * here, free_memory(device), f"training {job.start}", _advice(job))


def _advice(job: Job) -> str:
    """Flags that are not given and take less memory."""
    less = {"--bf16 yes": job.config.device.bf16 is not True, "--lora yes": not job.config.lora.lora}
    if job.deepspeed is None:
        less |= {"--optim adamw_bf16": job.config.optimisation.optim == "adamw", "--deepspeed on more devices": True}
    return ", ".join(flag for flag, helps in less.items() if helps) or "more devices"


def load_start(job: Job, chat, dtype: torch.dtype, device: torch.device):
    """The model that training starts from, with the head that the stage trains."""
    if MODELS[job.stage.model] is not Heads:
        return load_policy(job.start, dtype, device)
    model = load_with_head(job.start, job.stage.head, dtype, device)
    if names := getattr(job.stage, "labels", None):
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: i for i, name in enumerate(names)}
    choose_pad(model, chat, keep=stated_kind(job.start, store.read_json(job.start / "config.json"))[0] == REWARD_MODEL)
    return model
