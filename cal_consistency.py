"""Two rankings of the same responses -> the consistency of each prompt, and preference pairs for DPO.

C = (τ + 1) / 2, with Kendall's τ between the rewards of the current model (--file1) and of the previous one (--file2).
A pair is the best response against the worst by the current model. Departures from the released code: values are
matched by uuid, ties are handled (τ-b), duplicate responses count once, and responses that are truncated or have no
reward are skipped.
"""

from dataclasses import dataclass

from config import DATASET_FILES, DATASETS, MAX_SEED, Run, group, settings
from cream.alarms import AlarmFlags
from cream.cli import console
from cream.cli.console import log
from cream.cli.flags import flag, parse
from cream.errors import UserError
from cream.pairs import extremes, oracle
from cream.pairs.build import Rules
from cream.pairs.files import Inputs
from cream.pairs.inputs import LABELS, PREVIOUS, REWARDS
from cream.pairs.output import PairOutput, write
from cream.records import METHODS, RANKS

EXAMPLE = """\
  CREAM        python cal_consistency.py --file1 CURRENT.json --file2 PREVIOUS.json --method consistency_avg
  self-reward  python cal_consistency.py --file1 CURRENT.json --register dpo_t1
  Oracle       python cal_consistency.py --file1 CURRENT.json --labels localdata/tiny/labels.json"""

FLAGS = {"rewards": "file1", "previous": "file2", "labels": "labels"}
INPUTS = {"rewards": REWARDS, "previous": PREVIOUS, "labels": LABELS}


@dataclass
class Consistency:
    """Consistency"""

    file1: str | None = flag(None, "rewards by the current model, whose ranking selects the pairs", decides=False)
    file2: str | None = flag(
        None, "rewards by the previous model; none: C = 1 for all pairs (plain self-rewarding)", decides=False
    )
    method: str | None = flag(
        None,
        "C that train.py is to use, recorded with the pairs; none: consistency_avg with --file2, else original; "
        "kendall, spearman or toporder here: the same as --rank",
        choices=(*METHODS, *RANKS),
    )
    labels: str | None = flag(
        None,
        "labelled questions, matched by uuid: pair the best correct with the worst wrong response (the Oracle)",
        decides=False,
    )
    shuffle_consistency: int | None = flag(
        None, "shuffle the C's among the prompts with this seed (a control)", low=0, high=MAX_SEED
    )


@dataclass
class ConsistencyConfig:
    """cal_consistency.py"""

    consistency: Consistency = group(Consistency)
    pairs: PairOutput = group(PairOutput)
    alarms: AlarmFlags = group(AlarmFlags)
    run: Run = group(Run)


@console.stage
def main(argv=None):
    config = parse(ConsistencyConfig, argv, description=__doc__, example=EXAMPLE)
    c, (method, rank) = config.consistency, check(config)
    inputs = Inputs(config.run, INPUTS, {role: getattr(c, name) for role, name in FLAGS.items()}, FLAGS)
    if c.file2 and inputs.about.get("reward") == "likelihood":
        log.info("note: --file1 was rewarded by likelihood; CREAM's current ranking is a DPO reward. Swapped?")
    write(
        inputs,
        Rules(oracle if c.labels else extremes, rank=rank, keep_truncated=config.pairs.keep_truncated),
        config.pairs.path(inputs.source, rank),
        settings(config) | {"rank": rank, "method": method},
        config.pairs,
        (DATASETS, DATASET_FILES),
        limits=config.alarms.limits(),
        method=method,
        shuffle=c.shuffle_consistency,
        rank=rank,
    )


def check(config: ConsistencyConfig, about: dict | None = None) -> tuple[str, str]:
    """(method, rank): --method says which C training uses; a rank's name there is the released scripts' spelling of
    --rank. Raises UserError where flags are missing or contradict each other."""
    if config.consistency.file1 is None:
        raise UserError("--file1 is missing: the current model's rewards, as rewarding.py writes them")
    method, rank, file2 = config.consistency.method, config.pairs.rank, config.consistency.file2
    default = "consistency_avg" if file2 else "original"
    if method in RANKS:
        if rank not in (None, method):
            raise UserError(f"--method {method} contradicts --rank {rank}")
        return default, method
    if method not in (None, "original") and not file2:
        raise UserError(f"--method {method} needs --file2, the previous model's rewards; without it C is 1 everywhere")
    return method or default, rank or "kendall"


if __name__ == "__main__":
    main()
