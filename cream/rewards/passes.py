"""A reward source's passes over a file of samples: one model at a time, chunk by chunk into the output's journal."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from itertools import islice
from types import ModuleType

from cream.journal import Output
from cream.records import Message, Rewards, Samples, encode
from cream.rewards import Group
from cream.rewards.likelihood import Scored

CHUNK = 256  # groups between two appends to the journal; a resumed run computes the very same batches


def groups(samples: Iterable[Samples], sampled: bool = False) -> Iterator[Group]:
    """What a reward source sees of the samples; an absent finish_reason means that every answer ended by itself.
    `sampled` adds the sampler's own log-probabilities."""
    for s in samples:
        complete = [reason != "length" for reason in s.finish_reason or [None] * len(s.responses)]
        own = None
        if sampled and s.logprob and s.num_tokens:
            own = [None if v is None else (v, n) for v, n in zip(s.logprob, s.num_tokens, strict=True)]
        yield Group(s.uuid, s.prompt, s.responses, complete, own)


def run(output: Output, role: str, of: Iterable[Group], score: Callable, progress: Callable) -> None:
    """Score the groups, chunk by chunk, into the journal; what it holds already is passed over."""
    done = output.resume()
    of = iter(of)
    while chunk := list(islice(of, CHUNK)):
        if any(_key(role, group.uuid) not in done for group in chunk):
            for group, scored in zip(chunk, score(chunk), strict=True):
                if (key := _key(role, group.uuid)) not in done:
                    output.append({"uuid": key, **asdict(scored)})
        progress(len(chunk))


def finish(output: Output, source: ModuleType, normalize: str, samples: Iterable[Samples], **facts) -> None:
    """Combine the passes into rewards and write them, in the order of the samples; answers without one are counted.

    `facts` join the sidecar.
    """
    output.finish(_rewards(output, source, normalize, samples), **facts)


def _rewards(output: Output, source: ModuleType, normalize: str, samples: Iterable[Samples]) -> Iterator[dict]:
    for sample in samples:
        kept = output.rows(_key(role, sample.uuid) for role in source.PASSES)
        found = [Scored(row["logprob"], row["num_tokens"], row["reason"]) for row in kept]
        group = source.combine(dict(zip(source.PASSES, found, strict=True)), normalize)
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


def _key(role: str, uuid: str) -> str:
    return f"{role}:{uuid}"
