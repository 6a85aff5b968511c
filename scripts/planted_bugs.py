"""Bugs put in by hand, each of which must make its test fail: planted_bugs.py [WORD ...]; those whose kind, file or
test has one of the words.

scripts/planted_bugs.yaml lists them by kind: a file, the text that is replaced there, and the test. Each is put into a
copy of the tracked files, in which the test runs first without any. Exit code 1 if a test passes in spite of its bug.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

REPO = Path(__file__).resolve().parent.parent
PASSED, FAILED = 0, 1  # pytest's exit codes when tests ran


def main(words: list[str]) -> int:
    bugs = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
    listed = [{"kind": kind} | bug for kind, some in bugs.items() for bug in some]
    chosen = [bug for bug in listed if not words or any(word in f"{bug}" for word in words)]
    seen = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "cream"
        for name in subprocess.check_output(["git", "ls-files", "-z"], cwd=REPO, text=True).split("\0")[:-1]:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPO / name, copy / name)
        for test in dict.fromkeys(bug["test"] for bug in chosen):
            run(copy, test, expected=(PASSED,))
        for number, bug in enumerate(chosen, 1):
            began = time.monotonic()
            failed = plant(copy, bug)
            seen += failed
            verdict = "seen by" if failed else "NOT SEEN by"
            took = f"{time.monotonic() - began:.0f} s"
            about = f"[{number}/{len(chosen)}] {bug['kind']}: {bug['file']}"
            print(f"{about}: {verdict} {bug['test']} ({took})", flush=True)
    print(f"{seen} of {len(chosen)} planted bugs were seen")
    return int(seen < len(chosen))


def plant(copy: Path, bug: dict) -> bool:
    """Put a bug in, run its test, and take it out; whether the test failed."""
    path = copy / bug["file"]
    right = path.read_text()
    if right.count(bug["from"]) != 1:
        sys.exit(f"{bug['file']} has {right.count(bug['from'])} times, not once: {bug['from']}")
    path.write_text(right.replace(bug["from"], bug["to"]))
    try:
        return run(copy, bug["test"], expected=(PASSED, FAILED)) == FAILED
    finally:
        path.write_text(right)


def run(copy: Path, test: str, expected: tuple[int, ...]) -> int:
    """The exit code of pytest on a test."""
    argv = [sys.executable, "-m", "pytest", "-q", "-m", "", "-p", "no:cacheprovider", test]
    done = subprocess.run(argv, cwd=copy, capture_output=True, text=True)
    if done.returncode not in expected:
        sys.exit(f"{test} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
