"""New prompts by a model: rounds of queries, of whose instructions those are kept that are usable and new.

All queries of a round show the instructions that were kept before it, so that they can be answered together; a round is
a record of the journal. What is kept depends on the seeds, the model and the flags alone.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import xxhash

from cream.cli.flags import flag
from cream.data.instructions import MOST, SHOWN, examples, instructions, query
from cream.data.similar import Similar
from cream.engines import Sampling
from cream.errors import UserError
from cream.files import store
from cream.files.journal import Output
from cream.records import Message, Prompt, encode
from cream.scoring import driver
from cream.scoring.completions import Responder, Responses, engine_setup, show_first
from cream.scoring.driver import Model
from cream.text.overlap import CONTAMINATED, grams, prompt_text, whole
from cream.text.plain import Plain
from cream.text.thoughts import Tags, split_thought

log = logging.getLogger("cream")

UNFINISHED = "a text that ends within its thought"
TOO_LONG = "a query that does not fit"
EQUAL = "the same words as a seed or an earlier one"
SIMILAR = "ROUGE-L above --max_rouge with a seed or an earlier one"
SURPLUS = "more than --num_prompts"
IDLE = ("few_shot", "scoring", "length_norm", "grader", "extraction", "sysprompt")  # flags of other modes


@dataclass
class SynthesisFlags:
    """Instructions (--mode instructions)"""

    num_prompts: int = flag(1000, "new prompts to write", low=1)
    max_queries: int | None = flag(
        None, "queries to the model at most, each gives some prompts or none; none: as many as --num_prompts", low=1
    )
    queries_per_round: int = flag(
        64, "queries that are put together; their examples are of the prompts kept before them", low=1
    )
    max_rouge: float = flag(
        0.7, "an instruction is dropped if its ROUGE-L with a seed or a kept one is above this", above=0, high=1
    )
    exclude: str | None = flag(
        None,
        "test sets, name or file,…: an instruction that shares 13 words in a row with one of their questions is "
        "dropped; none: nothing is compared",
        decides=False,
    )

    def given(self) -> list[str]:
        """The flags that have another value than their default."""
        return [f"--{name}" for name, value in vars(self).items() if value != getattr(type(self), name)]

    @property
    def queries(self) -> int:
        """How many queries are put at most."""
        return self.max_queries or self.num_prompts


def read_seeds(path: Path, limit: int | None, *, skip: bool) -> list[str]:
    """The first user turns of the first `limit` records, prompts or conversations, without repeated ones. Raises
    UserError if fewer than SHOWN have at most MOST words, which alone are shown as examples."""
    kind = store.detect(path, skip=skip)
    records = store.read(path, kind, limit, skip=skip)
    first = (next(message.content for message in record.messages if message.role == "user") for record in records)
    seeds = list(dict.fromkeys(" ".join(text.split()) for text in first))
    if (usable := len(_short(seeds))) < SHOWN:
        raise UserError(
            f"{path}: has {usable} different seeds of at most {MOST} words, expected {SHOWN} or more, as many as a "
            "query shows"
        )
    return seeds


def _short(seeds: Iterable[str]) -> list[str]:
    return [seed for seed in seeds if len(seed.split()) <= MOST]


def read_excluded(paths: Iterable[Path], *, skip: bool) -> set[int]:
    """The runs of words of all questions in these files."""
    found: set[int] = set()
    for path in paths:
        for record in store.read(path, store.detect(path, skip=skip), skip=skip):
            found |= grams(prompt_text(record))
    return found


@dataclass
class Kept:
    """The instructions that are kept so far, at most `wanted`, and what decides whether others join them."""

    seeds: Sequence[str]
    excluded: Set[int]
    max_rouge: float
    wanted: int
    texts: list[str] = field(default_factory=list)

    def __post_init__(self):
        self._words = {whole(seed) for seed in self.seeds}
        self._similar = Similar(self.max_rouge, self.seeds)

    @property
    def full(self) -> bool:
        """Whether no more are wanted."""
        return len(self.texts) >= self.wanted

    def refusal(self, instruction: str) -> str | None:
        """Why an instruction is not new; None if it is."""
        if whole(instruction) in self._words:
            return EQUAL
        if not self.excluded.isdisjoint(grams(instruction)):
            return CONTAMINATED
        return SIMILAR if self._similar.find(instruction) is not None else SURPLUS if self.full else None

    def add(self, instruction: str) -> None:
        self._words.add(whole(instruction))
        self._similar.add(instruction)
        self.texts.append(instruction)


@dataclass
class Round:
    """A round's number, and its key in the journal."""

    number: int

    @property
    def uuid(self) -> str:
        return f"round-{self.number}"


@dataclass
class Writer:
    """A pool's worker: gives the instructions that each round adds to those `kept`, and counts of others by reason.

    `count` queries a round, `most` in all; rounds before `done` are in the journal.
    """

    responder: Responder
    kept: Kept
    seed: int
    count: int
    most: int
    done: int
    tags: Tags

    def __call__(self, rounds: Iterable[Round]) -> Iterator[tuple[str, dict]]:
        for each in rounds:
            if each.number < self.done:
                continue
            queries = list(self._queries(each.number))
            responses: dict[str, Responses] = dict(self.responder(queries))
            if len(responses) < len(queries):  # a signal: what is there of the round is asked for again
                return
            yield each.uuid, self._sift(responses[asked.uuid] for asked in queries)

    def _queries(self, number: int) -> Iterator[Prompt]:
        seeds, chat = _short(self.kept.seeds), not isinstance(self.responder.chat, Plain)
        for i in range(number * self.count, min((number + 1) * self.count, self.most)):
            yield Prompt(uuid=f"query-{i}", messages=query(examples(seeds, self.kept.texts, self.seed, i), chat))

    def _sift(self, responses: Iterable[Responses]) -> dict:
        """The round's record: what is kept, in the order of the queries, and what not."""
        before, dropped, counts = len(self.kept.texts), Counter(), Counter()
        chat = self.responder.chat
        for _, _, completions in responses:
            counts["queries"] += 1
            dropped[TOO_LONG] += not completions
            for completion in completions:
                counts["texts"] += 1
                split = split_thought(completion.text, self.tags, chat.opened)
                if not split.closed:
                    dropped[UNFINISHED] += 1
                    continue
                cut = completion.finish_reason == "length"
                for instruction, why in instructions(split.final, cut, not isinstance(chat, Plain)):
                    counts["instructions"] += 1
                    if why := why or self.kept.refusal(instruction):
                        dropped[why] += 1
                    else:
                        self.kept.add(instruction)
        return {"kept": self.kept.texts[before:], "dropped": dict(+dropped), "counts": dict(counts)}

    def close(self) -> None:
        self.responder.close()


def synthesise(
    output: Output,
    model: Model,
    flags: SynthesisFlags,
    kept: Kept,
    sampling: Sampling,
    tags: Tags,
    *,
    engine: dict,
    max_length: int,
    show: bool,
) -> None:
    """Write the prompts. `kept`: without any yet; `engine`, `max_length`, `show`: as `generate_responses` takes them.
    Raises UserError where no instruction is kept."""
    if not model.pool.alone:
        raise UserError(
            "--mode instructions works with one copy of the model, since a round shows what the last one wrote: give "
            "one device, or several with as large a --tensor_parallel_size"
        )
    rounds = -(-flags.queries // flags.queries_per_round)
    with output:
        done = output.resume()
        for row in output.rows(Round(i).uuid for i in range(len(done))):
            for text in row["kept"]:
                kept.add(text)
        limit = model.limit(max_length + sampling.max_tokens)

        def items() -> Iterator[Round]:
            for i in range(rounds):
                if i >= len(done) and kept.full:
                    return
                yield Round(i)

        def setup() -> Callable[[str], Writer]:
            chat = not isinstance(model.chat, Plain)
            if show:
                first = examples(_short(kept.seeds), kept.texts, sampling.seed, 0)
                show_first(model, [Prompt(uuid="query", messages=query(first, chat))])
            how = sampling, engine, limit, min(max_length, limit - 1), ()
            numbers = sampling.seed, flags.queries_per_round, flags.queries, len(done), tags
            return partial(_load, engine_setup(model, *how), kept, *numbers)

        count = len(done) if kept.full else rounds  # with many new prompts a round it ends before
        how = {"count": count, "chunk": None, "doing": "writing prompts", "unit": "rounds"}
        for uuid, row in driver.run(model, items, done, setup, **how):
            output.append({"uuid": uuid, **row})
        counts = Counter()
        for row in output.rows(Round(i).uuid for i in range(rounds)):
            counts.update(row["counts"])
            output.dropped.update(row["dropped"])
        _describe(kept, counts, output, flags)
        records = (Prompt(uuid=_uuid(text), messages=[Message("user", text)]) for text in kept.texts)
        output.finish(map(encode, records), synthesis=dict(counts))


def _load(make: Callable[[str], Responder], kept: Kept, *numbers) -> Writer:
    """The worker on a device, the last of `numbers`; the others are as Writer takes them."""
    return Writer(make(numbers[-1]), kept, *numbers[:-1])


def _uuid(text: str) -> str:
    """A prompt's uuid, by its text, so that prompts of several files can be put together."""
    return f"written-{xxhash.xxh3_64_hexdigest(text.encode(errors='surrogatepass'))}"


def _describe(kept: Kept, counts: Counter[str], output: Output, flags: SynthesisFlags) -> None:
    """Log what became of all instructions. Raises UserError where none is kept."""
    log.info("%(queries)d queries, %(texts)d texts, %(instructions)d instructions", counts)
    for reason, count in output.dropped.most_common():
        log.info("  %d dropped: %s", count, reason)
    log.info("  %d kept", len(kept.texts))
    if not kept.texts:
        raise UserError(
            f"{output.path}: no instruction is left ({dict(output.dropped)}); give another model, or more --max_queries"
        )
    if not kept.full:
        log.warning(
            "fewer than --num_prompts %d: the queries are used up (--max_queries %d)", flags.num_prompts, flags.queries
        )
