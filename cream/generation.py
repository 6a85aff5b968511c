"""Prompts -> answers through any engine: which prompts fit, and what is kept of an answer."""

from collections.abc import Container, Iterable, Iterator, Sequence

from cream.chat import Chat
from cream.engines import Completion, Engine, Request, Sampling
from cream.records import Prompt, Samples

Answered = tuple[Prompt, list[int], list[Completion]]  # a prompt, its ids, its answers: none if it is too long
KEPT = None  # stands for the answers of a prompt that has them from an earlier run


class Answerer:
    """A pool's worker: an engine that answers prompts of at most `max_prompt` tokens; longer ones get no answer, nor do
    those of the uuids in `done`, which have them already."""

    def __init__(self, engine: Engine, chat: Chat, sampling: Sampling, max_prompt: int, done: Container[str] = ()):
        self.engine, self.chat, self.sampling, self.max_prompt, self.done = engine, chat, sampling, max_prompt, done

    def __call__(self, prompts: Iterable[Prompt]) -> Iterator[tuple[str, Answered | None]]:
        """(uuid, (prompt, its ids, its answers)) of each prompt, KEPT for one of `done`, in any order, as they are
        finished; of a huge one that is too long no ids.

        Prompts are taken as the engine needs them, and held until they are answered.
        """
        asked: dict[str, tuple[Prompt, list[int]]] = {}
        aside: list[tuple[str, Answered | None]] = []

        def requests() -> Iterator[Request]:
            for prompt in prompts:
                exceeds = self.chat.exceeds(prompt.messages, self.max_prompt)
                ids = [] if exceeds else self.chat.prompt(prompt.messages)
                if exceeds or len(ids) > self.max_prompt:
                    aside.append((prompt.uuid, (prompt, ids, [])))
                elif prompt.uuid in self.done:
                    aside.append((prompt.uuid, KEPT))
                    yield Request(prompt.uuid, ids, kept=True)
                else:
                    asked[prompt.uuid] = prompt, ids
                    yield Request(prompt.uuid, ids)

        for uuid, completions in self.engine.generate(requests(), self.sampling):
            yield uuid, (*asked.pop(uuid), completions)
            while aside:
                yield aside.pop()
        yield from aside

    def close(self) -> None:
        """Give the device back."""
        self.engine.close()


def answerer(
    chat: Chat, sampling: Sampling, max_prompt: int, engine: dict, done: Container[str], device: str
) -> Answerer:
    """An Answerer on `device`, its engine by `engines.load` with these arguments."""
    from cream import engines

    loaded = engines.load(tokenizer=chat.tokenizer, device=device, **engine)
    return Answerer(loaded, chat, sampling, max_prompt, done)


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
