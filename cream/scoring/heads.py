"""The outputs of a reward model's head for the responses to many prompts: the worker of passes with reward models."""

import math
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from cream.cli import interrupts
from cream.errors import UserError
from cream.scoring.driver import Model
from cream.scoring.logprobs import Group, Options, arguments, chunk_of, encode, show_first

__all__ = ["Options", "chunk_of", "show_first"]  # as the log-probability worker has them, with those below

CACHED = False  # its results do not enter the score cache


@dataclass(slots=True)
class Outputs:
    """A group's head outputs: per response a list of them, at its last token or (step_token) of one such list for the
    end of each span; None where there is none, with the reason."""

    outputs: list[list | None]
    reason: list[str | None]


class Reader:
    """A pool's worker: the reward model in `folder` on `device`. A response that does not fit `limit` tokens is not
    truncated: it has no outputs, with the reason. `chunk` groups are computed together."""

    def __init__(self, folder: Path, chat, dtype, limit: int, max_tokens: int | None, chunk: int, device: str):
        import torch

        from cream.files.provenance import REWARD_MODEL
        from cream.model import hardware
        from cream.model.load import load
        from cream.model.reward_head import Heads

        self.chat, self.limit, self.chunk = chat, limit, chunk
        self.model = Heads(load(folder, REWARD_MODEL, dtype, torch.device(device)))
        self.budget = hardware.budget(max_tokens, self.model.model, torch.device(device), training=False)

    def __call__(self, groups: Iterable[Group]) -> Iterator[tuple[str, Outputs]]:
        """(uuid, outputs) of each group, in their order."""
        groups = iter(groups)
        while chunk := list(islice(groups, self.chunk)):
            if interrupts.received():  # it may be incomplete: a resumed run computes it whole
                return
            yield from zip([group.uuid for group in chunk], self._read(chunk), strict=True)

    def close(self) -> None:
        """Let the model go."""
        self.model = None

    def _read(self, groups: list[Group]) -> list[Outputs]:
        from cream.model.reward_head import read_heads

        encoded = [encode(group, self.chat, self.limit) for group in groups]
        values = read_heads(self.model, [[row for row in rows if row] for rows, _ in encoded], self.budget)
        read = []
        for (rows, reasons), group in zip(encoded, map(iter, values), strict=True):
            outputs = [next(group) if row else None for row in rows]
            broken = [value is not None and not _finite(value) for value in outputs]
            why = ["not a finite number" if bad else reason for bad, reason in zip(broken, reasons, strict=True)]
            read.append(Outputs([None if bad else v for bad, v in zip(broken, outputs, strict=True)], why))
        return read


def _finite(value: float | list) -> bool:
    return all(map(_finite, value)) if isinstance(value, list) else math.isfinite(value)


def setup(model: Model, options: Options, chunk: int, done: Container[str] = ()) -> Callable[[str], Reader]:
    """What a pool makes a replica's Reader with, of `chunk` groups at a time. Raises UserError where one device is not
    to hold the model."""
    if model.pool.group > 1:
        raise UserError(f"--tensor_parallel_size {model.pool.group}: a reward model is held by one device")
    return partial(Reader, *arguments(model, options), chunk)


def as_row(found: Outputs) -> dict:
    """A result as the journal has it."""
    return asdict(found)


def from_row(row: dict, group: Group) -> Outputs | None:
    """The outputs in a journal's row; None where they are not of this group's responses."""
    return Outputs(**row) if len(row["outputs"]) == len(group.answers) else None
