"""A reward source's passes over a file of samples: one model at a time, group by group into the output's journal."""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from itertools import islice, tee
from pathlib import Path
from types import ModuleType

from cream.errors import UserError
from cream.files.journal import Keys, Output
from cream.records import Message, Rewards, Samples, encode
from cream.scoring.cache import Scores, Source
from cream.scoring.logprobs import Found, Group, Scored

KEPT_AT_ONCE = 256  # groups


def groups(samples: Iterable[Samples], sampled: bool = False) -> Iterator[Group]:
    """What a reward source sees of the samples; an absent finish_reason means that every answer ended by itself.
    `sampled` adds the sampler's own log-probabilities."""
    for s in samples:
        complete = [reason != "length" for reason in s.finish_reason or [None] * len(s.responses)]
        own = None
        if sampled and s.logprob and s.num_tokens:
            own = [None if v is None else (v, n) for v, n in zip(s.logprob, s.num_tokens, strict=True)]
        yield Group(s.uuid, s.prompt, s.responses, complete, own)


def todo(
    read: Callable[[], Iterable[Samples]],
    role: str,
    done: Keys,
    kept: tuple[Path, Source],
    chunk: int,
    sampled: bool,
) -> Iterator[Group]:
    """The groups of the samples with what is kept of them, but for chunks that the journal (`done`, its keys) holds as
    a whole: a resumed run computes the very same batches."""
    scores = Scores(*kept)
    of = groups(read(), sampled)
    while some := list(islice(of, chunk)):
        if any(_key(role, group.uuid) not in done for group in some):
            for group in some:
                group.known = scores.find(group.uuid)
                yield group


def run(
    output: Output, role: str, done: Keys, found: Iterable[tuple[str, Found]], kept: Scores, progress: Callable
) -> Counter[str]:
    """Take what a pass finds into the journal (which holds `done` of it), and beside the samples; returns how many
    answers' log π came whence."""
    whence, new = Counter(), deque()

    def take() -> None:
        kept.keep([(uuid, one.computed) for uuid, one in new])  # first: what the journal holds is not computed again
        while new:
            uuid, one = new.popleft()
            if (key := _key(role, uuid)) not in done:
                output.append({"uuid": key, **asdict(one.scored)})
                progress()

    try:
        for uuid, one in found:
            whence += one.whence
            new.append((uuid, one))
            if len(new) == KEPT_AT_ONCE:
                take()
    finally:
        take()
    return whence


def finish(
    output: Output, source: ModuleType, normalize: str, samples: Callable[[], Iterable[Samples]], **facts
) -> None:
    """Combine the passes into rewards and write them, in the order of the samples; answers without one are counted.

    `facts` join the sidecar.
    """
    output.finish(_rewards(output, source, normalize, samples), **facts)


def _rewards(
    output: Output, source: ModuleType, normalize: str, samples: Callable[[], Iterable[Samples]]
) -> Iterator[dict]:
    asked, each = tee(samples())  # in step: one reader of the file, whose memory grows with it, serves both
    rows = output.rows(_key(role, sample.uuid) for sample in asked for role in source.PASSES)
    for sample in each:
        passes = {role: _scored(next(rows, {}), role, sample, output) for role in source.PASSES}
        group = source.combine(passes, normalize)
        for reason in filter(None, group.reason):
            output.drop(reason)
        yield encode(
            Rewards(
                uuid=sample.uuid,
                prompt=sample.prompt,
                response=[[*sample.prompt, Message("assistant", text)] for text in sample.responses],
                reward=group.reward,
                reason=group.reason if any(group.reason) else None,
                finish_reason=sample.finish_reason,
                extra=sample.extra,
                **group.parts,
            )
        )


def _scored(row: dict, role: str, sample: Samples, output: Output) -> Scored:
    """What the journal's row says of these samples. Raises UserError where it is another's."""
    if row.pop("uuid", None) != _key(role, sample.uuid) or len(row["logprob"]) != len(sample.responses):
        raise UserError(
            f"{output.partial}: has no scores of record {sample.uuid!r} as it is now: the samples were changed while "
            "this ran. Give another output, or --overwrite"
        )
    return Scored(**row)


def _key(role: str, uuid: str) -> str:
    return f"{role}:{uuid}"
