"""Whether there is room, asked before a model is loaded: what is told here is the least that a stage needs."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from cream.errors import UserError
from cream.files.folders import parameter_count
from cream.records import Samples

TOKEN = 2  # bytes of an answer's token in a file, for certain no more than it takes on average


def room(output: Path, need: float, what: str) -> None:
    """Raises UserError when the disk of an output, or of its nearest folder that exists, has less than `need` bytes, or
    may not be written."""
    folder = next(place for place in (output.absolute(), *output.absolute().parents) if place.is_dir())
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: no permission to write there, where {output.name} is to stand")
    free = shutil.disk_usage(folder).free
    if free < need:
        raise UserError(
            f"{folder}: No space left: {_size(free)} are free, {what} takes about {_size(need)}; free some, or give "
            "an output on another disk"
        )


def answers(prompts: int, size: int, n: int, max_tokens: int) -> float:
    """Bytes of `n` answers to each of `prompts` (of `size` bytes in all), in the output and in its journal: answers are
    taken to be a quarter of `max_tokens` long."""
    return 2 * (size + prompts * n * max_tokens / 4 * TOKEN)


def rewards(samples: Iterable[Samples]) -> tuple[int, int, int]:
    """(prompts, answers, bytes of their rewards: the prompt stands there again with each answer)."""
    prompts = count = size = 0
    for sample in samples:
        asked = sum(len(message.content) for message in sample.prompt)
        prompts, count = prompts + 1, count + len(sample.responses)
        size += asked + sum(asked + len(text) for text in sample.responses)
    return prompts, count, size


def run(start: Path, saves: int, saved_bytes: int) -> float:
    """Bytes of a training run: its checkpoints, in so many bytes a weight, and, between two, a state with AdamW's
    moments, the next of which is whole before one goes."""
    return parameter_count(start) * (saves * saved_bytes + (24 if saves > 1 else 0))


def training(start: Path, trained: bool, processes: int, stage: int, size: int, offload: bool) -> float:
    """Bytes that one device needs at least for weights, gradients and AdamW's moments; `trained` false: LoRA, whose own
    are few. `stage` of ZeRO, 0 without it; `size`: bytes of a weight in the forward pass under ZeRO.

    Replicas hold 16 bytes a weight; ZeRO has the gradients and float32 states (16) in shards, stage 3 the weights too
    (arXiv 1910.02054, §3). On a CPU all processes of a machine share its memory.
    """
    weights = parameter_count(start)
    states = 0 if offload or not trained else 16 / processes if stage else 12
    held = size if stage in (1, 2) else (0 if offload else size / processes) if stage == 3 else 4
    return weights * (held + states)


def memory(need: float, free: float, what: str) -> None:
    """Raises UserError when less than `need` bytes are free on a device."""
    if free < need:
        raise UserError(
            f"no memory for {what}: {_size(free)} are free on the device, and it takes at least {_size(need)}; another "
            "program may hold some; else --bf16 yes, --lora yes, more devices (--deepspeed, --tensor_parallel_size)"
        )


def _size(count: float) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"
