"""A model's body over batches: hidden states at the places that a head reads, over trees where a model can carry them.

LogProbs (logprobs.py) and Heads (reward_head.py) are built on it. Whether trees are right for a model is tested, not
assumed: a probe must give over trees what it gives over padded rows, else the model takes padded rows and a line of
the log says why.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import contextmanager

import torch

from cream.errors import out_of_memory
from cream.model import batches, products, trees
from cream.model.batches import Batch, Group, predicting
from cream.model.hardware import Budget, keep_freed_memory, numel
from cream.model.precision import product_dtype
from cream.text.chat import Tokens

log = logging.getLogger("cream")


class Backbone(torch.nn.Module):
    """A transformers model whose head reads some places of a batch. A subclass has

        forward(batch)         what its head computes at the batch's places
        per_response(batch)    what a pass keeps of each of its R responses
        head_parameters()      the head's own; over trees they are read without the head being called as a module

    `model` may be a PEFT model. `share`: over trees, if a probe allows it; False: padded rows.
    """

    def __init__(self, model, share: bool = True):
        super().__init__()
        self.model = model
        self.share = self.in_place = False
        self.rounds_rows = self.device.type == "cpu" and products.install(getattr(self.plain, "base_model", self.plain))
        if not hasattr(next(model.parameters()), "ds_id"):
            self.choose_layout(share)

    def choose_layout(self, share: bool = True) -> None:
        """Switch to trees if they give a probe the numbers that padded rows give. ZeRO-3, whose weights are there
        during a forward pass alone, asks for it when it has prepared them."""
        self.share = share and _can_share(self)

    def places(self, row: Tokens) -> list[int]:
        """Indices of the row's tokens whose hidden states the head reads."""
        return predicting(row)

    def probed(self, batch: Batch) -> torch.Tensor:
        """What both layouts must agree on at the places of a batch, (K,) or (K, D)."""
        return self(batch)

    @property
    def plain(self):
        """The transformers model, of a PEFT model the one that its adapters are in."""
        return getattr(self.model, "get_base_model", lambda: self.model)()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def accumulate_in_place(self) -> None:
        """Gradients of the vocabulary's size are added up where they belong, at once: for one process that has the
        weights to itself, with nothing (DDP, ZeRO, hooks) that takes gradients on their way. Two tensors less of that
        size. Needs `.grad` kept from step to step, zero_grad(set_to_none=False), and after each
        `products.forget_casts`."""
        embeddings = self.model.get_input_embeddings()
        compiled = self.model.base_model._compiled_call_impl is not None  # torch.compile has no sparse gradients
        if self.share and type(embeddings) is torch.nn.Embedding and embeddings.weight.requires_grad and not compiled:
            embeddings.sparse = True  # its gradient is the batch's rows; added to a dense .grad it stays dense
            embeddings.weight.grad = torch.zeros_like(embeddings.weight)
        self.in_place = True
        products.keep_casts(self.model)
        for layer in self.model.modules():
            if isinstance(layer, products.Linear):
                layer.in_place = True

    def flops(self) -> tuple[int, int]:
        """Floating-point operations of a forward pass: (a token in the layers, a place that the head reads).

        Two per weight of a matrix product (arXiv 2204.02311, appendix B); attention itself is not counted.
        """
        head = {id(p): numel(p) for p in self.head_parameters()}
        apart = head | {id(p): numel(p) for p in (self.model.get_input_embeddings().weight,)}
        return 2 * (sum(map(numel, self.model.parameters())) - sum(apart.values())), 2 * sum(head.values())

    def shape(self, group: Group) -> tuple[int, int]:
        """(rows, width) of a group in a batch, for `batches.by_tokens`."""
        return trees.tree_shape(group) if self.share else batches.padded_shape(group)

    def split(self, group: Group, max_tokens: int) -> list[list[int]]:
        """Indices of a group's responses in runs of which each fits a batch, as far as a single one does."""
        return trees.split(group, max_tokens) if self.share else [[i] for i in range(len(group))]

    def pack(self, groups: Sequence[Group]) -> Batch:
        """The groups as one batch, in the layout that this model takes, with the places that its head reads."""
        return self._pack(groups, self.places)

    def _pack(self, groups: Sequence[Group], places: batches.Places) -> Batch:
        if not self.share:
            return batches.pad(groups, places=places)
        first = next(self.model.parameters())
        dtype = product_dtype(first.dtype, first.device.type)
        return trees.pack(groups, trees.multiple_of(first.device.type, dtype, self.rounds_rows), places)

    def hidden(self, batch: Batch) -> torch.Tensor:
        """The body's last hidden states at the batch's places, (K, D)."""
        if self.share:
            layout = {
                "position_ids": batch.position_ids,
                "attention_mask": batch.position_ids.new_ones((1, 1, 1, 1), dtype=torch.bool),  # taken as ready made
                "tree_layout": batch.layout,
            }
        else:
            layout = {"attention_mask": batch.attention_mask}
        states = self.plain.base_model(input_ids=batch.input_ids, use_cache=False, **layout).last_hidden_state
        return states.flatten(0, 1)[batch.source]


@torch.no_grad()
def run(
    model: Backbone, groups: Sequence[Group], budget: Budget, progress: Callable[[int], object] = lambda responses: None
) -> list[list[torch.Tensor]]:
    """`model.per_response` of each response of each group, in the groups' order. A batch holds at most `budget`
    tokens, or one group that has more; out of memory, what is left is done with half of them."""
    if model.device.type == "cpu":
        keep_freed_memory()
    results: list[list] = [[None] * len(group) for group in groups]
    todo = [(g, list(range(len(group)))) for g, group in enumerate(groups)]
    while todo:
        pieces = [
            (g, [members[i] for i in part])
            for g, members in todo
            for part in model.split([groups[g][i] for i in members], budget.whole)
        ]
        rows = [[groups[g][i] for i in members] for g, members in pieces]
        plan = batches.by_tokens([model.shape(row) for row in rows], budget.tokens)
        todo = []
        for number, indices in enumerate(plan):
            try:
                batch = model.pack([rows[i] for i in indices]).to(model.device)
                values = model.per_response(batch)
            except RuntimeError as error:
                budget.halve(error)
                todo = [pieces[i] for rest in plan[number:] for i in rest]
                break
            places = [(pieces[i][0], response) for i in indices for response in pieces[i][1]]
            for (g, response), value in zip(places, values, strict=True):
                results[g][response] = value
            progress(len(places))
    return results


# Which models trees can carry -----------------------------------------------------------------------------------------

# Rounding's share of a mean |difference| at a place, relative to how much the numbers vary over the probe: they vary
# little where a model knows little, and then a wrong mask changes little as well.
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}


def _can_share(model: Backbone) -> bool:
    """Switch the model's attention to trees, if they give a probe the numbers that padded rows give."""
    config = model.plain.config
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds or getattr(config, "attention_chunk_size", None):
        reason = f"layers of kind {', '.join(sorted(kinds)) or 'chunked attention'}"
    else:
        reason = _differs(model)
    if reason:
        log.info("responses do not share their prompt, each takes a padded row: %s", reason)
    return not reason


@torch.no_grad()
def probe(model: Backbone) -> torch.Tensor:
    """`model.probed` at each token of some responses of made-up tokens, the same for all models of a vocabulary."""
    with small_windows(model.plain, 6), exact_products():
        return model.probed(model._pack(probe_groups(model), predicting).to(model.device))


def probe_groups(model: Backbone) -> list[Group]:
    """Four responses to two prompts, of made-up tokens."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(model.plain.config.get_text_config().vocab_size, (60,), generator=generator).tolist()
    lengths = ((13, (1, 9, 17)), (5, (8,)))  # prompt, responses
    return [[Tokens(words[: p + n - 1] + [words[-n]], [(p, p + n)]) for n in sizes] for p, sizes in lengths]


def beyond_rounding(values: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype, unit: str = "") -> str | None:
    """How far two probes of a model in `dtype` are apart, in words, None where rounding explains it."""
    difference = (values - wanted).abs().mean().item()
    return None if difference <= ROUNDING[dtype] * wanted.std().item() else f"{difference:.2g}{unit}"


def _differs(model: Backbone) -> str | None:
    plain = model.plain
    before, training = plain.config._attn_implementation, model.model.training
    model.model.eval()
    try:
        model.share = False
        wanted = probe(model)
        trees.register()
        plain.set_attn_implementation(trees.ATTENTION)
        model.share = True
        apart = beyond_rounding(probe(model), wanted, next(plain.parameters()).dtype)
        if apart is None:
            return None
        reason = f"a probe differs by {apart} on average"
    except (ValueError, TypeError, RuntimeError, AttributeError, KeyError) as error:
        if out_of_memory(error):
            raise
        reason = f"{type(plain).__name__}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    finally:
        model.model.train(training)
    plain.set_attn_implementation(before)
    return reason


@contextmanager
def exact_products():
    """No TF32 on CUDA: what it rounds is no difference of the masks."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def small_windows(model, size: int):
    """Sliding windows of `size` tokens, so that a short probe meets them."""
    holders = [model.config.get_text_config(), *model.modules()]
    windows = [
        (holder, window) for holder in holders if isinstance(window := getattr(holder, "sliding_window", None), int)
    ]
    for holder, _ in windows:
        holder.sliding_window = size
    try:
        yield
    finally:
        for holder, window in windows:
            holder.sliding_window = window
