"""A Ray cluster simulated on this machine, started once: what stages give there, also when a node is removed amid."""

import os
import select
import socket
import sys
from contextlib import suppress
from pathlib import Path

import processes
import psutil
import pytest

from cream.files.store import read
from cream.records import Rewards, Samples

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("both cores")]

PROMPTS = 240  # five batches, of which four are in hand: some are left
SAMPLE = "infer.py --model tiny --checkpoint assets/tiny_m0 --name outputs/prompts.json --gen_n 2 --engine hf"
SAMPLE += " --gen_temperature 1.0 --top_p 1.0 --gen_max_tokens 12 --max_length 60 --show_example no"
REWARD = "rewarding.py --model tiny --input_file outputs/one.json --reward likelihood --checkpoint none"
CHOOSE = "infer.py --model tiny --mode evaluation --scoring loglikelihood --name localdata/options.json"
SMALL = "--max_tokens_per_batch 400"  # so that a replica takes a second for what it has in hand
PATIENCE = {
    "RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S": "90",  # for the head to start a client's process on a busy machine
    "RAY_health_check_period_ms": "500",  # a node that does not answer five times is lost
}


class Cluster:
    """A head with two CPUs, to which a second node is added and removed (ray_cluster.py)."""

    def __init__(self, process: processes.subprocess.Popen, port: int):
        self.process, self.client = process, f"ray://127.0.0.1:{port}"
        self.address = self.hear("address")

    def hear(self, word: str) -> str:
        """What it says after this word."""
        said = []
        for line in self.process.stdout:
            said.append(line)
            if line.startswith(word):
                return line.removeprefix(word).strip()
        pytest.fail(f"the cluster ended: {''.join(said)}")

    def add(self) -> psutil.Process:
        """A second node; returns its raylet."""
        print("add", file=self.process.stdin, flush=True)
        return psutil.Process(int(self.hear("added")))

    def remove(self) -> None:
        """Cut the second node off."""
        print("remove", file=self.process.stdin, flush=True)
        self.hear("removed")


@pytest.fixture(scope="module")
def cluster():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = [sys.executable, str(Path(__file__).with_name("ray_cluster.py")), "2", str(port)]
    with processes.started(argv, env=os.environ | processes.RAY | PATIENCE) as process:
        yield Cluster(process, port)


@pytest.fixture(scope="module")
def one(workspace):
    """What one process samples for PROMPTS prompts."""
    known = list(workspace.read("localdata/tiny/prompt.1.json").values())
    workspace.write("outputs/prompts.json", {f"u{i}": known[i % len(known)] for i in range(PROMPTS)})
    workspace.run(f"{SAMPLE} --device cpu --output_dir outputs/one.json")
    return list(read(workspace.folder / "outputs/one.json", Samples))


def lose_a_node(workspace, cluster, command):
    """Run a command on two nodes, and remove one while its replica has a batch in hand; the command must end well."""
    raylet = cluster.add()
    flags = f"--device cpu --num_replicas 2 --ray_address {cluster.address}"
    stage = workspace.stages.start(workspace.folder, workspace.argv(f"{command} {flags}"))
    replica = None
    try:
        while not replica and not select.select([stage], [], [], 0.02)[0]:
            replica = stopped_at_work(raylet)
    finally:
        os.close(stage)
        cluster.remove()
    if replica:
        replica.kill()  # stopped, it does not see that its node is gone
    done = workspace.stages.end()
    assert done.code == 0 and "Traceback" not in done.out + done.err, done.out + done.err
    assert replica, "the stage ended before its second replica was seen at work"


def stopped_at_work(raylet):
    """The replica of this node, stopped while it works on a batch, or None."""
    for worker in raylet.children():
        with suppress(psutil.Error, IndexError):  # it has just ended, or is being started
            if works(worker):
                worker.suspend()
                if works(worker):
                    return worker
                worker.resume()


def works(worker):
    return worker.cmdline()[0].strip() == "ray::MapWorker(MapBatches(Replica)).submit"


def test_a_node_removed_amid_sampling_costs_nothing(workspace, cluster, one):
    lose_a_node(workspace, cluster, f"{SAMPLE} {SMALL} --output_dir outputs/two.json")
    two = list(read(workspace.folder / "outputs/two.json", Samples))
    assert [sample.uuid for sample in two] == [f"u{i}" for i in range(PROMPTS)]
    same = [a == b for x, y in zip(one, two, strict=True) for a, b in zip(x.responses, y.responses, strict=True)]
    print(f"{same.count(False)} of {len(same)} answers differ")
    assert sum(same) >= 0.98 * len(same)  # the engine rounds differently in other batches


def test_a_node_removed_amid_rewarding_costs_nothing(workspace, cluster, one):
    workspace.run(f"{REWARD} --device cpu --output outputs/rewards-one.json")
    (workspace.folder / "outputs/one.scores.jsonl").unlink()
    lose_a_node(workspace, cluster, f"{REWARD} {SMALL} --output outputs/rewards-two.json")
    alone, two = (list(read(workspace.folder / f"outputs/rewards-{name}.json", Rewards)) for name in ("one", "two"))
    assert [reward.uuid for reward in two] == [sample.uuid for sample in one]
    most = max(abs(x - y) for a, b in zip(alone, two, strict=True) for x, y in zip(a.reward, b.reward, strict=True))
    print(f"rewards differ by at most {most:.1e}")
    assert most <= 1e-5


def test_a_client_from_outside_finds_the_same_options_on_two_replicas(workspace, cluster):
    gas = "Which gas do plants take in?\nA. oxygen\nB. neon\nC. carbon dioxide"
    questions = [(gas, "C"), *((f"Who has {i}? A) Tom B) Mary", "B") for i in range(40))]
    items = [{"uuid": f"u{i}", "question": q, "label": label} for i, (q, label) in enumerate(questions)]
    workspace.write("localdata/options.json", items)
    client = f"--num_replicas 2 --ray_address {cluster.client}"
    for name, flags in (("here", ""), ("there", client)):
        workspace.run(f"{CHOOSE} --device cpu {flags} --output_dir outputs/{name}.json")
    here, there = (workspace.read(f"outputs/{name}.json") for name in ("here", "there"))
    assert list(there) == list(here) == [item["uuid"] for item in items]
    for uuid in here:
        assert there[uuid]["option_logprob"] == pytest.approx(here[uuid]["option_logprob"], abs=1e-5)
