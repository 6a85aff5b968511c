"""One training run in one process: data, weights, stage, loop, checkpoints. train.py checks the flags and calls it."""

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, patch_environment
from transformers.integrations import unset_hf_deepspeed_config

from cream.alarms import Watch
from cream.cli import console, preflight
from cream.cli.flags import as_dict
from cream.errors import UserError
from cream.files import store
from cream.files.folders import stated_kind
from cream.files.provenance import ARGS, LAST, REWARD_MODEL, RUN, Provenance, origin, read_kind, read_meta
from cream.files.store import MALFORMED
from cream.model.checkpoint import check_saving, length_limit, make_readable, save, stored_dtype
from cream.model.hardware import Budget, free_memory
from cream.model.load import load_chat, load_policy, load_with_head
from cream.model.logprobs import LogProbs
from cream.model.lora import add_lora, check_lora, merged
from cream.model.precision import Precision, choose_precision
from cream.model.reward_head import Heads, choose_pad
from cream.records import Pair
from cream.rewards.pairwise import check_labels
from cream.scoring.cache import Source
from cream.text.options import AS_SAMPLED
from cream.text.refusals import find_refusals
from cream.training import parallel, reference, state
from cream.training.folder import clear, tidy
from cream.training.heldout import HeldOut, split, without_trained
from cream.training.launch import given_world, is_first_process
from cream.training.log import lines_until
from cream.training.loop import common_budget, train
from cream.training.report import Report
from cream.training.samples import Samples, read_sample_prompts
from cream.training.stages import STAGES

log = logging.getLogger("cream")
MODELS = {"logprobs": LogProbs, "heads": Heads}  # a stage's `model` -> the wrapper that its loss is computed with
FORMS = ("judge", "pairwise")  # what a sidecar says of the requests that a model is trained on


@dataclass(frozen=True)
class Job:
    """All that decides a run: train.py's flags (`config`), and what follows from them.

    `name` is the stage's, `start` the folder of the model trained from; `header` the settings and inputs that the run's
    sidecar records, with `provenance`; `clear` removes an earlier run from the folder `run`; `deepspeed`: the settings
    in that flag's file; `held_out`, `prompts`: the files of --eval_name and --sample_prompts; `models`: the folders of
    the stage's other models.
    """

    config: object  # train.py's TrainConfig
    name: str
    stage: object
    start: Path
    data: Path
    run: Path
    header: dict
    limit_size: int | None = None
    clear: bool = False
    deepspeed: dict | None = None
    provenance: Provenance = field(default_factory=Provenance)
    held_out: Path | None = None
    prompts: Path | None = None
    models: dict[str, Path] = field(default_factory=dict)


def work(job: Job) -> None:
    """Train, save checkpoints under `job.run`, and, last, the sidecar meta.json that says the run is finished."""
    began = time.monotonic()
    if hasattr(job.stage, "run"):  # it brings its own trainer
        facts = job.stage.run(job)
        if is_first_process():
            _finish(job, {**facts, "wall_seconds": round(time.monotonic() - began, 3)})
        return
    precision, accelerator = _set_up(job)
    facts = _train(job, precision, accelerator)
    # DDP is gone by now. If it outlived the process group that this ends, its destructor would end the group's threads
    # while it holds Python's lock, and wait for ever for one that needs it.
    accelerator.free_memory()
    accelerator.end_training()
    if accelerator.is_main_process:
        _finish(job, {**facts, "wall_seconds": round(time.monotonic() - began, 3)})


def _train(job: Job, precision: Precision, accelerator: Accelerator) -> dict:
    """Everything between set-up and sidecar; returns the counts and the last metrics for the latter."""
    config, stage, o = job.config, job.stage, job.config.optimisation
    chat = load_chat(job.start, **config.model.text(), **config.thoughts.text())
    dropped: Counter[str] = Counter()
    rows, refused, facts, held_out = _examples(job, chat, dropped)
    examples = [example for _, example in rows]
    if config.output.show_example:
        what = "its trained tokens marked (the loss mask)" if stage.model == "logprobs" else "its response marked"
        log.info("first example, %s:\n%s", what, chat.show(stage.group(examples[0])[0]))
    samples, watch = _samples(job, chat), Watch(config.alarms.limits(), getattr(stage, "cap", None))
    model = MODELS[stage.model](_trained(job, chat, precision.dtype, accelerator.device))
    if o.compile:  # not before its layout is chosen: what the probe runs would be compiled, too
        model.plain.base_model.compile(dynamic=True)
    saved_as = stored_dtype(job.start) if o.save_dtype == "auto" else getattr(torch, o.save_dtype)
    log.info("checkpoints are saved in %s (--save_dtype %s)", str(saved_as).removeprefix("torch."), o.save_dtype)
    kind = parallel.Replicas if job.deepspeed is None else parallel.Shards
    weights = kind(accelerator, model, o.lr, o.weight_decay)
    tokens = common_budget(accelerator, weights, o.max_tokens_per_batch)
    _fill_references(job, accelerator, model, rows, held_out, precision, tokens)
    job.provenance.check_unchanged()
    _begin(accelerator, job, facts)
    if accelerator.is_main_process:
        resume_lines(job.run, watch, samples)
    report = Report()

    def progress(step: int, steps: int, metrics: dict[str, float]) -> None:
        report(step, steps, metrics)
        watch(step, metrics)

    def save(step: int) -> None:
        _save(accelerator, weights, chat, job, step, saved_as, held_out and held_out.last)
        if samples and accelerator.is_main_process:
            samples.write(accelerator, model.plain, step)

    def check_first(metrics: dict[str, float]) -> None:
        exact = precision.exact and precision.dtype == torch.float32
        stage.check_first(metrics, tolerance=1e-3 if exact else 0.5)

    prepared = accelerator, weights, stage, examples, o, config.run.seed, tokens, job.run
    last = train(*prepared, save, progress, check_first, held_out)
    counts = {"trained_on": len(examples), "dropped": dict(dropped), **facts}
    return {"counts": counts, "last": last, "alarms": watch.fired, "refused": refused}


def _fill_references(
    job: Job, accelerator, model, rows: list, held_out: HeldOut | None, precision: Precision, tokens: Budget
) -> None:
    """The log-probabilities that the stage's examples are to hold, under the starting policy and under others."""
    stage, examples, inputs = job.stage, [example for _, example in rows], job.header["inputs"]
    single = job.config.optimisation.epoch == 1 and len(rows) <= job.config.optimisation.global_batch(
        accelerator.num_processes
    )
    if stage.reference and not (single and getattr(stage, "first_step_free", False)):
        source = Source(inputs["start"], precision.name, accelerator.device.type)
        reference.check_recorded(stage, examples, job.data, job.header, source)
        reference.fill(accelerator, model, stage, rows, job.data, source, tokens)
        if held_out:
            data, about = job.held_out or job.data, {"data": inputs.get("held_out", inputs["data"])}
            reference.check_recorded(stage, held_out.examples, data, job.header | {"inputs": inputs | about}, source)
            reference.fill(accelerator, model, stage, held_out.rows, data, source, tokens)
    for name, folder in job.models.items():
        source = Source(inputs[name], precision.name, accelerator.device.type)
        with parallel.whole_models(accelerator):
            other = LogProbs(load_policy(folder, precision.dtype, accelerator.device))
        reference.check_vocabulary(other.plain.config.get_text_config().vocab_size, stage, examples, folder)
        reference.fill(accelerator, other, stage, rows, job.data, source, tokens, name)
    if hasattr(stage, "settle"):
        stage.settle(examples)


def _finish(job: Job, facts: dict) -> None:
    """The sidecar, which says that the run is finished, and before it the malformed records that were skipped."""
    refused = facts.pop("refused")
    if facts["counts"]["dropped"].get(MALFORMED):
        bad = store.rejected(job.data, store.detect(job.data, skip=True), job.limit_size, refused)
        store.write_rows(job.run / "rejected.jsonl", bad)
    facts |= {"output": read_kind(job.run / LAST)["fingerprint"]}
    store.write_json(job.run / RUN, {**_header(job), **origin(), **job.provenance.record(job.run), **facts})
    tidy(job.run)


def _header(job: Job) -> dict:
    return job.header | (AS_SAMPLED if job.stage.made_for_policy else {})


def _set_up(job: Job) -> tuple[Precision, Accelerator]:
    """Logging, the precision, the processes, and the seed."""
    device, precision = set_up_process(job)
    accelerator = _accelerator(job, precision, device)
    if accelerator.num_processes != (given_world() or 1):
        raise RuntimeError(f"accelerate sees {accelerator.num_processes} processes of {given_world() or 1}")
    torch.manual_seed(job.config.run.seed)
    return precision, accelerator


def set_up_process(job: Job) -> tuple[torch.device, Precision]:
    """Logging, the kind of device, and the precision of training there."""
    console.set_up_process()
    device = torch.device("cpu" if job.config.device.devices()[0] == "cpu" else "cuda")
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # accelerate imports DeepSpeed, which would warn
    if not is_first_process():
        log.setLevel(logging.WARNING)
    precision = choose_precision(job.config.device.bf16, device, training=True, shards=job.deepspeed is not None)
    if (lora := job.config.lora).lora:
        check_lora(job.start, lora.lora_r, lora.lora_alpha, lora.lora_dropout)
    if device.type == "cuda":  # products that stay in float32 under autocast, too
        torch.set_float32_matmul_precision("high")
    log.info("precision: %s", precision.reason)
    return device, precision


def _accelerator(job: Job, precision: Precision, device: torch.device) -> Accelerator:
    sharded, saved = job.deepspeed is not None, None if job.clear else state.last(job.run)
    other = saved is not None and saved.processes != int(os.environ.get("WORLD_SIZE", "1"))
    if sharded:
        compiles = parallel.compiles(job.deepspeed)
        log.info("setting up DeepSpeed%s", " (its first use compiles for about half a minute)" if compiles else "")
        if compiles and is_first_process() and (marks := parallel.compiling()):
            log.warning(
                "%s: another process compiles this part of DeepSpeed, and this one may wait for it. If no process "
                "does, one was killed while compiling and the wait has no end: remove this file",
                marks[0],
            )
    norm = job.config.optimisation.max_grad_norm
    return Accelerator(
        cpu=device.type == "cpu" and not sharded,  # with it accelerate would ignore DeepSpeed silently
        mixed_precision="bf16" if precision.autocast or precision.dtype == torch.bfloat16 else "no",
        log_with=job.config.output.trackers() or None,
        project_dir=str(job.run),
        deepspeed_plugin=parallel.plugin(job.deepspeed, norm, other) if sharded else None,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if sharded and device.type == "cpu" else None,
    )


def _begin(accelerator: Accelerator, job: Job, data_facts: dict) -> None:
    """The run's folder and trackers: nothing is written before all that a user could have got wrong is read."""
    if accelerator.is_main_process:
        open_folder(job)
    accelerator.wait_for_everyone()
    output = job.config.output
    if output.report_to:
        facts = {"start": str(job.start), "data": str(job.data), **job.header["settings"]}
        name = {"name": output.run_name or job.run.name}
        with output.starting_trackers(), patch_environment(**output.tracker_variables(job.run)):
            own = {"wandb": name, "trackio": name}
            accelerator.init_trackers(output.wandb_project_name, config=facts, init_kwargs=own)
            if len(accelerator.trackers) < len({*output.trackers()}):
                raise RuntimeError("Accelerate omits it, as a package that is not whole")
        numbers = {name: value for name, value in data_facts.items() if isinstance(value, int | float)}
        accelerator.log({f"data/{name}": float(value) for name, value in numbers.items()}, step=0)


def _samples(job: Job, chat) -> Samples | None:
    """The samples of --sample_prompts."""
    if job.prompts is None:
        return None
    flags, limit = job.config.samples, length_limit(None, job.start)
    return Samples(
        flags, read_sample_prompts(job.prompts, flags.sample_limit), chat, job.run, job.config.run.seed, limit
    )


def resume_lines(run: Path, watch: Watch, samples: Samples | None) -> None:
    """What an interrupted run has logged and sampled, up to the step from which it resumes."""
    step = saved.step if (saved := state.last(run)) else 0
    if samples:
        samples.keep_until(step)
    if (path := run / "log.jsonl").exists():
        for line in lines_until(step, path.read_bytes()).splitlines():
            watch(quiet=True, metrics=(row := json.loads(line)), step=row.pop("step"))


def open_folder(job: Job) -> None:
    """Make the run's folder, or clear it of an earlier run, and say whose it is."""
    if job.clear:
        clear(job.run)
    store.write_json(job.run / ARGS, {**_header(job), "flags": as_dict(job.config)})


def _examples(
    job: Job, chat, dropped: Counter[str]
) -> tuple[list[tuple[str, object]], dict[str, str], dict, HeldOut | None]:
    """The stage's (uuid, example) rows; the records that the chat template refuses, and why; what the sidecar says of
    the rows; and the held-out examples, if there are any."""
    skip = job.config.run.skip
    kind = store.detect(job.data, skip=skip)
    if form := (read_meta(job.data) or {}).get("pairwise"):
        check_labels(chat, form["labels"], str(job.start))  # which could not be asked for them later
    records = list(store.read(job.data, kind, job.limit_size, skip=skip))
    refused = find_refusals(job.data, records, chat, skip)
    records = [record for record in records if record.uuid not in refused]
    records, held = _hold_out(job, records, chat)
    rows = job.stage.prepare(records, chat, length_limit(job.config.data.max_length, job.start), dropped)
    for reason, count in dropped.items():
        log.info("dropped %d of %d records: %s", count, len(records), reason)
    if skip and (bad := sum(1 for _ in store.rejected(job.data, kind, job.limit_size, refused))):
        dropped[MALFORMED] = bad
    if not rows:
        raise UserError(f"{job.data}: no record is left to train on (dropped: {dict(dropped)})")
    examples = [example for _, example in rows]
    facts = {"records": len(records)} | job.stage.facts(examples) | response_facts(job.stage, examples, records)
    held_out, more = _prepare_held_out(job, held, records, chat) if held is not None else (None, {})
    return rows, refused, facts | more, held_out


def response_facts(stage, examples: Sequence, records: Sequence) -> dict[str, float]:
    """What training is like by its data: the mean number of scored tokens per response; of pairs the share of truncated
    responses."""
    tokens = [row.num_response_tokens for example in examples for row in stage.group(example)]
    cut = [end for record in records if isinstance(record, Pair) for end in _ends(record)]
    return {"response_tokens": sum(tokens) / len(tokens)} | ({"truncated": sum(cut) / len(cut)} if cut else {})


def _ends(pair: Pair) -> tuple[bool, bool]:
    return bool(pair.selected_truncated), bool(pair.rejected_truncated)


def _hold_out(job: Job, records: list, chat) -> tuple[list, list | None]:
    """(The records that are trained on, and the held-out ones, None where none are asked for)."""
    options, skip = getattr(job.stage, "held_out", None), job.config.run.skip
    if options is None or not options.any:
        return records, None
    if job.held_out is None:
        return split(records, options.eval_share, job.config.run.seed)
    kind = store.detect(job.held_out, skip=skip)
    if kind not in STAGES[job.name].RECORDS:
        raise UserError(f"--eval_name {job.held_out} holds {kind.__name__} records, on which {job.name} does not train")
    held = list(store.read(job.held_out, kind, skip=skip))
    refused = find_refusals(job.held_out, held, chat, skip)
    return records, [record for record in held if record.uuid not in refused]


def _prepare_held_out(job: Job, held: list, records: list, chat) -> tuple[HeldOut, dict]:
    """The held-out examples, and what the sidecar says of them."""
    options, dropped = job.stage.held_out, Counter()
    where = f"--eval_share {options.eval_share:g} of {job.data}"
    if job.held_out is not None:
        where, held = str(job.held_out), without_trained(held, records, dropped)
    rows = job.stage.prepare(held, chat, length_limit(job.config.data.max_length, job.start), dropped)
    if not rows or not records:
        left = "trained on" if rows else "held out"
        raise UserError(f"{where}: no record is {left} (dropped: {dict(dropped)}); give another file or share")
    log.info("held out: %d records (%s); dropped %s", len(rows), where, dict(dropped) or "none")
    return HeldOut(job.stage, rows, options.eval_every), {"held_out": {"records": len(rows), "dropped": dict(dropped)}}


def _trained(job: Job, chat, dtype: torch.dtype, device: torch.device):
    """The weights that are trained, once they are known to fit in memory; refused if they could not be saved."""
    o, lora = job.config.optimisation, job.config.lora
    check_memory(job, dtype, device)
    model = _load(job, chat, dtype, device)
    check_saving(model, chat.tokenizer)
    if o.grad_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    if lora.lora:
        model = add_lora(model, lora.lora_r, lora.lora_alpha, lora.lora_dropout)
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        log.info("LoRA: r %d, alpha %g, %d trained parameters", lora.lora_r, lora.lora_alpha, count)
    return model


def check_memory(job: Job, dtype: torch.dtype, device: torch.device) -> None:
    """Raises UserError where the weights and what their training keeps would not fit."""
    lora, zero = job.config.lora, (job.deepspeed or {}).get("zero_optimization", {})
    offload = "offload_optimizer" in zero or "offload_param" in zero
    shards = given_world() or 1, zero.get("stage", 0)
    need = preflight.memory_of_training(job.start, not lora.lora, *shards, dtype.itemsize, offload)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1
    preflight.check_memory(need * here, free_memory(device), f"training {job.start}")


def _load(job: Job, chat, dtype: torch.dtype, device: torch.device):
    """The model that training starts from, with the head that the stage trains."""
    if MODELS[job.stage.model] is not Heads:
        return load_policy(job.start, dtype, device)
    model = load_with_head(job.start, job.stage.head, dtype, device)
    if names := getattr(job.stage, "labels", None):
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: i for i, name in enumerate(names)}
    choose_pad(model, chat, keep=stated_kind(job.start, store.read_json(job.start / "config.json"))[0] == REWARD_MODEL)
    return model


def _save(accelerator: Accelerator, weights, chat, job: Job, step: int, dtype: torch.dtype, held_out=None) -> None:
    """A checkpoint after a step, with what `held_out` examples had then."""
    state = weights.weights()
    if accelerator.is_main_process:
        save_checkpoint(job, chat, step, dtype, weights.whole.model, state, held_out)


def save_checkpoint(
    job: Job, chat, step: int, dtype: torch.dtype, model, state: dict[str, torch.Tensor] | None, held_out=None
) -> None:
    """The checkpoint folder of a step, and the link to the last one. `state`: the model's weights, or its adapters,
    where it does not have them itself."""
    tokenizer, lora = chat.tokenizer, job.config.lora
    if lora.lora and state is not None:
        unset_hf_deepspeed_config()  # with it ZeRO-3 would put what is loaded here into shards, too
        with torch.random.fork_rng():  # a new head is drawn, and replaced by the trained one
            base = _load(job, chat, torch.float32, torch.device("cpu"))
        job.provenance.check_unchanged()
        model = add_lora(base, lora.lora_r, lora.lora_alpha, lora.lora_dropout)
        other = model.load_state_dict(state, strict=False)  # tied weights have one name there
        if other.unexpected_keys or any("lora_" in name for name in other.missing_keys):
            raise RuntimeError(f"the adapter's weights have other names than the model's: {other}")
        state = None
    folder = job.run / f"checkpoint-{step}"
    about = {"stage": job.name, "step": step, "started_from": str(job.start), **job.header}
    about |= job.provenance.record(folder) | getattr(job.stage, "about", {})
    about |= {"held_out": held_out} if held_out else {}
    about |= trained_forms(job.data, job.start)
    if lora.lora:  # first: they are all there is if the merge is refused
        adapter = job.run / f"adapter-{step}"
        model.save_pretrained(adapter)
        make_readable(adapter)
        try:
            plain = merged(model)
        except UserError as error:
            raise UserError(f"{error}; the adapters are in {adapter}") from None
        save(plain, tokenizer, folder, dtype, about)
        adapter.rename(folder / "adapter")
    else:
        save(model, tokenizer, folder, dtype, about, state)
    link = job.run / ".checkpoint-last"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    link.replace(job.run / LAST)
    log.info("saved %s", folder)


def trained_forms(data: Path, start: Path) -> dict[str, dict]:
    """The forms that a checkpoint judges or compares by: of its data, or of the model that it was trained from; {} of
    one that does not."""
    found = read_kind(start) | (read_meta(data) or {})
    return {name: found[name] for name in FORMS if found.get(name)}
