"""Run a loop from a YAML file: its stages in order, those that are up to date skipped, then one table of results.

A loop file lists steps, `{id, script, flags}`: those `before` the rounds, those to `repeat` in each of `rounds`, those
`after` them. Each output goes to output_dir (base_dir with `shared: yes`) under the step's id, or `output`. In flags:
  ${id}            the output of a step; of train.py its checkpoint-last
  ${id@-1}         that of the round before; in round 1 what `start: {id: ...}` says
  ${round}         the round, from 1 (${round+1}, ${round-1})
  [a, b, c]        one value for each round
  {first: a, then: b}  one for round 1, one for all later rounds
Loop keys: title, model, output_dir, base_dir, seed, rounds, before, repeat, after, start, flags (step id -> flags put
over the step's own; null takes one away), extends (another loop file, over which these keys are put). A step's further
keys: output, shared, title. configs/loops/cream.yaml spells CREAM out; variants extend it.

A recipe file (configs/recipes) gives only the settings of that loop: title, model, iterations, prompts (a set for each
round), base_dir, output_dir, seed, and the flags of each stage: sft, sampling, rewarding, consistency, dpo, evaluation.
"""

import shlex
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, is_dataclass
from importlib import import_module
from pathlib import Path

from config import CHECKPOINTS, DATASET_FILES, DATASETS, MAX_SEED, MODEL_FILES, Device, for_records, group
from cream.cli import console, interrupts, names
from cream.cli.console import log
from cream.cli.flags import as_dict, flag, parse, problems_of
from cream.errors import UserError
from cream.loops.inputs import look_ups, missing
from cream.loops.plan import Command, Loop, plan
from cream.loops.reading import read_loop

EXAMPLE = """\
  tiny, one CPU        python iterate.py --config configs/recipes/tiny_cream.yaml
  two, side by side    python iterate.py --config configs/loops/tiny_srlm.yaml,configs/loops/tiny_cream.yaml
  8 GPUs, the paper's  python iterate.py --config configs/recipes/llama3_cream.yaml --device 0,1,2,3,4,5,6,7"""
ADVICE = """. Where it asks for another output or --overwrite, because a setting was changed:
give the loop another output_dir (or base_dir, where shared outputs lie), or run the stage's command above with --overwrite"""
IN_PROCESS = 50_000_000  # bytes of weights up to which stages run in this process: a start costs more than the work
STAGES = ("train.py", "infer.py", "rewarding.py", "cal_consistency.py", "make_pairs.py")
SCRIPTS = [script for script in STAGES if Path(__file__).with_name(script).exists()]


@dataclass
class LoopFlags:
    """Loop"""

    config: str | None = flag(None, "loop or recipe file; several, separated by commas, run one after the other")
    dry_run: bool = flag(False, "print the commands and stop")
    seed: int | None = flag(None, "in place of the loop's seed", low=0, high=MAX_SEED)
    output_root: str | None = flag(None, "folder put in front of the loop's folders")


@dataclass
class IterateConfig:
    """iterate.py"""

    loop: LoopFlags = group(LoopFlags)
    device: Device = group(Device)


@console.stage
def main(argv=None):
    config = parse(IterateConfig, argv, description=__doc__, example=EXAMPLE, files=False)
    from cream.loops.results import results, table

    if config.loop.config is None:
        raise UserError("--config is missing: a loop or recipe file, for example configs/recipes/tiny_cream.yaml")
    paths = [path.strip() for path in config.loop.config.split(",")]
    if not all(paths):
        raise UserError(f"--config {config.loop.config}: a name is missing before or after a comma")
    loops = {path: _read(Path(path), config.loop) for path in paths}
    devices, bf16, problems, made = config.device.devices(), config.device.bf16, [], set()
    commands = {}
    for path, loop in loops.items():
        commands[path], wrong = plan_for(loop, devices, bf16)
        problems += [f"{path}: {problem}" for problem in (*wrong, *_problems(commands[path], made))]
    if problems:
        raise UserError("\n".join(["nothing was started:", *problems]))
    began = time.monotonic()
    for path, loop in loops.items():
        run(loop, commands[path], dry_run=config.loop.dry_run)
    if not config.loop.dry_run:
        columns = [(loop.title, results(commands[path])) for path, loop in loops.items()]
        log.info("\n%s\n%.0f s in all", table(columns), time.monotonic() - began)


def plan_for(loop: Loop, devices: list[str], bf16: bool | None = None) -> tuple[list[Command], list[str]]:
    """The commands of a loop on these devices, and what is wrong with it."""
    known = {script: as_dict(config_of(script)()) for script in SCRIPTS}
    return plan(loop, known, ",".join(devices), for_records(devices), bf16)


def run(loop: Loop, commands: list[Command], *, dry_run: bool = False) -> None:
    """All stages of a loop, in order; those of small models run in this process."""
    for number, command in enumerate(commands, 1):
        log.info("\n[%s %d/%d] %s", loop.title, number, len(commands), command.title)
        log.info("$ %s", shlex.join(["python", command.script, *command.argv()]))
        if not dry_run:
            _run(command, loop.model)


def config_of(script: str) -> type:
    """The dataclass of a script's flags."""
    found = vars(import_module(script.removesuffix(".py"))).items()
    (config,) = [each for name, each in found if name.endswith("Config") and is_dataclass(each)]
    return config


def _read(path: Path, flags: LoopFlags) -> Loop:
    loop = read_loop(path)
    if flags.seed is not None:
        loop.seed = flags.seed
    if flags.output_root is not None:
        loop.base_dir = loop.base_dir and str(Path(flags.output_root, loop.base_dir))
        loop.output_dir = str(Path(flags.output_root, loop.output_dir))
    return loop


def _problems(commands: list[Command], made: set[Path]) -> list[str]:
    """What the scripts would refuse of the commands' flags, and inputs that neither exist nor are `made` by an earlier
    command (their outputs are added to it), each with the steps that have it."""
    steps, look_up = defaultdict(list), look_ups(MODEL_FILES, DATASET_FILES, CHECKPOINTS, DATASETS)
    for command in (each for each in commands if each.script in SCRIPTS):
        refused = problems_of(config_of(command.script), command.argv())
        for problem in (*refused, *missing(command, made, look_up)):
            steps[command.script, problem].append(command.title)
        made.add(command.output)
    return [f"{', '.join(titles)} ({script}): {problem}" for (script, problem), titles in steps.items()]


def _run(command: Command, model: str) -> None:
    """One stage; one that fails ends the loop with its exit code."""
    folder = names.model(str(command.flags.get("model", model)), MODEL_FILES)
    if sum(file.stat().st_size for file in folder.glob("*.safetensors")) < IN_PROCESS:
        try:
            return import_module(command.script.removesuffix(".py")).main(command.argv())
        except SystemExit as stop:
            code = stop.code
    else:
        script = Path(__file__).with_name(command.script)
        process = subprocess.Popen([sys.executable, str(script), *command.argv()])
        with interrupts.deferred([process.pid]):
            code = process.wait()
        interrupts.check()
    if code and code not in interrupts.CODES:  # an interrupted stage has said so
        print(f"{command.title} ended with {code}; the same command resumes from there{ADVICE}", file=sys.stderr)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
