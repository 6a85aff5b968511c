"""Kill loops of the tiny model at random moments, resume them, and compare all their files with an undisturbed run's.

    python scripts/kill_loops.py                               every loop in configs/loops/tiny_*.yaml (half an hour)
    python scripts/kill_loops.py tiny_spin tiny_oaif --kills 5 --seed 1

Each loop runs once to its end, below outputs/kills; then again from its beginning, killed (SIGKILL) --kills times, and
at last to its end. The moments are drawn by --seed from the seconds of the first run: in the same step, as long after
its beginning. Times and speeds in sidecars and logs apart, every file must have the same content. Exit code 1 if one
has not.
"""

import argparse
import random
import re
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
    """Whether a loop that is killed so often ends in the same files; prints what it was doing at each kill."""
    root, whole = (REPO / "outputs/kills" / name for name in (loop, f"{loop}.whole"))
    for folder in (root, whole):
        shutil.rmtree(folder, ignore_errors=True)
    root.parent.mkdir(parents=True, exist_ok=True)
    began, log = run(loop, root)
    lines = log.rstrip().splitlines()
    table = next(i for i, line in enumerate(lines) if line.startswith("model "))
    print(f"{loop}: {lines[-1]}, undisturbed", *lines[table:-1], sep="\n  ", flush=True)
    root.rename(whole)
    for moment in sorted(draw.uniform(0, began["end"]) for _ in range(kills)):
        step = [title for title, at in began.items() if at <= moment][-1]
        ended, log = run(loop, root, (step, moment - began[step]))
        print(f"  {moment:.0f} s: {'ended before' if 'end' in ended else 'killed'} in {[*ended][-1]}", flush=True)
    run(loop, root)
    made, again = contents(whole, "*"), contents(root, "*")
    differ = sorted(path for path in made.keys() | again.keys() if made.get(path) != again.get(path))
    print(f"  {len(made)} files, {len(differ)} differ", *differ, sep="\n    ", flush=True)
    return not differ


def run(loop: str, root: Path, kill: tuple[str, float] | None = None) -> tuple[dict[str, float], str]:
    """(step -> the second at which it began, what it printed) of a loop; `kill`: so many seconds after a step's
    beginning. Without that it must succeed; what has ended has an `end`."""
    argv = [sys.executable, "-u", "iterate.py", "--device", "cpu", "--config", f"configs/loops/{loop}.yaml"]
    argv += ["--report", "no"]  # which has times
    start, path, began = time.monotonic(), root.with_suffix(".log"), {"start": 0.0}
    with path.open("w") as file:
        root_flag = ["--output_root", str(root.relative_to(REPO))]
        process = subprocess.Popen([*argv, *root_flag], cwd=REPO, stdout=file, stderr=subprocess.STDOUT)
        while process.poll() is None:
            time.sleep(0.02)
            now = time.monotonic() - start
            for title in re.findall(r"^\[.*\d+/\d+\] .*$", path.read_text(), re.MULTILINE):
                began.setdefault(title, now)
            if kill and kill[0] in began and now >= began[kill[0]] + kill[1]:
                process.kill()
                process.wait()
                return began, path.read_text()
    if process.returncode:
        sys.exit(f"{loop} ended with {process.returncode}:\n{path.read_text()[-2000:]}")
    return began | {"end": time.monotonic() - start}, path.read_text()


if __name__ == "__main__":
    sys.exit(main())
