"""train.py with something done before the update of a step, and with its processes forked instead of spawned.

As a script, whose working directory is a copy of the repository: `disturbed.py WHAT FLAGS…`. WHAT is one of the
functions below, with the step and the rank that it is for: "kept", "killed 7", "lost 3 1".
"""

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path

from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel


def kept(weights) -> None:
    """The first gradient, before it is clipped, is written to the run's folder."""
    from deepspeed.utils import safe_get_full_grad
    from safetensors.torch import save_file

    sharded = type(weights).__name__ == "Shards"
    trained = [p for p in weights.whole.parameters() if p.requires_grad]
    gradients = [safe_get_full_grad(p) if sharded else p.grad for p in trained]
    if weights.accelerator.is_main_process:
        run = Path(weights.accelerator.project_dir)
        save_file({str(i): g.contiguous() for i, g in enumerate(gradients)}, run / "gradient.safetensors")


def killed(_weights) -> None:
    """All processes of this command."""
    os.killpg(0, signal.SIGKILL)


def lost(weights, rank: int) -> None:
    """One process."""
    if weights.accelerator.process_index == rank:
        os.kill(os.getpid(), signal.SIGKILL)


def asked(weights, rank: int) -> None:
    """One process, by SIGTERM: it finishes the step."""
    if weights.accelerator.process_index == rank:
        os.kill(os.getpid(), signal.SIGTERM)


def cut(weights, rank: int) -> None:
    """The link of one process's host."""
    if weights.accelerator.process_index == rank:
        subprocess.run(["ip", "link", "set", "cream0", "down"], check=True)


def before_step(number: int, act: Callable) -> None:
    """Call act(weights) before that step of a run, counted from the first of this process."""
    from cream.training import parallel

    steps = count(1)

    def acting(step):
        def act_and_step(self, *how):
            if next(steps) == number:
                act(self)
            return step(self, *how)

        return act_and_step

    for kind in (parallel.Replicas, parallel.Shards):
        kind.step = acting(kind.step)


def after_check(end_training: Callable) -> Callable:
    """It ends the process group, which nothing that trained may outlive: at times that waits for ever."""

    def check_and_end(self):
        left = [o for o in gc.get_objects() if isinstance(o, DistributedDataParallel)]
        if left:
            sys.exit("DDP outlives its process group")
        end_training(self)

    return check_and_end


def main(what: str) -> None:
    """Run train.py, with the flags that follow."""
    import train
    from cream.training import launch, world

    name, *numbers = what.split()
    step, *rank = map(int, numbers or [1])
    Accelerator.end_training = after_check(Accelerator.end_training)
    before_step(step, lambda weights: globals()[name](weights, *rank))
    launch.START = "fork"
    if rank:  # it is soon found out
        world.BEAT, world.SILENT, world.LOST = 0.3, 2, 10
    train.main()


if __name__ == "__main__":
    sys.path[0] = str(Path.cwd())
    os.setsid()  # what it starts is killed with it, and nothing else
    main(sys.argv.pop(1))
