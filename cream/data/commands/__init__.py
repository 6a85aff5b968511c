"""The commands of prepare_data.py by name. A new one is a file here and a line in COMMANDS.

A command is a module (rrm.py is an example) that holds

    WORDS      what follows its name on the command line: FILE, FILE …, SOURCE …, or nothing
    ABOUT      what it does, in a line of --help
    Options    a dataclass of all flags that it takes besides those of every run; the ones that several commands have
               are in cream/data/outputs.py. Another command's flag is refused
    run(words, flags, config)    does it; `flags`: its Options; `config`: the script's, with `run` (overwrite, dry_run,
               skip, provenance()), `model`, and file(word, flag), the path of a file that is given by a path or by name
    TAKES      optional: the groups of the script's flags that it takes as well, by default ("run",)
"""

import re
from types import ModuleType

from cream.data.commands import (
    build,
    eft,
    export,
    join,
    mix,
    overlap,
    pairwise,
    rrm,
    sources,
    split,
    steps,
    tables,
    validate,
)
from cream.errors import UserError, nearest

COMMANDS: dict[str, ModuleType] = {
    "build": build,
    "list": sources,
    "eft": eft,
    "steps": steps,
    "pairwise": pairwise,
    "import": tables,
    "mix": mix,
    "split": split,
    "join": join,
    "rrm": rrm,
    "export": export,
    "overlap": overlap,
    "validate": validate,
}


def describe(name: str) -> str:
    """A command as one types it: overlap FILE FILE …."""
    return f"{name} {COMMANDS[name].WORDS}".strip()


def check_words(name: str, words: list[str]) -> None:
    """Raises UserError where there is no such command, or other words follow it than it takes."""
    due = COMMANDS[name].WORDS if name in COMMANDS else "-"
    least = len(re.findall("[A-Z|]+", due)) if not due.startswith("[") else 0
    if name not in COMMANDS or len(words) < least or len(words) > least and "…" not in due:
        near = nearest(name, COMMANDS) if name not in COMMANDS and name else ""
        raise UserError(f"expected a command: {', '.join(map(describe, COMMANDS))}{near}")
