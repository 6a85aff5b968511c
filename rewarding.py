"""Reward sampled answers with a model's own likelihoods: --reward dpo (policy minus reference) or likelihood.

CREAM ranks the answers twice, by the current model M_t and by the previous one. Round 1: DPO reward of M1 against M0,
then likelihood of M0. Later rounds: DPO reward of M_t against M0, then of M_{t-1} against M0. Departures from the
released code: only answer tokens count (not the assistant's header), answers that do not fit are dropped and not cut,
and every prompt keeps its own number of answers.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path

from msgspec import structs

from config import RewardConfig, settings
from cream.cli import console, names, preflight
from cream.cli.console import log
from cream.cli.flags import parse
from cream.errors import UserError
from cream.files import journal, store
from cream.files.fingerprints import fingerprint_file
from cream.files.folders import check_folder
from cream.files.provenance import Provenance, place_of, read_kind
from cream.records import Samples
from cream.rewards import REWARDS, passes
from cream.scoring import cache as scores
from cream.scoring.logprobs import Group, encode, scorer

EXAMPLE = """\
  current model      python rewarding.py --model tiny --input_file S.json --checkpoint tiny_m1 --ref_model_ckpt none
  previous, round 1  python rewarding.py --model tiny --input_file S.json --reward likelihood --checkpoint none
  one GPU            python rewarding.py --device 0 --model llama3 --input_file S.json --checkpoint llama3_sft"""

WHENCE = {"computed": "answers computed", "kept": "kept from earlier passes", "sampler": "taken from the sampler"}


@console.stage
def main(argv=None):
    config = parse(RewardConfig, argv, description=__doc__, example=EXAMPLE)
    r = config.rewarding
    if r.input_file is None:
        raise UserError("--input_file is missing: the samples that infer.py --mode sampling wrote")
    path = Path(r.input_file)
    reward = _reward(config)
    source = import_module(REWARDS[reward])
    normalize = r.normalize or source.NORMALIZE
    checkpoints = {"policy": config.model.checkpoint, "reference": r.ref_model_ckpt}
    flags = {"policy": "--checkpoint", "reference": "--ref_model_ckpt"}
    folders = {role: config.model.folder(checkpoints[role], flags[role]) for role in source.PASSES}
    prompts, answers, size = preflight.rewards(_samples(config))  # all are checked before anything is spent
    if not prompts:
        raise store.nothing_left(path, Samples, "sample is left to reward", _limit(config))
    target = Path(r.output) if r.output else _default_target(config, path, reward, checkpoints)
    output = _begin(config, path, target, reward, normalize, folders)
    log.info("reward %s (%s over answer tokens) of %d prompts in %s", reward, normalize, prompts, path)
    for role, folder in folders.items():
        log.info("  %s: %s", role, folder)
    if config.run.dry_run:
        log.info("dry run: would write %s; nothing was written", target)
        return
    if output.stands:
        log.info("%s stands already, made by the same settings from the same inputs", target)
    else:
        preflight.room(target, size, "rewarding")
        with output:
            done = output.resume()
            of = {role: _score(config, output, done, role, folder, prompts) for role, folder in folders.items()}
            facts = {"reward": reward, "policy": _about(config, output), "scored": of["policy"]}
            if config.run.skip:
                output.reject(store.rejected(path, Samples, _limit(config)))
            passes.finish(output, source, normalize, partial(_samples, config), **facts)
        _report(output, answers)
    log.info("rewards: %s", target)
    _next(config, path, target, reward, folders)


def _samples(config: RewardConfig) -> Iterator[Samples]:
    """The samples, read anew: no more than a chunk of a .jsonl file is held at a time."""
    return _read(config)()


def _read(config: RewardConfig) -> Callable[[], Iterator[Samples]]:
    """What reads the samples; it may be called by a process that stands in another folder."""
    path = Path(config.rewarding.input_file).absolute()
    return partial(store.read, path, Samples, _limit(config), skip=config.run.skip)


def _limit(config: RewardConfig) -> int | None:
    return config.rewarding.limit_size or (17 if config.run.debug else None)


def _reward(config: RewardConfig) -> str:
    """The reward's name; --enable_ref_model is the method's way to say it."""
    r = config.rewarding
    implied = None if r.enable_ref_model is None else ("dpo" if r.enable_ref_model else "likelihood")
    if r.reward and implied and r.reward != implied:
        raise UserError(f"--reward {r.reward} contradicts --enable_ref_model {'yes' if r.enable_ref_model else 'no'}")
    return r.reward or implied or "dpo"


def _default_target(config: RewardConfig, source: Path, reward: str, checkpoints: dict) -> Path:
    stem, _, _ = source.name.partition(".json")
    policy, reference = map(names.label, checkpoints.values())
    model = Path(config.model.name()).name
    reference = reference if reward == "dpo" else "none"
    return source.with_name(f"{stem}.rewarding.{model}-{reward}-policy_{policy}-ref_{reference}.json")


def _begin(config: RewardConfig, source: Path, target: Path, reward: str, normalize: str, folders) -> journal.Output:
    for folder in folders.values():
        check_folder(folder)
        if config.cluster.tensor_parallel_size > 1:
            from cream.model.load import check_slices

            check_slices(folder, config.cluster.tensor_parallel_size)
    provenance = config.run.provenance()
    made = provenance.output("input_file", source)
    config.model.add_template(provenance)
    for role, folder in folders.items():
        provenance.model(role, folder)
    _check_prompts(provenance, source, made)
    if config.rewarding.score_from == "sampling":
        _check_sampler(source, made, provenance.inputs)
    if provenance.inputs["policy"] == provenance.inputs.get("reference"):
        raise UserError(
            "--reward dpo: policy and reference are the same model, so that every reward is 0; give --checkpoint and "
            "--ref_model_ckpt two different ones, or --reward likelihood"
        )
    if target.resolve() == scores.beside(source).resolve():
        raise UserError(f"{target}: log-probabilities are kept there, beside {source}; give another --output")
    return journal.Output(
        target,
        settings(config) | {"reward": reward, "normalize": normalize},
        provenance,
        overwrite=config.run.overwrite,
    )


def _check_prompts(provenance: Provenance, path: Path, made: dict) -> None:
    """The prompts that the samples answer are still those of their file."""
    data = made.get("sources", {}).get("data")
    prompts = data and place_of(path.parent, data)
    if prompts and prompts.is_file() and fingerprint_file(prompts) != made["inputs"].get("data"):
        provenance.object(f"{path} answers other prompts than {prompts.resolve()} holds now: that was changed since")


def _check_sampler(path: Path, made: dict, inputs: dict) -> None:
    """--score_from sampling: the sampler's log-probabilities are the policy's only if it was the sampler."""
    if made.get("output") not in (None, inputs["input_file"]):
        raise UserError(f"--score_from sampling: {path} was changed since it was sampled; leave --score_from out")
    if any(made.get("inputs", {}).get(name) != inputs.get(name) for name in ("policy", "chat_template")):
        raise UserError(
            f"--score_from sampling: by its sidecar {path} was not sampled by this policy with this chat template; "
            "leave it out, and the model computes the log-probabilities"
        )


def _about(config: RewardConfig, output: journal.Output) -> dict:
    """Which policy these rewards are of: the pairs drawn from them are for training that one."""
    m = config.model
    return {"model": m.name(), "checkpoint": m.checkpoint, "fingerprint": output.header["inputs"]["policy"]}


def _score(
    config: RewardConfig, output: journal.Output, done: journal.Keys, role: str, folder: Path, count: int
) -> dict:
    """One pass: every answer under the model in `folder`, as far as its score is not kept; returns what it was scored
    by. What the journal holds already (`done`) is passed over."""
    import torch

    from cream.files.fingerprints import verified
    from cream.model.checkpoint import length_limit
    from cream.model.load import load_chat
    from cream.model.precision import choose_precision

    r = config.rewarding
    pool = config.cluster.pool(config.device)
    precision = choose_precision(config.device.bf16, torch.device(pool.kind), training=False)
    limit = length_limit(r.max_length, folder)
    log.info("%s: %s; at most %d tokens", role, precision.reason, limit)
    chat = load_chat(folder, config.model.template())
    sampled = role == "policy" and r.score_from == "sampling"
    if r.show_example and role == "policy":
        _show(chat, passes.groups(_samples(config)), limit)
    path = Path(r.input_file).absolute()
    source = scores.Source(output.header["inputs"][role], precision.name, pool.kind)
    kept = scores.beside(path), source
    budget = r.batch_size * limit if r.batch_size else r.max_tokens_per_batch
    chunk = pool.batch(count)
    todo = partial(passes.todo, _read(config), role, done, kept, chunk, sampled)
    folder = folder.absolute()  # as the input: a replica works in a folder of its own
    make = partial(scorer, folder, chat, precision.dtype, limit, budget, chunk, pool.group)
    make = partial(verified, folder, source.policy, make)
    with console.bar(count, f"scoring, {role}", "prompts") as bar:
        found = passes.run(output, role, done, pool.run(todo, make, count), scores.Scores(*kept), bar.update)
    said = ", ".join(f"{found[what]} {words}" for what, words in WHENCE.items() if found[what])
    log.info("%s: log-probabilities of %s", role, said or "no answer: the journal holds them all")
    template = {name: digest for name, digest in output.header["inputs"].items() if name == "chat_template"}
    return {**structs.asdict(source), "from": r.score_from, **template}


def _show(chat, groups: Iterator[Group], limit: int) -> None:
    tokens = next((tokens for group in groups for tokens in encode(group, chat, limit)[0] if tokens), None)
    if tokens:
        log.info("first answer, what is scored marked:\n%s", chat.show(tokens))


def _report(output: journal.Output, answers: int) -> None:
    dropped = {reason: count for reason, count in output.dropped.items() if reason != store.MALFORMED}  # of answers
    log.info("%d of %d answers rewarded", answers - sum(dropped.values()), answers)
    for reason, count in dropped.items():
        log.info("  %d have no reward: %s", count, reason)


def _next(config: RewardConfig, source: Path, target: Path, reward: str, folders: dict[str, Path]) -> None:
    """The literal commands of the previous model's ranking and of the consistency step."""
    flags = config.cluster.flags(config.device) | {"model": config.model.name(), "input_file": source}
    flags["chat_template"] = config.model.chat_template
    if reward == "likelihood" or config.model.checkpoint is None:
        log.info("next, with the current model's rewards as CURRENT:")
        log.info("  %s", console.command("cal_consistency.py", file1="CURRENT", file2=target, method="consistency_avg"))
        return
    about = read_kind(folders["policy"])
    if about.get("stage") == "dpo":
        reference = config.rewarding.ref_model_ckpt or "none"
        previous = {"reward": "dpo", "checkpoint": _started_from(about), "ref_model_ckpt": reference}
    else:
        previous = {"reward": "likelihood", "checkpoint": "none"}
    checkpoints = {"policy": previous["checkpoint"], "reference": previous.get("ref_model_ckpt")}
    other = _default_target(config, source, previous["reward"], checkpoints)
    log.info("next, the previous model's ranking:")
    log.info("  %s", console.command("rewarding.py", **flags, **previous))
    log.info("then, how far the two agree, and the pairs:")
    log.info("  %s", console.command("cal_consistency.py", file1=target, file2=other, method="consistency_avg"))


def _started_from(about: dict) -> str:
    """The checkpoint before a policy, as its folder names it; CHECKPOINT where there is no model of that name."""
    place = about.get("started_from", "")
    with suppress(OSError, ValueError):
        if place and (Path(place) / "config.json").is_file():
            return place
    return "CHECKPOINT"


if __name__ == "__main__":
    main()
