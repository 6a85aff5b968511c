"""The flags of training that all stages share, and the choice of the stage, whose own flags are in its file."""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cream.cli import screen
from cream.cli.flag_fields import IF_GIVEN
from cream.cli.flags import as_dict, chosen, deciding, flag, one_of
from cream.errors import UserError, nearest
from cream.files import store
from cream.files.provenance import read_meta
from cream.records import nouns
from cream.training.stages import STAGES, implied_by

StageFlags = one_of({name: stage.Options for name, stage in STAGES.items()})
StageFlags.__module__, StageFlags.__qualname__ = __name__, "StageFlags"  # where pickle finds it, for other processes
MOMENT_BYTES = {"adamw": 8, "adamw_bf16": 4}  # by --optim: what the optimiser keeps of each trained weight
TRACKERS = ("tensorboard", "wandb", "trackio")  # packages that Accelerate logs to
# In the settings of every run since before stages had flags of their own, so that those runs are found again.
EVERY_RUN = {"method": "original", "beta": 0.1, "fixed_consistency": None}


@dataclass
class TrainData:
    """Data"""

    name: str | None = flag(
        None,
        "dataset: a built-in name (DatasetEnum in config.py), a name in configs/dataset.json, or a file; none: "
        "oasst_sft, or tiny_sft with the tiny model",
        decides=False,
    )
    limit_size: int | None = flag(None, "read at most this many records; none: all", low=1)
    max_length: int = flag(
        2048,
        "limit on tokens of prompt and response together; longer records are dropped, never truncated (the "
        "model's context length is a limit too)",
        low=2,
    )


@dataclass
class Optimisation:
    """Optimisation"""

    train_stage: str | None = flag(
        None, "training stage, whose own flags are listed below; none: inferred from the data", choices=tuple(STAGES)
    )
    epoch: int = flag(1, "passes over the data", low=1)
    train_bsz: int = flag(
        2,
        "examples (DPO: pairs) per process and step; global batch = train_bsz x processes x grad_accum",
        low=1,
        decides=False,
    )
    grad_accum: int = flag(
        1,
        "multiplies the global batch (see --train_bsz); memory depends on --max_tokens_per_batch, not on this",
        aliases=("gradient_accumulation_steps",),
        low=1,
        decides=False,
    )
    max_tokens_per_batch: int | None = flag(
        None,
        "tokens per forward and backward pass, with a pair's prompt counted once; none: as many as fit in "
        "memory, at most 512 (for a hidden size below 512 up to 4096) on a CPU and 65536 on a GPU (more is no faster)",
        low=1,
        decides=False,
    )
    optim: str = flag(
        "adamw",
        "optimiser: adamw, or adamw_bf16, which keeps AdamW's two moments in bfloat16 between steps: 4 bytes less for "
        "each trained weight",
        choices=tuple(MOMENT_BYTES),
        decides=IF_GIVEN,
    )
    lr: float = flag(1e-6, "peak learning rate of AdamW: linear warm-up, then cosine decay to 0", above=0)
    weight_decay: float = flag(0.01, "AdamW's decoupled weight decay", low=0)
    warmup_step_ratio: float = flag(0.1, "share of the steps in which the learning rate rises linearly", low=0, high=1)
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm", above=0)
    save_eval_step_ratio: float | None = flag(
        None,
        "how often to save a checkpoint: a value of 1 or more is the number of checkpoints, one below 1 the "
        "share of steps between two; none: one per epoch",
        above=0,
    )
    save_dtype: str = flag(
        "auto",
        "dtype of saved weights; auto: the dtype of the starting weights",
        choices=("auto", "float32", "bfloat16"),
    )
    grad_checkpointing: bool = flag(False, "recompute activations in the backward pass: less memory, more time")
    deepspeed: str | None = flag(
        None,
        "DeepSpeed configuration file, which shards gradients and optimiser states (ZeRO-2), with ZeRO-3 the "
        "weights too",
        decides=False,
    )
    compile: bool = flag(
        False, "torch.compile the layers: faster in long runs on GPUs (on a CPU it needs a C++ compiler)", decides=False
    )
    log_every: int = flag(
        10, "steps between two log lines (the first and last step are always logged)", low=1, decides=False
    )
    resume: bool = flag(
        True, "resume an interrupted run from its last saved state; no: start it from scratch", decides=False
    )

    def global_batch(self, processes: int) -> int:
        """Examples of a step, of all processes together."""
        return self.train_bsz * processes * self.grad_accum

    @property
    def moment_bytes(self) -> int:
        """Bytes that the optimiser keeps of each trained weight."""
        return MOMENT_BYTES[self.optim]

    @property
    def saves(self) -> int:
        """How many checkpoints are saved."""
        ratio = self.save_eval_step_ratio or self.epoch
        return round(ratio if ratio >= 1 else 1 / ratio)


@dataclass
class LoraFlags:
    """LoRA"""

    lora: bool = flag(
        False,
        "train low-rank adapters; a checkpoint holds the merged weights and the adapter",
        aliases=("enable",),
    )
    lora_r: int = flag(32, "rank", aliases=("r",), low=1)
    lora_alpha: float = flag(64, "scale numerator: the update is multiplied by alpha / r", aliases=("alpha",), above=0)
    lora_dropout: float = flag(0.1, "dropout on the adapters' input", aliases=("dropout",), low=0, below=1)


@dataclass
class TrainOutput:
    """Output"""

    output_dir: str | None = flag(
        None, "run folder; none: outputs/<stage>/<dataset>-ckpt_<name>[-<method>]-<hash of the settings>", decides=False
    )
    run_name: str | None = flag(None, "prefix of the run folder's name")
    register: str | None = flag(
        None, "name to register the last checkpoint under, in configs/checkpoint.json", decides=False
    )
    report_to: str | None = flag(
        None, f"where to log metrics, besides log.jsonl: {', '.join(TRACKERS)}; several with commas", decides=False
    )
    wandb_project_name: str = flag("CREAM", "project in these trackers", decides=False)
    wandb_entity_name: str | None = flag(None, "entity of --report_to wandb", decides=False)
    show_example: bool = flag(True, "print the first example with its loss mask", decides=False)
    master_address: str = flag("localhost", "address at which several processes meet", decides=False)
    master_port: int | None = flag(None, "its port; none: a free one", low=1, high=65535, decides=False)
    local_rank: int | None = flag(
        None,
        "accepted from the deepspeed launcher and ignored: the environment's LOCAL_RANK is used",
        low=0,
        decides=False,
    )

    def trackers(self) -> list[str]:
        """The names in --report_to. Raises UserError for others, and for those that are not installed."""
        names = [name.strip().lower() for name in (self.report_to or "").split(",") if name.strip()]
        for name in names:
            if name not in TRACKERS:
                raise UserError(f"--report_to {name}: expected {', '.join(TRACKERS)}{nearest(name, TRACKERS)}")
        if missing := [name for name in names if not _is_package(name)]:
            raise UserError(
                f"--report_to {','.join(missing)}: not installed; .venv/bin/pip install {' '.join(missing)}"
            )
        return names

    def tracker_variables(self, run: Path) -> dict[str, str]:
        """Environment variables of trackers that log a run: their files are in its folder, unless the user's own
        WANDB_DIR is set."""
        project = self.wandb_project_name
        variables = {
            "TENSORBOARD_LOGGING_DIR": str(run / project),
            "WANDB_PROJECT": project,
            "WANDB_ENTITY": self.wandb_entity_name,
            "WANDB_DIR": os.environ.get("WANDB_DIR", str(run)),
            "WANDB_SILENT": "true" if screen.is_quiet() else None,
        }
        return {name: value for name, value in variables.items() if value}

    @contextmanager
    def starting_trackers(self) -> Iterator[None]:
        """Within it trackers start. Raises UserError where one does not."""
        try:
            yield
        except Exception as error:  # of any kind: not logged in, no network, a version that its caller does not know
            raise UserError(
                f"--report_to {self.report_to}: it did not start: {error}; nothing more was trained"
            ) from None


def choose_stage(train_stage: str | None, flags, data: Path, skip: bool) -> tuple[str, object]:
    """(name, Stage) of the stage that --train_stage names, or that the records in `data` imply; `flags` is a
    StageFlags, `skip` whether malformed records are skipped.

    Raises UserError where the stage does not train on such records, where a flag belongs to another stage, or where
    the stage's own flags contradict each other or the data.
    """
    kind = store.detect(data, skip=skip)
    name = train_stage or implied_by(kind)
    if name is None or kind not in STAGES[name].RECORDS:
        trained = "; ".join(
            f"{each} trains on {' or '.join(map(nouns, stage.RECORDS))}"
            for each, stage in STAGES.items()
            if each == (train_stage or each)
        )
        given = "" if train_stage is None else f"--train_stage {train_stage}: "
        raise UserError(f"{given}{data} holds {nouns(kind)}; {trained}")
    return name, build_stage(name, flags, read_meta(data) or {})


def build_stage(name: str, flags, about: dict):
    """The Stage of this name; `about` is the sidecar of its data. Raises UserError as choose_stage does."""
    return STAGES[name].Stage(chosen(flags, name, "--train_stage"), about)


def check_optimizer(optimisation: Optimisation) -> None:
    """Raises UserError where DeepSpeed would get an optimiser that it does not know."""
    if optimisation.deepspeed is not None and optimisation.optim != "adamw":
        raise UserError(
            f"--optim {optimisation.optim} does not work with --deepspeed, which keeps AdamW's moments in float32, in "
            "shards over the processes; leave one of the two flags out"
        )


def check_batch(name: str, stage, global_batch: int) -> None:
    """Raises UserError where a step has fewer examples than the stage's loss needs."""
    if global_batch < (least := getattr(stage, "least_batch", 1)):
        raise UserError(
            f"--train_stage {name} needs at least {least} {stage.unit} a step, and here are {global_batch}: give "
            "--train_bsz or --grad_accum"
        )


def settings(config, name: str, stage, global_batch: int) -> dict:
    """{flag: value} that decide a run of train.py: of the stages' flags only those that `stage` says."""
    own = as_dict(config.stage) | as_dict(config.thoughts)
    shared = {flag: value for flag, value in deciding(config).items() if flag not in own or flag in EVERY_RUN}
    return (
        shared
        | EVERY_RUN
        | config.thoughts.settings()
        | stage.settings
        | {"train_stage": name, "global_batch": global_batch}
    )


def check_installed(optimisation: Optimisation, output: TrainOutput, cpu: bool) -> None:
    """Raises UserError where a flag asks for a program or package that is not installed."""
    output.trackers()
    if optimisation.compile and cpu:
        check_compiler("--compile on a CPU")


def _is_package(name: str) -> bool:
    """Whether it can be imported, and is more than a folder of that name, such as wandb's offline runs are in."""
    found = importlib.util.find_spec(name)
    return found is not None and found.origin is not None


def check_compiler(what: str) -> None:
    """Raises UserError where there is no C++ compiler, which `what` needs."""
    if not shutil.which(os.environ.get("CXX", "g++")):
        raise UserError(f"{what} needs a C++ compiler: install g++, or leave the flag out")
