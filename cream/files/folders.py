"""What a model's folder holds, whole or not: read from its headers, nothing is loaded."""

import math
import os
from pathlib import Path

import msgspec

from cream.errors import UserError
from cream.files import store

REMOTE_CODE = "CREAM_TRUST_REMOTE_CODE"  # "yes": a stage was given --trust_remote_code, here or where it was started
CONVERT = (
    "To convert weights whose source you trust: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW), in "
    "Python with transformers"
)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")  # as configs spell the number
MOST_HEADER = 100_000_000  # bytes; safetensors' own limit


def remote_code() -> bool:
    """Whether Python files in a model's folder may be run."""
    return os.environ.get(REMOTE_CODE) == "yes"


class Tensor(msgspec.Struct):
    """What a safetensors header says of a tensor: its dtype as spelled there, its shape, its first and last byte."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


TENSOR = msgspec.json.Decoder(Tensor)


def check_folder(folder: Path) -> None:
    """Raises UserError when a model folder misses a part, the tokenizer included, or holds pickled weights only."""
    check_weights(folder)
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise UserError(f"{folder}: the tokenizer's files are missing")


def check_weights(folder: Path) -> None:
    """Raises UserError unless config.json and all safetensors shards are there, the latter as long as they say."""
    if not (folder / "config.json").exists():
        raise UserError(f"{folder}: not a model folder, it has no config.json")
    config = store.read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.json'}: expected one object of settings")
    for name in ("text_config", "rope_parameters", "rope_scaling"):
        if not isinstance(config.get(name), dict | None):
            raise UserError(f"{folder / 'config.json'}: `{name}` should be an object")
    if not (folder / INDEX).exists() and not (folder / WEIGHTS).exists():
        pickles = sorted(p.name for form in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(form))
        found = f"; {pickles[0]} is a pickle, which is never loaded. {CONVERT}" if pickles else ""
        raise UserError(f"{folder}: no model.safetensors{found}")
    _check_layers(folder, config, sum(map(len, _held(folder).values())))


def _check_layers(folder: Path, config: dict, count: int) -> None:
    """Raises UserError where config.json tells of more layers than there are tensors (`count`): to build 10¹² would
    take for ever."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for name in LAYERS:
            if isinstance(layers := part.get(name), int) and layers > count:
                raise UserError(
                    f"{folder / 'config.json'}: `{name}` is {layers}, but the weights have {count} tensors in all"
                )


def _held(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of each of a folder's weight files, of its shards where it has an index. Raises UserError where one
    is missing or not whole."""
    index = folder / INDEX
    if not index.exists():
        return {WEIGHTS: tensors(folder / WEIGHTS)}
    try:
        where = msgspec.convert(store.read_json(index), dict[str, object])["weight_map"]
        shards = msgspec.convert(where, dict[str, str])
    except (msgspec.ValidationError, KeyError):
        raise UserError(f"{index}: damaged: it should say in `weight_map` which file has which tensor") from None
    names = sorted({*shards.values()})
    if outside := [name for name in names if Path(name).name != name]:
        raise UserError(f"{index}: {outside[0]!r} is no file of the folder's own")
    if missing := [name for name in names if not (folder / name).exists()]:
        raise UserError(f"{folder}: weights are missing: {', '.join(missing)}")
    held = {name: tensors(folder / name) for name in names}
    if lacking := sorted(tensor for tensor, name in shards.items() if tensor not in held[name]):
        raise UserError(f"{folder}: {shards[lacking[0]]} lacks {len(lacking)} tensors: {', '.join(lacking[:3])}")
    return held


def tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, as its header has them (8 bytes: its length; then JSON).

    Raises UserError where that is damaged, or the file is not as long as it says.
    """
    try:
        with store.open_file(file) as opened:
            size = opened.seek(0, os.SEEK_END)
            opened.seek(0)
            length = int.from_bytes(opened.read(8), "little")
            header = opened.read(length) if length <= min(size - 8, MOST_HEADER) else b""
        found = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        held = {name: TENSOR.decode(raw) for name, raw in found.items() if name != "__metadata__"}
        end = 8 + length + max([tensor.data_offsets[1] for tensor in held.values()], default=0)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise UserError(f"{file}: its safetensors header is damaged or cut short; fetch or make it again") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    if end != size:
        raise UserError(
            f"{file}: has {size} bytes where its header says {end}: it is not whole; fetch or make it again"
        )
    return held


def parameter_count(folder: Path) -> int:
    """Parameters of a folder's model; weights of another form that stand beside it (consolidated.safetensors) are not
    of it."""
    return sum(math.prod(tensor.shape) for held in _held(folder).values() for tensor in held.values())
