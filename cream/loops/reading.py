"""Loop and recipe files: YAML, plain data only.

A recipe is CREAM's loop in short: it has the settings of each stage; the steps are those of configs/loops/cream.yaml.
Round t samples from M_t, ranks the responses by M_t and by M_{t-1} (in round 1 by M0's likelihood), and trains M_{t+1}.
"""

from itertools import chain
from pathlib import Path
from typing import Annotated

import msgspec

from cream.cli.flag_fields import NULLS
from cream.cli.names import ROOT
from cream.errors import UserError, alike
from cream.files.mistakes import find_mistakes
from cream.files.yaml_file import read_yaml
from cream.loops.loop import Bound, Flags, Keep, Loop, RoundFlags, Step, Value, check_texts

CREAM = ROOT / "configs" / "loops" / "cream.yaml"
ACCURACY = ("accuracy.M0", "accuracy.M1", "accuracy")  # its steps that evaluate


class Recipe(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The keys of a recipe file. Each map of flags goes to its stage unchanged; in `sampling`, `rewarding`,
    `consistency` and `dpo` a list has one value for each round.

    M1 is trained by `sft`, or is `start`, a checkpoint's name or folder. `evaluation`: flags, or several evaluations,
    {name: flags}, each with a row per model in the table; without it nothing is evaluated.
    `base_dir` holds what recipes of one family share (M1, the evaluations of M0 and M1, round 1's samples and
    rewards); `output_dir` this recipe's own outputs. `reuse_prompts`: one prompt set may serve several rounds. `keep`,
    `eval_every` and `stop_if` as in a loop.
    """

    title: str
    model: str
    iterations: int
    prompts: list[str]
    base_dir: str
    output_dir: str
    seed: int = 0
    sft: Flags | None = None
    start: str | None = None
    sampling: RoundFlags = {}
    rewarding: RoundFlags = {}
    consistency: RoundFlags = {}
    dpo: RoundFlags = {}
    evaluation: dict[str, Value | Flags] | None = None
    reuse_prompts: bool = False
    keep: Keep | None = None
    eval_every: Annotated[int, msgspec.Meta(ge=1)] = 1
    stop_if: dict[str, Bound] = {}

    def __post_init__(self):
        check_texts(self.title, self.model, self.base_dir, self.output_dir)
        if not 1 <= self.iterations <= len(self.prompts):
            raise ValueError(
                f"{self.iterations} iterations need as many prompt sets; `prompts` has {len(self.prompts)}"
            )
        if (self.sft is None) == (self.start is None):
            raise ValueError(
                "M1 needs one of `sft` (the flags of its training, such as {name: tiny_sft, epoch: 2}) and `start` (a "
                f"checkpoint that is M1 already); found {'neither' if self.sft is None else 'both'}"
            )
        self.evaluations()
        if (self.start or "").lower() in NULLS:
            raise ValueError(
                "`start` is none, so that M1 would be M0: the DPO reward of round 1, M1 against M0, is 0 for every "
                "response; give another checkpoint, or `sft`"
            )

    def evaluations(self) -> dict[str, Flags]:
        """The flags of each evaluation, by the ending of its steps' ids: "" for the only one, else "." and its name.
        Raises ValueError where `evaluation` is neither flags nor flags by name."""
        if self.evaluation is None:
            return {}
        if len(kinds := {isinstance(value, dict) for value in self.evaluation.values()}) > 1:
            raise ValueError("`evaluation` has flags, or a map of flags for each of several evaluations; found both")
        if True not in kinds:
            return {"": self.evaluation}
        if "" in self.evaluation:
            raise ValueError("`evaluation` has an empty name")
        return {f".{name}": flags for name, flags in self.evaluation.items()}


def as_loop(recipe: Recipe, cream: Loop) -> Loop:
    """The steps of `cream`, the loop of configs/loops/cream.yaml, with a recipe's settings in place of the loop's."""
    evaluations = recipe.evaluations()
    settings = {
        **({} if recipe.sft is None else {"sft": recipe.sft}),
        "samples": {"name": recipe.prompts, **recipe.sampling},
        "rewards.current": recipe.rewarding,
        "rewards.previous": recipe.rewarding,
        "pairs": recipe.consistency,
        "train": recipe.dpo,
        **{step + name: flags for name, flags in evaluations.items() for step in ACCURACY},
    }
    flags = {
        step: {name: "none" if value is None else value for name, value in own.items()}
        for step, own in settings.items()
    }
    if recipe.start is not None:
        cream = msgspec.structs.replace(cream, start={"train": recipe.start})
        for step in (f"accuracy.M1{name}" for name in evaluations):
            flags[step] = {**flags[step], "checkpoint": recipe.start}

    def expand(step: Step) -> list[Step]:
        if step.id in ACCURACY:
            return [_named(step, name) for name in evaluations]
        return [] if step.id == "sft" and recipe.sft is None else [step]

    parts = ("before", "repeat", "after")
    steps = {part: list(chain.from_iterable(map(expand, getattr(cream, part)))) for part in parts}
    places = {"base_dir": recipe.base_dir, "output_dir": recipe.output_dir}
    about = {"title": recipe.title, "model": recipe.model, "seed": recipe.seed, "rounds": recipe.iterations}
    about |= {"keep": recipe.keep, "eval_every": recipe.eval_every, "stop_if": recipe.stop_if}
    fresh = [] if recipe.reuse_prompts else cream.fresh
    return msgspec.structs.replace(cream, **about, **places, **steps, flags=flags, fresh=fresh)


def _named(step: Step, name: str) -> Step:
    """An evaluation's step for one of several evaluations; `name` as in Recipe.evaluations."""
    title = f"{step.title} ({name[1:]})" if name else step.title
    output = step.output.replace(".evaluation", f"{name}.evaluation")
    return msgspec.structs.replace(step, id=step.id + name, title=title, output=output)


def read_loop(path: Path, seed: int | None = None, output_root: str | None = None) -> Loop:
    """The loop in a YAML file, or the one that a recipe in it stands for. `seed`, if given, replaces the loop's;
    `output_root` is put in front of its folders. Raises UserError naming the file and the key."""
    if not path.exists():
        shipped = {file.stem: file for file in ROOT.glob("configs/*/*.yaml")}
        hint = ", ".join(str(shipped[name].relative_to(ROOT)) for name in alike(path.stem, shipped))
        raise UserError(f"{path}: no such file{f'; did you mean {hint}?' if hint else ''}")
    value = _merged(path)
    if isinstance(value, dict) and value.keys() & {"before", "repeat", "after"}:
        loop = _convert(path, value, Loop)
    else:
        loop = as_loop(_convert(path, value, Recipe), read_loop(CREAM))
    folders = {
        name: str(Path(output_root or "", folder))
        for name in ("output_dir", "base_dir")
        if (folder := getattr(loop, name))
    }
    return msgspec.structs.replace(loop, **folders, seed=loop.seed if seed is None else seed)


def _merged(path: Path, extending: tuple[Path, ...] = ()) -> object:
    """What a file holds; `extends: OTHER` puts its keys over those of another file, beside it or by its path from
    there, and its `flags` over the other's flags, step by step and flag by flag; null takes a step's flags away."""
    value = read_yaml(path)
    if not isinstance(value, dict) or "extends" not in value:
        return value
    extending = (*extending, path.resolve())
    base = path.parent / _convert(path, value.pop("extends"), str, "extends: ")
    if base.resolve() in extending:
        raise UserError(f"{path}: extends {base}, which extends this file")
    if not base.is_file():
        raise UserError(f"{path}: extends {base}, which is not a file")
    below = _merged(base, extending)
    if not isinstance(below, dict):
        raise UserError(f"{base}: holds no loop for {path} to extend")
    kinds = ((base, below), (path, value))
    old, new = (_convert(file, held.get("flags", {}), dict[str, dict | None], "flags: ") for file, held in kinds)
    steps = [step for step in {**old, **new} if new.get(step, {}) is not None]
    return below | value | {"flags": {step: {**(old.get(step) or {}), **new.get(step, {})} for step in steps}}


def _convert(path: Path, value: object, kind, where: str = ""):
    """A value as `kind`. Raises UserError with all that is wrong with it."""
    if mistakes := find_mistakes(value, kind):
        raise UserError("\n".join(f"{path}: {where}{mistake}" for mistake in mistakes))
    return msgspec.convert(value, kind)
