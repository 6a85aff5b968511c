#!/usr/bin/env bash
# torch 2.13.0 guards the compilation of an extension (DeepSpeed's first use compiles several) by the mere existence of a
# file named `lock` in the build folder (torch.utils.file_baton). The file is no lock of the kernel: when a process is
# killed while it compiles, the file stays, and it counts as held although nobody holds it. Who needs the extension then
# polls for the file to go, by default without a limit or a message. The cure is to remove it by hand.
#
# Seen: a file that no process has open makes try_acquire() say False; once it is removed, True. `wait` has no time-out
# among its parameters, and its warning is off by default.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
packages torch==2.13.0 numpy==2.3.5
"$python" - <<'PYTHON'
import inspect
from pathlib import Path

import torch
from torch.utils.file_baton import FileBaton

lock = Path("lock")
lock.touch()  # what a killed process leaves: a file that nobody has open
taken_while_left = FileBaton(str(lock)).try_acquire()
lock.unlink()
baton = FileBaton(str(lock))
taken_after = baton.try_acquire()
baton.release()
defaults = {name: p.default for name, p in inspect.signature(FileBaton).parameters.items() if name != "lock_file_path"}
print(f"torch {torch.__version__}: acquired beside a left file {taken_while_left}, without one {taken_after}; {defaults}")
assert (taken_while_left, taken_after) == (False, True), "a file that nobody holds does not count as a lock any more"
assert defaults["warn_after_seconds"] is None and not inspect.signature(FileBaton.wait).parameters.keys() - {"self"}
PYTHON
