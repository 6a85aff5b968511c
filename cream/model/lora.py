"""LoRA adapters (arXiv 2106.09685): added to a model, and merged into it."""

import copy
import logging
from pathlib import Path

import torch

from cream.errors import UserError
from cream.files.folders import kind_of, remote_code
from cream.model.reward_head import head_name

log = logging.getLogger("cream")


def add_lora(model, r: int, alpha: float, dropout: float):
    """Low-rank adapters on every linear layer but the head; B = 0, so the model starts as it was (2106.09685 §4.1).

    A reward model's head is trained whole, and saved with the adapters.
    """
    from peft import get_peft_model

    return get_peft_model(model, lora_config(model, r, alpha, dropout))


def lora_config(model, r: int, alpha: float, dropout: float):
    """peft's configuration of these adapters."""
    from peft import LoraConfig

    _, reads = kind_of([type(model).__name__])
    task = {None: "CAUSAL_LM", "last_token": "SEQ_CLS", "step_token": "TOKEN_CLS"}[reads]
    head = [head_name(model)] if reads else None
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules="all-linear",
        exclude_modules=head,
        modules_to_save=head,
        task_type=task,
    )


def check_lora(folder: Path, r: int, alpha: float, dropout: float) -> None:
    """Raises UserError where a folder's model takes no such adapters, tried without its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=remote_code())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=remote_code())
        try:
            add_lora(model, r, alpha, dropout)
        except ValueError as error:
            advice = "; its experts are fused: give --lora_dropout 0" if "lora_dropout" in str(error) else ""
            raise UserError(f"--lora yes: not for {folder}: {error}{advice}") from None


def merged(model, tolerance: float = 1e-3):
    """A plain copy of a model with its adapters merged in float32; the model itself stays as it is. Raises UserError
    where its logits are not those of the model (`check_equal`)."""
    try:
        plain = copy.deepcopy(model).eval()
        _untie(plain)
        plain = plain.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError) as error:  # NaN; what has no merged form
        raise UserError(f"the LoRA adapters cannot be merged: {error}") from None
    check_equal(plain, probe(model), "merging the LoRA adapters", tolerance)
    return plain


def _untie(model) -> None:
    """Give the head weights of its own where it is tied to embeddings and either has an adapter that the other has
    not."""
    layers = model.get_input_embeddings(), model.get_output_embeddings()
    embeddings, head = (getattr(layer, "base_layer", layer) for layer in layers)
    if head is not None and head.weight is embeddings.weight and (embeddings, head) != layers:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())


@torch.no_grad()
def probe(model) -> torch.Tensor:
    """Logits (4, 16, V), float32, of the first and the last 32 tokens of the vocabulary, where added ones are."""
    size = model.get_input_embeddings().weight.shape[0]
    ids = torch.cat([torch.arange(32), torch.arange(size - 32, size)]).remainder(size).reshape(4, 16)
    training = model.training
    logits = model.eval()(ids.to(model.device)).logits.float()
    model.train(training)
    return logits


def check_equal(model, wanted: torch.Tensor, what: str, tolerance: float = 1e-3) -> None:
    """Raises UserError where a model's `probe` differs from `wanted` by more than `tolerance` of its largest logit."""
    difference = (probe(model) - wanted).abs().max().item()
    if not difference <= tolerance * max(1.0, wanted.abs().max().item()):  # NaN is no equality
        raise UserError(f"{what} changed the logits by {difference:.2g}; the merge is not trusted")
    log.info("%s in float32 changed the logits of a probe by %.2g", what, difference)
