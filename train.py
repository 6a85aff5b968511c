"""Train a policy: supervised fine-tuning (SFT), direct preference optimisation with CREAM's consistency (DPO), policy
gradients on rewards (rloo, grpo) or on its own samples, rewarded as they come (online_rloo); or a reward model on
preference pairs (bradley_terry, odin) or labelled steps (prm, orm).

SFT trains on the responses of conversations; DPO on the pairs of cal_consistency.py or make_pairs.py, with the starting
policy as its reference; rloo and grpo on responses that rewarding.py scored. --train_stage chooses the stage; by
default the data do. Departures from the released code: prompts and padding are not part of the loss, the gradients of
all processes are used, master weights are float32, and records that are too long are dropped and counted.
"""

from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from config import CHECKPOINTS, DATASET_FILES, DATASETS, Device, Model, RandomRun, for_next_stage, group
from cream.alarms import AlarmFlags
from cream.cli import console, names, preflight
from cream.cli.flags import parse
from cream.errors import UserError
from cream.files import store
from cream.files.folders import check_folder
from cream.files.lock import Lock
from cream.files.provenance import LAST, POLICY, Provenance
from cream.text.options import ThoughtUse, check_kwargs
from cream.training import advice, folder, options
from cream.training.launch import given_world, is_first_process
from cream.training.samples import SampleFlags
from cream.training.stages import STARTS

EXAMPLE = """\
  one CPU    python train.py --model tiny --name tiny_sft --epoch 2 --lr 4e-5 --train_bsz 32 --register tiny_m1
  two CPUs   python train.py --device cpu,cpu --model tiny --name tiny_sft --epoch 2 --lr 4e-5 --train_bsz 16
  8 GPUs     python train.py --device 0,1,2,3,4,5,6,7 --model llama3 --name oasst_sft --epoch 5 --lr 5e-6 --train_bsz 4
  DPO        python train.py --checkpoint tiny_m1 --name PAIRS --method consistency_avg --lr 2e-4 --train_bsz 32
  RLOO       python train.py --checkpoint tiny_m1 --name REWARDS --train_stage rloo --lr 2e-4 --train_bsz 16
  online     python train.py --checkpoint tiny_m1 --name QUESTIONS --train_stage online_rloo --reward labels
  reward     python train.py --checkpoint tiny_m1 --name PAIRS --train_stage bradley_terry --eval_share 0.2 --lr 1e-3"""


@dataclass
class TrainConfig:
    """train.py"""

    device: Device = group(Device)
    model: Model = group(Model)
    data: options.TrainData = group(options.TrainData)
    optimisation: options.Optimisation = group(options.Optimisation)
    lora: options.LoraFlags = group(options.LoraFlags)
    stage: options.StageFlags = group(options.StageFlags)
    thoughts: ThoughtUse = group(ThoughtUse)
    output: options.TrainOutput = group(options.TrainOutput)
    samples: SampleFlags = group(SampleFlags)
    alarms: AlarmFlags = group(AlarmFlags)
    run: RandomRun = group(RandomRun)


@console.stage
def main(argv=None):
    config = parse(TrainConfig, argv, description=__doc__, example=EXAMPLE)
    if not is_first_process():
        console.log.setLevel("WARNING")
    o, devices = config.optimisation, config.device.devices()
    options.check_installed(o, config.output, devices[0] == "cpu")
    dataset = config.data.name or ("tiny_sft" if config.model.name() == "tiny" else "oasst_sft")
    if not (data := names.dataset(dataset, DATASET_FILES, DATASETS)).exists():
        raise names.missing_data(dataset, data)
    limit = config.data.limit_size or (19 if config.run.debug else None)
    options.check_optimizer(o)
    name, stage = options.choose_stage(o.train_stage, config.stage, data, config.run.skip)
    start, provenance = config.model.folder(config.model.checkpoint), config.run.provenance()
    held_out, models = _add_inputs(config, stage, data, start, provenance)
    prompts = _other_data("sample_prompts", config.samples.sample_prompts)
    batch_size = o.global_batch(given_world() or len(devices))
    options.check_batch(name, stage, batch_size)
    header = {"settings": options.settings(config, name, stage, batch_size), "inputs": provenance.inputs}
    parts = Path(dataset).name.partition(".")[0], f"ckpt_{names.label(config.model.checkpoint)}", stage.label
    default = folder.default_name(header, config.output.run_name, *parts)
    run = Path(config.output.output_dir or config.run.outputs() / name / default)
    console.log.info("%s of %s on %s -> %s", name.upper(), start, data, run)
    if stage.summary:
        console.log.info(stage.summary)
    if config.output.register is not None:
        names.check_free(CHECKPOINTS, config.output.register, run / LAST, overwrite=config.run.overwrite)
    sources, overwrite = provenance.sources.values(), config.run.overwrite
    done = folder.finished(run, header, sources, overwrite, partial(_rewrites, config, stage, start))
    if config.run.dry_run:
        deque(store.read(data, store.detect(data, skip=config.run.skip), limit, skip=config.run.skip), maxlen=0)
        console.log.info("dry run: %s; nothing was written", "the run is up to date" if done else "it would train")
        return
    if done:
        console.say_result("%s is up to date (same settings and inputs); skipping", run)
        if is_first_process():
            folder.tidy_after_kill(run)
    else:
        with Lock(run) if is_first_process() else nullcontext():
            _train(config, name, stage, start, data, run, header, limit, provenance, held_out, prompts, models)
    if is_first_process():
        _finish(config, run, dataset)


def check(config: TrainConfig, about: dict | None = None) -> None:
    """Raises UserError where the flags of the stage that --train_stage names contradict each other, or the sidecar of
    the data, `about`."""
    options.check_optimizer(config.optimisation)
    if config.optimisation.train_stage is not None:
        options.build_stage(config.optimisation.train_stage, config.stage, about or {})


def _rewrites(config: TrainConfig, stage, start: Path) -> bool:
    """Whether the data are what the policy sampled, and its template writes that otherwise."""
    from cream.model.load import load_chat

    text = config.model.text() | config.thoughts.text()
    return stage.made_for_policy and load_chat(start, **text).rewrites


def _add_inputs(config: TrainConfig, stage, data: Path, start: Path, provenance: Provenance):
    """What the run is made of; data that were made for another policy than training starts from are refused. Returns
    the file of held-out records, or None, and the folders of the stage's other models."""
    check_folder(start, STARTS[stage.model])
    about = provenance.output("data", data) if stage.made_for_policy else provenance.file("data", data)
    provenance.model("start", start)
    config.model.add_template(provenance)
    if scored := (about or {}).get("scored"):
        check_kwargs(scored, config.model.chat_template_kwargs, data, provenance)
    policy = (about or {}).get("policy") if stage.made_for_policy else None
    if policy is not None and policy["fingerprint"] != provenance.inputs["start"]:
        provenance.object(
            f"{data}: its {stage.unit} were made for --checkpoint {policy['checkpoint'] or 'none'} of "
            f"{policy['model']}, but training would start from --checkpoint {config.model.checkpoint or 'none'}; give "
            "that one"
        )
    if config.optimisation.deepspeed is not None:
        provenance.file("deepspeed", config.optimisation.deepspeed)
    if hasattr(stage, "add_inputs"):
        stage.add_inputs(config, data, start, provenance)
    models = {}
    for name, checkpoint in getattr(stage, "models", {}).items():
        models[name] = config.model.folder(checkpoint, f"--{name}")
        check_folder(models[name], POLICY)
        provenance.model(name, models[name])
    held_out = _other_data("eval_name", getattr(getattr(stage, "held_out", None), "eval_name", None))
    if held_out is not None:
        provenance.file("held_out", held_out)
    return held_out, models


def _other_data(flag_name: str, name: str | None) -> Path | None:
    """The file of the data that a flag names, if it names any."""
    try:
        path = name and names.dataset(name, DATASET_FILES, DATASETS)
    except UserError as error:
        raise UserError(f"--{flag_name} {str(error).removeprefix('--name ')}") from None
    return path or None


def _train(config: TrainConfig, name, stage, start: Path, data: Path, run, header, limit, provenance, *others) -> None:
    from cream.training import launch, parallel
    from cream.training.job import Job
    from cream.training.run import work

    o = config.optimisation
    clear = folder.starts_again(run, header, config.run.overwrite, o.resume)
    deepspeed = None if o.deepspeed is None else parallel.read_settings(o.deepspeed)
    config.samples.check(stage.model, (deepspeed or {}).get("zero_optimization", {}).get("stage", 0))
    job = Job(config, name, stage, start, data, run, header, limit, clear, deepspeed, provenance, *others)
    saved_bytes = 4 if o.save_dtype == "float32" else 2
    preflight.check_disk(run, preflight.size_of_run(start, o.saves, saved_bytes, o.moment_bytes), "training")
    about = {**header["settings"], **header["inputs"], "run": str(run.resolve())}
    place = config.output.master_address, config.output.master_port
    try:
        launch.run(work, job, config.device.devices(), *place, about, alone=deepspeed is None)
    except KeyboardInterrupt as error:
        if not o.resume:
            error.add_note("but for --resume no")  # with it, it begins from scratch
        raise


def _finish(config: TrainConfig, run: Path, dataset: str) -> None:
    """Register the checkpoint and print the next commands."""
    name, last = config.output.register, run / LAST
    if name:
        names.register(CHECKPOINTS, name, last, overwrite=config.run.overwrite)
        console.log.info("registered as %s in %s", name, CHECKPOINTS.name)
    console.say_result("checkpoint: %s", last)
    advice.print_next(last, dataset, for_next_stage(config) | {"checkpoint": name or last})


if __name__ == "__main__":
    main()
