"""CREAM and its sister methods: language models that improve themselves without human preference labels."""

import importlib.util
import os
import sys

__version__ = "0.1.0"

# Threads of OpenMP (GCC's, which torch has on Linux) spin while they wait, by default for milliseconds: in vain where
# another process has the core. Beside one such process per core the tiny model's training took 147 s, and with this 10.
# Read as torch is loaded; OMP_WAIT_POLICY or GOMP_SPINCOUNT in the environment decides instead.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

NEEDED = ("msgspec", "numpy", "xxhash", "yaml", "torch", "transformers")  # without them no script starts

if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
    print(
        f"error: {sys.executable} has no {', '.join(missing)}: this is not the environment of this project. "
        "`make setup` installs it into .venv; `source .venv/bin/activate` turns it on",
        file=sys.stderr,
    )
    raise SystemExit(2)
