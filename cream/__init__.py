"""CREAM and its sister methods: language models that improve themselves without human preference labels."""

import importlib.util
import sys

__version__ = "0.1.0"

NEEDED = ("msgspec", "numpy", "xxhash", "yaml", "torch", "transformers")  # without them no script starts

if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
    print(
        f"error: {sys.executable} has no {', '.join(missing)}: this is not the environment of this project. "
        "`make setup` installs it into .venv; `source .venv/bin/activate` turns it on",
        file=sys.stderr,
    )
    raise SystemExit(2)
