"""Prompts split over the rounds: disjoint, seeded subsets in each of which every task has its share."""

from collections.abc import Iterable, Mapping

import xxhash


def shuffled(uuids: Iterable[str], seed: int) -> list[str]:
    """In the order of xxh3-64(uuid; seed): the same for any order that they come in, and in every process."""
    return sorted(uuids, key=lambda uuid: (xxhash.xxh3_64_intdigest(uuid.encode(), seed), uuid))


def subsets(tasks: Mapping[str, Iterable[str]], count: int, seed: int) -> list[list[str]]:
    """`count` disjoint lists that hold every uuid once, of uuids by task (unique over all tasks).

    A task's uuids go round the subsets in shuffled order, and the next task's from where that stopped: per task, and
    in all, sizes differ by at most one. Within a subset tasks are mixed, so that its beginning is a fair sample of it.
    """
    parts: list[list[str]] = [[] for _ in range(count)]
    turn = 0
    for task in sorted(tasks):
        for uuid in shuffled(tasks[task], seed):
            parts[turn % count].append(uuid)
            turn += 1
    return [shuffled(subset, seed) for subset in parts]
