"""Bugs put in by hand, each of which must make its test fail: planted_bugs.py [WORD ...]; those whose kind, file or
test has one of the words.

scripts/planted_bugs.yaml lists them by kind: a file, the text that is replaced there, and the test. Each is put into a
copy of the tracked files, in which the test then runs. Exit code 1 if a test passes in spite of its bug.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

REPO = Path(__file__).resolve().parent.parent
FAILED = 1  # pytest's exit code when tests ran and some failed


def main(words: list[str]) -> int:
    bugs = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
    listed = [{"kind": kind} | bug for kind, some in bugs.items() for bug in some]
    chosen = [bug for bug in listed if not words or any(word in f"{bug}" for word in words)]
    unseen = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "cream"
        for name in subprocess.check_output(["git", "ls-files", "-z"], cwd=REPO, text=True).split("\0")[:-1]:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPO / name, copy / name)
        for number, bug in enumerate(chosen, 1):
            began = time.monotonic()
            seen = see(copy, bug)
            unseen += not seen
            took = f"{time.monotonic() - began:.0f} s"
            print(f"[{number}/{len(chosen)}] {bug['kind']}: {bug['file']}: {'seen by' if seen else 'NOT SEEN by'} "
                  f"{bug['test']} ({took})", flush=True)  # fmt: skip
    print(f"{len(chosen) - unseen} of {len(chosen)} planted bugs were seen")
    return int(unseen > 0)


def see(copy: Path, bug: dict) -> bool:
    """Whether the bug's test, which must exist and run, fails with the bug."""
    path = copy / bug["file"]
    right = path.read_text()
    if right.count(bug["from"]) != 1:
        sys.exit(f"{bug['file']} has {right.count(bug['from'])} times, not once: {bug['from']}")
    path.write_text(right.replace(bug["from"], bug["to"]))
    try:
        test = [sys.executable, "-m", "pytest", "-q", "-m", "", "-p", "no:cacheprovider", bug["test"]]
        done = subprocess.run(test, cwd=copy, capture_output=True, text=True)
    finally:
        path.write_text(right)
    if done.returncode not in (0, FAILED):
        sys.exit(f"{bug['test']} did not run:\n{done.stdout}{done.stderr}")
    return done.returncode == FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
