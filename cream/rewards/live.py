"""Rewards of responses as they are sampled, in the process that samples them: by the workers, the text format and the
rules of rewarding.py, without its files, so that both give a response the same reward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cream.cli import interrupts
from cream.errors import UserError
from cream.files.fingerprints import verified
from cream.files.index import Keys
from cream.records import Prompt, Rewards, Samples
from cream.rewards import REWARDS
from cream.rewards.passes import QUOTING, WORKERS, Run, make_record
from cream.scoring.driver import Model, Pass
from cream.scoring.pool import Pool, Worker


@dataclass(frozen=True)
class Live:
    """A reward source with its flags, and the folder and fingerprint of the model of each role. It is pickled to every
    process that samples; there `load` makes what rewards."""

    name: str
    options: object
    folders: Mapping[str, tuple[Path, str]]

    @property
    def run(self) -> Run:
        """The source as `Run` describes it; no file has its samples."""
        return Run(REWARDS[self.name], self.options, Path(), lambda: ())

    def prepare(self, prompts: Iterable[Prompt], skip: bool) -> None:
        """Let the source read its files, such as the label of each prompt. Raises UserError as rewarding.py does."""
        if hasattr(source := REWARDS[self.name], "prepare"):
            samples = [Samples(uuid=each.uuid, prompt=each.messages, responses=[]) for each in prompts]
            source.prepare(self.options, lambda: samples, skip)

    def load(self, kind: str, bf16: bool | None, text: dict) -> Callable[[Sequence[Samples]], list[Rewards]]:
        """What rewards samples on a device of a kind, cpu or cuda; weights are loaded at the first one. `text`: how it
        becomes tokens, as `load_chat` takes it. Raises UserError for a tokenizer that does not suit."""
        return partial(_reward, self.run, {p.role: self._worker(p, kind, bf16, text) for p in self.run.passes})

    def _worker(self, p: Pass, kind: str, bf16: bool | None, text: dict) -> tuple[Model, Worker]:
        from cream.model.load import load_chat

        folder, fingerprint = self.folders[p.role]
        chat = load_chat(folder, **text | (QUOTING if p.quotes else {}))
        if hasattr(REWARDS[self.name], "check_chat"):
            REWARDS[self.name].check_chat(p.role, chat, self.options)
        model = Model(folder, fingerprint, chat, Pool(kind), bf16)
        worker = WORKERS[p.worker]
        chunk = worker.chunk_of(model.pool, 0)
        return model, verified(folder, fingerprint, worker.setup(model, self.options, chunk, Keys()), kind)


def _reward(run: Run, loaded: Mapping[str, tuple[Model, Worker]], samples: Sequence[Samples]) -> list[Rewards]:
    """The rewards of samples, of which several may be of one prompt; the caller's random numbers are left alone."""
    import torch

    results: list[dict[str, list]] = [{} for _ in samples]
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices), interrupts.whole():  # a worker would leave the rest to a resumed run
        for p in run.passes:
            requests = [run.requests(p.role, sample) for sample in samples]
            for i, own in enumerate(requests):
                for request in own:
                    request.uuid = f"{i} {request.uuid}"
            found = _results(*loaded[p.role], p, [request for own in requests for request in own])
            for own, result in zip(requests, results, strict=True):
                result[p.role] = [found[request.uuid] for request in own]
    combine = run.source.combine
    return [
        make_record(sample, combine(sample, own, run.options)) for sample, own in zip(samples, results, strict=True)
    ]


def _results(model: Model, work: Worker, p: Pass, requests: list) -> dict[str, object]:
    """uuid -> result of each request, as rewarding.py has it from its journal."""
    worker, of = WORKERS[p.worker], {request.uuid: request for request in requests}
    found = {}
    for uuid, result in work(iter(requests)):
        found[uuid] = worker.from_row(worker.as_row(result, model.chat), of[uuid])
    if lost := of.keys() - found.keys():
        raise UserError(f"{model.folder}: no result for {len(lost)} of {len(requests)} requests")
    return found
