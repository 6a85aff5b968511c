"""decisions.json in a loop's output_dir: what was decided, by which facts and why, and which models were deleted since.

All but the deletions follows from the loop's outputs and is decided again by the next run; a run that decides the same
leaves the file as it is.
"""

import os
from contextlib import suppress
from pathlib import Path

import msgspec

from cream.errors import UserError
from cream.files import store
from cream.files.provenance import meta_path, origin
from cream.loops.loop import Steering
from cream.loops.made import changed_flags, main_file, read_made
from cream.loops.plan import Command

NAME = "decisions.json"
FREE = ("device", "output", "output_dir")  # flags that may change though an output stays as it is


class Deleted(msgspec.Struct):
    """A training run in output_dir whose checkpoints --keep has deleted: how many bytes they had."""

    bytes: int


class Metric(msgspec.Struct):
    """A number that rounds are compared by, as a Fact."""

    value: float
    low: float | None = None
    high: float | None = None
    share: bool = False


class Round(msgspec.Struct):
    """A model that was measured: by which file (`source`), and the hash of that."""

    round: int
    starts_from: int | None
    model: str
    metric: Metric
    source: str
    hash: str


class Said(msgspec.Struct):
    """What was decided in a round, in words."""

    round: int
    text: str


class Stopped(msgspec.Struct):
    """The last round, and why no further one ran."""

    round: int
    why: str


class Best(msgspec.Struct):
    """The model of the best round; `registered`: its name in configs/checkpoint.json."""

    round: int
    model: str
    registered: str | None = None


class Decisions(msgspec.Struct):
    """The file. `loop`: the keys by which it was decided; `rounds`: the models that were measured, by which file;
    `said`: what was decided and why, in words; `stopped`: why no further round ran; `best`: the best round so far;
    `deleted`: by a run's name."""

    loop: Steering = {}
    rounds: list[Round] = []
    said: list[Said] = []
    stopped: Stopped | None = None
    best: Best | None = None
    deleted: dict[str, Deleted] = {}


class DecisionFile:
    """The file of the loop with this output_dir."""

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / NAME
        self.held = self._read()

    def _read(self) -> Decisions:
        if not self.path.exists():
            return Decisions()
        try:
            return msgspec.convert(store.read_json(self.path), Decisions)
        except msgspec.ValidationError as error:
            raise UserError(
                f"{self.path}: damaged: {error}. Without it all is decided again, by the same facts; but if --keep has "
                "deleted models, put it back"
            ) from None

    def write(self, decided: Decisions, ended: bool) -> None:
        """Replace what was decided, unless the file says that already, and, before the loop has `ended`, what follows;
        the deletions stay."""
        held, known = self.held, decided.stopped in (None, self.held.stopped) and decided.loop == self.held.loop
        for name in ("rounds", "said"):
            known &= (now := getattr(decided, name)) == getattr(held, name)[: len(now)]
        if ended or not known:
            self._replace(msgspec.structs.replace(decided, deleted=held.deleted))

    def delete(self, run: Path, size: int) -> None:
        """Say that a run's checkpoints are deleted: before they are, since a kill may come between."""
        if run.name not in self.held.deleted:
            deleted = self.held.deleted | {run.name: Deleted(size)}
            self._replace(msgspec.structs.replace(self.held, deleted=deleted))

    def _replace(self, new: Decisions) -> None:
        plain = msgspec.to_builtins(new)
        if plain != msgspec.to_builtins(self.held) or not self.path.exists():
            store.write_json(self.path, plain | origin())
        self.held = new

    def relative(self, path: str) -> str:
        """A path as the file has it: from its folder, so that all may be moved together; a name stays."""
        return os.path.relpath(path, self.folder) if os.sep in path else path

    def deleted_for(self, command: Command) -> Path | None:
        """The deleted model that a command made or read, so that it cannot run again; its output stays. Raises
        UserError where that is not there, or was made by other settings than the command's."""
        gone = {self.folder / name for name in self.held.deleted}
        paths = [command.output, *read_by(command)]
        model = next((each for path in paths for each in (path, *path.parents) if each in gone), None)
        if model is None:
            return None
        what = f"{command.title}: --keep has deleted the checkpoints of {model}"
        if (about := read_made(command)) is None:
            raise UserError(f"{what}, and {command.output} is not there; give another output_dir")
        if difference := changed_flags(command, about):
            raise UserError(
                f"{what}, and {meta_path(main_file(command))} says that it was made by other flags ({difference}); "
                "give another output_dir"
            )
        return model


def read_by(command: Command) -> list[Path]:
    """The files and folders that a command's flags and words name, among others that are none."""
    texts = [text for name, text in command.flags.items() if name not in FREE and isinstance(text, str)]
    return [Path(part.strip()) for text in (*texts, *command.words) for part in text.split(",")]


def link(place: Path, model: Path) -> None:
    """Make `place` a link to a model's folder, relative, so that all may be moved together."""
    target = os.path.relpath(model.parent.resolve() / model.name, place.parent.resolve())
    with suppress(OSError):
        if os.readlink(place) == target:
            return
    if place.exists() and not place.is_symlink():
        raise UserError(f"{place}: is in the way of the link to the best model; move it away")
    new = place.with_name(f".{place.name}.new")
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    new.replace(place)
