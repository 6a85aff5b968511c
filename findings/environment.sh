# Sourced by each finding: `packages NAME==VERSION …` makes a virtual environment with them in a temporary folder, which
# is removed at the end, and sets $python. PYTHON=/path/to/python3.11 chooses the interpreter.
# A finding prints the versions and what it sees, and ends with 1 where the behaviour is another than it states.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false CUDA_VISIBLE_DEVICES=

packages() {
    "${PYTHON:-python3}" -m venv environment
    python=$folder/environment/bin/python
    local each rest=()
    for each in "$@"; do
        case $each in
            torch==*)  # the CPU build where the index has it: the CUDA build is several GB
                "$python" -m pip install -q "$each+cpu" 2>/dev/null || "$python" -m pip install -q "$each" ;;
            *) rest+=("$each") ;;
        esac
    done
    [[ ${#rest[@]} == 0 ]] || "$python" -m pip install -q "${rest[@]}"
}
