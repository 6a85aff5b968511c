"""Wall time of each command that README runs by hand with the tiny model, and of quickstart's loop: this commit beside
an earlier one, on a quiet machine and beside one busy process per core.

    python benchmarks/stages.py --before REVISION
    python benchmarks/stages.py --before REVISION --busy no --rounds 3

Both sides are clones of this repository, run by this Python, each command in turn; `--before` HEAD compares the tree
with itself, which shows the noise. The work tree's changes are on our side too, if they are committed.
The ratios are before / ours, and busy / quiet of either side.
"""

import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from measure import machine, ratio
from options import Options
from workload import ROOT, run

QUICKSTART = "python iterate.py --config configs/recipes/tiny_srlm.yaml,configs/recipes/tiny_cream.yaml"
LOAD = "while True: pass"


def main() -> None:
    parser = Options(__doc__)
    parser.add("--before", None, "an earlier commit", required=True)
    parser.add("--rounds", 1, "runs of each side, in turn")
    parser.add("--busy", "yes", "also beside one process per core", choices=("yes", "no"))
    parser.add("--only", "", "commands whose title begins with one of these, with commas between (default: all)")
    parser.add("--limit", 900.0, "seconds after which a command is given up")
    args = parser.parse_args()
    print(machine(), flush=True)
    chosen = [c for c in commands() if title(c).startswith(tuple(args.only.split(",")))]
    loads, lines = (0, os.cpu_count()) if args.busy == "yes" else (0,), []
    seconds: dict[tuple[str, str, int], list[float]] = {}
    for load in loads:
        for number in range(args.rounds):
            with tempfile.TemporaryDirectory() as folder, busy(load):
                sides = {
                    name: clone(Path(folder) / name, at) for name, at in (("before", args.before), ("ours", "HEAD"))
                }
                for command in chosen:
                    for side, place in sides.items():
                        took = timed(command, place, args.limit)
                        seconds.setdefault((side, command, load), []).append(took)
                    both = ", ".join(f"{side} {seconds[side, command, load][-1]:.1f} s" for side in sides)
                    print(f"beside {load} processes, round {number + 1}: {title(command)}: {both}", flush=True)
    for command in chosen:
        for load in loads:
            name = f"{title(command).replace(' ', '_')}_beside_{load}"
            lines += ratio(name, seconds["before", command, load], seconds["ours", command, load])
    for command in chosen if len(loads) > 1 else ():
        for side in ("before", "ours"):
            quiet, slow = (statistics.median(seconds[side, command, load]) for load in loads)
            print(f"{title(command)}, {side}: {quiet:.1f} s quiet, {slow:.1f} s busy, {slow / quiet:.2f} times as long")
    print(*lines, sep="\n")


def commands() -> list[str]:
    """README's numbered commands, one a stage, and quickstart's."""
    text = (ROOT / "README.md").read_text()
    block = re.search(r"```bash\n(# 1\. .*?)```", text, re.DOTALL)[1].replace("\\\n", " ")
    return [line for line in block.splitlines() if line.startswith("python ")] + [QUICKSTART]


def title(command: str) -> str:
    """A stage's script and the checkpoint that it makes or reads, for a line of the output."""
    words = shlex.split(command)
    named = [words[words.index(flag) + 1] for flag in ("--mode", "--train_stage", "--reward") if flag in words]
    model = [words[words.index(flag) + 1] for flag in ("--register", "--checkpoint") if flag in words][:1]
    return " ".join([words[1], *named, *model]) if command != QUICKSTART else "quickstart"


def clone(folder: Path, revision: str) -> Path:
    """A clone of this repository at a revision."""
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
    subprocess.run(["git", "checkout", "-q", revision], cwd=folder, check=True)
    return folder


def timed(command: str, folder: Path, limit: float) -> float:
    """Seconds of a command; `limit` if it took longer."""
    began = time.perf_counter()
    try:
        subprocess.run(
            [sys.executable, *shlex.split(command)[1:]], cwd=folder, check=True, timeout=limit, capture_output=True
        )
    except subprocess.TimeoutExpired:
        return limit
    except subprocess.CalledProcessError as error:
        sys.exit(f"{command}\nended with {error.returncode}: {error.stderr.decode()[-2000:]}")
    return time.perf_counter() - began


@contextmanager
def busy(count: int) -> Iterator[None]:
    """`count` processes that compute without end, while it lasts."""
    processes = [subprocess.Popen([sys.executable, "-c", LOAD]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


if __name__ == "__main__":
    run(main)
