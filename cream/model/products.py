"""Matrix products and linear layers on a CPU, in the kernels that are fast there.

MKL, which PyTorch has for float32, uses AVX-512 on Intel's processors alone; oneDNN, which it has for bfloat16, uses it
on all: 2.2 times as fast on an AMD EPYC. A layer's gradient is added up where it belongs, at once.
"""

from functools import cache

import torch

from cream.model.precision import product_dtype

# Rows are rounded up to it where oneDNN does the products, so that sizes recur: it keeps some MB for each new one.
MULTIPLE = 32
LEAST = 256  # width of a weight; narrower ones take no time, and their products' rounding stays PyTorch's own


@cache
def onednn() -> bool:
    """Whether float32 products go to oneDNN here."""
    able = torch.cpu.get_capabilities()
    return able.get("avx512_f", False) and "AMD" in able["cpu_name"] and torch.backends.mkldnn.is_available()


def compiled(weight: torch.Tensor) -> bool:
    """Whether its float32 products on a CPU are oneDNN's, which compiles one for each new size."""
    return min(weight.shape) >= LEAST and onednn()


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b, of (M, K) and (K, N)."""
    if a.dtype == torch.float32 and a.device.type == "cpu" and compiled(b) and _dense(a) and _dense(b):
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return a @ b


def _dense(matrix: torch.Tensor) -> bool:
    """Whether it lies in memory by rows or by columns, without gaps: what lies otherwise oneDNN multiplies slowly."""
    return matrix.is_contiguous() or matrix.t().is_contiguous()


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b"""
    if a.dtype == total.dtype and not (a.device.type == "cpu" and compiled(b)):
        total.addmm_(a, b)
    else:
        total.add_(product(a, b))


def cast(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A weight in the dtype of products; of one that `keep_casts` names, cast once for all micro-batches of a step."""
    known = getattr(weight, "cast", None)
    if weight.dtype == dtype or known is None:
        return weight.detach().to(dtype)
    if known.get("of") != (weight._version, dtype):
        known |= {"of": (weight._version, dtype), "weight": weight.detach().to(dtype)}
    return known["weight"]


def keep_casts(model: torch.nn.Module) -> None:
    """From here on casts of the model's weights are kept until `forget_casts`, which each step of the optimiser must
    call: a fused one changes weights without a change of their version."""
    for parameter in model.parameters():
        parameter.cast = {}


def forget_casts(model: torch.nn.Module) -> None:
    """Of the weights that are trained; those of others have not changed."""
    for parameter in model.parameters():
        if parameter.requires_grad and (known := getattr(parameter, "cast", None)):
            known.clear()


class Linear(torch.nn.Linear):
    """A linear layer without bias on a CPU. `in_place`: the weight's gradient is added to `weight.grad` in the backward
    pass and not returned, which saves a tensor of its size, written and read again."""

    in_place = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., K) -> (..., N)"""
        dtype, rows = product_dtype(x.dtype, "cpu"), x.shape[:-1].numel()
        odd = dtype == torch.float32 and rows % MULTIPLE and compiled(self.weight)  # of padded rows, while sampling
        if torch.compiler.is_compiling() or x.ndim < 2 or not rows or odd:
            return super().forward(x)
        found = LinearProduct.apply(x.flatten(0, -2).to(dtype), self.weight, self.in_place)
        return found.view(*x.shape[:-1], len(self.weight))


class LinearProduct(torch.autograd.Function):
    """x (M, K), weight (N, K) -> x weight^T (M, N)."""

    @staticmethod
    def forward(ctx, x, weight, in_place: bool) -> torch.Tensor:
        """In the dtype of x."""
        ctx.in_place, ctx.cast = in_place, cast(weight, x.dtype)
        ctx.weight = weight  # itself: checkpointing hands back another of saved tensors, whose .grad nobody sees
        ctx.save_for_backward(x)
        return product(x, ctx.cast.t())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor):
        """Of x and weight, in their dtypes."""
        (x,), weight = ctx.saved_tensors, ctx.weight
        d_x = product(grad, ctx.cast) if ctx.needs_input_grad[0] else None
        d_weight = None
        if ctx.needs_input_grad[1] and ctx.in_place:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            add_product(weight.grad, grad.t(), x)
        elif ctx.needs_input_grad[1]:
            d_weight = product(grad.t(), x).to(weight.dtype)
        return d_x, d_weight, None


def install(model: torch.nn.Module) -> bool:
    """Make the wide linear layers without bias of a model on a CPU Linear ones. Returns whether their float32 products
    are compiled."""
    found = [layer for layer in model.modules() if type(layer) is torch.nn.Linear and layer.bias is None]
    found = [layer for layer in found if layer.weight.ndim == 2 and min(layer.weight.shape) >= LEAST]
    for layer in found:
        layer.__class__ = Linear
    return any(compiled(layer.weight) for layer in found)
