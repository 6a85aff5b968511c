"""Online RLOO (arXiv 2402.14740): the policy samples groups of responses, a reward source rewards them, and their
leave-one-out advantages train it, step by step. trl's RLOOTrainer samples and trains (cream/training/online.py); the
reward is any of this project's, as rewarding.py would give it.

r(y) - kl · log(π(y) / π_start(y)) is a response's reward, its advantage what this is above the mean of the others of
its group. The policy of the data, that of the ratio and the one that is trained are the same at each step, so that
--clip_low and --clip_high decide nothing unless sampler and trainer differ by rounding.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, get_type_hints

from cream.cli.flags import as_dict, deciding, flag, one_of
from cream.engines import COLDEST, HOTTEST
from cream.errors import UserError
from cream.files import store
from cream.files.folders import check_folder
from cream.files.provenance import Provenance, read_kind
from cream.records import Item, Message, Prompt
from cream.rewards import REWARDS
from cream.training.policy_options import GradientOptions
from cream.training.stages.prm import STEP_SPLIT_HELP

if TYPE_CHECKING:
    from cream.rewards.live import Live

RECORDS = (Prompt, Item)
KL = 0.05  # of --kl_coef
ENGINES = ("transformers", "vllm_colocate", "vllm_server")
GIVEN = {  # flags of rewards that training has under the same name, or that have one value here
    "max_length", "seed", "thinking_tags", "max_tokens_per_batch", "batch_size", "score_from", "engine", "on_unparsed"
}  # fmt: skip


@dataclasses.dataclass
class Own(GradientOptions):
    """Online RLOO (online_rloo)"""

    reward: str | None = flag(
        None, "online_rloo: the reward source, as of rewarding.py, with its flags below", choices=tuple(REWARDS)
    )
    reward_checkpoint: str | None = flag(
        None,
        "dpo, likelihood, judge: the model that rewards, as --checkpoint of rewarding.py; none: the policy that "
        "training starts from, as it was",
        decides=False,
    )
    gen_n: int = flag(4, "responses per prompt and step", low=2)
    gen_temperature: float = flag(
        1.0,
        "sampling temperature; probabilities in the loss are at this temperature as well",
        low=COLDEST,
        high=HOTTEST,
    )
    gen_max_tokens: int = flag(256, "limit on tokens per response; --max_length holds for prompt and response", low=1)
    online_engine: str = flag(
        "transformers",
        "what samples: transformers, in the training process; vllm_colocate, vLLM on the same GPUs; vllm_server, a "
        "server started with `vllm serve` on others (--vllm_url)",
        choices=ENGINES,
    )
    step_split: str | None = flag(None, STEP_SPLIT_HELP)
    vllm_url: str = flag("http://localhost:8000", "vllm_server: its address", decides=False)
    vllm_memory: float = flag(
        0.3, "vllm_colocate: share of a GPU's memory that vLLM takes", above=0, high=1, decides=False
    )


def _with_rewards(own: type) -> type:
    """`own` and the flags of all reward sources, each once, as one group of flags."""
    fields = {}
    for source in REWARDS.values():
        hints = get_type_hints(source.Options)
        for field in dataclasses.fields(source.Options):
            if field.init and field.name not in GIVEN and not hasattr(own, field.name):
                fields[field.name] = (
                    hints[field.name],
                    dataclasses.field(default=field.default, metadata=field.metadata),
                )
    made = dataclasses.make_dataclass("Options", [(name, *field) for name, field in fields.items()], bases=(own,))
    made.__module__, made.__doc__ = __name__, own.__doc__
    return made


Options = _with_rewards(Own)


class Stage:
    """It brings its own trainer: `run`."""

    model = "logprobs"
    unit = "prompts"
    made_for_policy = False

    def __init__(self, options: Options, about: dict):
        self.options = o = options
        if o.reward is None:
            raise UserError(
                f"--train_stage online_rloo needs --reward, what rewards a response: {', '.join(REWARDS)}, with its "
                "flags (rewarding.py --help)"
            )
        for name, engine in (("vllm_url", "vllm_server"), ("vllm_memory", "vllm_colocate")):
            if getattr(o, name) != getattr(Own, name) and o.online_engine != engine:
                raise UserError(f"--{name} belongs to --online_engine {engine}, and here it is {o.online_engine}")
        self.kl_coef = KL if o.kl_coef is None else o.kl_coef
        self.rewarding = _rewarding(o)
        if o.reward_checkpoint is not None and all(p.model != "checkpoint" for p in self._passes):
            raise UserError(f"--reward {o.reward} has no use for --reward_checkpoint")
        own = {f.name for f in dataclasses.fields(Own)} - {"step_split"}
        self.settings = {name: value for name, value in deciding(o).items() if name in own}
        self.settings["kl_coef"] = self.kl_coef
        self.settings |= {name: value for name, value in deciding(self.rewarding).items() if name not in GIVEN}
        self.label = o.reward
        how = f"{o.gen_n} responses a prompt by {o.online_engine}"
        self.summary = f"reward {o.reward}, {how}, KL coefficient {self.kl_coef:g}"
        self.live: Live | None = None  # from `add_inputs` on
        self.gold: Live | None = None  # says which responses are right, for the log, where another source rewards

    @property
    def _passes(self) -> list:
        return REWARDS[self.options.reward].passes(self.rewarding)

    def add_inputs(self, config, data: Path, start: Path, provenance: Provenance) -> None:
        """What the reward is made of, beside prompts and policy. Raises UserError where that does not suit."""
        from cream.rewards.live import Live
        from cream.rewards.stage import add_source

        if self.options.online_engine != "transformers" and config.device.devices()[0] == "cpu":
            raise UserError(
                f"--online_engine {self.options.online_engine} needs GPUs: on a CPU vLLM packs its weights, and cannot "
                "take those of the policy after each step; --online_engine transformers can"
            )
        if config.optimisation.compile:
            raise UserError("--compile: not with --train_stage online_rloo, whose trainer is another")
        if config.samples.sample_prompts is not None:
            raise UserError(
                "--sample_prompts: not with --train_stage online_rloo; infer.py samples from its checkpoints"
            )
        rewarding, kind = self.rewarding, store.detect(data, skip=config.run.skip)
        given = {"max_length": config.data.max_length, "seed": config.run.seed, "engine": "hf"}
        for name, value in (given | {"thinking_tags": config.thoughts.thinking_tags}).items():
            if hasattr(rewarding, name):
                setattr(rewarding, name, value)
        if kind is Item and getattr(rewarding, "labels", "") is None:
            rewarding.labels = str(data)
        Live(self.options.reward, copy.copy(rewarding), {}).prepare(read_prompts(config, data), config.run.skip)
        folders = {}
        for p in self._passes:
            if p.model == "checkpoint" and self.options.reward_checkpoint is None:
                folders[p.role] = start
            elif p.model == "checkpoint":
                name = self.options.reward_checkpoint
                folders[p.role] = config.model.folder(name, "--reward_checkpoint", external=True)
            else:
                folders[p.role] = config.model.folder(getattr(rewarding, p.model), f"--{p.model}", p.external)
            check_folder(folders[p.role], p.kind)
        if hasattr(rewarding, "step_split") and self.options.step_split is None:
            recorded = read_kind(folders["rm"]).get("steps", {}).get("split")
            rewarding.step_split = self.settings["step_split"] = recorded or rewarding.step_split
        live = Live(self.options.reward, rewarding, {})
        add_source(provenance, live.run, folders, "reward_", "reward_checkpoint")
        hashes = {role: provenance.inputs[f"reward_{role}"] for role in folders}
        own = {role: (folder.absolute(), hashes[role]) for role, folder in folders.items()}
        self.live = dataclasses.replace(live, folders=own)
        if kind is Item and self.options.reward != "labels":
            flags = REWARDS["labels"].Options(labels=str(data), thinking_tags=config.thoughts.thinking_tags)
            self.gold = Live("labels", flags, {})

    def run(self, job) -> dict:
        """Train, and save checkpoints; returns what the run's sidecar says of it."""
        from cream.training.online import train

        return train(job)


def _rewarding(options: Options) -> object:
    """The flags of the chosen reward source. Raises UserError for those of another one."""
    from cream.rewards.stage import choose

    values = {name: value for name, value in as_dict(options).items() if value is not None}
    known = {
        name: source.Options(**{f.name: values[f.name] for f in dataclasses.fields(source.Options) if f.name in values})
        for name, source in REWARDS.items()
    }
    groups = one_of({name: source.Options for name, source in REWARDS.items()})(**known)
    return choose(groups, options.reward, None)[1]


def read_prompts(config, data: Path) -> list[Prompt]:
    """The prompts of a file: of labelled questions their text."""
    kind, limit = store.detect(data, skip=config.run.skip), config.data.limit_size or (19 if config.run.debug else None)
    records = store.read(data, kind, limit, skip=config.run.skip)
    return [
        Prompt(uuid=each.uuid, messages=[Message("user", each.question)]) if isinstance(each, Item) else each
        for each in records
    ]
