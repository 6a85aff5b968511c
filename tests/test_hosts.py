"""Two network namespaces as two hosts: training by torchrun, a cut link.

Needs the right to make namespaces (root, iproute2); skipped without.
"""

import os
import shutil
import subprocess
import sys

import pytest
import ranks
from processes import started
from test_parallel import RANK, STAGES, check_equal, trained, world  # noqa: F401  fixtures

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("both cores")]

HOSTS = {"cream-a": "10.77.0.1", "cream-b": "10.77.0.2"}
FIRST, PORT = "10.77.0.1", "29400"


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


def test_two_hosts_train_by_torchrun_as_one_process(world, hosts, trained):  # noqa: F811
    """One of them reports, and saves."""
    run = world.folder / "outputs/hosts"
    train = world.argv(f"train.py {STAGES['sft']} {RANK} --output_dir {run}")
    torchrun = ["-m", "torch.distributed.run", "--nnodes", "2", "--master_addr", FIRST, "--master_port", PORT]
    exec_as = ["unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"']  # as that host sees its own name
    first, second = (
        started(
            ["ip", "netns", "exec", name, *exec_as, name, sys.executable, *torchrun, "--node_rank", str(rank), *train],
            cwd=world.folder,
            env={k: v for k, v in os.environ.items() if not k.startswith(("GLOO_", "NCCL_"))},
        )
        for rank, name in enumerate(hosts)
    )
    with first as one, second as two:
        said = [process.communicate()[0] for process in (one, two)]
        assert [one.returncode, two.returncode] == [0, 0], said
    assert "next, sample its responses" in said[0] and "step 6/6" in said[0] and "step 6/6" not in said[1]
    assert (run / "meta.json").exists()
    check_equal(world, run, trained("sft", "one process"))


def test_a_cut_link_ends_both_hosts(world, hosts):  # noqa: F811
    """Amid training; each names the process of the other."""
    places = [place | {"HOST": host} for place, host in zip(ranks.world(2, FIRST, 1), hosts, strict=True)]
    train = f"{STAGES['sft']} {RANK} --output_dir outputs/cut"
    first, second = ranks.run(world, f"{ranks.disturbed('cut 3 1')} {train}", places)
    assert first[0] == second[0] == 1
    assert "rank 1 on cream-b" in first[1] and "was lost: no heartbeat" in first[1], first
    assert "rank 0 on cream-a" in second[1] and f"was lost, or the connection to it: {FIRST}" in second[1], second
