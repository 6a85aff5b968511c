"""DPO's reference: log π of every pair's two answers under the policy that training starts from, before its first step.

The policy that rewarded the answers is that very policy, so that the pairs hold the values already where they were
scored as training would score them. What is missing is looked up beside the pairs, else computed once and kept there.
"""

import logging
from collections.abc import Sequence
from math import nan
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from cream.errors import UserError
from cream.hardware import Budget
from cream.logprobs import LogProbs
from cream.scores import Scores, Source, beside
from cream.training.dpo import Example
from cream.training.loop import micro_batches

log = logging.getLogger("cream")


def trusted(scored: dict | None, source: Source, template: str | None) -> str | None:
    """Why the log-probabilities in a file of pairs are not this reference's, None when they are.

    `scored` is what the pairs' sidecar says of them, `template` the hash of --chat_template's file.
    """
    if not scored:
        return "they do not say what scored them"
    wanted = {"policy": source.policy, "dtype": source.dtype, "device": source.device, "scorer": source.scorer}
    wanted |= {"from": "model", "chat_template": template}
    other = [name for name, value in wanted.items() if scored.get(name) != value]
    return ", ".join(f"{name}: {scored.get(name)} there, {wanted[name]} here" for name in other) or None


def fill(
    accelerator: Accelerator,
    model: LogProbs,
    examples: Sequence[tuple[str, Example]],
    pairs: Path,
    source: Source,
    budget: Budget,
) -> None:
    """Set the reference of the (uuid, example)s that have none yet. `pairs` is the file that they come from."""
    given = sum(known(example) for _, example in examples)
    kept = Scores(beside(pairs), source)
    # The first process's look at the file holds for all: another job may add to it in between.
    found = [[kept.find(uuid) for uuid, _ in examples] if accelerator.is_main_process else None]
    for (_, example), values in zip(examples, broadcast_object_list(found)[0], strict=True):
        if not known(example):
            example.reference_chosen = values.get(example.chosen.digest(), nan)
            example.reference_rejected = values.get(example.rejected.digest(), nan)
    missing = [i for i, (_, example) in enumerate(examples) if not known(example)]
    if missing:
        _compute(accelerator, model, [examples[i][1] for i in missing], budget)
        if accelerator.is_main_process:
            kept.keep((uuid, _digests(example)) for uuid, example in (examples[i] for i in missing))
    log.info(
        "reference: the starting policy; log-probabilities of %d pairs: %d from the pairs, %d kept beside them, %d "
        "computed now",
        *(len(examples), given, len(examples) - given - len(missing), len(missing)),
    )


def known(example: Example) -> bool:
    """Whether both of its reference log-probabilities are finite numbers."""
    total = example.reference_chosen + example.reference_rejected
    return total - total == 0


def _digests(example: Example) -> dict[str, float]:
    return {
        example.chosen.digest(): example.reference_chosen,
        example.rejected.digest(): example.reference_rejected,
    }


def _compute(accelerator: Accelerator, model: LogProbs, examples: list[Example], budget: Budget) -> None:
    """By the code path that trains, in its micro-batches: equally many for every process, since weights in shards come
    together in each. Values travel with their index, and each must arrive."""
    log.info("computing the reference's log-probabilities of %d pairs", len(examples))
    groups = [[example.chosen, example.rejected] for example in examples]
    model.eval()
    try:
        values = _score(accelerator, model, groups, budget.tokens)
    except RuntimeError as error:
        budget.halve(error)
        values = _score(accelerator, model, groups, budget.tokens)
    for i, chosen, rejected in gather_object(values):
        examples[i].reference_chosen, examples[i].reference_rejected = chosen, rejected
    if missing := sum(not known(example) for example in examples):
        raise UserError(f"{missing} pairs have no finite reference log-probability; the weights are likely broken")


@torch.no_grad()
def _score(accelerator: Accelerator, model: LogProbs, groups: list, tokens: int) -> list[tuple[int, float, float]]:
    """(index, log π of chosen, of rejected) of this process's share of the pairs."""
    world, rank = accelerator.num_processes, accelerator.process_index
    indices, sums = [], []
    for chunk in micro_batches([model.shape(group) for group in groups], tokens, world, rank):
        batch = model.pack([groups[i] for i in chunk or [0]]).to(accelerator.device)
        with accelerator.autocast():
            found = batch.answer_sums(model(batch))
        indices += chunk
        sums.append(found[: 2 * len(chunk)])
    return [(i, *pair) for i, pair in zip(indices, torch.cat(sums).view(-1, 2).tolist(), strict=True)]
