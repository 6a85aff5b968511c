"""The score of an ArmoRM for the responses to many prompts, with its attributes and their coefficients: a worker."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cream.errors import UserError
from cream.scoring.driver import Model
from cream.scoring.heads import Options, Reader, as_row, chunk_of, from_row, show_first
from cream.scoring.logprobs import arguments

if TYPE_CHECKING:
    from cream.model.batches import Group as Rows

__all__ = ["Options", "as_row", "chunk_of", "from_row", "show_first"]  # as the worker of heads has them

CACHED = "ArmoRM in float32, 1"  # of what the score cache has of its results


class ArmoReader(Reader):
    """A pool's worker, as Reader: each response's outputs are 1 + 2 K numbers, as cream.model.armo.Armo gives them."""

    def _load(self) -> Loaded:
        return Loaded(*self._how)


class Loaded:
    """The ArmoRM in `folder` on a device; `max_tokens` bounds a batch."""

    def __init__(self, folder: Path, dtype, device: str, max_tokens: int | None):
        import torch

        from cream.files.provenance import REWARD_MODEL
        from cream.model import hardware
        from cream.model.armo import ArmoHeads, load_armo
        from cream.model.load import load

        armo, place = load_armo(folder), torch.device(device)
        self.model = ArmoHeads(load(folder, REWARD_MODEL, dtype, place))
        self.model.armo, self.model.lead = armo.to(place), armo.facts.lead
        self.budget = hardware.budget(max_tokens, self.model.model, place, training=False)

    def score(self, groups: Sequence[Rows]) -> list[list[list[float]]]:
        """The outputs for each response of each group."""
        from cream.model.backbone import run

        return [[value.tolist() for value in group] for group in run(self.model, groups, self.budget)]

    def close(self) -> None:
        """The model goes with this object."""


def setup(model: Model, options: Options, chunk: int, done: Container[str] = ()) -> Callable[[str], ArmoReader]:
    if model.pool.group > 1:
        raise UserError(f"--tensor_parallel_size {model.pool.group}: an ArmoRM is held by one device")
    return partial(ArmoReader, *arguments(model, options), chunk, model.pool.group)
