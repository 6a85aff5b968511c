"""The processes that train together: they meet, check that they agree, and notice when one is lost.

All use one key-value store, the first process's or torchrun's. Before any collective each writes there who it is and
with which settings it was started; then its heartbeats, from a thread of its own. A slow process is waited for without
end; a lost one ends the others, which name it. Time-outs of the back-end cannot tell one from the other, and their
errors have no rank; a launcher's error records (torch elastic) stay on the host of the process that failed.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from cream.cli import interrupts, screen
from cream.errors import UserError, user_error
from cream.scoring import network
from cream.scoring.network import FOREVER

log = logging.getLogger("cream")
MEET = 300  # seconds within which all processes must have joined
BEAT = 2  # seconds between two heartbeats
SILENT = 10  # seconds without a heartbeat after which a process counts as lost, once a collective has failed
LOST = 45  # the same, while nothing else points to it
AGAIN = "the same command, started everywhere, resumes from the last saved state"


@contextmanager
def joined(kind: str, about: dict) -> Iterator[None]:
    """Within it torch.distributed is set up over the world of RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    `about` must be the same in all processes, name -> value. Raises UserError, naming the process, where it is not, and
    where processes are missing after MEET seconds. Once all have joined, an error in one, or a lost one, is printed on
    each host and ends all by SystemExit.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    network.choose_interface()
    store = _store(rank)
    names = _meet(store, rank, world, about)
    watch = Watch(store, rank, names)
    watch.start()
    try:
        _connect(kind, dist.PrefixStore("group", store), rank, world, watch)
        yield
    except interrupts.Interrupted as interrupted:
        if not interrupted.agreed:
            watch.post(interrupted.code, f"{names[rank]} was interrupted; {AGAIN}")
            time.sleep(2 * BEAT)  # so that the others see it
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
    """Set up the process group. Connecting may take MEET seconds; after that a collective may take any time."""
    store.set_timeout(FOREVER)  # one process may have loaded long before the first collective
    c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = FOREVER  # for the groups that DeepSpeed makes
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
    """A socket that listens at that address alone, since the store has no authentication. None, with which the store
    listens everywhere, where the address is not this host's own (a service's, say)."""
    try:
        family, _, _, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(place[:2], family=family, backlog=1024).detach()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"port {port} is in use on {socket.gethostname()}, by another run perhaps; give another "
                "--master_port (or MASTER_PORT)"
            ) from None
        return None


def _meet(store: dist.Store, rank: int, world: int, about: dict, clock=time) -> list[str]:
    """Wait for all processes and check that they agree; returns their names (rank, host, process) by rank."""
    me = f"rank {rank} on {socket.gethostname()} (process {os.getpid()})"
    mine = json.dumps({"who": me, "world": world, "about": about}, sort_keys=True)
    first = store.compare_set(f"who/{rank}", "", mine).decode()
    if first != mine:
        raise UserError(f"{me}: the same rank is taken by {json.loads(first)['who']}; each process needs its own RANK")
    try:
        processes = _wait_for_all(store, me, world, clock)
    except RuntimeError:
        raise UserError(f"{me}: rank 0 ended while the processes were meeting; its own message says why") from None
    for theirs in processes:
        if theirs["world"] != world:
            raise UserError(
                f"{me} expects {world} processes, {theirs['who']} {theirs['world']}: WORLD_SIZE must be the same"
            )
        if theirs["about"] != about:
            other = {name: theirs["about"].get(name) for name in about if theirs["about"].get(name) != about[name]}
            said = "; ".join(f"{name}: {about[name]} here, {value} there" for name, value in other.items())
            raise UserError(f"{me} and {theirs['who']} were started with different settings or inputs: {said}")
    return [theirs["who"] for theirs in processes]


def _wait_for_all(store: dist.Store, me: str, world: int, clock) -> list[dict]:
    """What the processes say about themselves, by rank; of as many as the smallest world any expects."""
    deadline, processes = clock.monotonic() + MEET, []
    while len(processes) < min([world, *(theirs["world"] for theirs in processes)]):
        if store.check([f"who/{len(processes)}"]):
            processes.append(json.loads(store.get(f"who/{len(processes)}")))
        elif clock.monotonic() > deadline:
            missing = [str(r) for r in range(world) if not store.check([f"who/{r}"])]
            raise UserError(f"{me}: rank {', '.join(missing)} of {world} did not join within {MEET} s")
        else:
            clock.sleep(0.05)
    return processes


class Verdict(NamedTuple):
    """Why all processes end, who found out, and the exit code: 2 for an error that the user can fix, else 1."""

    rank: int
    host: str
    code: int
    text: str


class Watch:
    """Heartbeats: each process sends its own; the first watches all, the others the first.

    A verdict (who was lost, or why one failed) is put in the store, where all see it; one process of each host prints
    it, and all end. `clock` tells the time and waits, as the module `time` does.
    """

    def __init__(self, store: dist.Store, rank: int, names: list[str], clock=time):
        self.store, self.rank, self.names, self.clock = store.clone(), rank, names, clock
        self.host = socket.gethostname()
        watched = [r for r in range(len(names)) if r != rank] if rank == 0 else [0]
        self.heard = dict.fromkeys(watched, (b"", clock.monotonic()))  # by rank: its last heartbeat, and when it came
        self.count, self.contact = 0, clock.monotonic()
        self.verdict: Verdict | None = None
        self.ended = threading.Event()
        self.threads: list[threading.Thread] = []

    def start(self) -> None:
        """Beat and look from now on, in threads: whatever this process does meanwhile."""
        for act, seconds in ((self.beat, BEAT), (self.look, 1)):
            self.threads.append(threading.Thread(target=self._repeat, args=(act, seconds), daemon=True))
            self.threads[-1].start()

    def _repeat(self, act: Callable[[], bool], seconds: float) -> None:
        while not self.ended.is_set() and act():
            self.ended.wait(seconds)

    def done(self) -> None:
        """This process has finished. The first, which may hold the store, waits for all, and watches them meanwhile."""
        if self.rank > 0:
            self.ended.set()
            for thread in self.threads[:1]:  # which beats
                thread.join()
            self.store.set(f"beat/{self.rank}", "done")
        while self.rank == 0 and any(since < math.inf for _, since in self.heard.values()):
            self.clock.sleep(0.2)
        self.ended.set()

    def failed(self, error: Exception) -> BaseException:
        """The exception to end with. Its own error is posted for all; a broken connection becomes who was lost."""
        error = user_error(error) or error
        if isinstance(error, UserError):
            self.post(2, f"{self.names[self.rank]} ended: {error}")
            self._print(str(error))
        elif not _of_a_connection(error):
            return self._unexpected(error)
        else:
            until = self.clock.monotonic() + SILENT + 4 * BEAT
            while self.verdict is None:
                if self.clock.monotonic() > until:
                    return self._unexpected(error)
                self.clock.sleep(0.2)
                if lost := self._silent(SILENT):
                    self.post(1, lost)
            self._print(f"{self.verdict.text} (here: {str(error).splitlines()[0]})")
        self.clock.sleep(2 * BEAT)  # so that the others see the verdict: the store may end with this process
        return SystemExit(self.verdict.code)

    def _unexpected(self, error: Exception) -> Exception:
        """An unexpected error: its traceback is printed here, one line of it by the others."""
        self.post(1, f"{self.names[self.rank]} ended: {type(error).__name__}: {error}")
        self.ended.set()
        self.clock.sleep(2 * BEAT)
        return error

    def post(self, code: int, text: str) -> None:
        """Make this the verdict, if there is none yet."""
        self.verdict = mine = Verdict(self.rank, self.host, code, text)
        if self.clock.monotonic() - self.contact > 3 * BEAT:  # the store itself was lost: asking it would take minutes
            return
        with suppress(RuntimeError):
            self.verdict = Verdict(*json.loads(self.store.compare_set("verdict", "", json.dumps(mine))))

    def _print(self, text: str) -> None:
        """Print the verdict, in these words, if this is the process of its host that does."""
        self.ended.set()
        there = self.verdict.host == self.host
        if self.verdict.rank == self.rank or (not there and os.environ["LOCAL_RANK"] == "0"):
            screen.show_error(f"error: {text}")

    def beat(self) -> bool:
        """Send a heartbeat, read the others' and the verdict; False where the store is gone, as `look` reports."""
        self.count += 1
        try:
            self.store.set(f"beat/{self.rank}", str(self.count))
            for other, (before, _) in self.heard.items():
                key = f"beat/{other}"
                value = self.store.get(key) if self.store.check([key]) else b""
                if value != before:
                    self.heard[other] = value, math.inf if value == b"done" else self.clock.monotonic()
            if self.store.check(["verdict"]):
                self.verdict = Verdict(*json.loads(self.store.get("verdict")))
        except RuntimeError:
            return False
        self.contact = self.clock.monotonic()
        return True

    def look(self) -> bool:
        """Make it the verdict that a process was lost; True where there is no verdict, else this process ends."""
        if self.verdict is None and (lost := self._silent(LOST)):
            self.post(1, lost)
        if self.verdict is None:
            return True
        self.clock.sleep(2)  # a main thread that fails by itself ends by itself, with a better message
        if not self.ended.is_set():
            self._print(self.verdict.text)
            self.clock.sleep(2 * BEAT if self.rank == 0 else 0)
            os._exit(self.verdict.code)
        return False

    def _silent(self, seconds: float) -> str | None:
        """A message about a process without a heartbeat for so long; None if there is none."""
        now = self.clock.monotonic()
        if now - self.contact > seconds:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            silence = f"{where} has not answered for {now - self.contact:.0f} s"
            return f"{self.names[0]} was lost, or the connection to it: {silence}; {AGAIN}"
        for other, (_, since) in self.heard.items():
            if now - since > seconds:
                return f"{self.names[other]} was lost: no heartbeat for {now - since:.0f} s; {AGAIN}"
        return None


def _of_a_connection(error: RuntimeError) -> bool:
    """Whether a collective failed because another process is gone."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        word in text for word in ("connection", "gloo", "nccl", "timed out", "socket", "broken pipe")
    )
