"""Models, datasets and checkpoints by name or path.

A registry is a flat JSON file, name -> path (relative paths from the repository root): configs/checkpoint.json and
configs/dataset.json. Only the requested entry is checked, so that a stale one does no harm.
"""

import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import xxhash

from cream.errors import UserError, nearest
from cream.files import store
from cream.files.folders import parameter_count, remote_code
from cream.files.lock import Lock

ROOT = Path(__file__).resolve().parents[2]
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
LONG = 48  # characters of a checkpoint's name that are kept in an output's
NAME = re.compile(r"\w[\w.-]*")
ANOTHER = "choose another name, or --overwrite to point it elsewhere"
TINY, SMOLLM2 = "assets/tiny_m0", "assets/smollm2"  # built-in models that are folders of the repository
ASSETS = {  # where each is from
    TINY: "it is part of the repository: git checkout assets",
    SMOLLM2: "`make real` makes it (93 MB to download)",
}
HUB_HELP = "Give a local folder, or unset HF_HUB_OFFLINE and check the network"
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken"]  # no pickles


def read_registry(registry: Path) -> dict[str, str]:
    """name -> path as written there; a missing file is an empty registry."""
    if not registry.exists():
        return {}
    entries = store.read_json(registry)
    if not isinstance(entries, dict) or not all(isinstance(v, str) for v in entries.values()):
        raise UserError(f"{registry}: expected one object of name: path")
    return entries


def register(registry: Path, name: str, path: Path, *, overwrite: bool = False) -> None:
    """Write name -> path, under a lock, atomically. Raises UserError as check_free does."""
    left_over = Lock(registry.resolve()).path.exists()  # from a process that was killed
    if read_registry(registry).get(name) == _spell_path(path) and not left_over:
        return
    registry = registry.resolve()  # clones may share one by a link
    registry.parent.mkdir(parents=True, exist_ok=True)
    with Lock(registry, timeout=-1):
        check_free(registry, name, path, overwrite=overwrite)
        entries = {**read_registry(registry), name: _spell_path(path)}
        store.update_json(registry, dict(sorted(entries.items())))


def check_free(
    registry: Path, name: str, path: Path, *, overwrite: bool = False, known: Mapping[str, str] | None = None
) -> None:
    """Raises UserError if `name` is not a valid name, is registered for another path, or is a built-in name (`known`,
    in any case) of an existing file."""
    if not NAME.fullmatch(name) or name.lower() == "none":
        raise UserError(
            f"--register {name!r}: a name has letters, digits, '.', '_' and '-' only, neither '.' nor '-' first"
        )
    entry = read_registry(registry).get(name)  # a damaged registry is reported before any work
    if overwrite:
        return
    if entry not in (None, _spell_path(path)):
        raise UserError(f"--register {name}: is registered in {registry} already, for {entry}; {ANOTHER}")
    built_in = _look_up_built_in(name, known or {})
    if entry is None and built_in:
        other = in_root(built_in)
        if other.exists() and _spell_path(other) != _spell_path(path):
            raise UserError(f"--register {name}: is the built-in name of {built_in}; {ANOTHER}")


def _look_up_built_in(name: str, known: Mapping[str, str]) -> str | None:
    """The path or id of a built-in name, in any case."""
    return {key.lower(): value for key, value in known.items()}.get(name.lower())


def _spell_path(path: Path) -> str:
    """A path as in a registry: relative to the repository root if it is below that."""
    absolute = path.parent.resolve() / path.name
    return str(absolute.relative_to(ROOT)) if absolute.is_relative_to(ROOT) else str(absolute)


def in_root(path: str) -> Path:
    """A path from a registry or enum, relative to the repository root."""
    return Path(path) if os.path.isabs(path) else ROOT / path


def _is_path(name: str) -> bool:
    """Whether a value is a path: it has a separator or a record file's suffix. Otherwise names win over files."""
    return os.sep in name or store.is_record_file(Path(name))


def dataset(name: str, known: Mapping[str, str], registry: Path) -> Path:
    """The file of a dataset: a path, a name in the registry, or a built-in name (`known`, in any case)."""
    if _is_path(name) and Path(name).is_file():
        return Path(name)
    entries = read_registry(registry)
    entry = entries.get(name) or _look_up_built_in(name, known)
    if entry is None:
        if Path(name).is_file():
            return Path(name)
        if _is_path(name):
            raise _no_file(name)
        raise UserError(
            f"--name {name}: neither a file, nor a built-in dataset, nor a name in {registry}"
            f"{nearest(name, [*known, *entries]) or '.'} Known: {', '.join([*known, *entries])}"
        )
    return in_root(entry)


def _no_file(path: str) -> UserError:
    """The error that a data set's path is not a file's, with what makes one in a folder of localdata."""
    built = re.fullmatch(r"((?:.*/)?localdata/(?!tiny/)[^/]+)/(?:oasst1\.sft|prompt(?:\.\d)?|all_test)\.json", path)
    build = f"`python prepare_data.py build all --output_dir {built[1]}`" if built else ""
    how = f"; {build} makes it, with --task_limit N of N prompts a task" if built else ""
    try:
        with store.open_file(Path(path)):
            return UserError(f"--name {path}: not a file{how}")
    except UserError as error:
        return UserError(f"--name {error}{how}")


def missing_data(name: str, path: Path) -> UserError:
    """The error that the file of a data set, given as `name`, does not exist, with what makes it, if something does."""
    made = re.fullmatch(r"(?:(?!tiny)(\w+)_(?:test|train)|oasst_sft|all_prompt|prompt_\d)", name.lower())
    how = f"`python prepare_data.py build {made[1] or 'oasst1'}` makes it; else " if made else ""
    return UserError(f"--name {name}: {path} does not exist; {how}put the data there, or give a file")


def checkpoint(name: str, registry: Path, flag: str = "--checkpoint") -> Path:
    """The folder of a checkpoint: a path, or a name in the registry."""
    if _is_path(name) and Path(name).is_dir():
        return Path(name)
    entries = read_registry(registry)
    if name not in entries:
        if Path(name).is_dir():
            return Path(name)
        raise UserError(
            f"{flag} {name}: neither a folder nor a name in {registry}{nearest(name, entries) or '.'} "
            f"Known: {', '.join(entries) or 'none yet; train.py --register NAME adds one'}"
        )
    folder = in_root(entries[name])
    if not folder.is_dir():
        raise UserError(f"{flag} {name}: {registry} points to {folder}, which does not exist; train it again")
    return folder


def registered(checkpoint: str, registry: Path) -> str:
    """The registered name of a checkpoint that is given as a folder, if it has one."""
    if not _is_path(checkpoint) or not Path(checkpoint).is_dir():
        return checkpoint
    folders = {name: in_root(path).resolve() for name, path in read_registry(registry).items()}
    return next((name for name, folder in folders.items() if folder == Path(checkpoint).resolve()), checkpoint)


def any_model(name: str, known: Mapping[str, str], registry: Path, flag: str) -> Path:
    """The folder of a checkpoint, as `checkpoint` finds it, or else of a base model, as `model` does."""
    if is_checkpoint(name, registry):
        return checkpoint(name, registry, flag)
    return model(name, known, flag, read_registry(registry))


def is_checkpoint(name: str, registry: Path) -> bool:
    """Whether `any_model` looks for a checkpoint: the name is registered, or a folder's."""
    return name in read_registry(registry) or Path(name).is_dir()


def label(checkpoint: str | Path | None) -> str:
    """A checkpoint's part in the name of an output; a folder checkpoint-N gets the run's name in front. Of a long name,
    as that of a run may be which has its start's in it, there is the beginning and a hash: else it would grow with
    every round, until no file could have it."""
    path = Path(checkpoint or "none")
    in_run = path.name.startswith("checkpoint-") and path.parent.name
    name, last = (path.parent.name, f"-{path.name}") if in_run else (path.name, "")
    if len(name) > LONG:
        name = f"{name[: LONG // 2]}-{xxhash.xxh3_64_hexdigest(name.encode())[:8]}"
    return name + last


def model(name: str, known: Mapping[str, str], flag: str = "--model", checkpoints: Iterable[str] = ()) -> Path:
    """The folder of a base model: a built-in name (`known`, in any case), a path, or a Hugging Face id. `checkpoints`:
    registered names that the flag takes as well.

    A built-in name wins over a folder: ./tiny is a folder, tiny the model. The hub is contacted only for an id that is
    not complete on disk; HF_HUB_OFFLINE is respected.
    """
    source = _look_up_built_in(name, known)
    if source is None and Path(name).is_dir():
        return Path(name)
    source = source or name
    if in_root(source).is_dir():
        return in_root(source)
    if source in ASSETS:
        raise UserError(f"--model {name}: {source} is not there; {ASSETS[source]}")
    if not HUB_ID.fullmatch(source):
        raise UserError(
            f"{flag} {name}: neither a folder, nor a Hugging Face id (owner/name), nor one of "
            f"{', '.join([*known, *checkpoints])}{nearest(name, [*checkpoints, *known])}"
        )
    return _from_hub(source, flag)


def _from_hub(hub_id: str, flag: str) -> Path:
    from huggingface_hub import errors, snapshot_download

    wanted = HUB_FILES + ["*.py"] * remote_code()
    try:
        with suppress(errors.LocalEntryNotFoundError):
            folder = Path(snapshot_download(hub_id, allow_patterns=wanted, local_files_only=True))
            if _has_weights(folder):  # another program may have downloaded the tokenizer alone
                return folder
        folder = Path(snapshot_download(hub_id, allow_patterns=wanted))
    except errors.HFValidationError as error:
        raise UserError(f"{flag} {hub_id}: neither a folder nor a Hugging Face id: {error}") from None
    except errors.GatedRepoError:
        raise UserError(f"{flag} {hub_id}: access is gated; accept its licence on the hub and log in") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{flag} {hub_id}: the hub has no such model") from None
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{flag} {hub_id}: not on disk, and the hub cannot be reached ({reason}). {HUB_HELP}") from None
    if not _has_weights(folder):  # only a part is in the cache, and the hub cannot be reached
        raise UserError(
            f"{flag} {hub_id}: {folder} lacks safetensors weights; the hub cannot be reached, or has none. {HUB_HELP}"
        )
    return folder


def _has_weights(folder: Path) -> bool:
    """Whether all of its weights are on disk; what else may be wrong with them has messages of its own."""
    try:
        return (folder / "config.json").exists() and parameter_count(folder) > 0
    except UserError:
        return False


def canonical(name: str, known: Mapping[str, str]) -> str:
    """The right spelling of a built-in name; the short name of anything else."""
    return {key.lower(): key for key in known}.get(name.lower(), short(name))


def short(name: str | None) -> str:
    """A name or path as part of an output's name: its stem; for test.json and results.json the folder's name."""
    if not name:
        return "none"
    stem = Path(name).name.partition(".")[0]
    return Path(name).parent.name if stem in ("test", "results") and Path(name).parent.name else stem


def choose_output(given: str | None, default: Path, inside: str = "results.json") -> Path:
    """The file that a flag gives, the file `inside` the folder that it gives, or without the flag the default."""
    if given is None:
        return default
    return Path(given) if store.is_record_file(Path(given)) else Path(given) / inside
