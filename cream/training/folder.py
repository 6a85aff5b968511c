"""The folder of a training run: whose it is, whether it is finished, and what in it may be replaced.

args.json is there from the beginning and says whose folder it is; meta.json, written last, says that it is finished.
"""

import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import msgspec
import xxhash

from cream.errors import UserError
from cream.files import journal, store
from cream.files.fingerprints import fingerprint_folder
from cream.files.lock import Lock
from cream.files.provenance import ARGS, LAST, RUN, read_kind
from cream.text.options import AS_SAMPLED

NO_LONGER_DROPPED = "the template or tokenizer merges the prompt's last token with the response"
WRITTEN = (
    "state",
    "log.jsonl",
    "samples.jsonl",
    "rejected.jsonl",
)  # by training, beside checkpoints, args.json and meta.json


def default_name(header: dict, *parts: str | None) -> str:
    """The folder's name where no flag gives one: these parts, and a hash of the settings and inputs in `header`."""
    digest = xxhash.xxh3_64(msgspec.json.encode(header, order="deterministic")).hexdigest()[:8]
    return "-".join([*filter(None, parts), digest])


def finished(
    run: Path, header: dict, inputs: Iterable[Path], overwrite: bool, rewrites: Callable[[], bool] = lambda: False
) -> bool:
    """Whether the run of this `header` ({"settings": …, "inputs": …}) is finished, so that there is nothing to train.
    `rewrites`: whether earlier versions trained on other tokens than the policy sampled.

    Raises UserError where the folder holds something else, a run of other settings or inputs, or a finished one whose
    last checkpoint was changed; with `overwrite` only where it is no run's, or holds one of the `inputs`.
    """
    if run.exists() and not run.is_dir():
        raise UserError(f"{run}: is a file, and the run needs a folder of that name")
    if not run.exists() or all(path.name == f".{ARGS}.tmp" for path in run.iterdir()):  # killed before it began
        return False
    if not (run / ARGS).exists():
        raise UserError(f"{run}: is not the folder of a training run; give another --output_dir")
    if overwrite:
        for path in inputs:
            if path.resolve().is_relative_to(run.resolve()):
                raise UserError(f"--overwrite: {run} holds {path}, an input; give another --output_dir")
        return False
    if (run / RUN).exists():
        made_by = store.read_json(run / RUN)
        journal.check_same(run, made_by, header, "holds a finished run")
        if count := made_by.get("counts", {}).get("dropped", {}).get(NO_LONGER_DROPPED):
            raise UserError(
                f"{run}: an earlier version dropped {count} records that are trained on now, for turns that the chat "
                "template rewrites once another follows; --overwrite trains again"
            )
        _check_text(run, made_by, rewrites)
        _check_last(run, made_by.get("output"))
        return True
    what, advice = "found an interrupted run there", "Repeat its command to resume it. "
    begun_by = store.read_json(run / ARGS)
    journal.check_same(run, begun_by, header, what, advice)
    _check_text(run, begun_by, rewrites)
    return False


def _check_text(run: Path, about: dict, rewrites: Callable[[], bool]) -> None:
    """Raises UserError where an earlier version, which did not write AS_SAMPLED, trained on other tokens."""
    if not about.keys() & AS_SAMPLED.keys() and rewrites():
        raise UserError(
            f"{run}: an earlier version trained on responses as the chat template rewrites them, and not as they were "
            "sampled; --overwrite trains again"
        )


def _check_last(run: Path, saved: str | None) -> None:
    """Raises UserError unless the last checkpoint of a finished run is there as it was saved, with this fingerprint;
    runs of earlier versions have that in the checkpoint only."""
    last = run / LAST
    if not last.is_dir() or fingerprint_folder(last) != (saved or read_kind(last).get("fingerprint")):
        raise UserError(
            f"{run}: holds a finished run, but its last checkpoint is not what was saved, or not there: put it back, "
            "or --overwrite to train again"
        )


def starts_again(run: Path, header: dict, overwrite: bool, resume: bool) -> bool:
    """Whether what an earlier run left in the folder is to be removed: without `resume` always; with `overwrite` all
    but an interrupted run of the same header, which is resumed."""
    if not overwrite or not resume:
        return not resume
    if (run / RUN).exists():
        return True
    with suppress(UserError):  # there is none, or it is damaged
        return journal.describe_difference(store.read_json(run / ARGS), header) is not None
    return True


def clear(run: Path) -> None:
    """Remove an earlier run from its folder: what training writes there, and nothing else. args.json stays until it is
    replaced: it says whose folder this is, whenever this is killed."""
    for path in (run / RUN, *run.glob("checkpoint-*"), *run.glob("adapter-*"), *(run / name for name in WRITTEN)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def tidy(run: Path) -> None:
    """Remove what a finished run no longer needs: the state to resume from, and what a kill left of a folder."""
    for left in (run / "state", *run.glob(".checkpoint-*")):
        left.unlink() if left.is_symlink() else shutil.rmtree(left, ignore_errors=True)


def tidy_after_kill(run: Path) -> None:
    """The same for a run that was killed after it had finished, if it was."""
    if (run / "state").exists() or Lock(run).path.exists() or [*run.glob(".checkpoint-*")]:
        with Lock(run):
            tidy(run)
