"""Two network namespaces as two hosts, torchrun between them: training, a killed process, a cut link.

Needs the right to make namespaces (root, iproute2); skipped without.
"""

import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
from test_parallel import STAGES, found, world  # noqa: F401  fixtures

ADDRESSES = {"cream-a": "10.77.0.1", "cream-b": "10.77.0.2"}
TRAIN = f"train.py {STAGES['dpo']} --device cpu --train_bsz 4 --log_every 1"


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts():
    """Start a command on a host, as that host sees the network and its own name."""
    if os.geteuid() or not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("needs root, ip and unshare to make network namespaces")
    for name in ADDRESSES:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
    try:
        for name in ADDRESSES:
            ip("netns", "add", name)
        ip("link", "add", "cream0", "netns", "cream-a", "type", "veth", "peer", "name", "cream0", "netns", "cream-b")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.decode().strip()}")
    for name, address in ADDRESSES.items():
        ip("-n", name, "address", "add", f"{address}/24", "dev", "cream0")
        for device in ("lo", "cream0"):
            ip("-n", name, "link", "set", device, "up")
    started = []

    def start(name, folder, argv):
        words = ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', name]
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("GLOO_", "NCCL_"))}
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            [*words, sys.executable, *argv],
            cwd=folder,
            env=environment,
            stdout=pipe,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:  # the workers are in sessions of their own
            for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                each.kill()
        process.wait()
    for name in ADDRESSES:
        ip("netns", "del", name)


@pytest.fixture
def torchrun(hosts, world):  # noqa: F811
    """Start a training command on both hosts."""

    def run(command):
        place = "-m torch.distributed.run --nnodes 2 --nproc_per_node 1 --master_addr 10.77.0.1 --master_port 29400"
        return [
            hosts(name, world.folder, world.argv(f"{place} --node_rank {rank} {command}"))
            for rank, name in enumerate(ADDRESSES)
        ]

    return run


def worker_of(process):
    """The id of the training process below a torchrun."""
    (child,) = psutil.Process(process.pid).children()
    return child.pid


def until_step(run, step):
    """Wait for a line of the log."""
    log, deadline = run / "log.jsonl", time.monotonic() + 120
    while not log.exists() or log.read_text().count("\n") < step:
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_two_hosts_train_and_save(world, torchrun):  # noqa: F811
    run = world.folder / "outputs/hosts"
    said = [(process.communicate()[0], process.returncode) for process in torchrun(f"{TRAIN} --output_dir {run}")]
    assert not any(code for _, code in said), said
    assert (run / "checkpoint-last/model.safetensors").exists() and (run / "meta.json").exists()
    assert "next, sample its responses" in said[0][0] and "step 20/20" not in said[1][0]


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_process_is_named_with_its_host(world, torchrun, lost):  # noqa: F811
    run = world.folder / f"outputs/killed-{lost}"
    processes = torchrun(f"{TRAIN} --output_dir {run} --epoch 50")
    until_step(run, 3)
    os.kill(worker_of(processes[lost]), signal.SIGKILL)
    began = time.monotonic()
    out = processes[1 - lost].communicate(timeout=120)[0]
    took = time.monotonic() - began
    print(f"rank {lost} killed: the other ended after {took:.0f} s")
    assert processes[1 - lost].returncode and took < 60
    assert f"rank {lost} on {list(ADDRESSES)[lost]} (process " in out and "was lost" in out, out


@pytest.mark.slow
def test_a_cut_link_ends_both(world, torchrun):  # noqa: F811
    run = world.folder / "outputs/cut"
    processes = torchrun(f"{TRAIN} --output_dir {run} --epoch 50")
    until_step(run, 3)
    ip("-n", "cream-b", "link", "set", "cream0", "down")
    began = time.monotonic()
    said = [process.communicate(timeout=300)[0] for process in processes]
    print(f"link cut: both had ended after {time.monotonic() - began:.0f} s")
    assert all(process.returncode for process in processes)
    assert "rank 1 on cream-b" in said[0] and "was lost" in said[0], said[0]
    assert "rank 0 on cream-a" in said[1] and "was lost" in said[1], said[1]
