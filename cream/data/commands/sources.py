"""`prepare_data.py list`: the public sources that build knows."""

from collections.abc import Sequence
from dataclasses import dataclass

from cream.cli.flags import flag
from cream.cli.screen import say_result

WORDS = ""
ABOUT = "print the sources: contents, published rows, licences"
TAKES = ()


@dataclass
class Options:
    """List"""

    list: bool = flag(False, "same as the command list")


def run(words: Sequence[str], flags: Options, config) -> None:
    from cream.data import sources

    for source in sources(["all"]):
        rows = ", ".join(f"{split} {about.rows}" for split, about in source.splits.items())
        say_result("%-14s %s\n%15s%s rows; %s; %s", source.name, source.gives, "", rows, source.licence, source.hub)
