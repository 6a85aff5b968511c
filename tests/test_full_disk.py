"""A full disk at any moment: old files stay, there is one message, and with room again the command resumes."""

import os
import shutil
import subprocess

import pytest
from layouts import ON, put, records
from safetensors.torch import load_file
from torch import equal

from cream.files.store import read_rows, write_rows
from cream.records import Pair, Rewards, Samples

pytestmark = pytest.mark.slow
SIZE = 48 << 20  # bytes of the disk
PAGE = 4096  # of which a file takes whole ones
MANY = 300  # records, so that a stage writes more than a few pages


class Disk:
    """A small disk, mounted at a folder."""

    def __init__(self, folder):
        self.folder, self.filler = folder, folder / "filler"

    def leave(self, room: int) -> None:
        """Fill it up to `room` bytes, PAGES of them whole."""
        self.filler.unlink(missing_ok=True)
        found = os.statvfs(self.folder)
        with open(self.filler, "wb") as file:
            file.write(bytes(found.f_bavail * found.f_bsize - room // PAGE * PAGE))

    def files(self) -> dict[str, bytes]:
        """The files with final names."""
        paths = [path for path in self.folder.rglob("*") if path.is_file() and path != self.filler]
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in paths}


@pytest.fixture
def mounted(workspace):
    """A function: a folder of the workspace -> the small disk that is mounted there."""
    made = []

    def mount(name: str) -> Disk:
        folder = workspace.folder / name
        folder.mkdir(exist_ok=True)
        options = ["-o", f"size={SIZE}", "tmpfs", str(folder)]
        if subprocess.run(["mount", "-t", "tmpfs", *options], capture_output=True).returncode:
            pytest.skip("needs the right to mount a file system")
        made.append(folder)
        return Disk(folder)

    yield mount
    for folder in made:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def world(workspace):
    for kind in (Samples, Rewards, Pair):
        rows = [{**records(kind)[i % 6], "uuid": f"q{i}"} for i in range(MANY)]
        write_rows(workspace.folder / f"localdata/{kind.__name__}.jsonl", rows)
    return workspace


STAGES = {  # command, and the steps in which there is more and more room
    "sampling": (f"infer.py {ON} --gen_n 3 --gen_max_tokens 12 --name tiny_prompt_1 --output_dir", 24 << 10),
    "evaluation": (f"infer.py {ON} --mode evaluation --gen_max_tokens 8 --name tiny_val --output_dir", 24 << 10),
    "rewarding": (
        f"rewarding.py {ON} --reward likelihood --checkpoint none --input_file localdata/Samples.jsonl --output",
        24 << 10,
    ),
    "consistency": ("cal_consistency.py --file1 localdata/Rewards.jsonl --output", 16 << 10),
    "sft": (f"train.py {ON} --name tiny_sft --epoch 2 --limit_size 16 --train_bsz 8 --output_dir", 900 << 10),
    "dpo": (
        f"train.py {ON} --name localdata/Pair.jsonl --limit_size 16 --train_bsz 8 --epoch 2 --output_dir",
        900 << 10,
    ),
}


def output(stage: str, root: str) -> str:
    """Where a stage writes below a folder."""
    return f"{root}/run" if stage in ("sft", "dpo") else f"{root}/x.json"


def same(world, stage: str, a: str, b: str) -> bool:
    """Whether two outputs of a stage say the same."""
    if stage in ("sft", "dpo"):
        a, b = (load_file(world.folder / output / "checkpoint-last/model.safetensors") for output in (a, b))
        return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
    a, b = (list(read_rows(world.folder / output)) for output in (a, b))
    for row in (*a, *b):
        row.pop("logprob", None)  # rounded as the batch has it
        row.pop("task", None)
    return a == b


def refused(done, disk: Disk) -> None:
    """It ended in one line that names the file and what is wrong."""
    said = done.err.strip().splitlines()[-1] if done.err.strip() else ""
    assert done.code == 2 and "Traceback" not in done.err, f"{done.code}: {done.err[-1500:]}"
    assert "No space left" in said and disk.folder.name in said, done.err


@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_ends_a_stage_and_harms_nothing(world, mounted, stage):
    """Room for more and more of what it writes: journal, checkpoint, output, sidecar."""
    disk, (command, step) = mounted("disk"), STAGES[stage]
    put(disk.folder / "earlier.json", Rewards)
    earlier, ends, room = disk.files(), 0, 0
    while True:
        disk.leave(room)
        done = world.stages.run(world.folder, world.argv(f"{command} {output(stage, 'disk')}"))
        assert earlier.items() <= disk.files().items()
        if done.code == 0:
            break
        refused(done, disk)
        ends, room = ends + 1, room + step
        assert ends < 60
    assert ends and (stage == "consistency" or ends > 2)
    world.run(f"{command} {output(stage, f'outputs/{stage}')}")
    assert same(world, stage, output(stage, "disk"), output(stage, f"outputs/{stage}"))
    leftovers = [name for name in disk.files() if name.endswith((".partial", ".tmp")) or "/state/" in name]
    assert not leftovers


@pytest.mark.parametrize("stage", ["sampling", "rewarding", "consistency"])
def test_what_is_to_be_replaced_stays(world, mounted, stage):
    """--overwrite on a full disk: the output that stands is still whole, and still stands."""
    disk, (command, _) = mounted("disk"), STAGES[stage]
    command = f"{command} {output(stage, 'disk')}"
    world.run(command)
    before = disk.files()
    for room in (0, PAGE, 3 * PAGE, 6 * PAGE):
        disk.leave(room)
        refused(world.stages.run(world.folder, world.argv(command + " --overwrite")), disk)
        found = disk.files()
        assert all(found[name] == before[name] for name in ("x.json", "x.json.meta.json"))
        (disk.folder / "x.json.partial").unlink(missing_ok=True)
    assert "is up to date" in world.run(command).out


def test_a_full_disk_when_registering(world, mounted):
    """The run is kept, the registry is unchanged; the same command registers it once there is room."""
    shutil.copytree(world.folder / "configs", world.folder / "kept", dirs_exist_ok=True)
    disk = mounted("configs")
    world.write("configs/checkpoint.json", {"earlier": "outputs/earlier"})
    before = disk.files()
    disk.leave(0)
    command = f"{STAGES['sft'][0]} outputs/registered --register new"
    refused(world.stages.run(world.folder, world.argv(command)), disk)
    assert before.items() <= disk.files().items()
    assert (world.folder / "outputs/registered/meta.json").exists()
    disk.filler.unlink()
    world.run(command)
    assert world.read("configs/checkpoint.json").keys() == {"earlier", "new"}
