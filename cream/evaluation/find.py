"""The evaluations that are meant by a file, a folder, or a checkpoint."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from cream.cli.console import command
from cream.errors import UserError
from cream.files.fingerprints import fingerprint_folder
from cream.files.provenance import LAST, read_meta
from cream.files.raw import did_you_mean

OUTPUTS = Path("outputs")


def evaluations_of(word: str, path: Path, known: Iterable[str] = ()) -> list[Path]:
    """The result files that `word` may mean: `path` itself, results.json in that folder or in the folders there, or all
    evaluations of the model or run in it, below outputs/ or next to the run. Raises UserError where there is none;
    `known`: names that may have been meant then."""
    if not path.exists():
        evaluate = command("infer.py", mode="evaluation", checkpoint="CHECKPOINT", name="DATA")
        near = did_you_mean(path, known) or "."
        raise UserError(
            f"{word}: no such file or folder, nor a registered checkpoint{near} An evaluation is made by {evaluate}"
        )
    if not path.is_dir():
        return [path]
    if (path / "results.json").is_file():
        return [path / "results.json"]
    if inside := sorted(path.glob("*/results.json")):  # of infer.py --output_dir FOLDER
        return inside
    model = path / LAST if (path / LAST).is_dir() else path
    if not (model / "config.json").is_file():
        raise UserError(
            f"{path}: neither a result file, nor the folder of an evaluation (with results.json) or of a checkpoint"
        )
    fingerprint, home = fingerprint_folder(model), model.resolve().parent.parent
    found = evaluations_by(lambda tested: tested == fingerprint, home)
    if not found:
        evaluate = command("infer.py", mode="evaluation", checkpoint=word, name="DATA")
        raise UserError(f"{word}: no evaluation of this checkpoint is in {OUTPUTS}/; make one:\n  {evaluate}")
    return found


def evaluations_by(is_wanted: Callable[[str], bool], home: Path) -> list[Path]:
    """The evaluations of models with a fingerprint that is wanted, below outputs/, in `home`, or in a folder there."""
    found = {}
    for meta in (*OUTPUTS.rglob("*.meta.json"), *home.glob("*.meta.json"), *home.glob("*/*.meta.json")):
        results = meta.with_name(meta.name.removesuffix(".meta.json"))
        if results.is_file() and (tested := _tested(results)) is not None and is_wanted(tested):
            found.setdefault(results.resolve(), Path(os.path.relpath(results)))
    return list(found.values())


def choose_pair(a: Sequence[Path], b: Sequence[Path], words: tuple[str, str]) -> tuple[Path, Path]:
    """The only two of these evaluations that are of the same data, or, of several, that have the same settings too.
    Raises UserError where there is none, or more than one."""
    a, b = without_copies(a), without_copies(b)
    if len(a) == len(b) == 1:
        return a[0], b[0]
    pairs = [(one, other) for one in a for other in b if _data(one) == _data(other)]
    alike = [pair for pair in pairs if len({str(_about(path)["settings"]) for path in pair}) == 1]
    chosen = alike or pairs
    if len(chosen) == 1:
        return chosen[0]
    lists = "\n".join(f"{word}: {', '.join(map(str, paths))}" for word, paths in zip(words, (a, b), strict=True))
    why = "several evaluations are" if chosen else "no two evaluations are"
    raise UserError(f"{why} of the same data; give two of these files:\n{lists}")


def without_copies(paths: Sequence[Path]) -> list[Path]:
    """The first of evaluations that are alike in all: of the same model, asked the same again elsewhere."""
    firsts: dict[str, Path] = {}
    for path in paths:
        about = _about(path)
        firsts.setdefault(str([about.get("output", path), about["settings"], about["inputs"]]), path)
    return [*firsts.values()]


def _about(results: Path) -> dict:
    return read_meta(results) or {"settings": {}, "inputs": {}}


def _data(results: Path) -> dict:
    """The hashes of what was asked."""
    return {name: digest for name, digest in _about(results)["inputs"].items() if name != "policy"}


def _tested(results: Path) -> str | None:
    """The fingerprint of the model of an evaluation; None for any other output."""
    about = _about(results)
    return about["inputs"].get("policy") if about["settings"].get("mode") == "evaluation" else None
