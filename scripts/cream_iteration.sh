#!/usr/bin/env bash
# One iteration of CREAM with the four stage commands: M_t responds to prompts, M_t and M_{t-1} rank the responses, the
# agreement of the two rankings becomes the consistency C, and M_t is trained on best against worst into M_{t+1}.
#
#     scripts/cream_iteration.sh MODEL CURRENT PREVIOUS PROMPTS NEXT
#
#     MODEL     the base model M0: tiny, llama3, llama2, a Hugging Face id or a folder
#     CURRENT   M_t, a name in configs/checkpoint.json or a folder
#     PREVIOUS  M_{t-1}, likewise; none in round 1, where M_{t-1} is M0
#     PROMPTS   prompts that no earlier round has used: a dataset's name or a file
#     NEXT      the name under which M_{t+1} enters configs/checkpoint.json; files go to outputs/NEXT
#
# From the environment:
#     DEVICE    cpu, a GPU, or several (0,1,2,3), all of which every stage uses; default auto
#     METHOD    consistency_avg (default), consistency_dyn, or original (C = 1: plain self-rewarding)
#     BETA      beta of DPO, default 0.1
#     SAMPLING  more flags for infer.py;  DPO  more flags for train.py
#
# Two rounds of the tiny model on a CPU, M1 being registered as tiny_m1 (README.md trains it); half a minute each:
#
#     export DEVICE=cpu BETA=1.0 SAMPLING="--gen_n 6 --gen_temperature 1.0 --top_p 1.0 --gen_max_tokens 64"
#     export DPO="--train_bsz 32 --lr 2e-4 --weight_decay 0"
#     scripts/cream_iteration.sh tiny tiny_m1 none    tiny_prompt_1 tiny_m2
#     scripts/cream_iteration.sh tiny tiny_m2 tiny_m1 tiny_prompt_2 tiny_m3
#
# Run again after an interruption, it skips the finished stages and resumes the interrupted one.
set -euo pipefail

explain() { sed -n '2,/^set -/{/^#/s/^# \{0,1\}//p}' "$0"; }
case ${1-} in -h | --help) explain; exit ;; esac
[[ $# -eq 5 ]] || { explain >&2; exit 2; }
cd "$(dirname "$0")/.."
model=$1 current=$2 previous=$3 prompts=$4 next=$5
device=${DEVICE:-auto}
method=${METHOD:-consistency_avg}
beta=${BETA:-0.1}
read -ra sampling <<< "${SAMPLING:-}"
read -ra dpo <<< "${DPO:-}"
out=outputs/$next
mapping=$device
[[ $device != cpu,* ]] || mapping=cpu # one process uses all cores
stage() { CREAM_ADVICE=no python "$@"; } # without the command of the next stage, which runs here anyway
one=(--device "$mapping" --model "$model") # flags of sampling and rewarding

# 1. Sampling: N responses of M_t to each prompt (by default N = 5, temperature 0.8, top-p 0.95, as released).
stage infer.py "${one[@]}" --mode sampling --checkpoint "$current" --name "$prompts" \
    --output_dir "$out/samples.json" "${sampling[@]}"

# 2. Rewarding by M_t: log M_t(y|x) - log M0(y|x), summed over the response. The reference is M0 in every round.
stage rewarding.py "${one[@]}" --input_file "$out/samples.json" \
    --reward dpo --checkpoint "$current" --ref_model_ckpt none --output "$out/rewards.current.json"

# 3. Rewarding by M_{t-1}, likewise. M0 against itself would be 0 for every response: round 1 takes M0's likelihood.
if [[ $previous == none ]]; then
    by_previous=(--reward likelihood --checkpoint none)
else
    by_previous=(--reward dpo --checkpoint "$previous" --ref_model_ckpt none)
fi
stage rewarding.py "${one[@]}" --input_file "$out/samples.json" "${by_previous[@]}" \
    --output "$out/rewards.previous.json"

# 4. Consistency: Kendall's tau of the two rankings, C = (tau + 1) / 2; pairs are best against worst by M_t.
rewards=(--file1 "$out/rewards.current.json" --file2 "$out/rewards.previous.json")
stage cal_consistency.py "${rewards[@]}" --method "$method" --beta "$beta" --output "$out/pairs.json"

# 5. DPO from M_t, which is its own reference: C * L(best, worst) + (1 - C) * L(worst, best).
python train.py --device "$device" --model "$model" --checkpoint "$current" --train_stage dpo --name "$out/pairs.json" \
    --beta "$beta" --output_dir "$out/train" --register "$next" "${dpo[@]}"
