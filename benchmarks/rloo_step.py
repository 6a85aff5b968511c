"""RLOO: an update on given samples, our training loop against trl's RLOOTrainer at its best settings.

Both train the same groups of 8 responses from the same weights in steps of 4 prompts, in float32 (--bf16 yes: under
bfloat16 autocast), with the same advantages and the same log-probabilities of the behaviour policy, which cost neither
anything: what is measured is the loss, its gradient and the optimiser's step. trl runs a prompt's 8 responses in one
padded batch, two of them, and one by one, which has no padding; all without gradient checkpointing. The fastest is its
best. benchmarks/memory.py --kind rloo has the peak memory.

    python benchmarks/rloo_step.py                         # prompt 300 / response 150
    python benchmarks/rloo_step.py --work 120/150,300/150,600/150 --bf16 yes
"""

import random
import statistics
import tempfile
from pathlib import Path

import torch
from dpo_step import Ours, training_flags
from measure import interleaved, machine, ratio, side, trees
from peers import TRLGroups
from workload import SHAPES, groups, lengths, parse, run, save_model

from cream.model.hardware import Budget, matrix_rate
from cream.model.load import load_policy
from cream.model.logprobs import LogProbs, score
from cream.training.policy_gradient import Example
from cream.training.stages import rloo

RESPONSES = 8  # to a prompt
PROMPTS = 4  # a step
TRL_SIDES = {"trl, group by group": 8, "trl, two by two": 2, "trl, one by one": 1}  # -> responses of a forward pass


def trl_settings(responses: int) -> dict:
    """trl's settings with so many responses in a forward pass; a group is padded by itself, as if alone."""
    return {
        "per_device_train_batch_size": responses,
        "steps_per_generation": RESPONSES // responses,
        "gradient_accumulation_steps": PROMPTS * RESPONSES // responses,
        "num_generations": RESPONSES,
        "gradient_checkpointing": False,
        "beta": 0.0,
        "bf16": False,
    }


def known_values(folder: Path, made: list, device: str, seed: int) -> tuple[list, list]:
    """Advantages, drawn, and the log-probabilities under the weights in `folder`, of each group's responses."""
    draw = random.Random(seed)
    model = LogProbs(load_policy(folder, torch.float32, torch.device(device)))
    return [[draw.gauss(0, 1) for _ in group] for group in made], score(model, made, Budget(4096))


def examples_of(made: list, advantages: list, known: list) -> list[Example]:
    """The groups as the stage has them."""
    found = []
    for group, own, logps in zip(made, advantages, known, strict=True):
        n = len(group)
        found.append(Example(list(group), [1] * n, own, own, [False] * n, [], logps, advantages=own))
    return found


def main() -> None:
    parser = training_flags(__doc__, "300/150", 8)
    parser.set_defaults(bf16="no")
    args = parse(parser)
    shape, device, bf16 = SHAPES[args.shape], torch.device(args.device), args.bf16 == "yes"
    rate = matrix_rate(device, torch.bfloat16 if bf16 else torch.float32, 2048)
    print(machine())
    lines = []
    with tempfile.TemporaryDirectory() as name:
        folder = save_model(Path(name), shape, args.words, args.seed)
        for work in args.work:
            for size in args.sizes:
                made = groups(lengths(work, size, RESPONSES, args.spread, args.seed), args.words, args.seed)
                given = known_values(folder, made, args.device, args.seed)
                data = folder, args.words, args.device, made, *given
                trl = {which: TRLGroups(*data, **trl_settings(n) | {"bf16": bf16}) for which, n in TRL_SIDES.items()}
                stage, own = rloo.Stage(rloo.Options(), {}), examples_of(made, *given)
                ours = Ours(folder, stage, own, PROMPTS, bf16, args.device, args.max_tokens_per_batch)
                seconds = interleaved(trl | {"ours": ours}, args.rounds)
                print(f"\n{work}: {size} prompts x {RESPONSES}, {'bfloat16 autocast' if bf16 else 'float32'}")
                # forward and backward; trl's head computes its logits once more
                counted = {which: trl[which].layout.operations(shape, args.words, 3, head=4) for which in trl}
                counted["ours"] = trees(made).operations(shape, args.words, 3)
                for which in seconds:
                    side(which, seconds[which], counted[which], rate)
                best = min(trl, key=lambda which: statistics.median(seconds[which]))
                print(f"trl's best settings here: {best.removeprefix('trl, ')}")
                suffix = "" if work == "300/150" else "_" + work.replace("/", "_")
                ceiling = counted[best] / counted["ours"]
                lines += ratio(f"rloo{suffix}_vs_trl_best", seconds[best], seconds["ours"], ceiling)
    print("", *lines, sep="\n")


if __name__ == "__main__":
    run(main)
