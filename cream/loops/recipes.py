"""A recipe -> the stage commands of the whole loop, in order. iterate.py runs them; each passes over what stands.

A recipe is a YAML file: the base model, the number of iterations, one prompt set per iteration, and the flags of each
stage. Round t samples from M_t, ranks the answers by M_t and by M_{t-1} (in round 1 M0's likelihood), and trains
M_{t+1}.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
import yaml

from cream.cli.flags import is_plain, spelled
from cream.errors import UserError
from cream.files import store

T = TypeVar("T")
Flags = dict[str, str | int | float | bool | None]


class Recipe(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What a recipe file holds. Each map of flags goes to its stage as it stands.

    `base_dir` holds what recipes of one family share (M1, what was measured of M0 and M1, round 1's samples and
    rewards); `output_dir` what is this recipe's own.
    """

    title: str
    model: str
    iterations: int
    prompts: list[str]
    base_dir: str
    output_dir: str
    seed: int = 0
    sft: Flags = {}
    sampling: Flags = {}
    rewarding: Flags = {}
    consistency: Flags = {}
    dpo: Flags = {}
    evaluation: Flags = {}

    def __post_init__(self):
        if odd := [text for text in (self.title, self.model, self.base_dir, self.output_dir) if not is_plain(text)]:
            raise ValueError(f"{odd[0]!r} is no text: it is empty, or has a NUL or half of a character")
        if not 1 <= self.iterations <= len(self.prompts):
            raise ValueError(
                f"{self.iterations} iterations need as many prompt sets; `prompts` has {len(self.prompts)}"
            )


@dataclass(frozen=True)
class Command:
    """One stage of the loop: `script` with `flags`, and what it makes."""

    title: str
    script: str
    flags: dict
    output: Path

    def argv(self) -> list[str]:
        """The flags as words of a command line; a null is spelled none."""
        return [word for name, value in self.flags.items() for word in (f"--{name}", spelled(value))]


class _Loader(yaml.SafeLoader):
    """Plain data only, and no key twice: YAML would take the last."""

    def construct_mapping(self, node, deep=False):
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [key for key, count in keys.items() if count > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file. Raises UserError naming the file and the key."""
    with store.open_file(path) as file:
        try:
            value = yaml.load(file, _Loader)
        except Exception as error:  # it raises what it will: a KeyError on `!!bool x`, an IndexError on `!!int ""`
            raise UserError(f"{path}: not valid YAML: {error or type(error).__name__}") from None
    try:
        return msgspec.convert(value, Recipe)
    except msgspec.ValidationError as error:
        raise UserError(f"{path}: {error}") from None


def plan(recipe: Recipe, device: str, round_device: str | None = None, bf16: bool | None = None) -> list[Command]:
    """All commands of a recipe. `device` goes to training; `round_device` (default: the same) to the other stages.

    `bf16` goes to every stage that runs a model, in place of what the recipe says; None leaves it to them.
    """
    base, own = Path(recipe.base_dir), Path(recipe.output_dir)
    mapping = {"model": recipe.model, "device": round_device or device}
    first = {  # what a stage gets unless the recipe says otherwise
        "train.py": {"model": recipe.model, "device": device, "seed": recipe.seed},
        "infer.py": mapping | {"seed": recipe.seed},
        "rewarding.py": mapping,
    }
    last = {} if bf16 is None else dict.fromkeys(first, {"bf16": bf16})

    def command(title: str, script: str, flags: dict, to: str, output: Path) -> Command:
        flags = {**first.get(script, {}), **flags, to: output, **last.get(script, {})}
        return Command(title, script, flags, output)

    def evaluation(model: str, checkpoint: Path | None, root: Path) -> Command:
        flags = {"mode": "evaluation", "checkpoint": checkpoint, **recipe.evaluation}
        return command(f"accuracy of {model}", "infer.py", flags, "output_dir", root / f"{model}.evaluation.json")

    def training(model: str, flags: dict, root: Path) -> Command:
        return command(f"train {model}", "train.py", flags, "output_dir", root / model)

    commands = [
        evaluation("M0", None, base),
        training("M1", {"train_stage": "sft", **recipe.sft}, base),
        evaluation("M1", base / "M1/checkpoint-last", base),
    ]
    previous, current = None, base / "M1/checkpoint-last"
    for t in range(1, recipe.iterations + 1):
        root = base if t == 1 else own  # round 1 samples from M1 and ranks by M1 and M0, whatever the recipe
        samples, pairs = root / f"round{t}.samples.json", own / f"round{t}.pairs.json"
        files = [root / f"round{t}.rewards.current.json", root / f"round{t}.rewards.previous.json"]
        by_previous = {"reward": "likelihood", "checkpoint": None}
        if previous is not None:
            by_previous = {"reward": "dpo", "checkpoint": previous, "ref_model_ckpt": None}
        sampling = {"mode": "sampling", "checkpoint": current, "name": recipe.prompts[t - 1], **recipe.sampling}
        rewarding = {"input_file": samples, **recipe.rewarding}
        by_current = {"reward": "dpo", "checkpoint": current, "ref_model_ckpt": None}
        agreement = {"file1": files[0], "file2": files[1], **recipe.consistency}
        commands += [
            command(f"round {t}: sample from M{t}", "infer.py", sampling, "output_dir", samples),
            command(f"round {t}: rank by M{t}", "rewarding.py", rewarding | by_current, "output", files[0]),
            command(f"round {t}: rank by M{t - 1}", "rewarding.py", rewarding | by_previous, "output", files[1]),
            command(f"round {t}: consistency and pairs", "cal_consistency.py", agreement, "output", pairs),
            training(f"M{t + 1}", {"train_stage": "dpo", "checkpoint": current, "name": pairs, **recipe.dpo}, own),
        ]
        previous, current = current, own / f"M{t + 1}/checkpoint-last"
        commands.append(evaluation(f"M{t + 1}", current, own))
    return commands


class Task(msgspec.Struct):
    """What is read of a task's row in an evaluation's summary."""

    task: str
    accuracy: float


class Summary(msgspec.Struct):
    """What is read of an evaluation's summary."""

    tasks: Annotated[list[Task], msgspec.Meta(min_length=1)]


class Counts(msgspec.Struct):
    """What is read of the counts in a sidecar."""

    out: int


class Pairs(msgspec.Struct):
    """What is read of the sidecar of pairs."""

    counts: Counts
    mean_consistency: float | None


def results(recipe: Recipe) -> list[dict]:
    """One row per model: its accuracy per task and overall, and the consistency of the pairs it was trained on."""
    rows = []
    for t in range(recipe.iterations + 2):
        root = Path(recipe.base_dir if t < 2 else recipe.output_dir)
        summary = _made(root / f"M{t}.evaluation.summary.json", Summary)
        tasks = {row.task: row.accuracy for row in summary.tasks}
        row = {"model": f"M{t}", "accuracy": tasks.get("macro", next(iter(tasks.values()))), "tasks": tasks}
        if t >= 2:
            pairs = _made(root / f"round{t - 1}.pairs.json.meta.json", Pairs)
            row |= {"pairs": pairs.counts.out, "consistency": pairs.mean_consistency}
        rows.append(row)
    return rows


def _made(path: Path, kind: type[T]) -> T:
    """What a stage wrote beside its output. Raises UserError where it is damaged."""
    try:
        return msgspec.convert(store.read_json(path), kind)
    except msgspec.ValidationError as error:
        raise UserError(
            f"{path}: damaged, or of something else: {error}; its stage, with --overwrite, makes it anew"
        ) from None
