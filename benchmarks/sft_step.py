"""SFT on whole conversations: one epoch of our training loop against trl's SFTTrainer at its best settings.

Conversations of OASST lengths, trained on every answer; one optimiser step over all of them on all sides, the same
weights, bfloat16 autocast (--bf16 no: float32 on all sides). trl runs with packing (its rows keep conversations apart
by their positions, as ours do by trees) and without (one conversation at a time); the faster is its best.

    python benchmarks/sft_step.py
    python benchmarks/sft_step.py --sizes 32,64,128
"""

import statistics
import tempfile
from pathlib import Path

import torch
from dpo_step import Ours, training_flags
from measure import autocast, interleaved, machine, ratio, side, trees
from peers import SFT_BEST, TRL, conversation_rows
from workload import SHAPES, conversations, parse, run, save_model

from cream.model.hardware import matrix_rate
from cream.training.stages import sft

LONGEST = 1024  # tokens of a conversation, and of a row that trl packs


def main() -> None:
    args = parse(training_flags(__doc__, "oasst", 32))
    shape, device = SHAPES[args.shape], torch.device(args.device)
    bf16 = autocast(args.bf16, device)
    rate = matrix_rate(device, torch.bfloat16 if bf16 else torch.float32, 2048)
    print(machine())
    lines = []
    with tempfile.TemporaryDirectory() as name:
        folder = save_model(Path(name), shape, args.words, args.seed)
        for work in args.work:
            for size in args.sizes:
                made = conversations(work, size, LONGEST, args.words, args)
                settings = SFT_BEST | {"bf16": bf16, "max_length": LONGEST, "gradient_accumulation_steps": size}
                data = (folder, args.words, args.device, conversation_rows(made), "SFT")
                trl = {"trl, packing": TRL(*data, **settings, packing=True), "trl, one by one": TRL(*data, **settings)}
                stage, rows = sft.Stage(sft.Options(), {}), [[tokens] for tokens in made]
                ours = Ours(folder, stage, rows, size, bf16, args.device, args.max_tokens_per_batch)
                print(f"\n{work}: {size} conversations, {sum(map(len, made))} tokens, one step")
                seconds = interleaved(trl | {"ours": ours}, args.rounds)
                # trl's head computes its logits once more in the backward pass
                counted = {name: trl[name].layout.operations(shape, args.words, 3, head=4) for name in trl}
                counted["ours"] = trees([row] for row in made).operations(shape, args.words, 3)
                for name in seconds:
                    side(name, seconds[name], counted[name], rate)
                best = min(trl, key=lambda name: statistics.median(seconds[name]))
                suffix = "" if work == "oasst" else "_" + work.replace("/", "_")
                ceiling = counted[best] / counted["ours"]
                lines += ratio(f"sft{suffix}_vs_trl_best", seconds[best], seconds["ours"], ceiling)
    print("", *lines, sep="\n")


if __name__ == "__main__":
    run(main)
