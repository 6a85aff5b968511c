"""A finished checkpoint with all that is known of it, for its model card."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cream.data import SOURCES, source
from cream.errors import UserError
from cream.files import store
from cream.files.fingerprints import fingerprint_folder
from cream.files.folders import check_folder
from cream.files.provenance import ARGS, LAST, Provenance, place_of, read_kind
from cream.reporting.outputs import TRAINING, Output, Run, of_checkpoint

CARD = "README.md"
CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")  # a model in the hub's cache


@dataclass(frozen=True, eq=False)
class Model:
    """A checkpoint and what is known of it: its sidecar, the outputs it was made from, the base model's folder and hub
    id, and the hub ids of its data. `word`: as its user names it."""

    word: str
    folder: Path
    about: dict
    run: Run
    base: Path | None
    base_id: str | None
    datasets: Sequence[str]

    @cached_property
    def own(self) -> Output:
        """The training run that it is from."""
        home = self.folder.resolve().parent
        return next(output for output in self.run.of(TRAINING) if output.path.resolve() == home)

    @cached_property
    def evaluations(self) -> list[Output]:
        """Its evaluations."""
        digest = fingerprint_folder(self.folder)
        return [output for output in self.run.of("evaluation") if output.input("policy") == digest]

    @property
    def name(self) -> str:
        """Its registered name; of a folder that of its run."""
        return self.own.name if Path(self.word).exists() else self.word


def read_model(word: str, folder: Path, *, force: bool = False) -> Model:
    """A checkpoint, or the last one of a run. Raises UserError where it is none, or has changed since it was saved
    (`force`: then this is said in the card)."""
    if (folder / ARGS).exists():
        folder = folder / LAST
    if not folder.is_dir():
        raise UserError(f"{word}: not the folder of a checkpoint, nor a registered name")
    check_folder(folder, None)
    run = of_checkpoint(word, folder)
    provenance = Provenance(force)
    about = provenance.model("policy", folder)
    about = about | {"forced": [*about.get("forced", []), *provenance.forced]}
    base, base_id = _base(folder)
    names = {name.partition(".")[0] for output in run.outputs for name in output.about.get("inputs", {})}
    data = [source(name).hub for name in SOURCES if name in names]
    return Model(word, folder, about, run, base, base_id, list(dict.fromkeys(data)))


def _base(folder: Path) -> tuple[Path | None, str | None]:
    """(the folder of the model that no run here trained, its hub id), each None where it is not known."""
    seen = set()
    while start := read_kind(folder).get("sources", {}).get("start"):
        folder = place_of(folder, start)
        if folder in seen or not folder.is_dir():
            return None, None
        seen.add(folder)
    cached = CACHED.search(str(folder))
    origin = store.read_json(folder / "origin.json") if (folder / "origin.json").exists() else {}  # of `make real`
    return folder, f"{cached[1]}/{cached[2]}" if cached else origin.get("model")


def stated_license(base: Path | None) -> str | None:
    """The licence that the base model's card states; None where it is not on disk, or states none."""
    import yaml

    path = None if base is None else base / CARD
    if path is None or not path.is_file():
        return None
    head = re.match(r"---\n(.*?)\n---", path.read_text(errors="replace"), re.DOTALL)
    try:
        found = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError:
        return None
    stated = found.get("license") if isinstance(found, dict) else None
    return stated if isinstance(stated, str) else None
