"""Random numbers that are a function of a seed and an index, whatever else is computed with them."""

import torch
from torch import Tensor


def gumbel(seeds: Tensor, step: int, size: int) -> Tensor:
    """(B, size) float32 standard Gumbel noise; entry [b, v] is a function of (seeds[b], step, v) and nothing else.

    seeds: (B,) int64.
    """
    streams = splitmix64(seeds, torch.tensor(step, device=seeds.device))
    noise = uniform(streams[:, None], torch.arange(size, device=seeds.device))
    return -(-noise.log()).log().float()


def uniform(seed: Tensor, index: Tensor) -> Tensor:
    """float64 in (0, 1), a function of (seed, index), both int64. 52 bits and a half: never 0 or 1, and exact, where
    float32 would end the tail of `gumbel` at 17 and flatten it before."""
    return ((splitmix64(seed, index) >> 12 & 2**52 - 1).double() + 0.5) * 2.0**-52


def splitmix64(seed: Tensor, index: Tensor) -> Tensor:
    """Output number `index` (from 0) of the SplitMix64 generator started at `seed`; int64 that carry unsigned bits.

    Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014, figure 16 (constants: Vigna's).
    """
    z = seed + (index + 1) * _signed(0x9E3779B97F4A7C15)  # integer products of tensors wrap around
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's own carries the sign along."""
    return z >> bits & 2 ** (64 - bits) - 1


def _signed(constant: int) -> int:
    """The int64 with the bits of this unsigned 64-bit constant (its top bit is set)."""
    return constant - 2**64
