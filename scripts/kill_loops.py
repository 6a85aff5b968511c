"""Kill loops of the tiny model at random moments, resume them, and compare all their files with an undisturbed run's.

    python scripts/kill_loops.py                               every loop in configs/loops/tiny_*.yaml (half an hour)
    python scripts/kill_loops.py tiny_spin tiny_oaif --kills 5 --seed 1

Each loop runs once to its end, below outputs/kills; then again from its beginning, killed (SIGKILL) --kills times, the
moments drawn by --seed from the seconds that the first run took, and at last to its end. Times and speeds in sidecars
and logs apart, every file must have the same content. Exit code 1 if one has not.
"""

import argparse
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "tests")]

from on_disk import contents  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loops", nargs="*", help="names of loop files (default: all of the tiny model)")
    parser.add_argument("--kills", type=int, default=3, help="kills of each loop (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    args = parser.parse_args()
    every = sorted(path.stem for path in REPO.glob("configs/loops/tiny_*.yaml"))
    results = [compare(loop, args.kills, random.Random(f"{loop} {args.seed}")) for loop in args.loops or every]
    return 0 if all(results) else 1


def compare(loop: str, kills: int, draw: random.Random) -> bool:
    """Whether a loop that is killed so often ends in the same files; prints what was done at each kill."""
    root, whole = (REPO / "outputs/kills" / name for name in (loop, f"{loop}.whole"))
    for folder in (root, whole):
        shutil.rmtree(folder, ignore_errors=True)
    root.parent.mkdir(parents=True, exist_ok=True)
    seconds, log = run(loop, root)
    table = log.rstrip().splitlines()
    print(f"{loop}: {seconds:.0f} s undisturbed", *table[-shown(table) : -1], sep="\n  ", flush=True)
    root.rename(whole)
    moments = sorted(draw.uniform(0, seconds) for _ in range(kills))
    for before, moment in zip([0.0, *moments], moments, strict=False):
        _, log = run(loop, root, moment - before)
        steps = [line for line in log.splitlines() if line.startswith("[")] or ["before the first step"]
        print(f"  killed after {moment - before:.1f} s: {steps[-1]}", flush=True)
    run(loop, root)
    made, again = contents(whole, "*"), contents(root, "*")
    differ = sorted(path for path in made.keys() | again.keys() if made.get(path) != again.get(path))
    print(f"  {len(made)} files, {len(differ)} differ", *differ, sep="\n    ", flush=True)
    return not differ


def shown(lines: list[str]) -> int:
    """Lines from the table's head to the end."""
    return next(i for i, line in enumerate(reversed(lines), 1) if line.startswith("model "))


def run(loop: str, root: Path, limit: float | None = None) -> tuple[float, str]:
    """(seconds, what it printed) of a loop, killed after `limit` seconds; without a limit it must succeed."""
    argv = [sys.executable, "-u", "iterate.py", "--device", "cpu", "--config", f"configs/loops/{loop}.yaml"]
    began, log = time.monotonic(), root.with_suffix(".log")
    with log.open("w") as file:
        root_flag = ["--output_root", str(root.relative_to(REPO))]
        process = subprocess.Popen([*argv, *root_flag], cwd=REPO, stdout=file, stderr=subprocess.STDOUT)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
    if limit is None and code:
        sys.exit(f"{loop} ended with {code}:\n{log.read_text()[-2000:]}")
    return time.monotonic() - began, log.read_text()


if __name__ == "__main__":
    sys.exit(main())
