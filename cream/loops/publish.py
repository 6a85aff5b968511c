"""The result of a loop: its best model, registered under a name."""

from collections.abc import Mapping
from pathlib import Path

from cream.cli import names
from cream.cli.flag_fields import NULLS
from cream.errors import UserError
from cream.loops.loop import Loop


class Publisher:
    """Called with the best model, as a command names it, it registers that under the name that the loop's `keep` gives,
    if any, and returns its folder. `models`: built-in names; `registry`: of checkpoints."""

    def __init__(self, loop: Loop, models: Mapping[str, str], registry: Path):
        self.loop, self.models, self.registry = loop, models, registry

    def __call__(self, model: str) -> Path:
        base = model.lower() in NULLS
        folder = names.model(self.loop.model, self.models) if base else names.checkpoint(model, self.registry)
        if name := self.loop.keep.register:
            own = self._check(name, folder)
            names.register(self.registry, name, folder, overwrite=own)
        return folder

    def check(self) -> None:
        """Raises UserError where the name is not free."""
        if self.loop.keep and self.loop.keep.register:
            self._check(self.loop.keep.register, self.loop.best)

    def _check(self, name: str, folder: Path) -> bool:
        """Whether the name is that of another model of this loop, and may be pointed to a better one. Raises UserError
        for the name of something else."""
        entry = names.read_registry(self.registry).get(name)
        home = Path(self.loop.output_dir).resolve()
        own = entry is not None and names.in_root(entry).resolve().is_relative_to(home)
        try:
            names.check_free(self.registry, name, folder, overwrite=own)
        except UserError as error:
            raise UserError(f"keep: register: {str(error).partition(': ')[2]}") from None
        return own
