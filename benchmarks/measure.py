"""Measuring two sides of a comparison in turn, and what to hold the result against.

A ratio is the median over rounds of peer's seconds / ours in the same round, so that a machine that slows down slows
both. Its ceiling is the ratio of counted operations: what a procedure's layout makes a matrix unit do at least. The
physical limit of a side is its operations / the machine's measured rate of matrix products.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cream.text.chat import Tokens  # noqa: E402


def machine() -> str:
    """The processor (and GPU), threads and versions, in one line."""
    named = [line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    where = f"{named[0] if named else platform.processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        where += f", {torch.cuda.get_device_name()}"
    return f"{where}; Python {platform.python_version()}, torch {torch.__version__}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def interleaved(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side in each round, the sides in turn, after one round that is not counted; a line for each.

    A side that returns a number has measured itself: that many seconds are taken.
    """
    seconds = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            own = side()
            took = own if isinstance(own, float) else time.perf_counter() - start
            if number:
                seconds[name].append(took)
            print(f"    {f'round {number}' if number else 'not counted'}, {name}: {took:.2f} s", flush=True)
    return seconds


def autocast(bf16: str, device: torch.device) -> bool:
    """Whether a training benchmark runs under bfloat16 autocast: --bf16 yes, no, or auto, where the device multiplies
    bfloat16 itself. A processor that emulates it takes many times as long, which says nothing about either side."""
    if bf16 != "auto":
        return bf16 == "yes"
    native = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if not native:
        print(
            "float32 on all sides: this processor has no bfloat16 instructions (--bf16 yes emulates them)", flush=True
        )
    return native


def ratio(name: str, peer: list[float], ours: list[float], ceiling: float | None = None) -> list[str]:
    """Prints the ratio with its spread, and its ceiling; returns the lines that are to stand last."""
    ratios = sorted(p / o for p, o in zip(peer, ours, strict=True))
    middle = statistics.median(ratios)
    print(f"{name}: {middle:.2f} times as fast, {ratios[0]:.2f} to {ratios[-1]:.2f} over {len(ratios)} rounds")
    lines = [f"ratio {name} {middle:.3f}"]
    if ceiling is not None:
        print(f"  ceiling by counted operations {ceiling:.2f}: {100 * middle / ceiling:.0f} % of it")
        lines.append(f"ratio {name}_of_ceiling {middle / ceiling:.3f}")
    return lines


def used_memory(device: str) -> int:
    """Bytes in use now: allocated on a GPU, resident of this process on the CPU."""
    return torch.cuda.memory_allocated() if device == "cuda" else psutil.Process().memory_info().rss


def side(name: str, seconds: list[float], operations: float, rate: float) -> None:
    """Prints a side's seconds beside what its operations take at the machine's rate, and the share (MFU)."""
    middle, best = statistics.median(seconds), operations / rate
    print(
        f"  {name:20} {middle:8.2f} s ({min(seconds):.2f} to {max(seconds):.2f}); {operations / 1e9:.0f} G operations, "
        f"{best:.2f} s at {rate / 1e9:.0f} G/s: {100 * best / middle:.0f} % of it"
    )


def bandwidth(device: torch.device, size: int = 1 << 28) -> float:
    """Measured bytes a second of reading memory: the sum of `size` bytes of float32, the best of five."""
    numbers, seconds = torch.ones(size // 4, device=device), []
    for _ in range(5):
        start = time.perf_counter()
        numbers.sum().item()
        seconds.append(time.perf_counter() - start)
    return size / min(seconds)


# Counting -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """What a procedure lays out: tokens in the layers, positions at which the head runs, (query, key) pairs that see
    each other. Peers are counted with their padding, as causal attention over the rectangle; ours without any."""

    tokens: int = 0
    head: int = 0
    pairs: int = 0

    def __add__(self, other: Layout) -> Layout:
        return Layout(self.tokens + other.tokens, self.head + other.head, self.pairs + other.pairs)

    def operations(self, shape, words: int, passes: float = 1, head: float | None = None) -> float:
        """Floating-point operations of `passes` forward passes (a backward pass counts as two), two a multiply-add;
        `head` passes of the head, if those are not as many.

        A token: the layers' weights; a head position: h V; a pair: 2 h a layer (scores and values).
        """
        attention = shape.layers * 2 * shape.hidden
        layers = passes * (self.tokens * shape.weights + self.pairs * attention)
        return 2.0 * (layers + (passes if head is None else head) * self.head * shape.hidden * words)


def rectangle(rows: int, width: int, head: int | None = None) -> Layout:
    """Padded rows; the head at `head` positions, by default at all."""
    return Layout(rows * width, rows * width if head is None else head, rows * width * (width + 1) // 2)


def documents(position_ids: torch.Tensor, head: int | None = None) -> Layout:
    """Packed rows (B, T), by positions that restart with each document; the head as above."""
    tokens = position_ids.numel()
    return Layout(tokens, tokens if head is None else head, int((position_ids + 1).sum()))


def trees(groups: Iterable[list[Tokens]], once: bool = False) -> Layout:
    """Each prompt once; the head where an answer's token is predicted, or `once` an answer."""
    total = Layout()
    for group in groups:
        prompt = group[0].spans[0][0] if len(group) > 1 else 0
        own = [len(row) - prompt for row in group]
        pairs = prompt * (prompt + 1) // 2 + sum(n * prompt + n * (n + 1) // 2 for n in own)
        head = len(group) if once else sum(row.num_response_tokens for row in group)
        total += Layout(prompt + sum(own), head, pairs)
    return total
