"""A loaded model that scores answers: in this process or, where one device is too small for it, in a team of several.

Each of a team has a device and a part of every layer (Megatron-LM, arXiv 1909.08053, §3), as the library's plan for the
architecture cuts it; embeddings and head are whole. All get the same answers and plan the same batches; what the parts
of a layer give is added up between them. A plan is not believed: the first layers, cut up, must give a probe the
numbers that they give whole.
"""

import multiprocessing
import os
import pickle
import signal
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
import torch.distributed as dist

from cream import console, hardware, models
from cream.batches import Group
from cream.errors import UserError
from cream.hardware import Budget
from cream.logprobs import LogProbs, beyond_rounding, probe, score
from cream.training import world

PROBED = 4  # layers; of a 70 B model in bfloat16 they are 7 GB


class Alone:
    """The model in `folder` on one device. `max_tokens` bounds a batch; None: what the memory carries."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device, max_tokens: int | None, slices: int = 1):
        self.model = LogProbs(models.load_policy(folder, dtype, device, slices=slices))
        self.budget = hardware.budget(max_tokens, self.model.policy, device, training=False)

    def score(self, groups: Sequence[Group]) -> list[list[float]]:
        """log π of each answer of each group."""
        return score(self.model, groups, self.budget)

    def close(self) -> None:
        """Nothing to end: the model goes with this object."""


class Team:
    """The same with `size` processes, on the CPU's cores in even parts or on the GPUs 0 to size - 1 that are visible.

    Raises UserError where the model cannot be cut up so, or is not the same then.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, kind: str, max_tokens: int | None, size: int):
        models.check_slices(folder, size)
        self.size = size
        self.place = tempfile.TemporaryDirectory(prefix="cream-team-")  # where they meet: no port is open
        threads = max(1, torch.get_num_threads() // size)
        work = folder, dtype, kind, max_tokens, threads, Path(self.place.name) / "store"
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(size):
            pipe, theirs = context.Pipe()
            process = context.Process(target=_member, args=(rank, size, theirs, *work), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(pipe)
            self.processes.append(process)
        self._hear()

    def score(self, groups: Sequence[Group]) -> list[list[float]]:
        """log π of each answer of each group."""
        work = pickle.dumps(groups)
        for pipe in self.pipes:
            with suppress(OSError):  # one that is gone is found out below
                pipe.send_bytes(work)
        return self._hear()

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.join()
        self.place.cleanup()

    def _hear(self):
        """What the first process says next: all work is done together. One that fails or is lost ends all."""
        ready, said = wait([*self.pipes, *(process.sentinel for process in self.processes)]), []
        for pipe in self.pipes:
            if pipe in ready:
                with suppress(EOFError, OSError):
                    said.append(pipe.recv())
        errors = [what for what in said if isinstance(what, Exception)]
        if said and not errors:
            return said[0]
        for process in self.processes:
            process.join(1)  # one that was killed may be seen by the others first
        lost = [f"{rank} (exit code {p.exitcode})" for rank, p in enumerate(self.processes) if p.exitcode]
        self.close()
        if lost and not any(isinstance(error, UserError) for error in errors):
            raise UserError(
                f"--tensor_parallel_size {self.size}: process {', '.join(lost)} of {self.size} was lost, which is "
                "often want of memory; the same command goes on from here"
            )
        raise next((error for error in errors if isinstance(error, UserError)), errors[0])


def _member(
    rank: int,
    size: int,
    pipe: Connection,
    folder: Path,
    dtype: torch.dtype,
    kind: str,
    max_tokens: int | None,
    threads: int,
    store: Path,
) -> None:
    """A process of a team: scores what comes, until it is ended or the other end of the pipe is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the process that asks
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}  # the GPU that the library takes
    os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
    if kind == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # else the library takes GPUs
        torch.set_num_threads(threads)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if rank == 0:
        console.start()
    try:
        world.interface()
        backend = "nccl" if kind == "cuda" else "gloo"
        met = dist.FileStore(str(store), size)
        dist.init_process_group(backend, store=met, rank=rank, world_size=size, timeout=world.FOREVER)
        _check_plan(folder, dtype, device, size)
        model = Alone(folder, dtype, device, max_tokens, slices=size)
        tokens = torch.tensor([model.budget.tokens], device=device)
        dist.all_reduce(tokens, dist.ReduceOp.MIN)
        model.budget = Budget(int(tokens), common=True)
        found = None
        while True:
            if rank == 0:
                pipe.send(found)
            found = model.score(pickle.loads(pipe.recv_bytes()))
    except EOFError:
        return
    except UserError as error:
        pipe.send(error)
    except Exception:  # with where it was raised, which pickling it alone would lose
        pipe.send(RuntimeError(f"in process {rank} of --tensor_parallel_size {size}:\n{traceback.format_exc()}"))


def _check_plan(folder: Path, dtype: torch.dtype, device: torch.device, size: int) -> None:
    """Raises UserError unless the first layers give a probe the same log-probabilities cut up as whole."""
    parts = probe(LogProbs(models.load_policy(folder, dtype, device, slices=size, layers=PROBED), share=False))
    if dist.get_rank() > 0:
        return
    whole = probe(LogProbs(models.load_policy(folder, dtype, device, layers=PROBED), share=False))
    if apart := beyond_rounding(parts, whole, dtype):
        raise UserError(
            f"--tensor_parallel_size {size}: cut up by the library's plan, {folder} is another model: a probe of its "
            f"first {PROBED} layers differs by {apart}"
        )
