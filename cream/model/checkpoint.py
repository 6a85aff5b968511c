"""A model's folder: what its files say of the model, and writing one that any Hugging Face tool loads.

cream.json in it is typed (provenance.Sidecar): `kind`, policy or reward_model; `head` of the latter; `chat_template`,
the hash of the text format that it was trained on; its lineage (`started_from`, `merged_from`).
"""

import shutil
from pathlib import Path

import torch

from cream.errors import UserError
from cream.files import store
from cream.files.fingerprints import fingerprint_folder, fingerprint_text
from cream.files.folders import kind_of, tensors, weight_files
from cream.files.provenance import KIND, POLICY, REWARD_MODEL
from cream.files.raw import with_filename
from cream.model.reward_head import describe_head


def stored_dtype(folder: Path) -> torch.dtype:
    """The floating-point dtype that a folder's weights are stored in."""
    kinds = {tensor.dtype for file in weight_files(folder) for tensor in tensors(file).values()}
    for name, dtype in (("F32", torch.float32), ("BF16", torch.bfloat16), ("F16", torch.float16)):
        if name in kinds:
            return dtype
    raise UserError(
        f"{folder}: its weights are stored as {', '.join(sorted(kinds))}; expected float32, bfloat16 or float16"
    )


def context_length(folder: Path) -> int | None:
    """How many tokens a model was made for (prompt and response together); None when its config does not say.

    With LongRoPE (arXiv 2402.13753) it is the length up to which all have the same frequencies: beyond it the library
    takes others for a whole batch, so that a response's log-probability would depend on the others in it.
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


def save(
    model, tokenizer, folder: Path, dtype: torch.dtype | None, about: dict, state: dict[str, torch.Tensor] | None = None
) -> None:
    """A folder that any Hugging Face tool loads: weights (as `dtype`, None = as they are), tokenizer, chat template;
    and cream.json, with the model's kind and head, the chat template's hash, and `about`.

    `state` are the weights where the model itself does not have them, or not as float32 (ZeRO).
    It is written under another name and renamed, so that a folder of this name is always complete.
    """
    staged, old = (folder.with_name(f".{folder.name}.{end}") for end in ("tmp", "old"))
    for left in (staged, old):
        shutil.rmtree(left, ignore_errors=True)
    with with_filename(folder):
        _write(model, tokenizer, staged, dtype, about, state)
        if folder.exists():
            folder.rename(old)
        staged.rename(folder)
        store.sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _write(model, tokenizer, staged: Path, dtype, about: dict, state: dict[str, torch.Tensor] | None) -> None:
    state = model.state_dict() if state is None else state
    if dtype is not None:
        cast = {(v.data_ptr(), v.shape): v.to(dtype) for v in state.values() if v.is_floating_point()}
        state = {k: cast.get((v.data_ptr(), v.shape), v) for k, v in state.items()}  # tied weights stay one tensor
    model.save_pretrained(staged, state_dict=state, safe_serialization=True)
    if dtype is not None:  # the library names the masters' dtype
        config = store.read_json(staged / "config.json")
        store.write_json(staged / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})
    tokenizer.save_pretrained(staged)
    about = describe(model, tokenizer) | about | {"fingerprint": fingerprint_folder(staged, cached=False)}
    store.write_json(staged / KIND, about)
    for path in staged.iterdir():
        store.sync(path)


def describe(model, tokenizer) -> dict:
    """What cream.json says of any model: its kind, a reward model's head, and the text format."""
    about = {"kind": kind_of([type(model).__name__])[0] or POLICY}
    if about["kind"] == REWARD_MODEL:
        about["head"] = describe_head(model)
    if tokenizer.chat_template:
        about["chat_template"] = fingerprint_text(tokenizer.get_chat_template())
    return about
