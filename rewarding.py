"""Reward sampled responses: by a model's own likelihoods (--reward dpo, likelihood), by the verdicts of a judge, the
policy itself or another model (judge), by a reward model (bradley_terry, odin, pairwise, armo, prm, orm), or by gold
labels (labels).

CREAM ranks the responses twice, by the current model M_t and by the previous one. Round 1: DPO reward of M1 against M0,
then likelihood of M0. Later rounds: DPO reward of M_t against M0, then of M_{t-1} against M0. Departures from the
released code: only the response's tokens are scored (not the assistant's header), responses that are too long are
skipped and not truncated, and prompts may differ in their number of responses. Each reward is one file in
cream/rewards/.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from config import CHECKPOINTS, Cluster, Device, Model, TrialRun, for_next_stage, group
from cream.alarms import AlarmFlags
from cream.cli import console, preflight
from cream.cli.console import log
from cream.cli.flags import flag, one_of, parse
from cream.errors import UserError
from cream.files import journal, store
from cream.records import Samples
from cream.rewards import REWARDS, passes, stage
from cream.text.options import ThoughtUse

EXAMPLE = """\
  current model      python rewarding.py --model tiny --input_file S.json --checkpoint tiny_m1 --ref_model_ckpt none
  previous, round 1  python rewarding.py --model tiny --input_file S.json --reward likelihood --checkpoint none
  own judge          python rewarding.py --model tiny --input_file S.json --reward judge --checkpoint tiny_m1
  reward model       python rewarding.py --input_file S.json --reward bradley_terry --reward_model tiny_rm
  gold labels        python rewarding.py --input_file S.json --reward labels --labels localdata/tiny/labels.json
  one GPU            python rewarding.py --device 0 --model llama3 --input_file S.json --checkpoint llama3_sft"""

Options = one_of({name: source.Options for name, source in REWARDS.items()})


@dataclass
class Rewarding:
    """Rewarding"""

    input_file: str | None = flag(None, "samples, the output of infer.py --mode sampling", decides=False)
    reward: str | None = flag(
        None,
        "dpo: the policy's log-probability minus the reference's; likelihood: the policy's alone; judge: the "
        "verdict of the policy or of --judge_model on each response; labels: 1 if the extracted answer is the gold "
        "label, else 0 (no model); by --reward_model: bradley_terry, its output; odin, its quality output; pairwise, "
        "how often it prefers the response to others; armo, its attributes' mixture; prm, orm, the probability that "
        "the response's steps, or the whole, are right; none: dpo, or as --enable_ref_model says",
        choices=tuple(REWARDS),
    )
    enable_ref_model: bool | None = flag(
        None,
        "--reward in the released scripts' spelling: yes is dpo, no is likelihood",
        aliases=("enable_ref",),
        decides=False,
    )
    limit_size: int | None = flag(None, "read at most this many records; none: all", low=1)
    output: str | None = flag(
        None,
        "output file; none: <input>.rewarding.<model>-<reward>-policy_<ckpt>-ref_<ckpt>.json, or "
        "<input>.rewarding.<reward>.json without a model",
        aliases=("output_dir",),
        decides=False,
    )
    show_example: bool = flag(True, "print the first response with its scored tokens marked", decides=False)


@dataclass
class RewardConfig:
    """rewarding.py"""

    device: Device = group(Device)
    cluster: Cluster = group(Cluster)
    model: Model = group(Model)
    rewarding: Rewarding = group(Rewarding)
    options: Options = group(Options)
    thoughts: ThoughtUse = group(ThoughtUse)
    alarms: AlarmFlags = group(AlarmFlags)
    run: TrialRun = group(TrialRun)


@console.stage
def main(argv=None):
    config = parse(RewardConfig, argv, description=__doc__, example=EXAMPLE)
    run, target, reward, folders, ranks = make_rewards(config)
    if ranks and not config.run.dry_run:
        stage.next_commands(run, target, reward, config.model, folders, CHECKPOINTS, partial(for_next_stage, config))


def make_rewards(config: RewardConfig) -> tuple[passes.Run, Path, str, dict[str, Path], bool]:
    """Write the rewards, unless they are up to date or this is a dry run; returns the run, the output, the reward's
    name, the folder of the model of each role, and False where the new rewards rank no responses."""
    r, model, skip, (reward, options) = config.rewarding, config.model, config.run.skip, check(config)
    path, limit = Path(r.input_file), r.limit_size or (17 if config.run.debug else None)
    store.refuse_other_kind("--input_file", path, Samples, "which infer.py --mode sampling writes")
    run = passes.Run(REWARDS[reward], options, path, partial(store.read, path.absolute(), Samples, limit, skip=skip))
    checkpoints, folders = find_models(config)
    prompts, responses, size = preflight.size_of_rewards(run.read())  # all are checked before anything is spent
    if not prompts:
        raise store.nothing_left(path, Samples, "sample is left to reward", limit)
    run.prepare(skip)
    target = Path(r.output) if r.output else stage.default_output(path, reward, model.name(), checkpoints)
    stage.check_output(target, path)
    provenance = config.run.provenance()
    stage.add_inputs(provenance, run, folders, model, config.cluster.tensor_parallel_size)
    decide = stage.deciding_flags(config, options, run.passes) | {"reward": reward}
    output = journal.Output(target, decide, provenance, overwrite=config.run.overwrite)
    log.info("reward %s of %d prompts in %s", reward, prompts, path)
    if config.run.dry_run:
        if run.passes:
            config.cluster.flags(config.device)  # raises UserError where a device is not there
        log.info("dry run: would write %s; nothing was written", target)
        return run, target, reward, folders, True
    if output.up_to_date:
        stage.check_text(target, folders, model.text() | config.thoughts.text())
        console.say_result("%s is up to date (same settings and inputs); skipping", target)
    else:
        preflight.check_disk(target, size, "rewarding")
        with output:
            scored = passes.score_all(
                run,
                output,
                folders,
                prompts,
                pool=partial(config.cluster.pool, config.device),
                bf16=config.device.bf16,
                text=model.text() | config.thoughts.text(),
                skip=skip,
                show=r.show_example,
            )
            if skip:
                output.reject(run.rejected(limit))
            rewards = passes.rewards(run, output, config.alarms.limits())
            output.finish(rewards, **stage.facts(run, output, reward, model, scored))
        if not stage.report(output, responses):
            console.say_result("rewards: %s, of which no pairs can be made", target)
            return run, target, reward, folders, False
    console.say_result("rewards: %s", target)
    return run, target, reward, folders, True


def find_models(config: RewardConfig) -> tuple[dict[str, str | None], dict[str, Path]]:
    """The checkpoint of each role's model, as it is named, and its folder. Raises UserError as `check` does, and where
    there is no such model."""
    reward, options = check(config)
    checkpoints, folders = {}, {}
    for each in REWARDS[reward].passes(options):
        group = config.model if each.model == "checkpoint" else options
        checkpoints[each.role] = getattr(group, each.model)
        folders[each.role] = config.model.folder(checkpoints[each.role], f"--{each.model}", each.external)
    return checkpoints, folders


def check(config: RewardConfig, about: dict | None = None) -> tuple[str, object]:
    """The reward's name and its flags. Raises UserError where flags are missing or contradict each other."""
    r = config.rewarding
    if r.input_file is None:
        raise UserError("--input_file is missing: the samples that infer.py --mode sampling wrote")
    return stage.choose(config.options, r.reward, r.enable_ref_model, config.thoughts)


if __name__ == "__main__":
    main()
