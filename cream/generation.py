"""Prompts -> answers through any engine: which prompts fit, and what is kept of an answer."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from cream.chat import Chat
from cream.engines import Completion, Engine, Request, Sampling
from cream.records import Prompt, Samples


def generate(
    engine: Engine,
    chat: Chat,
    prompts: Iterable[Prompt],
    sampling: Sampling,
    max_prompt: int,
    dropped: Counter[str],
) -> Iterator[tuple[Prompt, list[int], list[Completion]]]:
    """(prompt, its ids, its answers) of each prompt of at most `max_prompt` tokens, in any order, as they are finished.

    Longer ones are counted in `dropped`. Prompts are taken as the engine needs them, and held until they are answered.
    """
    asked: dict[str, tuple[Prompt, list[int]]] = {}

    def requests() -> Iterator[Request]:
        for prompt in prompts:
            ids = chat.prompt(prompt.messages)
            if len(ids) > max_prompt:
                dropped[f"prompt longer than {max_prompt} tokens"] += 1
            else:
                asked[prompt.uuid] = prompt, ids
                yield Request(prompt.uuid, ids)

    for uuid, completions in engine.generate(requests(), sampling):
        yield *asked.pop(uuid), completions


def samples(chat: Chat, prompt: Prompt, prompt_ids: list[int], completions: Sequence[Completion]) -> Samples:
    """The record of a prompt's answers; keys that the prompt's record has beside its messages are carried along.

    `logprob` is null where the answer's text does not tokenise back to the sampled ids: what will be scored and trained
    on is then another sequence than the one sampled.
    """
    complete = [c.finish_reason == "stop" for c in completions]
    again = chat.answers(prompt.messages, [c.text for c in completions], complete, prompt_ids)
    same = [t is not None and t.ids[t.spans[0][0] :] == c.token_ids for t, c in zip(again, completions, strict=True)]
    return Samples(
        uuid=prompt.uuid,
        prompt=prompt.messages,
        responses=[c.text for c in completions],
        finish_reason=[c.finish_reason for c in completions],
        num_tokens=[len(c.token_ids) for c in completions],
        logprob=[c.logprob if ok else None for c, ok in zip(completions, same, strict=True)],
        extra=prompt.extra,
    )
