"""Log-likelihoods of the options of multiple choice questions, by which choices.py chooses."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from cream.files.journal import Output
from cream.scoring import driver, logprobs
from cream.scoring.logprobs import Group, Options, Scored
from cream.scoring.pool import Pool
from cream.text.chat import Chat
from cream.text.plain import Plain

CHUNK = 32  # questions that a CPU computes together, lost if the process is killed; a GPU takes a pool's batch at once


def compared(
    output: Output,
    chat: Chat | Plain,
    groups: Sequence[Group],
    *,
    pool: Pool,
    policy: Path,
    max_length: int,
    bf16: bool | None,
    show: bool,
) -> Iterator[tuple[str, Scored]]:
    """(uuid, the scores of its options) of each group that the journal does not hold yet, as they are finished.

    `policy` is the model's folder; question and option have `max_length` tokens together at most. `show`: print the
    first group's first option with its scored tokens marked.
    """
    model, options = driver.Model(policy, output.header["inputs"]["policy"], chat, pool, bf16), Options(max_length)
    chunk = pool.batch(len(groups))
    if pool.alone and pool.kind == "cpu":
        chunk = min(chunk, CHUNK)

    def setup():
        if show:
            logprobs.show_first(model, groups[:1], options)
        return logprobs.setup(model, options, chunk)

    how = {"count": len(groups), "chunk": chunk, "doing": "comparing options", "unit": "questions"}
    for uuid, found in driver.run(model, partial(list, groups), output.resume(), setup, **how):
        yield uuid, found.scored


def unanswered(rows: Iterable[dict], output: Output) -> Iterator[dict]:
    """The same records; those without log-likelihoods are counted as dropped, for the reason that they have."""
    for row in rows:
        if "option_logprob" not in row:
            output.drop(row["reason"])
        yield row
