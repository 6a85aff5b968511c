"""Peak memory of a DPO step with a vocabulary of 128 000: ours against trl's DPOTrainer at its defaults.

Each side takes one step of 8 pairs (prompt 120, answer 150) in a process of its own. Resident memory counts all:
libraries, weights, gradients, AdamW's moments, activations; so does the ratio.

    python benchmarks/memory.py
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from dpo_step import BATCH, Ours
from measure import machine
from peers import DPO_BEST, TRL, preference_rows
from workload import SHAPES, flags, groups, lengths, parse, run, save_model

from cream.hardware import peak_memory
from cream.training import dpo

SIDES = {"trl_default": "trl, defaults", "trl_best": "trl, best settings", "ours": "ours"}


def child(args, folder: Path) -> None:
    """One step of one side; prints the bytes before it and at its peak."""
    (work,), (size,) = args.work, args.sizes
    pairs = [tuple(g) for g in groups(lengths(work, size, 2, args.spread, args.seed), args.words, args.seed)]
    if args.side == "ours":
        stage = dpo.Stage(0.1, tolerance=float("inf"))
        examples = [dpo.Example(chosen, rejected, 1.0, 0.0, 0.0) for chosen, rejected in pairs]
        step = Ours(folder, stage, examples, BATCH, True, args.device, None)
    else:
        settings = {"max_length": 4096} | (DPO_BEST if args.side == "trl_best" else {})
        step = TRL(folder, args.words, args.device, preference_rows(pairs), "DPO", **settings)
    step()
    print(peak_memory(torch.device(args.device)))


def main() -> None:
    parser = flags(__doc__, "120/150", BATCH, 128000)
    parser.add_argument("--side", choices=SIDES, help="one side alone, in this process")
    parser.add_argument("--folder", type=Path, help="the model of --side")
    args = parse(parser)
    if args.side:
        child(args, args.folder)
        return
    print(machine())
    peak = {name: [] for name in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), SHAPES[args.shape], args.words, args.seed)
        for _ in range(args.rounds):
            for name in SIDES:
                command = [sys.executable, __file__, *sys.argv[1:], "--side", name, "--folder", folder]
                out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                peak[name].append(int(out.split()[-1]))
    for name, text in SIDES.items():
        print(f"  {text:20} {min(peak[name]) / 1e9:6.2f} GB  (to {max(peak[name]) / 1e9:.2f} over {args.rounds} runs)")
    middle = {name: sorted(values)[len(values) // 2] for name, values in peak.items()}
    print(f"\nratio memory_dpo_vs_trl_best {middle['trl_best'] / middle['ours']:.3f}")
    print(f"ratio memory_dpo_vs_trl_default {middle['trl_default'] / middle['ours']:.3f}")


if __name__ == "__main__":
    run(main)
