"""What the commands of prepare_data.py share: flags that several have, and how an output is described.

`run`: the script's flags of that name (overwrite, dry_run, skip, provenance()).
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from cream.cli.flags import flag
from cream.cli.screen import say_result
from cream.files import journal
from cream.files.provenance import Provenance

log = logging.getLogger("cream")


@dataclass
class Output:
    """Output"""

    output: str | None = flag(
        None,
        "output file; none: localdata/<name>.<sft|prompt|dpo|ranked|test>.json (import), <file>.<form>.jsonl (export), "
        "localdata/eft.sft.json (eft), localdata/<file>.steps.json (steps), localdata/<file>.pairwise.sft.json "
        "(pairwise), localdata/joined.<form>.json (join), no file (overlap)",
    )


@dataclass
class Folder:
    """Output"""

    output_dir: str = flag("localdata", "folder for the output files")

    def beside(self, path: Path, ending: str) -> Path:
        """The file in it for what is made of another one: judged.json -> judged.steps.json."""
        return Path(self.output_dir) / f"{path.name.partition('.json')[0]}.{ending}"


@dataclass
class Seed:
    """Output"""

    seed: int | None = flag(
        None,
        "seed of whatever is drawn: subsets, limits, parts, held-out prompts, orders, pairs; none: 0, of mix as "
        "--config says",
        low=0,
        high=2**32 - 1,
    )


@dataclass
class HeldOut:
    """Output"""

    held_out: float | None = flag(
        None,
        "share of the prompts that are held out; none: a quarter (eft), as --config says (mix), 0 (split); of mix and "
        "split from 1 on their number",
        low=0,
    )


def path_of(text: str | None) -> Path | None:
    """--output as a path."""
    return None if text is None else Path(text)


def add_input(provenance: Provenance, name: str, place, digest: str) -> None:
    if place.file:
        provenance.file(name, place.file)
    else:
        provenance.content(name, digest)


def describe_dropped(dropped: dict[str, int]) -> None:
    for reason, count in dropped.items():
        log.info("  %d skipped: %s", count, reason)


def skips(run) -> dict[str, str]:
    """The setting of an output that lacks malformed records."""
    return {"on_bad_record": "skip"} if run.skip else {}


def is_needed(output: journal.Output, run) -> bool:
    """Whether an output has to be written; logs why not."""
    if output.up_to_date:
        say_result("%s is up to date (same settings and inputs); skipping", output.path)
    elif run.dry_run:
        log.info("dry run: would write %s; nothing was written", output.path)
    return not (output.up_to_date or run.dry_run)
