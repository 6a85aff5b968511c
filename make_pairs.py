"""Rewards -> preference pairs, by any strategy: --strategy extremes, oracle, all_pairs, threshold or random.

A pair's `consistency` is the confidence in it: the prompt's C as in cal_consistency.py, from the agreement with
--previous (1 without that); with --strategy threshold the probability that the chosen response is the better one. A
prompt's further pairs have the uuids UUID#2, UUID#3 …, ordered by confidence, then by margin.
"""

from dataclasses import dataclass

from config import DATASET_FILES, DATASETS, Run, group, settings
from cream.cli import console
from cream.cli.flags import chosen, deciding, flag, one_of, parse
from cream.errors import UserError
from cream.pairs import PAIRS
from cream.pairs.build import Rules
from cream.pairs.output import Inputs, PairOutput, write
from cream.records import METHODS

EXAMPLE = """\
  pseudo-labels  python make_pairs.py --strategy threshold --rewards REWARDS.json --threshold 0.8
  all of CREAM's python make_pairs.py --strategy all_pairs --rewards CURRENT.json --previous PREVIOUS.json --margin 0.5
  control        python make_pairs.py --strategy random --rewards REWARDS.json --seed 1"""

FILES = ("rewards", "previous", "labels")
Strategies = one_of({name: strategy.Options for name, strategy in PAIRS.items()})


@dataclass
class Choosing:
    """Choice of pairs"""

    strategy: str | None = flag(
        None,
        "extremes: best against worst; oracle: best correct against worst wrong, by --labels; all_pairs: all "
        "pairs with different rewards; threshold: all pairs with a confidence of at least --threshold; random: "
        "two responses at random (a control)",
        choices=tuple(PAIRS),
    )
    rewards: str | None = flag(None, "rewards, the output of rewarding.py", decides=False)
    previous: str | None = flag(
        None, "the previous model's rewards of the same responses, from which C is computed", decides=False
    )
    labels: str | None = flag(None, "labelled questions, matched by uuid", decides=False)
    method: str | None = flag(
        None,
        "which C train.py is to use (its --method), recorded with the pairs; none: consistency_avg with "
        "--previous, consistency_dyn if the strategy gives confidences, else original",
        choices=METHODS,
    )
    margin: float | None = flag(None, "smallest reward difference, chosen minus rejected; none: any", low=0)
    max_pairs_per_prompt: int | None = flag(
        None, "keep at most this many pairs per prompt, by confidence, then by margin; none: all", low=1
    )


@dataclass
class PairsConfig:
    """make_pairs.py"""

    choosing: Choosing = group(Choosing)
    options: Strategies = group(Strategies)
    pairs: PairOutput = group(PairOutput)
    run: Run = group(Run)


@console.stage
def main(argv=None):
    config = parse(PairsConfig, argv, description=__doc__, example=EXAMPLE)
    c, p, options = config.choosing, config.pairs, check(config)
    files = {role: getattr(c, role) for role in FILES}
    inputs = Inputs(config.run, {role: role for role in files}, files)
    rank = p.rank or "kendall"
    write(
        inputs,
        Rules(PAIRS[c.strategy], options, rank, p.keep_truncated, c.margin, c.max_pairs_per_prompt),
        p.path(inputs.paths["rewards"], c.strategy),
        settings(config, *deciding(config.options)) | deciding(options) | {"rank": rank if c.previous else None},
        p,
        (DATASETS, DATASET_FILES),
        method=c.method,
        strategy=c.strategy,
        rank=rank if c.previous else None,
    )


def check(config: PairsConfig, about: dict | None = None):
    """The strategy's own flags. Raises UserError where flags are missing or decide nothing, or files do not fit it."""
    c, p = config.choosing, config.pairs
    if c.strategy is None:
        raise UserError(f"--strategy is missing: one of {', '.join(PAIRS)}")
    options = chosen(config.options, c.strategy, "--strategy")
    given = {role for role in FILES if getattr(c, role) is not None}
    wanted = PAIRS[c.strategy].INPUTS
    problems = [f"it needs --{role}" for role, needed in wanted.items() if needed and role not in given]
    problems += [f"it does not read --{role}" for role in sorted(given - wanted.keys())]
    if "previous" in given - wanted.keys():
        problems[-1] += ", for it states the confidence of its pairs itself"
    if "previous" not in given:
        if p.rank is not None:
            problems.append("--rank compares two rankings, and needs --previous")
        if "previous" in wanted and c.method not in (None, "original"):
            problems.append(f"--method {c.method} needs --previous; without it C is 1 everywhere")
    if problems:
        raise UserError(f"--strategy {c.strategy}: {'; '.join(problems)}. It reads --{', --'.join(wanted)}")
    return options


if __name__ == "__main__":
    main()
