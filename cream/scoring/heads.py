"""The outputs of a reward model's head for the responses to many prompts: the worker of passes with reward models."""

from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from cream.errors import UserError
from cream.scoring.driver import Model
from cream.scoring.logprobs import Group, Options, arguments, chunk_of, encode, in_chunks, keep_finite, show_first

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
        return in_chunks(groups, self.chunk, self._read)

    def close(self) -> None:
        self.model = None

    def _read(self, groups: list[Group]) -> Iterator[Outputs]:
        from cream.model.reward_head import read_heads

        encoded = [encode(group, self.chat, self.limit) for group in groups]
        values = read_heads(self.model, [[row for row in rows if row] for rows, _ in encoded], self.budget)
        for (rows, reasons), own in zip(encoded, map(iter, values), strict=True):
            yield Outputs(*keep_finite([next(own) if row else None for row in rows], reasons))


def setup(model: Model, options: Options, chunk: int, done: Container[str] = ()) -> Callable[[str], Reader]:
    if model.pool.group > 1:
        raise UserError(f"--tensor_parallel_size {model.pool.group}: a reward model is held by one device")
    return partial(Reader, *arguments(model, options), chunk)


def as_row(read: Outputs, chat=None) -> dict:
    return asdict(read)


def from_row(row: dict, group: Group) -> Outputs | None:
    return Outputs(**row) if len(row["outputs"]) == len(group.responses) else None
