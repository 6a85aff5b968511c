#!/usr/bin/env bash
# deepspeed 0.19.8 on a CPU: setting up its process group compiles a C++ extension (deepspeed_shm_comm, half a minute and a
# compiler at the first start on a machine), whatever the configuration. Training never calls it: of DeepSpeed's
# collectives only inference_all_reduce does, while all_reduce, reduce_scatter and all_gather go to torch's backend.
# An entry False under its name in deepspeed.ops.__compatible_ops__ omits it, and the collectives give the same.
#
# Seen: a folder with a shared library per extension after init_distributed("gloo"); none with the entry; equal sums.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
packages torch==2.13.0 transformers==5.19.0 numpy==2.3.5 setuptools==80.9.0 ninja==1.13.0
DS_BUILD_OPS=0 "$python" -m pip install -q --no-build-isolation deepspeed==0.19.8
export DS_ACCELERATOR=cpu
PATH="$(dirname "$python"):$PATH"
cat > start.py <<'PYTHON'
import os
import sys
from pathlib import Path

os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[2]}
os.environ["TORCH_EXTENSIONS_DIR"] = sys.argv[1]
import deepspeed
import torch

if sys.argv[1].endswith("without"):
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed("gloo", verbose=False)
calls = []
backend = sys.modules["deepspeed.comm.torch"].TorchBackend
plain = backend.inference_all_reduce
backend.inference_all_reduce = lambda *given: calls.append(given) or plain(*given)
model = torch.nn.Linear(4, 2)
torch.manual_seed(0)
torch.nn.init.normal_(model.weight)
torch.nn.init.zeros_(model.bias)
settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True}
engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=0.1), config=settings)
for _ in range(3):
    engine.backward(engine(torch.ones(1, 4)).square().sum())
    engine.step()
built = sorted(path.stem for path in Path(sys.argv[1]).rglob("*.so"))
print("SEEN", built, len(calls), [round(x, 6) for x in model.weight.detach().flatten().tolist()])
torch.distributed.destroy_process_group()
PYTHON
"$python" - <<'PYTHON'
import importlib.metadata
import subprocess
import sys

seen = {}
for how, port in (("with", "29611"), ("without", "29612")):
    argv = [sys.executable, "start.py", f"{sys.path[0] or '.'}/extensions-{how}", port]
    out = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert out.returncode == 0, out.stderr[-2000:]
    (seen[how],) = [line for line in out.stdout.splitlines() if line.startswith("SEEN")]
print({name: importlib.metadata.version(name) for name in ("deepspeed", "torch")}, seen)
assert seen["with"].startswith("SEEN ['deepspeed_shm_comm'] 0 "), seen
assert seen["without"].startswith("SEEN [] 0 "), seen
assert seen["with"].partition(" 0 ")[2] == seen["without"].partition(" 0 ")[2]
PYTHON
