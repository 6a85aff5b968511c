"""Prompts -> answers through any engine: which prompts fit, and what is kept of an answer."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from cream.chat import Chat
from cream.engines import Completion, Engine, Request, Sampling
from cream.records import Message, Samples


def generate(
    engine: Engine,
    chat: Chat,
    prompts: Mapping[str, Sequence[Message]],
    sampling: Sampling,
    max_prompt: int,
    dropped: Counter[str],
) -> Iterator[tuple[str, list[Completion]]]:
    """(uuid, answers) of each prompt of at most `max_prompt` tokens, in any order; others are counted in `dropped`."""

    def requests() -> Iterator[Request]:
        for uuid, messages in prompts.items():
            ids = chat.prompt(messages)
            if len(ids) > max_prompt:
                dropped[f"prompt longer than {max_prompt} tokens"] += 1
            else:
                yield Request(uuid, ids)

    yield from engine.generate(requests(), sampling)


def samples(
    chat: Chat, uuid: str, prompt: list[Message], completions: Sequence[Completion], extra: dict | None = None
) -> Samples:
    """The record of a prompt's answers; `extra` keys of the prompt's record are carried along.

    `logprob` is null where the answer's text does not tokenise back to the sampled ids: what will be scored and trained
    on is then another sequence than the one sampled.
    """
    complete = [c.finish_reason == "stop" for c in completions]
    again = chat.answers(prompt, [c.text for c in completions], complete)
    same = [t is not None and t.ids[t.spans[0][0] :] == c.token_ids for t, c in zip(again, completions, strict=True)]
    return Samples(
        uuid=uuid,
        prompt=prompt,
        responses=[c.text for c in completions],
        finish_reason=[c.finish_reason for c in completions],
        num_tokens=[len(c.token_ids) for c in completions],
        logprob=[c.logprob if ok else None for c, ok in zip(completions, same, strict=True)],
        extra=extra or {},
    )
