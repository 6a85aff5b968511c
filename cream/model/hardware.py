"""What fits on a device and how fast it is: tokens of a batch, free memory, the rate of matrix products."""

import ctypes
import logging
import resource
import sys
import time
from contextlib import suppress
from functools import cache

import torch

from cream.errors import UserError, out_of_memory
from cream.model.products import product

log = logging.getLogger("cream")

# Tokens of a batch when scoring, and when training: beyond, a larger one is no faster and only takes more memory.
MOST = {"cpu": (4096, 512), "cuda": (65536, 65536)}
NARROW = 512  # hidden size; of a smaller one as many more tokens stay in a CPU's cache while it trains
WHOLE = {"cpu": 16384, "cuda": 65536}  # tokens of one group when scoring: cut, its parts compute its prompt once each
LEAST = 512
SHARE = 0.6  # of the free memory


class Budget:
    """The tokens of a batch, `tokens`; a group that is one by itself may have `whole` (default: as many). Out of memory
    halves them, once; where they are `common` to several processes, which plan the same batches, or what batches gave
    cannot be taken back (ZeRO), it is an error."""

    def __init__(self, tokens: int, common: bool = False, whole: int | None = None):
        self.tokens, self.common, self.whole = tokens, common, whole or tokens
        self.first: int | None = None

    def halve(self, error: RuntimeError) -> None:
        """Take half from now on. Raises `error` itself if it is not out of memory, UserError if half does not help."""
        if not out_of_memory(error):
            raise error
        if self.common:
            raise UserError(
                f"out of memory with {self.tokens} tokens a batch; give a smaller --max_tokens_per_batch"
            ) from None
        if self.first is not None:
            raise UserError(
                f"out of memory with {self.first} tokens a batch, and with {self.tokens} as well; give a smaller "
                "--max_tokens_per_batch, or shorter responses (--max_length)"
            ) from None
        self.first, self.tokens = self.tokens, max(1, self.tokens // 2)
        self.whole = self.tokens
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        log.warning("out of memory with %d tokens a batch: continuing with %d", self.first, self.tokens)


def budget(
    given: int | None, model, device: torch.device, *, training: bool, shards: int = 1, moments: int = 8
) -> Budget:
    """`given` tokens a batch, or as many as fit in the device's free memory, estimated from the model's config.

    A token keeps, in each layer that a backward pass has yet to visit, about 16 vectors of the hidden size and 4 of the
    feed-forward's; scoring, and recomputing layers, hold one layer at a time. Gradients, and the optimiser's `moments`
    bytes a trained weight, lie in `shards`, of which the device has one.
    """
    if given is not None:
        return Budget(given)
    config = model.config.get_text_config()
    hidden, layers = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    layer = 16 * hidden + 4 * inner
    recompute = getattr(model, "is_gradient_checkpointing", False)
    numbers = layer + layers * ((hidden if recompute else layer) if training else 0)
    size = next(model.parameters()).element_size()
    free = free_memory(device)
    if training:  # gradients and moments come on top of the weights
        free -= (size + moments) * sum(numel(p) for p in model.parameters() if p.requires_grad) // shards
    tokens = int(SHARE * free / (numbers * size)) // 256 * 256
    tokens = max(LEAST, tokens)
    most = MOST[device.type][training]
    if training and device.type == "cpu" and hidden < NARROW:
        most = min(MOST["cpu"][False], most * NARROW // hidden)
    fitting = Budget(min(most, tokens), whole=min(WHOLE[device.type], tokens))
    log.info("at most %d tokens per batch (%.1f GB of memory free)", fitting.tokens, free / 1e9)
    return fitting


@cache
def keep_freed_memory() -> None:
    """From here on this process keeps what tensors on a CPU free for the next ones: the kernel gives a page that was
    returned to it back with zeros, which costs up to a twentieth of a forward pass. Only glibc can be told so."""
    trim_threshold, mmap_max = -1, -4  # mallopt's names for them: malloc.h
    with suppress(AttributeError):
        for parameter, value in ((trim_threshold, -1), (mmap_max, 0)):
            ctypes.CDLL(None).mallopt(parameter, value)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU, or on this machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


def peak_memory(device: torch.device) -> int:
    """Bytes used at most so far: allocated on a GPU, resident of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def numel(parameter: torch.nn.Parameter) -> int:
    """Its numbers, those of all shards where it is in shards (ZeRO-3)."""
    return getattr(parameter, "ds_numel", parameter.numel())


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int = 4096) -> float:
    """Measured floating-point operations a second of a square matrix product: the denominator of an MFU.

    Of the largest one up to `size` that takes about a second at most: some CPUs have no bfloat16 worth the name. On a
    GPU, which reaches its rate with large ones only, `size` is 8192 at least.
    """
    size = max(size, 8192) if device.type == "cuda" else size
    width = min(size, 256)
    while True:
        a, b = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))
        seconds = []
        for _ in range(5):
            _wait(device)
            start = time.perf_counter()
            product(a, b)
            _wait(device)
            seconds.append(time.perf_counter() - start)
        if width == size or 8 * min(seconds) > 1:
            return 2 * width**3 / min(seconds)
        width = min(size, 2 * width)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
