#!/usr/bin/env bash
# transformers 5.19.0: a folder whose config.json ties the head to the embeddings (`tie_word_embeddings: true`), but whose
# weights hold a head of its own, keeps that head when it is loaded. And save_pretrained writes the head with a config
# that still says "tied": for a reader that believes the config, the saved model is another.
#
# Seen, a small random Llama: after loading, the head is the file's and not the embeddings; after saving again, config.json
# says tie_word_embeddings true, and the file has lm_head.weight.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
packages torch==2.13.0 transformers==5.19.0 numpy==2.3.5
"$python" - 2>/dev/null <<'PYTHON'
import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
                     tie_word_embeddings=True)
LlamaForCausalLM(config).save_pretrained("model")
state = load_file("model/model.safetensors")
head = torch.randn(64, 32)
assert "lm_head.weight" not in state
save_file(state | {"lm_head.weight": head}, "model/model.safetensors", {"format": "pt"})

model = AutoModelForCausalLM.from_pretrained("model")
model.save_pretrained("again")
seen = {
    "head": "its own" if torch.equal(model.lm_head.weight, head) else "the embeddings",
    "saved config": json.loads(Path("again/config.json").read_text())["tie_word_embeddings"],
    "saved head": "lm_head.weight" in load_file("again/model.safetensors"),
}
print("transformers", transformers.__version__, seen)
assert seen == {"head": "its own", "saved config": True, "saved head": True}
PYTHON
