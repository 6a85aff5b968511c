"""Groups of flags that scripts share, and the names of models and datasets that they know.

A flag's help text gives its unit, default and meaning; spellings of the released scripts are aliases. Nothing here
imports torch, so that --help is fast.
"""

import os
from dataclasses import dataclass, field
from enum import Enum
from glob import glob
from pathlib import Path

from cream.cli import names
from cream.cli.flags import deciding, flag, spell
from cream.cli.names import ROOT
from cream.errors import UserError
from cream.evaluation.tasks import data_files
from cream.files.folders import REMOTE_CODE, is_adapter
from cream.files.provenance import Provenance
from cream.scoring.pool import Pool
from cream.text.templates import is_template_name, parse_variables

CHECKPOINTS = ROOT / "configs" / "checkpoint.json"
DATASETS = ROOT / "configs" / "dataset.json"
MAX_SEED = 2**32 - 1


class ModelEnum(Enum):
    """Base models by name; any Hugging Face id or folder works as well."""

    llama3 = "meta-llama/Meta-Llama-3-8B-Instruct"
    llama2 = "meta-llama/Llama-2-7b-chat-hf"
    smollm2 = names.SMOLLM2  # `make real` makes it
    tiny = names.TINY


DatasetEnum = Enum(
    "DatasetEnum",
    {  # name -> file, relative to the repository root; configs/dataset.json holds more, and any file works
        "oasst_sft": "localdata/oasst1.sft.json",
        "all_prompt": "localdata/prompt.json",
        "prompt_1": "localdata/prompt.1.json",
        "prompt_2": "localdata/prompt.2.json",
        "prompt_3": "localdata/prompt.3.json",
        **data_files(),  # all_test, and of every evaluation task its test and its train file
        "dpo_1": "localdata/dpo.1.json",
        "tiny_sft": "localdata/tiny/sft.json",
        "tiny_prompt_1": "localdata/tiny/prompt.1.json",
        "tiny_prompt_2": "localdata/tiny/prompt.2.json",
        "tiny_prompt_3": "localdata/tiny/prompt.3.json",
        **{f"tiny_{thing}_{t}": f"localdata/tiny/{thing}.{t}.json" for thing in ("books", "balls") for t in (1, 2)},
        "tiny_val": "localdata/tiny/val.json",
        "tiny_judge": "localdata/tiny/judge.json",
        "tiny_pairs": "localdata/tiny/pairs.json",
    },
)
MODEL_FILES = {m.name: m.value for m in ModelEnum}
DATASET_FILES = {d.name: d.value for d in DatasetEnum}


def has_gpu() -> bool:
    """Whether an NVIDIA device is there and visible; asks the system, not torch."""
    return bool(glob("/dev/nvidia[0-9]*")) and os.environ.get("CUDA_VISIBLE_DEVICES") != ""


@dataclass
class Device:
    """Device"""

    device: str = flag(
        "auto",
        "GPU ids, separated by commas, or cpu (cpu,cpu: two processes); auto: GPU 0 if there is one, else cpu",
        decides=False,
    )
    bf16: bool | None = flag(
        None,
        "compute matrix products in bfloat16 (in training the weights stay float32); none: on GPUs that support it",
    )

    def devices(self) -> list[str]:
        """["cpu", …] or GPU ids."""
        text = ("0" if has_gpu() else "cpu") if self.device.lower() == "auto" else self.device.lower()
        parts = [part.strip() for part in text.split(",")]
        on_cpu, on_gpus = {*parts} == {"cpu"}, all(map(str.isdigit, parts)) and len({*parts}) == len(parts)
        if not on_cpu and not on_gpus:
            raise UserError(
                f"--device {self.device}: expected auto, cpu, cpu,cpu (two processes) or distinct GPU ids such as 0,1"
            )
        if on_gpus and not has_gpu():
            raise UserError(f"--device {self.device}: no NVIDIA device is visible here; use --device cpu")
        return parts


def for_records(devices: list[str]) -> str:
    """--device for a stage that maps over records: all GPUs, or one CPU, since one process uses all cores."""
    return "cpu" if devices[0] == "cpu" else ",".join(devices)


@dataclass
class Cluster:
    """Cluster"""

    ray_address: str | None = flag(
        None,
        "run on all nodes of a running Ray cluster: auto, or ray://HOST:PORT; on its GPUs, or with --device cpu "
        "on its CPUs",
        decides=False,
    )
    num_replicas: int | None = flag(
        None,
        "with --ray_address: number of model replicas; none: as many as the GPUs have room for, or one per CPU node",
        low=1,
        decides=False,
    )
    tensor_parallel_size: int = flag(
        1,
        "devices that share one model, each with a part of every layer (infer.py: with vLLM on GPUs only)",
        low=1,
        decides=False,
    )

    def pool(self, device: Device) -> Pool:
        """The devices of a stage that maps over records: a replica on every --tensor_parallel_size of them.

        Of this machine's GPUs only those of --device are visible to this process and its children (set before torch
        looks).
        """
        group = self.tensor_parallel_size
        if self.ray_address is not None:
            if device.device.lower() not in ("auto", "cpu", "cuda"):
                raise UserError(
                    f"--device {device.device}: GPU ids refer to one machine; with --ray_address give cpu or cuda"
                )
            return Pool.of_cluster(self.ray_address, device.device.lower(), self.num_replicas, group)
        if self.num_replicas is not None:
            raise UserError(
                "--num_replicas goes with --ray_address; on one machine give the devices, such as --device 0,1,2,3"
            )
        devices = device.devices()
        if len(devices) % group:
            raise UserError(
                f"--device {device.device}: {len(devices)} devices cannot be split into groups of --tensor_parallel_size {group}"
            )
        kind = "cpu" if devices[0] == "cpu" else "cuda"
        if kind == "cuda":
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        return Pool(kind, len(devices) // group, group)

    def flags(self, device: Device) -> dict[str, object]:
        """These flags as the next stage's command needs them."""
        here = self.ray_address is None
        group = self.tensor_parallel_size
        return {
            "device": ",".join(device.devices()) if here else device.device,
            "ray_address": self.ray_address,
            "num_replicas": self.num_replicas,
            "tensor_parallel_size": group if group > 1 else None,
        }


@dataclass
class Model:
    """Model"""

    model: str | None = flag(
        None,
        "base model: llama3, llama2, smollm2, tiny, a Hugging Face id or a folder; none: llama3 with a GPU, tiny without",
        decides=False,
    )
    checkpoint: str | None = flag(
        None,
        "trained weights: a name in configs/checkpoint.json or a folder; none: the base model M0",
        decides=False,
    )
    chat_template: str | None = flag(
        None,
        "Jinja file to use instead of the tokenizer's chat template, or the name of another one that the tokenizer has",
        decides=False,
    )
    chat_template_kwargs: str | None = flag(
        None, "variables that the chat template reads, name=value,…: enable_thinking=no, say"
    )
    trust_remote_code: bool = flag(
        False, "run Python code that comes with a model and can do whatever you can: only for sources that you trust"
    )

    def name(self) -> str:
        """The model's name as given, with the default filled in."""
        return self.model or ("llama3" if has_gpu() else "tiny")

    def base(self) -> Path:
        """The folder of the base model M0."""
        return names.model(self.name(), MODEL_FILES)

    def folder(self, checkpoint: str | None, flag_name: str = "--checkpoint", external: bool = False) -> Path:
        """The folder of a checkpoint; the base model's for None. An adapter is merged into the model it was trained on.
        `external`: any base model may be named, too.

        From here on this process and its children run a model's own code, or refuse to, as --trust_remote_code says.
        """
        os.environ[REMOTE_CODE] = spell(self.trust_remote_code)
        if checkpoint is None:
            folder = self.base()
        elif external:
            folder = names.any_model(checkpoint, MODEL_FILES, CHECKPOINTS, flag_name)
        else:
            folder = names.checkpoint(checkpoint, CHECKPOINTS, flag_name)
        if not is_adapter(folder):
            return folder
        from cream.model.adapters import adapter_base, adapter_merged

        return adapter_merged(
            folder, adapter_base(folder, MODEL_FILES.get(self.name(), self.name()), self.base()), Path("outputs/merged")
        )

    def __post_init__(self):
        parse_variables(self.chat_template_kwargs)

    def text(self) -> dict[str, object]:
        """How text becomes tokens, as `load_chat` takes it."""
        template = None if self.chat_template is None else Path(self.chat_template)
        return {"chat_template": template, "variables": parse_variables(self.chat_template_kwargs)}

    def text_flags(self) -> dict[str, object]:
        """These flags as the next stage's command needs them."""
        return {"chat_template": self.chat_template, "chat_template_kwargs": self.chat_template_kwargs}

    def add_template(self, provenance: Provenance) -> None:
        """Add --chat_template, an input that decides the output: its file, or the name of one in the model's folder."""
        if self.chat_template is None:
            return
        if is_template_name(self.chat_template):
            provenance.content("chat_template", f"named {self.chat_template}")
        else:
            provenance.file("chat_template", self.chat_template)


@dataclass
class Run:
    """Run"""

    overwrite: bool = flag(
        False,
        "replace an existing output or registered name; repeated after an interruption, it resumes",
        decides=False,
    )
    force: bool = flag(
        False,
        "continue although an input has changed or belongs to something else; the output's sidecar records it",
        decides=False,
    )
    on_bad_record: str = flag(
        "fail",
        "malformed records: fail stops at the first; skip omits them and writes them to OUTPUT.rejected.jsonl",
        choices=("fail", "skip"),
    )
    dry_run: bool = flag(False, "print what would be read, computed and written, and exit", decides=False)

    @property
    def skip(self) -> bool:
        """Whether malformed records are skipped."""
        return self.on_bad_record == "skip"

    def provenance(self) -> Provenance:
        """The provenance of a new output."""
        return Provenance(self.force)


@dataclass
class TrialRun(Run):
    """Run"""

    debug: bool = flag(False, "quick trial: few records, outputs under outputs/debug")

    def outputs(self) -> Path:
        """The folder for outputs without a path of their own."""
        return Path("outputs/debug" if self.debug else "outputs")


@dataclass
class RandomRun(TrialRun):
    """Run"""

    seed: int = flag(0, "seed of all random choices", low=0, high=MAX_SEED)


def group(cls):
    """A nested group of flags."""
    return field(default_factory=cls)


def for_next_stage(config) -> dict[str, object]:
    """The flags of devices and model as the next stage's command needs them; None where it needs none."""
    device, model, cluster = config.device, config.model, getattr(config, "cluster", None)
    flags = cluster.flags(device) if cluster else {"device": for_records(device.devices())}
    flags |= {"model": model.name(), **model.text_flags()}
    flags |= {} if device.bf16 is None else {"bf16": device.bf16}
    return flags | ({"trust_remote_code": True} if model.trust_remote_code else {})


def settings(config, *idle: str) -> dict:
    """The flags that decide a script's output, without those that are `idle` in this run."""
    return {name: value for name, value in deciding(config).items() if name not in idle}
