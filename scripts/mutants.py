"""How many bugs, put in by mutmut one at a time, the tests do not see: `make mutants`, an hour or two on one core.

    python scripts/mutants.py [MODULE ...]    # by default all of TESTS; or some: python scripts/mutants.py losses trees

Per module: bugs put in (mutants), those that a test saw, those that none did, and their share; then each of these, as
a change of a line. A surviving mutant is a hole in the tests, or changes nothing that anyone can see.

It works in a copy of the repository. Mutants are made of what functions and methods do, not of the messages that they
raise, of docstrings and type annotations, of decorated functions (properties, context managers) or of module-level
code. Hypothesis draws the same examples in every run, so that the figure repeats itself.
"""

import argparse
import ast
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from itertools import groupby
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
TESTS = {  # module: the files of tests that are run against its mutants, but for their slow tests
    "losses": "losses",
    "ranking": "ranking",
    "consistency": "consistency",
    "model.trees": "trees",
    "model.head": "head",
    "text.chat": "chat",
    "text.rendering": "chat",
    "text.tokens": "chat logprobs",
    "pairs.all_pairs": "pairs build",
    "pairs.build": "pairs build",
    "pairs.choice": "pairs build",
    "pairs.extremes": "pairs build",
    "pairs.match": "pairs build",
    "pairs.oracle": "pairs build",
    "pairs.random": "pairs build",
    "pairs.threshold": "pairs build",
    "evaluation.answers": "answers grading",
    "evaluation.mentions": "answers grading",
    "evaluation.numbers": "answers grading",
    "evaluation.statistics": "statistics compare grading",
}
KILLED = ("killed", "timeout", "segfault")  # some mutants never end: after ten times what tests take, and a minute
# What the copy's conftest.py ends with: the same examples each time, and no shrinking of those that fail.
CONFTEST = """
from hypothesis import Phase
same = dict(derandomize=True, database=None, phases=[Phase.explicit, Phase.generate])
settings.register_profile("mutants", deadline=None, **same)
settings.load_profile("mutants")

def pytest_collection_modifyitems(items):  # not what starts processes: mutmut sees what runs in this one
    items[:] = [item for item in items if not {"stage", "stages", "repo"} & {*item.fixturenames}]
"""
CONFIG = """[mutmut]
source_paths = cream
only_mutate = {paths}
do_not_mutate_patterns = ^\\s*raise\\b
pytest_add_cli_args = -p
    no:cacheprovider
pytest_add_cli_args_test_selection = {tests}
also_copy = {others}
timeout_constant = 6
timeout_multiplier = 10
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"of {', '.join(TESTS)}, or their last names")
    names = parser.parse_args().modules
    modules = [m for m in TESTS if not names or {m, m.rpartition(".")[2], m.partition(".")[0]} & {*names}]
    if not modules:
        parser.error(f"no such module: {' '.join(names)}")
    total: Counter[str] = Counter()
    print(f"{'module':24}{'mutants':>8}{'killed':>8}{'by time':>10}{'survived':>10}{'share':>8}")
    for tests, some in groupby(modules, TESTS.get):  # modules with the same tests in one run
        with tempfile.TemporaryDirectory() as folder:
            found = check([*some], tests.split(), Path(folder))
        for module, (verdicts, survivors) in found.items():
            total += verdicts
            print_row(module, verdicts)
            print("".join(f"    {line}\n" for line in survivors), end="", flush=True)
    print_row("all", total)


def print_row(name: str, verdicts: Counter[str]) -> None:
    mutants, killed = verdicts.total(), sum(verdicts[verdict] for verdict in KILLED)
    survived, late = mutants - killed, verdicts["timeout"]
    print(f"{name:24}{mutants:8}{killed:8}{late:10}{survived:10}{survived / mutants:8.1%}", flush=True)


def check(modules: list[str], tests: list[str], folder: Path) -> dict[str, tuple[Counter[str], list[str]]]:
    """By module the verdicts on its mutants, and those that survived as `file:line: old -> new`."""
    paths = {module: Path("cream", *module.split(".")).with_suffix(".py") for module in modules}
    copy_repository(folder)
    others = {path.name for path in folder.iterdir()} - {"cream", "tests"}
    lists = {"paths": paths.values(), "tests": [f"tests/test_{name}.py" for name in tests], "others": others}
    (folder / "setup.cfg").write_text(
        CONFIG.format(**{name: "\n    ".join(map(str, values)) for name, values in lists.items()})
    )
    with open(folder / "tests/conftest.py", "a") as conftest:
        conftest.write(CONFTEST)
    mutmut = [Path(sys.executable).with_name("mutmut"), "run", "--max-children", "1"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # a process with one thread can be forked after it has used torch
    done = subprocess.run(mutmut, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout[-5000:]}\nmutmut failed on {', '.join(modules)}")
    with contextlib.chdir(folder):
        return {module: read_verdicts(path) for module, path in paths.items()}


def copy_repository(folder: Path) -> None:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in filter(None, subprocess.check_output(command, cwd=REPO, text=True).split("\0")):
        if (REPO / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPO / name, folder / name)


def read_verdicts(path: Path) -> tuple[Counter[str], list[str]]:
    from mutmut.mutation.diff_apply import get_diff_for_mutant
    from mutmut.stats import status_by_exit_code

    codes = json.loads(Path("mutants", f"{path}.meta").read_text())["exit_code_by_key"]
    verdicts = {name: status_by_exit_code[code] for name, code in codes.items()}
    starts, survivors = function_lines(path), []
    for name in (name for name, verdict in verdicts.items() if verdict not in KILLED):
        start = starts[name.rpartition(".")[2].partition("__mutmut_")[0]]
        survivors.append(f"{path}:{describe(get_diff_for_mutant(name, path=path), start)}")
    return Counter(verdicts.values()), survivors


def function_lines(path: Path) -> dict[str, int]:
    """The first line of each function and method, by mutmut's name for it."""
    tree = ast.parse(path.read_text())
    functions = {f"x_{f.name}": f for f in tree.body if isinstance(f, ast.FunctionDef)}
    for c in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        functions |= {f"xǁ{c.name}ǁ{f.name}": f for f in c.body if isinstance(f, ast.FunctionDef)}
    return {name: min([f.lineno, *(d.lineno for d in f.decorator_list)]) for name, f in functions.items()}


def describe(diff: str, start: int) -> str:
    """`line: old -> new` of a diff within a function that starts at this line of its file."""
    header, *lines = diff.splitlines()[2:]
    first = start + int(header.split()[1].partition(",")[0][1:]) - 1
    at = next(i for i, line in enumerate(lines) if line[0] in "+-")
    old, new = (" ".join(line[1:].strip() for line in lines if line[0] == sign) for sign in "-+")
    return f"{first + at}: {old} -> {new}"


if __name__ == "__main__":
    main()
