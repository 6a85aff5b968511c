#!/usr/bin/env bash
# transformers 5.19.0 takes a 4-D attention mask that a caller made by hand as it is, with two surprises.
#
# - A boolean mask (True: may be seen) is right with attn_implementation="sdpa". With "eager" it is silently wrong: the
#   mask is added to the scores, True as 1 and False as 0, so that every token sees the future. A float mask, 0 and
#   -inf-like, is right with both.
# - In a model with a sliding window (Mistral) such a mask replaces the window, with sdpa and eager alike: the layers
#   see whatever the mask allows, and no warning says so.
#
# Seen: Llama, a plain causal mask against none: difference in log-probability 0 (sdpa), 14 nats (eager, boolean).
# Mistral with a window of 6 and a plain causal mask: 15 nats.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
packages torch==2.13.0 transformers==5.19.0 numpy==2.3.5
"$python" - <<'PYTHON'
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

SIZE = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=64, initializer_range=0.5)
causal = torch.ones(24, 24, dtype=torch.bool).tril()[None, None]
added = torch.zeros(1, 1, 24, 24).masked_fill(~causal, torch.finfo(torch.float32).min)


@torch.no_grad()
def apart(model_class, config_class, attention, mask, **more):
    """Largest difference in log-probability between no mask and `mask`."""
    torch.manual_seed(0)
    model = model_class(config_class(**SIZE, attn_implementation=attention, **more)).eval()
    ids = torch.randint(64, (1, 24))
    plain, given = (model(input_ids=ids, attention_mask=m).logits.log_softmax(-1) for m in (None, mask))
    return (plain - given).abs().max().item()


print("transformers", transformers.__version__, "torch", torch.__version__)
llama, mistral = (LlamaForCausalLM, LlamaConfig), (MistralForCausalLM, MistralConfig)
seen = {
    "llama, sdpa, boolean": apart(*llama, "sdpa", causal),
    "llama, sdpa, float": apart(*llama, "sdpa", added),
    "llama, eager, float": apart(*llama, "eager", added),
    "llama, eager, boolean": apart(*llama, "eager", causal),
    "mistral with a window, sdpa, boolean": apart(*mistral, "sdpa", causal, sliding_window=6),
    "mistral with a window, eager, float": apart(*mistral, "eager", added, sliding_window=6),
}
for name, nats in seen.items():
    print(f"{name}: {nats:.3g} nats")
values = list(seen.values())
assert max(values[:3]) < 1e-4, "a mask that was taken as it should be is not any more"
assert min(values[3:]) > 1, "a surprise is gone: masks made by hand behave as one would expect"
PYTHON
