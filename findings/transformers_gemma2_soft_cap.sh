#!/usr/bin/env bash
# transformers 5.19.0: Gemma 2 caps its attention scores (`attn_logit_softcapping`, arXiv 2408.00118 §2), but the attention
# implementation that the library chooses by default, sdpa, leaves the cap out, and nothing says so. With
# attn_implementation="eager" it is applied. The two are then different models: log-probabilities, and everything that
# is trained or ranked by them, depend on which one was chosen.
#
# Seen, a small random Gemma 2 with a cap of 1, against the same weights without a cap: by default and with sdpa the
# largest difference in log-probability is 0; with eager 6 nats.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
packages torch==2.13.0 transformers==5.19.0 numpy==2.3.5
"$python" - <<'PYTHON'
import torch
import transformers
from transformers import Gemma2Config, Gemma2ForCausalLM

SIZE = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, head_dim=8, max_position_embeddings=64, initializer_range=1.0,
            query_pre_attn_scalar=1)


@torch.no_grad()
def log_probs(cap, **attention):
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**SIZE, attn_logit_softcapping=cap, **attention)).eval()
    return model(input_ids=torch.arange(16)[None]).logits.log_softmax(-1)


def effect(**attention):
    """Largest difference that the cap makes, in nats."""
    return (log_probs(1.0, **attention) - log_probs(None, **attention)).abs().max().item()


seen = {name: effect(**({"attn_implementation": name} if name != "default" else {}))
        for name in ("default", "sdpa", "eager")}
print("transformers", transformers.__version__, {name: round(nats, 3) for name, nats in seen.items()})
assert seen["default"] == seen["sdpa"] == 0, "the cap is applied by default now"
assert seen["eager"] > 1, "the cap is not applied with eager either"
PYTHON
