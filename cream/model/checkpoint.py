"""A model's folder: what its files say of the model, and writing one that any Hugging Face tool loads.

cream.json in it is typed (provenance.Sidecar): `kind`, policy or reward_model; `head` of the latter; `chat_template`,
the hash of the text format that it was trained on; its lineage (`started_from`, `merged_from`).
"""

import errno
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from cream.errors import UserError
from cream.files import store
from cream.files.fingerprints import fingerprint_folder, fingerprint_text
from cream.files.folders import kind_of, tensors, weight_files
from cream.files.provenance import KIND, POLICY, REWARD_MODEL
from cream.files.raw import with_filename
from cream.model.reward_head import describe_head

log = logging.getLogger("cream")


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
    It is written under another name and renamed, so that a folder of this name is always complete. The weights come
    first: where a file beside them cannot be written, they stay, in FOLDER.weights, and the UserError says so.
    """
    staged, old, weights = (folder.with_name(name.format(folder.name)) for name in (".{}.tmp", ".{}.old", "{}.weights"))
    for left in (staged, old, weights):
        shutil.rmtree(left, ignore_errors=True)
    with with_filename(folder):
        _write_weights(model, staged, dtype, state)
        try:
            _write_rest(model, tokenizer, staged, dtype, about)
        except Exception as error:  # the libraries raise all kinds
            staged.rename(weights)
            if isinstance(error, OSError):
                log.warning("the weights are in %s", weights)
                raise
            raise UserError(f"{folder}: {_in_words(error)}; the weights are in {weights}") from error
        if folder.exists():
            folder.rename(old)
        staged.rename(folder)
        store.sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def check_saving(model, tokenizer) -> None:
    """Raises UserError where the libraries would refuse to save this model or tokenizer: everything of `save` but the
    weights is written to a temporary folder, and their names, ties and conversions are tried without their values."""
    state = {n: torch.empty(getattr(v, "ds_shape", v.shape), dtype=v.dtype, device="meta") for n, v in _named(model)}
    with tempfile.TemporaryDirectory() as place:
        try:
            with _plain_generation(model):
                model.save_pretrained(place, state_dict=state, is_main_process=False)  # which writes nothing
            model.config.save_pretrained(place)
            _write_rest(model, tokenizer, Path(place), None, {})
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                return  # of the temporary folder's disk
            raise UserError(f"{model.name_or_path}: its checkpoints could not be saved: {_in_words(error)}") from error


def _named(model) -> Iterator[tuple[str, torch.Tensor]]:
    """What state_dict() has, by all of its names; under ZeRO-3 the parameters themselves, which know their shapes."""
    saved = model.state_dict().keys()
    both = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    return ((name, value) for part in both for name, value in part if name in saved)


def _write_weights(model, staged: Path, dtype: torch.dtype | None, state: dict[str, torch.Tensor] | None) -> None:
    """The weights and config.json."""
    state = model.state_dict() if state is None else state
    if dtype is not None:
        cast = {(v.data_ptr(), v.shape): v.to(dtype) for v in state.values() if v.is_floating_point()}
        state = {k: cast.get((v.data_ptr(), v.shape), v) for k, v in state.items()}  # tied weights stay one tensor
    with _plain_generation(model):
        model.save_pretrained(staged, state_dict=state)


def _write_rest(model, tokenizer, staged: Path, dtype: torch.dtype | None, about: dict) -> None:
    """The files beside the weights, and what config.json says of those."""
    config = store.read_json(staged / "config.json")
    if dtype is not None:  # the library names the masters' dtype
        config["dtype"] = str(dtype).removeprefix("torch.")
    if not _tied(model):  # a head of its own: for readers that would tie it, as the config of its base may say
        for part in (config, config.get("text_config", {})):
            part |= {"tie_word_embeddings": False} if part.get("tie_word_embeddings") else {}
    store.write_json(staged / "config.json", config)
    if model.can_generate():  # the settings as they came, which the library may refuse to save
        model.generation_config.to_json_file(staged / "generation_config.json", keys_to_pop=["compile_config"])
    tokenizer.save_pretrained(staged)
    make_readable(staged)
    about = describe(model, tokenizer) | about | {"fingerprint": fingerprint_folder(staged, cached=False)}
    store.write_json(staged / KIND, about)
    for path in staged.iterdir():
        store.sync(path)


def make_readable(folder: Path) -> None:
    """Give weights the mode of the settings beside them: safetensors writes files that only their owner can read."""
    for path in folder.glob("*.safetensors"):
        shutil.copymode(next(folder.glob("*config.json")), path)


def _tied(model) -> bool:
    """Whether the head is the embeddings' matrix; True for a model without such a head."""
    head = model.get_output_embeddings()
    return head is None or head.weight is model.get_input_embeddings().weight


@contextmanager
def _plain_generation(model) -> Iterator[None]:
    """A model whose generation settings the library does not refuse to save."""
    from transformers import GenerationConfig

    if not model.can_generate():  # a reward model, which has none
        yield
        return
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _in_words(error: Exception) -> str:
    """An error of a library: its kind and the beginning of its text."""
    return f"{type(error).__name__}: {str(error).strip()[:400]}"


def describe(model, tokenizer) -> dict:
    """What cream.json says of any model: its kind, a reward model's head, and the text format."""
    about = {"kind": kind_of([type(model).__name__])[0] or POLICY}
    if about["kind"] == REWARD_MODEL:
        about["head"] = describe_head(model)
    if tokenizer.chat_template:
        about["chat_template"] = fingerprint_text(tokenizer.get_chat_template())
    return about
