"""What an interrupted run goes on from: the libraries' last saved state, replaced only by a newer whole one."""

import json
import logging
import shutil
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object

from cream import store
from cream.errors import UserError

log = logging.getLogger("cream")


def last(run: Path) -> dict[str, int] | None:
    """{"step": …, "processes": …} of the state that stands whole in a run's folder; None where there is none."""
    marker = run / "state" / "whole"
    return json.loads(marker.read_text()) if marker.exists() else None


def save(accelerator: Accelerator, run: Path, step: int) -> None:
    """The state after `step`; all processes must call."""
    folder = run / "state" / str(step)
    accelerator.save_state(str(folder))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        store.write_json(run / "state" / "whole", {"step": step, "processes": accelerator.num_processes})
        for older in (run / "state").iterdir():
            if older.is_dir() and older != folder:
                shutil.rmtree(older)


def resume(accelerator: Accelerator, weights, run: Path) -> int:
    """Load the last state; returns the steps that were done. All processes must see the same one."""

    found = last(run)
    if len({json.dumps(seen) for seen in gather_object([found])}) > 1:
        raise UserError(f"{run}: not all processes see the same state there; the run's folder must be shared")
    if found is None:
        return 0
    weights.load(run / "state" / str(found["step"]), found["processes"])
    log.info("resuming after step %d", found["step"])
    return found["step"]


def clear(run: Path) -> None:
    """A finished run needs none."""
    shutil.rmtree(run / "state", ignore_errors=True)
