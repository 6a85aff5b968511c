"""A function over items on several replicas: all of them once, whatever dies; and stages that give the same on two."""

import os
import signal
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import processes
import pytest

from cream.errors import UserError
from cream.files.store import read
from cream.records import Rewards, Samples
from cream.scoring.pool import Pool

REPO = Path(__file__).resolve().parent.parent


@dataclass
class Item:
    uuid: str
    number: int


def items(count):
    return (Item(f"u{i}", i) for i in range(count))


class Square:
    """A worker: its results leave in another order than its items came."""

    def __init__(self, device, dies_at=None, marker=None, takes=0.0):
        self.dies_at, self.marker, self.takes = dies_at, marker, takes

    def __call__(self, items):
        for item in reversed(list(items)):
            time.sleep(self.takes)
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


def apart(call):
    """Evaluate `call`, an expression of this module's names, in a process of its own: what Ray breaks or leaves there
    is no other test's; it ends in time, with all that it started."""
    path = os.pathsep.join([str(REPO), str(REPO / "tests")])
    environment = os.environ | {"PYTHONPATH": path}
    with processes.started([sys.executable, "-c", f"from test_pool import *; {call}"], env=environment) as process:
        out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return out


def test_one_device_needs_no_ray():
    total = "sum(value for _, (value, _) in Pool('cpu').run(partial(items, 4), Square, 4))"
    assert apart(f"print({total}, 'ray' in sys.modules)").strip() == "14 False"


def every_item_comes_back_once_from_two_processes():
    found = list(Pool("cpu", 2).run(partial(items, 81), partial(Square, takes=0.1), 41))
    assert sorted((uuid, value) for uuid, (value, _) in found) == sorted((f"u{i}", i**2) for i in range(81))
    assert len({pid for _, (_, pid) in found}) == 2 and os.getpid() not in {pid for _, (_, pid) in found}
    assert list(Pool("cpu", 2).run(partial(items, 0), Square, 0)) == []


def a_replica_that_is_killed_is_replaced_and_its_items_are_done_again(marker):
    found = list(Pool("cpu", 2).run(partial(items, 41), partial(Square, dies_at=12, marker=marker), 41))
    assert os.path.exists(marker)
    assert sorted(uuid for uuid, _ in found) == sorted(f"u{i}" for i in range(41))


def a_replica_that_dies_again_and_again_ends_the_pass():
    with pytest.raises(UserError, match="a replica died 6 times.*memory; the same command resumes"):
        list(Pool("cpu", 2).run(partial(items, 41), partial(Square, dies_at=12), 41))


def a_replicas_mistake_is_the_users_with_the_node_named():
    for make, message in ((Mistaken, "u3: no such thing"), (without_files, "/models/m1: no such fold")):
        with pytest.raises(UserError, match=f"node .*: {message}"):
            list(Pool("cpu", 2).run(partial(items, 8), make, 8))


def results_come_while_the_input_is_still_being_read(seen):
    def endless_until_seen():
        yield from items(59)
        deadline = time.monotonic() + 240
        while not os.path.exists(seen):
            assert time.monotonic() < deadline, "no result comes before the input ends"
            time.sleep(0.1)
        yield Item("u59", 59)

    stream = Pool("cpu", 2).run(endless_until_seen, Square, 8)  # said to be few, so that batches are small
    next(stream)
    open(seen, "w").close()
    assert len(list(stream)) == 59


@pytest.mark.slow
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
def test_several_replicas(tmp_path, case):
    marker = repr(str(tmp_path / "marker")) if case.__code__.co_argcount else ""
    apart(f"{case.__name__}({marker})")


# Stages ---------------------------------------------------------------------------------------------------------------

SAMPLE = "infer.py --model tiny --checkpoint assets/tiny_m0 --name tiny_prompt_1 --limit_size 60 --gen_n 3"
SAMPLE += " --gen_temperature 1.0 --top_p 1.0 --gen_max_tokens 32 --engine hf --max_length 60"
REWARD = "rewarding.py --model tiny --input_file outputs/cpu.json --reward likelihood --checkpoint none"


@pytest.mark.slow
def test_two_replicas_sample_and_reward_as_one_process_does(workspace):
    for device in ("cpu", "cpu,cpu"):
        workspace.spawn(f"{SAMPLE} --device {device} --output_dir outputs/{device}.json")
    one, two = (list(read(workspace.folder / f"outputs/{device}.json", Samples)) for device in ("cpu", "cpu,cpu"))
    assert [sample.uuid for sample in two] == [sample.uuid for sample in one] and len(one) == 60
    same = [a == b for x, y in zip(one, two, strict=True) for a, b in zip(x.responses, y.responses, strict=True)]
    print(f"{len(same) - sum(same)} of {len(same)} sampled answers differ between one process and two replicas")
    assert sum(same) >= 0.98 * len(same)  # the engine rounds differently in other batches

    ways = {"one": "cpu", "two": "cpu,cpu", "team": "cpu,cpu --tensor_parallel_size 2"}
    for name, device in ways.items():
        (workspace.folder / "outputs/cpu.scores.jsonl").unlink(missing_ok=True)
        out = workspace.spawn(f"{REWARD} --device {device} --output outputs/{name}.json")
        assert " computed" in out and "from the score cache" not in out
    one, *others = (list(read(workspace.folder / f"outputs/{name}.json", Rewards)) for name in ways)
    for name, other in zip([*ways][1:], others, strict=True):
        assert [a.uuid for a in other] == [a.uuid for a in one]
        apart = [abs(x - y) for a, b in zip(one, other, strict=True) for x, y in zip(a.reward, b.reward, strict=True)]
        print(f"rewards of one process and of {ways[name]}: at most {max(apart):.1g} apart")
        assert max(apart) <= 1e-5
    out = workspace.spawn(f"{REWARD} --device cpu --output outputs/again.json")
    assert "from the score cache" in out and " computed" not in out
