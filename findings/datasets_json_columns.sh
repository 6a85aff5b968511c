#!/usr/bin/env bash
# datasets 5.2.0 changes texts of a JSON-lines file in two ways that its rows do not ask for:
# - a column whose rows are the text "12" and the number 13 gets the new type Json, and the text comes back as the
#   number 12: strings of a mixed column are decoded as if they were JSON (the text "true" becomes True, "null" None);
# - a column of texts that look like dates becomes timestamps: "2024-01-05" comes back as a datetime.
# An answer that a dataset holds as text is then compared with something else than was written.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
packages datasets==5.2.0 numpy==2.3.5
"$python" - 2>/dev/null <<'PYTHON'
import json
from pathlib import Path

import datasets


def answers(*values):
    path = Path(f"{len(list(Path('.').glob('*.jsonl')))}.jsonl")
    path.write_text("".join(json.dumps({"answer": value}) + "\n" for value in values))
    table = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir="cache")
    return table["answer"][:], str(table.features["answer"])


print("datasets", datasets.__version__)
mixed, kind = answers("12", 13, "true", "null", "1.50")
dates, date_kind = answers("2024-01-05", "2024-02-06")
print(f"texts and a number: {mixed!r} ({kind})")
print(f"texts that look like dates: {dates!r} ({date_kind})")
assert mixed == [12, 13, True, None, 1.5], "texts of a mixed column stay texts now"
assert not any(isinstance(value, str) for value in dates), "texts that look like dates stay texts now"
PYTHON
