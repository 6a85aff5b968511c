"""Run the whole loop from a recipe: base model, SFT, then per iteration sampling, rewarding by M_t and by M_{t-1},
consistency, DPO, evaluation. Stages whose outputs stand are passed over; the last thing printed is one table.
"""

import shlex
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from config import MAX_SEED, MODEL_FILES, SCRIPTS, Device, for_records, group
from cream.cli import console, interrupts, names
from cream.cli.console import log
from cream.cli.flags import flag, parse, problems_of
from cream.errors import UserError
from cream.loops.recipes import Command, Recipe, plan, read_recipe, results

EXAMPLE = """\
  tiny, one CPU        python iterate.py --config configs/recipes/tiny_cream.yaml
  two, side by side    python iterate.py --config configs/recipes/tiny_srlm.yaml,configs/recipes/tiny_cream.yaml
  8 GPUs, the paper's  python iterate.py --config configs/recipes/llama3_cream.yaml --device 0,1,2,3,4,5,6,7"""
IN_PROCESS = 50_000_000  # bytes of weights up to which stages run in this process: a start costs more than the work


@dataclass
class Loop:
    """Loop"""

    config: str | None = flag(None, "recipe file; several, separated by commas, run one after the other")
    dry_run: bool = flag(False, "print the commands and stop")
    seed: int | None = flag(None, "in place of the recipe's seed", low=0, high=MAX_SEED)
    output_root: str | None = flag(None, "folder put in front of the recipe's folders")


@dataclass
class IterateConfig:
    """iterate.py"""

    loop: Loop = group(Loop)
    device: Device = group(Device)


@console.stage
def main(argv=None):
    config = parse(IterateConfig, argv, description=__doc__, example=EXAMPLE, files=False)
    if config.loop.config is None:
        raise UserError("--config is missing: a recipe, for example configs/recipes/tiny_cream.yaml")
    paths = [path.strip() for path in config.loop.config.split(",")]
    if not all(paths):
        raise UserError(f"--config {config.loop.config}: no name stands before or after a comma")
    recipes = {path: _recipe(Path(path), config.loop) for path in paths}
    devices, bf16 = config.device.devices(), config.device.bf16
    if problems := [each for path, recipe in recipes.items() for each in _problems(path, recipe, devices, bf16)]:
        raise UserError("\n".join(["nothing was started:", *problems]))
    began = time.monotonic()
    for recipe in recipes.values():
        run(recipe, devices, bf16, dry_run=config.loop.dry_run)
    if not config.loop.dry_run:
        log.info("\n%s\n%.0f s in all", table(list(recipes.values())), time.monotonic() - began)


def run(recipe: Recipe, devices: list[str], bf16: bool | None = None, *, dry_run: bool = False) -> None:
    """All stages of a recipe, in order; those that stand say so. Stages of small models run in this process."""
    commands = plan(recipe, ",".join(devices), for_records(devices), bf16)
    for number, command in enumerate(commands, 1):
        log.info("\n[%s %d/%d] %s", recipe.title, number, len(commands), command.title)
        log.info("$ %s", shlex.join(["python", command.script, *command.argv()]))
        if not dry_run:
            _run(command, _small(recipe))


def _recipe(path: Path, loop: Loop) -> Recipe:
    recipe = read_recipe(path)
    if loop.seed is not None:
        recipe.seed = loop.seed
    if loop.output_root is not None:
        recipe.base_dir = str(Path(loop.output_root) / recipe.base_dir)
        recipe.output_dir = str(Path(loop.output_root) / recipe.output_dir)
    return recipe


def _problems(path: str, recipe: Recipe, devices: list[str], bf16: bool | None) -> list[str]:
    """What the scripts would refuse of a recipe's flags, each with the stages that have it."""
    stages = defaultdict(list)
    for command in plan(recipe, ",".join(devices), for_records(devices), bf16):
        for problem in problems_of(SCRIPTS[command.script], command.argv()):
            stages[command.script, problem].append(command.title)
    return [f"{path}: {', '.join(titles)} ({script}): {problem}" for (script, problem), titles in stages.items()]


def _small(recipe: Recipe) -> bool:
    folder = names.model(recipe.model, MODEL_FILES)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) < IN_PROCESS


def _run(command: Command, in_process: bool) -> None:
    """One stage; a stage that fails ends the loop with its exit code, and the same command goes on from there."""
    if in_process:
        import_module(command.script.removesuffix(".py")).main(command.argv())
        return
    script = Path(__file__).with_name(command.script)
    process = subprocess.Popen([sys.executable, str(script), *command.argv()])
    with interrupts.deferred([process.pid]):
        code = process.wait()
    interrupts.check()
    if code:
        print(f"{command.title} ended with {code}; the same command goes on from there", file=sys.stderr)
        sys.exit(code)


def table(recipes: list[Recipe]) -> str:
    """Accuracy (macro average, %) and mean consistency per model, one block of columns per recipe."""
    columns = [results(recipe) for recipe in recipes]
    width = max(24, *(len(r.title) + 2 for r in recipes))
    lines = ["model" + "".join(f"{r.title:>{width}}" for r in recipes)]
    lines.append("     " + "".join(f"{'accuracy %':>{width - 10}}{'mean C':>10}" for _ in recipes))
    for t in range(max(map(len, columns))):
        cells = []
        for rows in columns:
            row = rows[t] if t < len(rows) else None
            accuracy = f"{100 * row['accuracy']:.1f}" if row else ""
            c = row.get("consistency") if row else None
            cells.append(f"{accuracy:>{width - 10}}{'' if c is None else f'{c:.2f}':>10}")
        lines.append(f"M{t:<4}" + "".join(cells))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
