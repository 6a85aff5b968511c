#!/usr/bin/env bash
# accelerate 1.15.0 with deepspeed 0.19.8: Accelerator(cpu=True, deepspeed_plugin=…) leaves DeepSpeed out without a word:
# it runs plain data parallelism, no shards. Without cpu=True, and with DS_ACCELERATOR=cpu, the same plugin is used on a
# machine that has no GPU.
#
# Seen: distributed_type MULTI_CPU with cpu=True, DEEPSPEED without it.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
packages torch==2.13.0 accelerate==1.15.0 transformers==5.19.0 numpy==2.3.5 setuptools==80.9.0 ninja==1.13.0
DS_BUILD_OPS=0 "$python" -m pip install -q --no-build-isolation deepspeed==0.19.8
export RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29871 DS_ACCELERATOR=cpu
kind() {
    "$python" -c "
from accelerate import Accelerator, DeepSpeedPlugin
accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(zero_stage=2), $1)
print('type', accelerator.distributed_type.value)" 2>"errors.$1" | sed -n 's/^type //p'
}
with=$(kind "cpu=True") without=$(kind "cpu=False")
cat errors.* | grep -i "error" || true
echo "accelerate 1.15.0, deepspeed 0.19.8: with cpu=True $with, without it $without"
[[ $with == MULTI_CPU ]] || { echo "cpu=True does something else now"; exit 1; }
[[ $without == DEEPSPEED ]] || { echo "the plugin is not used without cpu=True either"; exit 1; }
