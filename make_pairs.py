"""Preference pairs by any strategy: from rewards (extremes, oracle, all_pairs, threshold, random), or without rewards
from SFT data against own samples (spin), or from samples of two contrary system prompts (contrast).

A pair's `consistency` is the confidence in it: the prompt's C as in cal_consistency.py, from the agreement with
--previous (1 without that); with --strategy threshold the probability that the chosen response is the better one; with
spin and contrast null, trained with C = 1. A prompt's further pairs have the uuids UUID#2, UUID#3 …, ordered by
confidence, then by margin.
"""

from dataclasses import dataclass, make_dataclass

from config import DATASET_FILES, DATASETS, Run, group, settings
from cream.alarms import AlarmFlags
from cream.cli import console
from cream.cli.flags import chosen, deciding, flag, one_of, parse
from cream.errors import UserError
from cream.pairs import PAIRS, all_inputs
from cream.pairs.build import Rules
from cream.pairs.files import Inputs
from cream.pairs.output import PairOutput, write
from cream.records import METHODS

EXAMPLE = """\
  pseudo-labels  python make_pairs.py --strategy threshold --rewards REWARDS.json --threshold 0.8
  SER's          python make_pairs.py --strategy threshold --rewards REWARDS.json --rule ser --status paper
  all of CREAM's python make_pairs.py --strategy all_pairs --rewards CURRENT.json --previous PREVIOUS.json --margin 0.5
  SPIN           python make_pairs.py --strategy spin --conversations SFT.json --samples ROUND1.json,ROUND2.json
  RLCD           python make_pairs.py --strategy contrast --positive GOOD.json --negative BAD.json
  control        python make_pairs.py --strategy random --rewards REWARDS.json --seed 1"""

FILES = all_inputs()
READERS = {role: ", ".join(name for name, strategy in PAIRS.items() if role in strategy.INPUTS) for role in FILES}
Files = make_dataclass(
    "Files",
    [(role, str | None, flag(None, f"{READERS[role]}: {file.help}", decides=False)) for role, file in FILES.items()],
)
Files.__doc__ = "Files, by strategy"
Strategies = one_of({name: strategy.Options for name, strategy in PAIRS.items()})


@dataclass
class Choosing:
    """Choice of pairs"""

    strategy: str | None = flag(
        None,
        "extremes: best against worst; oracle: best correct against worst wrong, by --labels; all_pairs: all "
        "pairs with different rewards; threshold: all pairs with a confidence of at least --threshold; random: "
        "two responses at random (a control); spin: SFT data against samples; contrast: samples of a prompt for good "
        "responses against those of one for bad responses",
        choices=tuple(PAIRS),
    )
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
    files: Files = group(Files)
    options: Strategies = group(Strategies)
    pairs: PairOutput = group(PairOutput)
    alarms: AlarmFlags = group(AlarmFlags)
    run: Run = group(Run)


@console.stage
def main(argv=None):
    config = parse(PairsConfig, argv, description=__doc__, example=EXAMPLE)
    c, p, options, previous = config.choosing, config.pairs, check(config), config.files.previous
    strategy, rank = PAIRS[c.strategy], p.rank or "kendall"
    inputs = Inputs(config.run, strategy.INPUTS, vars(config.files))
    write(
        inputs,
        Rules(strategy, options, rank, p.keep_truncated, c.margin, c.max_pairs_per_prompt),
        p.path(inputs.source, c.strategy),
        settings(config, *deciding(config.options)) | deciding(options) | {"rank": rank if previous else None},
        p,
        (DATASETS, DATASET_FILES),
        limits=config.alarms.limits(),
        method=c.method,
        strategy=c.strategy,
        rank=rank if previous else None,
    )


def check(config: PairsConfig, about: dict | None = None):
    """The strategy's own flags. Raises UserError where flags are missing or decide nothing, or files do not fit it."""
    c, p = config.choosing, config.pairs
    if c.strategy is None:
        raise UserError(f"--strategy is missing: one of {', '.join(PAIRS)}")
    options = chosen(config.options, c.strategy, "--strategy")
    given = {role for role in FILES if getattr(config.files, role) is not None}
    wanted, rewarded = PAIRS[c.strategy].INPUTS, Rules(PAIRS[c.strategy]).rewarded
    problems = [f"it needs --{role}" for role, file in wanted.items() if file.needed and role not in given]
    problems += [f"it does not read --{role}" for role in sorted(given - wanted.keys())]
    if "previous" in given - wanted.keys() and rewarded:
        problems[-1] += ", for it states the confidence of its pairs itself"
    if not rewarded and c.margin is not None:
        problems.append("--margin compares rewards, and it has none")
    if not rewarded and c.method not in (None, "original"):
        problems.append(f"--method {c.method} needs pairs with a confidence, and its pairs have none")
    if "previous" not in given:
        if p.rank is not None:
            problems.append("--rank compares two rankings, and needs --previous")
        if "previous" in wanted and c.method not in (None, "original"):
            problems.append(f"--method {c.method} needs --previous; without it C is 1 everywhere")
    if problems:
        raise UserError(f"--strategy {c.strategy}: {'; '.join(problems)}. It reads --{', --'.join(wanted)}")
    if hasattr(PAIRS[c.strategy], "check"):
        PAIRS[c.strategy].check(options)
    return options


if __name__ == "__main__":
    main()
