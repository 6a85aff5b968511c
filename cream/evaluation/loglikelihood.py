"""The options of multiple choice questions, scored by a model: what choices.py chooses by."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from cream.cli import console
from cream.files.journal import Output
from cream.scoring.completions import unfinished
from cream.scoring.logprobs import Group, Scored, scorer
from cream.scoring.pool import Pool
from cream.text.chat import Chat, Plain

log = logging.getLogger("cream")

CHUNK = 32  # questions that a CPU computes together, which a kill loses; a GPU carries a pool's batch of them at once


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
    """(uuid, what its options score) of each group that the journal does not hold yet, as they are finished.

    `policy` is the model's folder; question and option have `max_length` tokens together at most. `show`: print the
    first group's first option, what is scored marked.
    """
    import torch

    from cream.files.fingerprints import verified
    from cream.model.checkpoint import length_limit
    from cream.model.precision import choose_precision

    done = output.resume()
    if done:
        log.info("going on: %d of %d questions are answered already", len(done), len(groups))
    if all(group.uuid in done for group in groups):
        return
    precision = choose_precision(bf16, torch.device(pool.kind), training=False)
    limit, chunk = length_limit(max_length, policy), pool.batch(len(groups))
    if pool.alone and pool.kind == "cpu":
        chunk = min(chunk, CHUNK)
    log.info("%s; at most %d tokens of question and option together", precision.reason, limit)
    if show and (first := chat.answers(groups[0].prompt, groups[0].answers[:1], [True])[0]):
        log.info("first option as the model sees it, what is scored marked:\n%s", chat.show(first))
    todo = partial(unfinished, partial(list, groups), done, chunk)
    make = partial(scorer, policy, chat, precision.dtype, limit, None, chunk, pool.group)
    make = partial(verified, policy, output.header["inputs"]["policy"], make)
    with console.bar(len(groups) - len(done), "comparing options", "questions") as bar:
        for uuid, found in pool.run(todo, make, len(groups)):
            if uuid not in done:
                yield uuid, found.scored
                bar.update()


def unanswered(rows: Iterable[dict], output: Output) -> Iterator[dict]:
    """The same records; those without log-likelihoods are counted as dropped, for the reason that they have."""
    for row in rows:
        if "option_logprob" not in row:
            output.drop(row["reason"])
        yield row
