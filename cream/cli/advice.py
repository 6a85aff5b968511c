"""The commands of next stages, which stages print at their end by `say`, unless the environment says CREAM_ADVICE=no.

A stage is run as in the round before, with this round's files: its command is in the sidecar of what it made. In the
first round it is run as the recipe of this model says (configs/recipes/<model>_cream.yaml), if there is one.
"""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from cream.cli.console import command
from cream.cli.names import ROOT
from cream.errors import UserError
from cream.files.provenance import RUN, place_of, read_kind, read_meta, read_sidecar

log = logging.getLogger("cream")
OFF = "CREAM_ADVICE"  # no: whoever runs a stage runs the next ones, too
# Flags that belong to one run: where its output goes, what it replaces, what it was told to accept.
ONCE = {"output", "output_dir", "o", "register", "run_name", "overwrite", "force", "resume", "local_rank"}
ONCE |= {"quiet", "verbose", "trust_remote_code", "allow_reversed", "enable_ref_model", "enable_ref"}
PAIRS = {"cal_consistency.py": ("file1", "file2"), "make_pairs.py": ("rewards", "previous")}  # flags of both rankings
SCRIPTS = {"samples": ("infer.py",), "rewards": ("rewarding.py",), "pairs": (*PAIRS,), "train": ("train.py",)}


def say(text: str, *values: object) -> None:
    """Log a line about what to run next, if it is wanted."""
    if os.environ.get(OFF) != "no":
        log.info(text, *values)


def as_given(words: Sequence[str], *, once: bool = False) -> dict[str, str]:
    """{flag: its text} of a recorded command line without its script; a flag without a value is `yes`. Flags of that
    run alone are omitted, unless `once`. A sidecar may come from anywhere, and what is printed be run: words that are
    not a flag's name, or that a terminal would obey, are omitted as well."""
    given: dict[str, str] = {}
    name = None
    for word in words if all(map(str.isprintable, words)) else ():
        if name is not None and (not word.startswith("-") or word[1:2].isdigit()):
            given[name], name = word, None
        elif word.startswith("-"):
            name, equals, text = word.lstrip("-").partition("=")
            given[name] = text if equals else "yes"
            name = None if equals else name
    omitted = () if once else ONCE
    return {flag: text for flag, text in given.items() if flag not in omitted and re.fullmatch(r"[A-Za-z]\w*", flag)}


def round_before(policy: Path, *, sidecars: bool = False) -> dict:
    """Stage (samples, rewards, pairs, train) -> (its script, its flags) in the round that trained this policy, or its
    sidecar; {} where it was trained otherwise, or where an output of that round is not there any more."""
    with suppress(UserError, OSError, ValueError, LookupError, TypeError):
        home = policy.resolve()
        pairs = place_of(home, read_kind(home)["sources"]["data"])
        made = {"train": read_sidecar(home.parent / RUN), "pairs": read_meta(pairs)}
        current, _ = PAIRS[made["pairs"]["command"][0]]
        rewards = place_of(pairs.parent, made["pairs"]["sources"][current])
        made["rewards"] = read_meta(rewards)
        made["samples"] = read_meta(place_of(rewards.parent, made["rewards"]["sources"]["input_file"]))
        if all(about["command"][0] in SCRIPTS[stage] for stage, about in made.items()):
            commands = {stage: (about["command"][0], as_given(about["command"][1:])) for stage, about in made.items()}
            return made if sidecars else commands
    return {}


def recipe(model: str) -> dict:
    """The recipe of a base model, as in its file, without values per round; {} where none can be read."""
    import yaml

    path = ROOT / "configs" / "recipes" / f"{model}_cream.yaml"
    if "/" in model or not path.is_file():
        return {}
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        maps = {key: value for key, value in values.items() if isinstance(value, dict)}
        prompts = [name for name in values["prompts"] if isinstance(name, str)]
    except (yaml.YAMLError, OSError, ValueError, LookupError, AttributeError, TypeError):
        return {}  # someone is writing it
    flags = {key: {n: v for n, v in each.items() if not isinstance(v, list | dict)} for key, each in maps.items()}
    return flags | {"prompts": prompts}


def number(value: object, default: float) -> float:
    """A recorded number above 0, else the default."""
    with suppress(ValueError, TypeError):
        if 0 < float(value) < float("inf"):
            return float(value)
    return default


def again(before: Mapping, stage: str, script: str, first: Mapping[str, object], **now: object) -> str:
    """The command of a stage: as in the round before, in the first round `script` with the flags `first`; `now` has
    this round's, None for one that is left to its default."""
    script, flags = before.get(stage, (script, first))
    return command(script, **{**now, **{name: value for name, value in flags.items() if name not in now}})
