"""Make an ArmoRM (2406.12845) of a reward model: its reward is a mixture of named attributes, chosen by the prompt.

The reward model is frozen. Each attribute is a ridge regression from its hidden state at the end of the response, on
rated responses; what goes with length is taken out of each; a gate, which reads the prompt alone, weighs them, trained
on preference pairs. `rewarding.py --reward armo` scores by the result and shows each prompt's coefficients. Departures
from the released code: the gate's softmax is over attributes, it is trained on the debiased rewards, and everything
that a score needs is saved.
"""

from dataclasses import dataclass
from pathlib import Path

from config import CHECKPOINTS, Device, RandomRun, group, settings
from config import Model as ModelFlags
from cream.cli import advice, console, names
from cream.cli.console import log
from cream.cli.flags import flag, parse
from cream.errors import UserError
from cream.files import store
from cream.files.folders import check_folder
from cream.files.lock import Lock
from cream.files.provenance import REWARD_MODEL
from cream.records import Pair, Ratings

EXAMPLE = """\
  python train_armo.py --reward_model RM --ratings ratings.json --pairs pairs.json --output_dir outputs/armo
  python rewarding.py --reward armo --reward_model outputs/armo --input_file S.json"""


@dataclass
class ArmoFlags:
    """ArmoRM"""

    reward_model: str | None = flag(
        None,
        "the frozen reward model: a name in configs/checkpoint.json, a folder, or a Hugging Face id",
        decides=False,
    )
    ratings: str | None = flag(
        None, "rated responses: messages and ratings, attribute -> number or null", decides=False
    )
    pairs: str | None = flag(None, "preference pairs, which the gate is trained on", decides=False)
    reference: str | None = flag(
        None, "preference pairs on which attributes are debiased of length; none: those of --pairs", decides=False
    )
    output_dir: str = flag("outputs/armo", "folder for the result", decides=False)
    register: str | None = flag(None, "name of the result in configs/checkpoint.json; none: no name", decides=False)
    verbosity: str | None = flag(
        "helpsteer-verbosity", "the attribute that stands for length; none: nothing is debiased"
    )
    corr_threshold: float = flag(
        0.03, "highest rank correlation with --verbosity that an attribute may keep", low=-1, high=1
    )
    max_length: int = flag(4096, "limit on tokens of a conversation; longer ones are dropped", low=2)
    max_tokens_per_batch: int | None = flag(
        None, "tokens per batch; none: as many as fit in memory", low=1, decides=False
    )


@dataclass
class GateFlags:
    """Gate"""

    gate_width: int = flag(1024, "units of a hidden layer", low=1)
    gate_layers: int = flag(3, "hidden layers", low=1)
    gate_dropout: float = flag(0.2, "dropout after each of them in training", low=0, below=1)
    gate_temperature: float = flag(10.0, "temperature of the softmax over attributes", above=0)
    gate_steps: int = flag(2000, "optimiser steps", low=1)
    gate_batch: int = flag(1024, "pairs of a step, drawn with replacement", low=1)
    gate_lr: float = flag(1e-3, "learning rate of AdamW, which falls to 0 along a cosine", above=0)
    gate_weight_decay: float = flag(0.0, "weight decay", low=0)


@dataclass
class ArmoConfig:
    """train_armo.py"""

    device: Device = group(Device)
    model: ModelFlags = group(ModelFlags)
    armo: ArmoFlags = group(ArmoFlags)
    gate: GateFlags = group(GateFlags)
    run: RandomRun = group(RandomRun)


@console.stage
def main(argv=None):
    config = parse(ArmoConfig, argv, description=__doc__, example=EXAMPLE)
    a, run, devices = config.armo, config.run, config.device.devices()
    check(config)
    if len(devices) > 1:
        raise UserError(f"--device {config.device.device}: an ArmoRM is made on one device; give one")
    backbone = config.model.folder(a.reward_model, "--reward_model", True)
    check_folder(backbone, REWARD_MODEL)
    files = {name: Path(path) for name in ("ratings", "pairs", "reference") if (path := getattr(a, name))}
    provenance = run.provenance()
    provenance.model("reward_model", backbone)
    for name, path in files.items():
        kind = Ratings if name == "ratings" else Pair
        store.refuse_other_kind(f"--{name}", path, kind, "which prepare_data.py import writes")
        provenance.file(name, path)
    config.model.add_template(provenance)
    header = {"settings": settings(config), "inputs": provenance.inputs}
    output = Path(a.output_dir)
    if a.register is not None:
        names.check_free(CHECKPOINTS, a.register, output, overwrite=run.overwrite)
    from cream.training import armo_run

    if armo_run.is_up_to_date(output, header, run.overwrite):
        console.say_result("%s is up to date (same settings and inputs); skipping", output)
    elif run.dry_run:
        log.info("dry run: would write %s; nothing was written", output)
        return
    else:
        with Lock(output):
            _train(config, backbone, files, output, header, provenance, devices)
    if a.register and not run.dry_run:
        names.register(CHECKPOINTS, a.register, output, overwrite=run.overwrite)
    console.say_result("ArmoRM: %s", output)
    advice.say("next:\n  %s", console.command("rewarding.py", reward="armo", reward_model=a.register or output,
                                             input_file="SAMPLES"))  # fmt: skip


def _train(config: ArmoConfig, backbone, files, output, header, provenance, devices) -> None:
    import torch

    from cream.model.armo import GateShape
    from cream.training import armo_run
    from cream.training.armo import GateTraining

    a, g = config.armo, config.gate
    shape = GateShape(g.gate_width, g.gate_layers, g.gate_dropout, g.gate_temperature)
    gate = GateTraining(g.gate_steps, g.gate_batch, g.gate_lr, g.gate_weight_decay)
    armo_run.make(
        armo_run.Job(
            backbone,
            files,
            output,
            header,
            provenance,
            torch.device("cpu" if devices[0] == "cpu" else f"cuda:{devices[0]}"),
            config.device.bf16,
            config.model.text(),
            a.max_length,
            a.max_tokens_per_batch,
            a.verbosity,
            a.corr_threshold,
            shape,
            gate,
            config.run.seed,
            config.run.skip,
        )
    )


def check(config: ArmoConfig) -> None:
    """Raises UserError where a flag is missing."""
    missing = [f"--{name}" for name in ("reward_model", "ratings", "pairs") if getattr(config.armo, name) is None]
    if missing:
        raise UserError(f"{', '.join(missing)} missing: an ArmoRM is made of a reward model, ratings and pairs")


if __name__ == "__main__":
    main()
