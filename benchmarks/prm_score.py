"""Signs of all steps of N responses to each prompt: one tree, against one forward pass a step (the released way of
math-rm) and one padded forward pass a response.

python benchmarks/prm_score.py                                       # prompt 300, responses of 250, 8 x 8 steps
python benchmarks/prm_score.py --prompt_len 20 --answer_len 16 --answers 2 --steps 2 --shape tiny --words 300   # quick

steps    every step in a forward pass of its own, up to its sign, batch size 1; logits at its last place (released: at
         all places; --all_logits yes)
padded   every response in one row, sorted and padded, eight to a batch; logits at the places of signs
tree     what rewarding.py --reward prm does once texts are tokens

All three give the same probabilities, which is checked. The ids are random, and so are the weights. Ratios are of
seconds, the median over rounds.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from measure import Layout, interleaved, machine, ratio, rectangle, side
from workload import SHAPES, flags, groups, lengths, parse, run, save_model

from cream.model.hardware import Budget, matrix_rate
from cream.model.load import load_policy
from cream.model.signs import SignOdds, sign_odds
from cream.text.chat import Tokens

ROWS = 8  # of a padded batch
SIGNS = 3, 4  # ids of + and -


def main() -> None:
    parser = flags(__doc__, "300/250", 4)
    parser.add("--answers", 8, "N, responses to a prompt")
    parser.add("--steps", 8, "steps of a response")
    parser.add("--all_logits", "no", "logits at all places of the peers, as released", choices=("yes", "no"))
    parser.add("--max_tokens_per_batch", 4096, "of trees")
    args = parse(parser)
    shape, device, whole = SHAPES[args.shape], torch.device(args.device), args.all_logits == "yes"
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rate = matrix_rate(device, dtype, 2048)
    print(machine())
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), shape, args.words, args.seed)
        plain, policy = (load_policy(Path(folder), dtype, device) for _ in range(2))
        model = SignOdds(policy, SIGNS)
        for work in args.work:
            for size in args.sizes:
                made = groups(lengths(work, size, args.answers, args.spread, args.seed), args.words, args.seed)
                made = [[signed(row, args.steps) for row in group] for group in made]
                rows = [row for group in made for row in group]
                found = {}

                def by_steps(rows=rows, found=found) -> None:
                    found["steps"] = step_by_step(plain, rows, whole)

                def padded(rows=rows, found=found) -> None:
                    found["padded"] = in_padded_rows(plain, rows, whole)

                def tree(made=made, found=found) -> None:
                    odds = sign_odds(model, made, Budget(args.max_tokens_per_batch))
                    found["tree"] = [value for group in odds for row in group for value in row]

                seconds = interleaved({"steps": by_steps, "padded": padded, "tree": tree}, args.rounds)
                check(found, 1e-3 if dtype == torch.float32 else 0.2)
                counted = layouts(made, whole)
                operations = {
                    name: layout.operations(shape, args.words)
                    + 2 * layout.head * shape.hidden * (2 - args.words) * (name == "tree")  # its head has two words
                    for name, layout in counted.items()
                }
                print(f"\n{work}: {size} prompts x {args.answers} responses x {args.steps} steps, "
                      f"{counted['tree'].tokens} tokens in trees")  # fmt: skip
                for name, own in seconds.items():
                    side(name, own, operations[name], rate)
                for peer in ("steps", "padded"):
                    most = operations[peer] / operations["tree"]
                    name = f"prm_{work.replace('/', '_')}_vs_{peer}"
                    lines += ratio(name, seconds[peer], seconds["tree"], most)
    print("", *lines, sep="\n")


def signed(row: Tokens, steps: int) -> Tokens:
    """The row with signs in its response: at its end, and evenly before."""
    ((start, end),) = row.spans
    places = [start + (end - start) * k // steps - 1 for k in range(1, steps + 1)]
    ids = [SIGNS[0] if i in {*places} else token for i, token in enumerate(row.ids)]
    return Tokens(ids, [(place, place + 1) for place in places])


def places(row: Tokens) -> list[int]:
    """The places before the signs."""
    return [start - 1 for start, _ in row.spans]


@torch.inference_mode()
def step_by_step(model, rows: Sequence[Tokens], whole: bool) -> list[float]:
    """Log-odds of every sign, each from a forward pass of what is before it."""
    found = []
    for row in rows:
        for place in places(row):
            ids = torch.tensor([row.ids[: place + 1]], device=model.device)
            found.append(odds(model(input_ids=ids, logits_to_keep=0 if whole else 1, use_cache=False).logits[0, -1:]))
    return torch.cat(found).tolist()


@torch.inference_mode()
def in_padded_rows(model, rows: Sequence[Tokens], whole: bool) -> list[float]:
    """The same from one row for each response, right-padded."""
    found: list[torch.Tensor | None] = [None] * len(rows)
    for batch in batches(rows):
        width = max(len(rows[i]) for i in batch)
        ids = torch.tensor([rows[i].ids + [0] * (width - len(rows[i])) for i in batch], device=model.device)
        mask = torch.tensor([[1] * len(rows[i]) + [0] * (width - len(rows[i])) for i in batch], device=model.device)
        columns = torch.arange(width) if whole else torch.tensor(sorted({p for i in batch for p in places(rows[i])}))
        logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=columns.to(model.device), use_cache=False)
        at = {place: k for k, place in enumerate(columns.tolist())}
        for own, i in zip(logits.logits, batch, strict=True):
            found[i] = odds(own[[at[place] for place in places(rows[i])]])
    return torch.cat(found).tolist()


def odds(logits: torch.Tensor) -> torch.Tensor:
    """log π(+) - log π(-) of logits (K, V)."""
    return logits[:, SIGNS[0]].float() - logits[:, SIGNS[1]].float()


def batches(rows: Sequence[Tokens]) -> list[list[int]]:
    """Indices of the rows, those of like lengths together."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    return [order[start : start + ROWS] for start in range(0, len(order), ROWS)]


def check(found: dict[str, list[float]], within: float) -> None:
    """All sides found the same, up to rounding."""
    for other in found.values():
        assert max(abs(a - b) for a, b in zip(found["tree"], other, strict=True)) < within


def layouts(made: Sequence[Sequence[Tokens]], whole: bool) -> dict[str, Layout]:
    """What each side lays out."""
    rows = [row for group in made for row in group]
    steps = sum((rectangle(1, p + 1, None if whole else 1) for row in rows for p in places(row)), Layout())
    padded = Layout()
    for batch in batches(rows):
        columns = {place for i in batch for place in places(rows[i])}
        head = None if whole else len(batch) * len(columns)
        padded += rectangle(len(batch), max(len(rows[i]) for i in batch), head)
    tree = Layout()
    for group in made:
        prompt = next(k for k in range(len(group[0])) if len({row.ids[k] for row in group}) > 1)
        own = [len(row) - prompt for row in group]
        pairs = prompt * (prompt + 1) // 2 + sum(n * prompt + n * (n + 1) // 2 for n in own)
        tree += Layout(prompt + sum(own), sum(len(row.spans) for row in group), pairs)
    return {"steps": steps, "padded": padded, "tree": tree}


if __name__ == "__main__":
    run(main)
