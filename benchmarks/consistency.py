"""Ranking consistency: arrays against scipy, and what cal_consistency.py costs as its files grow.

    python benchmarks/consistency.py
    python benchmarks/consistency.py --lines 10000,100000 --rounds 5        # without the large files

First, c of --prompts prompts from two arrays of rewards, against scipy.stats.kendalltau in a loop over prompts and
against its `axis` argument. scipy runs on the first --scipy_prompts of them, and its time is scaled up. Then the real
command on two generated .jsonl files of --lines prompts each, just written and so in the page cache, in a process of
its own: seconds, prompts per second, peak resident memory.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from measure import interleaved, machine
from options import Options
from scipy.stats import kendalltau

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cream.consistency import consistency  # noqa: E402
from cream.files import store  # noqa: E402

# A process of its own starts the command: the peak counted for a child includes that of the process it was forked from.
LAUNCHER = """
import resource, subprocess, sys, time
start = time.perf_counter()
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""


def main() -> None:
    parser = Options(__doc__)
    parser.add("--prompts", 1_000_000, "prompts of the arrays")
    parser.add("--answers", 5, "answers to each prompt")
    parser.add("--scipy_prompts", 2000, "prompts that scipy gets; its time is scaled to --prompts")
    parser.add("--rounds", 5, "runs of each side, in turn")
    parser.add("--lines", "10000,100000,1000000", "prompts of the .jsonl files, one run each; none: skip them")
    parser.add("--chars", 200, "characters of a prompt and of an answer, on average")
    parser.add(
        "--folder", tempfile.gettempdir(), "where the files are made, and removed again: 8 GB for a million lines"
    )
    args = parser.parse_args()
    print(machine())
    ratio = arrays(args)
    if args.lines != "none":
        print(f"\ncal_consistency.py, two .jsonl files, {args.answers} answers, about {args.chars} characters each")
        print(f"{'lines':>10}{'MB read':>10}{'seconds':>10}{'lines/s':>10}{'peak MB':>10}")
        for lines in args.lines.split(","):
            command(int(lines), args)
    print(f"ratio consistency_vs_scipy {ratio:.1f}")


def arrays(args: argparse.Namespace) -> float:
    """Times both sides and prints them; returns how many times faster than scipy in a loop the median round is."""
    current, previous = np.random.default_rng(0).standard_normal((2, args.prompts, args.answers))
    few = slice(min(args.scipy_prompts, args.prompts))

    def ours(rows: slice = slice(None)):
        return consistency(current[rows], previous[rows])[0]

    def loop():
        rows = zip(current[few], previous[few], strict=True)
        return np.array([(kendalltau(x, y).statistic + 1) / 2 for x, y in rows])

    def axis():
        return (kendalltau(current[few], previous[few], axis=1).statistic + 1) / 2

    for theirs in (loop, axis):
        np.testing.assert_allclose(ours(few), theirs(), atol=1e-12)
    seconds = interleaved({"cream": ours, "scipy in a loop": loop, "scipy, axis=1": axis}, args.rounds)
    scale = args.prompts / few.stop
    print(f"\nc of {args.prompts} prompts x {args.answers} answers, from arrays; {args.rounds} rounds")
    print(f"(scipy on {few.stop} prompts, its seconds x {scale:g}; both sides give the same c to 1e-12)")
    print(f"{'':18}{'median s':>10}{'least':>10}{'most':>10}{'us/prompt':>12}")
    for side, times in seconds.items():
        whole = [t * (1 if side == "cream" else scale) for t in times]
        each = 1e6 * statistics.median(whole) / args.prompts
        print(f"{side:18}{statistics.median(whole):10.3f}{min(whole):10.3f}{max(whole):10.3f}{each:12.3f}")
    rounds = zip(seconds["scipy in a loop"], seconds["cream"], strict=True)
    ratios = [scale * theirs / ours for theirs, ours in rounds]
    print(f"times faster than scipy in a loop: {min(ratios):.0f} to {max(ratios):.0f}")
    return statistics.median(ratios)


def command(lines: int, args: argparse.Namespace) -> None:
    """Runs cal_consistency.py on two files of so many lines and prints what it took."""
    needed = 3 * lines * (args.chars + 60) * 2 * (args.answers + 1)
    if (free := shutil.disk_usage(args.folder).free) < needed:
        sys.exit(f"{args.folder}: {lines} lines need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; try --folder")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        current, previous, pairs = (Path(folder) / f"{name}.jsonl" for name in ("current", "previous", "pairs"))
        for seed, path in enumerate((current, previous), 1):
            store.write_rows(path, rewarded(lines, args.answers, args.chars, seed))
        read = current.stat().st_size + previous.stat().st_size
        words = ["cal_consistency.py", "--file1", current, "--file2", previous, "--output", pairs]
        launched = [sys.executable, "-c", LAUNCHER, sys.executable, *map(str, words)]
        done = subprocess.run(launched, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    seconds, peak = map(float, done.stdout.split())
    print(f"{lines:10}{read / 1e6:10.0f}{seconds:10.2f}{lines / seconds:10.0f}{peak / 1e6:10.1f}", flush=True)


def rewarded(lines: int, answers: int, chars: int, seed: int) -> Iterator[dict]:
    """Encoded records as rewarding.py writes them: the same answers whatever the seed, which is that of the rewards."""
    texts, rewards = np.random.default_rng(0), np.random.default_rng(seed)
    words = " ".join(f"{number} apples" for number in texts.integers(0, 1000, size=2 * chars))
    for number in range(lines):
        starts = texts.integers(0, len(words) - 2 * chars, size=answers + 1)
        lengths = texts.integers(chars // 2, chars + chars // 2, size=answers + 1)
        prompt, *replies = (words[a : a + n] for a, n in zip(starts.tolist(), lengths.tolist(), strict=True))
        score, ref_score = rewards.normal(-60, 10, size=(2, answers)).tolist()
        turn = {"role": "user", "content": f"{number}: {prompt}"}
        yield {
            "uuid": f"prompt-{number:09d}",
            "prompt": [turn],
            "response": [[turn, {"role": "assistant", "content": reply}] for reply in replies],
            "score": score,
            "ref_score": ref_score,
            "reward": [a - b for a, b in zip(score, ref_score, strict=True)],
            "finish_reason": ["stop"] * answers,
            "num_tokens": [n // 4 for n in lengths[1:].tolist()],
        }


if __name__ == "__main__":
    main()
