#!/usr/bin/env bash
# torch 2.13.0: which regression losses take int64 targets, as scores of 1 to 5 come out of a data set.
#
#   mse_loss, l1_loss, smooth_l1_loss   forward and backward
#   huber_loss                          forward alone: an evaluation passes, the first training step raises
#   binary_cross_entropy_with_logits    neither
#
# Where a loss is chosen by a setting, the targets are cast for all of them.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
packages torch==2.13.0 numpy==2.3.5
"$python" - <<'PYTHON'
import torch
import torch.nn.functional as F

target = torch.tensor([0, 1, 1])
LOSSES = [F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy_with_logits]


def works(loss, backward):
    try:
        value = loss(torch.tensor([0.3, 0.7, 2.9], requires_grad=backward), target)
        if backward:
            value.backward()
        return True
    except RuntimeError:
        return False


seen = {loss.__name__: (works(loss, False), works(loss, True)) for loss in LOSSES}
print("torch", torch.__version__, "(forward, and backward):", seen)
whole, forward, neither = (True, True), (True, False), (False, False)
assert list(seen.values()) == [whole, whole, whole, forward, neither]
PYTHON
