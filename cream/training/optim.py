"""The optimisers that --optim names: AdamW (arXiv 1711.05101), its two moments in float32 or in bfloat16."""

import torch
from torch.optim.adamw import adamw

CHUNK = {"cpu": 1 << 20, "cuda": 1 << 25}  # weights updated at a time: their moments are in float32 meanwhile


def build_optimizer(model, optim: str, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """`optim` on what is trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if optim == "adamw_bf16":
        return AdamWBF16(trained, lr, weight_decay)
    return torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay, fused=True)


class AdamWBF16(torch.optim.Optimizer):
    """AdamW with its moments in bfloat16, 4 bytes a weight instead of 8. All arithmetic is float32, by PyTorch's own
    kernel; only what a moment is from one step to the next is rounded.

    The first moment goes to the nearest bfloat16. The second changes by a thousandth a step where bfloat16's own steps
    are up to 1/128: rounded to the nearest it could rise, but never fall. It is rounded up or down at random, which is
    right on average (arXiv 2010.06192). The random bits depend on the step alone: all processes, and a run that
    resumes, round alike.
    """

    def __init__(self, params, lr: float, weight_decay: float, betas: tuple = (0.9, 0.999), eps: float = 1e-8):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update the weights that have gradients."""
        noise, most = {}, max(p.numel() for group in self.param_groups for p in group["params"])
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(p, dtype=torch.bfloat16)
                    state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.bfloat16)
                state["step"] += 1
                drawn = p.device, state["step"]
                if drawn not in noise:
                    noise[drawn] = random_bits(*drawn, min(most, CHUNK[p.device.type]))
                _update(p, state, group, noise[drawn])

    def load_state_dict(self, state_dict: dict) -> None:
        """As saved. PyTorch would take the moments to the dtype of their weights, and so hold them twice."""
        saved = state_dict["state"]
        steps = {key: {"step": state["step"]} for key, state in saved.items()}
        super().load_state_dict(state_dict | {"state": steps})
        keys = (key for group in state_dict["param_groups"] for key in group["params"])
        trained = (p for group in self.param_groups for p in group["params"])
        for key, p in zip(keys, trained, strict=True):
            if key in saved:
                self.state[p] |= {name: saved[key][name].to(p.device) for name in ("exp_avg", "exp_avg_sq")}


def _update(p: torch.Tensor, state: dict, group: dict, noise: torch.Tensor) -> None:
    parts = (t.view(-1).split(len(noise)) for t in (p, p.grad, state["exp_avg"], state["exp_avg_sq"]))
    beta1, beta2 = group["betas"]
    for weight, grad, first, second in zip(*parts, strict=True):
        m, v = first.float(), second.float()
        done = torch.full((), state["step"] - 1.0, device=p.device)  # the kernel counts on
        how = {"lr": group["lr"], "weight_decay": group["weight_decay"], "eps": group["eps"]}
        how |= {"beta1": beta1, "beta2": beta2, "amsgrad": False, "maximize": False, "fused": True}
        adamw([weight], [grad], [m], [v], [], [done], **how)
        first.copy_(m)
        second.copy_(round_at_random(v, noise[: len(v)]))


def random_bits(device: torch.device, step: int, size: int) -> torch.Tensor:
    """(size,) int32 in [0, 2^16), for all chunks of a step: each number's rounding is to be fair over the steps, not
    independent of another number's."""
    generator = torch.Generator(device).manual_seed(step)
    return torch.randint(1 << 16, (size,), dtype=torch.int32, device=device, generator=generator)


def round_at_random(x: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """float32 numbers x >= 0, in place, to one of the two bfloat16 numbers around each, with probabilities that make
    x the mean: a bfloat16 is the upper half of a float32, and `bits` of its lower half's size carry over by chance."""
    x.view(torch.int32).add_(bits).bitwise_and_(-1 << 16)
    return x
