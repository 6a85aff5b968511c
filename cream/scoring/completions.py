"""Prompts -> responses through any engine: the worker of generation, and which prompts fit."""

import logging
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

from msgspec import structs

from cream import engines
from cream.cli.flags import flag
from cream.engines import ENGINES, Completion, Engine, Request, Sampling, choice
from cream.engines.options import temperature_flag
from cream.errors import UserError
from cream.files.index import Keys
from cream.files.journal import Output
from cream.records import Message, Prompt
from cream.scoring import driver
from cream.scoring.driver import Model
from cream.scoring.pool import Pool
from cream.text.chat import Chat
from cream.text.plain import Plain
from cream.text.rendering import Refused, naming

log = logging.getLogger("cream")

Responses = tuple[Prompt, list[int], list[Completion]]  # a prompt, its ids, its responses: none if it is too long
CACHED = None  # its results do not enter the score cache
SHOWN = 50_000  # characters of a text
DONE = None  # stands for the responses of a prompt that an earlier run has finished


@dataclass
class Options:
    """Texts of a reward's model"""

    max_length: int = flag(
        4096, "limit on tokens of prompt and response together; longer responses are skipped, never truncated", low=2
    )
    gen_n: int = flag(1, "number of texts that a reward's model generates per prompt", low=1)
    gen_max_tokens: int = flag(768, "limit on tokens per generated text", low=1)
    gen_temperature: float = temperature_flag(0.0, "sampling temperature of these texts")
    seed: int = flag(0, "seed of these texts", low=0, high=2**32 - 1)
    engine: str = flag("auto", "engine that generates these texts, as in infer.py", choices=("auto", *ENGINES))

    def sampling(self) -> Sampling:
        """How the texts are sampled."""
        n, tokens, temperature = self.gen_n, self.gen_max_tokens, self.gen_temperature
        return Sampling(n, temperature, 1.0, tokens, self.seed, logprobs=False, keep_special=False)


@dataclass(slots=True)
class Texts:
    """The texts that a model wrote to one prompt, and why each ended; none where the prompt does not fit, or the chat
    template refuses it, with the `reason`. `opened`: the prompt ends with the tag that opens a thought, so that each
    text begins within one."""

    text: list[str]
    finish_reason: list[str]
    opened: bool = False
    reason: str | None = None


class Responder:
    """A pool's worker: an engine that responds to prompts of at most `max_prompt` tokens; longer ones get no response,
    nor do those of the uuids in `done`, which have theirs already, nor with `skip_refused` those that the chat template
    refuses: it raises Refused for them otherwise."""

    def __init__(
        self,
        engine: Engine,
        chat: Chat,
        sampling: Sampling,
        max_prompt: int,
        done: Container[str] = (),
        skip_refused: bool = False,
    ):
        self.engine, self.chat, self.sampling, self.max_prompt, self.done = engine, chat, sampling, max_prompt, done
        self.skip_refused = skip_refused

    def __call__(self, prompts: Iterable[Prompt]) -> Iterator[tuple[str, Responses | None]]:
        """(uuid, (prompt, its ids, its responses)) of each prompt, DONE for one of `done`, in any order, as they are
        finished; of a huge one that is too long, and of one that is refused, no ids.

        Prompts are taken as the engine needs them, and held until they have their responses.
        """
        waiting: dict[str, tuple[Prompt, list[int]]] = {}
        aside: list[tuple[str, Responses | None]] = []

        def requests() -> Iterator[Request]:
            for prompt in prompts:
                ids, fits = self._encode(prompt)
                if not fits:
                    aside.append((prompt.uuid, (prompt, ids, [])))
                    continue
                if done := prompt.uuid in self.done:
                    aside.append((prompt.uuid, DONE))
                else:
                    waiting[prompt.uuid] = prompt, ids
                yield Request(prompt.uuid, ids, done=done)

        for uuid, completions in self.engine.generate(requests(), self.sampling):
            yield uuid, (*waiting.pop(uuid), completions)
            while aside:
                yield aside.pop()
        yield from aside

    def _encode(self, prompt: Prompt) -> tuple[list[int], bool]:
        """(A prompt's ids, whether it gets responses)."""
        if self.chat.exceeds(prompt.messages, self.max_prompt):
            return [], False
        try:
            with naming(prompt.uuid):
                ids = self.chat.encode_prompt(prompt.messages)
        except Refused:
            if self.skip_refused:
                return [], False
            raise
        return ids, len(ids) <= self.max_prompt

    def close(self) -> None:
        self.engine.close()


def _load(chat: Chat, engine: dict, how: tuple, device: str) -> Responder:
    return Responder(engines.load(tokenizer=chat.tokenizer, device=device, **engine), chat, *how)


def engine_setup(
    model: Model,
    sampling: Sampling,
    engine: dict,
    max_length: int,
    max_prompt: int,
    done: Keys,
    skip_refused: bool = False,
) -> Callable[[str], Responder]:
    """What a pool makes a replica's Responder with. `engine` has `name` (or auto) and further arguments of
    `engines.load`; prompt and response have `max_length` tokens together at most."""
    name, why = choice.choose(engine["name"], model.folder, model.pool.kind)
    stops = [*model.chat.tokenizer.convert_ids_to_tokens(list(model.chat.stop_ids)), *map(repr, sampling.stop)]
    log.info("engine %s (%s); %s", name, why, model.precision.reason)
    log.info(
        "at most %d tokens of prompt and response together; a response stops at %s", max_length, " or ".join(stops)
    )
    options = engine | {
        "name": name,
        "model_folder": model.folder,
        "dtype": str(model.precision.dtype).removeprefix("torch."),
        "max_model_len": max_length,
        "tensor_parallel_size": model.pool.group,
    }
    special = frozenset(model.chat.special)
    dropped = frozenset() if sampling.keep_special else special - model.chat.thought_marks()
    sampling = replace(sampling, stop_token_ids=model.chat.stop_ids, special=special, dropped=dropped)
    return partial(_load, model.chat, options, (sampling, max_prompt, done, skip_refused))


def chunk_of(pool: Pool, count: int) -> int | None:
    """None: one process gives its engine all, and which are done: the others keep the company of an undisturbed run."""
    return None if pool.alone else pool.batch(count)


def setup(model: Model, options: Options, chunk: int | None, done: Keys) -> Callable[[str], Responder]:
    """`engine_setup` for a pass of a reward source, by its flags. A request fits where it leaves room for a whole text,
    for one that is cut off would only seem to say nothing. Raises UserError where none can fit."""
    limit, budget = model.limit(options.max_length), getattr(options, "max_tokens_per_batch", None)
    sampling = options.sampling()
    if (room := limit - sampling.max_tokens) < 1:
        raise UserError(
            f"{sampling.max_tokens} new tokens leave no room for a request in {limit} (--max_length, or the model's "
            "context): allow fewer new tokens"
        )
    engine = {"name": options.engine} | ({"batch_tokens": budget} if budget else {})
    return engine_setup(model, sampling, engine, limit, room, done, skip_refused=True)


def as_row(responses: Responses, chat: Chat) -> dict:
    prompt, _, texts = responses
    row = {"text": [c.text for c in texts], "finish_reason": [c.finish_reason for c in texts]}
    if not texts and (reason := chat.refusal(prompt.messages)):
        row["reason"] = reason
    return row | ({"opened": True} if chat.opened else {})


def from_row(row: dict, prompt: Prompt | None = None) -> Texts:
    return Texts(**row)


def generate_responses(
    output: Output,
    model: Model,
    prompts: Callable[[], Iterable[Prompt]],
    total: int,
    sampling: Sampling,
    *,
    engine: dict,
    max_length: int,
    show: bool,
) -> Iterator[Responses]:
    """The prompts that the journal does not hold yet, each with its ids and its responses, as they are finished. One
    that does not fit is counted as dropped.

    `prompts` gives them all, `total` in number; `engine`: see `engine_setup`; a prompt has `max_length` tokens at most.
    `show`: print the first one.
    """
    done, limit = output.resume(), model.limit(max_length + sampling.max_tokens)
    max_prompt = min(max_length, limit - 1)

    def setup():
        if show:
            show_first(model, prompts())
        return engine_setup(model, sampling, engine, limit, max_prompt, done)

    how = {"count": total, "chunk": chunk_of(model.pool, total), "doing": "generating"}
    for _, responses in driver.run(model, prompts, done, setup, **how):
        if responses[2]:
            yield responses
        else:
            output.drop(f"prompt longer than {max_prompt} tokens")


def show_first(model: Model, prompts: Iterable[Prompt], options: Options | None = None) -> None:
    for prompt in prompts:
        with suppress(Refused):
            log.info("first prompt as the model sees it:\n%s", render(model.chat, prompt.messages))
            return


def render(chat: Chat | Plain, messages: Iterable[Message]) -> str:
    """A prompt as the model sees it; of very long texts their beginning and `…`."""
    short = [
        message if len(message.content) <= SHOWN else structs.replace(message, content=message.content[:SHOWN] + "…")
        for message in messages
    ]
    return chat.tokenizer.decode(chat.encode_prompt(short))
