"""One training run in one process: data, policy, stage, loop, checkpoints. train.py checks the flags and calls it."""

import logging
import os
import shutil
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from transformers.integrations import unset_hf_deepspeed_config

from cream.cli import console, preflight
from cream.errors import UserError
from cream.files import store
from cream.files.provenance import LAST, Provenance, origin, read_kind, read_meta
from cream.files.store import MALFORMED
from cream.model.checkpoint import length_limit, save, stored_dtype
from cream.model.hardware import free_memory
from cream.model.load import load_chat, load_policy
from cream.model.logprobs import LogProbs
from cream.model.lora import add_lora, merged
from cream.model.precision import Precision, choose_precision
from cream.scoring.cache import Source
from cream.training import STAGES, dpo, parallel, reference, sft, state
from cream.training.launch import given_world, is_first_process
from cream.training.loop import Schedule, common_budget, train

log = logging.getLogger("cream")
WRITTEN = ("state", "log.jsonl", "rejected.jsonl")  # in a run's folder, beside checkpoints, args.json, meta.json
SHOWN = ("loss", "margin", "accuracy", "ratio_chosen", "ratio_rejected", "grad_norm", "lr")


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters: rank, scale numerator, dropout on their input."""

    r: int = 32
    alpha: float = 64
    dropout: float = 0.1


@dataclass(frozen=True)
class Job:
    """All that decides a run. `start` is the folder of the policy trained from; `header` the settings and inputs that
    the run's sidecar records, with `provenance`, `flags` what args.json keeps besides; `skip` leaves malformed records
    out; `afresh` removes what stands in the run's folder; `fixed_consistency` overrides the pairs' C."""

    stage: str
    start: Path
    data: Path
    run: Path
    schedule: Schedule
    header: dict
    provenance: Provenance = field(default_factory=Provenance)
    skip: bool = False
    flags: dict = field(default_factory=dict)
    afresh: bool = False
    method: str = "original"
    beta: float = 0.1
    fixed_consistency: float | None = None
    max_length: int = 2048
    limit_size: int | None = None
    chat_template: Path | None = None
    lora: Lora | None = None
    bf16: bool | None = None
    save_dtype: str = "auto"
    grad_checkpointing: bool = False
    compile: bool = False
    cpu: bool = False
    deepspeed: dict | None = None
    report_to: str | None = None
    wandb: dict | None = None
    show_example: bool = True


def work(job: Job) -> None:
    """Train, save checkpoints under `job.run`, and, last, the sidecar meta.json that says the run is finished."""
    began = time.monotonic()
    console.start()
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
    examples = [row[-1] for row in rows]
    if job.show_example:
        _show(chat, examples[0])
    policy = _policy(job, precision.dtype, accelerator.device)
    saved_as = stored_dtype(job.start) if job.save_dtype == "auto" else getattr(torch, job.save_dtype)
    log.info("checkpoints are saved in %s (--save_dtype %s)", str(saved_as).removeprefix("torch."), job.save_dtype)
    model = LogProbs(policy)
    kind = parallel.Replicas if job.deepspeed is None else parallel.Shards
    weights = kind(accelerator, model, job.schedule.lr, job.schedule.weight_decay)
    tokens = common_budget(accelerator, weights, job.schedule.max_tokens)
    stage = sft.Stage()
    if job.stage == "dpo":
        exact = precision.exact and precision.dtype == torch.float32
        stage = dpo.Stage(job.beta, tolerance=1e-3 if exact else 0.5)
        source = Source(job.header["inputs"]["start"], precision.name, device.type)
        _take_reference(job, rows, source)
        pairs = [(uuid, example) for uuid, _, example in rows]
        reference.fill(accelerator, model, pairs, job.data, source, tokens)
    job.provenance.check_unchanged()
    _begin(accelerator, job)

    def save(step: int) -> None:
        _save(accelerator, weights, chat.tokenizer, job, step, saved_as)

    last = train(accelerator, weights, stage, examples, job.schedule, tokens, job.run, save, _report)
    accelerator.free_memory()
    accelerator.end_training()
    if accelerator.is_main_process:
        counts = {"trained_on": len(examples), "dropped": dict(dropped), **facts}
        took = round(time.monotonic() - began, 3)
        if dropped[MALFORMED]:
            bad = store.rejected(job.data, store.detect(job.data, skip=True), job.limit_size)
            store.write_rows(job.run / "rejected.jsonl", bad)
        saved = read_kind(job.run / LAST)["fingerprint"]
        facts = {"counts": counts, "last": last, "wall_seconds": took, "output": saved}
        store.write_json(job.run / "meta.json", {**job.header, **origin(), **job.provenance.record(job.run), **facts})
        tidy(job.run)


def _accelerator(job: Job, precision: Precision) -> Accelerator:
    sharded, saved = job.deepspeed is not None, None if job.afresh else state.last(job.run)
    other = saved is not None and saved.processes != int(os.environ.get("WORLD_SIZE", "1"))
    if sharded:
        log.info("setting up DeepSpeed (its first use compiles for about half a minute)")
        if is_first_process() and (marks := parallel.compiling()):
            log.warning(
                "%s: another process compiles that part of DeepSpeed, and this one may wait for it. If none does, one "
                "was killed at it, and the wait has no end: remove that file",
                marks[0],
            )
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's own calls
    return Accelerator(
        cpu=job.cpu and not sharded,  # with it accelerate would leave DeepSpeed out, unsaid
        mixed_precision="bf16" if precision.autocast or precision.dtype == torch.bfloat16 else "no",
        log_with=job.report_to,
        project_dir=str(job.run),
        deepspeed_plugin=parallel.plugin(job.deepspeed, job.schedule.max_grad_norm, other) if sharded else None,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if sharded and job.cpu else None,
    )


def clear(run: Path) -> None:
    """Remove an earlier run from its folder: what training writes there, and nothing else. args.json stays until it is
    replaced: it says whose folder this is, whenever this is killed."""
    for path in (run / "meta.json", *run.glob("checkpoint-*"), *(run / name for name in WRITTEN)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def tidy(run: Path) -> None:
    """Remove what a finished run needs no more: the state to go on from, and what a kill left of a folder."""
    for left in (run / "state", *run.glob(".checkpoint-*")):
        left.unlink() if left.is_symlink() else shutil.rmtree(left, ignore_errors=True)


def _begin(accelerator: Accelerator, job: Job) -> None:
    """The run's folder and trackers: nothing is written before all that a user could have got wrong is read."""
    if accelerator.is_main_process:
        if job.afresh:
            clear(job.run)
        store.write_json(job.run / "args.json", {**job.header, "flags": job.flags})
    accelerator.wait_for_everyone()
    if job.report_to:
        facts = {"start": str(job.start), "data": str(job.data), **asdict(job.schedule)}
        entity = {"wandb": {"entity": (job.wandb or {}).get("entity")}}
        accelerator.init_trackers((job.wandb or {}).get("project", "CREAM"), config=facts, init_kwargs=entity)


def _examples(job: Job, chat, limit: int, dropped: Counter[str]) -> tuple[list, dict]:
    """The stage's examples and what the log and sidecar say of them."""
    module = import_module(STAGES[job.stage])
    kind = store.detect(job.data, skip=job.skip)
    records = list(store.read(job.data, kind, job.limit_size, skip=job.skip))
    rows = module.examples(records, chat, limit, dropped)
    for reason, count in dropped.items():
        log.info("dropped %d of %d records: %s", count, len(records), reason)
    if job.skip and (bad := sum(1 for _ in store.rejected(job.data, kind, job.limit_size))):
        dropped[MALFORMED] = bad
    if not rows:
        raise UserError(f"{job.data}: no record is left to train on (dropped: {dict(dropped)})")
    facts = {"records": len(records)}
    if job.stage == "dpo":
        facts |= dpo.weigh(rows, job.method, job.fixed_consistency)
        log.info(
            "%d pairs, C by %s: mean used %.3f; %d with C < 1/2 are trained in reverse",
            facts["pairs"],
            job.method if job.fixed_consistency is None else "--fixed_consistency",
            facts["mean_c_used"],
            facts["trained_in_reverse"],
        )
    return rows, facts


def _take_reference(job: Job, rows: list, source: Source) -> None:
    """Let the pairs' own log-probabilities stand where they are this reference's; otherwise say why not."""
    about, inputs = read_meta(job.data) or {}, job.header["inputs"]
    if about and about.get("output") != inputs["data"]:
        why = "the file was changed since they were written"
    else:
        why = reference.trusted(about.get("scored"), source, inputs.get("chat_template"))
    if why is None:
        return
    log.info("the pairs' own log-probabilities do not serve as reference: %s", why)
    for *_, example in rows:
        example.reference_chosen = example.reference_rejected = float("nan")


def _show(chat, example) -> None:
    tokens = example.chosen if isinstance(example, dpo.Example) else example
    log.info("first example, what is trained on marked:\n%s", chat.show(tokens))


def _policy(job: Job, dtype: torch.dtype, device: torch.device):
    """The policy as it is trained."""
    zero = (job.deepspeed or {}).get("zero_optimization", {})
    world, here = given_world() or 1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    offload = "offload_optimizer" in zero or "offload_param" in zero
    need = preflight.training(job.start, job.lora is None, world, zero.get("stage", 0), dtype.itemsize, offload)
    preflight.memory(need * (here if job.cpu else 1), free_memory(device), f"training {job.start}")
    model = load_policy(job.start, dtype, device)
    if job.compile:
        model.base_model.compile(dynamic=True)
    if job.grad_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    if job.lora:
        model = add_lora(model, job.lora.r, job.lora.alpha, job.lora.dropout)
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        log.info("LoRA: r %d, alpha %g, %d trained parameters", job.lora.r, job.lora.alpha, count)
    return model


def _save(accelerator: Accelerator, weights, tokenizer, job: Job, step: int, dtype: torch.dtype) -> None:
    state, model = weights.weights(), weights.whole.model
    if not accelerator.is_main_process:
        return
    if job.lora and state is not None:
        unset_hf_deepspeed_config()  # with it ZeRO-3 would put what is loaded here into shards, too
        base = load_policy(job.start, torch.float32, torch.device("cpu"))
        job.provenance.check_unchanged()
        model = add_lora(base, job.lora.r, job.lora.alpha, job.lora.dropout)
        found = model.load_state_dict(state, strict=False)  # tied weights have one name there
        if found.unexpected_keys or any("lora_" in name for name in found.missing_keys):
            raise RuntimeError(f"the adapter's weights have other names than the model's: {found}")
        state = None
    folder = job.run / f"checkpoint-{step}"
    about = {"stage": job.stage, "step": step, "started_from": str(job.start), **job.header}
    about |= job.provenance.record(folder)
    save(merged(model) if job.lora else model, tokenizer, folder, dtype, about, state)
    if job.lora:
        model.save_pretrained(folder / "adapter")
    link = job.run / ".checkpoint-last"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    link.replace(job.run / LAST)
    log.info("saved %s", folder)


def _report(step: int, steps: int, metrics: dict[str, float]) -> None:
    names = [n for n in metrics if n in SHOWN or n.endswith("_per_second")]
    log.info("step %d/%d  %s", step, steps, "  ".join(f"{n} {metrics[n]:.4g}" for n in names))
