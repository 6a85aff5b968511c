"""Better names for outputs that are made by hand than those of their files, which are often the same."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cream.reporting.outputs import Output

NAMED_BY_FOLDER = ("results.json", "results.jsonl")  # of infer.py: MODEL-DATA/results.json


def call(outputs: Sequence["Output"]) -> list["Output"]:
    """The outputs: a training by the name under which it was registered, an evaluation in a folder of its own by that
    of its model, and two of one kind that would still be called alike with their folders."""
    registered = {digest: name for each in outputs if (name := _given(each, "register")) for digest in _made(each)}
    found = [_with_name(each, registered) for each in outputs]
    alike = Counter(map(_key, found))
    return [
        replace(now, called=f"{old.path.parent.name}/{old.name}") if alike[_key(now)] > 1 else now
        for old, now in zip(outputs, found, strict=True)
    ]


def _with_name(output: "Output", registered: dict[str, str]) -> "Output":
    if output.kind == "training":
        name = _given(output, "register")
    elif output.kind == "evaluation" and output.path.name in NAMED_BY_FOLDER:
        data = _given(output, "name")
        name = registered.get(output.input("policy") or "") or (data and output.name.removesuffix(f"-{data}"))
    else:
        name = None
    return replace(output, called=name) if name else output


def _key(output: "Output") -> tuple:
    """What tells outputs apart in a figure: evaluations of other questions are on lines of their own."""
    return output.kind, output.name, output.input("data") if output.kind == "evaluation" else None


def _made(output: "Output") -> list[str]:
    return [output.about["output"]] if output.kind == "training" and "output" in output.about else []


def _given(output: "Output", flag: str) -> str | None:
    """The value of a flag in the recorded command, if it is given once."""
    words = output.about.get("command") or []
    joined = [word.partition("=")[2] for word in words if word.startswith(f"--{flag}=")]
    found = [after for word, after in zip(words, words[1:], strict=False) if word == f"--{flag}"] + joined
    return found[0] if len(found) == 1 and isinstance(found[0], str) and found[0] else None
