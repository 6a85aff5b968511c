"""One whole iteration after sampling, round 1: two rewardings and an epoch of DPO, against the released procedure.

There: a pass of M1 and one of M0 for the DPO reward, one more of M0 for its likelihood, DPO's own reference pass, and
training on padded pairs. Here: a pass of M1 and one of M0 (kept for the likelihood, and M1's is the reference), and
training on trees. Float32 on both sides.

    python benchmarks/iteration.py
"""

import tempfile
import time
from pathlib import Path

import torch
from dpo_step import BATCH, Ours
from measure import interleaved, machine, ratio, rectangle, side, trees
from peers import TRAINED, released_batches, released_dpo, released_layout, released_score
from workload import SHAPES, flags, groups, lengths, parse, run, save_model

from cream.model.hardware import Budget, matrix_rate
from cream.model.load import load_policy
from cream.model.logprobs import LogProbs, score
from cream.training.stages import dpo


def main() -> None:
    parser = flags(__doc__, "oasst,600/250", 8)
    parser.add("--answers", 5, "N, answers to a prompt")
    args = parse(parser)
    shape, device = SHAPES[args.shape], torch.device(args.device)
    rate = matrix_rate(device, torch.float32, 2048)
    print(machine())
    lines = []
    with tempfile.TemporaryDirectory() as name:
        folders = [save_model(Path(name) / str(m), shape, args.words, args.seed + m) for m in (0, 1)]
        plain = [load_policy(folder, torch.float32, device) for folder in folders]
        shared = [LogProbs(load_policy(folder, torch.float32, device)) for folder in folders]
        for work in args.work:
            for size in args.sizes:
                made = groups(lengths(work, size, args.answers, args.spread, args.seed), args.words, args.seed)
                pairs = [(group[0], group[1]) for group in made]
                batches = released_batches(made)
                training = Ours(folders[1], dpo.Stage(dpo.Options(), {}), [], BATCH, False, args.device, None)

                def released(batches=batches, pairs=pairs) -> None:
                    for model in (plain[1], plain[0], plain[0]):
                        released_score(model, batches)
                    released_dpo(plain[1], plain[1], pairs, BATCH)

                def ours(made=made, training=training) -> float:
                    start = time.perf_counter()
                    current = score(shared[1], made, Budget(4096))
                    score(shared[0], made, Budget(4096))
                    training.examples = [
                        dpo.Example(group[0], group[1], 1.0, values[:2])
                        for group, values in zip(made, current, strict=True)
                    ]
                    return time.perf_counter() - start + training()

                seconds = interleaved({"released procedure": released, "ours": ours}, args.rounds)
                chunks = [pairs[start : start + TRAINED] for start in range(0, len(pairs), TRAINED)]
                padded = [rectangle(2 * len(c), max(len(row) for pair in c for row in pair)) for c in chunks]
                theirs = 3 * released_layout(batches).operations(shape, args.words)
                theirs += sum(layout.operations(shape, args.words, 4) for layout in padded)
                least = 2 * trees(made).operations(shape, args.words)
                least += trees(map(list, pairs)).operations(shape, args.words, 3)
                print(f"\n{work}: {size} prompts x {args.answers} answers, {size} pairs")
                side("released procedure", seconds["released procedure"], theirs, rate)
                side("ours", seconds["ours"], least, rate)
                lines += ratio(f"iteration_{work.replace('/', '_')}", *seconds.values(), theirs / least)
    print("", *lines, sep="\n")


if __name__ == "__main__":
    run(main)
