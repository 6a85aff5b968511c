"""The word list finds a phrase wherever a reader meets it, and nothing else."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
REFUSED = (
    "an output that stands already",
    "what stands is replaced",
    "the same command goes on",
    "two records are passed over",
    "--on_bad_record skip leaves such records out",
    "start it afresh",
    "the answer stands after the question",
    "rows are read as they stand",
    "outputs made by the same settings",
    "an unfinished run in outputs/M1",
    "a record file in the making",
    "keys that travel along",
    "stages take it as it is",
    "the interrupted run is gone on with",
    "whence it came",
    "scores kept beside the samples",
    "an answer that was cut",
    "a model cut up over devices",
    "for want of memory",
    "FILE is no regular file",
    "dealt out to the rounds",
    "nothing that could mend it",
    "what a kill costs",
    "the method's suffix",
    "a mean over answer tokens",
    "a mistake of the user's",
)
ALLOWED = (
    "the output is up to date; skipping",
    "the run resumes",
    "there is no file",
    "the run is no longer valid",
    "2 passes over the data",
    "the answer is extracted, and its tokens are counted",
    "what it stands for",
    "it stands in for the teacher",
    "we recommend it, and it found, made and kept them",
    "the method is one page",
    "answer_tokens_per_second",
)


def lint(*paths: Path) -> tuple[int, list[tuple[int, str]]]:
    """Exit code, and (line, phrase) of each finding."""
    command = [sys.executable, REPO / "scripts/lint_words.py", *paths]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.stderr
    return done.returncode, [(int(n), p) for n, p in re.findall(r":(\d+): '(.+)': write instead", done.stdout)]


def test_phrases_are_refused_and_plain_words_are_not(tmp_path):
    (tmp_path / "page.md").write_text("\n\n".join([*REFUSED, *ALLOWED]))
    code, found = lint(tmp_path)
    assert code == 1 and {line for line, _ in found} == {2 * i + 1 for i in range(len(REFUSED))}


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.md", "One.\nIt goes\n  on here.\n", (2, "goes on")),
        ("a.sh", "# it is built anew\n", (1, "anew")),
        ("a.py", 'x = ("it goes "\n     "on")\n', (1, "goes on")),
        ("a.py", '\n"""A docstring.\n\nIt goes on.\n"""\n', (4, "goes on")),
        ("a.py", 'x = f"{a} stands {b} already stands"\n', (1, "already stands")),
        ("a.py", "x = f\"{say('anew')}\"\n", (1, "anew")),
    ],
)
def test_phrases_are_found_across_lines_literals_and_values(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text)
    assert lint(tmp_path) == (1, [expected])


def test_names_and_comments_of_python_are_not_texts(tmp_path):
    (tmp_path / "a.py").write_text("anew = afresh('a')  # it goes on\n")
    assert lint(tmp_path) == (0, [])


def test_a_root_that_does_not_exist_is_an_error(tmp_path):
    assert lint(tmp_path / "nothing")[0] == lint()[0] == 2
