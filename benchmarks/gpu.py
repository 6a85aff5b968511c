"""One GPU in under 8 minutes: DPO, SFT, reward-model and policy-gradient steps and scoring at 1 B in bfloat16.

Each part is a benchmark of this folder on one common model, both sides in turn: its lines say each side's seconds and
share of the GPU's measured matrix rate (MFU), scoring's its tokens/s. After --minutes no further part begins.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --device cpu --shape tiny --words 500 --scale 0.1     # a dry run
"""

import runpy
import sys
import tempfile
import time
import traceback
from pathlib import Path

import workload
from measure import machine
from options import Options

PARTS = {  # benchmark -> its work, and how many prompts, pairs or conversations
    "dpo_step.py": ("--work 300/150 --bf16 yes", 32),
    "score.py": ("--work 600/250", 32),
    "sft_step.py": ("--work 300/150 --bf16 yes", 64),
    "reward_step.py": ("--work 300/150 --bf16 yes", 32),
    "rloo_step.py": ("--work 300/150 --bf16 yes", 8),
}


def main() -> None:
    parser = Options(__doc__)
    parser.add("--device", "cuda", "where", choices=("cuda", "cpu"))
    parser.add("--shape", "1b", "model", choices=workload.SHAPES)
    parser.add("--words", 32000, "vocabulary")
    parser.add("--scale", 1.0, "of the number of prompts, pairs or conversations")
    parser.add("--rounds", 2, "runs of each side, after one that is not counted")
    parser.add("--minutes", 6.5, "after which no part begins")
    parser.add_parts(PARTS)
    args = parser.parse_args()
    began, failed = time.perf_counter(), []
    print(machine(), flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = workload.save_model(Path(name), workload.SHAPES[args.shape], args.words, 0)
        workload.save_model = lambda *_: folder  # made once for all parts
        for part in args.parts:
            minutes = (time.perf_counter() - began) / 60
            print(f"\n== {part}, after {minutes:.1f} minutes", flush=True)
            if minutes > args.minutes:
                failed.append(f"{part} (no time)")
                continue
            work, size = PARTS[part]
            flags = f"{work} --sizes {max(1, round(size * args.scale))} --rounds {args.rounds} --device {args.device}"
            sys.argv = [part, *flags.split(), "--shape", args.shape, "--words", str(args.words)]
            try:
                runpy.run_path(str(Path(__file__).with_name(part)), run_name="__main__")
            except (Exception, SystemExit):
                traceback.print_exc()
                failed.append(part)
    print(f"\n{time.perf_counter() - began:.0f} s in all")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
