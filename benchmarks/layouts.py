"""Counted operations."""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    tokens: int = 0
    head: int = 0
    pairs: int = 0

    def __add__(self, other: Layout) -> Layout:
        return Layout(self.tokens + other.tokens, self.head + other.head, self.pairs + other.pairs)


def rectangle(rows: int, width: int) -> Layout:
    return Layout(rows * width, rows * width, rows * width * (width + 1) // 2)


def documents(position_ids) -> Layout:
    return Layout(position_ids.numel(), position_ids.numel(), int((position_ids + 1).sum()))
