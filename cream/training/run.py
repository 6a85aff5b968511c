"""One training run in one process: data, weights, stage, loop, checkpoints. train.py checks the flags and calls it."""

import json
import logging
import os
import time
from collections import Counter
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, patch_environment

from cream.alarms import Watch
from cream.cli import console
from cream.cli.flags import as_dict
from cream.files import store
from cream.files.provenance import ARGS, LAST, RUN, origin, read_kind
from cream.files.store import MALFORMED
from cream.model.checkpoint import length_limit, stored_dtype
from cream.model.load import load_chat
from cream.model.lora import check_lora
from cream.model.precision import Precision, choose_precision
from cream.text.options import AS_SAMPLED
from cream.training import parallel, state
from cream.training.examples import fill_references, read_examples
from cream.training.folder import clear, tidy
from cream.training.job import Job
from cream.training.launch import given_world, is_first_process
from cream.training.log import lines_until
from cream.training.loop import common_budget, train
from cream.training.report import Report
from cream.training.samples import Samples, read_sample_prompts
from cream.training.saving import save_step
from cream.training.weights import MODELS, load_trained

log = logging.getLogger("cream")


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
    if accelerator.num_processes > 1:
        accelerator.free_memory()
    accelerator.end_training()
    if accelerator.is_main_process:
        _finish(job, {**facts, "wall_seconds": round(time.monotonic() - began, 3)})


def _train(job: Job, precision: Precision, accelerator: Accelerator) -> dict:
    """Everything between set-up and sidecar; returns the counts and the last metrics for the latter."""
    config, stage, o = job.config, job.stage, job.config.optimisation
    chat = load_chat(job.start, **config.model.text(), **config.thoughts.text())
    dropped: Counter[str] = Counter()
    rows, refused, facts, held_out = read_examples(job, chat, dropped)
    examples = [example for _, example in rows]
    if config.output.show_example:
        what = "its trained tokens marked (the loss mask)" if stage.model == "logprobs" else "its response marked"
        log.info("first example, %s:\n%s", what, chat.show(stage.group(examples[0])[0]))
    samples, watch = _samples(job, chat), Watch(config.alarms.limits(), getattr(stage, "cap", None))
    model = MODELS[stage.model](load_trained(job, chat, precision.dtype, accelerator.device))
    if o.compile:  # not before its layout is chosen: what the probe runs would be compiled, too
        model.plain.base_model.compile(dynamic=True)
    saved_as = stored_dtype(job.start) if o.save_dtype == "auto" else getattr(torch, o.save_dtype)
    log.info("checkpoints are saved in %s (--save_dtype %s)", str(saved_as).removeprefix("torch."), o.save_dtype)
    kind = parallel.Replicas if job.deepspeed is None else parallel.Shards
    weights = kind(accelerator, model, o.lr, o.weight_decay, o.optim)
    tokens = common_budget(accelerator, weights, o.max_tokens_per_batch, o.moment_bytes)
    reuse = fill_references(job, accelerator, model, rows, held_out, precision, tokens)
    job.provenance.check_unchanged()
    _begin(accelerator, job, facts)
    if accelerator.is_main_process:
        resume_lines(job.run, watch, samples)
    report = Report()

    def progress(step: int, steps: int, metrics: dict[str, float]) -> None:
        report(step, steps, metrics)
        watch(step, metrics)

    def save(step: int) -> None:
        save_step(accelerator, weights, chat, job, step, saved_as, held_out and held_out.last)
        if samples and accelerator.is_main_process:
            samples.write(accelerator, model.plain, step)

    def check_first(metrics: dict[str, float]) -> None:
        exact = precision.exact and precision.dtype == torch.float32
        stage.check_first(metrics, tolerance=1e-3 if exact else 0.5)

    prepared = accelerator, weights, stage, examples, o, config.run.seed, tokens, job.run
    last = train(*prepared, save, progress, check_first, held_out)
    counts = {"trained_on": len(examples), "dropped": dict(dropped), **facts}
    found = {"counts": counts, "last": last, "alarms": watch.fired, "refused": refused}
    return found | ({"reuse": reuse} if reuse else {})


def _finish(job: Job, facts: dict) -> None:
    """The sidecar, which says that the run is finished, and before it the malformed records that were skipped."""
    refused = facts.pop("refused")
    if facts["counts"]["dropped"].get(MALFORMED):
        bad = store.rejected(job.data, store.detect(job.data, skip=True), job.limit_size, refused)
        store.write_rows(job.run / "rejected.jsonl", bad)
    facts |= {"output": read_kind(job.run / LAST)["fingerprint"]}
    store.write_json(job.run / RUN, {**_header(job), **origin(), **job.provenance.record(job.run), **facts})
    tidy(job.run)


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
    moments = "; AdamW's moments in bfloat16 (--optim adamw_bf16)"
    log.info("precision: %s%s", precision.reason, moments if job.config.optimisation.optim == "adamw_bf16" else "")
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


def _header(job: Job) -> dict:
    return job.header | (AS_SAMPLED if job.stage.made_for_policy else {})


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
