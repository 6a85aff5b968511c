"""A reward source's passes over a file of samples: one model at a time, chunk by chunk into the output's journal."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from types import ModuleType

from cream.journal import Output
from cream.records import Message, Rewards, Samples, encode
from cream.rewards import Group
from cream.rewards.likelihood import Scored

CHUNK = 256  # groups between two appends to the journal; a resumed run computes the very same batches


def groups(samples: Sequence[Samples]) -> list[Group]:
    """What a reward source sees of the samples; an absent finish_reason means that every answer ended by itself."""
    return [
        Group(s.uuid, s.prompt, s.responses, [r != "length" for r in s.finish_reason or [None] * len(s.responses)])
        for s in samples
    ]


def unscored(output: Output, role: str, of: Sequence[Group]) -> list[Sequence[Group]]:
    """The chunks that this pass still has to do."""
    done = output.resume()
    chunks = [of[start : start + CHUNK] for start in range(0, len(of), CHUNK)]
    return [chunk for chunk in chunks if any(_key(role, group.uuid) not in done for group in chunk)]


def run(
    output: Output, role: str, chunks: Sequence[Sequence[Group]], score: Callable, progress: Callable[[int], object]
) -> None:
    """Score the chunks and keep what was found, answer by answer, in the journal."""
    done = output.resume()
    for chunk in chunks:
        for group, scored in zip(chunk, score(chunk), strict=True):
            if (key := _key(role, group.uuid)) not in done:
                output.append({"uuid": key, **asdict(scored)})
        progress(len(chunk))


def finish(output: Output, source: ModuleType, normalize: str, samples: Sequence[Samples], **facts) -> None:
    """Combine the passes into rewards and write them, in the order of the samples; answers without one are counted.

    `facts` join the sidecar.
    """
    rows = []
    for sample in samples:
        kept = output.rows(_key(role, sample.uuid) for role in source.PASSES)
        found = [Scored(row["logprob"], row["num_tokens"], row["reason"]) for row in kept]
        group = source.combine(dict(zip(source.PASSES, found, strict=True)), normalize)
        for reason in filter(None, group.reason):
            output.drop(reason)
        rows.append(
            encode(
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
        )
    output.finish(rows, **facts)


def _key(role: str, uuid: str) -> str:
    return f"{role}:{uuid}"
