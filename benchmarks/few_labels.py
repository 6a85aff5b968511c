"""The study of training from few labels behind docs/results.md: SER and SSRM round by round, in tiny worlds.

    python benchmarks/few_labels.py --seeds 0              # development: settings are chosen here
    python benchmarks/few_labels.py --seeds 500-504        # the study: fresh worlds, run once

SER learns from the world's 1250 comparison pairs: 450 are held out, and 120 of the other 800 keep their labels. SSRM
learns from M1's right and wrong responses to 300 problems: 100 problems are held out, and about 30 keep their labels.
The loops are those that users run. A row is one model of a loop: its accuracy on held-out pairs, the share of the pool
that it was trained on, and the shares of right labels. Intervals are Student's, over worlds. Run again, the study
resumes.
"""

import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from options import Options
from reward_study import Table, report
from study import shipped_loop
from workload import ROOT

from cream.files.store import write_json
from cream.loops.results import results
from cream.tiny.problems import write_world
from iterate import prepare, run

SEED, LABELS, LAST = "seed only", "all labels", "round 3"
LOOPS = {  # part -> what a row of it is called, by loop
    "ser": {"tiny_ser": "", "tiny_ser_uncentred": "not centred, ", "tiny_ser_labels": ""},
    "ssrm": {"tiny_ssrm": "", "tiny_ssrm_labels": ""},
}
DIFFERENCES = {
    "ser": [(LAST, SEED), (LAST, LABELS), (LAST, f"not centred, {LAST}")],
    "ssrm": [(LAST, SEED), (LAST, LABELS)],
}


def main() -> None:
    parser = Options(__doc__)
    parser.add("--seeds", "500-504", "worlds, first-last")
    parser.add("--base", ROOT / "assets/tiny_m0", "the base model's folder", type=Path)
    parser.add("--output", ROOT / "outputs/few_labels", "folder", type=Path)
    parser.add_parts(LOOPS)
    args = parser.parse_args()
    first, _, last = args.seeds.partition("-")
    began = time.monotonic()
    args.output.mkdir(parents=True, exist_ok=True)
    with open(args.output / "log", "a") as log:
        for part in args.parts:
            found = []
            for seed in range(int(first), int(last or first) + 1):
                with redirect_stdout(log), redirect_stderr(log):
                    found.append(world(part, args.output / f"seed{seed}", args.base, seed))
                print(f"{part}, world {seed}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
            write_json(args.output / f"{part}-{args.seeds}.json", found)
            print(f"\n## {part}\n\n{report(found, DIFFERENCES[part])}", flush=True)


def world(part: str, folder: Path, base: Path, seed: int) -> Table:
    """One world's rows: the model of the seed, of each round of each loop, and of all labels."""
    if not (folder / "world/test.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_world(folder / "world", seed)
    found: Table = {}
    for name, prefix in LOOPS[part].items():
        loop = shipped_loop(str(base), name, seed, folder / "world", folder)
        course, problems = prepare(loop, ["cpu"], None, set())
        assert not problems, problems
        try:
            run(course)
        except SystemExit as stop:
            raise RuntimeError(f"{name}: a stage ended with {stop.code}; see the log in {folder.parent}") from None
        for row in results(course.ran):
            found[_title(row["model"], prefix)] = _numbers(row)
    return found


def _title(model: str, prefix: str) -> str:
    """RM0 is "seed only", whatever the loop; RM2 "round 2"."""
    number = model[2:]
    return LABELS if number == ".labels" else SEED if number == "0" else f"{prefix}round {number}"


def _numbers(row: dict) -> dict[str, float]:
    shown = {name: value for name, value in row.get("shown", {}).items() if not isinstance(value, str)}
    return {"accuracy %": 100 * row["accuracy"]} | shown


if __name__ == "__main__":
    main()
