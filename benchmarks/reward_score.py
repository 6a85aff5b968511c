"""Rewards of N responses to each prompt by a reward model: trees against transformers' sequence classification.

The peer gets all rows sorted by length, in right-padded batches of each of --batch_sizes rows, of which the fastest
counts. Both sides must give the same rewards.

    python benchmarks/reward_score.py                      # 16 responses a prompt, 600/250
    python benchmarks/reward_score.py --work 120/150 --answers 4
"""

import statistics
import tempfile
from pathlib import Path

import torch
from measure import Layout, interleaved, machine, ratio, rectangle, side, trees
from peers import PAD, padded_rewards, sorted_batches
from workload import SHAPES, flags, groups, lengths, parse, run, save_model

from cream.errors import UserError
from cream.files.provenance import REWARD_MODEL
from cream.model.hardware import budget, matrix_rate
from cream.model.load import load
from cream.model.reward_head import Heads, read_heads

HEAD = {"outputs": 1, "reads": "last_token"}


def reward_model(folder: Path, dtype: torch.dtype, device: torch.device):
    """The model with a head, the same each time."""
    torch.manual_seed(0)
    model = load(folder, REWARD_MODEL, dtype, device, new_head=HEAD)
    model.config.pad_token_id = PAD
    return model


def main() -> None:
    parser = flags(__doc__, "600/250", 2)
    parser.add("--answers", 16, "N, responses to a prompt")
    parser.add("--max_tokens_per_batch", None, "of trees, where given; otherwise as rewarding.py's", type=int)
    parser.add("--batch_sizes", "4,8,16", "rows of a padded batch, with commas between")
    args = parse(parser)
    shape, device = SHAPES[args.shape], torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rate = matrix_rate(device, dtype, 2048)
    print(machine())
    lines = []
    with tempfile.TemporaryDirectory() as name:
        folder = save_model(Path(name), shape, args.words, args.seed)
        plain, model = reward_model(folder, dtype, device), Heads(reward_model(folder, dtype, device))
        for work in args.work:
            for size in args.sizes:
                made = groups(lengths(work, size, args.answers, args.spread, args.seed), args.words, args.seed)
                batches = {f"batches of {n}": sorted_batches(made, n) for n in map(int, args.batch_sizes.split(","))}
                sides = {name: (lambda rows=rows: padded_rewards(plain, rows)) for name, rows in batches.items()}
                tokens = budget(args.max_tokens_per_batch, model.model, device, training=False)
                ours = lambda made=made, tokens=tokens: read_heads(model, made, tokens)  # noqa: E731
                check_equal(made, next(iter(sides.values()))(), ours(), dtype)
                seconds = interleaved(sides | {"trees": ours}, args.rounds)
                counted = {
                    name: sum((rectangle(len(r), max(map(len, r)), len(r)) for r in rows), Layout())
                    for name, rows in batches.items()
                } | {"trees": trees(made, once=True)}
                operations = {name: layout.operations(shape, 1) for name, layout in counted.items()}
                print(f"\n{work}: {size} prompts x {args.answers} responses, {counted['trees'].tokens} tokens in trees")
                for which in seconds:
                    side(which, seconds[which], operations[which], rate)
                best = min(batches, key=lambda which: statistics.median(seconds[which]))
                of_rate = operations["trees"] / rate / statistics.median(seconds["trees"])
                name, ceiling = f"reward_score_{work.replace('/', '_')}", operations[best] / operations["trees"]
                lines += ratio(name, seconds[best], seconds["trees"], ceiling)
                lines.append(f"ratio {name}_of_matrix_rate {of_rate:.3f}")
    print("", *lines, sep="\n")


def check_equal(made, theirs: dict[int, float], ours: list[list[list[float]]], dtype: torch.dtype) -> None:
    """Raises UserError where the two sides give different rewards."""
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    for group, values in zip(made, ours, strict=True):
        for row, (value,) in zip(group, values, strict=True):
            if not abs(theirs[id(row)] - value) <= tolerance:
                raise UserError(f"the sides give different rewards: {theirs[id(row)]} and {value}")


if __name__ == "__main__":
    run(main)
