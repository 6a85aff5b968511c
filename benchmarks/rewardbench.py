"""Agreement with the package rewardbench: scores of random rewards, by its own functions and by evaluate_reward.py's.

pip download --no-deps rewardbench==0.1.4 && unzip rewardbench-0.1.4-py3-none-any.whl -d FOLDER
python benchmarks/rewardbench.py --package FOLDER

The package pins another transformers, so that it cannot be installed beside this project; the functions that compute
scores need none, and are taken from its source. Files have rows of every subset, with many equal rewards; those of Ties
may lack a row, or have one correct response only.
"""

import argparse
import ast
import math
import random
import runpy
import warnings
from pathlib import Path

import numpy as np
import workload  # noqa: F401 - it puts the repository on the path

from cream.evaluation.rewards import rewardbench, rewardbench2
from cream.evaluation.rewards.accuracy import V1, Results
from cream.evaluation.rewards.rows import Row

FUNCTIONS = ("calculate_scores_per_section", "sample_stats", "process_single_model", "reroll_and_score_dataset")
REWARDS = (0.0, 0.5, 1.0, 2.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, required=True, help="folder of the unpacked wheel")
    parser.add_argument("--files", type=int, default=300, help="random files of each kind (default 300)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the rewards (default 0)")
    args = parser.parse_args()
    theirs, rng = functions(args.package), random.Random(args.seed)
    warnings.simplefilter("ignore")  # the package's means of nothing
    for name, difference in (("sections", sections), ("rows of RewardBench 2", rows), ("Ties", ties)):
        found = [difference(theirs, rng) for _ in range(args.files)]
        known = [each for each in found if each is not None]
        print(f"{name}: {len(known)} files, largest difference {max(known):.2g}; undefined: {len(found) - len(known)}")


def functions(package: Path) -> dict:
    """The package's functions and constants, by name."""
    import datasets
    import pandas

    names = {"np": np, "math": math, "pd": pandas, "Dataset": datasets.Dataset}
    names |= runpy.run_path(str(package / "rewardbench/constants.py"))
    for node in ast.parse((package / "rewardbench/utils.py").read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name in FUNCTIONS:
            exec(compile(ast.Module([node], []), "rewardbench", "exec"), names)
    assert names["EXAMPLE_COUNTS"] == rewardbench.WEIGHTS
    return names


def sections(theirs: dict, rng: random.Random) -> float:
    found = [
        Row(f"{name}{i}", name, "", [rng.choice(REWARDS), rng.choice(REWARDS)], [1.0, 0.0], [1, 1])
        for name in rewardbench.WEIGHTS
        for i in range(rng.randint(1, 6))
    ]
    right = {name: [] for name in rewardbench.WEIGHTS}
    for row in found:
        right[row.subset].append(row.rewards[0] > row.rewards[1])
    accuracies = {name: np.mean(each) for name, each in right.items()}
    wanted = theirs["calculate_scores_per_section"](theirs["EXAMPLE_COUNTS"], theirs["SUBSET_MAPPING"], accuracies)
    results = Results.of(found, V1)
    own = {name: results.value(measure) for name, measure in results.measures()["sections"].items()}
    return max(abs(wanted[name] - own[name]) for name in wanted)


def rows(theirs: dict, rng: random.Random) -> float:
    groups = [[rng.choice(REWARDS) for _ in range(4)] for _ in range(8)]
    flat = {"text": [""] * 32, "scores": [each for group in groups for each in group]}
    wanted = theirs["reroll_and_score_dataset"](theirs["Dataset"].from_dict(flat), [4] * 8)["results"]
    return max(abs(a - rewardbench2.share_of_best(group)) for a, group in zip(wanted, groups, strict=True))


def ties(theirs: dict, rng: random.Random) -> float | None:
    """None where the score is not defined here: there the package gives nan, or 0 for what is missing."""
    found = {"ref:0": ([rng.choice(REWARDS), 1.0], 1)}
    for n in range(rng.randint(1, 6)):
        for kind, most in (("ref", 1), ("tied", 3)):
            if rng.random() < 0.9:
                count = rng.randint(1, most)
                values = [rng.choice((*REWARDS, rng.random())) for _ in range(count + rng.randint(1, 3))]
                found[f"{kind}:{n}"] = (values, count)
    given = [{"id": name, "scores": values, "num_correct": count} for name, (values, count) in found.items()]
    parts = rewardbench2.tie_parts(found)
    own = rewardbench2.ties_score(parts, np.ones((1, len(parts))))[0]
    return None if np.isnan(own) else abs(theirs["process_single_model"](given)[1] - own)


if __name__ == "__main__":
    main()
