"""Loading a model and its tokenizer: the folder checked, its kind too, every dropout off, attention chosen."""

import logging
import re
from contextlib import nullcontext
from pathlib import Path

import torch

from cream.cli import preflight
from cream.errors import UserError, out_of_memory
from cream.files import store
from cream.files.fingerprints import fingerprint_text
from cream.files.folders import check_weights, kind_of, parameter_count, remote_code, stated_kind, vocabulary
from cream.files.provenance import POLICY, REWARD_MODEL, Head, read_kind
from cream.model.hardware import free_memory
from cream.model.reward_head import describe_head, head_name

log = logging.getLogger("cream")
TRUST = "here: --trust_remote_code yes, if you trust where it comes from"
LAYER = re.compile(r"\b(?:layers|h|blocks)\.\d+\.")  # in a weight's name
MORE = "--bf16 yes, or more devices with --tensor_parallel_size"  # where the weights do not fit in memory
FIRST = 4  # layers that a tensor-parallel plan is tried on


def load_tokenizer(folder: Path, chat_template: Path | None = None):
    """The tokenizer of a folder; `chat_template`, a Jinja file or one of its own templates' names, is its default."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=remote_code())
    except Exception as error:  # the tokenizers library raises plain Exceptions on damaged files
        advice = f" ({TRUST})" if "trust_remote_code" in str(error) else ""
        raise UserError(f"{folder}: its tokenizer cannot be loaded: {error}{advice}") from None
    own = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if chat_template is not None and str(chat_template) in own and not chat_template.exists():
        tokenizer.chat_template = own | {"default": own[str(chat_template)]}
    elif chat_template is not None:
        if own and not chat_template.exists():
            raise UserError(
                f"--chat_template {chat_template}: no such file, and none of this model's templates: {', '.join(own)}"
            )
        with store.open_file(chat_template) as file:
            try:
                tokenizer.chat_template = file.read().decode()
            except UnicodeDecodeError as error:
                raise UserError(f"--chat_template {chat_template}: not a text file: {error}") from None
    if (folder / "config.json").exists():
        check_vocabulary(tokenizer, vocabulary(store.read_json(folder / "config.json")), folder)
    return tokenizer


def check_vocabulary(tokenizer, size: int | None, folder: Path) -> None:
    """Raises UserError where a tokenizer has ids beyond the `size` tokens that its model embeds: a text that holds such
    a token would end a stage in the middle."""
    token, last = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if size is not None and last >= size:
        raise UserError(
            f"{folder}: its tokenizer has token {last} ({token}), but the model embeds {size} tokens only; train with "
            "the tokenizer that the model was made with, or save both after model.resize_token_embeddings"
        )


def load_chat(folder: Path, chat_template: Path | None = None, **text):
    """A folder's tokenizer and template as a Chat that also stops at the model's own end tokens. `text`: variables,
    thoughts and tags, as Chat takes them."""
    from cream.text.chat import Chat
    from cream.text.rendering import TODAY

    ends = _end_tokens(folder)
    chat = Chat(load_tokenizer(folder, chat_template), ends, chat_template, **text)
    if chat.dated:
        log.info("the chat template writes today's date: in every stage %s", TODAY)
    if read_kind(folder).get("chat_template") not in (None, fingerprint_text(chat.template)):
        log.warning("%s: was trained on another chat template than %s", folder, chat_template or "the one in it now")
    return chat


def load_plain(folder: Path):
    """A folder's tokenizer as Plain, for texts that end at the model's own end tokens."""
    from cream.text.plain import Plain

    return Plain(load_tokenizer(folder), _end_tokens(folder))


def _end_tokens(folder: Path) -> list[int]:
    """The tokens that end what a model writes, by its generation settings."""
    from transformers import GenerationConfig

    if not (folder / "generation_config.json").exists():
        return []
    if not isinstance(store.read_json(folder / "generation_config.json"), dict):
        raise UserError(f"{folder / 'generation_config.json'}: expected one object of settings")
    eos = GenerationConfig.from_pretrained(folder).eos_token_id
    return [eos] if isinstance(eos, int) else eos or []


def load_policy(folder: Path, dtype: torch.dtype, device: torch.device, *, tp_size: int = 1, first: bool = False):
    """`load` of a policy."""
    return load(folder, POLICY, dtype, device, tp_size=tp_size, first=first)


def load_with_head(folder: Path, head: Head, dtype: torch.dtype, device: torch.device):
    """`load` of a reward model with this head: a new one on a policy, or a reward model's own. Raises UserError where
    that is another."""
    if stated_kind(folder, store.read_json(folder / "config.json"))[0] != REWARD_MODEL:
        return load(folder, REWARD_MODEL, dtype, device, new_head=head)
    model = load(folder, REWARD_MODEL, dtype, device)
    if (own := describe_head(model)) != head:
        raise UserError(f"{folder}: its head has other outputs than the stage trains: {own} there, {head} here")
    return model


def load(
    folder: Path,
    kind: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    new_head: Head | None = None,
    tp_size: int = 1,
    first: bool = False,
):
    """A transformers model of this kind, POLICY or REWARD_MODEL, in evaluation mode, every dropout 0 (a policy must
    equal its own reference at the first step). Raises UserError for a folder of another kind, or that it cannot load.

    new_head: a reward model from the folder of a policy, its head drawn by torch's generator as in arXiv 2009.01325.
    device "meta": no weights are read; the folder is checked as for any other device.
    tp_size > 1: each of so many processes of torch.distributed gets its part of every layer, by the library's plan
    (`check_tp_size`); the head stays whole. first: the first layers alone, of each kind one at least.
    """
    from transformers import AutoConfig
    from transformers.initialization import no_init_weights

    check_weights(folder, POLICY if new_head else kind)
    if not first and device.type != "meta":
        need = parameter_count(folder) * dtype.itemsize / tp_size
        preflight.check_memory(need, free_memory(device), f"the weights of {folder}", MORE)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=remote_code())
        for name in [name for name in config.to_dict() if name.endswith(("dropout", "_pdrop"))]:
            setattr(config, name, 0.0)
        if new_head:
            config.num_labels = new_head["outputs"]
            config.problem_type = "regression"  # so that pipelines and vLLM give the outputs as they are
        with no_init_weights():  # to draw them takes half a second, though they have no memory yet
            model, report = _auto_class(folder, config, kind, new_head).from_pretrained(
                folder,
                config=_first(config) if first else config,
                dtype=dtype,
                device_map="meta" if device.type == "meta" else None,
                attn_implementation=_attention(config),
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=remote_code(),
                output_loading_info=True,
                distributed_config=_tensor_parallel(config, tp_size, kind) if tp_size > 1 else None,
            )
    except Exception as error:  # the library raises all kinds on a damaged config
        if isinstance(error, UserError) or isinstance(error, RuntimeError) and out_of_memory(error):
            raise
        advice = f" ({TRUST})" if "trust_remote_code" in str(error) else ""
        what = "a language model" if kind == POLICY else "a reward model"
        raise UserError(f"{folder}: cannot be loaded as {what}: {error}{advice}") from None
    if new_head:
        _init_head(model)
    _check_loaded(folder, model, kind, report, new_head, first)
    return model.to(device).eval()


def _check_loaded(folder: Path, model, kind: str, report: dict, new_head: Head | None, first: bool) -> None:
    """Raises UserError unless the weights of a folder were those of the model, as far as it matters."""
    missing = {name for name in report["missing_keys"] if not (new_head and name.startswith(f"{head_name(model)}."))}
    if missing := sorted(missing):  # the library would continue with random ones
        raise UserError(f"{folder}: {len(missing)} weights are missing: {', '.join(missing[:3])}")
    if not first and (unused := sorted(report["unexpected_keys"])):
        message = f"{folder}: {len(unused)} of its weights are not part of the model: {', '.join(unused[:3])}"
        if any(LAYER.search(name) for name in unused):
            raise UserError(f"{message}; its config.json has fewer layers than its weights")
        if kind == REWARD_MODEL and any(not name.startswith("lm_head.") for name in unused):
            raise UserError(f"{message}; without them {type(model).__name__} would give other rewards")
        log.warning("%s", message)
    recorded = {} if new_head or kind == POLICY else read_kind(folder).get("head", {})
    if (outputs := recorded.get("outputs", model.config.num_labels)) != model.config.num_labels:
        raise UserError(f"{folder}: its head has {model.config.num_labels} outputs, by cream.json {outputs}")


def _auto_class(folder: Path, config, kind: str, new_head: Head | None):
    """The library's class that loads a model of this kind."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

    if kind == POLICY:
        return AutoModelForCausalLM
    head = new_head or read_kind(folder).get("head")
    reads = head["reads"] if head else kind_of(config.architectures or [])[1]
    auto_class = AutoModelForTokenClassification if reads == "step_token" else AutoModelForSequenceClassification
    if type(config) not in auto_class._model_mapping and not remote_code():
        raise UserError(
            f"{folder}: transformers has no {auto_class.__name__.removeprefix('AutoModelFor')} for models of type "
            f"{config.model_type}, so that a reward model on one cannot be read at the {reads or 'last_token'}"
        )
    return auto_class


def _init_head(model) -> None:
    """Draw a new head: weights from N(0, 1 / (hidden size + 1)), bias 0."""
    head = getattr(model, head_name(model))
    whole = nullcontext()
    if hasattr(head.weight, "ds_id"):  # in shards (ZeRO-3)
        import deepspeed

        whole = deepspeed.zero.GatheredParameters(list(head.parameters()), modifier_rank=0)
    with torch.no_grad(), whole:
        head.weight.normal_(0, (head.in_features + 1) ** -0.5)
        if head.bias is not None:
            head.bias.zero_()


def _attention(config) -> str | None:
    """sdpa where the model has it; eager where attention scores are capped, which sdpa would silently drop; None is the
    library's choice for a model that has neither."""
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


def _tensor_parallel(config, tp_size: int, kind: str):
    """The library's plan but for the head, and embeddings that are its weights: those stay whole, as a reward model's
    head does by itself."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers.distributed import DistributedConfig

    text = config.get_text_config()
    text.base_model_tp_plan = {k: style for k, style in text.base_model_tp_plan.items() if k != "embed_tokens"}
    head = getattr(MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None), "_tp_plan", None) or {}
    # of the library's styles the one that leaves weights and outputs alone, where there is no backward pass
    plan = dict.fromkeys(head, "replicated_with_grad_allreduce") if kind == POLICY else None
    return DistributedConfig(tp_size=tp_size, tp_plan=plan)


def check_tp_size(folder: Path, tp_size: int) -> None:
    """Raises UserError where a model cannot be tensor-parallel over so many devices."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        folder, local_files_only=True, trust_remote_code=remote_code()
    ).get_text_config()
    if not getattr(config, "base_model_tp_plan", None):
        raise UserError(
            f"--tensor_parallel_size {tp_size}: transformers has no tensor-parallel plan for models of type "
            f"{config.model_type} ({folder})"
        )
    sizes = {
        "attention heads": config.num_attention_heads,
        "key-value heads": getattr(config, "num_key_value_heads", None),
        "numbers within a feed-forward": getattr(config, "intermediate_size", None),
        "within an expert": getattr(config, "moe_intermediate_size", None),
    }
    sizes = {name: size for name, size in sizes.items() if isinstance(size, int)}
    if any(size % tp_size for size in sizes.values()):
        text = ", ".join(f"{size} {name}" for name, size in sizes.items())
        raise UserError(f"--tensor_parallel_size {tp_size}: {folder} has {text}; it must divide them all")
