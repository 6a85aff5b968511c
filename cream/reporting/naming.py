"""Better names for outputs that are made by hand than those of their files, which are often the same."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from cream.cli.advice import as_given

if TYPE_CHECKING:
    from cream.reporting.outputs import Output

SAME = ("results.json", "results.jsonl", "prompts.json")  # names of many outputs: their folders tell them apart


def call(outputs: Sequence["Output"]) -> list["Output"]:
    """The outputs: a training by the name under which it was registered, an evaluation in a folder of its own by that
    of its model, and two of one kind that would still be called alike with their folders."""
    registered = {digest: name for each in outputs if (name := _given(each, "register")) for digest in _made(each)}
    found = [_with_name(each, registered) for each in outputs]
    alike = Counter(map(_key, found))
    return [
        replace(now, called=_with_folder(old)) if alike[_key(now)] > 1 else now
        for old, now in zip(outputs, found, strict=True)
    ]


def _with_folder(output: "Output") -> str:
    return output.name if output.path.name in SAME else f"{output.path.parent.name}/{output.name}"


def _with_name(output: "Output", registered: dict[str, str]) -> "Output":
    if output.kind == "training":
        name = _given(output, "register")
    elif output.kind == "evaluation" and output.path.name in SAME:
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
    """The value of a flag in the recorded command, if it is given."""
    return as_given((output.about.get("command") or [])[1:], once=True).get(flag) or None
