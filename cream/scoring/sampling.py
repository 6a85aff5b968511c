"""Sampling for training: n responses to every prompt of a file, in the order of the prompts.

A `.jsonl` file is never in memory as a whole.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from cream.cli import console, preflight
from cream.engines import Sampling, SamplingFlags
from cream.errors import UserError
from cream.files import store
from cream.files.journal import Output
from cream.records import Prompt
from cream.scoring.completions import answered, asked, samples
from cream.text.chat import Chat

log = logging.getLogger("cream")

UNUSED = ("few_shot", "scoring", "prompt_format", "length_norm")  # flags that decide nothing of samples


class Prompts(NamedTuple):
    """The first `limit` prompts of a file (None: all), `total` of which are good; `skip`: the others are skipped."""

    path: Path
    place: Path  # the same, absolute: a replica works in a folder of its own
    limit: int | None
    skip: bool
    total: int

    def read(self) -> Iterator[Prompt]:
        """The prompts, one by one; duplicates were looked for by `open_prompts`."""
        return store.read(self.place, Prompt, self.limit, skip=self.skip, unique=False)


def open_prompts(path: Path, limit: int | None, *, skip: bool) -> Prompts:
    """Reads the whole file: a bad record or a duplicate raises UserError here, before a model is loaded, unless bad
    records are to be skipped; so does a file without any prompt."""
    total = sum(1 for _ in store.read(path, Prompt, skip=skip))
    prompts = Prompts(path, path.absolute(), limit, skip, total)
    if limit:
        prompts = prompts._replace(total=sum(1 for _ in prompts.read()))
    if not prompts.total:
        raise store.nothing_left(path, Prompt, "prompt is left to answer", limit)
    return prompts


class Plan(NamedTuple):
    """How a file of prompts is responded to; `sysprompt` names the text that is appended to each."""

    sampling: Sampling
    sysprompt: str
    engine: dict  # its name, and arguments of engines.load

    def folder(self, data: str, model: str, checkpoint: str) -> str:
        """The output's folder below outputs/sampling, spelled as the released code does."""
        how, s = f"-sys_{self.sysprompt}", self.sampling
        how = f"_n-{s.n}_temp-{s.temperature:g}_GenMaxT-{s.max_tokens}{how}"
        return f"{data}-{model}-ckpt_{checkpoint}-{'Greedy' if s.greedy else 'Sample'}{how}"


def plan_sampling(flags: SamplingFlags, engine: dict, seed: int) -> Plan:
    """Says which flags do not apply."""
    return Plan(flags.plan("sampling", seed), "none" if flags.sysprompt == "auto" else flags.sysprompt, engine)


def sample(plan: Plan, output: Output, chat: Chat, prompts: Prompts, **where) -> None:
    """Write the samples, and say what they are. `where`: the pool, the policy's folder and limits, as `answered` takes
    them. Raises UserError where no prompt fits."""
    n, length, total = plan.sampling.n, plan.sampling.max_tokens, prompts.total
    size = 0 if prompts.limit else prompts.path.stat().st_size
    preflight.check_disk(output.path, preflight.size_of_samples(total, size, n, length), "sampling")
    where |= {"engine": plan.engine | {"tensor_parallel_size": where["pool"].group}}
    built, counts = partial(asked, prompts.read, plan.sysprompt), Counter()
    with output:
        for prompt, ids, completions in answered(output, chat, built, total, plan.sampling, **where):
            output.append(samples(chat, prompt, ids, completions))
        if output.dropped.total() == total:
            raise UserError(f"{prompts.path}: no prompt is left to answer (dropped: {dict(output.dropped)})")
        if prompts.skip:
            output.reject(store.rejected(prompts.path, Prompt, prompts.limit))
        output.finish(_count(output.rows(record.uuid for record in prompts.read()), counts))
    log.info("%(prompts)d prompts, %(responses)d responses: %(distinct)d distinct, %(truncated)d truncated", counts)
    for reason, count in output.dropped.items():
        if reason != store.MALFORMED:
            log.info("  %d of %d prompts dropped: %s", count, total, reason)


def next_step(samples: Path, checkpoint: str | None, flags: dict[str, object]) -> str:
    """Where the samples are, and the command that rewards them by the policy; `flags` are the same there as here."""
    if checkpoint:
        reward = {"reward": "dpo", "checkpoint": checkpoint, "ref_model_ckpt": "none"}
    else:
        reward = {"reward": "likelihood", "checkpoint": "none"}  # M0 against itself: every DPO reward is 0
    command = console.command("rewarding.py", **flags, input_file=samples, **reward)
    return f"samples: {samples}\nnext, reward them by the current model:\n  {command}"


def _count(rows: Iterable[dict], counts: Counter[str]) -> Iterator[dict]:
    """The same samples, encoded; once they are through, `counts` says what was in them."""
    for row in rows:
        counts["prompts"] += 1
        counts["responses"] += len(row["responses"])
        counts["distinct"] += len({*row["responses"]})
        counts["truncated"] += row["finish_reason"].count("length")
        yield row
