#!/usr/bin/env bash
# accelerate 1.15.0: of several trackers in log_with, those whose package is not installed are dropped without a word, as
# long as one is installed. Accelerator(log_with=["tensorboard", "wandb"]) on a machine without wandb logs to TensorBoard
# alone: no error, no warning (a line of level DEBUG), init_trackers and log succeed, and a run of days is not in wandb.
# Only where none at all is left there is a warning.
#
# Seen, with tensorboard and without wandb: trackers ['tensorboard'] and no warning for both names, a warning for wandb
# alone.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
packages torch==2.13.0 accelerate==1.15.0 tensorboard numpy
"$python" - <<'PYTHON'
import importlib.util
import warnings

import accelerate
from accelerate import Accelerator

assert importlib.util.find_spec("wandb") is None
print("seen accelerate", accelerate.__version__)
seen = {}
for names in (["tensorboard", "wandb"], ["wandb"]):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        accelerator = Accelerator(cpu=True, log_with=names, project_dir=".")
        accelerator.init_trackers("project")
        accelerator.log({"loss": 1.0}, step=1)
        accelerator.end_training()
    about = [str(each.message) for each in said if "tracker" in str(each.message)]
    seen[tuple(names)] = [tracker.name for tracker in accelerator.trackers], len(about)
    print(f"seen {names}: trackers {seen[tuple(names)][0]}, warnings about trackers: {len(about)}")
assert seen == {("tensorboard", "wandb"): (["tensorboard"], 0), ("wandb",): ([], 1)}
PYTHON
