"""Loading a language model and its tokenizer: the folder checked, every dropout off, attention chosen."""

import logging
import re
from pathlib import Path

import torch

from cream.cli import preflight
from cream.errors import UserError, out_of_memory
from cream.files import store
from cream.files.folders import check_weights, parameter_count, remote_code
from cream.model.hardware import free_memory

log = logging.getLogger("cream")
TRUST = "here: --trust_remote_code yes, if you trust where it comes from"
LAYER = re.compile(r"\b(?:layers|h|blocks)\.\d+\.")  # in a weight's name
FIRST = 4  # layers that stand for all when a plan for cutting a model up is tried


def load_tokenizer(folder: Path, chat_template: Path | None = None):
    """The tokenizer of a folder; `chat_template` (a Jinja file) replaces its template."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=remote_code())
    except Exception as error:  # the tokenizers library raises plain Exceptions on damaged files
        advice = f" ({TRUST})" if "trust_remote_code" in str(error) else ""
        raise UserError(f"{folder}: its tokenizer cannot be loaded: {error}{advice}") from None
    if chat_template is not None:
        with store.open_file(chat_template) as file:
            try:
                tokenizer.chat_template = file.read().decode()
            except UnicodeDecodeError as error:
                raise UserError(f"--chat_template {chat_template}: not a text file: {error}") from None
    return tokenizer


def load_chat(folder: Path, chat_template: Path | None = None):
    """A folder's tokenizer and template as a Chat that also stops at the model's own end tokens."""
    from transformers import GenerationConfig

    from cream.text.chat import Chat

    eos = None
    if (folder / "generation_config.json").exists():
        if not isinstance(store.read_json(folder / "generation_config.json"), dict):
            raise UserError(f"{folder / 'generation_config.json'}: expected one object of settings")
        eos = GenerationConfig.from_pretrained(folder).eos_token_id
    return Chat(load_tokenizer(folder, chat_template), [eos] if isinstance(eos, int) else eos or [], chat_template)


def load_policy(folder: Path, dtype: torch.dtype, device: torch.device, *, slices: int = 1, first: bool = False):
    """A causal language model in evaluation mode, every dropout 0 (a policy must equal its own
    reference at the first step). Raises UserError for a folder it cannot load.

    slices > 1: each of so many processes of torch.distributed gets its part of every layer, by the library's plan
    (`check_slices`); the head stays whole. first: the first layers alone, of each kind one at least.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    check_weights(folder)
    if not first:
        need = parameter_count(folder) * dtype.itemsize / slices
        preflight.memory(need, free_memory(device), f"the weights of {folder}")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=remote_code())
        for name in [name for name in config.to_dict() if name.endswith(("dropout", "_pdrop"))]:
            setattr(config, name, 0.0)
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            config=_first(config) if first else config,
            dtype=dtype,
            attn_implementation=_attention(config),
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=remote_code(),
            output_loading_info=True,
            distributed_config=_slicing(config, slices) if slices > 1 else None,
        )
    except Exception as error:  # the library raises all kinds on a damaged config
        if isinstance(error, RuntimeError) and out_of_memory(error):
            raise
        advice = f" ({TRUST})" if "trust_remote_code" in str(error) else ""
        raise UserError(f"{folder}: cannot be loaded as a language model: {error}{advice}") from None
    if missing := sorted(found["missing_keys"]):  # the library would go on with random ones
        raise UserError(f"{folder}: {len(missing)} weights are missing: {', '.join(missing[:3])}")
    if not first and (unused := sorted(found["unexpected_keys"])):
        told = f"{folder}: {len(unused)} of its weights are not part of the model: {', '.join(unused[:3])}"
        if any(LAYER.search(name) for name in unused):
            raise UserError(f"{told}; its config.json has fewer layers than its weights")
        log.warning("%s", told)
    return model.to(device).eval()


def _attention(config) -> str | None:
    """sdpa where the model has it; eager where attention scores are capped, which sdpa would leave out unsaid; None is
    the library's choice for a model that has neither."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if getattr(config, "attn_logit_softcapping", None):
        return "eager"
    return "sdpa" if getattr(MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None), "_supports_sdpa", True) else None


def _first(config):
    """The config of a model's first layers: FIRST, or as many as it takes to have one of each kind."""
    text = config.get_text_config()
    layers = min(FIRST, text.num_hidden_layers)
    kinds = [name for name in ("layer_types", "mlp_layer_types") if getattr(text, name, None)]
    for name in kinds:
        layers = max([layers, *(1 + getattr(text, name).index(kind) for kind in set(getattr(text, name)))])
    text.num_hidden_layers = layers
    for name in kinds:
        setattr(text, name, getattr(text, name)[:layers])
    return config


def _slicing(config, slices: int):
    """The library's plan but for the head, and embeddings that are its weights: those stay whole."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers.distributed import DistributedConfig

    text = config.get_text_config()
    text.base_model_tp_plan = {k: style for k, style in text.base_model_tp_plan.items() if k != "embed_tokens"}
    head = getattr(MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None), "_tp_plan", None) or {}
    # of the library's styles the one that leaves weights and outputs alone, where there is no backward pass
    return DistributedConfig(tp_size=slices, tp_plan=dict.fromkeys(head, "replicated_with_grad_allreduce"))


def check_slices(folder: Path, slices: int) -> None:
    """Raises UserError where a model cannot be cut into so many parts."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        folder, local_files_only=True, trust_remote_code=remote_code()
    ).get_text_config()
    if not getattr(config, "base_model_tp_plan", None):
        raise UserError(
            f"--tensor_parallel_size {slices}: the library has no plan for cutting up models of type "
            f"{config.model_type} ({folder})"
        )
    sizes = {
        "attention heads": config.num_attention_heads,
        "heads of keys and values": getattr(config, "num_key_value_heads", None),
        "numbers within a feed-forward": getattr(config, "intermediate_size", None),
        "within an expert": getattr(config, "moe_intermediate_size", None),
    }
    known = {what: size for what, size in sizes.items() if isinstance(size, int)}
    if any(size % slices for size in known.values()):
        said = ", ".join(f"{size} {what}" for what, size in known.items())
        raise UserError(f"--tensor_parallel_size {slices}: {folder} has {said}; it must divide them all")
