"""Two network namespaces as two hosts: training, a cut link. By torchrun, on one host: tests/test_parallel.py.

Needs the right to make namespaces (root, iproute2); skipped without.
"""

import os
import shutil
import subprocess

import pytest
import ranks
from test_parallel import RANK, STAGES, check_equal, trained, world  # noqa: F401  fixtures

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("both cores")]

HOSTS = {"cream-a": "10.77.0.1", "cream-b": "10.77.0.2"}
FIRST = "10.77.0.1"


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts():
    """Their names; a link connects them, nothing leads out."""
    if os.geteuid() or not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("needs root, ip and unshare to make network namespaces")
    for name in HOSTS:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
    try:
        for name in HOSTS:
            ip("netns", "add", name)
        ip("link", "add", "cream0", "netns", "cream-a", "type", "veth", "peer", "name", "cream0", "netns", "cream-b")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.decode().strip()}")
    for name, address in HOSTS.items():
        ip("-n", name, "address", "add", f"{address}/24", "dev", "cream0")
        for device in ("lo", "cream0"):
            ip("-n", name, "link", "set", device, "up")
    yield [*HOSTS]
    for name in HOSTS:
        ip("netns", "del", name)


def on(hosts):
    """The environments of a process on each."""
    return [place | {"HOST": host} for place, host in zip(ranks.world(2, FIRST, 1), hosts, strict=True)]


def test_two_hosts_train_as_one_process(world, hosts, trained):  # noqa: F811
    """One of them reports, and saves."""
    run = world.folder / "outputs/hosts"
    (one, first), (two, second) = ranks.run(world, f"train.py {STAGES['sft']} {RANK} --output_dir {run}", on(hosts))
    assert [one, two] == [0, 0], (first, second)
    assert "next, sample its responses" in first and "step 6/6" in first and "step 6/6" not in second
    assert (run / "meta.json").exists()
    check_equal(world, run, trained("sft", "one process"))


def test_a_cut_link_ends_both_hosts(world, hosts):  # noqa: F811
    """Amid training; each names the process of the other."""
    train = f"{STAGES['sft']} {RANK} --output_dir outputs/cut"
    first, second = ranks.run(world, f"{ranks.disturbed('cut 3 1')} {train}", on(hosts))
    assert first[0] == second[0] == 1
    assert "rank 1 on cream-b" in first[1] and "was lost: no heartbeat" in first[1], first
    assert "rank 0 on cream-a" in second[1] and f"was lost, or the connection to it: {FIRST}" in second[1], second
