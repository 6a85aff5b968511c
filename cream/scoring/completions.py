"""Prompts -> answers through any engine: what is asked, which prompts fit, and what is kept of an answer."""

import logging
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

from msgspec import structs

from cream.cli import console
from cream.engines import Completion, Engine, Request, Sampling
from cream.files.journal import Output
from cream.records import Message, Prompt, Samples
from cream.scoring.pool import Pool
from cream.text.chat import Chat, Plain
from cream.text.prompts import apply

log = logging.getLogger("cream")

Answered = tuple[Prompt, list[int], list[Completion]]  # a prompt, its ids, its answers: none if it is too long
SHOWN = 50_000  # characters of a text
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


def asked(read: Callable[[], Iterable[Prompt]], sysprompt: str) -> Iterator[Prompt]:
    """The prompts of a file, as they are put to the policy."""
    for prompt in read():
        *before, last = prompt.messages
        yield structs.replace(prompt, messages=[*before, Message("user", apply(sysprompt, last.content))])


def answered(
    output: Output,
    chat: Chat,
    prompts: Callable[[], Iterable[Prompt]],
    total: int,
    sampling: Sampling,
    *,
    pool: Pool,
    policy: Path,
    engine: dict,
    max_length: int,
    bf16: bool | None,
    show: bool,
) -> Iterator[Answered]:
    """The prompts that the journal does not hold yet, each with its ids and its answers, as they are finished. One that
    does not fit is counted as dropped.

    `prompts` gives them all, `total` in number. `policy` is the model's folder; `engine` has `name` (or auto) and what
    `engines.load` takes besides the lengths; a prompt has `max_length` tokens at most. `show`: print the first one.
    """
    import torch

    from cream import engines
    from cream.files.fingerprints import verified
    from cream.model.checkpoint import length_limit
    from cream.model.precision import choose_precision

    done = output.resume()
    if done:
        log.info("going on: %d of %d prompts are answered already", len(done), total)
    first = next(iter(prompts()))
    if all(prompt.uuid in done for prompt in prompts()):
        return
    todo = prompts if pool.alone else partial(unfinished, prompts, done, pool.batch(total))
    name, why = engines.choose(engine["name"], policy, pool.kind)
    precision = choose_precision(bf16, torch.device(pool.kind), training=False)
    limit = length_limit(max_length + sampling.max_tokens, policy)
    max_prompt = min(max_length, limit - 1)
    stops = chat.tokenizer.convert_ids_to_tokens(list(chat.stop_ids))
    log.info("engine %s (%s); %s", name, why, precision.reason)
    log.info("at most %d tokens of prompt and answer together; an answer stops at %s", limit, " or ".join(stops))
    if show:
        log.info("first prompt as the model sees it:\n%s", shown(chat, first.messages))
    dtype = str(precision.dtype).removeprefix("torch.")
    options = engine | {"name": name, "model_folder": policy, "dtype": dtype, "max_model_len": limit}
    make = partial(answerer, chat, replace(sampling, stop_token_ids=chat.stop_ids), max_prompt, options, done)
    make = partial(verified, policy, output.header["inputs"]["policy"], make)
    with console.bar(total - len(done), "answering", "prompts") as bar:
        for _, found in pool.run(todo, make, total):
            if found is KEPT:
                continue
            prompt, ids, completions = found
            if completions:
                yield prompt, ids, completions
            else:
                output.drop(f"prompt longer than {max_prompt} tokens")
            bar.update()


def unfinished(prompts: Callable[[], Iterable[Prompt]], done: Container[str], batch: int) -> Iterator[Prompt]:
    """The prompts (or groups), but for a replica's batches of which every one is in `done`."""
    rest = iter(prompts())
    while some := list(islice(rest, batch)):
        if any(prompt.uuid not in done for prompt in some):
            yield from some


def shown(chat: Chat | Plain, messages: Iterable[Message]) -> str:
    """A prompt as the model sees it; of very long texts their beginning and `…`."""
    short = [
        message if len(message.content) <= SHOWN else structs.replace(message, content=message.content[:SHOWN] + "…")
        for message in messages
    ]
    return chat.tokenizer.decode(chat.prompt(short))


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
