"""A pairwise preference model on N responses to each prompt, each two in both orders: trees against padded prompts.

    python benchmarks/pairwise_score.py                     # N = 5, prompts of 300 tokens and responses of 150
    python benchmarks/pairwise_score.py --shape tiny --words 400 --prompts 2 --rounds 1     # without ../shared, quick

padded  a row for each ordered pair, eight of a length together, left-padded: the model's own forward pass, with its
        head at the last token alone
trees   what --reward pairwise does after tokenising: the prompt once for all pairs, the first response once for all its
        opponents

Both give P(A) of every ordered pair, and the same ones, which is checked. Prompts and responses are random words, the
model a Llama with random weights. Seconds are of the model's work alone: both start from the same token ids.
"""

import argparse
import tempfile
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from judge import ROWS, random_samples, tree
from measure import Layout, interleaved, machine, ratio, rectangle, side
from options import Options
from sampling import tokenizer, with_model
from workload import SHAPES, run, save_model

from cream.model.hardware import Budget, matrix_rate
from cream.model.load import load_policy
from cream.model.logprobs import LogProbs, score
from cream.rewards import pairwise, passes
from cream.scoring import logprobs
from cream.text.chat import Chat


def main() -> None:
    args = flags().parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), args)
        seconds = interleaved({"padded": bench.padded(), "trees": bench.trees()}, args.rounds)
        rate = matrix_rate(bench.device, bench.dtype, 2048)
    operations = {name: layout.operations(SHAPES[args.shape], args.words) for name, layout in bench.counted().items()}
    for name, found in seconds.items():
        side(name, found, operations[name], rate)
    most = operations["padded"] / operations["trees"]
    print("", *ratio("pairwise_trees_vs_padded", seconds["padded"], seconds["trees"], most), sep="\n")


def flags() -> Options:
    parser = Options(__doc__)
    parser.add("--prompts", 4, "prompts of a run")
    parser.add("--answers", 5, "N, responses to each: N (N - 1) comparisons")
    parser.add("--prompt_len", 300, "tokens of a prompt, +-20 %%")
    parser.add("--answer_len", 150, "tokens of a response, +-20 %%")
    parser.add("--max_tokens_per_batch", 8192, "of trees; where all pairs of a prompt do not fit, it is laid out twice")
    return with_model(parser)


class Bench:
    """The model, the token rows of all comparisons, and a maker of each side, which computes all of them once."""

    def __init__(self, folder: Path, args: argparse.Namespace):
        self.device = torch.device(args.device)
        self.dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
        self.folder = save_model(folder / "model", SHAPES[args.shape], args.words, args.seed)
        self.budget = args.max_tokens_per_batch
        chat, options = Chat(tokenizer(args.words), **passes.QUOTING), pairwise.Options(reward_model="benchmark")
        pairwise.check_chat(pairwise.ROLE, chat, options)
        asked = chain.from_iterable(pairwise.requests("", sample, options) for sample in random_samples(chat, args))
        self.rows = [logprobs.encode(group, chat, 4096)[0] for group in asked]
        self.labels = [row.ids[-1] for row in self.rows[0]]
        self.found: list[float] = []  # P(A) of each, by the side that came first
        lengths = [len(rows[0]) - 1 for rows in self.rows]
        print(
            f"{args.shape}, {args.words} words: {args.prompts} prompts x {args.answers} responses, {len(self.rows)} "
            f"ordered pairs of {min(lengths)} to {max(lengths)} tokens"
        )

    def trees(self):
        model = LogProbs(load_policy(self.folder, self.dtype, self.device))
        joined, budget = logprobs.join_groups(self.rows), Budget(self.budget)

        def compare() -> None:
            values = chain.from_iterable(score(model, joined, budget))
            self._same([pairwise.share([next(values) for _ in rows]) for rows in self.rows])

        return compare

    def padded(self):
        model = load_policy(self.folder, self.dtype, self.device)
        row = partial(torch.tensor, device=self.device)

        @torch.inference_mode()
        def compare() -> None:
            found: dict[int, float] = {}
            for batch in self._batches():
                lead = [self.rows[i][0].ids[:-1] for i in batch]
                width = max(map(len, lead))
                ids = row([[0] * (width - len(each)) + each for each in lead])
                mask = row([[0] * (width - len(each)) + [1] * len(each) for each in lead])
                how = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
                logits = model(input_ids=ids, **how, logits_to_keep=1, use_cache=False).logits[:, -1]
                found |= dict(zip(batch, logits[:, self.labels].float().softmax(1)[:, 0].tolist(), strict=True))
            self._same([found[i] for i in range(len(self.rows))])

        return compare

    def _batches(self) -> list[list[int]]:
        order = sorted(range(len(self.rows)), key=lambda i: len(self.rows[i][0]))
        return [order[start : start + ROWS] for start in range(0, len(order), ROWS)]

    def _same(self, found: list[float]) -> None:
        """Both sides find the same, up to rounding."""
        self.found = self.found or found
        within = 1e-4 if self.dtype == torch.float32 else 0.1
        assert max(abs(a - b) for a, b in zip(found, self.found, strict=True)) < within

    def counted(self) -> dict[str, Layout]:
        """What each side lays out."""
        sizes = [(len(batch), max(len(self.rows[i][0]) - 1 for i in batch)) for batch in self._batches()]
        rows = sum((rectangle(*size, head=size[0]) for size in sizes), Layout())
        return {"padded": rows, "trees": sum(map(tree, logprobs.join_groups(self.rows)), Layout())}


if __name__ == "__main__":
    run(main)
