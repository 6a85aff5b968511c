"""Several processes on one machine for `--device 0,1,…` or `cpu,cpu`; a single process runs in place.

Under torchrun, deepspeed or srun the environment describes the world: nothing is started, this process joins it.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable

from cream.cli import interrupts, screen
from cream.errors import UserError

START = "spawn"  # of the processes: CUDA does not work in forks
HERE = "LOCAL_WORLD_SIZE"
PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", HERE, "MASTER_ADDR", "MASTER_PORT")  # a process's place in the world


def given_world() -> int | None:
    """The number of processes that a launcher started; None when this process was started by hand."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))  # set by srun alone, not in the batch script itself
    return tasks if tasks > 1 else None


def is_first_process() -> bool:
    """Whether this process reports: rank 0 of a launcher's world, or started by hand."""
    return given_world() is None or os.environ.get("RANK", os.environ.get("SLURM_PROCID")) == "0"


def run(
    worker: Callable, config, devices: list[str], address: str, port: int | None, about: dict, alone: bool = True
) -> None:
    """Call worker(config) once per device, each in its own process when there are several.

    `about` is what all processes must agree on; `alone`: a single process needs no process group. A worker that fails
    ends the others; it prints its UserError itself, and this process exits with 2.
    """
    kind = "cpu" if devices[0] == "cpu" else "cuda"
    if given_world() is not None:
        if "RANK" not in os.environ:
            os.environ |= _slurm(port)
        if missing := [name for name in PLACE if name not in os.environ and name != HERE]:
            raise UserError(f"RANK and WORLD_SIZE are set, but not {', '.join(missing)}: torchrun sets all of them")
        _take_device(kind, devices)
        _join(worker, config, kind, about)
        return
    os.environ["CUDA_VISIBLE_DEVICES"] = "" if kind == "cpu" else ",".join(devices)
    if len(devices) == 1 and alone:
        worker(config)
        return
    port = port or _free_port()
    if len(devices) == 1:
        os.environ |= _place(0, 0, 1, 1, address, port)
        _join(worker, config, kind, about)
        return
    import torch.multiprocessing as mp

    arguments = (worker, config, kind, len(devices), address, port, about)
    processes = mp.start_processes(_enter, arguments, len(devices), join=False, start_method=START)
    try:
        with interrupts.deferred(processes.pids()):
            while not processes.join():
                pass
    except mp.ProcessExitedException as error:
        if error.exit_code == 2:
            sys.exit(2)
        if error.exit_code in interrupts.CODES:
            interrupts.raise_interrupted()
        raise UserError(
            f"training process {error.error_index} of {len(devices)} ended with code {error.exit_code}"
            + (f" (signal {error.signal_name})" if error.signal_name else "")
            + "; the same command resumes from the last saved state"
        ) from None


def _take_device(kind: str, devices: list[str]) -> None:
    """Let a launcher's processes see the GPUs that --device names: as many as there are processes on this host."""
    if kind == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return
    import torch

    here = int(os.environ.get(HERE, len(devices)))
    if len(devices) == here and "CUDA_VISIBLE_DEVICES" not in os.environ:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    elif len(devices) not in (1, here):
        raise UserError(f"--device {','.join(devices)}: {len(devices)} GPUs, but {here} processes on this host")
    elif torch.cuda.device_count() == 1:  # each process was given its own
        os.environ["LOCAL_RANK"] = "0"


def _place(*values: int | str) -> dict[str, str]:
    """The environment variables of PLACE."""
    return dict(zip(PLACE, map(str, values), strict=True))


def _slurm(port: int | None) -> dict[str, str]:
    """The place of a task of srun. All meet on the step's first host, at a port made from the job's id."""
    step = os.environ
    address = step.get("MASTER_ADDR")
    if address is None:
        if shutil.which("scontrol") is None:
            raise UserError("srun without scontrol: export MASTER_ADDR, the first host's name")
        hosts = ["scontrol", "show", "hostnames", step["SLURM_STEP_NODELIST"]]
        address = subprocess.run(hosts, check=True, capture_output=True, text=True).stdout.split()[0]
    chosen = step.get("MASTER_PORT") or port or 20000 + int(step["SLURM_JOB_ID"]) % 20000
    here = step.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0]
    own = (step[f"SLURM_{name}"] for name in ("PROCID", "LOCALID", "STEP_NUM_TASKS"))
    return _place(*own, here, address, chosen)


def _join(worker: Callable, config, kind: str, about: dict) -> None:
    from cream.training.world import joined

    with joined(kind, about):
        worker(config)


def _enter(rank: int, worker: Callable, config, kind: str, world: int, address: str, port: int, about: dict) -> None:
    os.environ |= _place(rank, rank, world, world, address, port)
    if "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(max(1, (os.cpu_count() or world) // world))
    try:
        with interrupts.listening():
            _join(worker, config, kind, about)
    except interrupts.Interrupted as interrupted:
        sys.exit(interrupted.code)
    except UserError as error:  # before all have met
        if rank:  # all may find the same: the first to exit ends the others before they repeat its message
            time.sleep(2)
        screen.show_error(f"error: {error}")
        sys.exit(2)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
