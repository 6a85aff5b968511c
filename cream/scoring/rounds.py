"""Log-probabilities of groups in rounds, where what is asked next depends on the scores so far, as in a knockout.

The replica that holds the model plays all rounds of its requests, those of a chunk together, so that a round's batches
are full whatever the number of groups of one request.
"""

from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

from cream.scoring import logprobs
from cream.scoring.driver import Model
from cream.scoring.logprobs import CACHED, Group, Options, Scored, Scorer, arguments, chunk_of, in_chunks

__all__ = ["CACHED", "Options", "chunk_of"]  # as the log-probability worker has them, with those below


@dataclass(slots=True)
class Rounds:
    """A request. `following(results)` gives the groups of the next round, by the scores of the groups of each round so
    far; none where it was the last. It is pickled to the replicas. `cached`: as of a Group."""

    uuid: str
    following: Callable[[list[list[Scored]]], list[Group]]
    cached: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class Played:
    """The scores of a request: per round those of its groups."""

    rounds: list[list[Scored]]

    @property
    def computed(self) -> dict[str, float]:
        """For the score cache, as of Scored."""
        return {digest: value for scored in self._all() for digest, value in scored.computed.items()}

    @property
    def sources(self) -> Counter[str]:
        """How many log-probabilities are from where, as of Scored."""
        return sum((scored.sources for scored in self._all()), Counter())

    def _all(self) -> Iterator[Scored]:
        return (scored for groups in self.rounds for scored in groups)


class Player(Scorer):
    """A pool's worker, as Scorer: plays `Rounds`."""

    def __call__(self, requests: Iterable[Rounds]) -> Iterator[tuple[str, Played]]:
        """(uuid, scores) of each request, in their order."""
        return in_chunks(requests, self.chunk, self._play)

    def _play(self, requests: list[Rounds]) -> list[Played]:
        played = [Played([]) for _ in requests]
        while todo := [(i, groups) for i in range(len(requests)) if (groups := _next(requests[i], played[i]))]:
            scored = iter(self._score([group for _, groups in todo for group in groups]))
            for i, groups in todo:
                played[i].rounds.append([next(scored) for _ in groups])
        return played


def _next(request: Rounds, played: Played) -> list[Group]:
    groups = request.following(played.rounds)
    for group in groups:
        group.cached = request.cached
    return groups


def setup(model: Model, options: Options, chunk: int, done: Container[str] = ()) -> Callable[[str], Player]:
    return partial(Player, *arguments(model, options), chunk, model.pool.group)


def as_row(played: Played, chat=None) -> dict:
    return {"rounds": [[logprobs.as_row(scored) for scored in groups] for groups in played.rounds]}


def from_row(row: dict, request: Rounds) -> Played | None:
    played = Played([])
    for rows in row["rounds"]:
        groups = request.following(played.rounds)
        if len(rows) != len(groups):
            return None
        played.rounds.append([logprobs.from_row(own, group) for own, group in zip(rows, groups, strict=True)])
        if None in played.rounds[-1]:
            return None
    return None if request.following(played.rounds) else played


def show_first(model: Model, requests: Iterable[Rounds], options: Options) -> None:
    logprobs.show_first(model, (group for request in requests for group in request.following([])), options)
