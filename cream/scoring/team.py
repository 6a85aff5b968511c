"""A loaded model that scores responses (a policy by log-probabilities or signs, a reward model by its head): in this
process or, where one device is too small, in a team of several.

Each of a team has a device and a part of every layer (tensor parallelism: Megatron-LM, arXiv 1909.08053, §3), by
transformers' plan for the architecture; embeddings and head are whole. All get the same responses and plan the same
batches; the results of a layer's parts are summed between them. A plan is checked: the first layers, tensor-parallel,
must give a probe the same numbers as on one device.
"""

import gc
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
import torch.distributed as dist

from cream.cli import console
from cream.cli.imports import import_quickly
from cream.errors import UserError, out_of_memory
from cream.files.provenance import POLICY, REWARD_MODEL
from cream.model import hardware
from cream.model.backbone import beyond_rounding, probe
from cream.model.batches import Group
from cream.model.hardware import Budget
from cream.model.load import load
from cream.model.logprobs import LogProbs, score
from cream.model.reward_head import Heads, read_heads
from cream.model.signs import SignOdds, sign_odds
from cream.scoring import network
from cream.text.steps import SignTokens

FLAG = "--tensor_parallel_size"
START = "spawn"  # of the processes: CUDA does not work in forks
MODELS = {POLICY: LogProbs, REWARD_MODEL: Heads}  # the wrapper of a model of each kind


class Local:
    """The model in `folder` on this process's device, or its part of it, of `tp_size`.

    `max_tokens` bounds a batch; None: as many as fit in memory. `signs`: of a policy whose log-odds of the signs of
    steps are read. Raises UserError where it was not trained to sign.
    """

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        device: torch.device | str,
        max_tokens: int | None,
        tp_size: int = 1,
        kind: str = POLICY,
        signs: SignTokens | None = None,
    ):
        device = torch.device(device)
        model = load(folder, kind, dtype, device, tp_size=tp_size)
        self.model = SignOdds(model, signs.ids) if signs else MODELS[kind](model)
        if signs:
            self.model.check(signs.probe)
        self.budget = hardware.budget(max_tokens, self.model.model, device, training=False)

    def score(self, groups: Sequence[Group]) -> list[list]:
        """log π, the outputs, or the log-odds of the signs, of each response of each group."""
        read = {LogProbs: score, Heads: read_heads, SignOdds: sign_odds}[type(self.model)]
        return read(self.model, groups, self.budget)

    def close(self) -> None:
        """The model goes with this object."""


class Team:
    """The same in `size` processes, on the CPU's cores in even parts or on the GPUs 0 to size - 1 that are visible.

    Raises UserError where the tensor-parallel model gives other numbers, or does not fit in memory.
    """

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        device: str,
        max_tokens: int | None,
        size: int,
        kind: str = POLICY,
        signs: SignTokens | None = None,
    ):
        self.size = size
        self.place = tempfile.TemporaryDirectory(prefix="cream-team-")  # where they meet: no port is open
        threads = max(1, torch.get_num_threads() // size)
        work = device, threads, Path(self.place.name) / "store", folder, kind, dtype, max_tokens, signs
        context = multiprocessing.get_context(START)
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

    def score(self, groups: Sequence[Group]) -> list[list]:
        """As `Local.score`."""
        work = pickle.dumps(groups)
        for pipe in self.pipes:
            with suppress(OSError):  # one that is gone is found out below
                pipe.send_bytes(work)
        return self._hear()

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self.place.cleanup()

    def _hear(self):
        """What the first process says next: all work is done together. One that fails or is lost ends all."""
        ends = {process.sentinel: rank for rank, process in enumerate(self.processes)}
        said = []
        for ready in wait([*self.pipes, *ends]):
            if isinstance(ready, Connection):
                with suppress(EOFError, OSError):
                    said.append(ready.recv())
        errors = [what for what in said if isinstance(what, Exception)]
        if said and not errors:
            return said[0]
        for end in wait(ends, timeout=1):  # the others may see first that one was killed
            self.processes[ends[end]].join(1)  # its files are closed before it can be asked for its exit code
        lost = [f"{rank} (exit code {p.exitcode})" for rank, p in enumerate(self.processes) if p.exitcode]
        self.close()
        for error in sorted(errors, key=lambda error: not isinstance(error, UserError)):
            if isinstance(error, UserError) or not lost:
                raise error
        raise UserError(
            f"{FLAG} {self.size}: process {', '.join(lost) or '?'} of {self.size} was lost, often for lack of "
            "memory; the same command resumes from here"
        )


def _member(rank: int, size: int, pipe: Connection, kind: str, threads: int, store: Path, *model) -> None:
    """A process of a team: scores what comes, until it is ended or the process that asks is gone. `kind`: cpu or cuda;
    model: the folder, the model's kind, the dtype, what bounds a batch, and the signs."""
    folder, kind_of_model, dtype, max_tokens, signs = model
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the process that asks
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}  # the GPU that the library takes
    os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
    if kind == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # else the library takes GPUs
        torch.set_num_threads(threads)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    import_quickly()
    if rank == 0:
        console.set_up_process()
    try:
        network.choose_interface()
        backend = "nccl" if kind == "cuda" else "gloo"
        met = dist.FileStore(str(store), size)
        dist.init_process_group(backend, store=met, rank=rank, world_size=size, timeout=network.FOREVER)
        _check_plan(folder, device, size, kind_of_model)
        model = Local(folder, dtype, device, max_tokens, size, kind_of_model, signs)
        _agree(model, device)
        scores = None
        while True:
            if rank == 0:
                pipe.send(scores)
            scores = model.score(pickle.loads(pipe.recv_bytes()))
    except UserError as error:
        pipe.send(error)
    except Exception as error:
        if out_of_memory(error):
            pipe.send(UserError(f"{FLAG} {size}: no memory for a part of {folder}: {error}; give more devices"))
        else:  # with where it was raised, which pickling it alone would lose
            pipe.send(RuntimeError(f"in process {rank} of {FLAG} {size}:\n{traceback.format_exc()}"))


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _agree(model: Local, device: torch.device) -> None:
    """The smallest budget is everybody's. Raises RuntimeError where only some take trees: they would part."""
    mine = model.budget
    least = torch.tensor([mine.tokens, mine.whole, model.model.share, -model.model.share], device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    tokens, whole, share, unshared = least.tolist()
    if share != -unshared:
        raise RuntimeError("some processes found that responses can share their prompt, others that they cannot")
    model.budget = Budget(tokens, common=True, whole=whole)


def _check_plan(folder: Path, device: torch.device, size: int, kind: str) -> None:
    """Raises UserError unless the first layers, in float32, give a probe the same log-probabilities, or a reward model
    the same hidden states, in parts."""

    def first(**parts):
        return MODELS[kind](load(folder, kind, torch.float32, device, first=True, **parts), share=False)

    try:
        parts = first(tp_size=size)
        cut = [p for p in parts.parameters() if getattr(p, "placements", None) and p.to_local().shape != p.shape]
        apart = "nothing of it is cut" if not cut else None
        found = probe(parts)
        if dist.get_rank() == 0 and cut:
            whole = first()
            apart = beyond_rounding(found, probe(whole), torch.float32, " nats a token" if kind == POLICY else "")
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        if out_of_memory(error):
            raise
        apart = f"{type(error).__name__}: {error}"
    if apart:
        raise UserError(
            f"{FLAG} {size}: the library's plan for {folder} does not give the same model as one device, by a probe of "
            f"its first layers: {apart}"
        )
    parts = whole = None
    gc.collect()  # a tensor-parallel layer refers to itself
    if device.type == "cuda":
        torch.cuda.empty_cache()
