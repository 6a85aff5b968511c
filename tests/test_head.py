"""log softmax of a head by blocks of its words, against the library's cross-entropy over whole logits."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaForCausalLM, PreTrainedConfig

from cream.model import head
from cream.model.batches import pad
from cream.model.head import HeadLogProb, target_log_probs, token_log_probs
from cream.model.logprobs import LogProbs
from cream.text.chat import Tokens

WORDS, WIDTH, TOKENS = 300, 16, 40


class Adapted(torch.nn.Linear):
    """A head that must be called: its weight alone does not say what it computes."""

    def forward(self, x):
        return super().forward(x) + x.sum(-1, keepdim=True) * self.weight[:, 0]


@pytest.fixture
def small_blocks(monkeypatch):
    """Of 7 words; logits are made anew in the backward pass. Heads that are called take 9 tokens at a time."""
    monkeypatch.setattr(head, "LEAST_WORDS", 7)
    monkeypatch.setitem(head.BLOCK, "cpu", 1)
    monkeypatch.setitem(head.KEEP, "cpu", 0)
    monkeypatch.setattr(head, "ROWS", 9)


def case(kind=torch.nn.Linear, bias=False):
    torch.manual_seed(0)
    layer = kind(WIDTH, WORDS, bias=bias)
    torch.nn.init.normal_(layer.weight)
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    return layer, hidden, torch.randint(WORDS, (TOKENS,)), torch.randn(TOKENS)


def plain(layer, config, hidden, target):
    """The oracle: whole logits."""
    cap = getattr(config, "final_logit_softcapping", None)
    logits = layer(hidden) * getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
    return -F.cross_entropy(logits if cap is None else cap * torch.tanh(logits / cap), target, reduction="none")


def gradients(values, weight, layer, hidden):
    return torch.autograd.grad((values * weight).sum(), [hidden, *layer.parameters()])


@pytest.mark.parametrize(
    "settings",
    [{}, {"logit_scale": 0.5}, {"final_logit_softcapping": 5.0, "logit_scale": 2.0}, {"logits_scaling": 1.5}],
)
@pytest.mark.parametrize("kind, bias", [(torch.nn.Linear, False), (torch.nn.Linear, True), (Adapted, True)])
@pytest.mark.parametrize("blocks", ["one block", "small_blocks"])
def test_value_and_gradient_equal_those_of_cross_entropy(request, kind, bias, settings, blocks):
    if blocks == "small_blocks":
        request.getfixturevalue(blocks)
    layer, hidden, target, weight = case(kind, bias)
    config = PreTrainedConfig(**settings)
    found, wanted = (way(layer, config, hidden, target) for way in (token_log_probs, plain))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-6)
    pairs = zip(gradients(found, weight, layer, hidden), gradients(wanted, weight, layer, hidden), strict=True)
    for ours, theirs in pairs:
        assert theirs.abs().max() > 0.1
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@given(st.integers(0, 9), st.integers(1, 30), st.integers(1, 12), st.integers(0, 2**32))
def test_any_number_of_tokens_words_and_words_a_block(tokens, words, block, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "LEAST_WORDS", block)
        patch.setitem(head.BLOCK, "cpu", 1)
        generator = torch.Generator().manual_seed(seed)
        hidden, weight = (torch.randn(n, 4, generator=generator) for n in (tokens, words))
        target = torch.randint(words, (tokens,), generator=generator)
        found = HeadLogProb.apply(hidden, weight, None, target, 1.0, None, False, False)
        torch.testing.assert_close(found, target_log_probs(hidden @ weight.T, target), atol=1e-5, rtol=1e-5)


def test_words_that_cannot_be(small_blocks):
    """A bias of -inf, here for some whole blocks, as models with reserved words have it."""
    layer, hidden, target, weight = case(bias=True)
    impossible = torch.ones(WORDS, dtype=torch.bool)
    impossible[target] = False
    impossible[:7] = impossible[-7:] = True
    target = torch.where(impossible[target], target[(~impossible[target]).nonzero()[0]], target)
    with torch.no_grad():
        layer.bias[impossible] = float("-inf")
    found, wanted = (way(layer, PreTrainedConfig(), hidden, target) for way in (token_log_probs, plain))
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-6)
    assert token_log_probs(layer, PreTrainedConfig(), hidden, torch.zeros_like(target)).isneginf().all()
    pairs = zip(gradients(found, weight, layer, hidden), gradients(wanted, weight, layer, hidden), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("blocks", ["one block", "small_blocks"])
def test_under_autocast_values_are_those_of_bfloat16_logits(request, blocks):
    """Their sum over the words is float32 all the same; gradients are the weights' float32."""
    if blocks == "small_blocks":
        request.getfixturevalue(blocks)
    layer, hidden, target, weight = case()
    with torch.autocast("cpu", torch.bfloat16):
        found = token_log_probs(layer, PreTrainedConfig(), hidden, target)
        wanted = target_log_probs(layer(hidden), target)
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-6)
    pairs = zip(gradients(found, weight, layer, hidden), gradients(wanted, weight, layer, hidden), strict=True)
    for ours, theirs in pairs:
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.01 * theirs.norm()


def test_a_second_backward_pass_gives_the_same():
    layer, hidden, target, weight = case()
    total = (token_log_probs(layer, PreTrainedConfig(), hidden, target) * weight).sum()
    first, second = (torch.autograd.grad(total, layer.weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


class Largest(TorchDispatchMode):
    """The most numbers in one tensor that has the words in one of its dimensions, and not the width."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.ndim == 2 and TOKENS in tensor.shape:
                self.most = max(self.most, tensor.numel() if WIDTH not in tensor.shape else 0)
        return result


def test_logits_are_never_all_in_memory(small_blocks):
    layer, hidden, target, weight = case()
    with Largest() as whole:
        (plain(layer, PreTrainedConfig(), hidden, target) * weight).sum().backward()
    with Largest() as found:
        (token_log_probs(layer, PreTrainedConfig(), hidden, target) * weight).sum().backward()
    assert whole.most == TOKENS * WORDS and found.most == TOKENS * 7


def test_few_logits_wait_for_the_backward_pass_and_many_do_not(monkeypatch):
    layer, hidden, target, _ = case()

    def waiting():
        (node, _), *_ = token_log_probs(layer, PreTrainedConfig(), hidden, target).grad_fn.next_functions
        return node.kept and sum(softmax.numel() for _, softmax in node.kept)

    monkeypatch.setitem(head.KEEP, "cpu", TOKENS * WORDS)
    assert waiting() == TOKENS * WORDS
    monkeypatch.setitem(head.KEEP, "cpu", TOKENS * WORDS - 1)
    assert waiting() is None


def test_no_logits_wait_where_no_gradient_is_wanted(monkeypatch):
    layer, hidden, target, _ = case()
    asked = []
    monkeypatch.setattr(HeadLogProb, "apply", lambda *inputs: asked.append(inputs) or torch.zeros(TOKENS))
    with torch.no_grad():
        token_log_probs(layer, PreTrainedConfig(), hidden, target)
    assert not asked[0][6]


def test_sizes_recur_in_bfloat16_alone(monkeypatch):
    """oneDNN compiles a product for each new size of bfloat16; padding costs float32 time for nothing."""
    layer, hidden, target, _ = case()
    sizes = []
    monkeypatch.setattr(HeadLogProb, "apply", lambda h, *others: sizes.append(len(h)) or torch.zeros(len(h)))
    for bf16 in (False, True):
        with torch.autocast("cpu", enabled=bf16):
            assert len(token_log_probs(layer, PreTrainedConfig(), hidden, target)) == TOKENS
    assert sizes == [TOKENS, TOKENS + -TOKENS % head.MULTIPLE]


def test_a_gradient_in_place_is_added_and_not_returned():
    layer, hidden, target, weight = case()
    (wanted,) = torch.autograd.grad((plain(layer, PreTrainedConfig(), hidden, target) * weight).sum(), layer.weight)
    layer.weight.grad = torch.ones_like(layer.weight)
    found = token_log_probs(layer, PreTrainedConfig(), hidden, target, in_place=True)
    assert torch.autograd.grad((found * weight).sum(), layer.weight, allow_unused=True) == (None,)
    torch.testing.assert_close(layer.weight.grad, wanted + 1, atol=1e-5, rtol=1e-4)


@pytest.fixture
def tiny_policy(tiny_folder):
    return LlamaForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_in_place_are_the_same(tiny_policy, tied):
    """Added up over two batches; the embeddings' are sparse on the way, and dense where they arrive."""
    both = [LogProbs(copy.deepcopy(tiny_policy)) for _ in range(2)]
    batches = [both[0].pack([[Tokens([1, 7, 8, 9, 7, 2], [(3, 6)]), Tokens([1, 7, 8, 11, 2], [(3, 5)])]])] * 2
    for model, in_place in zip(both, (False, True), strict=True):
        if not tied:
            weight = model.model.lm_head.weight
            model.model.lm_head.weight = torch.nn.Parameter(weight.detach().clone())
        if in_place:
            model.accumulate_in_place()
        for _ in range(2):  # as after a step
            for batch in batches:
                model(batch).sum().backward()
        assert all(p.grad.layout == torch.strided for p in model.parameters())
    for (name, ours), theirs in zip(both[1].named_parameters(), both[0].parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-5, msg=name)


def test_padded_rows_accumulate_in_place_as_well(tiny_policy):
    model = LogProbs(copy.deepcopy(tiny_policy), share=False)
    model.accumulate_in_place()
    model(pad([[Tokens([1, 7, 8, 2], [(2, 4)])]])).sum().backward()
    assert all(p.grad.layout == torch.strided for p in model.parameters())
