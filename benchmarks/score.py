"""Scoring N answers to each prompt: trees against the released procedure (left-padded batches of 6, full logits).

python benchmarks/score.py                             # OASST and GSM8K lengths, and 600/250
python benchmarks/score.py --prompt_len 300 --answer_len 100
python benchmarks/score.py --work 600/250 --sizes 4,8,16
"""

import tempfile
from pathlib import Path
from statistics import median

import torch
from measure import interleaved, machine, ratio, side, trees
from peers import released_batches, released_layout, released_score
from workload import SHAPES, flags, groups, lengths, parse, run, save_model

from cream.model.hardware import Budget, matrix_rate
from cream.model.load import load_policy
from cream.model.logprobs import LogProbs, score


def main() -> None:
    parser = flags(__doc__, "oasst,gsm8k,600/250", 12)
    parser.add("--answers", 5, "N, answers to a prompt")
    parser.add("--max_tokens_per_batch", 4096, "of trees")
    args = parse(parser)
    shape, device = SHAPES[args.shape], torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rate = matrix_rate(device, dtype, 2048)
    print(machine())
    lines = []
    with tempfile.TemporaryDirectory() as name:
        folder = save_model(Path(name), shape, args.words, args.seed)
        plain, policy = (load_policy(folder, dtype, device) for _ in range(2))
        model = LogProbs(policy)
        for work in args.work:
            for size in args.sizes:
                made = groups(lengths(work, size, args.answers, args.spread, args.seed), args.words, args.seed)
                batches = released_batches(made)
                seconds = interleaved(
                    {
                        "released procedure": lambda batches=batches: released_score(plain, batches).tolist(),
                        "trees": lambda made=made: score(model, made, Budget(args.max_tokens_per_batch)),
                    },
                    args.rounds,
                )
                counted = released_layout(batches), trees(made)
                theirs, ours = (layout.operations(shape, args.words) for layout in counted)
                print(f"\n{work}: {size} prompts x {args.answers} answers, {counted[1].tokens} tokens in trees")
                side("released procedure", seconds["released procedure"], theirs, rate)
                side("trees", seconds["trees"], ours, rate)
                print(
                    f"  trees: {size * args.answers / median(seconds['trees']):.1f} responses/s, "
                    f"{counted[1].tokens / median(seconds['trees']):.0f} tokens/s"
                )
                name = f"score_{work.replace('/', '_')}"
                lines += ratio(name, seconds["released procedure"], seconds["trees"], theirs / ours)
    print("", *lines, sep="\n")


if __name__ == "__main__":
    run(main)
