"""Sampling for training: n responses to every prompt of a file, in the order of the prompts.

A `.jsonl` file is never in memory as a whole.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from cream.cli import advice, preflight
from cream.engines import Completion, Sampling
from cream.errors import UserError
from cream.files import store
from cream.files.journal import Output
from cream.records import Message, Prompt, Samples
from cream.scoring.completions import generate_responses
from cream.scoring.driver import Model
from cream.text.chat import Chat
from cream.text.prompts import apply

log = logging.getLogger("cream")

UNUSED = ("few_shot", "scoring", "prompt_format", "length_norm")  # flags that decide nothing of samples


class Prompts(NamedTuple):
    """The first `limit` prompts of a file (None: all), `total` of which are good; `skip`: the others are skipped.
    `read` gives them one by one, whatever folder a replica works in; `open_prompts` has looked for duplicates."""

    path: Path
    limit: int | None
    skip: bool
    total: int
    read: Callable[[], Iterator[Prompt]]


def open_prompts(path: Path, limit: int | None, *, skip: bool) -> Prompts:
    """Reads the whole file: a bad record or a duplicate raises UserError here, before a model is loaded, unless bad
    records are to be skipped; so does a file without any prompt."""
    read = partial(store.read, path.absolute(), Prompt, limit, skip=skip, unique=False)
    total = sum(1 for _ in store.read(path, Prompt, skip=skip))
    if limit:
        total = sum(1 for _ in read())
    if not total:
        raise store.nothing_left(path, Prompt, "prompt is left to respond to", limit)
    return Prompts(path, limit, skip, total, read)


def output_folder(sampling: Sampling, sysprompt: str, data: str, model: str, checkpoint: str) -> str:
    """The output's folder below outputs/sampling, spelled as the released code does."""
    how = f"_n-{sampling.n}_temp-{sampling.temperature:g}_GenMaxT-{sampling.max_tokens}-sys_{sysprompt}"
    return f"{data}-{model}-ckpt_{checkpoint}-{'Greedy' if sampling.greedy else 'Sample'}{how}"


def sample(
    output: Output, model: Model, prompts: Prompts, sysprompt: str, sampling: Sampling, policy: dict, **how
) -> None:
    """Write the samples, and say what they are. `sysprompt` names the text that is appended to each prompt; `policy`
    says in the sidecar who sampled, as the user named it; `how`: the engine and limits,
    as `generate_responses` takes them. Raises UserError where no prompt fits."""
    total, size = prompts.total, 0 if prompts.limit else prompts.path.stat().st_size
    need = preflight.size_of_samples(total, size, sampling.n, sampling.max_tokens)
    preflight.check_disk(output.path, need, "sampling")
    built, counts = partial(build_prompts, prompts.read, sysprompt), Counter()
    with output:
        for prompt, ids, completions in generate_responses(output, model, built, total, sampling, **how):
            output.append(record_samples(model.chat, prompt, ids, completions))
        if output.dropped.total() == total:
            raise UserError(f"{prompts.path}: no prompt is left to respond to (dropped: {dict(output.dropped)})")
        if prompts.skip:
            output.reject(store.rejected(prompts.path, Prompt, prompts.limit))
        output.finish(_count(output.rows(record.uuid for record in prompts.read()), counts), policy=policy)
    log.info("%(prompts)d prompts, %(responses)d responses: %(distinct)d distinct, %(truncated)d truncated", counts)
    for reason, count in output.dropped.items():
        if reason != store.MALFORMED:
            log.info("  %d of %d prompts dropped: %s", count, total, reason)


class FullPrompt(Prompt, kw_only=True):
    """A prompt as it is put to the policy; `source_prompt` is what it was before --sysprompt, None where it is that."""

    source_prompt: list[Message] | None = None


def build_prompts(read: Callable[[], Iterable[Prompt]], sysprompt: str) -> Iterator[FullPrompt]:
    """The prompts of a file, as they are put to the policy."""
    for prompt in read():
        *before, last = prompt.messages
        messages = [*before, Message("user", apply(sysprompt, last.content))]
        source = prompt.messages if messages != prompt.messages else None
        yield FullPrompt(uuid=prompt.uuid, messages=messages, extra=prompt.extra, source_prompt=source)


def record_samples(chat: Chat, prompt: Prompt, prompt_ids: list[int], completions: Sequence[Completion]) -> Samples:
    """The record of a prompt's responses; keys that the prompt's record has beside its messages are carried along.

    `logprob` is null where the response's text does not tokenise back to the sampled ids: the sequence that will be
    scored and trained on is then another than the one sampled.
    """
    complete = [c.finish_reason == "stop" for c in completions]
    encoded = chat.encode_responses(prompt.messages, [c.text for c in completions], complete, prompt_ids)
    same = [t is not None and t.ids[t.spans[0][0] :] == c.token_ids for t, c in zip(encoded, completions, strict=True)]
    return Samples(
        uuid=prompt.uuid,
        prompt=prompt.messages,
        responses=[c.text for c in completions],
        finish_reason=[c.finish_reason for c in completions],
        num_tokens=[len(c.token_ids) for c in completions],
        logprob=[c.logprob if ok else None for c, ok in zip(completions, same, strict=True)],
        source_prompt=getattr(prompt, "source_prompt", None),
        extra=prompt.extra,
    )


def next_step(samples: Path, policy: Path, checkpoint: str | None, flags: dict[str, object]) -> str:
    """Where the samples are, and the command that rewards them by the policy, whose folder and --checkpoint are given;
    `flags` are the same there as here."""
    if checkpoint:
        reward = {"reward": "dpo", "checkpoint": checkpoint, "ref_model_ckpt": "none"}
    else:
        reward = {"reward": "likelihood", "checkpoint": "none"}  # M0 against itself: every DPO reward is 0
    first = advice.recipe(str(flags["model"])).get("rewarding", {})
    now = flags | {"input_file": samples} | reward
    command = advice.again(advice.round_before(policy), "rewards", "rewarding.py", first, **now)
    return f"samples: {samples}\nnext, reward them by the current model:\n  {command}"


def _count(rows: Iterable[dict], counts: Counter[str]) -> Iterator[dict]:
    """The same samples, encoded; once they are through, `counts` says what was in them."""
    for row in rows:
        counts["prompts"] += 1
        counts["responses"] += len(row["responses"])
        counts["distinct"] += len({*row["responses"]})
        counts["truncated"] += row["finish_reason"].count("length")
        yield row
