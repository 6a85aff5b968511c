"""The dtype decision: that of the weights, that of matrix products, and why."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """`dtype` is that of the weights; under `autocast` matrix products run in bfloat16 on float32 weights. `exact`:
    products are those of the weights' dtype, so that the same tokens in another batch differ by float32 rounding."""

    dtype: torch.dtype
    autocast: bool
    reason: str
    exact: bool = True

    @property
    def name(self) -> str:
        """What decides a log-probability beside the weights."""
        plain = str(self.dtype).removeprefix("torch.")
        return f"{plain}, bfloat16 autocast" if self.autocast else plain if self.exact else f"{plain} as TF32"


def product_dtype(dtype: torch.dtype, kind: str) -> torch.dtype:
    """What matrix products of tensors in `dtype` run in here, on this kind of device: autocast's dtype within one."""
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype


def choose_precision(bf16: bool | None, device: torch.device, *, training: bool, shards: bool = False) -> Precision:
    """The dtype decision and its reason. `bf16` None means: where the device has it.

    Weights train as float32 masters whatever `bf16` says: at lr 1e-6 pure bfloat16 rounds 98 % of the updates away.
    With `shards` (ZeRO) the masters are the optimiser's, and the weights themselves bfloat16.
    """
    if bf16 is None:
        # a cluster's GPUs, which this machine may lack, are taken to have it
        able = device.type == "cuda" and (not torch.cuda.is_available() or torch.cuda.is_bf16_supported())
        why = "the device supports it" if able else f"the default on {device.type}; --bf16 yes for bfloat16"
    else:
        able, why = bf16, f"--bf16 {'yes' if bf16 else 'no'}"
    if training and shards and able:
        reason = f"bfloat16 weights, their float32 masters in the optimiser's shards ({why})"
        return Precision(torch.bfloat16, False, reason)
    if training:
        plain = "TF32" if device.type == "cuda" else "float32"
        matmul = f"matrix products in {'bfloat16' if able else plain}"
        exact = not able and device.type == "cpu"
        return Precision(torch.float32, able, f"float32 master weights, {matmul} ({why})", exact)
    dtype = torch.bfloat16 if able else torch.float32
    name = str(dtype).removeprefix("torch.")
    return Precision(dtype, False, f"weights in {name} ({why}), log-softmax and reward heads in float32")
