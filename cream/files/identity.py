"""Whether an existing output is up to date: it has the settings and inputs of the present command."""

from pathlib import Path

from cream.errors import UserError
from cream.files.store import RECORD_SUFFIXES


def list_differences(old: dict, new: dict) -> str:
    """'name: old -> new' for every key in which two flat maps differ."""
    return ", ".join(
        f"{key}: {old.get(key)} -> {new.get(key)}" for key in sorted({*old, *new}) if old.get(key) != new.get(key)
    )


def find_free_path(path: Path) -> Path:
    """The first of X.2.json, X.3.json … (X-2, X-3 … for a folder) that does not exist."""
    stem, suffix = path.name, ""
    if not path.is_dir():
        while (ending := Path(stem).suffix) in RECORD_SUFFIXES:
            stem, suffix = stem.removesuffix(ending), ending + suffix
    number = 2
    while (candidate := path.with_name(f"{stem}{'.' if suffix else '-'}{number}{suffix}")).exists():
        number += 1
    return candidate


def describe_difference(existing: object, header: dict) -> str | None:
    """How an existing header ({"settings": …, "inputs": …}) differs from `header`; None when it does not."""
    if not isinstance(existing, dict) or not all(isinstance(existing.get(key), dict) for key in ("settings", "inputs")):
        return "it was not made by this command in this version, or it is damaged"
    old, new = ({**h["settings"], **h["inputs"]} for h in (existing, header))
    different = list_differences(old, new)
    return f"its settings or inputs differ: {different}" if different else None


def check_same(
    path: Path, existing: object, header: dict, what: str, advice: str = "", instead: str | None = None
) -> None:
    """Raises UserError unless `existing`, the header of the output at `path`, equals `header`.

    The message consists of `what`, the difference, `advice`, and where else to write (`instead`; default: a free path).
    """
    if (difference := describe_difference(existing, header)) is not None:
        instead = instead or f"another output, such as {find_free_path(path)}"
        raise UserError(f"{path}: {what}, but {difference}. {advice}Give {instead}, or --overwrite to replace it")
