#!/usr/bin/env bash
# torch 2.13.0 on a CPU: `index_add` sums in the tensor's own dtype, where `sum` keeps a float32 total behind a bfloat16
# result. Summing the log-probabilities of a response's tokens by index_add in bfloat16 is therefore wrong by far more
# than one rounding: it stops growing where a further term is less than half of the last bit.
#
# Seen: a thousand ones give 1000 by sum and by scatter_add, 256 by index_add: two ways to write the same sum disagree.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
packages torch==2.13.0 numpy==2.3.5
"$python" - <<'PYTHON'
import torch

ones, place = torch.ones(1000, dtype=torch.bfloat16), torch.zeros(1000, dtype=torch.long)
total = torch.zeros(1, dtype=torch.bfloat16)
seen = {
    "sum": ones.sum().item(),
    "index_add": total.index_add(0, place, ones).item(),
    "scatter_add": total.scatter_add(0, place, ones).item(),
}
print("torch", torch.__version__, seen)
assert seen == {"sum": 1000.0, "index_add": 256.0, "scatter_add": 1000.0}
PYTHON
