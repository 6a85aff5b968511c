"""Bradley-Terry reward models: one epoch of our training loop against trl's RewardTrainer at its best settings.

All train the same pairs from the same weights in steps of 8 pairs, in float32 (--bf16 yes: under bfloat16 autocast).
trl runs a step's pairs in one padded batch, as by default, and one pair at a time, whose two rows alone are padded to
each other; both without gradient checkpointing. The faster is its best. benchmarks/memory.py --kind reward has the
peak memory.

    python benchmarks/reward_step.py                       # prompt 120 / answer 150, 300/150 and 600/150
    python benchmarks/reward_step.py --bf16 yes --work 300/150
"""

import statistics
import tempfile
from pathlib import Path

import torch
from dpo_step import BATCH, Ours, training_flags
from measure import autocast, interleaved, machine, ratio, side, trees
from peers import REWARD_BEST, TRL, reward_rows
from workload import SHAPES, groups, lengths, parse, run, save_model

from cream.model.hardware import matrix_rate
from cream.training.stages import bradley_terry

TRL_SIDES = {"trl, whole batches": BATCH, "trl, pair by pair": 1}  # -> pairs of a forward pass


def trl_settings(pairs: int) -> dict:
    """trl's settings with so many pairs in a forward pass."""
    return REWARD_BEST | {"per_device_train_batch_size": pairs, "gradient_accumulation_steps": BATCH // pairs}


def main() -> None:
    parser = training_flags(__doc__, "120/150,300/150,600/150", 16)
    parser.set_defaults(bf16="no")
    args = parse(parser)
    shape, device = SHAPES[args.shape], torch.device(args.device)
    bf16 = autocast(args.bf16, device)
    rate = matrix_rate(device, torch.bfloat16 if bf16 else torch.float32, 2048)
    print(machine())
    lines = []
    with tempfile.TemporaryDirectory() as name:
        folder = save_model(Path(name), shape, args.words, args.seed)
        for work in args.work:
            for size in args.sizes:
                made = groups(lengths(work, size, 2, args.spread, args.seed), args.words, args.seed)
                pairs = [(chosen, rejected) for chosen, rejected in made]
                data = folder, args.words, args.device, reward_rows(pairs), "Reward"
                trl = {which: TRL(*data, **trl_settings(n) | {"bf16": bf16}) for which, n in TRL_SIDES.items()}
                stage = bradley_terry.Stage(bradley_terry.Options(), {})
                examples = [bradley_terry.Example(chosen, rejected) for chosen, rejected in pairs]
                ours = Ours(folder, stage, examples, BATCH, bf16, args.device, args.max_tokens_per_batch)
                print(f"\n{work}: {size} pairs, steps of {BATCH}, {'bfloat16 autocast' if bf16 else 'float32'}")
                seconds = interleaved(trl | {"ours": ours}, args.rounds)
                counted = {which: trl[which].layout.operations(shape, 1, 3) for which in trl}  # the head: one output
                counted["ours"] = trees(made, once=True).operations(shape, 1, 3)
                for which in seconds:
                    side(which, seconds[which], counted[which], rate)
                best = min(trl, key=lambda which: statistics.median(seconds[which]))
                of_rate = counted["ours"] / rate / statistics.median(seconds["ours"])
                print(f"  ours: {100 * of_rate:.0f} % of the matrix rate; trl's best: {best.removeprefix('trl, ')}")
                name, ceiling = f"reward_{work.replace('/', '_')}", counted[best] / counted["ours"]
                lines += ratio(f"{name}_vs_trl_best", seconds[best], seconds["ours"], ceiling)
                lines.append(f"ratio {name}_of_matrix_rate {of_rate:.3f}")
    print("", *lines, sep="\n")


if __name__ == "__main__":
    run(main)
