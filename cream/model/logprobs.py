"""Answer log-likelihoods: log π(y|x) = Σ_i log softmax(logits_{i-1})[y_i] over the answer's tokens, in float32.

The one place where log-probabilities are computed: rewarding and training both call it.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import contextmanager

import torch

from cream.errors import out_of_memory
from cream.model import batches, trees
from cream.model.batches import Batch, Group
from cream.model.hardware import Budget
from cream.model.head import picked, token_log_probs
from cream.text.chat import Tokens

log = logging.getLogger("cream")


class LogProbs(torch.nn.Module):
    """A causal language model that gives log-probabilities of a batch's scored tokens instead of logits.

    Over trees the head runs only where a scored token is predicted, its logits never all in memory. A model that
    trees cannot carry (a layer without attention, a kind of mask or head they do not know) is found out by a probe when
    this is made: it takes padded rows, through its own forward, and a line of the log says so. `share=False` asks for
    that.
    """

    def __init__(self, policy, share: bool = True):
        super().__init__()
        self.policy = policy
        self.share = self.in_place = False
        if share and not hasattr(next(policy.parameters()), "ds_id"):
            self.choose_layout()

    def choose_layout(self) -> None:
        """Switch to trees if they give a probe the numbers that padded rows give. ZeRO-3, whose weights are there
        during a forward pass alone, asks for it when it has prepared them."""
        self.share = _share(self)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.policy.parameters()).device

    def accumulate_in_place(self) -> None:
        """Gradients of the vocabulary's size are added up where they belong, at once: for one process that has the
        weights to itself, with nothing (DDP, ZeRO, hooks) that takes gradients on their way. Two tensors less of that
        size. Needs `.grad` kept from step to step: zero_grad(set_to_none=False)."""
        embeddings = self.policy.get_input_embeddings()
        compiled = self.policy.base_model._compiled_call_impl is not None  # torch.compile has no sparse gradients
        if self.share and type(embeddings) is torch.nn.Embedding and embeddings.weight.requires_grad and not compiled:
            embeddings.sparse = True  # its gradient is the batch's rows; added to a dense .grad it stays dense
            embeddings.weight.grad = torch.zeros_like(embeddings.weight)
        self.in_place = True

    def shape(self, group: Group) -> tuple[int, int]:
        """(rows, width) of a group in a batch, for `batches.by_tokens`."""
        return trees.tree_shape(group) if self.share else batches.padded_shape(group)

    def pack(self, groups: Sequence[Group]) -> Batch:
        """The groups as one batch, in the layout that this model takes."""
        if not self.share:
            return batches.pad(groups)
        return trees.pack(groups, trees.MULTIPLE[self.device.type])

    def forward(self, batch: Batch) -> torch.Tensor:
        """log π of the batch's scored tokens, (K,) float32."""
        return _tree(self.policy, batch, self.in_place) if self.share else _padded(self.policy, batch)


def _padded(policy, batch: Batch) -> torch.Tensor:
    """The plain way: the library's own masks and head, its logits at every column that predicts in some row."""
    width = batch.input_ids.shape[1]
    columns = batch.source % width
    kept, place = columns.unique(return_inverse=True)
    output = policy(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, logits_to_keep=kept, use_cache=False
    )
    return picked(output.logits[batch.source // width, place], batch.target)


def _tree(policy, batch: Batch, in_place: bool = False) -> torch.Tensor:
    model = getattr(policy, "get_base_model", lambda: policy)()  # of a PEFT model the one its adapters stand in
    hidden = model.base_model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=batch.position_ids.new_ones((1, 1, 1, 1), dtype=torch.bool),  # taken for a mask ready made
        use_cache=False,
        tree_layout=batch.layout,
    ).last_hidden_state
    return token_log_probs(model.get_output_embeddings(), model.config, hidden[0, batch.source], batch.target, in_place)


@torch.no_grad()
def score(
    model: LogProbs, groups: Sequence[Group], budget: Budget, progress: Callable[[int], object] = lambda answers: None
) -> list[list[float]]:
    """log π of each answer of each group, in the groups' order. A batch holds at most `budget` tokens."""
    sums: list[torch.Tensor] = []
    owners: list[tuple[int, int]] = []
    todo = [(g, list(range(len(group)))) for g, group in enumerate(groups)]
    while todo:
        pieces = [(g, [run[i] for i in part]) for g, run in todo for part in _split(model, groups[g], run, budget)]
        rows = [[groups[g][i] for i in run] for g, run in pieces]
        plan = batches.by_tokens([model.shape(row) for row in rows], budget.tokens)
        todo = []
        for number, indices in enumerate(plan):
            try:
                batch = model.pack([rows[i] for i in indices]).to(model.device)
                sums.append(batch.answer_sums(model(batch)))
            except RuntimeError as error:
                budget.halve(error)
                todo = [pieces[i] for rest in plan[number:] for i in rest]
                break
            done = [(pieces[i][0], answer) for i in indices for answer in pieces[i][1]]
            owners += done
            progress(len(done))
    found = [[float("nan")] * len(group) for group in groups]
    for (g, answer), value in zip(owners, torch.cat(sums).tolist() if sums else [], strict=True):
        found[g][answer] = value
    return found


def _split(model: LogProbs, group: Group, run: list[int], budget: Budget) -> list[list[int]]:
    rows = [group[i] for i in run]
    return trees.split(rows, budget.tokens) if model.share else [[i] for i in range(len(rows))]


# Which models trees can carry -----------------------------------------------------------------------------------------

# What rounding explains of a mean |difference| in log π a token: a share of how much log π varies over the probe, which
# is little where a model knows little, and then a wrong mask changes little as well.
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}


def _share(model: LogProbs) -> bool:
    """Switch the policy's attention to trees, if they give a probe the numbers that padded rows give."""
    config = getattr(model.policy, "get_base_model", lambda: model.policy)().config
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds or getattr(config, "attention_chunk_size", None):
        reason = f"layers of kind {', '.join(sorted(kinds)) or 'chunked attention'}"
    else:
        reason = _differs(model)
    if reason:
        log.info("answers do not share their prompt, each takes a padded row: %s", reason)
    return not reason


@torch.no_grad()
def probe(model: LogProbs) -> torch.Tensor:
    """log π of some answers of made-up tokens, (K,) float32, the same for all models of a vocabulary."""
    policy = getattr(model.policy, "get_base_model", lambda: model.policy)()
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(policy.config.get_text_config().vocab_size, (60,), generator=generator).tolist()
    lengths = ((13, (1, 9, 17)), (5, (8,)))  # prompt, answers
    groups = [[Tokens(words[: p + a - 1] + [words[-a]], [(p, p + a)]) for a in answers] for p, answers in lengths]
    with _small_windows(policy, 6), _exact_products():
        return model(model.pack(groups).to(model.device))


def beyond_rounding(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> str | None:
    """How far two probes of a model in `dtype` are apart, in words, None where rounding explains it."""
    difference = (found - wanted).abs().mean().item()
    return None if difference <= ROUNDING[dtype] * wanted.std().item() else f"{difference:.2g} nats a token"


def _differs(model: LogProbs) -> str | None:
    policy = getattr(model.policy, "get_base_model", lambda: model.policy)()
    before, training = policy.config._attn_implementation, model.policy.training
    model.policy.eval()
    try:
        model.share = False
        plain = probe(model)
        trees.register()
        policy.set_attn_implementation(trees.ATTENTION)
        model.share = True
        apart = beyond_rounding(probe(model), plain, next(policy.parameters()).dtype)
        if apart is None:
            return None
        reason = f"a probe differs by {apart}"
    except (ValueError, TypeError, RuntimeError, AttributeError, KeyError) as error:
        if out_of_memory(error):
            raise
        reason = f"{type(policy).__name__}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    finally:
        model.policy.train(training)
    policy.set_attn_implementation(before)
    return reason


@contextmanager
def _exact_products():
    """No TF32 on CUDA: what it rounds is no difference of the masks."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _small_windows(model, size: int):
    """Sliding windows of `size` tokens, so that a short probe meets them."""
    holders = [model.config.get_text_config(), *model.modules()]
    found = [
        (holder, window) for holder in holders if isinstance(window := getattr(holder, "sliding_window", None), int)
    ]
    for holder, _ in found:
        holder.sliding_window = size
    try:
        yield
    finally:
        for holder, window in found:
            holder.sliding_window = window
