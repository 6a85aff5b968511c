"""One driver for every pass of a model over records, whether it scores, responds or compares.

A pass resumes: what the journal holds is skipped in whole chunks, so that a resumed run computes the very same batches.
It works on one device or on many (pool.py), checks the model's fingerprint where each replica reads it, and shows a
progress bar. Its caller appends the results to the journal, under their items' uuids.
"""

import logging
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

from cream.cli import console
from cream.cli.screen import PROGRESS
from cream.files.index import Keys
from cream.scoring.pool import Pool, Worker

log = logging.getLogger("cream")


@dataclass(frozen=True)
class Pass:
    """One look of a model at all records.

    role: what its results are called. model: the flag that names the model: `checkpoint`, or one of a reward source's
    own. kind: what the model must be, `policy` or `reward_model`. worker: the module that computes, by its name in
    rewards.passes.WORKERS. external: the model may also be a base model, by its name or hub id. quotes: the requests
    quote prompts and responses in a turn of their own, so that special tokens written in these are text.
    """

    role: str
    model: str = "checkpoint"
    kind: str = "policy"
    worker: str = "logprobs"
    external: bool = False
    quotes: bool = False


@dataclass(frozen=True)
class Model:
    """A model's folder with its fingerprint, the text format it is given, where it works, and --bf16."""

    folder: Path
    fingerprint: str
    chat: Any  # Chat or Plain
    pool: Pool
    bf16: bool | None

    @cached_property
    def precision(self):
        """The dtype of its weights, with the reason for it."""
        import torch

        from cream.model.precision import choose_precision

        return choose_precision(self.bf16, torch.device(self.pool.kind), training=False)

    def limit(self, max_length: int) -> int:
        """Tokens that it may be given at once: `max_length`, or its context where that is shorter."""
        from cream.model.checkpoint import length_limit

        return length_limit(max_length, self.folder)


def run(
    model: Model,
    items: Callable[[], Iterable],
    done: Keys,
    setup: Callable[[], Callable[[str], Worker]],
    *,
    count: int,
    chunk: int | None,
    doing: str,
    unit: str = "prompts",
) -> Iterator[tuple[str, Any]]:
    """(item.uuid, result) of each of the `count` items whose uuid is not in `done`, in any order, as they are finished.

    `items` and what `setup` gives are pickled where there are several replicas. `setup` is called only if something is
    left to do; it gives the pool's `make(device)`. `chunk` items are skipped together or not at all; None: the worker
    gets every item, and knows itself which are done.
    """
    from cream.files.fingerprints import verified

    left = sum(item.uuid not in done for item in items()) if done else count
    if left < count:
        log.log(PROGRESS, "resuming: %d of %d %s are done", count - left, count, unit)
    if not left:
        return
    make = partial(verified, model.folder, model.fingerprint, setup())
    todo = items if chunk is None else partial(unfinished, items, done, chunk)
    with console.bar(left, doing, unit) as bar:
        for uuid, result in model.pool.run(todo, make, count):
            if uuid not in done:
                yield uuid, result
                bar.update()


def unfinished(items: Callable[[], Iterable], done: Container[str], chunk: int) -> Iterator:
    """The items, but for chunks of which every one is in `done`."""
    rest = iter(items())
    while some := list(islice(rest, chunk)):
        if any(item.uuid not in done for item in some):
            yield from some
