"""Checks of a model's folder by its configuration and the headers of its weights, without loading them."""

import math
import os
from collections import Counter
from pathlib import Path

import msgspec

from cream.errors import UserError
from cream.files import store
from cream.files.provenance import KIND, LAST, POLICY, REWARD_MODEL, read_kind

REMOTE_CODE = "CREAM_TRUST_REMOTE_CODE"  # "yes" under --trust_remote_code, for child processes too
CONVERT = (
    "To convert weights whose source you trust: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW), in "
    "Python with transformers"
)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
HEADS = ("score", "classifier")  # a reward model's head, as transformers spells it
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
ONE_MODEL = "remove what is not this model's, or save the model again"
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")  # names for it in config.json
# ends of the names of embeddings and heads, which have a row for each token
ROWS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "lm_head.weight")
MOST_HEADER = 100_000_000  # bytes; safetensors' own limit
KINDS = {POLICY: "a policy (a language model that generates text)", REWARD_MODEL: "a reward model"}
CLASSES = {  # end of a class name in config.json -> kind, and where a head reads
    "ForSequenceClassification": (REWARD_MODEL, "last_token"),
    "RewardModel": (REWARD_MODEL, "last_token"),
    "ForTokenClassification": (REWARD_MODEL, "step_token"),
    "ForCausalLM": (POLICY, None),
    "LMHeadModel": (POLICY, None),
}


def remote_code() -> bool:
    """Whether Python files in a model's folder may be run."""
    return os.environ.get(REMOTE_CODE) == "yes"


class Tensor(msgspec.Struct):
    """A tensor in a safetensors header: dtype as spelled there, shape, first and last byte."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


TENSOR = msgspec.json.Decoder(Tensor)


def kind_of(classes: list[str]) -> tuple[str | None, str | None]:
    """(kind, where its head reads) of a model by the names of its classes; None if unknown."""
    ends = (known for name in classes for end, known in CLASSES.items() if name.endswith(end))
    return next(ends, (None, None))


def stated_kind(folder: Path, config: dict) -> tuple[str | None, str]:
    """(the kind of a folder's model, None where nothing says it; what says it: its cream.json, else its `config`)."""
    classes = [name for name in config.get("architectures") or [] if isinstance(name, str)]
    recorded = read_kind(folder).get("kind")
    return recorded or kind_of(classes)[0], KIND if recorded else f"config.json: {', '.join(classes)}"


def check_kind(folder: Path, config: dict, kind: str | None) -> None:
    """Raises UserError where a folder holds a model of another kind; None: any kind will do."""
    found, source = stated_kind(folder, config)
    if kind is not None and found not in (None, kind):
        raise UserError(f"{folder}: expected {KINDS[kind]}, found {KINDS[found]} ({source})")


def check_folder(folder: Path, kind: str | None = POLICY) -> None:
    """Raises UserError when a model folder holds another kind of model, misses a part, the tokenizer included, or holds
    pickled weights only."""
    check_weights(folder, kind)
    if not has_tokenizer(folder):
        raise UserError(f"{folder}: the tokenizer's files are missing")


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer's vocabulary."""
    return any((folder / name).exists() for name in VOCABULARIES)


def is_adapter(folder: Path) -> bool:
    """Whether a folder is an adapter's: it has no model of its own. Some trainers save the base model's config too."""
    return (folder / ADAPTER_CONFIG).exists() and not has_weights(folder)


def has_weights(folder: Path) -> bool:
    """Whether a folder has a model's weights as safetensors, in one file or in shards."""
    return (folder / INDEX).exists() or (folder / WEIGHTS).exists()


def check_weights(folder: Path, kind: str | None = POLICY) -> None:
    """Raises UserError unless the model is of this kind, and config.json and all safetensors shards are there, the
    latter as long as they say."""
    if is_adapter(folder):
        raise UserError(f"{folder}: an adapter; give it as a checkpoint, and --model the model that it was trained on")
    if not (folder / "config.json").exists():
        inside = next((each for each in (folder / LAST, *sorted(folder.glob("checkpoint-*"))) if each.is_dir()), None)
        hint = f"; did you mean {inside}?" if inside else ""
        raise UserError(f"{folder}: not a model folder, it has no config.json{hint}")
    config = store.read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.json'}: expected one object of settings")
    for name in ("text_config", "rope_parameters", "rope_scaling"):
        if not isinstance(config.get(name), dict | None):
            raise UserError(f"{folder / 'config.json'}: `{name}` should be an object")
    if not isinstance(config.get("architectures"), list | None):
        raise UserError(f"{folder / 'config.json'}: `architectures` should be a list")
    check_kind(folder, config, kind)
    if not has_weights(folder):
        pickles = sorted(p.name for form in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(form))
        pickle = f"; {pickles[0]} is a pickle, which is never loaded. {CONVERT}" if pickles else ""
        raise UserError(f"{folder}: no model.safetensors{pickle}")
    files = _tensors_by_file(folder)
    check_one_model(folder, config, files)
    _check_layers(folder, config, sum(map(len, files.values())))
    _check_vocabulary(folder, config, files)


def check_one_model(folder: Path, config: dict, files: dict[str, dict[str, Tensor]]) -> None:
    """Raises UserError where transformers and vLLM would read different weights: transformers prefers the single file
    to shards, a file that config.json names to both, and applies an adapter beside them; vLLM takes the files of the
    index, and without one every safetensors file. `files` are the weights by file."""
    if (name := config.get("transformers_weights")) not in (None, WEIGHTS, INDEX):
        raise UserError(f"{folder / 'config.json'}: `transformers_weights` is {name!r}, not the model's weights here")
    if (folder / ADAPTER_CONFIG).exists():
        raise UserError(f"{folder}: holds a model and an adapter ({ADAPTER_CONFIG}); give each a folder of its own")
    if (folder / WEIGHTS).exists() and WEIGHTS not in files:
        raise UserError(f"{folder}: holds {WEIGHTS} and shards ({INDEX}): one of them is not this model's; {ONE_MODEL}")
    named = [name for file in files.values() for name in file]
    if len(named) > len({*named}):
        twice = sorted(name for name, count in Counter(named).items() if count > 1)
        raise UserError(f"{folder}: two of its weight files have {', '.join(twice[:3])}; {ONE_MODEL}")
    for other in beside_single_file(folder):
        if again := sorted(tensors(other).keys() & {*named}):
            raise UserError(f"{folder}: {WEIGHTS} and {other.name} both have {', '.join(again[:3])}; {ONE_MODEL}")


def beside_single_file(folder: Path) -> list[Path]:
    """Other safetensors files beside a model's single one; consolidated.safetensors has it in Mistral's own names."""
    single = (folder / WEIGHTS).exists() and not (folder / INDEX).exists()
    return sorted(path for path in folder.glob("*.safetensors") if single and path.name != WEIGHTS)


def _check_vocabulary(folder: Path, config: dict, files: dict[str, dict[str, Tensor]]) -> None:
    """Raises UserError where embeddings or head have other rows than config.json has tokens."""
    size = vocabulary(config)
    if size is None or "text_config" in config:  # the parts of a composite model have vocabularies of their own
        return
    for name, tensor in ((name, tensor) for file in files.values() for name, tensor in file.items()):
        if name.endswith(ROWS) and len(tensor.shape) == 2 and tensor.shape[0] != size:
            raise UserError(
                f"{folder}: {name} has {tensor.shape[0]} rows, but `vocab_size` in its config.json is {size}; "
                "model.resize_token_embeddings(SIZE) in transformers makes them equal"
            )


def vocabulary(config: dict) -> int | None:
    """How many tokens a model embeds, by its config.json."""
    size = (config.get("text_config") or config).get("vocab_size", config.get("vocab_size"))
    return size if isinstance(size, int) else None


def _check_layers(folder: Path, config: dict, count: int) -> None:
    """Raises UserError if config.json has more layers than there are tensors (`count`): building 10¹² would take too
    long."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for name in LAYERS:
            if isinstance(layers := part.get(name), int) and layers > count:
                raise UserError(
                    f"{folder / 'config.json'}: `{name}` is {layers}, but the weights have {count} tensors in all"
                )


def _tensors_by_file(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of each weight file of a folder. Raises UserError if one is missing or incomplete."""
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
        raise UserError(f"{index}: {outside[0]!r} is not a file in this folder")
    if missing := [name for name in names if not (folder / name).exists()]:
        raise UserError(f"{folder}: weights are missing: {', '.join(missing)}")
    files = {name: tensors(folder / name) for name in names}
    if lacking := sorted(tensor for tensor, name in shards.items() if tensor not in files[name]):
        raise UserError(f"{folder}: {shards[lacking[0]]} lacks {len(lacking)} tensors: {', '.join(lacking[:3])}")
    return files


def tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, from its header (8 bytes: its length; then JSON).

    Raises UserError if that is damaged, or the file is not as long as it says.
    """
    try:
        with store.open_file(file) as opened:
            size = opened.seek(0, os.SEEK_END)
            opened.seek(0)
            length = int.from_bytes(opened.read(8), "little")
            header = opened.read(length) if length <= min(size - 8, MOST_HEADER) else b""
        entries = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        by_name = {name: TENSOR.decode(raw) for name, raw in entries.items() if name != "__metadata__"}
        end = 8 + length + max([tensor.data_offsets[1] for tensor in by_name.values()], default=0)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise UserError(f"{file}: its safetensors header is damaged or truncated; download or save it again") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    if end != size:
        raise UserError(
            f"{file}: has {size} bytes where its header says {end}: it is incomplete; download or save it again"
        )
    return by_name


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's model."""
    return [folder / name for name in _tensors_by_file(folder)]


def head_outputs(folder: Path) -> int | None:
    """How many outputs the head of a reward model's folder has; None where it has no head of a known name."""
    wanted = {f"{name}.weight" for name in HEADS}
    named = ((name, tensor) for file in _tensors_by_file(folder).values() for name, tensor in file.items())
    return next((tensor.shape[0] for name, tensor in named if name in wanted), None)


def parameter_count(folder: Path) -> int:
    """Parameters of a folder's model, without weights in other files (consolidated.safetensors)."""
    return sum(math.prod(tensor.shape) for file in _tensors_by_file(folder).values() for tensor in file.values())
