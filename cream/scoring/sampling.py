"""Sampling for training: n responses to every prompt of a file, in the order of the prompts.

A `.jsonl` file is never in memory as a whole.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from cream import alarms
from cream.cli import advice, preflight
from cream.cli.console import command
from cream.cli.screen import say_result
from cream.engines import Completion, Sampling
from cream.errors import UserError
from cream.files import store
from cream.files.journal import Output
from cream.records import Conversation, Message, Prompt, Samples, ended_turn
from cream.scoring.completions import generate_responses
from cream.scoring.driver import Model
from cream.text.chat import Chat
from cream.text.prompts import Sysprompt
from cream.text.refusals import find_refusals

log = logging.getLogger("cream")

UNUSED = ("scoring", "prompt_format", "length_norm", "grader", "thinking_tags")  # flags that decide nothing of samples


class Prompts(NamedTuple):
    """The first `limit` prompts of a file (None: all, or a part), `total` of them good; `skip`: the others are skipped.
    `kind`: the layout of the file's records; of a conversation the prompt is what comes before its last response.
    `read` gives them one by one, whatever folder a replica works in; `open_prompts` has looked for duplicates.
    `refused`: those that are no prompts for the chat template, by uuid, and why."""

    path: Path
    kind: type[Prompt | Conversation]
    limit: int | None
    skip: bool
    total: int
    read: Callable[[], Iterator[Prompt]]
    refused: Mapping[str, str] = {}


def open_prompts(path: Path, limit: int | None, *, skip: bool, part: int | None = None) -> Prompts:
    """Reads the whole file: a bad record or a duplicate raises UserError here, before a model is loaded, unless bad
    records are to be skipped; so does a file without any prompt. `part`: of the file's parts of `limit` prompts this
    one, from 1, and after the last the first again."""
    kind = store.detect(path, skip=skip)
    read = partial(read_prompts, path.absolute(), kind, limit, skip=skip, unique=False)
    total = sum(1 for _ in store.read(path, kind, skip=skip))
    if part and total:
        start = (part - 1) % -(-total // limit) * limit
        limit, total = None, min(limit, total - start)
        read = partial(read_part, path.absolute(), kind, start, total, skip=skip, unique=False)
    elif limit:
        total = sum(1 for _ in read())
    if not total:
        raise store.nothing_left(path, kind, "prompt is left to respond to", limit)
    if kind is Conversation:
        log.info("prompts: what comes before the last response of %d conversations", total)
    return Prompts(path, kind, limit, skip, total, read)


def read_prompts(path: Path, kind: type[Prompt | Conversation], limit: int | None, **how) -> Iterator[Prompt]:
    """The prompts of a file; `how` as `store.read` takes it."""
    for record in store.read(path, kind, limit, **how):
        if kind is Conversation:
            record = Prompt(uuid=record.uuid, messages=record.messages[:-1], extra=record.extra)
        yield record


def read_part(path: Path, kind: type[Prompt | Conversation], start: int, count: int, **how) -> Iterator[Prompt]:
    """`count` of the good prompts of a file, from number `start` on."""
    yield from islice(read_prompts(path, kind, None, **how), start, start + count)


def output_folder(sampling: Sampling, sysprompt: str, data: str, model: str, checkpoint: str) -> str:
    """The output's folder below outputs/sampling, spelled as the released code does."""
    on = [name for name in ("top_k", "min_p", "repetition_penalty") if name not in sampling.idle_flags]
    more = "".join(f"_{name}-{getattr(sampling, name):g}" for name in on)
    how = f"_n-{sampling.n}_temp-{sampling.temperature:g}{more}_GenMaxT-{sampling.max_tokens}-sys_{sysprompt}"
    return f"{data}-{model}-ckpt_{checkpoint}-{'Greedy' if sampling.greedy else 'Sample'}{how}"


def check_prompts(prompts: Prompts, sysprompt: Sysprompt, chat: Chat) -> Prompts:
    """The prompts without those that the chat template refuses, which count as malformed. Raises UserError for the
    first of these, unless they are to be skipped."""
    refused = find_refusals(prompts.path, build_prompts(prompts.read, sysprompt), chat, prompts.skip)
    if not refused:
        return prompts
    if len(refused) == prompts.total:
        raise UserError(f"{prompts.path}: no prompt is left to respond to; the first: {next(iter(refused.values()))}")
    read = partial(prompts.read, refused=refused)
    return prompts._replace(total=prompts.total - len(refused), read=read, refused=refused)


def sample(
    output: Output,
    model: Model,
    prompts: Prompts,
    sysprompt: Sysprompt,
    sampling: Sampling,
    policy: dict,
    limits: alarms.Limits = alarms.LIMITS,
    **how,
) -> None:
    """Write the samples, and say what they are. `sysprompt` is added to each prompt; `policy` says in the sidecar who
    sampled, as the user named it; `limits`: of alarms; `how`: the engine and limits, as `generate_responses` takes
    them. Raises UserError where no prompt fits."""
    prompts = check_prompts(prompts, sysprompt, model.chat)
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
            output.reject(store.rejected(prompts.path, prompts.kind, prompts.limit, prompts.refused))
        rows = _count(output.rows(record.uuid for record in prompts.read()), counts)
        output.finish(_describe(rows, counts, output, model.folder, limits), policy=policy)
    say_result("%(prompts)d prompts, %(responses)d responses: %(distinct)d distinct, %(truncated)d truncated", counts)
    for line in describe_tokens(counts, sampling.keep_special):
        log.info("  %s", line)
    for reason, count in output.dropped.items():
        if reason != store.MALFORMED:
            log.info("  %d of %d prompts dropped: %s", count, total, reason)


class FullPrompt(Prompt, kw_only=True):
    """A prompt as it is put to the policy; `source_prompt` is what it was before --sysprompt, None where it is that."""

    source_prompt: list[Message] | None = None


def build_prompts(read: Callable[[], Iterable[Prompt]], sysprompt: Sysprompt) -> Iterator[FullPrompt]:
    """The prompts of a file, as they are put to the policy."""
    for prompt in read():
        messages = sysprompt.apply(prompt.messages)
        source = prompt.messages if messages != prompt.messages else None
        yield FullPrompt(uuid=prompt.uuid, messages=messages, extra=prompt.extra, source_prompt=source)


def record_samples(chat: Chat, prompt: Prompt, prompt_ids: list[int], completions: Sequence[Completion]) -> Samples:
    """The record of a prompt's responses; keys that the prompt's record has beside its messages are carried along.

    `logprob` is null where the response's text does not tokenise back to the sampled ids: the sequence that will be
    scored and trained on is then another than the one sampled.
    """
    complete = [ended_turn(c.finish_reason) for c in completions]
    encoded = chat.encode_responses(prompt.messages, [c.text for c in completions], complete, prompt_ids)
    same = [
        not isinstance(t, str) and t.ids[len(prompt_ids) :] == c.token_ids
        for t, c in zip(encoded, completions, strict=True)
    ]
    spoken = [c.token_ids[: len(c.token_ids) - end] for c, end in zip(completions, complete, strict=True)]
    thoughts = [chat.thought_tokens(ids, c.text) for ids, c in zip(spoken, completions, strict=True)]
    special = [c.special for c in completions]
    return Samples(
        uuid=prompt.uuid,
        prompt=prompt.messages,
        responses=[c.text for c in completions],
        finish_reason=[c.finish_reason for c in completions],
        num_tokens=[len(c.token_ids) for c in completions],
        logprob=[c.logprob if ok else None for c, ok in zip(completions, same, strict=True)],
        thought_tokens=thoughts if any(n is not None for n in thoughts) else None,
        special_tokens=special if any(special) else None,
        thought_opened=chat.opened,
        source_prompt=getattr(prompt, "source_prompt", None),
        extra=prompt.extra,
    )


def next_step(samples: Path, policy: Path, checkpoint: str | None, flags: dict[str, object]) -> str:
    """The command that rewards samples by the policy, whose folder and --checkpoint are given; `flags` are the same
    there as here."""
    if checkpoint:
        reward = {"reward": "dpo", "checkpoint": checkpoint, "ref_model_ckpt": "none"}
    else:
        reward = {"reward": "likelihood", "checkpoint": "none"}  # M0 against itself: every DPO reward is 0
    first = advice.recipe(str(flags["model"])).get("rewarding", {})
    now = flags | {"input_file": samples} | reward
    again = advice.again(advice.round_before(policy), "rewards", "rewarding.py", first, **now)
    return f"next, reward them by the current model:\n  {again}"


def spin(samples: Path, conversations: Path) -> str:
    """The command that makes SPIN's pairs of samples of the prompts in SFT data."""
    return command("make_pairs.py", strategy="spin", conversations=conversations, samples=samples)


def contrast(samples: Path) -> str:
    """The command that makes RLCD's pairs, of samples to a prompt that asks for good responses."""
    return command("make_pairs.py", strategy="contrast", positive=samples, negative="NEGATIVE")


def describe_tokens(counts: Counter[str], keep_special: bool) -> Iterator[str]:
    """What `_count` found in the sampled tokens, beside their number: lines for the log."""
    of = f"of {counts['responses']} responses"
    if counts["matched"]:
        yield f"{counts['matched']} {of} ended with a stop string; no end of turn is scored or trained on after them"
    if counts["special"] and keep_special:
        yield f"{counts['special']} {of} have special tokens within, which are kept in their text"
    elif counts["special"]:
        yield (
            f"{counts['special']} {of} have special tokens within, which their text lacks, so that what will be scored "
            "and trained on is not what was sampled; --keep_special_tokens yes keeps them"
        )
    if counts["respelled"]:
        yield f"{counts['respelled']} {of} do not tokenise back to the tokens that were sampled; their logprob is null"
    if thoughts := counts["thoughts"]:
        thought, final = counts["thought_tokens"] / thoughts, counts["final_tokens"] / thoughts
        yield (
            f"{thoughts} {of} have a thought: {thought:.1f} tokens on average, and {final:.1f} after it; "
            f"{counts['unfinished']} are truncated within it"
        )


def _describe(
    rows: Iterator[dict], counts: Counter[str], output: Output, policy: Path, limits: alarms.Limits
) -> Iterator[dict]:
    """The rows; once they are through, the sidecar says what was in them, and which alarms that set off. Their length
    is compared with that of the samples which the `policy` was trained on."""
    yield from rows
    n = counts["responses"]
    sampled = {name: counts[name] for name in ("responses", "distinct", "truncated")}
    sampled["mean_tokens"] = alarms.share(counts["tokens"], n)
    before = advice.round_before(policy, sidecars=True).get("samples", {}).get("sampled", {})
    facts = {"truncated": alarms.share(counts["truncated"], n)}
    facts |= {"distinct": alarms.share(counts["distinct"], n) if n > counts["prompts"] else None}
    facts |= {"length_drift": alarms.drift(sampled["mean_tokens"], before.get("mean_tokens"))}
    output.facts |= {"sampled": sampled, "alarms": alarms.sound(facts, limits)}


def _count(rows: Iterable[dict], counts: Counter[str]) -> Iterator[dict]:
    """The same samples, encoded; once they are through, `counts` says what was in them."""
    for row in rows:
        counts["prompts"] += 1
        counts["responses"] += len(row["responses"])
        counts["distinct"] += len({*row["responses"]})
        counts["tokens"] += sum(row["num_tokens"])
        counts["truncated"] += row["finish_reason"].count("length")
        counts["matched"] += row["finish_reason"].count("stop_string")
        counts["respelled"] += row["logprob"].count(None)
        counts["special"] += sum(map(bool, row.get("special_tokens", ())))
        lengths = zip(row.get("thought_tokens", ()), row["num_tokens"], row["finish_reason"], strict=False)
        for thought, tokens, reason in lengths:
            if thought is not None:
                counts["thoughts"] += 1
                counts["thought_tokens"] += thought
                counts["final_tokens"] += tokens - thought
                counts["unfinished"] += thought == tokens and not ended_turn(reason)
        yield row
