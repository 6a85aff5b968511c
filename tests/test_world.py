"""Processes that train together: they meet and agree, or say why not; a lost one is named, a slow one waited for.

What they decide is tested with a clock and a store of this process; that real ones do so at the end.
"""

import json
import os
import re
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import ranks
import torch.distributed as dist

from cream.errors import UserError
from cream.training import launch, world
from cream.training.world import LOST, MEET, SILENT, Watch


class Clock:
    """Time passes when somebody waits; `meanwhile` is what happens then, every second or oftener."""

    def __init__(self, meanwhile=lambda: None):
        self.now, self.meanwhile = 0.0, meanwhile

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        until = self.now + seconds
        while self.now < until:
            self.now = min(until, self.now + 1)
            self.meanwhile()


# They meet ------------------------------------------------------------------------------------------------------------


def meet(*processes, clock=time):
    """The names that each process hears of, or its UserError; a process: its rank, and what it expects."""
    store = dist.HashStore()

    def one(process):
        rank, size, about = process
        try:
            return world._meet(store, rank, size, about, clock)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(len(processes)) as pool:
        return [*pool.map(one, processes)]


def test_all_know_all_by_rank():
    names = [f"rank {rank} on {socket.gethostname()} (process {os.getpid()})" for rank in range(3)]
    assert meet(*((rank, 3, {"lr": 1e-4}) for rank in range(3))) == [names] * 3


def test_other_settings_are_named():
    first, second = meet((0, 2, {"lr": 1e-4, "seed": 0}), (1, 2, {"lr": 3e-4, "seed": 0}))
    for said, words in ((first, "0.0001 here, 0.0003 there"), (second, "0.0003 here, 0.0001 there")):
        assert said.endswith(f"were started with different settings or inputs: lr: {words}")
        assert all(f"rank {rank} on {socket.gethostname()}" in said for rank in (0, 1))


def test_other_world_sizes_are_named():
    first, second = meet((0, 2, {}), (1, 3, {}))
    for said, (here, there) in ((first, (2, 3)), (second, (3, 2))):
        assert re.search(rf"expects {here} processes, rank \d on \S+ \(process \d+\) {there}: WORLD_SIZE", said)


def test_a_rank_given_twice_is_named():
    store = dist.HashStore()
    store.set("who/1", json.dumps({"who": "rank 1 on b (process 7)", "world": 2, "about": {}}))
    with pytest.raises(UserError, match=r"rank 1 on .*: the same rank is taken by rank 1 on b \(process 7\)"):
        world._meet(store, 1, 2, {})


def test_missing_processes_are_named_after_a_while():
    clock = Clock()
    (said,) = meet((0, 3, {}), clock=clock)
    assert f"rank 1, 2 of 3 did not join within {MEET} s" in said
    assert MEET < clock.now < MEET + 1


def test_a_late_process_is_waited_for():
    store, late = dist.HashStore(), json.dumps({"who": "rank 1, late", "world": 2, "about": {}})
    clock = Clock(lambda: clock.now > MEET - 1 and store.set("who/1", late))
    assert world._meet(store, 0, 2, {}, clock)[1] == "rank 1, late"


@pytest.mark.slow
def test_no_first_process_is_named(place, monkeypatch):
    place(1)
    monkeypatch.setattr(world, "MEET", 0.1)
    with pytest.raises(UserError, match=r"no process answers at 127\.0\.0\.1:\d+, where rank 0 should"):
        world._store(1)


def test_a_port_in_use_is_named(place):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        place(0, MASTER_PORT=str(port))
        with pytest.raises(UserError, match=f"port {port} is in use on {socket.gethostname()}"):
            world._store(0)


def test_an_unknown_interface_is_named(place):
    place(0, GLOO_SOCKET_IFNAME="none0")
    with pytest.raises(UserError, match="GLOO_SOCKET_IFNAME=none0: this host has .*lo"), world.joined("cpu", {}):
        pass


@pytest.fixture
def place(monkeypatch):
    """Put this process in the place of one of two."""

    def put(rank, **environment):
        for name, value in (ranks.world()[rank] | environment).items():
            monkeypatch.setenv(name, value)

    return put


# They watch each other ------------------------------------------------------------------------------------------------


class Watches:
    """The watches of a world in one process, each on a host of its own; every second each that `beats` does so."""

    def __init__(self, size):
        self.clock, store = Clock(self.beat), dist.HashStore()
        names = [f"rank {rank} on host-{rank}" for rank in range(size)]
        self.all = [Watch(store, rank, names, self.clock) for rank in range(size)]
        for watch, name in zip(self.all, names, strict=True):
            watch.host = name.split()[-1]
        self.beats = [*self.all]

    def __iter__(self):
        return iter(self.all)

    def beat(self):
        for watch in self.beats:
            watch.beat()


class Unreachable:
    """A store behind a cut link."""

    def __getattr__(self, name):
        def lost(*_):
            raise RuntimeError(f"{name}: connection reset by peer")

        return lost


BROKEN = RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer [127.0.0.1]:1234")


@pytest.fixture
def watches(place, monkeypatch):
    """Makes the watches of a world; a process that a watch ends raises SystemExit."""
    place(0)
    monkeypatch.setattr(os, "_exit", sys.exit)
    return Watches


def ends(watch):
    """The code with which a look ends a process."""
    with pytest.raises(SystemExit) as ended:
        watch.look()
    return ended.value.code


def test_a_slow_process_is_waited_for(watches):
    """However long it does nothing but send heartbeats."""
    two = watches(3)
    for _ in range(100):
        two.clock.sleep(LOST)
        assert all(watch.look() for watch in two)


def test_a_finished_process_is_waited_for(watches):
    """Also by the first, which holds the store: it ends last."""
    two = watches(2)
    first, second = two

    def finish():
        two.beat()
        if two.clock.now > 10 * LOST and second in two.beats:
            two.beats.remove(second)
            second.done()

    two.clock.meanwhile = finish
    first.done()
    assert two.clock.now > 10 * LOST and first.look()
    assert second.look()


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_silent_process_is_named_to_all_after_a_while(watches, capsys, lost):
    """Frozen, say: no connection breaks. Not before LOST seconds: it may have been busy for as long."""
    three = watches(3)
    three.clock.sleep(5)
    three.beats.remove(three.all[lost])
    three.clock.sleep(LOST - 1)
    assert all(watch.look() for watch in three.beats)
    three.clock.sleep(3)
    assert [ends(watch) for watch in three.beats] == [1, 1]
    said = capsys.readouterr().err
    assert said.count(f"error: rank {lost} on host-{lost} was lost: no heartbeat for ") == 2
    assert "resumes from the last saved state" in said


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_broken_connection_is_explained_sooner(watches, capsys, lost):
    """A process was killed, and a collective of the others fails; they are told who it was."""
    three = watches(3)
    three.clock.sleep(5)
    three.beats.remove(three.all[lost])
    began = three.clock.now
    for watch in three.beats:
        ending = watch.failed(BROKEN)
        assert isinstance(ending, SystemExit) and ending.code == 1
        assert SILENT < three.clock.now - began < LOST / 2
    said = capsys.readouterr().err
    assert said.count(f"error: rank {lost} on host-{lost} was lost: no heartbeat for ") == 2
    assert said.count("(here: [gloo/transport/tcp/pair.cc] Connection closed by peer") == 2


def test_a_connection_that_breaks_while_all_live_is_an_error_of_its_own(watches):
    first, _ = watches(2)
    assert first.failed(BROKEN) is BROKEN
    assert "ended: RuntimeError: [gloo" in first.verdict.text


def test_a_cut_link_is_named_on_both_sides(watches, capsys):
    """One side has the store, and no heartbeats; the other has no store."""
    first, second = two = watches(2)
    two.clock.sleep(5)
    second.store = Unreachable()
    two.clock.sleep(LOST - 1)
    assert first.look() and second.look()
    two.clock.sleep(3)
    assert ends(first) == 1
    assert "rank 1 on host-1 was lost: no heartbeat" in capsys.readouterr().err
    assert ends(second) == 1
    assert "rank 0 on host-0 was lost, or the connection to it: 127.0.0.1:" in capsys.readouterr().err


def test_a_mistake_of_one_ends_all_and_is_told_once_on_each_host(watches, capsys, monkeypatch):
    three = watches(3)
    first, second, third = three
    third.host = second.host  # where third is
    ending = second.failed(UserError("no such file"))
    assert isinstance(ending, SystemExit) and ending.code == 2
    assert capsys.readouterr().err == "error: no such file\n"
    assert ends(first) == 2
    assert capsys.readouterr().err == "error: rank 1 on host-1 ended: no such file\n"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert ends(third) == 2
    assert not capsys.readouterr().err


def test_an_unexpected_error_of_one_ends_all(watches, capsys):
    """Its own traceback is printed there; the others end by 1 with a line of it."""
    first, second = watches(2)
    bug = ZeroDivisionError("division by zero")
    assert second.failed(bug) is bug
    assert ends(first) == 1
    assert "error: rank 1 on host-1 ended: ZeroDivisionError: division by zero" in capsys.readouterr().err


def test_the_first_verdict_stays(watches):
    first, second = watches(2)
    first.post(2, "the first")
    second.post(1, "the second")
    assert second.verdict.text == "the first"


def test_heartbeats_come_while_a_process_is_at_work(place, monkeypatch):
    """From a thread: this one is busy in Python until it has seen some."""
    place(1)
    monkeypatch.setattr(world, "BEAT", 0.001)
    store = dist.HashStore()
    watch = Watch(store, 1, ["first", "second"])
    watch.start()
    until = time.monotonic() + LOST / 2
    while not (store.check(["beat/1"]) and int(store.get("beat/1")) > 3):
        assert time.monotonic() < until
    watch.done()
    assert store.get("beat/1") == b"done"


# Real processes -------------------------------------------------------------------------------------------------------


def both_cores(test):
    """A test that starts several processes."""
    return pytest.mark.slow(pytest.mark.xdist_group("both cores")(test))


SCRIPT = """
import torch, torch.distributed as dist
from cream.errors import UserError
from cream.training import world
world.BEAT = 0.3
def open_missing():
    raise UserError("no such file")
with world.joined("cpu", {}):
    rank, total = dist.get_rank(), torch.ones(1)
    BODY
"""


def joined(workspace, body):
    """How two processes end that join and do this."""
    script = workspace.folder / "join.py"
    script.write_text(SCRIPT.replace("BODY", body))
    return ranks.run(workspace, script.name)


@both_cores
def test_two_meet_and_compute_together(workspace):
    """The first, which holds the store, has nothing to do after the sum, and the other finds it still there."""
    ended = joined(workspace, "dist.all_reduce(total); print(int(total), dist.is_initialized())")
    assert ended == [(0, "2 True\n")] * 2


@both_cores
def test_a_mistake_of_one_ends_both(workspace):
    """One waits for the other in a collective."""
    (code, out), mistaken = joined(workspace, "dist.all_reduce(total) if rank == 0 else open_missing()")
    assert mistaken == (2, "error: no such file\n")
    assert code == 2 and "no such file" not in out  # it is told once on a host


@both_cores
@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_process_is_named_by_the_other(workspace, lost):
    """Amid training, whether it is the one that holds the store or not."""
    train = "--model tiny --name tiny_sft --device cpu --train_bsz 4 --limit_size 40 --output_dir outputs"
    ended = ranks.run(workspace, f"{ranks.disturbed(f'lost 3 {lost}')} {train}/lost-{lost}")
    assert ended[lost][0] == -signal.SIGKILL
    code, out = ended[1 - lost]
    assert code == 1, out
    assert re.search(rf"error: rank {lost} on {socket.gethostname()} \(process \d+\) was lost", out), out
    assert "Traceback" not in out


# Where the world comes from -------------------------------------------------------------------------------------------


@pytest.fixture
def environment(monkeypatch):
    """The variables of launchers, none set."""
    for name in [n for n in os.environ if n.startswith("SLURM_")] + ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"]:
        monkeypatch.delenv(name, raising=False)

    def put(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


STEP = {
    "SLURM_JOB_ID": "123456",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_STEP_NODELIST": "node[07-08]",
}


def test_tasks_of_srun_find_their_place(environment, monkeypatch, tmp_path):
    environment(**STEP, PATH=f"{tmp_path}:{os.environ['PATH']}")
    fake = tmp_path / "scontrol"
    fake.write_text('#!/bin/sh\n[ "$*" = "show hostnames node[07-08]" ] && printf "node07\\nnode08\\n"\n')
    fake.chmod(0o755)
    assert launch.given_world() == 16 and not launch.is_first_process()
    assert launch._slurm(None) == launch._place(9, 1, 16, 8, "node07", 20000 + 123456 % 20000)
    assert launch._slurm(1234)["MASTER_PORT"] == "1234"
    environment(MASTER_ADDR="10.0.0.1", MASTER_PORT="29500")
    assert launch._slurm(1234) == launch._place(9, 1, 16, 8, "10.0.0.1", 29500)


def test_srun_without_scontrol_needs_an_address(environment):
    environment(**STEP, PATH="")
    with pytest.raises(UserError, match="MASTER_ADDR"):
        launch._slurm(None)


def test_a_batch_script_itself_is_no_world(environment):
    environment(SLURM_JOB_ID="1", SLURM_PROCID="0", SLURM_NTASKS="16", SLURM_LOCALID="0")
    assert launch.given_world() is None and launch.is_first_process()
