"""Run a loop from a YAML file: its steps, skipping those that are up to date; then print a table of results.

A loop file (configs/loops) lists steps {id, script, flags}: those `before` the rounds, those to `repeat` in each of
`rounds`, and those `after` them. A step's output is named by its id (or `output`), in output_dir (with `shared: yes` in
base_dir). A step of prepare_data.py has `words` as well, its command and files: [eft, FILE]. In flags
  ${id}, ${id@-1}      the output of a step (for train.py: its checkpoint-last), and its output in the previous round;
                       `start: {id: ...}` says what ${id@-1} is in round 1
  ${round}             the number of the round, from 1; ${round+1}, ${round-1}
  ${seed+round}        the loop's seed plus that number, for a step that samples again from the same prompts; ${seed+1}
  [a, b, c]            one value per round
  {first: a, then: b}  a value for round 1, and one for all later rounds
  ${best}              in `after`, the model of the best round (`keep`)
Other keys: title, model, seed, flags (id -> flags that override the step's; null removes one), fresh (ids of steps
whose --name must be another data set in every round), extends (another file, whose keys these override). Steering:
  keep                 the result is the model of the round with the best `metric`, best in output_dir; `patience` ends
                       the loop after so many rounds without a new best, `roll_back` starts again from the best
  stop_if, eval_every  facts of steps that end the loop; evaluate in every so many rounds only
docs/loops.md describes these keys; decisions.json in output_dir says what was decided, and why.

A recipe file (configs/recipes) has only the settings of configs/loops/cream.yaml: title, model, iterations, prompts (a
set per round; one for several only with reuse_prompts: yes), base_dir (shared by recipes), output_dir, seed, the keys
that steer, and flags of sft, sampling, rewarding, consistency, dpo and evaluation; all but sft and evaluation may have
a list, one value per round. Without sft, `start: CHECKPOINT` is M1. Several evaluations are {name: flags}; without any
nothing is evaluated.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, is_dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

from config import CHECKPOINTS, DATASET_FILES, DATASETS, MODEL_FILES, Device, for_records, group
from cream.alarms import LIMITS, AlarmFlags, Limits
from cream.cli import console, interrupts, names, preflight
from cream.cli.console import log
from cream.cli.flags import parse, try_parse
from cream.cli.screen import say_result
from cream.errors import UserError
from cream.loops import disk
from cream.loops.checks import check_commands, check_steering, lacking, look_ups, refused
from cream.loops.course import Course
from cream.loops.loop import Loop
from cream.loops.options import LoopFlags
from cream.loops.plan import TRAIN, Command, plan
from cream.loops.publish import Publisher
from cream.loops.reading import read_loop
from cream.loops.running import InTurn, Runner, Stage
from cream.loops.side_by_side import SideBySide, import_for_models

EXAMPLE = """\
  tiny, one CPU        python iterate.py --config configs/recipes/tiny_cream.yaml
  two, in one table    python iterate.py --config configs/loops/tiny_srlm.yaml,configs/loops/tiny_cream.yaml
  the paper's, 8 GPUs  python iterate.py --config configs/loops/cream.yaml --device 0,1,2,3,4,5,6,7"""
STAGES = ("train.py", "infer.py", "rewarding.py", "cal_consistency.py", "make_pairs.py")
SCRIPTS = (*STAGES, "evaluate_reward.py", "prepare_data.py")
IN_PROCESS = 50_000_000  # bytes of weights of a small model: starting Python would cost more than a stage's work
OTHER_MODELS = {"model", "judge_model", "reward_model"}  # flags that name a model besides the loop's own
MOST_JOBS = 4  # stages at a time: a loop, or two, have hardly more that do not wait for each other


@dataclass
class IterateConfig:
    """iterate.py"""

    READS_FILES = False  # its --config names loops

    loop: LoopFlags = group(LoopFlags)
    device: Device = group(Device)
    alarms: AlarmFlags = group(AlarmFlags)


@console.stage
def main(argv=None):
    config = parse(IterateConfig, argv, description=__doc__, example=EXAMPLE)
    from cream.loops.alarmed import alarms, describe_alarms
    from cream.loops.outcome import sentences
    from cream.loops.results import table

    paths = [path.strip() for path in (config.loop.config or "").split(",")]
    if not all(paths):
        example = "expected FILE or FILE,FILE, for example configs/loops/tiny_cream.yaml"
        raise UserError(f"--config {config.loop.config or 'is missing'}: {example}")
    loops = {path: read_loop(Path(path), config.loop.seed, config.loop.output_root) for path in paths}
    devices, problems, courses, outputs = config.device.devices(), [], {}, set()
    for path, loop in loops.items():
        courses[path], wrong = prepare(loop, devices, config.device.bf16, outputs, config.loop)
        problems += [f"{path}: {problem}" for problem in wrong]
    if problems:
        raise UserError("\n".join(["nothing was started:", *problems]))
    began, keep = time.monotonic(), config.loop.kept
    each = [*courses.values()]
    needs = [estimate(course, keep) for course in each]
    with choose_runner(config.loop.jobs, each, needs, devices) as runner:
        for i, (course, need) in enumerate(zip(each, needs, strict=True)):
            others = [command for other in (*each[:i], *each[i + 1 :]) for command in other.planned]
            run(course, runner, need, dry_run=config.loop.dry_run, keep=keep, others=others)
        runner.wait()
    if not config.loop.dry_run:
        columns = [(course.loop.title, course.results()) for course in each]
        found = [alarms(course.ran, config.alarms.limits()) for course in each]
        lines = [f"{course.loop.title}: {text}" for course in each for text in course.notes()]
        lines += describe_alarms([course.loop.title for course in each], found)
        text = "\n".join([table(columns, [alarmed.models for alarmed in found]), *lines, "", *sentences(each, found)])
        say_result("\n%s\n%.0f s in all", text, time.monotonic() - began)
        if config.loop.report:
            report(each, config.alarms.limits())


def prepare(
    loop: Loop, devices: list[str], bf16: bool | None, outputs: set[Path], flags: LoopFlags | None = None
) -> tuple[Course, list[str]]:
    """The course of a loop, and all that is wrong with it. `outputs`: outputs of earlier loops; its own are added.
    `flags`: which part of it runs, and what stays on disk."""
    flags, configs = flags or LoopFlags(), {script: config_of(script) for script in SCRIPTS}

    def replan(loop: Loop, parents: dict[int, int]) -> tuple[list[Command], list[str]]:
        return plan(loop, configs, ",".join(devices), for_records(devices), bf16, parents)

    publish = Publisher(loop, MODEL_FILES, CHECKPOINTS)
    course = Course(loop, replan, publish)
    places = look_ups(MODEL_FILES, DATASET_FILES, CHECKPOINTS, DATASETS)
    check = {script: import_module(script.removesuffix(".py")).check for script in SCRIPTS}
    outputs |= {loop.best} if loop.keep else set()
    wrong = [*course.problems, *check_commands(course.planned, configs, check, places, outputs)]
    wrong += check_steering(course, places["name"])
    wrong += [*refused(publish.check), *refused(flags.check_kept, course), *refused(flags.set_range, course)]
    return course, wrong + list(lacking(course))


def choose_runner(
    jobs: int | None, courses: Sequence[Course], needs: Sequence[disk.Need], devices: Sequence[str]
) -> Runner:
    """What runs the stages of loops: --jobs at a time, or as many as its help says."""
    may, left = [*devices] == ["cpu"] and _are_small(courses), any(need.left for need in needs)
    if not may and jobs is not None and jobs > 1:
        raise UserError(f"--jobs {jobs}: only stages of small models (below 50 MB), on a CPU, run at the same time")
    count = jobs or (min(MOST_JOBS, len(os.sched_getaffinity(0))) if may and left else 1)
    if count == 1:
        return InTurn(_start)
    folders = [names.model(course.loop.model, MODEL_FILES) for course in courses]
    return SideBySide(_start, count, partial(import_for_models, folders))


def _are_small(courses: Sequence[Course]) -> bool:
    """Whether all models of loops that no step makes are small, and each stage works in one process."""
    commands = [command for course in courses for command in course.planned]
    models = {str(course.loop.model) for course in courses}
    models |= {str(each.flags[flag]) for each in commands for flag in OTHER_MODELS & each.flags.keys()}
    made = {each.result for each in commands}
    alone = not any(each.flags.keys() & {"ray_address", "num_replicas"} for each in commands)
    return alone and all(_is_small(names.in_root(MODEL_FILES.get(name.lower(), name))) for name in models - made)


def run(
    course: Course,
    runner: Runner | None = None,
    need: disk.Need | None = None,
    *,
    dry_run: bool = False,
    keep: Sequence[str] = (),
    others: Sequence[Command] = (),
) -> None:
    """Run the stages of a loop, by default in turn. `need`: what is left of it to run, if that is known; `keep`: which
    models stay on disk; `others`: commands of other loops, which may read this one's models."""
    runner, need = runner or InTurn(_start), need or estimate(course, keep)
    loop, course.dry, course.wait = course.loop, dry_run, runner.wait
    course.free = disk.Cleaner(keep, CHECKPOINTS, others) if keep else course.free
    if not dry_run:
        disk.check(course, need)
    for number, command in enumerate(course, 1):
        stage = Stage(command, loop, number, len(course.planned))
        if not dry_run:
            runner.run(stage)
            continue
        made = need.made.get(command.output)
        log.info("\n%s%s\n%s", stage.title, f": {made}" if made else "", stage.line)
    if dry_run:
        log.info("\n[%s] %s", loop.title, need)
        if keep and any(each.script == TRAIN and each.place.part == 1 for each in need.left):
            gone = "neither best nor last" if len(keep) > 1 else f"not the {keep[0]}"
            log.info("--keep %s: checkpoints of later rounds are deleted once they are %s", ",".join(keep), gone)


def estimate(course: Course, keep: Sequence[str]) -> disk.Need:
    """What is left of a loop to run."""
    return disk.estimate(course, keep, partial(_size_of_training, course.loop))


def _size_of_training(loop: Loop, command: Command) -> float | None:
    """Bytes of a training run; None where its model is not on disk yet."""
    config, _ = try_parse(config_of(TRAIN), command.argv())
    with suppress(UserError, OSError):
        if config is not None and names.in_root(MODEL_FILES.get(loop.model.lower(), loop.model)).is_dir():
            o = config.optimisation
            saved_bytes = 4 if o.save_dtype == "float32" else 2
            start = names.model(loop.model, MODEL_FILES)
            return preflight.size_of_run(start, o.saves, saved_bytes, o.moment_bytes)
    return None


def report(courses: list[Course], limits: Limits = LIMITS) -> None:
    """Write report.html into the output folder of the last loop, and print its path. The loops are finished: whatever
    goes wrong with the page is a line in the log."""
    folders = [Path(course.loop.output_dir) for course in courses]
    try:
        from cream.reporting.outputs import of_loop
        from cream.reporting.report import Files, beside_larger, write_all

        runs = [of_loop(course, limits=limits) for course in courses]
        write_all(Files(beside_larger(folders[-1] / "report.html", runs, [each.name for each in folders])), runs)
    except ImportError as error:
        log.info("no report: %s; make setup installs what is missing", error)
    except Exception as error:
        log.info("no report: %s: %s", type(error).__name__, error)


def config_of(script: str) -> type:
    """The dataclass of a script's flags, the one in its module whose name ends in Config."""
    values = vars(import_module(script.removesuffix(".py"))).items()
    (config,) = [value for name, value in values if name.endswith("Config") and is_dataclass(value)]
    return config


def _start(command: Command, loop: Loop) -> int | None:
    """Run one stage, in this process or, if its model is big, in another one; its exit code, None where all is well."""
    if _is_small(names.model(str(command.flags.get("model", loop.model)), MODEL_FILES)):
        try:
            return import_module(command.script.removesuffix(".py")).main(command.argv())
        except SystemExit as stop:
            return stop.code
    process = subprocess.Popen([sys.executable, str(Path(__file__).with_name(command.script)), *command.argv()])
    with interrupts.deferred([process.pid]):
        code = process.wait()
    interrupts.check()
    return code


def _is_small(model: Path) -> bool:
    """Whether the weights in a folder have less than IN_PROCESS bytes."""
    return model.is_dir() and sum(file.stat().st_size for file in model.glob("*.safetensors")) < IN_PROCESS


if __name__ == "__main__":
    main()
