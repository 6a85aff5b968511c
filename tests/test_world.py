"""Processes that train together: they meet and agree, or say why not; a lost one is named, a slow one waited for."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from cream.errors import UserError
from cream.training import launch

CHILD = """
import sys, time
import torch, torch.distributed as dist
from cream.errors import UserError
from cream.training import world
world.MEET, world.BEAT, world.SILENT, world.LOST = 20, 0.3, 2, 6
try:
    with world.joined("cpu", {about}):
        rank, total = dist.get_rank(), torch.ones(1)
        print("joined", flush=True)
        {body}
except UserError as error:
    print(f"error: {{error}}", flush=True)
    sys.exit(2)
"""
SUM = "dist.all_reduce(total); print(int(total), flush=True)"


@pytest.fixture
def start(repo):
    """Start the process of a rank; all are ended with the test."""
    started = []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]

    def child(rank, body=SUM, about="{}", world=2, port=free, **environment):
        place = launch._place(rank, rank, world, world, "127.0.0.1", port)
        given = os.environ | place | {"PYTHONPATH": str(repo)} | environment
        code = [sys.executable, "-c", CHILD.format(body=body, about=about)]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(code, env=given, stdout=pipe, stderr=subprocess.STDOUT, text=True))
        return started[-1]

    yield child
    for process in started:
        process.kill()
        process.communicate()


def ended(process, code):
    """What it printed; it must end with a code, and soon."""
    out, _ = process.communicate(timeout=120)
    assert process.returncode == code, out
    return out


@pytest.mark.slow
def test_they_meet_and_a_slow_one_is_waited_for(start):
    """Also one that is at work, in Python, for longer than a silent one would be borne; and one that has finished."""
    slow = "until = time.time() + 9\n        while time.time() < until: pass\n        " + SUM
    for process in [start(0), start(1, slow)]:
        assert "2" in ended(process, 0)
    early, late = start(0, "time.sleep(9)"), start(1, "pass")
    ended(late, 0)
    ended(early, 0)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_process_ends_the_others_by_name(start, lost):
    """Whether it is the one that holds the store or not; the other waits for it in a collective."""
    bodies = ["time.sleep(1); dist.all_reduce(total)"] * 2
    bodies[lost] = "time.sleep(100)"
    processes = [start(rank, body) for rank, body in enumerate(bodies)]
    assert processes[lost].stdout.readline() == "joined\n"
    time.sleep(1)
    processes[lost].send_signal(signal.SIGKILL)
    began = time.monotonic()
    out = processes[1 - lost].communicate(timeout=120)[0]
    assert processes[1 - lost].returncode in (1, 2) and time.monotonic() - began < 30
    assert f"rank {lost} on {socket.gethostname()} (process {processes[lost].pid}) was lost" in out, out
    assert "Traceback" not in out


@pytest.mark.slow
def test_a_frozen_process_ends_the_others_by_name(start):
    """No connection breaks; it is only silent."""
    processes = [start(0), start(1, "time.sleep(100)")]
    assert processes[1].stdout.readline() == "joined\n"
    processes[1].send_signal(signal.SIGSTOP)
    assert f"rank 1 on {socket.gethostname()}" in ended(processes[0], 1)


@pytest.mark.slow
def test_a_mistake_of_one_ends_all(start):
    processes = [start(0), start(1, "raise UserError('no such file')")]
    assert "error: no such file" in ended(processes[1], 2)
    assert "no such file" not in ended(processes[0], 2)  # once on a host


@pytest.mark.slow
@pytest.mark.parametrize(
    "first, second, words",
    [
        ({"about": "{'lr': 1e-4, 'seed': 0}"}, {"about": "{'lr': 3e-4, 'seed': 0}"}, ["lr: 0.0003 here, 0.0001 there"]),
        ({"world": 2}, {"world": 3}, ["expects 3 processes", " 2: WORLD_SIZE", "WORLD_SIZE"]),
        ({}, {"rank": 0}, []),
    ],
    ids=["other settings", "other world sizes", "the same rank"],
)
def test_what_is_not_the_same_is_named(start, first, second, words):
    processes = [start(**{"rank": 0} | first), start(**{"rank": 1} | second)]
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert any(process.returncode == 2 for process in processes), said
    assert not any("Traceback" in text for text in said), said
    if words:
        assert all(word in said[1] for word in words), said
    else:  # both would be the store
        assert any("in use" in text or "same rank" in text for text in said), said


@pytest.mark.slow
def test_missing_processes_are_named(start):
    assert "rank 1, 2 of 3 did not join" in ended(start(0, world=3), 2)
    assert "no process answers at 127.0.0.1" in ended(start(1, world=2), 2)


@pytest.mark.slow
def test_a_port_in_use_and_an_unknown_interface_are_named(start):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port} is in use" in ended(start(0, port=port), 2)
    said = ended(start(0, GLOO_SOCKET_IFNAME="none0"), 2)
    assert "GLOO_SOCKET_IFNAME=none0: this host has " in said and "lo" in said


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
