"""A reward source's passes over a file of samples, into the output's journal, and the rewards made of them."""

import copy
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import tee
from pathlib import Path
from types import ModuleType

from cream.alarms import LIMITS, Limits, sound
from cream.errors import UserError
from cream.files import store
from cream.files.index import Keys
from cream.files.journal import Output
from cream.records import Message, Rewards, Samples, encode, ended_turn
from cream.rewards.base import GroupReward
from cream.rewards.ties import Ties
from cream.scoring import armo, completions, driver, heads, logprobs, rounds, signs
from cream.scoring.cache import Scores, Source, beside
from cream.scoring.driver import Model, Pass
from cream.scoring.logprobs import Group, Scored, keep_finite
from cream.scoring.pool import Pool
from cream.text.refusals import find_refusals

log = logging.getLogger("cream")
WORKERS = {
    "logprobs": logprobs,
    "rounds": rounds,
    "heads": heads,
    "signs": signs,
    "armo": armo,
    "completions": completions,
}
QUOTING = {"literal": True, "thoughts": "score"}  # text of passes whose requests quote: responses are not scored
TOGETHER = 256  # groups whose log-probabilities are cached, then journaled, at once
SOURCES = {"computed": "computed", "cached": "from the score cache", "sampler": "from the sampler"}


@dataclass(frozen=True)
class Run:
    """A reward source with its flags, and the samples in `path`. `read` is called again and again: at most a chunk of a
    .jsonl file is in memory."""

    source: ModuleType
    options: object
    path: Path
    read: Callable[[], Iterable[Samples]]

    @property
    def passes(self) -> list[Pass]:
        """The source's passes."""
        return self.source.passes(self.options)

    @property
    def files(self) -> dict[str, tuple[Path, type | None]]:
        """The files that the source reads beside the samples: flag -> path, kind of its records, if it has any."""
        return self.source.files(self.options) if hasattr(self.source, "files") else {}

    @property
    def contents(self) -> dict[str, str]:
        """Further texts that decide the rewards, by name."""
        return self.source.contents(self.options) if hasattr(self.source, "contents") else {}

    def prepare(self, skip: bool) -> None:
        """Let the source read these, and refuse what can be refused before anything is computed; `skip`: malformed
        records are skipped."""
        if hasattr(self.source, "prepare"):
            self.source.prepare(self.options, self.read, skip)

    def rejected(self, limit: int | None) -> Iterator[dict]:
        """The malformed records among the first `limit` samples, and in the source's own files."""
        files = [(path, kind) for path, kind in self.files.values() if kind is not None]
        for file in ((self.path, Samples, limit), *files):
            yield from store.rejected(*file)

    def requests(self, role: str, sample: Samples) -> list:
        """What the model of a role is given of a sample. The uuid of each is its key in the journal: the role, the
        number of all but the first, the sample's uuid."""
        if hasattr(self.source, "requests"):
            requests = self.source.requests(role, sample, self.options)
        else:
            sampled = role == "policy" and getattr(self.options, "score_from", "model") == "sampling"
            requests = [group(sample, sampled)]
        requests = [copy.copy(request) for request in requests]
        for i, request in enumerate(requests):
            request.uuid = f"{role}#{i}:{sample.uuid}" if i else f"{role}:{sample.uuid}"
        return requests

    def items(self, role: str, cache: tuple[Path, Source] | None = None) -> Iterator:
        """The requests of all samples; groups with the values that the score cache has of them."""
        scores = cache and Scores(*cache)
        for sample in self.read():
            cached = scores.find(sample.uuid) if scores else {}
            for request in self.requests(role, sample):
                if scores:
                    request.cached = cached
                yield request


def group(sample: Samples, sampled: bool = False) -> Group:
    """A sample's responses; an absent finish_reason means that all of them ended by themselves. `sampled` adds the
    sampler's own log-probabilities."""
    complete = [ended_turn(reason) for reason in sample.finish_reason or [None] * len(sample.responses)]
    own = None
    if sampled and sample.logprob and sample.num_tokens:
        own = [None if v is None else (v, n) for v, n in zip(sample.logprob, sample.num_tokens, strict=True)]
    return Group(
        sample.uuid, sample.prompt, sample.responses, complete, own, verbatim=True, opened=sample.thought_opened
    )


def score_all(
    run: Run,
    output: Output,
    folders: dict[str, Path],
    prompts: int,
    *,
    pool: Callable[[], Pool],
    bf16: bool | None,
    text: dict,
    skip: bool,
    show: bool,
) -> dict[str, Source | None]:
    """All passes into the journal, as far as it does not hold them; returns role -> source of its log-probabilities.

    `folders`: the model of each role; `prompts`: how many samples there are; `text`: how it becomes tokens, as
    `load_chat` takes it. `skip`: a prompt that the chat template refuses has no rewards. `show`: print the first
    request as the model sees it.
    """
    from cream.model.load import load_chat

    done, sources = output.resume(), {}
    for p in run.passes:
        folder = folders[p.role].absolute()  # as the input: a replica works in a folder of its own
        chat = load_chat(folder, **text | (QUOTING if p.quotes else {}))
        if hasattr(run.source, "check_chat"):
            run.source.check_chat(p.role, chat, run.options)
        if not (skip or p.quotes):
            find_refusals(run.path, run.read(), chat, skip)
        model = Model(folder, output.header["inputs"][p.role], chat, pool(), bf16)
        sources[p.role] = _run_pass(run, output, done, p, model, prompts, show and not sources)
    return sources


def _run_pass(run: Run, output: Output, done: Keys, p: Pass, model: Model, prompts: int, show: bool) -> Source | None:
    log.info("%s: %s", p.role, model.folder)
    worker, own, cache = WORKERS[p.worker], hasattr(run.source, "requests"), None
    count = sum(len(run.requests(p.role, sample)) for sample in run.read()) if own else prompts
    chunk = worker.chunk_of(model.pool, count)
    if worker.CACHED:
        source = Source(model.fingerprint, model.precision.name, model.pool.kind, worker.CACHED)
        cache = beside(run.path.absolute()), source
    if show:
        worker.show_first(model, run.items(p.role), run.options)
    items, setup = partial(run.items, p.role, cache), partial(worker.setup, model, run.options, chunk, done)
    how = {"count": count, "chunk": chunk, "doing": f"{p.worker}, {p.role}", "unit": "requests" if own else "prompts"}
    results = driver.run(model, items, done, setup, **how)
    if not cache:
        watch = _watch(run, p.role, worker, output, done)
        for key, result in results:
            row = worker.as_row(result, model.chat)
            output.append({"uuid": key, **row})
            if watch and not watch.see(worker.from_row(row)):
                watch = None
        if watch:
            watch.end()
        return None
    counts = _append_and_cache(output, worker, results, Scores(*cache))
    output.facts.setdefault("reuse", {})[p.role] = {name: counts[name] for name in SOURCES if counts[name]}
    message = ", ".join(f"{counts[name]} {words}" for name, words in SOURCES.items() if counts[name])
    values = "log-probabilities" if worker.CACHED == logprobs.CACHED else "outputs"
    log.info("%s: %s of responses: %s", p.role, values, message or "none left to compute")
    return source


def _watch(run: Run, role: str, worker: ModuleType, output: Output, done: Keys):
    """The source's watch over a pass, if it has one that is not content with what the journal holds."""
    watch = run.source.watch(role, run.options) if hasattr(run.source, "watch") else None
    if watch and done:
        for row in output.rows(request.uuid for request in run.items(role)):
            del row["uuid"]
            if not watch.see(worker.from_row(row)):
                return None
    return watch


def _append_and_cache(
    output: Output, worker: ModuleType, results: Iterator[tuple[str, Scored]], scores: Scores
) -> Counter[str]:
    """Append results to the journal, as many as there are where the pass ends early, and to the score cache; returns
    how many log-probabilities come from where."""
    counts, new = Counter(), deque()

    def append() -> None:
        scores.keep([(key.partition(":")[2], one.computed) for key, one in new])  # first: else computed again
        while new:
            key, one = new.popleft()
            output.append({"uuid": key, **worker.as_row(one, None)})

    try:
        for key, one in results:
            new.append((key, one))
            counts += one.sources
            if len(new) == TOGETHER:
                append()
    finally:
        append()
    return counts


def rewards(run: Run, output: Output, limits: Limits = LIMITS) -> Iterator[dict]:
    """The rewards that the source makes of its passes' results, encoded, in the order of the samples; responses without
    one are counted as dropped; `limits`: of alarms. Raises UserError where the journal has no results of a sample as it
    is now."""
    ahead, samples = tee(run.read())  # in step: one reader of the file, whose memory grows with it, serves both
    workers = {p.role: WORKERS[p.worker] for p in run.passes}
    rows = output.rows(request.uuid for sample in ahead for role in workers for request in run.requests(role, sample))
    ties = Ties()
    for sample in samples:
        results = {role: [] for role in workers}
        for role, worker in workers.items():
            for request in run.requests(role, sample):
                row = next(rows, {})
                result = worker.from_row(row, request) if row.pop("uuid", None) == request.uuid else None
                if result is None:
                    raise UserError(
                        f"{output.partial}: has no scores of record {sample.uuid!r} as it is now: the samples were "
                        "changed while this ran. Give another output, or --overwrite"
                    )
                results[role].append(result)
        record = make_record(sample, run.source.combine(sample, results, run.options))
        for reason in filter(None, record.reason or ()):
            output.drop(reason)
        ties.add(record.reward, sample.responses)
        yield encode(record)
    output.facts["rewarded"] = ties.summary()
    output.facts["alarms"] = sound(ties.facts(ranked=bool(run.passes)), limits)


def make_record(sample: Samples, given: GroupReward) -> Rewards:
    """The record of a prompt's responses with what its source gives them."""
    reward, reason = keep_finite(given.reward, given.reason or [None] * len(given.reward))  # NaN would win and lose
    return Rewards(
        uuid=sample.uuid,
        prompt=sample.prompt,
        response=[[*sample.prompt, Message("assistant", text)] for text in sample.responses],
        reward=reward,
        reason=reason if any(reason) else None,
        score=given.score,
        ref_score=given.ref_score,
        num_tokens=given.num_tokens or sample.num_tokens,
        finish_reason=sample.finish_reason,
        logprob=sample.logprob,
        source_prompt=sample.source_prompt,
        parts=given.parts,
        texts=given.texts,
        preferences=given.preferences,
        extra=sample.extra,
    )
