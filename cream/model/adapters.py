"""Adapter folders from elsewhere: believed as far as they fit, merged into the model that they were trained on."""

import logging
import re
from dataclasses import fields
from pathlib import Path

import torch

from cream.errors import UserError, out_of_memory
from cream.files import store
from cream.files.fingerprints import fingerprint_folder, fingerprint_text
from cream.files.folders import ADAPTER, ADAPTER_CONFIG, KINDS, VOCABULARIES, has_tokenizer, tensors
from cream.files.lock import Lock
from cream.files.provenance import POLICY
from cream.model.checkpoint import save
from cream.model.load import check_vocabulary, load_policy, load_tokenizer
from cream.model.lora import check_equal, merged, probe

log = logging.getLogger("cream")
TEMPLATE = "chat_template.jinja"
PARTS = ("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json", "vocab.txt", "merges.txt")
MERGE = "2: with the adapter's own tokenizer"  # what a merged folder is; another text makes merged folders anew


def adapter_base(folder: Path, name: str, base: Path) -> Path:
    """The model that an adapter was trained on, by its adapter_config.json: that folder, or `base` (the folder, or the
    hub id, that --model names) when it is the same.

    Raises UserError when it is neither: on any other model the adapter means nothing.
    """
    if not (folder / ADAPTER).exists():
        raise UserError(f"{folder}: no {ADAPTER}; pickled adapters are never loaded, convert it")
    tensors(folder / ADAPTER)
    config = store.read_json(folder / ADAPTER_CONFIG)
    if not isinstance(config, dict):
        raise UserError(f"{folder / ADAPTER_CONFIG}: expected one object of settings")
    if (task := config.get("task_type")) in ("SEQ_CLS", "TOKEN_CLS"):
        raise UserError(
            f"{folder}: expected {KINDS[POLICY]}, found the adapter of a reward model (task_type {task}); "
            "merge it into its model first, by peft's merge_and_unload"
        )
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
    """A full model folder for an adapter folder from elsewhere: merged into `base`, once, under `cache`, with the
    tokenizer that the adapter was trained with.

    Raises UserError where a tensor of the adapter has no place in the model, the model has none of the adapter for a
    place, or the saved folder gives other logits than peft's model with the adapter in it.
    """
    digest = fingerprint_text(" ".join([MERGE, fingerprint_folder(folder), fingerprint_folder(base)]))
    target = cache / f"{folder.name[:100]}-merged-{digest[:12]}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with Lock(target, timeout=-1):  # the processes of one training all come here
        if target.exists():
            return target
        tokenizer = adapter_tokenizer(folder, base)
        live = load_adapter(folder, base)
        check_vocabulary(tokenizer, live.config.get_text_config().vocab_size, folder)
        staged = cache / f".{target.name}"
        save(merged(live), tokenizer, staged, None, {"merged_from": str(folder)})
        check_equal(load_policy(staged, torch.float32, live.device), probe(live), f"{folder}: saving the merged model")
        staged.rename(target)
    return target


def adapter_tokenizer(folder: Path, base: Path):
    """The tokenizer that an adapter was trained with: its folder's, or the base's, with the folder's chat template if
    there is one. Raises UserError where the folder has a part of a tokenizer only."""
    if has_tokenizer(folder):
        log.info("%s: its own tokenizer and chat template are used", folder)
        return load_tokenizer(folder)
    if found := [name for name in PARTS if (folder / name).exists()]:
        raise UserError(
            f"{folder}: {', '.join(found)}, but none of {', '.join(VOCABULARIES)}: a part of the tokenizer that the "
            "adapter was trained with; add the rest, or remove it to use the base model's"
        )
    if (template := folder / TEMPLATE).exists():
        log.info("%s: its own chat template is used, with the tokenizer of %s", folder, base)
        return load_tokenizer(base, template)
    return load_tokenizer(base)


def load_adapter(folder: Path, base: Path):
    """peft's model of an adapter folder on its base, in float32 on the CPU. Raises UserError unless every tensor of the
    adapter is in it, and every place that the adapter's settings make has one."""
    from peft import get_peft_model
    from peft.utils import set_peft_model_state_dict
    from safetensors.torch import load_file

    config, weights = _settings(folder), _without_copies(load_file(folder / ADAPTER))
    model = load_policy(base, torch.float32, torch.device("cpu"))
    added = _resize(model, weights)
    try:
        live = get_peft_model(model, config)
        trained = {name for name, parameter in live.named_parameters() if parameter.requires_grad}
        found = set_peft_model_state_dict(live, weights)
    except Exception as error:  # peft raises all kinds on what does not fit
        if isinstance(error, RuntimeError) and out_of_memory(error):
            raise
        raise UserError(f"{folder}: the adapter does not fit {base}: {_first_lines(error)}") from None
    missing = sorted(trained.intersection(found.missing_keys))
    if found.unexpected_keys or missing:
        parts = (f"{len(names)} {what}: {', '.join(names[:3])}" for names, what in (
            (sorted(found.unexpected_keys), "of its tensors have no place in the model"),
            (missing, "places have no tensor"),
        ) if names)  # fmt: skip
        raise UserError(
            f"{folder}: the adapter does not fit {base}: {'; '.join(parts)}. Was it saved from a compiled or wrapped "
            "model, or only in part? Save it again by peft's save_pretrained of the model itself"
        )
    _check_plain(folder, live, weights)
    live.eval()
    if not probe(live).isfinite().all():
        rows = f", or it has no embeddings for the {added} tokens that it adds" if added else ""
        raise UserError(f"{folder}: with the adapter the logits are not finite: its weights hold NaN{rows}")
    return live


def _settings(folder: Path):
    """An adapter's settings as peft's config. Raises UserError for a kind that cannot be merged, and for settings that
    the installed peft does not know, and would ignore."""
    from peft import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    given = store.read_json(folder / ADAPTER_CONFIG)
    kind = given.get("peft_type")
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise UserError(f"{folder}: the installed peft has no adapters of type {kind}")
    known = {field.name for field in fields(PEFT_TYPE_TO_CONFIG_MAPPING[kind])} | {"runtime_config"}
    if unknown := sorted(name for name, value in given.items() if value and name not in known):
        raise UserError(
            f"{folder / ADAPTER_CONFIG}: the installed peft does not know, and would ignore, {', '.join(unknown)}"
        )
    try:
        config = PeftConfig.from_pretrained(folder)
    except Exception as error:
        raise UserError(f"{folder / ADAPTER_CONFIG}: not settings of an adapter: {_first_lines(error)}") from None
    if config.is_prompt_learning or config.is_adaption_prompt or getattr(config, "alora_invocation_tokens", None):
        raise UserError(f"{folder}: an adapter of type {kind} that acts on some tokens only; it cannot be merged")
    config.inference_mode = False  # what it trains has gradients, and must be in the file
    return config


def _without_copies(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An adapter's tensors without those that peft saves a second time where the vocabulary grew."""
    names = {name: name.replace(".modules_to_save.", ".") for name in weights}
    return {
        name: value
        for name, value in weights.items()
        if names[name] == name or names[name] not in weights or not torch.equal(value, weights[names[name]])
    }


def _resize(model, weights: dict[str, torch.Tensor]) -> int:
    """Give the model the rows of the embeddings that an adapter brings, and return how many are new: those are NaN
    until the adapter's are there."""
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = [re.escape(name) for name, module in model.named_modules() if any(module is layer for layer in layers)]
    brought = re.compile(rf"(?:.*\.)?(?:{'|'.join(names)})(?:\.base_layer)?\.weight")
    rows = {len(tensor) for name, tensor in weights.items() if brought.fullmatch(name) and tensor.dim() == 2}
    before = len(layers[0].weight)
    if len(rows) != 1 or rows == {before}:
        return 0  # whatever does not fit is refused by peft
    model.resize_token_embeddings(*rows, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[before:] = torch.nan
    return max(0, *rows) - min(before, *rows)


def _check_plain(folder: Path, live, weights: dict[str, torch.Tensor]) -> None:
    """Raises UserError where tensors of an adapter that replace the model's own (embeddings, head) are not in it: two
    that the model ties."""
    state = live.state_dict()
    lost = [name for name, value in weights.items() if name in state and not torch.equal(state[name], value.float())]
    if lost:
        raise UserError(f"{folder}: its tensors {', '.join(lost[:3])} are different, and the model ties them to one")


def _first_lines(error: Exception) -> str:
    """An error of peft in words: the beginning of its text, with the names that it gives."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])[:400]}"
