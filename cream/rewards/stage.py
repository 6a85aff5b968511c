"""What rewarding.py needs beside the rewards: the source, the output's name and inputs, the commands that follow."""

import logging
import shlex
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from msgspec import structs

from cream.cli import advice, console, names
from cream.cli.flags import chosen, deciding
from cream.errors import UserError
from cream.files.fingerprints import fingerprint_folder, fingerprint_text
from cream.files.folders import check_folder
from cream.files.journal import Output
from cream.files.provenance import POLICY, RUNNING, Provenance, fingerprint_file, place_of, read_kind, read_meta
from cream.files.store import MALFORMED
from cream.rewards import REWARDS
from cream.rewards.passes import Run
from cream.scoring.cache import Source, beside
from cream.text.options import check_kwargs, describe_text

log = logging.getLogger("cream")
SAMPLER = ("gen_temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # flags, in the sidecar of rewards, too
SHORT = {"reference": "ref"}  # of roles in a file's name


def choose(options, reward: str | None, enable_ref_model: bool | None, *shared) -> tuple[str, object]:
    """(The reward's name, its flags), of all rewards' `options`; `shared` are groups whose flags apply to all.
    --enable_ref_model is the released scripts' way to say dpo or likelihood. Raises UserError where the two differ, a
    flag of another reward is given, or the source refuses its own."""
    implied = None if enable_ref_model is None else ("dpo" if enable_ref_model else "likelihood")
    if reward and implied and reward != implied:
        raise UserError(f"--reward {reward} contradicts --enable_ref_model {'yes' if enable_ref_model else 'no'}")
    given = reward or implied
    reward = given or "dpo"
    try:
        own = chosen(options, reward, "--reward", *shared)
    except UserError as error:
        if given:
            raise
        raise UserError(f"without --reward it is dpo, and {str(error).removeprefix('--reward dpo: ')}") from None
    for name, value in getattr(REWARDS[reward], "DEFAULTS", {}).items():
        if getattr(own, name) is None:
            setattr(own, name, value)
    if hasattr(REWARDS[reward], "check"):
        REWARDS[reward].check(own)
    return reward, own


def default_output(path: Path, reward: str, model: str, checkpoints: dict[str, str | None]) -> Path:
    """The output beside the samples in `path`, named by --model and the checkpoint of each role, if there are any."""
    stem = f"{path.name.partition('.json')[0]}.rewarding"
    if not checkpoints:
        return path.with_name(f"{stem}.{reward}.json")
    if [*checkpoints] == ["policy"]:  # the released scripts name the absent reference, too
        checkpoints = checkpoints | {"reference": None}
    of = "".join(f"-{SHORT.get(role, role)}_{names.label(name)}" for role, name in checkpoints.items())
    return path.with_name(f"{stem}.{Path(model).name}-{reward}{of}.json")


def deciding_flags(config, own, passes: list) -> dict[str, object]:
    """The flags that decide the output: of the rewards' flags (config.options) only the chosen one's, `own`; a model's
    only where one looks at the samples."""
    idle = deciding(config.options).keys() - deciding(own).keys() | deciding(config.thoughts).keys()
    if not passes:
        idle |= deciding(config.device).keys() | deciding(config.model).keys()
        if config.model.model or config.model.checkpoint:
            log.info("no model is loaded: --model and --checkpoint do not apply")
    scored = any(not p.quotes for p in passes)  # responses are, by a model; else it does not matter how they are read
    if not scored and config.thoughts.thoughts != type(config.thoughts).thoughts:
        log.info("no response is scored by a model: --thoughts does not apply; its final text is graded or judged")
    flags = {name: value for name, value in deciding(config).items() if name not in idle} | deciding(own)
    return flags | (config.thoughts.settings() if scored else {})


def add_inputs(provenance: Provenance, run: Run, folders: dict[str, Path], model, group: int) -> None:
    """Add the samples, the model of each role, and the source's own files. `model`: --chat_template and its variables;
    `group` devices hold a model together.

    Raises UserError where one of them is damaged or of the wrong kind, or does not fit the others.
    """
    for p in run.passes:
        check_folder(folders[p.role], p.kind)
        if group > 1:
            from cream.model.load import check_tp_size

            check_tp_size(folders[p.role], group)
    about = provenance.output("input_file", run.path)
    if folders:
        model.add_template(provenance)
        if any(p.kind == POLICY and not p.quotes for p in run.passes):  # others see other prompts anyway
            check_kwargs(about.get("settings", {}), model.chat_template_kwargs, run.path, provenance)
    add_source(provenance, run, folders)
    _check_prompts(provenance, run.path, about)
    if getattr(run.options, "score_from", None) == "sampling":
        _check_sampler(run.path, about, provenance.inputs)


def add_source(
    provenance: Provenance, run: Run, folders: dict[str, Path], prefix: str = "", policy="checkpoint"
) -> None:
    """Add what a source rewards by: the model of each role, as an input of that name after `prefix`, its files and
    texts. `policy`: the flag that names the policy. Raises UserError where one of them does not suit."""
    for role, folder in folders.items():
        sidecar = provenance.model(prefix + role, folder)
        if hasattr(run.source, "objection") and (why := run.source.objection(run.options, folder, sidecar)):
            provenance.object(why)
    for name, (path, _) in run.files.items():
        provenance.file(name, path)
    for name, text in run.contents.items():
        provenance.content(name, fingerprint_text(text))
    inputs = provenance.inputs
    if "policy" in folders and inputs[f"{prefix}policy"] == inputs.get(f"{prefix}reference"):
        raise UserError(
            f"--reward dpo: policy and reference are the same model, so that every reward is 0; give --{policy} and "
            "--ref_model_ckpt two different ones, or --reward likelihood"
        )


def _check_prompts(provenance: Provenance, path: Path, about: dict) -> None:
    """The prompts that the samples respond to are still those of their file."""
    data = about.get("sources", {}).get("data")
    prompts = data and place_of(path.parent, data)
    if prompts and prompts.is_file() and fingerprint_file(prompts) != about["inputs"].get("data"):
        provenance.object(f"{path} is of other prompts than {prompts.resolve()} holds now: that was changed since")


def _check_sampler(path: Path, about: dict, inputs: dict) -> None:
    """--score_from sampling: the sampler's log-probabilities are the policy's only if it was the sampler."""
    if about.get("output") not in (None, inputs["input_file"]):
        raise UserError(f"--score_from sampling: {path} was changed since it was sampled; omit --score_from")
    if any(about.get("inputs", {}).get(name) != inputs.get(name) for name in ("policy", "chat_template")):
        raise UserError(
            f"--score_from sampling: by its sidecar {path} was not sampled by this policy with this chat template; "
            "omit it, and the model computes the log-probabilities"
        )


def check_text(target: Path, folders: dict[str, Path], text: dict) -> None:
    """Raises UserError where an output of an earlier version, which is up to date otherwise, holds scores of responses
    as the chat template rewrites them. `text`: as `load_chat` takes it."""
    scored = (read_meta(target) or {}).get("scored")
    if not scored or "text" in scored:
        return
    from cream.model.load import load_chat

    if load_chat(folders["policy"], **text).rewrites:
        raise UserError(
            f"{target}: an earlier version scored responses as the chat template rewrites them, and not as they were "
            "sampled; --overwrite scores them again"
        )


def check_output(target: Path, path: Path) -> None:
    """Raises UserError where an output would replace the score cache."""
    if target.resolve() == beside(path).resolve():
        raise UserError(f"{target}: log-probabilities are cached there, beside {path}; give another --output")


def facts(run: Run, output: Output, reward: str, model, sources: dict[str, Source | None]) -> dict:
    """What the sidecar says besides: which policy these rewards are of, as the pairs drawn from them are for training
    that one, and what its log-probabilities were scored by, if `score` has them: it may then serve as DPO's reference.

    model: --model and --checkpoint; sources: by role.
    """
    facts: dict[str, object] = {"reward": reward}
    inputs = output.header["inputs"]
    if "policy" in sources:
        facts["policy"] = {"model": model.name(), "checkpoint": model.checkpoint, "fingerprint": inputs["policy"]}
    elif sampler := (read_meta(run.path) or {}).get("policy"):  # the rewards are of its responses
        facts["policy"] = sampler
    if sampled := (read_meta(run.path) or {}).get("settings"):
        facts["sampler"] = {name: sampled[name] for name in SAMPLER if name in sampled}
    if sources.get("policy") and not hasattr(run.source, "requests"):
        template = {name: digest for name, digest in inputs.items() if name == "chat_template"}
        template |= describe_text(output.header["settings"])
        score_from = getattr(run.options, "score_from", "model")
        facts["scored"] = structs.asdict(sources["policy"]) | {"from": score_from} | template
    return facts


def report(output: Output, responses: int) -> bool:
    """Log how many responses have a reward, and why the others have none; returns whether any has."""
    dropped = {reason: count for reason, count in output.dropped.items() if reason != MALFORMED}  # of responses
    console.say_result("%d of %d responses rewarded", responses - sum(dropped.values()), responses)
    for reason, count in dropped.items():
        log.info("  %d have no reward: %s", count, reason)
    return responses > sum(dropped.values())


def next_commands(
    run: Run, target: Path, reward: str, model, folders: dict[str, Path], registry: Path, flags: Callable
) -> None:
    """Print the commands of the previous model's ranking and of the consistency step. model: the script's flags of that
    name; `registry`: of checkpoints; flags() gives those of devices and model as the next stage needs them."""
    about = read_meta(run.path) or {}
    sampler = about.get("inputs", {}).get("policy")
    if reward not in ("dpo", "likelihood"):  # gold labels, say: no model ranks
        advice.say("next, the pairs:\n  %s", console.command("cal_consistency.py", file1=target))
        if reward == "judge":
            advice.say("or see how good the judge is:\n  %s", f"python report.py judge {shlex.quote(str(target))}")
        return
    own = fingerprint_folder(folders["policy"])
    if sampler not in (None, own) or (sampler is None and (reward == "likelihood" or model.checkpoint is None)):
        policy = None if sampler is None else place_of(run.path.parent, about["sources"].get("policy", ""))
        current = _find_current(run.path, target, about.get("output"), sampler)
        if current is None:
            advice.say("next, compute the consistency (CURRENT stands for the current model's rewards):")
        else:
            advice.say("next, compute the consistency and make pairs:")
        advice.say("  %s", _pairs_command(policy, model.name(), current or "CURRENT", target))
    elif model.checkpoint is None:
        advice.say("no model came before M0; next, make pairs by its own ranking:")
        advice.say("  %s", console.command("cal_consistency.py", file1=target, method="original"))
    else:
        previous = _previous(reward, folders, run.options)
        previous["checkpoint"] = names.registered(previous["checkpoint"], registry)
        checkpoints = {"policy": previous["checkpoint"], "reference": previous["ref_model_ckpt"]}
        other = default_output(run.path, previous["reward"], model.name(), checkpoints)
        same = advice.as_given(RUNNING[-1][1:]) if RUNNING else {}
        other_reward = {} if previous["reward"] == reward else dict.fromkeys(("normalize", "score_from"))
        now = flags() | {"input_file": run.path} | previous | other_reward
        advice.say("next, rank by the previous model:")
        advice.say("  %s", advice.again({}, "rewards", "rewarding.py", same, **now))
        advice.say("then compute the consistency and make pairs:")
        advice.say("  %s", _pairs_command(folders["policy"], model.name(), target, other))


def _previous(reward: str, folders: dict[str, Path], options) -> dict[str, str | None]:
    """The flags that rank by the model before the policy: the one that DPO started from, else M0. Against itself a DPO
    reward would be 0 for every response: where that model is the reference, its likelihood ranks."""
    about, reference = read_kind(folders["policy"]), getattr(options, "ref_model_ckpt", None) or "none"
    before = _started_from(about) if about.get("stage") == "dpo" else "none"
    if reward == "dpo" and before not in ("none", "CHECKPOINT"):
        before = reference if fingerprint_folder(Path(before)) == fingerprint_folder(folders["reference"]) else before
    if reward == "dpo" and before != reference:
        return {"reward": "dpo", "checkpoint": before, "ref_model_ckpt": reference}
    return {"reward": "likelihood", "checkpoint": before, "ref_model_ckpt": None}


def _pairs_command(policy: Path | None, model: str, current: Path | str, previous: Path | str) -> str:
    """The command that makes pairs to train this policy on, as its own were made; with the beta of its training."""
    before, shipped = advice.round_before(policy) if policy else {}, advice.recipe(model)
    script, flags = before.get("pairs", ("cal_consistency.py", {"method": "consistency_avg"}))
    if "pairs" not in before:
        flags = flags | shipped.get("consistency", {})
    trained = before["train"][1] if before else shipped.get("dpo", {})
    now = dict(zip(advice.PAIRS[script], (current, previous), strict=True)) | {"beta": trained.get("beta")}
    return advice.again({}, "pairs", script, flags, **now)


def _find_current(samples: Path, target: Path, output: str | None, sampler: str | None) -> Path | None:
    """The rewards of these samples by the policy that sampled them, beside the samples or `target`; None unless there
    is exactly one file of them. `output` and `sampler`: the hashes of both."""
    found = set()
    for folder in {samples.parent.resolve(): samples.parent, target.parent.resolve(): target.parent}.values():
        for path in folder.glob("*.meta.json"):
            rewards = path.with_name(path.name.removesuffix(".meta.json"))
            with suppress(UserError, OSError):
                about = read_meta(rewards) or {}
                inputs = about.get("inputs", {})
                by_sampler = sampler and inputs.get("policy") == sampler and "reward" in about
                if by_sampler and inputs.get("input_file") == output and rewards.is_file():
                    found.add(rewards)
    return found.pop() if len(found) == 1 else None


def _started_from(about: dict) -> str:
    """The checkpoint before a policy, as its folder names it; CHECKPOINT where there is no model of that name."""
    place = about.get("started_from", "")
    with suppress(OSError, ValueError):
        if place and (Path(place) / "config.json").is_file():
            return place
    return "CHECKPOINT"
