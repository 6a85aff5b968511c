#!/usr/bin/env bash
# torch 2.13.0: AdamW(fused=True) changes the weights without counting it. A tensor's `_version` goes up with every change
# in place, and after a step of AdamW in its other two forms (foreach, and one tensor at a time) it does; after a fused
# step it stays, though the values are equal to theirs. So whoever keeps something made of a weight, such as its cast to
# bfloat16 for all micro-batches of a step, and makes it again when `_version` has changed, uses the weights from
# before the first step, and training looks healthy: the loss falls for a while, by the parts that are not kept.
# What is kept has to be dropped by a step's end instead, or by a hook (register_step_post_hook).
#
# Seen, one step on a weight of 4 x 4: versions +0 (fused), at least +1 (foreach, for-loop), the new weights equal to
# 1e-6; a cast that is renewed by version differs from the weight after the fused step alone.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
packages torch==2.13.0 numpy
"$python" - <<'PYTHON'
import torch

FORMS = {"fused": {"fused": True}, "foreach": {"foreach": True}, "for-loop": {"foreach": False, "fused": False}}


class Cast:
    """A weight in bfloat16, made again when the weight's version has changed."""

    def __init__(self, weight):
        self.weight, self.version, self.value = weight, -1, None

    def __call__(self):
        if self.version != self.weight._version:
            self.version, self.value = self.weight._version, self.weight.detach().bfloat16()
        return self.value


print("seen torch", torch.__version__)
results = {}
for name, form in FORMS.items():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(4, 4))
    optimizer = torch.optim.AdamW([weight], lr=0.1, **form)
    cast = Cast(weight)
    cast()
    weight.grad = torch.ones_like(weight)
    before = weight._version
    optimizer.step()
    stale = not torch.equal(cast(), weight.detach().bfloat16())
    results[name] = weight.detach().clone()
    print(f"seen {name}: version +{weight._version - before}, a cast renewed by version is stale: {stale}")
    assert stale == (name == "fused") == (weight._version == before)
assert all(torch.allclose(results["fused"], other, atol=1e-6) for other in results.values())
PYTHON
