"""Loading a policy: its folder checked, its precision decided, LoRA; and saving one so that any tool can load it."""

import copy
import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock

from cream import preflight, store
from cream.errors import UserError
from cream.files import named
from cream.fingerprints import fingerprint
from cream.folders import check_weights, parameter_count, remote_code, tensors
from cream.hardware import free_memory, out_of_memory
from cream.provenance import KIND

log = logging.getLogger("cream")
TRUST = "here: --trust_remote_code yes, if you trust where it comes from"
LAYER = re.compile(r"\b(?:layers|h|blocks)\.\d+\.")  # in a weight's name
FIRST = 4  # layers that stand for all when a plan for cutting a model up is tried


@dataclass(frozen=True)
class Precision:
    """`dtype` is that of the weights; under `autocast` matrix products run in bfloat16 on float32 weights. `exact`:
    products are those of the weights' dtype, so that the same tokens in another batch differ by float32 rounding."""

    dtype: torch.dtype
    autocast: bool
    reason: str
    exact: bool = True

    @property
    def name(self) -> str:
        """What decides a log-probability beside the weights."""
        plain = str(self.dtype).removeprefix("torch.")
        return f"{plain}, bfloat16 autocast" if self.autocast else plain if self.exact else f"{plain} as TF32"


def precision(bf16: bool | None, device: torch.device, *, training: bool, shards: bool = False) -> Precision:
    """The dtype decision and its reason. `bf16` None means: where the device has it.

    Weights train as float32 masters whatever `bf16` says: at lr 1e-6 pure bfloat16 rounds 98 % of the updates away.
    With `shards` (ZeRO) the masters are the optimiser's, and the weights themselves bfloat16.
    """
    if bf16 is None:
        # a cluster's GPUs, which this machine may lack, are taken to have it
        able = device.type == "cuda" and (not torch.cuda.is_available() or torch.cuda.is_bf16_supported())
        why = "the device has it" if able else f"the default on {device.type}: --bf16 yes asks for bfloat16"
    else:
        able, why = bf16, f"--bf16 {'yes' if bf16 else 'no'}"
    if training and shards and able:
        reason = f"bfloat16 weights, their float32 masters in the optimiser's shards ({why})"
        return Precision(torch.bfloat16, False, reason)
    if training:
        plain = "TF32" if device.type == "cuda" else "float32"
        matmul = f"matrix products in {'bfloat16' if able else plain}"
        exact = not able and device.type == "cpu"
        return Precision(torch.float32, able, f"float32 master weights, {matmul} ({why})", exact)
    dtype = torch.bfloat16 if able else torch.float32
    return Precision(dtype, False, f"weights in {str(dtype).removeprefix('torch.')} ({why}), log-softmax in float32")


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

    from cream.chat import Chat

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


def stored_dtype(folder: Path) -> torch.dtype:
    """The floating-point dtype that a folder's weights are stored in."""
    kinds = {tensor.dtype for file in folder.glob("*.safetensors") for tensor in tensors(file).values()}
    for name, dtype in (("F32", torch.float32), ("BF16", torch.bfloat16), ("F16", torch.float16)):
        if name in kinds:
            return dtype
    raise UserError(
        f"{folder}: its weights are stored as {', '.join(sorted(kinds))}; expected float32, bfloat16 or float16"
    )


def context_length(folder: Path) -> int | None:
    """How many tokens a model was made for (prompt and answer together); None when its config does not say.

    With LongRoPE (arXiv 2402.13753) it is the length up to which all have the same frequencies: beyond it the library
    takes others for a whole batch, so that an answer's log-probability would depend on its company.
    """
    config = store.read_json(folder / "config.json")
    config = config.get("text_config", config)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    whole = config.get("max_position_embeddings") or config.get("n_positions")
    if (rope.get("rope_type") or rope.get("type")) in ("longrope", "su"):
        name = "original_max_position_embeddings"
        return rope.get(name) or config.get(name) or whole
    return whole


def length_limit(flag: int | None, folder: Path) -> int:
    """The smaller of the flag and the model's context."""
    limits = [limit for limit in (flag, context_length(folder)) if limit]
    return min(limits) if limits else 2048


# LoRA ---------------------------------------------------------------------------------------------------------------


def add_lora(model, r: int, alpha: float, dropout: float):
    """Low-rank adapters on every linear layer but the head; B = 0, so the model starts as it was (2106.09685 §4.1)."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
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
    trained_on = store.read_json(folder / "adapter_config.json").get("base_model_name_or_path") or ""
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

    target = cache / f"{folder.name}-{fingerprint(folder)[:8]}-on-{fingerprint(base)[:8]}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):  # the processes of one training all come here
        if target.exists():
            return target
        model = PeftModel.from_pretrained(load_policy(base, torch.float32, torch.device("cpu")), folder)
        about = {"kind": "policy", "merged_from": str(folder)}
        save_policy(merged(model), load_tokenizer(base), target, None, about)
    return target


def save_policy(
    model, tokenizer, folder: Path, dtype: torch.dtype | None, kind: dict, state: dict[str, torch.Tensor] | None = None
) -> None:
    """A folder that any Hugging Face tool loads: weights (as `dtype`, None = as they are), tokenizer, chat template.

    `state` are the weights where the model itself does not have them, or not as float32 (ZeRO).
    It is written beside its place and renamed into it, so that a folder of this name is always whole.
    """
    staged, old = (folder.with_name(f".{folder.name}.{end}") for end in ("tmp", "old"))
    for left in (staged, old):
        shutil.rmtree(left, ignore_errors=True)
    with named(folder):
        _write_policy(model, tokenizer, staged, dtype, kind, state)
        if folder.exists():
            folder.rename(old)
        staged.rename(folder)
        store.sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _write_policy(model, tokenizer, staged: Path, dtype, kind: dict, state: dict[str, torch.Tensor] | None) -> None:
    state = model.state_dict() if state is None else state
    if dtype is not None:
        cast = {(v.data_ptr(), v.shape): v.to(dtype) for v in state.values() if v.is_floating_point()}
        state = {k: cast.get((v.data_ptr(), v.shape), v) for k, v in state.items()}  # tied weights stay one tensor
    model.save_pretrained(staged, state_dict=state, safe_serialization=True)
    if dtype is not None:  # the library names the masters' dtype
        config = store.read_json(staged / "config.json")
        store.write_json(staged / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})
    tokenizer.save_pretrained(staged)
    store.write_json(staged / KIND, kind | {"fingerprint": fingerprint(staged, cached=False)})
    for path in staged.iterdir():
        store.sync(path)
