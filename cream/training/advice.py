"""The commands that follow a training run, printed at its end."""

from contextlib import suppress
from pathlib import Path

from cream.cli.console import command, log
from cream.errors import UserError
from cream.files.provenance import POLICY, read_kind
from cream.training.stages import STAGES


def print_next(last: Path, tiny: bool, flags: dict[str, object]) -> None:
    """How to sample from the policy in `last`, and how to evaluate it; `flags` name it and its place."""
    if read_kind(last)["kind"] != POLICY:
        return
    prompts = f"{'tiny_' * tiny}prompt_{min(_round(last), 3)}"
    log.info("next, sample its responses for the next round:")
    log.info("  %s", command("infer.py", **flags, mode="sampling", name=prompts))
    log.info("or measure its accuracy:")
    log.info("  %s", command("infer.py", **flags, mode="evaluation", name="tiny_test" if tiny else "all_test"))


def _round(checkpoint: Path) -> int:
    """t of the policy M_t in this folder: 1 after a run on data of its own, one more after each on data made for the
    policy that it started from; as far as its ancestors are there and undamaged."""
    seen: set[Path] = set()
    with suppress(UserError, OSError, ValueError):  # it is for advice alone
        while checkpoint.resolve() not in seen:
            seen.add(checkpoint.resolve())
            about = read_kind(checkpoint)
            module = STAGES.get(about.get("stage"))
            if module is None or not module.Stage.made_for_policy or "started_from" not in about:
                break
            checkpoint = Path(about["started_from"])
    return len(seen)
