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

from cream.cli import interrupts
from cream.errors import UserError
from cream.model.hardware import Budget
from cream.model.logprobs import LogProbs
from cream.scoring.cache import Scores, Source, beside
from cream.training.dpo import Example
from cream.training.loop import any_process, micro_batches

log = logging.getLogger("cream")
CHUNK = 512  # pairs whose values are kept together: what a kill costs


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
    """Set the reference of the (uuid, example)s that have none yet. `pairs` is the file that they come from.

    What is computed is kept beside it chunk by chunk, in batches that depend on the pairs alone; a signal to any
    process ends all by Interrupted after the chunk in hand.
    """
    wanted = [(uuid, example) for uuid, example in examples if not known(example)]
    kept = Scores(beside(pairs), source)
    # The first process's look at the file holds for all: another job may add to it in between.
    found = [[kept.find(uuid) for uuid, _ in wanted] if accelerator.is_main_process else None]
    values, computed = broadcast_object_list(found)[0], 0
    with interrupts.deferred():
        for start in range(0, len(wanted), CHUNK):
            chunk = wanted[start : start + CHUNK]
            for (_, example), known_of in zip(chunk, values[start : start + CHUNK], strict=True):
                example.reference_chosen = known_of.get(example.chosen.digest(), nan)
                example.reference_rejected = known_of.get(example.rejected.digest(), nan)
            if all(known(example) for _, example in chunk):
                continue
            _compute(accelerator, model, [example for _, example in chunk], budget, f"{start} of {len(wanted)}")
            computed += len(chunk)
            if accelerator.is_main_process:
                kept.keep((uuid, _digests(example)) for uuid, example in chunk)
            if any_process(accelerator, interrupts.asked())[0]:
                accelerator.wait_for_everyone()
                interrupts.stop(agreed=True)
    log.info(
        "reference: the starting policy; log-probabilities of %d pairs: %d from the pairs, %d kept beside them, %d "
        "computed now",
        *(len(examples), len(examples) - len(wanted), len(wanted) - computed, computed),
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


def _compute(accelerator: Accelerator, model: LogProbs, examples: list[Example], budget: Budget, after: str) -> None:
    """By the code path that trains, in its micro-batches: equally many for every process, since weights in shards come
    together in each. Values travel with their index, and each must arrive."""
    log.info("computing the reference's log-probabilities of %d pairs, after %s", len(examples), after)
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
            found = batch.response_sums(model(batch))
        indices += chunk
        sums.append(found[: 2 * len(chunk)])
    return [(i, *pair) for i, pair in zip(indices, torch.cat(sums).view(-1, 2).tolist(), strict=True)]
