"""A training's reference: log π of every example's responses under the policy it starts from, before its first step;
or under another one.

The policy that rewarded the responses is that very policy, so that their file holds the values already where they were
scored as training would score them. What is missing is looked up in the score cache beside the data, else computed once
and added there: a number for each response, or, for a stage with `per_token`, a list of its tokens'.
"""

import logging
from collections.abc import Sequence
from math import isfinite, nan
from pathlib import Path

import msgspec
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from cream.cli import interrupts
from cream.errors import UserError
from cream.files.provenance import read_meta
from cream.model.hardware import Budget
from cream.model.logprobs import LogProbs
from cream.scoring.cache import PER_TOKEN, Scores, Source, beside
from cream.text.options import GIVEN, describe_text
from cream.training.loop import any_process, micro_batches

log = logging.getLogger("cream")
CHUNK = 512  # examples whose values are cached together: at most this much work is lost if the process is killed


def trusted(scored: dict | None, source: Source, template: str | None, text: dict) -> str | None:
    """Why the log-probabilities in a file of data are not this reference's, None when they are.

    `scored` is what the file's sidecar says of them, `template` the hash of --chat_template's file,
    `text` how a response becomes tokens (`describe_text`).
    """
    if not scored:
        return "their file does not say what scored them"
    wanted = {"policy": source.policy, "dtype": source.dtype, "device": source.device, "scorer": source.scorer}
    wanted |= {"from": "model", "chat_template": template} | dict.fromkeys(GIVEN) | text
    other = [name for name, value in wanted.items() if scored.get(name) != value]
    return ", ".join(f"{name}: {scored.get(name)} there, {wanted[name]} here" for name in other) or None


def check_recorded(stage, examples: Sequence, data: Path, header: dict, source: Source) -> None:
    """Forget the references that came with the examples unless they are those of `source`; a line of the log says why.

    `header` has the run's settings and the hashes of its inputs, `data` is the file that the examples come from.
    """
    inputs = header["inputs"]
    if not any(isfinite(value) for example in examples for value in getattr(example, stage.reference)):
        return  # they bring none
    about = read_meta(data) or {}
    if about and about.get("output") != inputs["data"]:
        why = "the file was changed since they were written"
    else:
        why = trusted(about.get("scored"), source, inputs.get("chat_template"), describe_text(header["settings"]))
    if why is None:
        return
    log.info("the data's own log-probabilities do not serve as reference: %s", why)
    for example in examples:
        setattr(example, stage.reference, [nan] * len(stage.group(example)))


def fill(
    accelerator: Accelerator,
    model: LogProbs,
    stage,
    rows: Sequence[tuple[str, object]],
    data: Path,
    source: Source,
    budget: Budget,
    name: str | None = None,
) -> dict[str, int]:
    """Set the references of the (uuid, example) rows that have none yet: the attribute `name` of each example, by
    default `stage.reference`, log-probabilities in nats for every response of its group, under `model`, which `source`
    describes. `data` is the file that the rows come from. Returns by source how many examples got theirs from it.

    What is computed is cached beside it chunk by chunk, in batches that depend on the rows alone; a signal to any
    process ends all by Interrupted after the chunk in hand. Raises UserError where a value is not a finite number.
    """
    name, whose = name or stage.reference, "the starting policy" if name is None else name
    wanted = [(uuid, example) for uuid, example in rows if not has_values(example, name)]
    per_token = getattr(stage, "per_token", False)
    cache = Scores(beside(data), msgspec.structs.replace(source, scorer=PER_TOKEN) if per_token else source)
    # The first process's look at the file holds for all: another job may add to it in between.
    cached = [[cache.find(uuid) for uuid, _ in wanted] if accelerator.is_main_process else None]
    cached, computed = broadcast_object_list(cached)[0], 0
    with interrupts.deferred():
        for start in range(0, len(wanted), CHUNK):
            chunk = wanted[start : start + CHUNK]
            for (_, example), values in zip(chunk, cached[start : start + CHUNK], strict=True):
                reference = [values.get(tokens.digest(), nan) for tokens in stage.group(example)]
                setattr(example, name, reference)
            if all(has_values(example, name) for _, example in chunk):
                continue
            log.info("computing the reference of %d examples, after %d of %d", len(chunk), start, len(wanted))
            _compute(accelerator, model, stage, [example for _, example in chunk], budget, name, per_token)
            computed += len(chunk)
            if accelerator.is_main_process:
                cache.keep((uuid, _digests(stage, example, name)) for uuid, example in chunk)
            if any_process(accelerator, interrupts.received())[0]:
                accelerator.wait_for_everyone()
                interrupts.raise_interrupted(agreed=True)
    sources = {"data": len(rows) - len(wanted), "cached": len(wanted) - computed, "computed": computed}
    log.info(
        "reference: %s; log-probabilities of %d examples: %d from the data, %d cached, %d computed",
        *(whose, len(rows), *sources.values()),
    )
    return {place: count for place, count in sources.items() if count}


def check_vocabulary(words: int, stage, examples: Sequence, folder: Path) -> None:
    """Raises UserError where another model, of so many words, does not have the tokens of the examples."""
    most = max(max(tokens.ids) for example in examples for tokens in stage.group(example))
    if most >= words:
        raise UserError(
            f"{folder}: its vocabulary has {words} words, and the data have token {most}; give a model with the same "
            "tokenizer"
        )


def has_values(example, name: str) -> bool:
    """Whether an example's attribute of this name is all finite numbers, or lists of such."""
    values = getattr(example, name)
    return all(all(map(isfinite, value)) if isinstance(value, list) else isfinite(value) for value in values)


def _digests(stage, example, name: str) -> dict[str, float | list[float]]:
    values = getattr(example, name)
    return {tokens.digest(): value for tokens, value in zip(stage.group(example), values, strict=True)}


def _compute(
    accelerator: Accelerator, model: LogProbs, stage, examples: list, budget: Budget, name: str, per_token: bool
) -> None:
    """By the code path that trains, in its micro-batches: equally many for every process, since weights in shards come
    together in each. Values travel with their index, and each must arrive."""
    groups = [stage.group(example) for example in examples]
    model.eval()
    try:
        values = _score(accelerator, model, groups, budget.tokens, per_token)
    except RuntimeError as error:
        budget.halve(error)
        values = _score(accelerator, model, groups, budget.tokens, per_token)
    for i, found in gather_object(values):
        setattr(examples[i], name, found)
    if missing := sum(not has_values(example, name) for example in examples):
        raise UserError(f"{missing} examples have no finite reference log-probability; the weights are likely broken")


@torch.no_grad()
def _score(
    accelerator: Accelerator, model: LogProbs, groups: list, tokens: int, per_token: bool
) -> list[tuple[int, list]]:
    """(index, log π of each response, or of each of its tokens) of this process's share of the groups."""
    world, rank = accelerator.num_processes, accelerator.process_index
    indices, found = [], []
    for chunk in micro_batches([model.shape(group) for group in groups], tokens, world, rank):
        with accelerator.autocast():
            batch = model.pack([groups[i] for i in chunk or [0]]).to(accelerator.device)
            logps = model(batch)
        indices += chunk
        logps = (
            logps.split(batch.owner.bincount(minlength=batch.responses).tolist())
            if per_token
            else batch.response_sums(logps)
        )
        found += logps[: sum(len(groups[i]) for i in chunk)]
    values = iter([value.tolist() for value in found] if per_token else torch.stack(found).tolist() if found else [])
    return [(i, [next(values) for _ in groups[i]]) for i in indices]
