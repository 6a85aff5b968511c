#!/usr/bin/env bash
# transformers 5.19.0: `generate(repetition_penalty=…)` penalises the padding of a left-padded batch as if the prompt
# had it: the attention mask keeps padding from the model, not from the penalty. Where the padding token is the end of
# the text, as it often is set, responses to the shorter prompts of a batch end later than they would alone.
#
# Seen, a small random Llama with pad = eos, penalty 2, two prompts without that token: the score of eos after the short
# prompt is another in the batch than alone; without a penalty, and after the long prompt, it is the same.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
packages torch==2.13.0 transformers==5.19.0 numpy==2.3.5
"$python" - <<'PYTHON'
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

EOS = 2
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                     num_attention_heads=4, max_position_embeddings=64, initializer_range=0.5)).eval()
prompts = {"long": [7, 8, 9, 10, 11], "short": [9, 5]}


def eos_scores(rows, penalty):
    """The score of eos as first token after each prompt, as `generate` compares it with others."""
    width = max(map(len, rows))
    ids = torch.tensor([[EOS] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=1, do_sample=False, pad_token_id=EOS,
                         eos_token_id=EOS, repetition_penalty=penalty, output_scores=True, return_dict_in_generate=True)
    return out.scores[0][:, EOS].tolist()


differ = {}
for penalty in (1.0, 2.0):
    together = eos_scores([*prompts.values()], penalty)
    for (name, row), batched in zip(prompts.items(), together, strict=True):
        (alone,) = eos_scores([row], penalty)
        differ[name, penalty] = abs(alone - batched) > 1e-3
        print(f"transformers {transformers.__version__}, penalty {penalty}, {name} prompt: "
              f"score of eos alone {alone:.3f}, in the batch {batched:.3f}")
assert differ == {("long", 1.0): False, ("short", 1.0): False, ("long", 2.0): False, ("short", 2.0): True}
PYTHON
