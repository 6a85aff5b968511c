"""Measure a reward: how often, how surely and by what it prefers the better response, and what its choice among N is
worth.

The responses of a benchmark, or of any file of preferences, are given their rewards as by rewarding.py, by any --reward
with its flags: a reward model, a judge, or DPO's implicit reward of two checkpoints. --rewards takes finished ones.
RewardBench and RewardBench 2 are scored by their own rules; what is a part of them is called that.
"""

from dataclasses import dataclass
from pathlib import Path

import rewarding
from config import Cluster, Device, Model, TrialRun, group
from cream.cli import console
from cream.cli.console import log
from cream.cli.flags import deciding, flag, parse
from cream.errors import UserError
from cream.rewards import REWARDS
from cream.text.options import ThoughtUse

EXAMPLE = """\
  reward model    python evaluate_reward.py --data rewardbench.jsonl --reward bradley_terry --reward_model FOLDER
  DPO's reward    python evaluate_reward.py --data pairs.jsonl --model tiny --reward dpo --checkpoint tiny_m1 --beta 0.1
  finished ones   python evaluate_reward.py --rewards REWARDS.json --gold localdata/tiny/labels.json
  two of them     python evaluate_reward.py --rewards A.json --against B.json --data pairs.jsonl
  the benchmark   python evaluate_reward.py --data allenai/reward-bench --reward judge --judge_model llama3"""


@dataclass
class Measuring:
    """Measuring"""

    data: str | None = flag(
        None,
        "responses with gold, a file or hub id: RewardBench, RewardBench 2, pairs, ranked responses, or problems with "
        "answers and labels; several are separated by commas; none: --rewards have gold, or --gold",
        decides=False,
    )
    split: str | None = flag(
        None, "split of a data set on the hub, or in a folder like it; none: filtered of RewardBench, else test"
    )
    benchmark: str = flag(
        "auto",
        "rewardbench or rewardbench2, scored by its rules; none: a file with subsets of its own; auto: by the names of "
        "the subsets",
        choices=("auto", "rewardbench", "rewardbench2", "none"),
    )
    reward: str | None = flag(
        None, "the reward, with its flags as in rewarding.py; none: dpo, or with --rewards none", choices=tuple(REWARDS)
    )
    rewards: str | None = flag(None, "finished rewards, the output of rewarding.py: no model is loaded", decides=False)
    against: str | None = flag(
        None, "another file of rewards of the same responses, B: how it differs from this one, A", decides=False
    )
    gold: str | None = flag(
        None,
        "gold by uuid: labelled questions (a response is right or wrong, and its answer has a vote), or records with "
        "gold or ranks",
        decides=False,
    )
    ties: str = flag("strict", "a pair with equal rewards is wrong (strict) or half right", choices=("strict", "half"))
    beta: float = flag(
        1.0,
        "factor of reward differences in the probability that one is better: DPO's for its implicit reward",
        above=0,
    )
    length: str = flag("characters", "unit of lengths; tokens: those of the rewards", choices=("characters", "tokens"))
    votes: str = flag(
        "softmax",
        "weights of the votes of a weighted majority: softmax or sigmoid of the rewards, or the reward itself",
        choices=("softmax", "sigmoid", "reward"),
    )
    limit_size: int | None = flag(None, "read at most this many rows of each file of --data; none: all", low=1)
    measure_seed: int = flag(0, "seed of intervals, of the half that a temperature is fitted on, and of votes", low=0)
    output_dir: str | None = flag(
        None, "folder for outputs; none: outputs/reward_eval/<data>, or that of --rewards", decides=False
    )


@dataclass
class EvaluateConfig:
    """evaluate_reward.py"""

    measuring: Measuring = group(Measuring)
    device: Device = group(Device)
    cluster: Cluster = group(Cluster)
    model: Model = group(Model)
    options: rewarding.Options = group(rewarding.Options)
    thoughts: ThoughtUse = group(ThoughtUse)
    run: TrialRun = group(TrialRun)


@console.stage
def main(argv=None):
    config = parse(EvaluateConfig, argv, description=__doc__, example=EXAMPLE)
    check(config)
    from cream.data.benchmarks import Data
    from cream.evaluation.rewards import stage

    m, run = config.measuring, config.run
    data = Data.read(m.data, m.split, m.limit_size or (17 if run.debug else None), run.skip) if m.data else None
    benchmark = stage.find_benchmark(m.benchmark, data.samples) if data else None  # before anything is spent
    if m.rewards:
        path = Path(m.rewards)
        folder = Path(m.output_dir or path.parent)
    else:
        folder = Path(m.output_dir or run.outputs() / "reward_eval" / data.name)
        what = rewarding.Rewarding(input_file=str(folder / "samples.jsonl"), reward=m.reward)
        parts = (config.device, config.cluster, config.model, what, config.options, config.thoughts)
        rewards = rewarding.RewardConfig(*parts, run=run)
        rewarding.find_models(rewards)  # raises UserError before the samples are written
        data.write(folder / "samples.jsonl", run)
        if run.dry_run:
            log.info("dry run: would reward %d prompts; nothing was written", len(data.samples))
            return
        path = rewarding.make_rewards(rewards)[1]
    stage.measure(path, folder, data, benchmark, m, run, deciding(m))


def check(config: EvaluateConfig, about: dict | None = None) -> None:
    """Raises UserError where flags are missing or contradict each other."""
    m, problems = config.measuring, []
    if m.rewards is None and m.data is None:
        problems.append("--data is missing: the responses to be rewarded; or --rewards, which are finished")
    if m.gold and (m.data or not m.rewards):
        problems.append("--gold is for --rewards without --data, which has gold of its own")
    plain = EvaluateConfig()
    same = (config.options, config.model, config.thoughts) == (plain.options, plain.model, plain.thoughts)
    if m.rewards and (m.reward or not same):
        problems.append("--rewards are finished: --reward and flags of models and rewards would have no effect")
    if problems:
        raise UserError("; ".join(problems))


if __name__ == "__main__":
    main()
