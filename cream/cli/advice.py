"""The commands of next stages, which every stage prints at its end.

A stage is run as in the round before, with this round's files: its command is in the sidecar of what it made. In the
first round it is run as the recipe of this model says (configs/recipes/<model>_cream.yaml), if there is one.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from cream.cli.console import command
from cream.cli.names import ROOT
from cream.errors import UserError
from cream.files.provenance import RUN, place_of, read_kind, read_meta, read_sidecar

# Flags that belong to one run: where its output goes, what it replaces, what it was told to accept.
ONCE = {"output", "output_dir", "o", "register", "run_name", "overwrite", "force", "resume", "local_rank"}
ONCE |= {"trust_remote_code", "allow_reversed", "enable_ref_model", "enable_ref"}
REWARDS = ("file1", "rewards")  # the flag of the current model's rewards, in cal_consistency.py and make_pairs.py
PREVIOUS = {"cal_consistency.py": "file2", "make_pairs.py": "previous"}


def as_given(words: Sequence[str]) -> dict[str, str]:
    """{flag: its text} of a recorded command line without its script; a flag without a value is `yes`. Flags of that
    run alone are omitted; so are all where a word is not printable: a sidecar may come from anywhere."""
    given: dict[str, str] = {}
    name = None
    for word in words if all(map(str.isprintable, words)) else ():
        if name is not None and (not word.startswith("-") or word[1:2].isdigit()):
            given[name], name = word, None
        elif word.startswith("-"):
            name, equals, text = word.lstrip("-").partition("=")
            given[name] = text if equals else "yes"
            name = None if equals else name
    return {flag: text for flag, text in given.items() if flag not in ONCE}


def round_before(policy: Path) -> dict[str, tuple[str, dict[str, str]]]:
    """Stage (samples, rewards, pairs, train) -> (its script, its flags) in the round that trained this policy; {} where
    it was trained otherwise, or where an output of that round is not there any more."""
    with suppress(UserError, OSError, ValueError, LookupError, TypeError):
        home = policy.resolve()
        pairs = place_of(home, read_kind(home)["sources"]["data"])
        made = {"train": read_sidecar(home.parent / RUN), "pairs": read_meta(pairs)}
        sources = made["pairs"]["sources"]
        rewards = place_of(pairs.parent, next(sources[flag] for flag in REWARDS if flag in sources))
        made["rewards"] = read_meta(rewards)
        made["samples"] = read_meta(place_of(rewards.parent, made["rewards"]["sources"]["input_file"]))
        return {stage: (about["command"][0], as_given(about["command"][1:])) for stage, about in made.items()}
    return {}


def recipe(model: str) -> dict:
    """The recipe that is shipped for a base model, as in its file; {} without one."""
    path = ROOT / "configs" / "recipes" / f"{Path(model).name}_cream.yaml"
    if model != path.name.removesuffix("_cream.yaml") or not path.is_file():
        return {}
    import yaml

    return yaml.safe_load(path.read_text(encoding="utf-8"))


def again(before: Mapping, stage: str, script: str, first: Mapping[str, object], **now: object) -> str:
    """The command of a stage: as in the round before, in the first round `script` with the flags `first`; `now` has
    this round's, None for one that is left to its default."""
    script, flags = before.get(stage, (script, first))
    return command(script, **{**now, **{name: value for name, value in flags.items() if name not in now}})
