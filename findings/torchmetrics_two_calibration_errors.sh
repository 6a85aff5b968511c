#!/usr/bin/env bash
# torchmetrics 1.9.0: the calibration error of the same probabilities for two classes depends on the way they are given.
# As task="binary" the bins are of the probability of class 1, and each compares that with the share of class 1. As
# task="multiclass" with num_classes=2, and (p, 1 - p) as rows, the bins are of the larger of the two, and each compares
# it with the share that was right. A reward model that gives "chosen is better" 0.2 too often is off by 0.17 in the
# first measure and by 0.06 in the second: where p is above one half it is too sure, below it is not sure enough, and
# a bin of the second measure holds both, which cancel. So expected calibration errors of two papers or tools do not
# compare unless both say which is meant.
#
# Seen, 2 000 labels drawn with probability u, and p = min(u + 0.2, 1), ten bins: 0.1657 and 0.0551; plain NumPy gives
# the first by bins of p, the second by bins of max(p, 1 - p). Without the shift they are 0.0217 and 0.0146.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
packages torch==2.13.0 torchmetrics==1.9.0 numpy
"$python" - <<'PYTHON'
import numpy as np
import torch
import torchmetrics
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error


def by_hand(sure, right):
    """The mean over ten bins of |confidence - share right|, weighted by their sizes."""
    bins = np.minimum((sure * 10).astype(int), 9)
    parts = [(np.mean(bins == b), abs(sure[bins == b].mean() - right[bins == b].mean())) for b in {*bins.tolist()}]
    return sum(weight * gap for weight, gap in parts)


torch.manual_seed(0)
u = torch.rand(2000)
label = (torch.rand(2000) < u).long()
print("seen torchmetrics", torchmetrics.__version__)
for shift in (0.0, 0.2):
    p = (u + shift).clamp(max=1)
    binary = binary_calibration_error(p, label, n_bins=10).item()
    two = multiclass_calibration_error(torch.stack([1 - p, p], 1), label, num_classes=2, n_bins=10).item()
    print(f"seen shift {shift}: binary {binary:.4f}, two classes {two:.4f}")
    p, y = p.double().numpy(), label.numpy()
    assert abs(binary - by_hand(p, y)) < 1e-3
    assert abs(two - by_hand(np.maximum(p, 1 - p), np.where(p > 0.5, y, 1 - y))) < 1e-3
assert binary > 2.5 * two
PYTHON
