#!/usr/bin/env bash
# math-verify 0.9.0: boxes that stand close to each other are one set, and a percentage equals two numbers.
#
# Seen: "$\boxed{11}$ is wrong, $\boxed{12}$ is right" gives 12, but "$\boxed{11}$, $\boxed{12}$" and
# "\boxed{11} and \boxed{12}" give {11, 12}, which is not 12: a reward that hands it a whole response marks a model that
# corrects itself, or that repeats its result, by how many characters are between its boxes. The label 50\% equals both
# 50 and 0.5, which differ by a factor of 100. Hand it one box, and decide what a percentage is before.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
packages math-verify==0.9.0 antlr4-python3-runtime==4.13.2
"$python" - <<'PYTHON'
from importlib.metadata import version

from math_verify import parse, verify

TEXTS = {
    "far": r"$\boxed{11}$ is wrong, $\boxed{12}$ is right",
    "comma": r"$\boxed{11}$, $\boxed{12}$",
    "and": r"\boxed{11} and \boxed{12}",
}
gold = parse("$12$")
boxes = {name: (str(parse(text)[0]), verify(gold, parse(text))) for name, text in TEXTS.items()}
percent = {text: verify(parse(r"$50\%$"), parse(f"${text}$")) for text in ("50", "0.5", "5")}
print("math-verify", version("math-verify"), boxes, percent)
assert boxes == {"far": ("12", True), "comma": ("{11, 12}", False), "and": ("{11, 12}", False)}
assert percent == {"50": True, "0.5": True, "5": False}
PYTHON
