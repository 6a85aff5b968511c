#!/usr/bin/env bash
# transformers 5.19.0: where scikit-learn is installed, for whatever reason (lm_eval brings it), importing any model class
# that generates imports scikit-learn, and with it joblib, threadpoolctl and most of scipy: for one curve (roc_curve) of
# assisted decoding, whether or not anybody uses that. An entry None under "sklearn" in sys.modules, made before, keeps
# it out; the model loads and generates as before.
#
# Seen: after `from transformers import LlamaForCausalLM` sys.modules has sklearn and hundreds of modules more than
# with the entry; greedy responses of a small random Llama are equal.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
packages torch==2.13.0 transformers==5.19.0 numpy==2.3.5 scipy==1.17.1 scikit-learn==1.7.2
cat > look.py <<'PYTHON'
import json
import sys

if sys.argv[1] == "without":
    sys.modules["sklearn"] = None
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
ids = LlamaForCausalLM(config).generate(torch.tensor([[1, 5, 7]]), do_sample=False, max_new_tokens=8).tolist()
names = {name.partition(".")[0] for name in sys.modules if sys.modules[name] is not None}
print(json.dumps([ids, sorted(names & {"sklearn", "joblib"}), len(sys.modules)]))
PYTHON
"$python" - <<'PYTHON'
import importlib.metadata
import json
import subprocess
import sys

seen = {}
for how in ("with", "without"):
    done = subprocess.run([sys.executable, "look.py", how], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    seen[how] = json.loads(done.stdout)
versions = {name: importlib.metadata.version(name) for name in ("transformers", "scikit-learn")}
print(versions, {how: {"imported": names, "modules": count} for how, (_, names, count) in seen.items()})
assert seen["with"][0] == seen["without"][0]
assert seen["with"][1] == ["joblib", "sklearn"] and seen["without"][1] == []
assert seen["with"][2] > seen["without"][2] + 200
PYTHON
