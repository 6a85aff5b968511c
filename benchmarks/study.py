"""The study behind docs/results.md: CREAM, plain self-rewarding, controls and Oracle on fresh tiny worlds.

    python benchmarks/study.py --seeds 0-2 --arms srlm,srlm_1e-4,cream_avg      # development: settings are chosen here
    python benchmarks/study.py --seeds 200-209                                  # the study: fresh seeds, run once
    python benchmarks/study.py --seeds 300-304 --bases assets/tiny_m0 --arms tiny_spin,tiny_more_sft --compare tiny_spin
    python benchmarks/study.py --seeds 400-404 --bases assets/tiny_m0 --arms tiny_steered,tiny_unsteered \\
        --compare tiny_steered                                                  # `test`: each loop's result

A cell is one world (its own SFT set, prompts and test set) on one base model; all arms of a cell share M1 and round 1's
samples and rewards. The bases see the same worlds, so the unit of the statistics is a world: its accuracy is the mean
over the bases. The second base is made by scripts/make_tiny.py (its --help has the command). Run again, the study
resumes. The stages are the ones that users run. An arm is one of the study's own, or the name of a loop of the tiny
model in configs/loops.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

ROUNDS = 3
LR = 2e-4
CREAM = {"method": "consistency_dyn"}
ARMS = {  # name -> (flags of the consistency stage, flags of DPO)
    "srlm": ({"method": "original"}, {}),
    "srlm_5e-5": ({"method": "original"}, {"lr": 5e-5}),
    "srlm_1e-4": ({"method": "original"}, {"lr": 1e-4}),
    "srlm_3e-4": ({"method": "original"}, {"lr": 3e-4}),
    "cream_avg": ({"method": "consistency_avg"}, {}),
    "cream_dyn": (CREAM, {}),
    "cream_avg_bf16": ({"method": "consistency_avg"}, {"optim": "adamw_bf16"}),
    "srlm_bf16": ({"method": "original"}, {"optim": "adamw_bf16"}),
    "shuffled": (CREAM | {"shuffle_consistency": 0}, {}),
    "fixed_0.7": ({"method": "original"}, {"fixed_consistency": 0.7}),
    "fixed_0.8": ({"method": "original"}, {"fixed_consistency": 0.8}),
    "fixed_0.9": ({"method": "original"}, {"fixed_consistency": 0.9}),
    "oracle": ({"method": "original", "labels": True}, {}),
    "avg_beta_0.1": ({"method": "consistency_avg"}, {"beta": 0.1}),
    "srlm_beta_0.1": ({"method": "original"}, {"beta": 0.1}),
}
STUDY = "srlm,srlm_1e-4,cream_avg,cream_dyn,shuffled,fixed_0.8,oracle"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="200-209", help="first-last (default: %(default)s)")
    parser.add_argument(
        "--bases", default="assets/tiny_m0,outputs/tiny/m0_seed1", help="folders (default: %(default)s)"
    )
    parser.add_argument("--arms", default=STUDY, help=f"of {', '.join(ARMS)}, tiny_… (default: %(default)s)")
    parser.add_argument("--compare", default="cream_avg,cream_dyn", help="arms whose paired differences are shown")
    parser.add_argument("--workers", type=int, default=2, help="cells at a time, one core each (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs/study", help="(default: %(default)s)")
    args = parser.parse_args()
    first, _, last = args.seeds.partition("-")
    arms = args.arms.split(",")
    bases = [str(Path(base).resolve()) for base in args.bases.split(",")]
    cells = [
        (base, f"base{number}", seed, arms, args.output)
        for seed in range(int(first), int(last or first) + 1)
        for number, base in enumerate(bases)
    ]
    began = time.monotonic()
    args.output.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with context.Pool(args.workers, initializer=_start_worker, initargs=(args.output,)) as pool:
        rows = []
        for done, cell in enumerate(pool.imap_unordered(_cell, cells), 1):
            rows += cell
            print(f"{done}/{len(cells)} cells, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    text = report(rows, arms, args.compare.split(","))
    (args.output / f"rows-{args.seeds}.json").write_text(json.dumps(rows, indent=1))
    print(text)


def _start_worker(output: Path) -> None:
    """One core, and the stages' own lines into a file."""
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.stdout = sys.stderr = open(output / f"worker-{os.getpid()}.log", "w")  # noqa: SIM115  for the process's life
    import torch

    torch.set_num_threads(1)


def _cell(job: tuple) -> list[dict]:
    """All arms of one world on one base; one row per arm and model."""
    base, base_name, seed, arms, output = job
    folder = output / f"{base_name}-seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    return _arms(base, base_name, seed, arms, folder)


def _arms(base: str, base_name: str, seed: int, arms: list[str], folder: Path) -> list[dict]:
    from cream.tiny.problems import write_world
    from iterate import prepare, run

    world = folder / "world"
    if not (world / "test.json").exists():
        write_world(world, seed)
    rows = []
    for arm in arms:
        loop = (_own_loop if arm in ARMS else shipped_loop)(base, arm, seed, world, folder)
        course, problems = prepare(loop, ["cpu"], None, set())
        assert not problems, problems
        try:
            run(course)
        except SystemExit as stop:  # it would end the worker, and its cell would be waited for without end
            raise RuntimeError(
                f"{folder.name} {arm}: a stage ended with {stop.code}; its log is beside its output in {folder}"
            ) from None
        rows += [{"base": base_name, "seed": seed, "arm": arm, **row} for row in course.results()]
    return rows


def shipped_loop(base: str, arm: str, seed: int, world: Path, folder: Path):
    """The loop configs/loops/ARM.yaml on this base, with the world's files in place of those in localdata/tiny."""
    import msgspec

    from config import DATASET_FILES
    from cream.loops.plan import Loop
    from cream.loops.reading import read_loop

    def moved(value):
        if isinstance(value, dict):
            return {key: moved(each) for key, each in value.items()}
        if isinstance(value, list):
            return [moved(each) for each in value]
        path = DATASET_FILES.get(value, value) if isinstance(value, str) else ""
        return str(world / Path(path).name) if path.startswith("localdata/tiny/") else value

    loop = read_loop(ROOT / f"configs/loops/{arm}.yaml", seed, str(folder))
    return msgspec.convert(moved(msgspec.to_builtins(loop)) | {"model": base}, Loop)


def _own_loop(base: str, arm: str, seed: int, world: Path, folder: Path):
    from cream.loops.reading import CREAM, Recipe, as_loop, read_loop

    consistency, dpo = ARMS[arm]
    if "labels" in consistency:
        consistency = consistency | {"labels": str(world / "labels.json")}
    short = {"gen_max_tokens": 64, "show_example": False}
    fixed = {"epoch": 1, "lr": LR, "train_bsz": 32, "beta": 1.0, "weight_decay": 0, "show_example": False}
    recipe = Recipe(
        title=f"{folder.name} {arm}",
        model=base,
        iterations=ROUNDS,
        prompts=[str(world / f"prompt.{t}.json") for t in range(1, ROUNDS + 1)],
        base_dir=str(folder / "shared"),
        output_dir=str(folder / arm),
        seed=seed,
        sft={"name": str(world / "sft.json"), "epoch": 2, "lr": 4e-5, "train_bsz": 32, "show_example": False},
        sampling={"gen_n": 6, "gen_temperature": 1.0, "top_p": 1.0, **short},
        rewarding={"show_example": False},
        consistency=consistency,
        dpo=fixed | dpo,
        evaluation={"name": str(world / "test.json"), **short},
    )
    return as_loop(recipe, read_loop(CREAM))


def report(rows: list[dict], arms: list[str], compared: list[str]) -> str:
    """Accuracy per arm and model, mean ± standard deviation over worlds; paired differences with 95 % t intervals. A
    model that an arm does not have in every world, since its loop has ended before, has no number."""
    from cream.evaluation.statistics import mean_std, paired_difference

    worlds, bases = sorted({row["seed"] for row in rows}), sorted({row["base"] for row in rows})
    accuracy = {(row["base"], row["seed"], row["arm"], row["model"]): 100 * row["accuracy"] for row in rows}
    c = {(row["arm"], row["model"]): [] for row in rows}
    for row in rows:
        if row.get("consistency") is not None:
            c[row["arm"], row["model"]].append(row["consistency"])
    models = sorted({row["model"] for row in rows})

    def column(arm: str, model: str) -> list[float] | None:
        cells = [[accuracy.get((base, world, arm, model)) for base in bases] for world in worlds]
        return None if any(None in each for each in cells) else [sum(each) / len(bases) for each in cells]

    lines = [
        f"{len(worlds)} worlds, each the mean over {len(bases)} bases; accuracy in %, mean ± standard deviation over "
        "worlds; in brackets the mean confidence (C) of the pairs that the model was trained on",
        "",
    ]
    lines += ["| arm | " + " | ".join(models) + " |", "|" + "---|" * (len(models) + 1)]
    for arm in arms:
        shown = []
        for model in models:
            if (values := column(arm, model)) is None:
                shown.append("–")
                continue
            mean, spread = mean_std(values)
            values = c.get((arm, model))
            shown.append(f"{mean:.1f} ± {spread:.1f}" + (f" ({sum(values) / len(values):.2f})" if values else ""))
        lines.append(f"| {arm} | " + " | ".join(shown) + " |")
    lines += ["", "| difference, points | " + " | ".join(models[2:]) + " |", "|" + "---|" * (len(models) - 1)]
    for arm in (a for a in compared if a in arms and len(worlds) > 1):
        for other in (a for a in arms if a != arm):
            shown = []
            for model in models[2:]:
                if None in (both := (column(arm, model), column(other, model))):
                    shown.append("–")
                    continue
                mean, low, high = paired_difference(*both)
                shown.append(f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]")
            lines.append(f"| {arm} - {other} | " + " | ".join(shown) + " |")
    for base in bases:
        lines += ["", f"{base}: " + "; ".join(f"{arm} {_mean_of(rows, base, arm, models)}" for arm in arms)]
    return "\n".join(lines)


def _mean_of(rows: list[dict], base: str, arm: str, models: list[str]) -> str:
    """Mean accuracy over the worlds on one base, per model."""
    mine = [row for row in rows if row["base"] == base and row["arm"] == arm]
    found = {model: [100 * row["accuracy"] for row in mine if row["model"] == model] for model in models}
    return " / ".join(f"{sum(values) / len(values):.1f}" if values else "–" for values in found.values())


if __name__ == "__main__":
    main()
