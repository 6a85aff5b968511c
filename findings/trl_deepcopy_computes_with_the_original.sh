#!/usr/bin/env bash
# trl 1.16.0: once a model has been given to RLOOTrainer (or GRPOTrainer), a copy.deepcopy of it computes with the weights
# of the original. The trainer replaces the model's forward by a function that holds the original one; the copy gets that
# function, bound to itself, and its own weights are never read. No error, no warning; parameters() shows the copy's.
# - So an average of weights (torch.optim.swa_utils.AveragedModel copies its model), a frozen copy as reference, or a copy
#   into which adapters are merged for a check, gives the logits of the model that is being trained.
# What helps: `del copied.forward` (the class's own comes back), or loading the copy from a folder.
#
# Seen: a copy whose weights are all 0 gives the original's logits; without the attribute it gives 0.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
packages torch==2.13.0 transformers==5.19.0 trl==1.16.0 accelerate==1.15.0 datasets==5.2.0 numpy==2.3.5
"$python" - 2>/dev/null <<'PYTHON' | sed -n 's/^seen //p'
import copy

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.optim.swa_utils import AveragedModel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2, "b": 3}, unk_token="<pad>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
config = LlamaConfig(vocab_size=4, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                     initializer_range=0.5)
ids = torch.tensor([[2, 3, 2]])


@torch.no_grad()
def logits(model, scale):
    for parameter in model.parameters():
        parameter.mul_(scale)
    return model(input_ids=ids).logits


torch.manual_seed(0)
model = LlamaForCausalLM(config).eval()
before = logits(copy.deepcopy(model), 0)  # of a copy that was made before there was a trainer
settings = trl.RLOOConfig("run", per_device_train_batch_size=2, num_generations=2, beta=0.0, report_to=[], use_cpu=True,
                          bf16=False, gradient_checkpointing=False)
trl.RLOOTrainer(model, lambda prompts, **_: [0.0] * len(prompts), settings, Dataset.from_list([{"prompt": "a"}]),
                processing_class=tokenizer)
own = logits(model, 1)
copied = copy.deepcopy(model)
averaged = AveragedModel(model)
found, average = logits(copied, 0), logits(averaged, 0)
weights = sum(parameter.abs().sum().item() for parameter in copied.parameters())
del copied.forward
restored = logits(copied, 1)
print(f"seen trl {trl.__version__}, transformers {transformers.__version__}: largest logit of the model "
      f"{own.abs().max():.4f}; of a copy with weights 0 (their sum {weights}) {found.abs().max():.4f}, of an AveragedModel "
      f"likewise {average.abs().max():.4f}, of the copy without its forward {restored.abs().max():.4f}, of one made before "
      f"the trainer {before.abs().max():.4f}")
assert weights == 0 and torch.equal(found, own) and torch.equal(average, own), "a copy computes with its own weights now"
assert restored.abs().max() == before.abs().max() == 0
PYTHON
[[ ${PIPESTATUS[0]} == 0 ]]
