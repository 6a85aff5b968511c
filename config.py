"""The flags of every script: one dataclass per script, put together from shared groups; the names they know.

Unit, default and meaning of every flag stand in its help text; the spellings of the method's released scripts are kept as
aliases. Nothing here imports torch, so that every --help answers at once.
"""

import os
from dataclasses import dataclass, field
from enum import Enum
from glob import glob
from pathlib import Path

from cream.cli import names
from cream.cli.flags import deciding, flag, spelled
from cream.cli.names import ROOT
from cream.engines import ENGINES
from cream.errors import UserError
from cream.evaluation.choices import FORMATS, NORMS, SCORINGS
from cream.files.folders import REMOTE_CODE
from cream.files.provenance import Provenance
from cream.records import METHODS, RANKS
from cream.rewards import REWARDS
from cream.scoring.pool import Pool
from cream.text.prompts import SYSPROMPTS

CHECKPOINTS = ROOT / "configs" / "checkpoint.json"
DATASETS = ROOT / "configs" / "dataset.json"
MAX_SEED = 2**32 - 1


class ModelEnum(Enum):
    """Base models by name; any Hugging Face id or folder works as well."""

    llama3 = "meta-llama/Meta-Llama-3-8B-Instruct"
    llama2 = "meta-llama/Llama-2-7b-chat-hf"
    tiny = "assets/tiny_m0"


class DatasetEnum(Enum):
    """Datasets by name, files relative to the repository root; configs/dataset.json holds more, and any file works."""

    oasst_sft = "localdata/oasst1.sft.json"
    all_prompt = "localdata/prompt.json"
    prompt_1 = "localdata/prompt.1.json"
    prompt_2 = "localdata/prompt.2.json"
    prompt_3 = "localdata/prompt.3.json"
    arc_easy_test = "localdata/arc-easy/test.json"
    arc_challenge_test = "localdata/arc-challenge/test.json"
    openbookqa_test = "localdata/openbookqa/test.json"
    siqa_test = "localdata/siqa/test.json"
    gsm8k_test = "localdata/gsm8k/test.json"
    all_test = "localdata/all_test.json"
    arc_easy_train = "localdata/arc-easy/train.json"
    arc_challenge_train = "localdata/arc-challenge/train.json"
    openbookqa_train = "localdata/openbookqa/train.json"
    siqa_train = "localdata/siqa/train.json"
    gsm8k_train = "localdata/gsm8k/train.json"
    dpo_1 = "localdata/dpo.1.json"
    tiny_sft = "localdata/tiny/sft.json"
    tiny_prompt_1 = "localdata/tiny/prompt.1.json"
    tiny_prompt_2 = "localdata/tiny/prompt.2.json"
    tiny_prompt_3 = "localdata/tiny/prompt.3.json"
    tiny_val = "localdata/tiny/val.json"
    tiny_test = "localdata/tiny/test.json"


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
        "comma list of GPU ids, or cpu (cpu,cpu works in two processes); auto: GPU 0 where there is one, else cpu",
        decides=False,
    )
    bf16: bool | None = flag(
        None, "bfloat16 matrix products; none: where the device has it. Weights always train in float32"
    )

    def devices(self) -> list[str]:
        """["cpu", …] or GPU ids."""
        text = ("0" if has_gpu() else "cpu") if self.device.lower() == "auto" else self.device.lower()
        parts = [part.strip() for part in text.split(",")]
        if not (all(p == "cpu" for p in parts) or all(p.isdigit() for p in parts)) or len(set(parts) - {"cpu"}) not in (
            0,
            len(parts),
        ):
            raise UserError(f"--device {self.device}: expected cpu, cpu,cpu or distinct GPU ids such as 0,1")
        if parts[0] != "cpu" and not has_gpu():
            raise UserError(f"--device {self.device}: no NVIDIA device is visible here; use --device cpu")
        return parts


def for_records(devices: list[str]) -> str:
    """--device for a stage that maps over records: all GPUs; of CPUs one, for a process has all their cores."""
    return "cpu" if devices[0] == "cpu" else ",".join(devices)


@dataclass
class Cluster:
    """Cluster"""

    ray_address: str | None = flag(
        None,
        "auto, or ray://HOST:PORT: replicas on all nodes of a running Ray cluster, on its GPUs or (--device cpu) CPUs",
        decides=False,
    )
    num_replicas: int | None = flag(
        None,
        "with --ray_address, models side by side; none: as many as the GPUs carry, or one a node of CPUs",
        low=1,
        decides=False,
    )
    tensor_parallel_size: int = flag(
        1,
        "devices that hold one model together, each a part of every layer; infer.py: with vLLM, on GPUs",
        low=1,
        decides=False,
    )

    def pool(self, device: Device) -> Pool:
        """Where a stage that maps over records works: a replica on every --tensor_parallel_size devices.

        Of this machine's GPUs only those of --device are visible to this process and its children (set before torch
        looks).
        """
        group = self.tensor_parallel_size
        if self.ray_address is not None:
            if device.device.lower() not in ("auto", "cpu", "cuda"):
                raise UserError(
                    f"--device {device.device}: ids are of one machine; with --ray_address give cpu or cuda"
                )
            return Pool.of_cluster(self.ray_address, device.device.lower(), self.num_replicas, group)
        if self.num_replicas is not None:
            raise UserError("--num_replicas goes with --ray_address; on one machine --device says how many, as 0,1,2,3")
        devices = device.devices()
        if len(devices) % group:
            raise UserError(
                f"--device {device.device}: {len(devices)} devices do not make groups of --tensor_parallel_size {group}"
            )
        kind = "cpu" if devices[0] == "cpu" else "cuda"
        if kind == "cuda":
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        return Pool(kind, len(devices) // group, group)

    def flags(self, device: Device) -> dict[str, object]:
        """The flags that say the same to the next stage."""
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
        "llama3, llama2, tiny, a Hugging Face id or a folder; none: llama3 with a GPU, tiny without",
        decides=False,
    )
    checkpoint: str | None = flag(
        None,
        "weights in place of the base model's: a name in configs/checkpoint.json or a folder; none: the base model M0",
        decides=False,
    )
    chat_template: str | None = flag(None, "Jinja file used in place of the tokenizer's chat template", decides=False)
    trust_remote_code: bool = flag(
        False, "run Python files that come with a model: they can do whatever you can; only for sources that you trust"
    )

    def name(self) -> str:
        """The model's name as given, with the default filled in."""
        return self.model or ("llama3" if has_gpu() else "tiny")

    def base(self) -> Path:
        """The folder of the base model M0."""
        return names.model(self.name(), MODEL_FILES)

    def folder(self, checkpoint: str | None, flag_name: str = "--checkpoint") -> Path:
        """The folder of a checkpoint; the base model's for None. An adapter is merged into the model it was trained on.

        From here on this process and its children run a model's own code, or refuse to, as --trust_remote_code says.
        """
        os.environ[REMOTE_CODE] = spelled(self.trust_remote_code)
        folder = self.base() if checkpoint is None else names.checkpoint(checkpoint, CHECKPOINTS, flag_name)
        if (folder / "config.json").exists() or not (folder / "adapter_config.json").exists():
            return folder
        from cream.model.lora import adapter_base, adapter_merged

        return adapter_merged(
            folder, adapter_base(folder, MODEL_FILES.get(self.name(), self.name()), self.base()), Path("outputs/merged")
        )

    def template(self) -> Path | None:
        """The file of --chat_template."""
        return None if self.chat_template is None else Path(self.chat_template)

    def add_template(self, provenance: Provenance) -> None:
        """The file of --chat_template is an input that decides an output."""
        if self.chat_template is not None:
            provenance.file("chat_template", self.chat_template)


@dataclass
class Run:
    """Run"""

    overwrite: bool = flag(
        False, "replace an output (or a registered name) that stands; interrupted, it goes on", decides=False
    )
    force: bool = flag(
        False,
        "go on where an input is not what its sidecar says, or belongs to something else; the output's sidecar says so",
        decides=False,
    )
    on_bad_record: str = flag(
        "fail",
        "fail: a malformed record ends the stage; skip: it is left out, and written to OUTPUT.rejected.jsonl",
        choices=("fail", "skip"),
    )
    dry_run: bool = flag(False, "say what would be read, computed and written, and stop", decides=False)

    @property
    def skip(self) -> bool:
        """Whether malformed records are passed over."""
        return self.on_bad_record == "skip"

    def provenance(self) -> Provenance:
        """That of an output in the making."""
        return Provenance(self.force)


@dataclass
class TrialRun(Run):
    """Run"""

    debug: bool = flag(False, "a quick trial: few records, outputs under outputs/debug")

    def outputs(self) -> Path:
        """The folder below which outputs go unless a flag names another place."""
        return Path("outputs/debug" if self.debug else "outputs")


@dataclass
class RandomRun(TrialRun):
    """Run"""

    seed: int = flag(0, "seed of everything random", low=0, high=MAX_SEED)


def group(cls):
    """A nested group of flags."""
    return field(default_factory=cls)


@dataclass
class Generation:
    """Generation"""

    mode: str = flag(
        "sampling",
        "sampling: answers for training; evaluation: answers to questions, graded; rescore: grade such a file again",
        choices=("sampling", "evaluation", "rescore"),
    )
    name: str | None = flag(
        None, "dataset: a member of DatasetEnum, a name in configs/dataset.json, or a file", decides=False
    )
    input_file: str | None = flag(None, "rescore: the evaluation results to grade again", decides=False)
    limit_size: int | None = flag(None, "records read at most; none: all", low=1)
    gen_n: int | None = flag(
        None,
        "answers per prompt; none: 5 in sampling, 1 in evaluation, which is greedy; more are sampled there, and vote",
        low=1,
    )
    gen_temperature: float = flag(0.8, "sampling temperature; below 0.001: greedy", low=0)
    top_p: float = flag(0.95, "nucleus: the smallest set of tokens with this probability", above=0, high=1)
    gen_max_tokens: int = flag(768, "tokens of an answer at most", low=1)
    do_sample: bool = flag(True, "no: one greedy answer per prompt")
    max_length: int = flag(2048, "tokens of a prompt at most; longer ones are dropped, never cut", low=2)
    sysprompt: str = flag(
        "auto",
        "text appended to the user's; none: nothing; auto: none in sampling, the task's own in evaluation",
        choices=("auto", *SYSPROMPTS),
    )
    few_shot: int = flag(0, "evaluation: solved examples in front of each question, the same for all of a task", low=0)
    few_shot_file: str | None = flag(
        None,
        "questions with labels that they are drawn from; none: train.json beside the task's test.json",
        decides=False,
    )
    extraction: str = flag(
        "default",
        "how an answer is read: default, or strict (the method's released rules)",
        choices=("default", "strict"),
    )
    scoring: str = flag(
        "generate",
        "evaluation: generate an answer and read it, or compare the options' log-likelihoods, nothing to be read",
        choices=SCORINGS,
    )
    prompt_format: str = flag(
        "plain",
        "loglikelihood: plain, options as continuations of a text, lm-evaluation-harness's; chat, as an assistant's answers",
        choices=FORMATS,
    )
    length_norm: str = flag(
        "chars",
        "loglikelihood: what an option's is divided by before the largest wins (the summary has all); none is the harness's acc, chars its acc_norm",
        choices=tuple(NORMS),
    )

    def answers(self) -> int:
        """Answers per prompt, as asked for or as the mode has it."""
        return self.gen_n or (5 if self.mode == "sampling" else 1)


@dataclass
class EngineFlags:
    """Engine"""

    engine: str = flag(
        "auto",
        "auto: vLLM where it is installed and can run the model, hf elsewhere and for tiny models",
        choices=("auto", *ENGINES),
    )
    max_tokens_per_batch: int = flag(
        16384, "hf engine: rows x (prompt + answer) tokens of a batch", low=1, decides=False
    )
    gpu_memory_utilization: float = flag(0.9, "vLLM on a GPU: share of its memory", above=0, high=1, decides=False)


@dataclass
class InferOutput:
    """Output"""

    output_dir: str | None = flag(
        None, "file or folder; none: below outputs/sampling or outputs/evaluation", decides=False
    )
    show_example: bool = flag(True, "print the first prompt as the model sees it", decides=False)


@dataclass
class InferConfig:
    """infer.py"""

    device: Device = group(Device)
    cluster: Cluster = group(Cluster)
    model: Model = group(Model)
    generation: Generation = group(Generation)
    engine: EngineFlags = group(EngineFlags)
    output: InferOutput = group(InferOutput)
    run: RandomRun = group(RandomRun)


@dataclass
class Rewarding:
    """Rewarding"""

    input_file: str | None = flag(None, "samples, as infer.py --mode sampling writes them", decides=False)
    reward: str | None = flag(
        None,
        "dpo: policy minus reference; likelihood: the policy alone; none: dpo, or as --enable_ref_model says",
        choices=tuple(REWARDS),
    )
    enable_ref_model: bool | None = flag(
        None, "the method's name for --reward: yes is dpo, no is likelihood", aliases=("enable_ref",), decides=False
    )
    ref_model_ckpt: str | None = flag(
        None, "dpo: the reference, a name or a folder; none: the base model M0", decides=False
    )
    normalize: str | None = flag(
        None, "of log-likelihoods over answer tokens; none: sum for dpo, mean for likelihood", choices=("sum", "mean")
    )
    limit_size: int | None = flag(None, "records read at most; none: all", low=1)
    max_length: int = flag(4096, "tokens of prompt and answer together; longer answers are dropped, never cut", low=2)
    max_tokens_per_batch: int | None = flag(
        None,
        "tokens of a batch, a prompt counted once for its answers; none: what the memory carries, at most 4096 on a "
        "CPU and 65536 on a GPU (more is no faster)",
        low=1,
        decides=False,
    )
    batch_size: int | None = flag(
        None, "the method's way to bound a batch: rows of --max_length tokens", low=1, decides=False
    )
    score_from: str = flag(
        "model",
        "the policy's log-probabilities: model computes them (or takes those kept beside the samples); sampling takes the sampler's own where the tokens match",
        choices=("model", "sampling"),
    )
    output: str | None = flag(
        None,
        "file; none: <input>.rewarding.<model>-<reward>-policy_<ckpt>-ref_<ckpt>.json",
        aliases=("output_dir",),
        decides=False,
    )
    show_example: bool = flag(True, "print the first answer with its scored tokens marked", decides=False)


@dataclass
class RewardConfig:
    """rewarding.py"""

    device: Device = group(Device)
    cluster: Cluster = group(Cluster)
    model: Model = group(Model)
    rewarding: Rewarding = group(Rewarding)
    run: TrialRun = group(TrialRun)


@dataclass
class Consistency:
    """Consistency and pairs"""

    file1: str | None = flag(None, "rewards by the current model; its ranking gives the pairs", decides=False)
    file2: str | None = flag(
        None, "rewards by the previous model; none: consistency 1 everywhere (plain self-rewarding)", decides=False
    )
    method: str | None = flag(
        None,
        "which C training is to use, recorded for train.py (a rank's name is taken as --rank)",
        choices=(*METHODS, *RANKS),
    )
    rank: str | None = flag(None, "agreement of two rankings; none: kendall", choices=RANKS)
    labels: str | None = flag(
        None,
        "evaluation-layout file matched by uuid: pairs as the Oracle chooses them, best-rewarded correct against worst-rewarded wrong",
        decides=False,
    )
    shuffle_consistency: int | None = flag(
        None, "seed: deal the c's out to other prompts (control)", low=0, high=MAX_SEED
    )
    keep_truncated: bool = flag(False, "let answers that were cut at the length limit into pairs")
    beta: float = flag(0.1, "for the printed margin cap logit(C) / beta only", above=0, decides=False)
    output: str | None = flag(None, "file; none: <file1>.<rank>.dpo.json", aliases=("output_dir",), decides=False)
    register: str | None = flag(None, "name under which the pairs enter configs/dataset.json", decides=False)


@dataclass
class ConsistencyConfig:
    """cal_consistency.py"""

    consistency: Consistency = group(Consistency)
    run: Run = group(Run)


def __getattr__(name: str) -> dict:
    """SCRIPTS: script -> the class of its flags; a script defines its own, and imports this module."""
    if name != "SCRIPTS":
        raise AttributeError(name)
    from train import TrainConfig

    return {
        "train.py": TrainConfig,
        "infer.py": InferConfig,
        "rewarding.py": RewardConfig,
        "cal_consistency.py": ConsistencyConfig,
    }


def settings(config, *idle: str) -> dict:
    """What of a script's flags decides its output, but for those that are `idle` in this run."""
    return {name: value for name, value in deciding(config).items() if name not in idle}
