"""The loop of CREAM in short: a recipe has the settings of each stage; the steps are those of configs/loops/cream.yaml.

Round t samples from M_t, ranks the responses by M_t and by M_{t-1} (in round 1 by M0's likelihood), and trains M_{t+1}.
"""

import msgspec

from cream.loops.plan import Flags, Loop, RoundFlags, check_texts


class Recipe(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The keys of a recipe file. Each map of flags goes to its stage unchanged; in `sampling`, `rewarding`,
    `consistency` and `dpo` a list has one value for each round.

    `base_dir` holds what recipes of one family share (M1, the evaluations of M0 and M1, round 1's samples and
    rewards); `output_dir` this recipe's own outputs.
    """

    title: str
    model: str
    iterations: int
    prompts: list[str]
    base_dir: str
    output_dir: str
    seed: int = 0
    sft: Flags = {}
    sampling: RoundFlags = {}
    rewarding: RoundFlags = {}
    consistency: RoundFlags = {}
    dpo: RoundFlags = {}
    evaluation: Flags = {}

    def __post_init__(self):
        check_texts(self.title, self.model, self.base_dir, self.output_dir)
        if not 1 <= self.iterations <= len(self.prompts):
            raise ValueError(
                f"{self.iterations} iterations need as many prompt sets; `prompts` has {len(self.prompts)}"
            )


def as_loop(recipe: Recipe, cream: Loop) -> Loop:
    """The steps of `cream`, the loop of configs/loops/cream.yaml, with a recipe's settings in place of the loop's."""
    settings = {
        "sft": recipe.sft,
        "samples": {"name": recipe.prompts, **recipe.sampling},
        "rewards.current": recipe.rewarding,
        "rewards.previous": recipe.rewarding,
        "pairs": recipe.consistency,
        "train": recipe.dpo,
        **dict.fromkeys(("accuracy.M0", "accuracy.M1", "accuracy"), recipe.evaluation),
    }
    flags = {step: {name: "none" if of is None else of for name, of in own.items()} for step, own in settings.items()}
    places = {"base_dir": recipe.base_dir, "output_dir": recipe.output_dir}
    about = {"title": recipe.title, "model": recipe.model, "seed": recipe.seed, "rounds": recipe.iterations}
    return msgspec.structs.replace(cream, **about, **places, flags=flags)
