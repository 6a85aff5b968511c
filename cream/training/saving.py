"""What a run saves after a step."""

import logging
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers.integrations import unset_hf_deepspeed_config

from cream.errors import UserError
from cream.files.provenance import LAST, read_kind, read_meta
from cream.model.checkpoint import make_readable, save
from cream.model.lora import add_lora, merged
from cream.training.job import Job
from cream.training.weights import load_start

log = logging.getLogger("cream")
FORMS = ("judge", "pairwise")  # what a sidecar says of the requests that a model is trained on


def save_step(accelerator: Accelerator, weights, chat, job: Job, step: int, dtype: torch.dtype, held_out=None) -> None:
    """A checkpoint after a step, with what `held_out` examples had then."""
    state = weights.weights()
    if accelerator.is_main_process:
        save_checkpoint(job, chat, step, dtype, weights.whole.model, state, held_out)


def save_checkpoint(
    job: Job, chat, step: int, dtype: torch.dtype, model, state: dict[str, torch.Tensor] | None, held_out=None
) -> None:
    """The checkpoint folder of a step, and the link to the last one. `state`: the model's weights, or its adapters,
    where it does not have them itself."""
    tokenizer, lora = chat.tokenizer, job.config.lora
    if lora.lora and state is not None:
        unset_hf_deepspeed_config()  # with it ZeRO-3 would put what is loaded here into shards, too
        with torch.random.fork_rng():  # a new head is drawn, and replaced by the trained one
            base = load_start(job, chat, torch.float32, torch.device("cpu"))
        job.provenance.check_unchanged()
        model = add_lora(base, lora.lora_r, lora.lora_alpha, lora.lora_dropout)
        other = model.load_state_dict(state, strict=False)  # tied weights have one name there
        if other.unexpected_keys or any("lora_" in name for name in other.missing_keys):
            raise RuntimeError(f"the adapter's weights have other names than the model's: {other}")
        state = None
    folder = job.run / f"checkpoint-{step}"
    about = {"stage": job.name, "step": step, "started_from": str(job.start), **job.header}
    about |= job.provenance.record(folder) | getattr(job.stage, "about", {})
    about |= {"held_out": held_out} if held_out else {}
    about |= trained_forms(job.data, job.start)
    if lora.lora:  # first: they are all there is if the merge is refused
        adapter = job.run / f"adapter-{step}"
        model.save_pretrained(adapter)
        make_readable(adapter)
        try:
            plain = merged(model)
        except UserError as error:
            raise UserError(f"{error}; the adapters are in {adapter}") from None
        save(plain, tokenizer, folder, dtype, about)
        adapter.rename(folder / "adapter")
    else:
        save(model, tokenizer, folder, dtype, about, state)
    link = job.run / ".checkpoint-last"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    link.replace(job.run / LAST)
    log.info("saved %s", folder)


def trained_forms(data: Path, start: Path) -> dict[str, dict]:
    """The forms that a checkpoint judges or compares by: of its data, or of the model that it was trained from; {} of
    one that does not."""
    found = read_kind(start) | (read_meta(data) or {})
    return {name: found[name] for name in FORMS if found.get(name)}
