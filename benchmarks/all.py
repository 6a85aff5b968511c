"""All benchmarks of speed and memory one after another, and one table of their ratios.

    python benchmarks/all.py --quick               # one round of little work: about ten minutes on two cores
    python benchmarks/all.py --only dpo_step.py,score.py

Each runs in a process of its own, its output as it comes; one that fails is named at the end, exit code 1. What needs
../shared is skipped where that is absent. The ratios of --quick are of one round: see docs/performance.md for more.
"""

import shlex
import subprocess
import sys
import time
from pathlib import Path

from measure import machine
from options import Options
from workload import SHARED, run

QUICK = {  # script -> the work of --quick; lengths are given where real ones would need ../shared
    "score.py": "--work 600/250 --sizes 2 --rounds 1",
    "dpo_step.py": "--work 120/150 --sizes 8 --rounds 1",
    "sft_step.py": "--work 120/150 --sizes 8 --rounds 1",
    "iteration.py": "--work 300/150 --sizes 2 --rounds 1",
    "reward_step.py": "--work 300/150 --sizes 8 --rounds 1",
    "rloo_step.py": "--sizes 2 --rounds 1",
    "reward_score.py": "--sizes 1 --rounds 1",
    "prm_score.py": "--sizes 1 --rounds 1",
    "pairwise_score.py": "--prompts 1 --rounds 1",
    "sampling.py": "--prompt_len 100 --prompts 16 --rounds 1",
    "judge.py": "--prompts 4 --rounds 1",
    "memory.py": "--sizes 8 --rounds 1",
    "consistency.py": "--prompts 100000 --rounds 1 --lines 10000",
}
FULL = dict.fromkeys(QUICK, "") | {"evaluation.py": ""}
NEEDS_SHARED = {"evaluation.py"}


def main() -> None:
    parser = Options(__doc__)
    parser.add_argument("--quick", action="store_true", help="one round of little work")
    parser.add("--only", "", "these scripts, with commas between (default: all)")
    args = parser.parse_args()
    work = QUICK if args.quick else FULL
    if unknown := [name for name in filter(None, args.only.split(",")) if name not in work]:
        parser.error(f"--only {unknown[0]}: expected some of {', '.join(work)}")
    print(machine(), flush=True)
    began, rows, failed = time.perf_counter(), [], []
    for script in filter(None, args.only.split(",")) if args.only else work:
        if script in NEEDS_SHARED and not SHARED.is_dir():
            print(f"\n{script}: skipped, {SHARED} is not there", flush=True)
            continue
        print(f"\n== {script} {work[script]}", flush=True)
        lines, code = output(script, work[script])
        if code:
            failed.append(script)
        rows += [(script, *line.split()[1:]) for line in lines if line.startswith("ratio ")]
    width = max((len(f"{script} {name}") for script, name, _ in rows), default=0)
    print("", *(f"{f'{script} {name}':{width}} {float(value):8.2f}" for script, name, value in rows), sep="\n")
    print(f"{time.perf_counter() - began:.0f} s in all")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def output(script: str, flags: str) -> tuple[list[str], int]:
    """A benchmark's lines, which are printed as they come, and its exit code."""
    command = [sys.executable, str(Path(__file__).with_name(script)), *shlex.split(flags)]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return lines, process.returncode


if __name__ == "__main__":
    run(main)
