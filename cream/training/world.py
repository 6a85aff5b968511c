"""The processes that train together: how they meet, that they agree, and that none is lost unseen.

All speak to one key-value store, the first process's or torchrun's. There each says who it is and what it is about to
do before any collective starts, and then that it is alive, from a thread of its own: a slow process is waited for
without end, a lost one ends the others by name.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from cream.cli import interrupts
from cream.errors import UserError, mendable
from cream.scoring import network
from cream.scoring.network import FOREVER

log = logging.getLogger("cream")
MEET = 300  # seconds in which all processes must have come
BEAT = 2  # seconds between two signs of life
SILENT = 10  # seconds without one after which a process counts as lost, once a collective has failed
LOST = 45  # the same, while nothing else points to it
AGAIN = "the same command, started everywhere, goes on from the last checkpoint"


@contextmanager
def joined(kind: str, about: dict) -> Iterator[None]:
    """Within it torch.distributed is set up over the world of RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    `about` is what must be the same in all processes, name -> value. Raises UserError naming the process where it is
    not, and where processes are missing after MEET seconds. Once all have met, a mistake found in one, or a lost one,
    is printed on each host and ends all by SystemExit.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    network.interface()
    store = _store(rank)
    people = _roll_call(store, rank, world, about)
    watch = Watch(store, rank, people)
    try:
        _connect(kind, dist.PrefixStore("group", store), rank, world, watch)
        yield
    except interrupts.Interrupted as stop:
        if not stop.agreed:
            watch.post(stop.code, f"{people[rank]} was interrupted; {AGAIN}")
            time.sleep(2 * BEAT)  # the others are to see it
            raise
        watch.done()
        raise
    except Exception as error:
        ending = watch.failed(error)
        if ending is error:
            raise
        raise ending from None
    watch.done()
    if dist.is_initialized():
        dist.destroy_process_group()


def _connect(kind: str, store: dist.Store, rank: int, world: int, watch: Watch) -> None:
    """The process group. The connections between processes are tried for MEET seconds; then a collective may last."""
    store.set_timeout(FOREVER)  # the first collective may come when one process has loaded long since
    c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = FOREVER  # of the groups that DeepSpeed makes
    reason = (
        f"the processes cannot connect to each other within {MEET} s, though all reach {os.environ['MASTER_ADDR']}: a "
        "firewall between them, or GLOO_SOCKET_IFNAME / NCCL_SOCKET_IFNAME names the wrong interface"
    )
    limit = threading.Timer(MEET, lambda: watch.post(2, reason))
    limit.daemon = True
    limit.start()
    backend = "gloo" if kind == "cpu" else "nccl"
    dist.init_process_group(backend, timeout=FOREVER, world_size=world, rank=rank, store=store)
    limit.cancel()


def _store(rank: int) -> dist.Store:
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    first = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun holds the store
    ready = {"master_listen_fd": _listening(address, port)} if first else {}
    try:
        store = dist.TCPStore(address, port, None, first, timedelta(seconds=MEET), wait_for_workers=False, **ready)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"no process answers at {address}:{port}, where rank 0 should (asked from {socket.gethostname()}): "
            f"{str(error).splitlines()[0]}"
        ) from None
    return dist.PrefixStore(f"cream/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _listening(address: str, port: int) -> int | None:
    """A socket that listens there, at that address alone: the store asks nobody who he is. None, which listens
    everywhere, where the address is not this host's own (a service's, say)."""
    try:
        family, _, _, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(place[:2], family=family, backlog=1024).detach()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"port {port} is in use on {socket.gethostname()}: another run has it; give another --master_port (or "
                "MASTER_PORT)"
            ) from None
        return None


def _roll_call(store: dist.Store, rank: int, world: int, about: dict) -> list[str]:
    """Who all are, in words, by rank; all have come and are about the same."""
    me = f"rank {rank} on {socket.gethostname()} (process {os.getpid()})"
    mine = json.dumps({"who": me, "world": world, "about": about}, sort_keys=True)
    found = store.compare_set(f"who/{rank}", "", mine).decode()
    if found != mine:
        raise UserError(f"{me}: the same rank is taken by {json.loads(found)['who']}; each process needs its own RANK")
    try:
        everybody = _everybody(store, me, world)
    except RuntimeError:
        raise UserError(f"{me}: rank 0 ended while the processes were meeting; its own message says why") from None
    for theirs in everybody:
        if theirs["world"] != world:
            raise UserError(
                f"{me} was told of {world} processes, {theirs['who']} of {theirs['world']}: WORLD_SIZE must be the same"
            )
        if theirs["about"] != about:
            names = [name for name in about if theirs["about"].get(name) != about[name]]
            said = "; ".join(f"{name}: {about[name]} here, {theirs['about'].get(name)} there" for name in names)
            raise UserError(f"{me} is not to do what {theirs['who']} is: {said}")
    return [theirs["who"] for theirs in everybody]


def _everybody(store: dist.Store, me: str, world: int) -> list[dict]:
    """What the processes say of themselves, by rank; of as many as the smallest world that one was told of."""
    deadline, found = time.monotonic() + MEET, []
    while len(found) < min([world, *(theirs["world"] for theirs in found)]):
        if store.check([f"who/{len(found)}"]):
            found.append(json.loads(store.get(f"who/{len(found)}")))
        elif time.monotonic() > deadline:
            missing = [str(r) for r in range(world) if not store.check([f"who/{r}"])]
            raise UserError(f"{me}: rank {', '.join(missing)} of {world} did not come within {MEET} s")
        else:
            time.sleep(0.05)
    return found


class Verdict(NamedTuple):
    """Why all are to end, who found out, and the exit code: 2 for a user's mistake, else 1."""

    rank: int
    host: str
    code: int
    text: str


class Watch:
    """Signs of life: each process gives its own, the first looks at all and the others at the first. A verdict, who was
    lost or why one failed, stands in the store for all to see; one process of a host prints it, and all end."""

    def __init__(self, store: dist.Store, rank: int, people: list[str]):
        self.store, self.rank, self.people = store.clone(), rank, people
        watched = [r for r in range(len(people)) if r != rank] if rank == 0 else [0]
        self.heard = dict.fromkeys(watched, (b"", time.monotonic()))  # by rank: its last sign, and when it came
        self.contact = time.monotonic()
        self.verdict: Verdict | None = None
        self.ended = threading.Event()
        self.threads = [threading.Thread(target=f, daemon=True) for f in (self._beat, self._look)]
        for thread in self.threads:
            thread.start()

    def done(self) -> None:
        """This process has finished. The first, which may hold the store, waits for all, and watches them meanwhile."""
        if self.rank > 0:
            self.ended.set()
            self.threads[0].join()
            self.store.set(f"beat/{self.rank}", "done")
        while self.rank == 0 and any(since < math.inf for _, since in self.heard.values()):
            time.sleep(0.2)
        self.ended.set()

    def failed(self, error: Exception) -> BaseException:
        """What to end with. An error of this process is told to all; one of a connection becomes whom it was to."""
        error = mendable(error) or error
        if isinstance(error, UserError):
            self.post(2, f"{self.people[self.rank]} ended: {error}")
            self._tell(str(error))
        elif not _of_a_connection(error):
            return self._own(error)
        else:
            until = time.monotonic() + SILENT + 4 * BEAT
            while self.verdict is None:
                if time.monotonic() > until:
                    return self._own(error)
                time.sleep(0.2)
                if lost := self._silent(SILENT):
                    self.post(1, lost)
            self._tell(f"{self.verdict.text} (here: {str(error).splitlines()[0]})")
        time.sleep(2 * BEAT)  # the others are to see the verdict: the store may end with this process
        return SystemExit(self.verdict.code)

    def _own(self, error: Exception) -> Exception:
        """An error that nobody foresaw: its traceback is for here, a line of it for the others."""
        self.post(1, f"{self.people[self.rank]} ended: {type(error).__name__}: {error}")
        self.ended.set()
        time.sleep(2 * BEAT)
        return error

    def post(self, code: int, text: str) -> None:
        """Make this the verdict, if there is none yet."""
        self.verdict = mine = Verdict(self.rank, socket.gethostname(), code, text)
        if time.monotonic() - self.contact > 3 * BEAT:  # it is the store that was lost: asking it would take minutes
            return
        with suppress(RuntimeError):
            self.verdict = Verdict(*json.loads(self.store.compare_set("verdict", "", json.dumps(mine))))

    def _tell(self, text: str) -> None:
        """Print the verdict, in these words, where this is the process of its host that does."""
        self.ended.set()
        there = self.verdict.host == socket.gethostname()
        if self.verdict.rank == self.rank or (not there and os.environ["LOCAL_RANK"] == "0"):
            print(f"error: {text}", file=sys.stderr, flush=True)

    def _beat(self) -> None:
        count = 0
        while not self.ended.wait(BEAT if count else 0):
            count += 1
            try:
                self.store.set(f"beat/{self.rank}", str(count))
                for other, (before, _) in self.heard.items():
                    key = f"beat/{other}"
                    value = self.store.get(key) if self.store.check([key]) else b""
                    if value != before:
                        self.heard[other] = value, math.inf if value == b"done" else time.monotonic()
                if self.store.check(["verdict"]):
                    self.verdict = Verdict(*json.loads(self.store.get("verdict")))
            except RuntimeError:
                return  # the store is gone, which the silence shows
            self.contact = time.monotonic()

    def _look(self) -> None:
        while not self.ended.wait(1):
            if self.verdict is None and (lost := self._silent(LOST)):
                self.post(1, lost)
            if self.verdict is None:
                continue
            time.sleep(2)  # a main thread that fails by itself ends by itself, and says more
            if not self.ended.is_set():
                self._tell(self.verdict.text)
                time.sleep(2 * BEAT if self.rank == 0 else 0)
                os._exit(self.verdict.code)

    def _silent(self, seconds: float) -> str | None:
        """Who has not been heard of for so long; None while nobody."""
        now = time.monotonic()
        if now - self.contact > seconds:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            silence = f"{where} does not answer since {now - self.contact:.0f} s"
            return f"{self.people[0]} was lost, or the way to it: {silence}; {AGAIN}"
        for other, (_, since) in self.heard.items():
            if now - since > seconds:
                return f"{self.people[other]} was lost: not heard of for {now - since:.0f} s; {AGAIN}"
        return None


def _of_a_connection(error: RuntimeError) -> bool:
    """Whether a collective failed because another process is gone."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        word in text for word in ("connection", "gloo", "nccl", "timed out", "socket", "broken pipe")
    )
