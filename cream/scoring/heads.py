"""The outputs of a reward model's head for the responses to many prompts: the worker of passes with reward models.

A reward model reads a whole conversation as its own chat template writes it, to the end: there alone its head was
trained, here and by other tools. So a truncated response has an end of turn here too.
"""

from collections import Counter
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field
from functools import partial

from cream.files.provenance import REWARD_MODEL
from cream.scoring.cache import HEAD
from cream.scoring.driver import Model
from cream.scoring.logprobs import Group, Options, Scorer, arguments, chunk_of
from cream.scoring.logprobs import show_first as show_first_of
from cream.text.rendering import Refused

__all__ = ["Options", "chunk_of"]  # as the log-probability worker has them, with those below

CACHED = HEAD  # of what the score cache has of its results


@dataclass(slots=True)
class Outputs:
    """A group's head outputs: per response a list of them, at its last token or (step_token) of one such list for the
    end of each span; None where there is none, with the reason. The rest as in logprobs.Scored."""

    outputs: list[list | None]
    reason: list[str | None]
    computed: dict[str, list] = field(default_factory=dict, compare=False)
    sources: Counter[str] = field(default_factory=Counter, compare=False)


class Reader(Scorer):
    """A pool's worker, as Scorer: the reward model in a folder."""

    kind = REWARD_MODEL

    def _encode(self, group: Group) -> tuple[list, list[str | None]]:
        return encode(group, self.chat, self.limit)

    def _result(self, rows: list, values: list, reasons: list, computed: dict, sources: Counter) -> Outputs:
        return Outputs(values, reasons, computed, sources)


def encode(group: Group, chat, limit: int) -> tuple[list, list[str | None]]:
    """Per response its Tokens or None, and the reason for None."""
    try:
        rows = chat.encode_written(group.prompt, group.responses, limit, group.opened)
    except Refused as error:
        rows = [str(error)] * len(group.responses)
    refused = [isinstance(row, str) for row in rows]
    tokens = [None if why else row for why, row in zip(refused, rows, strict=True)]
    return tokens, [row if why else None for why, row in zip(refused, rows, strict=True)]


def setup(model: Model, options: Options, chunk: int, done: Container[str] = ()) -> Callable[[str], Reader]:
    from transformers import AutoConfig

    from cream.files.folders import remote_code
    from cream.model.reward_head import check_pad

    config = AutoConfig.from_pretrained(model.folder, local_files_only=True, trust_remote_code=remote_code())
    check_pad(model.folder, config, model.chat)
    return partial(Reader, *arguments(model, options), chunk, model.pool.group)


def as_row(read: Outputs, chat=None) -> dict:
    return {"outputs": read.outputs, "reason": read.reason}


def from_row(row: dict, group: Group) -> Outputs | None:
    return Outputs(**row) if len(row["outputs"]) == len(group.responses) else None


def show_first(model: Model, groups: Iterable[Group], options: Options) -> None:
    show_first_of(model, groups, options, encode)
