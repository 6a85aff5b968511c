"""A reward source's passes over a file of samples, into the output's journal, and the rewards made of them."""

import copy
import logging
import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, tee
from pathlib import Path
from types import ModuleType

from cream.errors import UserError
from cream.files import store
from cream.files.index import Keys
from cream.files.journal import Output
from cream.records import Message, Rewards, Samples, encode
from cream.rewards.base import GroupReward
from cream.scoring import completions, driver, heads, logprobs
from cream.scoring.cache import Scores, Source, beside
from cream.scoring.driver import Model, Pass
from cream.scoring.logprobs import Group
from cream.scoring.pool import Pool

log = logging.getLogger("cream")
WORKERS = {"logprobs": logprobs, "heads": heads, "completions": completions}
TOGETHER = 256  # groups whose log-probabilities are cached, then journaled, at once
SOURCES = {"computed": "computed", "cached": "from the score cache", "sampler": "from the sampler"}
Read = Callable[[], Iterable[Samples]]


@dataclass(frozen=True)
class Run:
    """A reward source with its flags, and the samples in `path`. `read` is called again and again: at most a chunk of a
    .jsonl file is in memory."""

    source: ModuleType
    options: object
    path: Path
    read: Read

    @property
    def passes(self) -> list[Pass]:
        """The source's passes."""
        return self.source.passes(self.options)

    @property
    def files(self) -> dict[str, tuple[Path, type]]:
        """The files that the source reads beside the samples: flag -> path, kind of its records."""
        return self.source.files(self.options) if hasattr(self.source, "files") else {}

    def prepare(self, skip: bool) -> None:
        """Let the source read these, and refuse what can be refused before anything is computed; `skip`: malformed
        records are skipped."""
        if hasattr(self.source, "prepare"):
            self.source.prepare(self.options, self.read, skip)

    def rejected(self, limit: int | None) -> Iterator[dict]:
        """The malformed records among the first `limit` samples, and in the source's own files."""
        for file in ((self.path, Samples, limit), *self.files.values()):
            yield from store.rejected(*file)

    def requests(self, role: str, sample: Samples) -> list:
        """What the model of a role is given of a sample; the uuid of each is its key in the journal."""
        if own := getattr(self.source, "requests", None):
            return [_keyed(request, role, sample.uuid, i) for i, request in enumerate(own(role, sample, self.options))]
        sampled = role == "policy" and getattr(self.options, "score_from", "model") == "sampling"
        return [_keyed(group(sample, sampled), role, sample.uuid, 0)]

    def items(self, role: str, cache: tuple[Path, Source] | None = None) -> Iterator:
        """The requests of all samples; groups with the values that the score cache has of them."""
        scores = cache and Scores(*cache)
        for sample in self.read():
            known = scores.find(sample.uuid) if scores else {}
            for request in self.requests(role, sample):
                if scores:
                    request.known = known
                yield request


def group(sample: Samples, sampled: bool = False) -> Group:
    """A sample's responses; an absent finish_reason means that all of them ended by themselves. `sampled` adds the
    sampler's own log-probabilities."""
    complete = [reason != "length" for reason in sample.finish_reason or [None] * len(sample.responses)]
    own = None
    if sampled and sample.logprob and sample.num_tokens:
        own = [None if v is None else (v, n) for v, n in zip(sample.logprob, sample.num_tokens, strict=True)]
    return Group(sample.uuid, sample.prompt, sample.responses, complete, own)


def _keyed(request, role: str, uuid: str, number: int):
    """The request under its key: the role, the number of all but a sample's first request, the sample's uuid."""
    request = copy.copy(request)
    request.uuid = f"{role}#{number}:{uuid}" if number else f"{role}:{uuid}"
    return request


def score_all(
    run: Run,
    output: Output,
    folders: dict[str, Path],
    prompts: int,
    *,
    pool: Callable[[], Pool],
    bf16: bool | None,
    template: Path | None,
    show: bool,
) -> dict[str, Source | None]:
    """All passes into the journal, as far as it does not hold them; returns by role what its log-probabilities are of.

    `folders`: the model of each role; `prompts`: how many samples there are; `template`: a chat template's file in
    place of the tokenizers' own. `show`: print the first request as the model sees it.
    """
    from cream.model.load import load_chat

    done, scored = output.resume(), {}
    for p in run.passes:
        folder = folders[p.role].absolute()  # as the input: a replica works in a folder of its own
        model = Model(folder, output.header["inputs"][p.role], load_chat(folder, template), pool(), bf16)
        scored[p.role] = _score(run, output, done, p, model, prompts, show and not scored)
    return scored


def _score(run: Run, output: Output, done: Keys, p: Pass, model: Model, prompts: int, show: bool) -> Source | None:
    log.info("%s: %s", p.role, model.folder)
    worker, own, cache = WORKERS[p.worker], hasattr(run.source, "requests"), None
    count = sum(len(run.requests(p.role, sample)) for sample in run.read()) if own else prompts
    chunk = worker.chunk_of(model.pool, count)
    if worker.CACHED:
        cache = beside(run.path.absolute()), Source(model.fingerprint, model.precision.name, model.pool.kind)
    if show:
        worker.show_first(model, run.items(p.role), run.options)
    items, setup = partial(run.items, p.role, cache), partial(worker.setup, model, run.options, chunk, done)
    how = {"count": count, "chunk": chunk, "doing": f"{p.worker}, {p.role}", "unit": "requests" if own else "prompts"}
    found = driver.run(model, items, done, setup, **how)
    sources = _keep(output, worker, found, cache and Scores(*cache))
    if cache:
        told = ", ".join(f"{sources[name]} {words}" for name, words in SOURCES.items() if sources[name])
        log.info("%s: log-probabilities of responses: %s", p.role, told or "none left to compute")
    return cache and cache[1]


def _keep(output: Output, worker: ModuleType, found: Iterator[tuple[str, object]], scores: Scores | None) -> Counter:
    """Append results to the journal, as many as there are where the pass ends early, and to the score cache; returns
    how many log-probabilities come from where."""
    sources, new = Counter(), deque()

    def append() -> None:
        if scores:  # first: what the journal holds is not computed again
            scores.keep([(key.partition(":")[2], one.computed) for key, one in new])
        while new:
            key, one = new.popleft()
            output.append({"uuid": key, **worker.as_row(one)})

    try:
        for key, one in found:
            new.append((key, one))
            sources += one.sources if scores else Counter()
            if len(new) == (TOGETHER if scores else 1):
                append()
    finally:
        append()
    return sources


def rewards(run: Run, output: Output) -> Iterator[dict]:
    """The rewards that the source makes of its passes' results, encoded, in the order of the samples; responses without
    one are counted as dropped. Raises UserError where the journal has no results of a sample as it is now."""
    asked, each = tee(run.read())  # in step: one reader of the file, whose memory grows with it, serves both
    roles = {p.role: WORKERS[p.worker] for p in run.passes}
    rows = output.rows(
        request.uuid for request in chain.from_iterable(run.requests(role, s) for s in asked for role in roles)
    )
    for sample in each:
        results = {
            role: [_result(worker, next(rows, {}), request, sample, output) for request in run.requests(role, sample)]
            for role, worker in roles.items()
        }
        made = run.source.combine(sample, results, run.options)
        record = _record(sample, made)
        for reason in filter(None, record.reason or ()):
            output.drop(reason)
        yield encode(record)


def _result(worker: ModuleType, row: dict, request, sample: Samples, output: Output) -> object:
    found = worker.from_row(row, request) if row.pop("uuid", None) == request.uuid else None
    if found is None:
        raise UserError(
            f"{output.partial}: has no scores of record {sample.uuid!r} as it is now: the samples were changed while "
            "this ran. Give another output, or --overwrite"
        )
    return found


def _record(sample: Samples, made: GroupReward) -> Rewards:
    reward, reason = list(made.reward), made.reason or [None] * len(made.reward)
    for i, value in enumerate(reward):
        if value is not None and not math.isfinite(value):  # NaN would be the best and the worst at once
            reward[i], reason[i] = None, "not a finite number"
    return Rewards(
        uuid=sample.uuid,
        prompt=sample.prompt,
        response=[[*sample.prompt, Message("assistant", text)] for text in sample.responses],
        reward=reward,
        reason=reason if any(reason) else None,
        score=made.score,
        ref_score=made.ref_score,
        num_tokens=made.num_tokens or sample.num_tokens,
        finish_reason=sample.finish_reason,
        logprob=sample.logprob,
        source_prompt=sample.source_prompt,
        parts=made.parts,
        texts=made.texts,
        preferences=made.preferences,
        extra=sample.extra,
    )
