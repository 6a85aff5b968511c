"""What an interrupted run resumes from: the libraries' last saved state, replaced only by a newer complete one.

That state has pickles, which can run anything: it is loaded from the run's own folder only, and only as it was saved.
"""

import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
from accelerate import Accelerator
from accelerate.utils import gather_object

from cream.cli.screen import PROGRESS
from cream.errors import UserError
from cream.files import store
from cream.files.fingerprints import fingerprint_file
from cream.files.raw import with_filename
from cream.model.hardware import numel

log = logging.getLogger("cream")
FROM_SCRATCH = "--resume no trains from scratch"
UNIVERSAL = "universal"  # DeepSpeed's form for another number of processes, made from the rest at each resumption


class Saved(msgspec.Struct):
    """The manifest of a complete state: after which step, of how many processes, hash by file; of the steps since the
    log's last line, the sum of each metric and what their mean is over."""

    step: int
    processes: int
    files: dict[str, str]
    sums: dict[str, float] = {}
    total: int = 0


def last(run: Path) -> Saved | None:
    """The manifest in a run's folder; None where no state is complete. Raises UserError on a damaged one."""
    marker = run / "state" / "whole"
    if not marker.exists():
        return None
    try:
        return msgspec.convert(store.read_json(marker), Saved)
    except msgspec.ValidationError as error:
        raise UserError(f"{marker}: damaged: {error}; {FROM_SCRATCH}") from None


def fits(run: Path, model, moments: int) -> bool:
    """Whether the disk has room for a state: float32 weights, and `moments` bytes of the optimiser a weight."""
    need, free = (4 + moments) * sum(map(numel, model.parameters())), shutil.disk_usage(run).free
    if free < need:
        log.warning("no state is saved: it takes up to %.3g GB, and %.3g GB are free", need / 1e9, free / 1e9)
    return free >= need


def save(accelerator: Accelerator, run: Path, step: int, sums: dict[str, float], total: int) -> None:
    """The state after `step`, with what the log continues from; all processes must call."""
    folder = run / "state" / str(step)
    with with_filename(folder):
        accelerator.save_state(str(folder))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        seal(run, folder, Saved(step, accelerator.num_processes, {}, sums, total))


def seal(run: Path, folder: Path, saved: Saved) -> None:
    """Make what was written to `folder` the state to resume from, by its manifest; an older one goes."""
    for path in (*folder.rglob("*"), folder, folder.parent):  # before the older state goes
        store.sync(path)
    store.write_json(run / "state" / "whole", msgspec.structs.replace(saved, files=_hashes(folder)))
    for older in (run / "state").iterdir():
        if older.is_dir() and older != folder:
            shutil.rmtree(older)


def check(folder: Path, saved: Saved) -> None:
    """Raises UserError where a file of a state is not what it was when it was saved."""
    now = _hashes(folder)
    if changed := sorted(name for name in {*now, *saved.files} if now.get(name) != saved.files.get(name)):
        raise UserError(f"{folder}: {', '.join(changed[:3])} is not what was saved; nothing is loaded; {FROM_SCRATCH}")


def resume(accelerator: Accelerator, weights, run: Path) -> Saved:
    """Load the last state; returns its manifest, of step 0 where there is none. All processes must see the same one.

    Raises UserError where a file of it is not what it was when it was saved.
    """
    saved = last(run)
    if len({msgspec.json.encode(seen) for seen in gather_object([saved])}) > 1:
        raise UserError(f"{run}: not all processes see the same state there; the run's folder must be shared")
    if saved is None:
        return Saved(0, accelerator.num_processes, {})
    folder = run / "state" / str(saved.step)
    if accelerator.is_main_process:
        check(folder, saved)
    accelerator.wait_for_everyone()
    try:
        weights.load(folder, saved.processes)
    except RuntimeError as error:
        if "state_dict" not in str(error):
            raise
        raise UserError(
            f"{folder}: another version of this project saved it, in another form; {FROM_SCRATCH}"
        ) from None
    log.log(PROGRESS, "resuming after step %d", saved.step)
    return saved


def _hashes(folder: Path) -> dict[str, str]:
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if not path.is_dir()]
    names = [str(name) for name in names if name.parts[0] != UNIVERSAL]
    with ThreadPoolExecutor() as pool:  # reading and hashing both let other threads run
        return dict(zip(names, pool.map(lambda name: fingerprint_file(folder / name), names), strict=True))
