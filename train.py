"""Train a policy: supervised fine-tuning (SFT), or direct preference optimisation with CREAM's consistency (DPO).

SFT trains on the answers of conversations; DPO on the pairs that cal_consistency.py writes, its reference the policy
it starts from. The stage follows from the data and --method. Departures from the released code: the loss never touches
prompts or padding, every process's gradient counts, weights keep float32 masters, and over-long records are dropped
with a reason.
"""

import importlib.util
import os
import shutil
import sys
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import xxhash

from config import CHECKPOINTS, DATASET_FILES, DATASETS, TrainConfig, for_records, settings
from cream.cli import console, names, preflight
from cream.cli.flags import as_dict, parse
from cream.errors import UserError
from cream.files import journal, store
from cream.files.fingerprints import fingerprint_folder
from cream.files.folders import check_folder
from cream.files.lock import Lock
from cream.files.provenance import LAST, Provenance, read_kind, read_meta
from cream.training import BY_RECORD, RECORDS
from cream.training.launch import given_world, is_first_process

EXAMPLE = """\
  one CPU    python train.py --model tiny --name tiny_sft --epoch 2 --lr 4e-5 --train_bsz 32 --register tiny_m1
  two        python train.py --device cpu,cpu --model tiny --name tiny_sft --epoch 2 --lr 4e-5 --train_bsz 16
  8 GPUs     python train.py --device 0,1,2,3,4,5,6,7 --model llama3 --name oasst_sft --epoch 5 --lr 5e-6 --train_bsz 4
  DPO        python train.py --checkpoint tiny_m1 --name PAIRS --method consistency_avg --lr 2e-4 --train_bsz 32"""


@console.stage
def main(argv=None):
    config = parse(TrainConfig, argv, description=__doc__, example=EXAMPLE)
    if not is_first_process():
        console.log.setLevel("WARNING")
    devices = config.device.devices()
    data = names.dataset(config.data.name or _default_data(config), DATASET_FILES, DATASETS)
    stage, method = _stage_and_method(config, data)
    start = config.model.folder(config.model.checkpoint)
    provenance = config.run.provenance()
    header = _header(config, stage, method, data, start, provenance)
    run = _run_folder(config, stage, method, data, header)
    console.log.info("%s of %s on %s -> %s", stage.upper(), start, data, run)
    if stage == "dpo":
        console.log.info("method %s, beta %g, reference: the starting policy %s", method, config.preference.beta, start)
    if config.output.report_to == "wandb" and importlib.util.find_spec("wandb") is None:
        raise UserError("--report_to wandb: it is not installed; .venv/bin/pip install wandb")
    if config.optimisation.compile and devices[0] == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise UserError("--compile on a CPU needs a C++ compiler: install g++, or leave --compile out")
    if config.output.register is not None:
        names.check_free(CHECKPOINTS, config.output.register, run / LAST, overwrite=config.run.overwrite)
    stands = _stands(config, run, header, provenance.sources.values())
    if config.run.dry_run:
        kind = store.detect(data, skip=config.run.skip)
        deque(store.read(data, kind, _limit(config), skip=config.run.skip), maxlen=0)
        console.log.info("dry run: %s; nothing was written", "the run stands already" if stands else "it would train")
        return
    if stands:
        console.log.info("%s stands already, made by the same settings from the same inputs; nothing to do", run)
        if is_first_process() and ((run / "state").exists() or Lock(run).path.exists() or [*run.glob(".checkpoint-*")]):
            from cream.training.run import tidy

            with Lock(run):  # it was killed at its very end
                tidy(run)
    elif is_first_process():
        with Lock(run):
            _train(config, stage, method, start, data, run, header, provenance, devices)
    else:
        _train(config, stage, method, start, data, run, header, provenance, devices)
    if is_first_process():
        _finish(config, stage, run)


def _default_data(config: TrainConfig) -> str:
    return "tiny_sft" if config.model.name() == "tiny" else "oasst_sft"


def _limit(config: TrainConfig) -> int | None:
    return config.data.limit_size or (19 if config.run.debug else None)


def _stage_and_method(config: TrainConfig, data: Path) -> tuple[str, str]:
    """The training stage and DPO method: what the flags say, else what the data say; a contradiction is an error."""
    stage, method = config.optimisation.train_stage, config.preference.method
    kind = store.detect(data, skip=config.run.skip)
    if kind not in BY_RECORD:
        raise UserError(f"{data}: holds {kind.__name__} records; SFT trains on conversations, DPO on preference pairs")
    stage = stage or BY_RECORD[kind]
    if kind not in RECORDS[stage]:
        raise UserError(f"--train_stage {stage}: {data} holds {kind.__name__} records; cal_consistency.py makes pairs")
    if stage == "sft":
        if method or config.preference.fixed_consistency is not None:
            raise UserError(f"--method and --fixed_consistency belong to DPO, but this is SFT on {data}")
        return stage, "original"
    recorded = (read_meta(data) or {}).get("method")
    if method and recorded and method != recorded:
        raise UserError(
            f"--method {method}: {data} was made for {recorded}; leave --method out, or make the pairs again"
        )
    return stage, method or recorded or "original"


def _header(config: TrainConfig, stage: str, method: str, data: Path, start: Path, provenance: Provenance) -> dict:
    """What decides the run: settings and the hashes of what it starts from."""
    check_folder(start)
    if stage == "dpo":
        made = provenance.output("data", data)
    else:
        provenance.file("data", data)
    provenance.model("start", start)
    config.model.add_template(provenance)
    if stage == "dpo":
        _check_policy(config, data, made.get("policy"), provenance)
    if config.optimisation.deepspeed is not None:
        provenance.file("deepspeed", config.optimisation.deepspeed)
    decides = settings(config) | {"train_stage": stage, "method": method, "global_batch": _global_batch(config)}
    return {"settings": decides, "inputs": provenance.inputs}


def _global_batch(config: TrainConfig) -> int:
    """Examples of a step, however many processes share them."""
    processes = given_world() or len(config.device.devices())
    return config.optimisation.train_bsz * processes * config.optimisation.grad_accum


def _check_policy(config: TrainConfig, data: Path, policy: dict | None, provenance: Provenance) -> None:
    """Pairs are meant for the policy that rewarded them: from another one the reference is another too."""
    if policy is not None and policy["fingerprint"] != provenance.inputs["start"]:
        provenance.object(
            f"{data}: its pairs were rewarded by --checkpoint {policy['checkpoint'] or 'none'} of {policy['model']}, "
            f"but training would start from --checkpoint {config.model.checkpoint or 'none'}; give that one"
        )


def _run_folder(config: TrainConfig, stage: str, method: str, data: Path, header: dict) -> Path:
    if config.output.output_dir:
        return Path(config.output.output_dir)
    import msgspec

    digest = xxhash.xxh3_64(msgspec.json.encode(header, order="deterministic")).hexdigest()[:8]
    name = Path(config.data.name or _default_data(config)).name.partition(".")[0]
    parts = [config.output.run_name, name, f"ckpt_{names.label(config.model.checkpoint)}"]
    parts += [method if stage == "dpo" else None, digest]
    return config.run.outputs() / stage / "-".join(part for part in parts if part)


def _stands(config: TrainConfig, run: Path, header: dict, sources: Iterable[Path]) -> bool:
    """Whether the run is finished; an unfinished run of other settings is refused, a foreign folder, and with
    --overwrite one that holds an input."""
    if run.exists() and not run.is_dir():
        raise UserError(f"{run}: is a file where the run's folder is to be")
    if not run.exists() or all(path.name == ".args.json.tmp" for path in run.iterdir()):  # killed before it began
        return False
    if not (run / "args.json").exists():
        raise UserError(f"{run}: is not the folder of a training run; give another --output_dir")
    if config.run.overwrite:
        for source in sources:
            if source.resolve().is_relative_to(run.resolve()):
                raise UserError(f"--overwrite: {run} holds {source}, an input; give another --output_dir")
        return False
    if (run / "meta.json").exists():
        made_by = store.read_json(run / "meta.json")
        journal.same(run, made_by, header, "a finished run stands here")
        _check_last(run, made_by.get("output"))
        return True
    made_by = store.read_json(run / "args.json")
    journal.same(run, made_by, header, "an unfinished run stands here", "Repeat its command to finish it. ")
    return False


def _check_last(run: Path, saved: str | None) -> None:
    """Raises UserError unless the last checkpoint of a finished run is there as it was saved, with this fingerprint;
    runs of earlier versions have that in the checkpoint only."""
    last = run / LAST
    if not last.is_dir() or fingerprint_folder(last) != (saved or read_kind(last).get("fingerprint")):
        raise UserError(
            f"{run}: a finished run stands here, but its last checkpoint is not what was saved, or not there: put it "
            "back, or --overwrite to train again"
        )


def _afresh(config: TrainConfig, run: Path, header: dict) -> bool:
    """Whether what stands in the run's folder goes: with --overwrite all but an unfinished run that the same command
    began, which is gone on with."""
    if not config.run.overwrite or not config.optimisation.resume:
        return not config.optimisation.resume
    if (run / "meta.json").exists():
        return True
    with suppress(UserError):  # there is none, or it is damaged
        return journal.difference(store.read_json(run / "args.json"), header) is not None
    return True


def _train(config: TrainConfig, stage, method, start, data, run, header, provenance, devices) -> None:
    from cream.training import launch
    from cream.training.loop import Schedule
    from cream.training.run import Job, Lora, work

    o, lora = config.optimisation, config.lora
    ratio = o.save_eval_step_ratio or o.epoch
    job = Job(
        stage=stage,
        start=start,
        data=data,
        run=run,
        header=header,
        provenance=provenance,
        skip=config.run.skip,
        flags=as_dict(config),
        afresh=_afresh(config, run, header),
        schedule=Schedule(
            epochs=o.epoch,
            batch_size=_global_batch(config),
            max_tokens=o.max_tokens_per_batch,
            lr=o.lr,
            weight_decay=o.weight_decay,
            warmup_ratio=o.warmup_step_ratio,
            max_grad_norm=o.max_grad_norm,
            saves=round(ratio if ratio >= 1 else 1 / ratio),
            log_every=o.log_every,
            seed=config.run.seed,
        ),
        method=method,
        beta=config.preference.beta,
        fixed_consistency=config.preference.fixed_consistency,
        max_length=config.data.max_length,
        limit_size=_limit(config),
        chat_template=config.model.template(),
        lora=Lora(lora.lora_r, lora.lora_alpha, lora.lora_dropout) if lora.lora else None,
        bf16=config.device.bf16,
        save_dtype=o.save_dtype,
        grad_checkpointing=o.grad_checkpointing,
        compile=o.compile,
        cpu=devices[0] == "cpu",
        deepspeed=_deepspeed(o.deepspeed),
        report_to=config.output.report_to,
        wandb={"project": config.output.wandb_project_name, "entity": config.output.wandb_entity_name},
        show_example=config.output.show_example,
    )
    saved = 4 if job.save_dtype == "float32" else 2
    preflight.room(run, preflight.run(start, job.schedule.saves, saved), "training")
    about = {**header["settings"], **header["inputs"], "run": str(run.resolve())}
    place = config.output.master_address, config.output.master_port
    try:
        launch.run(work, job, devices, *place, about, alone=job.deepspeed is None)
    except KeyboardInterrupt as error:
        if not o.resume:
            error.add_note("but for --resume no")  # with it, it begins anew
        raise


def _deepspeed(path: str | None) -> dict | None:
    """The configuration, checked for what it may set."""
    if path is None:
        return None
    from cream.training.parallel import check_settings

    found = store.read_json(Path(path))
    check_settings(found, path)
    if not shutil.which(os.environ.get("CXX", "g++")):
        raise UserError(f"--deepspeed {path}: DeepSpeed compiles parts of itself and needs a C++ compiler: install g++")
    os.environ["PATH"] = (
        f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # ninja, which it compiles with
    )
    return found


def _finish(config: TrainConfig, stage: str, run: Path) -> None:
    """Register the checkpoint and print the next stage's command."""
    last = run / LAST
    name = config.output.register
    if name:
        names.register(CHECKPOINTS, name, last, overwrite=config.run.overwrite)
        console.log.info("registered as %s in %s", name, CHECKPOINTS.name)
    console.log.info("checkpoint: %s", last)
    model = config.model.name()
    known = {"device": for_records(config.device.devices()), "model": model, "checkpoint": name or last}
    known["chat_template"] = config.model.chat_template
    tiny = "tiny_" if model == "tiny" else ""
    evaluation = "tiny_test" if tiny else "all_test"
    prompts = f"{tiny}prompt_{min(_round(last), 3)}"
    console.log.info("next, its answers for the coming round:")
    console.log.info("  %s", console.command("infer.py", **known, mode="sampling", name=prompts))
    console.log.info("or its accuracy:")
    console.log.info("  %s", console.command("infer.py", **known, mode="evaluation", name=evaluation))


def _round(checkpoint: Path) -> int:
    """t of the policy M_t in this folder: 1 after SFT, one more after every DPO; as far as its ancestors are whole."""
    seen: set[Path] = set()
    with suppress(UserError, OSError, ValueError):  # it is for advice alone
        while checkpoint.resolve() not in seen:
            seen.add(checkpoint.resolve())
            about = read_kind(checkpoint)
            if about.get("stage") != "dpo" or "started_from" not in about:
                break
            checkpoint = Path(about["started_from"])
    return len(seen)


if __name__ == "__main__":
    main()
