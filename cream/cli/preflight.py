"""Checks of disk and memory before a model is loaded, by lower bounds of a stage's needs."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from cream.errors import UserError
from cream.files.folders import parameter_count
from cream.records import Samples

TOKEN = 2  # bytes of a response's token in a file: fewer than the average


def check_disk(output: Path, need: float, what: str) -> None:
    """Raises UserError if the disk of an output has less than `need` bytes free, or its nearest existing folder cannot
    be written."""
    folder = next(place for place in (output.absolute(), *output.absolute().parents) if place.is_dir())
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: no permission to write {output.name} there")
    free = shutil.disk_usage(folder).free
    if free < need:
        raise UserError(
            f"{folder}: No space left: {_size(free)} are free, {what} takes about {_size(need)}; free some, or give "
            "an output on another disk"
        )


def size_of_samples(prompts: int, size: int, n: int, max_tokens: int) -> float:
    """Bytes of `n` responses to each of `prompts` (of `size` bytes in all), in the output and in its journal, if
    responses have a quarter of `max_tokens` tokens."""
    return 2 * (size + prompts * n * max_tokens / 4 * TOKEN)


def size_of_rewards(samples: Iterable[Samples]) -> tuple[int, int, int]:
    """(prompts, responses, bytes of their rewards, which repeat the prompt with each response)."""
    prompts = count = size = 0
    for sample in samples:
        prompt = sum(len(message.content) for message in sample.prompt)
        prompts, count = prompts + 1, count + len(sample.responses)
        size += prompt + sum(prompt + len(text) for text in sample.responses)
    return prompts, count, size


def size_of_run(start: Path, saves: int, saved_bytes: int, moments: int) -> float:
    """Bytes of a training run on disk: checkpoints of `saved_bytes` a weight, and two states with `moments` bytes of
    the optimiser a weight (an older one is removed when the next one is whole)."""
    return parameter_count(start) * (saves * saved_bytes + (2 * (4 + moments) if saves > 1 else 0))


def memory_of_training(
    start: Path, trained: bool, processes: int, stage: int, size: int, offload: bool, moments: int
) -> float:
    """Bytes that one device needs at least for weights, gradients and the optimiser's `moments` bytes a weight;
    `trained` false: LoRA, whose trained weights are few. `stage` of ZeRO, 0 without it; `size`: bytes of a weight in
    the forward pass under ZeRO.

    Replicas hold 8 bytes a weight and the moments; ZeRO has the gradients and float32 states (16) in shards, stage 3
    the weights too (arXiv 1910.02054, §3). On a CPU all processes of a machine share its memory.
    """
    weights = parameter_count(start)
    states = 0 if offload or not trained else 16 / processes if stage else 4 + moments
    held = size if stage in (1, 2) else (0 if offload else size / processes) if stage == 3 else 4
    return weights * (held + states)


def check_memory(need: float, free: float, what: str, advice: str) -> None:
    """Raises UserError if less than `need` bytes are free on a device; `advice`: flags that would help."""
    if free < need:
        raise UserError(
            f"out of memory for {what}: {_size(free)} are free on the device, it takes at least {_size(need)}; another "
            f"program may use some; else {advice}"
        )


def _size(count: float) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"
