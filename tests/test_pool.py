"""A function over items on several replicas: all of them once, whatever dies; and stages that give the same on two."""

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import processes
import pytest

from cream.errors import UserError
from cream.files.store import read
from cream.records import Rewards, Samples
from cream.scoring import pool
from cream.scoring.pool import Pool

REPO = Path(__file__).resolve().parent.parent
NET = 240  # seconds after which something is waited for in vain


@dataclass
class Item:
    uuid: str
    number: int


def items(count):
    return (Item(f"u{i}", i) for i in range(count))


class Square:
    """A worker: its results leave in another order than its items came."""

    def __init__(self, device, dies_at=None, marker=None, meets=None):
        self.dies_at, self.marker, self.meets = dies_at, marker, meets

    def __call__(self, items):
        if self.meets:
            Path(self.meets, str(os.getpid())).touch()
            wait_until(lambda: len(os.listdir(self.meets)) == 2)
        for item in sorted(items, key=lambda item: item.number ^ 1):
            if item.number == self.dies_at and not (self.marker and os.path.exists(self.marker)):
                open(self.marker or os.devnull, "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
            yield item.uuid, (item.number**2, os.getpid())

    def close(self):
        pass


class Mistaken(Square):
    def __call__(self, items):
        raise UserError("u3: no such thing")
        yield


def without_files(device):
    raise UserError("/models/m1: no such folder")


def wait_until(condition):
    deadline = time.monotonic() + NET
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def program(code):
    """The command that runs `code` with this module's names, and its environment; actors import from there, too."""
    path = os.pathsep.join([str(REPO), str(REPO / "tests")])
    return [sys.executable, "-c", f"from test_pool import *; {code}"], os.environ | processes.RAY | {"PYTHONPATH": path}


def test_one_device_needs_no_ray():
    total = "sum(value for _, (value, _) in Pool('cpu').run(partial(items, 4), Square, 4))"
    argv, environment = program(f"print({total}, 'ray' in sys.modules)")
    assert subprocess.check_output(argv, env=environment, text=True).strip() == "14 False"


# Cases, run in a process apart ----------------------------------------------------------------------------------------


def every_item_comes_back_once_from_two_processes(folder):
    found = list(Pool("cpu", 2).run(partial(items, 81), partial(Square, meets=folder), 81))
    assert sorted((uuid, value) for uuid, (value, _) in found) == sorted((f"u{i}", i**2) for i in range(81))
    assert len({pid for _, (_, pid) in found}) == 2 and os.getpid() not in {pid for _, (_, pid) in found}
    assert list(Pool("cpu", 2).run(partial(items, 0), Square, 0)) == []


def a_replica_that_is_killed_is_replaced_and_its_items_are_done_again(folder):
    """It has given the first row of its batch of two."""
    marker, number = f"{folder}/died", pool.ROW + 4
    found = list(Pool("cpu", 2).run(partial(items, 128), partial(Square, dies_at=number, marker=marker), 128))
    assert os.path.exists(marker)
    assert sorted(uuid for uuid, _ in found) == sorted(f"u{i}" for i in range(128))


def a_replica_that_dies_again_and_again_ends_the_pass(folder):
    with (
        mock.patch.object(pool, "RESTARTS", 1),
        pytest.raises(UserError, match="a replica died 2 times.*memory; the same command resumes"),
    ):
        list(Pool("cpu", 2).run(partial(items, 41), partial(Square, dies_at=12), 41))


def a_replicas_mistake_is_the_users_with_the_node_named(folder):
    for make, message in ((Mistaken, "u3: no such thing"), (without_files, "/models/m1: no such fold")):
        with pytest.raises(UserError, match=f"node .*: {message}"):
            list(Pool("cpu", 2).run(partial(items, 8), make, 8))


def results_come_while_the_input_is_still_being_read(folder):
    def endless_until_seen():
        yield from items(59)
        wait_until(Path(folder, "seen").exists)
        yield Item("u59", 59)

    stream = Pool("cpu", 2).run(endless_until_seen, Square, 8)  # said to be few, so that batches are small
    next(stream)
    Path(folder, "seen").touch()
    assert len(list(stream)) == 59


def take_calls():
    """Evaluate the lines of stdin in turn; a line for each says how it ended: null, or a traceback."""
    for call in sys.stdin:
        error = None
        try:
            eval(call)
        except BaseException:
            error = traceback.format_exc()
        print(f"ended {json.dumps(error)}", flush=True)


@pytest.fixture(scope="module")
def apart():
    """A process with one Ray cluster for all cases: what Ray breaks or leaves there is no other test's."""
    argv, environment = program("take_calls()")
    with processes.started(argv, env=environment) as process:
        yield process


@pytest.mark.slow
@pytest.mark.xdist_group("both cores")
@pytest.mark.parametrize(
    "case",
    [
        every_item_comes_back_once_from_two_processes,
        a_replica_that_is_killed_is_replaced_and_its_items_are_done_again,
        a_replica_that_dies_again_and_again_ends_the_pass,
        a_replicas_mistake_is_the_users_with_the_node_named,
        results_come_while_the_input_is_still_being_read,
    ],
    ids=lambda case: case.__name__,
)
def test_several_replicas(apart, tmp_path, case):
    print(f"{case.__name__}({str(tmp_path)!r})", file=apart.stdin, flush=True)
    said = []
    for line in apart.stdout:
        word, _, error = line.partition(" ")
        if word == "ended":
            assert json.loads(error) is None, json.loads(error)
            return
        said.append(line)
    pytest.fail(f"the process ended: {''.join(said)}")


# Stages ---------------------------------------------------------------------------------------------------------------

SAMPLE = "infer.py --model tiny --checkpoint assets/tiny_m0 --name tiny_prompt_1 --limit_size 60 --gen_n 3"
SAMPLE += " --gen_temperature 1.0 --top_p 1.0 --gen_max_tokens 32 --engine hf --max_length 60"
REWARD = "rewarding.py --model tiny --input_file outputs/one.json --reward likelihood --checkpoint none"


@pytest.fixture(scope="module")
def one(workspace):
    """What one process samples."""
    workspace.run(f"{SAMPLE} --device cpu --output_dir outputs/one.json")
    return list(read(workspace.folder / "outputs/one.json", Samples))


@pytest.mark.slow
@pytest.mark.xdist_group("both cores")
def test_two_replicas_sample_as_one_process_does(workspace, one, monkeypatch):
    """As a user starts it: an interpreter of its own, and its own Ray."""
    for name, value in processes.RAY.items():
        monkeypatch.setenv(name, value)
    workspace.spawn(f"{SAMPLE} --device cpu,cpu --output_dir outputs/two.json")
    two = list(read(workspace.folder / "outputs/two.json", Samples))
    assert [sample.uuid for sample in two] == [sample.uuid for sample in one] and len(one) == 60
    same = [a == b for x, y in zip(one, two, strict=True) for a, b in zip(x.responses, y.responses, strict=True)]
    print(f"{same.count(False)} of {len(same)} sampled answers differ between one process and two replicas")
    assert sum(same) >= 0.98 * len(same)  # the engine rounds differently in other batches


@pytest.mark.slow
@pytest.mark.xdist_group("both cores")
def test_a_tensor_parallel_team_rewards_as_one_process_does(workspace, one):
    """And its scores are in the same cache."""
    for name, device in (("alone", "cpu"), ("team", "cpu,cpu --tensor_parallel_size 2")):
        (workspace.folder / "outputs/one.scores.jsonl").unlink(missing_ok=True)
        out = workspace.run(f"{REWARD} --device {device} --output outputs/{name}.json").out
        assert " computed" in out and "from the score cache" not in out
    alone, team = (list(read(workspace.folder / f"outputs/{name}.json", Rewards)) for name in ("alone", "team"))
    assert [a.uuid for a in team] == [a.uuid for a in alone] == [a.uuid for a in one]
    apart = [abs(x - y) for a, b in zip(alone, team, strict=True) for x, y in zip(a.reward, b.reward, strict=True)]
    print(f"rewards of one process and of a team: at most {max(apart):.1g} apart")
    assert max(apart) <= 1e-5
    out = workspace.run(f"{REWARD} --device cpu --output outputs/again.json").out
    assert "from the score cache" in out and " computed" not in out
