#!/usr/bin/env bash
# torchmetrics 1.9.0: of a side that ranks all alike, Spearman's correlation is 0, whereas Kendall's, Pearson's and the
# concordance are nan, as SciPy's Spearman is. A judge that gives every response the same mark has no ranking; a mean
# over prompts then counts it as "no correlation" under Spearman and shows the nan under Kendall, on the same data. The
# zero comes without a warning (Pearson warns). Beside torch.nanmean, the two means are of other prompts.
#
# Seen, one prompt with marks 1 1 1 1 1 and one whose marks agree with the reference's: Spearman 0 and 1 (mean 0.5),
# Kendall and Pearson nan and 1 (mean nan, or 1 by nanmean); scipy's spearmanr gives nan for the first.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
packages torch==2.13.0 torchmetrics==1.9.0 scipy==1.17.1 numpy
"$python" - 2>/dev/null <<'PYTHON'
import math

import scipy
import torch
import torchmetrics
from torchmetrics.functional import kendall_rank_corrcoef, pearson_corrcoef, spearman_corrcoef

reference = torch.arange(5.0)
marks = torch.stack([torch.ones(5), reference], 1)
both = torch.stack([reference, reference], 1)
print("seen torchmetrics", torchmetrics.__version__, "scipy", scipy.__version__)
seen = {f.__name__: f(marks, both) for f in (spearman_corrcoef, kendall_rank_corrcoef, pearson_corrcoef)}
for name, (constant, equal) in seen.items():
    print(f"seen {name}: {constant:.4g} {equal:.4g}, mean {seen[name].mean():.4g}, nanmean {seen[name].nanmean():.4g}")
    assert abs(equal - 1) < 1e-5
assert seen["spearman_corrcoef"][0] == 0
assert math.isnan(seen["kendall_rank_corrcoef"][0]) and math.isnan(seen["pearson_corrcoef"][0])
assert math.isnan(scipy.stats.spearmanr(marks[:, 0], reference).statistic)
PYTHON
