"""Peak memory of a step of DPO, a reward model, or RLOO, with a vocabulary of 128 000: ours against trl's trainer.

Each side takes two steps of 8 pairs (prompt 120, answer 150) in a process of its own; in the second, AdamW's moments
take memory besides the activations. Resident memory includes libraries and weights, and so does the ratio; the memory
after loading the model is printed too.

    python benchmarks/memory.py
    python benchmarks/memory.py --sides ours,adamw_bf16
    python benchmarks/memory.py --kind reward
    python benchmarks/memory.py --kind rloo --work 300/150 --sizes 8    # 2 steps of 4 prompts x 8 responses, float32
"""

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import rloo_step
import torch
from dpo_step import BATCH, Ours
from measure import machine
from peers import DPO_BEST, TRL, TRLGroups, preference_rows, reward_rows
from reward_step import trl_settings
from workload import SHAPES, flags, groups, lengths, parse, run, save_model

from cream.model.hardware import peak_memory
from cream.training.stages import bradley_terry, dpo, rloo

SIDES = {
    "trl_default": "trl, defaults",
    "trl_best": "trl, best settings",
    "ours": "ours",
    "adamw_bf16": "ours, --optim adamw_bf16",
}
OPTIM = {"ours": "adamw", "adamw_bf16": "adamw_bf16"}


def child(args, folder: Path) -> None:
    """The steps of one side; prints the bytes before them and at their peak."""
    (work,), (size,) = args.work, args.sizes
    if args.kind == "rloo":
        return rloo_child(args, folder, work, size)
    pairs = [tuple(g) for g in groups(lengths(work, size, 2, args.spread, args.seed), args.words, args.seed)]
    best, optim = args.side == "trl_best", OPTIM.get(args.side)
    if optim is None and args.kind == "reward":
        settings = {"max_length": 4096} | (trl_settings(1) if best else {})
        step = TRL(folder, args.words, args.device, reward_rows(pairs), "Reward", **settings)
    elif optim is None:
        settings = {"max_length": 4096} | (DPO_BEST if best else {})
        step = TRL(folder, args.words, args.device, preference_rows(pairs), "DPO", **settings)
    elif args.kind == "reward":
        stage = bradley_terry.Stage(bradley_terry.Options(), {})
        examples = [bradley_terry.Example(chosen, rejected) for chosen, rejected in pairs]
        step = Ours(folder, stage, examples, BATCH, True, args.device, None, optim)
    else:
        stage = dpo.Stage(dpo.Options(), {})
        examples = [dpo.Example(chosen, rejected, 1.0, (0.0, 0.0)) for chosen, rejected in pairs]
        step = Ours(folder, stage, examples, BATCH, True, args.device, None, optim)
    step()
    print(step.loaded, peak_memory(torch.device(args.device)))


def rloo_child(args, folder: Path, work: str, size: int) -> None:
    """The same for RLOO, on given samples."""
    made = groups(lengths(work, size, rloo_step.RESPONSES, args.spread, args.seed), args.words, args.seed)
    given = [[[0.5, -0.5] * (len(group) // 2) for group in made]] * 2  # as good as any: no value changes the memory
    if args.side in OPTIM:
        stage, examples = rloo.Stage(rloo.Options(), {}), rloo_step.examples_of(made, *given)
        step = Ours(folder, stage, examples, rloo_step.PROMPTS, False, args.device, None, OPTIM[args.side])
    else:
        settings = rloo_step.trl_settings(1) | ({} if args.side == "trl_best" else {"gradient_checkpointing": True})
        step = TRLGroups(folder, args.words, args.device, made, *given, **settings)
    step()
    print(step.loaded, peak_memory(torch.device(args.device)))


def main() -> None:
    parser = flags(__doc__, "120/150", 2 * BATCH, 128000)
    parser.add("--kind", "dpo", "what is trained", choices=("dpo", "reward", "rloo"))
    parser.add("--sides", ",".join(SIDES), "of these, which; with commas")
    parser.add_argument("--side", choices=SIDES, help="one side alone, in this process")
    parser.add_argument("--folder", type=Path, help="the model of --side")
    args = parse(parser)
    if len(args.work) > 1 or len(args.sizes) > 1:
        parser.error("one --work and one of --sizes at a time")
    if unknown := set(sides := args.sides.split(",")) - SIDES.keys():
        parser.error(f"--sides: {', '.join(unknown)}: expected {', '.join(SIDES)}")
    if args.side:
        child(args, args.folder)
        return
    print(machine())
    found = {name: [] for name in sides}  # (bytes before the steps, at their peak)
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), SHAPES[args.shape], args.words, args.seed)
        for number in range(1, args.rounds + 1):
            for name in sides:
                command = [sys.executable, __file__, *sys.argv[1:], "--side", name, "--folder", folder]
                out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                found[name].append(tuple(map(int, out.split()[-2:])))
                print(f"    round {number}, {SIDES[name]}: {found[name][-1][1] / 1e9:.2f} GB", flush=True)
    peak, above = {}, {}
    for name in sides:
        peaks = [most for _, most in found[name]]
        peak[name] = statistics.median(peaks)
        above[name] = statistics.median(most - loaded for loaded, most in found[name])
        spread = f"{min(peaks) / 1e9:.2f} to {max(peaks) / 1e9:.2f} over {args.rounds} runs"
        more = f"{above[name] / 1e9:.2f} above what it had loaded"
        print(f"  {SIDES[name]:24} {peak[name] / 1e9:6.2f} GB ({spread}), {more}")
    pairs = [(peer, own) for own in sides if own in OPTIM for peer in sides if peer not in OPTIM]
    for peer, own in pairs:
        print(f"{SIDES[peer]}: {above[peer] / above[own]:.2f} times {SIDES[own]} above what was loaded")
    print()
    for peer, own in pairs:
        print(f"ratio memory_{args.kind}{'' if own == 'ours' else f'_{own}'}_vs_{peer} {peak[peer] / peak[own]:.3f}")


if __name__ == "__main__":
    run(main)
