"""Refuse words that a reader has to translate. `make lint` runs it; each rule says what to write instead.

    python scripts/lint_words.py README.md docs scripts cream *.py

Of a Python file the string literals are checked, docstrings and help texts included; of any other file all of its text.
A phrase is found across line ends, across adjacent literals and around the values of an f-string.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

THINGS = (
    "adapter|address|answer|array|checkpoint|directory|file|flag|folder|label|link|list|mapping|marker|model|name|node"
    "|number|object|option|path|pattern|port|record|response|reward|tokenizer|template|text|uuid|valid|whole"
)
RULES = {  # a pattern, of which a space is any white space -> what to write
    r"stands? (already|beside|there|here|until|unless|next to)": "is up to date; exists; is next to",
    r"already stands?|what stands|(run|output|file)s? stands?": "an existing, finished or interrupted output",
    r"(go|goes|going|gone|went) on": "continues, resumes",
    r"passed over|passing over|passe?s? over (what|it|them|stages|those|such|lines|records)": "skipped, skips",
    r"(left|leave|leaves|leaving) (it |them |those |such \w+ |the rest )?out": "skipped, omitted",
    r"stands? (alone|after|at|by|in(?! for)|twice)|as (it|they) stands?": "is in, is at, occurs; as it is",
    r"made by the same settings": "is up to date (same settings and inputs)",
    r"(an )?unfinished run": "an interrupted run",
    r"(output|file|record)s? in the making": "an output that is being written",
    r"travel(s|led)? along": "is copied, is kept",
    r"takes? (it |them )?as it is": "uses it unverified",
    r"afresh|anew": "from scratch, again",
    r"whence": "source",
    r"kept (beside|scores|log-probabilities)|scores kept": "cached",
    r"cut at (the|its) (length )?limit|(answer|response)s? (that )?(was|were|is|are) cut": "truncated",
    r"cut up": "split; tensor-parallel",
    r"(reads?|takes?|taking|reading) an answer": "extracts, parses",
    r"want of memory|the memory carries|devices? carr(y|ies)": "out of memory; as many as fit in memory",
    rf"(?<!there\s)(is|are|was|were) no (?!longer|more|less)([a-z.]+ ){{0,2}}({THINGS})s?": "is not a, is not an",
    r"dealt|deal(s|ing)? out": "shuffled, split, reassigned",
    r"mend(s|ed|ing|able)?": "fix, fixable",
    r"(a|what a|what the) kill costs?": "at most this much work is lost if the process is killed",
    r"the method's": "CREAM's, the released code's",
    r"programs from elsewhere": "chat-template sandbox",
    r"answer tokens?|(sampled|chosen|rejected|truncated|greedy|generated) answers?": "response",
    r"of the user's": "user error",
}
PATTERNS = {re.compile(rf"\b(?:{rule})\b".replace(" ", r"\s+"), re.IGNORECASE): say for rule, say in RULES.items()}


def findings(path: Path) -> Iterator[tuple[int, str, str]]:
    """(line, phrase, what to write instead) of every refused phrase in a file, or in the files of a folder."""
    for line, text in _strings(path) if path.suffix == ".py" else [(1, path.read_text(encoding="utf-8"))]:
        for pattern, say in PATTERNS.items():
            for match in pattern.finditer(text):
                yield line + text.count("\n", 0, match.start()), " ".join(match[0].split()), say


def _strings(path: Path) -> Iterator[tuple[int, str]]:
    """(first line, text) of every string literal; `…` stands for the values of an f-string."""
    todo = [ast.parse(path.read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.JoinedStr):
            yield node.lineno, "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            todo += [part for part in node.values if not isinstance(part, ast.Constant)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
        else:
            todo += ast.iter_child_nodes(node)


def files(roots: list[str]) -> Iterator[Path]:
    """The texts and Python files under the given files and folders, but this one, which has the phrases itself."""
    for root in map(Path, roots):
        found = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.suffix in (".md", ".py", ".sh"))
        yield from (path for path in found if path.resolve() != Path(__file__).resolve())


def main(roots: list[str]) -> int:
    """Print every finding; 1 if there is one, 2 if there is nothing to check."""
    if missing := [root for root in roots if not Path(root).exists()] or not roots:
        print(f"expected files or folders to check, and these are missing: {missing}" if roots else __doc__)
        return 2
    problems = [(path, *finding) for path in files(roots) for finding in sorted(findings(path))]
    for path, line, phrase, say in problems:
        print(f"{path}:{line}: '{phrase}': write instead: {say}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
