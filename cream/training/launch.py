"""Several processes on one machine for `--device 0,1,…` or `cpu,cpu`; one process runs in place.

Under torchrun (RANK and WORLD_SIZE are set) the world is given by the environment and nothing is started here.
"""

import os
import socket
import sys
import time
from collections.abc import Callable

from cream.errors import UserError


def given_world() -> int | None:
    """The number of processes that a launcher has set up, None when this process was started by hand."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ and "WORLD_SIZE" in os.environ else None


def is_first_process() -> bool:
    """Whether this process is the one that reports: rank 0 of a launcher's world, or started by hand."""
    return os.environ.get("RANK", "0") == "0"


def run(worker: Callable, config, devices: list[str], address: str, port: int | None) -> None:
    """Call worker(config) once per device, each in its own process when there are several.

    A worker that fails ends the others; its UserError is printed by itself and this process exits with 2.
    """
    if given_world() is not None:
        worker(config)
        return
    if devices[0] != "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    if len(devices) == 1:
        worker(config)
        return
    import torch.multiprocessing as mp

    port = port or _free_port()
    try:
        mp.start_processes(_enter, (worker, config, len(devices), address, port), len(devices), start_method="spawn")
    except mp.ProcessExitedException as error:
        if error.exit_code == 2:
            sys.exit(2)
        raise UserError(
            f"training process {error.error_index} of {len(devices)} ended with code {error.exit_code}"
            + (f" (signal {error.signal_name})" if error.signal_name else "")
            + "; the same command goes on from the last checkpoint"
        ) from None


def _enter(rank: int, worker: Callable, config, world: int, address: str, port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }
    if "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(max(1, (os.cpu_count() or world) // world))
    try:
        worker(config)
    except UserError as error:
        if rank:  # all usually find the same: the first to exit ends the others before they repeat its message
            time.sleep(2)
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
