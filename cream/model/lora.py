"""LoRA adapters (arXiv 2106.09685): added to a model, merged into it, and adapter folders from elsewhere."""

import copy
import logging
from pathlib import Path

import torch

from cream.errors import UserError
from cream.files import store
from cream.files.fingerprints import fingerprint_folder
from cream.files.folders import KINDS, kind_of, tensors
from cream.files.lock import Lock
from cream.files.provenance import POLICY
from cream.model.checkpoint import save
from cream.model.load import load_policy, load_tokenizer
from cream.model.reward_head import head_name

log = logging.getLogger("cream")


def add_lora(model, r: int, alpha: float, dropout: float):
    """Low-rank adapters on every linear layer but the head; B = 0, so the model starts as it was (2106.09685 §4.1).

    A reward model's head is trained whole, and saved with the adapters.
    """
    from peft import LoraConfig, get_peft_model

    _, reads = kind_of([type(model).__name__])
    task = {None: "CAUSAL_LM", "last_token": "SEQ_CLS", "step_token": "TOKEN_CLS"}[reads]
    head = [head_name(model)] if reads else None
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules="all-linear",
        exclude_modules=head,
        modules_to_save=head,
        task_type=task,
    )
    return get_peft_model(model, config)


def merged(model, tolerance: float = 1e-3):
    """A plain copy of a model with its adapters merged in float32; the model itself stays as it is.

    Checked: logits of a probe may differ by `tolerance` (relative to their largest). Raises UserError above it.
    """
    plain = copy.deepcopy(model).eval().merge_and_unload(safe_merge=True)
    probe = torch.arange(1, 33, device=plain.device).remainder(plain.config.vocab_size)[None]
    training = model.training
    model.eval()
    with torch.no_grad():
        before = model(probe).logits.float()
        difference = (plain(probe).logits.float() - before).abs().max().item()
    model.train(training)
    if difference > tolerance * max(1.0, before.abs().max().item()):
        raise UserError(f"merging the LoRA adapters changed the logits by {difference:.2g}; the merge is not trusted")
    log.info("LoRA adapters merged in float32; logits of a probe differ by %.2g", difference)
    return plain


def adapter_base(folder: Path, name: str, base: Path) -> Path:
    """The model that an adapter was trained on, by its adapter_config.json: that folder, or `base` (the folder, or the
    hub id, that --model names) when it is the same.

    Raises UserError when it is neither: on any other model the adapter means nothing.
    """
    if not (folder / "adapter_model.safetensors").exists():
        raise UserError(f"{folder}: no adapter_model.safetensors; pickled adapters are never loaded, convert it")
    tensors(folder / "adapter_model.safetensors")
    config = store.read_json(folder / "adapter_config.json")
    if (task := config.get("task_type")) in ("SEQ_CLS", "TOKEN_CLS"):
        raise UserError(f"{folder}: expected {KINDS[POLICY]}, found the adapter of a reward model (task_type {task})")
    trained_on = config.get("base_model_name_or_path") or ""
    if trained_on and Path(trained_on).is_dir():
        return Path(trained_on)
    if trained_on == name:
        return base
    raise UserError(
        f"{folder}: an adapter of {trained_on or 'an unnamed model'}, which is neither a folder here nor --model "
        f"{name}; give --model the model that it was trained on"
    )


def adapter_merged(folder: Path, base: Path, cache: Path) -> Path:
    """A full model folder for an adapter folder from elsewhere: merged into `base`, once, under `cache`."""
    from peft import PeftModel

    target = cache / f"{folder.name}-{fingerprint_folder(folder)[:8]}-on-{fingerprint_folder(base)[:8]}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with Lock(target, timeout=-1):  # the processes of one training all come here
        if target.exists():
            return target
        model = PeftModel.from_pretrained(load_policy(base, torch.float32, torch.device("cpu")), folder)
        save(merged(model), load_tokenizer(base), target, None, {"merged_from": str(folder)})
    return target
