"""A training's reference: log π of every example's responses under the policy it starts from, before its first step.

The policy that rewarded the responses is that very policy, so that their file holds the values already where they were
scored as training would score them. What is missing is looked up in the score cache beside the data, else computed once
and added there.
"""

import logging
from collections.abc import Sequence
from math import isfinite, nan
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from cream.cli import interrupts
from cream.errors import UserError
from cream.files.provenance import read_meta
from cream.model.hardware import Budget
from cream.model.logprobs import LogProbs
from cream.scoring.cache import Scores, Source, beside
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
) -> None:
    """Set the references of the (uuid, example) rows that have none yet: the attribute `stage.reference` of each
    example, a log-probability in nats for every response of its group. `data` is the file that the rows come from.

    What is computed is cached beside it chunk by chunk, in batches that depend on the rows alone; a signal to any
    process ends all by Interrupted after the chunk in hand. Raises UserError where a value is not a finite number.
    """
    wanted = [(uuid, example) for uuid, example in rows if not has_reference(stage, example)]
    cache = Scores(beside(data), source)
    # The first process's look at the file holds for all: another job may add to it in between.
    cached = [[cache.find(uuid) for uuid, _ in wanted] if accelerator.is_main_process else None]
    cached, computed = broadcast_object_list(cached)[0], 0
    with interrupts.deferred():
        for start in range(0, len(wanted), CHUNK):
            chunk = wanted[start : start + CHUNK]
            for (_, example), values in zip(chunk, cached[start : start + CHUNK], strict=True):
                reference = [values.get(tokens.digest(), nan) for tokens in stage.group(example)]
                setattr(example, stage.reference, reference)
            if all(has_reference(stage, example) for _, example in chunk):
                continue
            log.info("computing the reference of %d examples, after %d of %d", len(chunk), start, len(wanted))
            _compute(accelerator, model, stage, [example for _, example in chunk], budget)
            computed += len(chunk)
            if accelerator.is_main_process:
                cache.keep((uuid, _digests(stage, example)) for uuid, example in chunk)
            if any_process(accelerator, interrupts.received())[0]:
                accelerator.wait_for_everyone()
                interrupts.raise_interrupted(agreed=True)
    log.info(
        "reference: the starting policy; log-probabilities of %d examples: %d from the data, %d cached, %d computed",
        *(len(rows), len(rows) - len(wanted), len(wanted) - computed, computed),
    )


def has_reference(stage, example) -> bool:
    """Whether an example's reference is all finite numbers."""
    return all(map(isfinite, getattr(example, stage.reference)))


def _digests(stage, example) -> dict[str, float]:
    values = getattr(example, stage.reference)
    return {tokens.digest(): value for tokens, value in zip(stage.group(example), values, strict=True)}


def _compute(accelerator: Accelerator, model: LogProbs, stage, examples: list, budget: Budget) -> None:
    """By the code path that trains, in its micro-batches: equally many for every process, since weights in shards come
    together in each. Values travel with their index, and each must arrive."""
    groups = [stage.group(example) for example in examples]
    model.eval()
    try:
        values = _score(accelerator, model, groups, budget.tokens)
    except RuntimeError as error:
        budget.halve(error)
        values = _score(accelerator, model, groups, budget.tokens)
    for i, sums in gather_object(values):
        setattr(examples[i], stage.reference, sums)
    if missing := sum(not has_reference(stage, example) for example in examples):
        raise UserError(f"{missing} examples have no finite reference log-probability; the weights are likely broken")


@torch.no_grad()
def _score(accelerator: Accelerator, model: LogProbs, groups: list, tokens: int) -> list[tuple[int, list[float]]]:
    """(index, log π of each response) of this process's share of the groups."""
    world, rank = accelerator.num_processes, accelerator.process_index
    indices, sums = [], []
    for chunk in micro_batches([model.shape(group) for group in groups], tokens, world, rank):
        with accelerator.autocast():
            batch = model.pack([groups[i] for i in chunk or [0]]).to(accelerator.device)
            logps = batch.response_sums(model(batch))
        indices += chunk
        sums.append(logps[: sum(len(groups[i]) for i in chunk)])
    values = iter(torch.cat(sums).tolist())
    return [(i, [next(values) for _ in groups[i]]) for i in indices]
