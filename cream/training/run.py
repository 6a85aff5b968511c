"""One training run in one process: data, policy, stage, loop, checkpoints. train.py checks the flags and calls it."""

import logging
import os
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from transformers.integrations import unset_hf_deepspeed_config

from cream.cli import console, preflight
from cream.cli.flags import as_dict
from cream.errors import UserError
from cream.files import store
from cream.files.provenance import ARGS, LAST, RUN, Provenance, origin, read_kind
from cream.files.store import MALFORMED
from cream.model.checkpoint import length_limit, save, stored_dtype
from cream.model.hardware import free_memory
from cream.model.load import load_chat, load_policy
from cream.model.logprobs import LogProbs
from cream.model.lora import add_lora, merged
from cream.model.precision import Precision, choose_precision
from cream.scoring.cache import Source
from cream.training import parallel, reference, state
from cream.training.folder import clear, starts_again, tidy
from cream.training.launch import given_world, is_first_process
from cream.training.loop import Schedule, common_budget, train
from cream.training.options import LoraFlags, Optimisation, TrainOutput

log = logging.getLogger("cream")
MODELS = {"logprobs": LogProbs}  # a stage's `model` -> the wrapper of the weights that its loss is computed with
SHOWN = ("loss", "margin", "accuracy", "ratio_chosen", "ratio_rejected", "nll", "grad_norm", "lr")


@dataclass(frozen=True)
class Job:
    """All that decides a run. `name` is the stage's, `start` the folder of the policy trained from; `header` the
    settings and inputs that the run's sidecar records, with `provenance`, `flags` what args.json keeps besides; `clear`
    removes an earlier run from the folder `run`; `skip` skips malformed records."""

    name: str
    stage: object
    start: Path
    data: Path
    run: Path
    schedule: Schedule
    header: dict
    provenance: Provenance = field(default_factory=Provenance)
    flags: dict = field(default_factory=dict)
    clear: bool = False
    skip: bool = False
    max_length: int = 2048
    limit_size: int | None = None
    chat_template: Path | None = None
    bf16: bool | None = None
    cpu: bool = False
    deepspeed: dict | None = None
    optimisation: Optimisation = field(default_factory=Optimisation)
    lora: LoraFlags = field(default_factory=LoraFlags)
    output: TrainOutput = field(default_factory=TrainOutput)


def make_job(config, header: dict, batch_size: int, *, run: Path, **decided) -> Job:
    """The job of train.py's flags, in steps of `batch_size` examples; `decided` are fields that follow from flags."""
    o = config.optimisation
    ratio = o.save_eval_step_ratio or o.epoch
    schedule = Schedule(
        epochs=o.epoch,
        batch_size=batch_size,
        max_tokens=o.max_tokens_per_batch,
        lr=o.lr,
        weight_decay=o.weight_decay,
        warmup_ratio=o.warmup_step_ratio,
        max_grad_norm=o.max_grad_norm,
        saves=round(ratio if ratio >= 1 else 1 / ratio),
        log_every=o.log_every,
        seed=config.run.seed,
    )
    return Job(
        run=run,
        schedule=schedule,
        header=header,
        flags=as_dict(config),
        clear=starts_again(run, header, config.run.overwrite, o.resume),
        skip=config.run.skip,
        max_length=config.data.max_length,
        chat_template=config.model.template(),
        bf16=config.device.bf16,
        cpu=config.device.devices()[0] == "cpu",
        deepspeed=None if o.deepspeed is None else parallel.read_settings(o.deepspeed),
        optimisation=o,
        lora=config.lora,
        output=config.output,
        **decided,
    )


def work(job: Job) -> None:
    """Train, save checkpoints under `job.run`, and, last, the sidecar meta.json that says the run is finished."""
    began = time.monotonic()
    console.set_up_logging()
    device = torch.device("cpu" if job.cpu else "cuda")
    if job.cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # accelerate imports DeepSpeed, which would warn
    if not is_first_process():
        log.setLevel(logging.WARNING)
    precision = choose_precision(job.bf16, device, training=True, shards=job.deepspeed is not None)
    accelerator = _accelerator(job, precision)
    world = given_world() or 1
    if accelerator.num_processes != world:
        raise RuntimeError(f"accelerate sees {accelerator.num_processes} processes of {world}")
    torch.manual_seed(job.schedule.seed)
    if device.type == "cuda":  # what stays in float32 under autocast, too
        torch.set_float32_matmul_precision("high")
    log.info("precision: %s", precision.reason)
    chat = load_chat(job.start, job.chat_template)
    limit = length_limit(job.max_length, job.start)
    dropped: Counter[str] = Counter()
    rows, facts = _examples(job, chat, limit, dropped)
    examples = [example for _, example in rows]
    if job.output.show_example:
        first = chat.show(job.stage.group(examples[0])[0])
        log.info("first example, its trained tokens marked (the loss mask):\n%s", first)
    policy = _policy(job, precision.dtype, accelerator.device)
    dtype = job.optimisation.save_dtype
    saved_as = stored_dtype(job.start) if dtype == "auto" else getattr(torch, dtype)
    log.info("checkpoints are saved in %s (--save_dtype %s)", str(saved_as).removeprefix("torch."), dtype)
    model = MODELS[job.stage.model](policy)
    kind = parallel.Replicas if job.deepspeed is None else parallel.Shards
    weights = kind(accelerator, model, job.schedule.lr, job.schedule.weight_decay)
    tokens = common_budget(accelerator, weights, job.schedule.max_tokens)
    if job.stage.references:
        source = Source(job.header["inputs"]["start"], precision.name, device.type)
        reference.check_recorded(job.stage, examples, job.data, job.header["inputs"], source)
        reference.fill(accelerator, model, job.stage, rows, job.data, source, tokens)
    job.provenance.check_unchanged()
    _begin(accelerator, job)

    def save(step: int) -> None:
        _save(accelerator, weights, chat.tokenizer, job, step, saved_as)

    def check_first(metrics: dict[str, float]) -> None:
        exact = precision.exact and precision.dtype == torch.float32
        job.stage.check_first(metrics, tolerance=1e-3 if exact else 0.5)

    prepared = accelerator, weights, job.stage, examples, job.schedule, tokens, job.run
    last = train(*prepared, save, _report, check_first)
    accelerator.free_memory()
    accelerator.end_training()
    if accelerator.is_main_process:
        counts = {"trained_on": len(examples), "dropped": dict(dropped), **facts}
        _finish(job, {"counts": counts, "last": last, "wall_seconds": round(time.monotonic() - began, 3)})


def _finish(job: Job, facts: dict) -> None:
    """The sidecar, which says that the run is finished, and before it the malformed records that were skipped."""
    if facts["counts"]["dropped"].get(MALFORMED):
        bad = store.rejected(job.data, store.detect(job.data, skip=True), job.limit_size)
        store.write_rows(job.run / "rejected.jsonl", bad)
    facts |= {"output": read_kind(job.run / LAST)["fingerprint"]}
    store.write_json(job.run / RUN, {**job.header, **origin(), **job.provenance.record(job.run), **facts})
    tidy(job.run)


def _accelerator(job: Job, precision: Precision) -> Accelerator:
    sharded, saved = job.deepspeed is not None, None if job.clear else state.last(job.run)
    other = saved is not None and saved.processes != int(os.environ.get("WORLD_SIZE", "1"))
    if sharded:
        log.info("setting up DeepSpeed (its first use compiles for about half a minute)")
        if is_first_process() and (marks := parallel.compiling()):
            log.warning(
                "%s: another process compiles this part of DeepSpeed, and this one may wait for it. If no process "
                "does, one was killed while compiling and the wait has no end: remove this file",
                marks[0],
            )
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's own calls
    return Accelerator(
        cpu=job.cpu and not sharded,  # with it accelerate would leave DeepSpeed out, unsaid
        mixed_precision="bf16" if precision.autocast or precision.dtype == torch.bfloat16 else "no",
        log_with=job.output.report_to,
        project_dir=str(job.run),
        deepspeed_plugin=parallel.plugin(job.deepspeed, job.schedule.max_grad_norm, other) if sharded else None,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if sharded and job.cpu else None,
    )


def _begin(accelerator: Accelerator, job: Job) -> None:
    """The run's folder and trackers: nothing is written before all that a user could have got wrong is read."""
    if accelerator.is_main_process:
        if job.clear:
            clear(job.run)
        store.write_json(job.run / ARGS, {**job.header, "flags": job.flags})
    accelerator.wait_for_everyone()
    if job.output.report_to:
        facts = {"start": str(job.start), "data": str(job.data), **asdict(job.schedule)}
        entity = {"wandb": {"entity": job.output.wandb_entity_name}}
        accelerator.init_trackers(job.output.wandb_project_name, config=facts, init_kwargs=entity)


def _examples(job: Job, chat, limit: int, dropped: Counter[str]) -> tuple[list[tuple[str, object]], dict]:
    """The stage's (uuid, example) rows, and what the sidecar says of them."""
    kind = store.detect(job.data, skip=job.skip)
    records = list(store.read(job.data, kind, job.limit_size, skip=job.skip))
    rows = job.stage.prepare(records, chat, limit, dropped)
    for reason, count in dropped.items():
        log.info("dropped %d of %d records: %s", count, len(records), reason)
    if job.skip and (bad := sum(1 for _ in store.rejected(job.data, kind, job.limit_size))):
        dropped[MALFORMED] = bad
    if not rows:
        raise UserError(f"{job.data}: no record is left to train on (dropped: {dict(dropped)})")
    return rows, {"records": len(records)} | job.stage.facts([example for _, example in rows])


def _policy(job: Job, dtype: torch.dtype, device: torch.device):
    """The policy as it is trained."""
    zero = (job.deepspeed or {}).get("zero_optimization", {})
    world, here = given_world() or 1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    offload = "offload_optimizer" in zero or "offload_param" in zero
    need = preflight.memory_of_training(
        job.start, not job.lora.lora, world, zero.get("stage", 0), dtype.itemsize, offload
    )
    preflight.check_memory(need * (here if job.cpu else 1), free_memory(device), f"training {job.start}")
    model = load_policy(job.start, dtype, device)
    if job.optimisation.compile:
        model.base_model.compile(dynamic=True)
    if job.optimisation.grad_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    if job.lora.lora:
        model = _adapted(model, job.lora)
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        log.info("LoRA: r %d, alpha %g, %d trained parameters", job.lora.lora_r, job.lora.lora_alpha, count)
    return model


def _adapted(model, lora: LoraFlags):
    return add_lora(model, lora.lora_r, lora.lora_alpha, lora.lora_dropout)


def _save(accelerator: Accelerator, weights, tokenizer, job: Job, step: int, dtype: torch.dtype) -> None:
    state, model = weights.weights(), weights.whole.model
    if not accelerator.is_main_process:
        return
    if job.lora.lora and state is not None:
        unset_hf_deepspeed_config()  # with it ZeRO-3 would put what is loaded here into shards, too
        base = load_policy(job.start, torch.float32, torch.device("cpu"))
        job.provenance.check_unchanged()
        model = _adapted(base, job.lora)
        other = model.load_state_dict(state, strict=False)  # tied weights have one name there
        if other.unexpected_keys or any("lora_" in name for name in other.missing_keys):
            raise RuntimeError(f"the adapter's weights have other names than the model's: {other}")
        state = None
    folder = job.run / f"checkpoint-{step}"
    about = {"stage": job.name, "step": step, "started_from": str(job.start), **job.header}
    about |= job.provenance.record(folder)
    save(merged(model) if job.lora.lora else model, tokenizer, folder, dtype, about, state)
    if job.lora.lora:
        model.save_pretrained(folder / "adapter")
    link = job.run / ".checkpoint-last"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    link.replace(job.run / LAST)
    log.info("saved %s", folder)


def _report(step: int, steps: int, metrics: dict[str, float]) -> None:
    names = [n for n in metrics if n in SHOWN or n.endswith("_per_second")]
    log.info("step %d/%d  %s", step, steps, "  ".join(f"{n} {metrics[n]:.4g}" for n in names))
