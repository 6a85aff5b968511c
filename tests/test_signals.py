"""SIGINT and SIGTERM: a stage ends by 130 or 143 with what was in flight kept, and names the command that resumes."""

import os
import select
import shlex
import signal
import time

import pytest
from on_disk import progress, recorded, so_far
from test_faults import INFER, REWARD, TRAIN, Stage, finished, world  # noqa: F401  a fixture

pytestmark = pytest.mark.slow
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
COMMANDS = {
    "sampling": f"{INFER}sampling/x.json --name tiny_prompt_1 --limit_size 60 --gen_n 4 --max_tokens_per_batch 1000",
    "rewarding": f"{REWARD}rewarding/rewards.jsonl --reward likelihood --checkpoint none",
    "training": f"{TRAIN}training/run --name tiny_sft --limit_size 32 --epoch 5 --train_bsz 8",
}
GOES_ON = {"sampling": "resuming: ", "rewarding": "resuming: ", "training": "resuming after step "}


@pytest.fixture(scope="module")
def undisturbed(world):  # noqa: F811
    """Each stage with what its undisturbed run made."""
    return {name: Stage(world, name, command) for name, command in COMMANDS.items()}


def kept(folder):
    """Records in a journal, or steps in a saved state: what the next run has not to do again."""
    return recorded(folder) + sum(saved for _, saved in progress(folder))


def interrupted(stage, signum):
    """Start a stage and send it a signal once it has finished something; how it ended, and what was finished then."""
    stage.begin()
    return cut_short(stage, stage.command, signum, finished)


def cut_short(stage, command, signum, done=kept):
    """The same of another command, in the stage's folder as it is, once so much is `done`."""
    process = stage.world.stages.start(stage.world.folder, stage.world.argv(command))
    while so_far(done, stage.folder) < 2:
        time.sleep(0.002)
        assert not select.select([process], [], [], 0)[0], "it ended before it was interrupted"
    before = so_far(finished, stage.folder)
    signal.pidfd_send_signal(process, signum)
    os.close(process)
    return stage.world.stages.end(), before


@pytest.mark.parametrize("signum", CODES, ids=lambda signum: signum.name)
@pytest.mark.parametrize("name", COMMANDS)
def test_an_interrupted_stage_keeps_what_is_in_flight(undisturbed, name, signum):
    stage = undisturbed[name]
    done, before = interrupted(stage, signum)
    assert done.code == CODES[signum] and "Traceback" not in done.err
    assert "finishing the current work" in done.err
    assert kept(stage.folder) == finished(stage.folder) >= before  # equal: it came when a step had just ended
    *_, told, command = done.err.splitlines()
    assert told == "interrupted: finished work is kept; the same command resumes from here:"
    assert shlex.split(command) == ["python", *shlex.split(stage.command)]
    done = stage.world.run(command.strip())
    assert GOES_ON[name] in done.out
    assert stage.contents() == stage.made


@pytest.mark.parametrize("name", ["sampling", "training"])
def test_an_interrupted_overwrite_resumes(undisturbed, name):
    """It replaces the old output, not its own work; --resume no, which trains from scratch, is to be left out."""
    stage = undisturbed[name]
    stage.begin()
    stage.world.run(stage.command)
    other = f"{stage.command} --seed 5 --overwrite"
    done, before = cut_short(stage, other, signal.SIGINT)
    assert done.code == 130 and kept(stage.folder) >= before
    assert GOES_ON[name] in stage.world.run(other).out
    if name == "training":
        done, _ = cut_short(stage, f"{stage.command} --overwrite --resume no", signal.SIGINT)
        assert "the same command, but for --resume no, resumes" in done.err
        assert GOES_ON[name] in stage.world.run(f"{stage.command} --overwrite").out
