#!/usr/bin/env bash
# datasets 5.2.0 guesses the type of a csv column from its cells, so that the text of a label or an answer is lost:
# - a column of 007, an empty cell and 1e3 becomes float64: 7.0, None, 1000.0 (the door's code was 007);
# - a column of the words null, None and NA becomes three missing values.
# What keeps the text: `features=Features({"answer": Value("string")})` keeps 007, but null, None and NA are missing all
# the same until keep_default_na=False is given as well.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
packages datasets==5.2.0 numpy==2.3.5
"$python" - 2>/dev/null <<'PYTHON'
from pathlib import Path

import datasets
from datasets import Features, Value

Path("codes.csv").write_text("question,answer\nWhich code opens the door?,007\nIs it so?,\nHow much?,1e3\n")
Path("words.csv").write_text("question,answer\nFrench for zero?,null\nPython's nothing?,None\nShort for sodium?,NA\n")
TEXT = Features({"question": Value("string"), "answer": Value("string")})


def answers(file, **options):
    return datasets.load_dataset("csv", data_files=file, split="train", cache_dir="cache", **options)["answer"][:]


seen = {
    "codes": answers("codes.csv"),
    "words": answers("words.csv"),
    "codes as text": answers("codes.csv", features=TEXT),
    "words as text": answers("words.csv", features=TEXT),
    "words as text, no default NA": answers("words.csv", features=TEXT, keep_default_na=False),
}
print("datasets", datasets.__version__)
for name, found in seen.items():
    print(f"{name}: {found}")
assert seen["codes"] == [7.0, None, 1000.0] and seen["words"] == [None] * 3, "cells keep their text now"
assert seen["codes as text"][0] == "007" and seen["words as text"] == [None] * 3, "features behave otherwise now"
assert seen["words as text, no default NA"] == ["null", "None", "NA"]
PYTHON
