"""Batches and log-probabilities against one float64 forward pass per sequence: padding and company change nothing."""

import copy
import logging
import platform
import resource
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from cream.errors import UserError
from cream.model import trees
from cream.model.batches import by_tokens, pad
from cream.model.hardware import Budget
from cream.model.logprobs import LogProbs, score
from cream.text.chat import Tokens
from cream.training.parallel import Replicas

VOCAB = 300
GROUPS = [
    [Tokens([1, 7, 8, 9, 2], [(3, 5)]), Tokens([1, 7, 8, 11, 12, 2], [(3, 6)])],
    [Tokens([1, 7, 2], [(2, 3)])],
    [Tokens([1, *range(20, 40), 2, 50, 51, 52, 2], [(10, 22), (24, 26)])],  # two turns
    [Tokens([1, 60, 61, 62], [(1, 4)]), Tokens([1, 60], [(1, 2)]), Tokens([1, 63, 2], [(1, 3)])],
]
ROWS = [row for group in GROUPS for row in group]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def policy(request, tiny_folder):
    """Rotary positions, and learned ones, which left padding without position ids would get wrong by many nats."""
    if request.param == "llama":
        return LlamaForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=64, n_layer=2, n_head=2, initializer_range=0.1)
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(params=[True, False], ids=["trees", "padded rows"])
def model(request, policy):
    """The policy in both layouts."""
    model = LogProbs(copy.deepcopy(policy), share=request.param)
    assert model.share is request.param
    return model


def oracle(policy, row) -> dict[int, float]:
    """Position -> log-probability of each answer token: the row alone, full logits, log-softmax in float64."""
    with torch.no_grad():
        logprobs = policy(torch.tensor([row.ids])).logits[0].double().log_softmax(-1)
    return {i: logprobs[i - 1, row.ids[i]].item() for start, end in row.spans for i in range(start, end)}


# Batches ------------------------------------------------------------------------------------------------------------


def test_pad_marks_tokens_by_position():
    batch = pad([[Tokens([1, 7, 8, 2], [(2, 4)]), Tokens([1, 9, 2], [(2, 3)])]], pad_id=2)
    assert batch.input_ids.tolist() == [[1, 7, 8, 2], [1, 9, 2, 2]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3]] * 2
    assert batch.source.tolist() == [1, 2, 5] and batch.target.tolist() == [8, 2, 2]  # the end of turn, not the pad
    assert batch.owner.tolist() == [0, 0, 1] and (batch.responses, batch.tokens) == (2, 7)


@given(st.lists(st.tuples(st.integers(1, 8), st.integers(0, 50)), max_size=40), st.integers(1, 200))
def test_batches_hold_every_group_once_within_the_budget(shapes, max_tokens):
    batches = by_tokens(shapes, max_tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(shapes)))
    widest = [max(shapes[i][1] for i in batch) for batch in batches]
    assert widest == sorted(widest, reverse=True)
    for batch, width in zip(batches, widest, strict=True):
        assert len(batch) == 1 or sum(shapes[i][0] for i in batch) * width <= max_tokens or width == 0


@given(st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=4), min_size=1, max_size=8), st.integers(1, 60))
def test_the_size_of_a_batch_is_what_was_planned(lengths, max_tokens):
    """Of both layouts, in tokens computed: padding counts where there is any."""
    groups = [[Tokens([3, *[i] * n], [(1, n + 1)]) for i, n in enumerate(group)] for group in lengths]
    for shape, pack in (
        (lambda group: (len(group), max(map(len, group))), pad),
        (trees.tree_shape, trees.pack),
    ):
        for batch in by_tokens([shape(group) for group in groups], max_tokens):
            size = pack([groups[i] for i in batch]).input_ids.numel()
            assert size <= max_tokens or len(batch) == 1


# Log-probabilities --------------------------------------------------------------------------------------------------


def test_they_equal_one_sequence_at_a_time(policy, model):
    with torch.no_grad():
        found = model(model.pack(GROUPS))
    assert found.dtype == torch.float32
    expected = [value for row in ROWS for value in oracle(policy, row).values()]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("max_tokens", [1, 30, 10_000])
def test_scores_do_not_depend_on_the_company(policy, model, max_tokens):
    done = []
    scores = score(model, GROUPS, Budget(max_tokens), done.append)
    assert [len(group) for group in scores] == [len(group) for group in GROUPS]
    expected = [sum(oracle(policy, row).values()) for row in ROWS]
    assert [value for group in scores for value in group] == pytest.approx(expected, abs=1e-4)
    assert sum(done) == len(ROWS)


def test_the_pad_id_and_what_is_after_an_answer_change_nothing(policy):
    model = LogProbs(policy, share=False)
    with torch.no_grad():
        assert torch.equal(model(pad(GROUPS, 0)), model(pad(GROUPS, 2)))


def test_no_groups_and_a_row_without_an_answer(model):
    assert score(model, [], Budget(100)) == []
    assert score(model, [[Tokens([1, 2, 3], [])], [Tokens([1], [(0, 1)])]], Budget(100)) == [[0.0], [0.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_responses_are_summed_in_float32_and_in_nothing_else(dtype):
    """A thousand ones that index_add sums in bfloat16 are 256."""
    batch = pad([[Tokens(list(range(1002)), [(1, 1001)])]])
    ones = torch.ones(1000)
    assert batch.response_sums(ones).tolist() == [1000.0]
    with pytest.raises(AssertionError, match=str(dtype)):
        batch.response_sums(ones.to(dtype))


def test_weights_that_differ_by_less_than_a_bfloat16_sum_tells_are_found_different():
    """As ZeRO has them under bfloat16; one of a thousand weights is another, in its last bit."""
    weights = torch.nn.Linear(1000, 1, bias=False, dtype=torch.bfloat16)
    gathered = []
    accelerator = SimpleNamespace(num_processes=2, gather=lambda t: gathered.append(t) or t)
    process = SimpleNamespace(model=weights, accelerator=accelerator)
    for last in (1.0, 1.0078125):
        weights.weight.data.fill_(1.0)[0, -1] = last
        Replicas.check_equal(process)
    assert weights.weight.sum() == 1000 and gathered[0] != gathered[1]


def test_the_softmax_is_in_float32_whatever_the_weights(policy):
    half = copy.deepcopy(policy).bfloat16()
    with torch.no_grad():
        found = LogProbs(half, share=False)(pad([GROUPS[0][:1]]))
        logits = half(input_ids=torch.tensor([ROWS[0].ids])).logits
    assert logits.dtype == torch.bfloat16 and found.dtype == torch.float32
    exact = logits[0, [2, 3]].double().log_softmax(-1)[[0, 1], ROWS[0].ids[3:]]
    torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=0)


# Out of memory ------------------------------------------------------------------------------------------------------


def no_memory_at(monkeypatch, *calls):
    """A device that runs out of memory in the forward passes of these numbers, from 1; returns the batches' sizes."""
    forward, tried = LogProbs.forward, []

    def limited(self, batch):
        tried.append(batch.tokens)
        if len(tried) in calls:
            torch.empty(1 << 48)  # a petabyte
        return forward(self, batch)

    monkeypatch.setattr(LogProbs, "forward", limited)
    return tried


@pytest.fixture
def said(caplog, monkeypatch):
    """What the toolkit's log says."""
    monkeypatch.setattr(logging.getLogger("cream"), "propagate", True)
    caplog.set_level(logging.INFO, "cream")
    return caplog


@pytest.mark.parametrize("call", [1, 3])
def test_out_of_memory_halves_the_batch_once(model, monkeypatch, said, call):
    """What was scored before stays, each answer is counted once, and the next call starts with the half."""
    groups, done = GROUPS * 6, []
    expected = score(model, groups, Budget(10_000))
    budget = Budget(80)
    tried = no_memory_at(monkeypatch, call)
    found = score(model, groups, budget, done.append)
    torch.testing.assert_close(torch.tensor(sum(found, [])), torch.tensor(sum(expected, [])), atol=1e-4, rtol=0)
    assert sum(done) == 6 * len(ROWS) and budget.tokens == 40
    assert max(tried[:call]) > 40 and max(tried[call:]) <= 40
    (line,) = (record.getMessage() for record in said.records if record.levelname == "WARNING")
    assert "80 tokens" in line and "40" in line
    score(model, groups, budget)
    assert max(tried[call:]) <= 40


def test_a_group_stays_whole_where_a_batch_of_several_would_be_smaller(model, monkeypatch):
    expected, tried = score(model, GROUPS, Budget(10_000)), no_memory_at(monkeypatch)
    found = score(model, GROUPS, Budget(4, whole=100))
    assert len(tried) == len(GROUPS if model.share else ROWS)
    torch.testing.assert_close(torch.tensor(sum(found, [])), torch.tensor(sum(expected, [])), atol=1e-4, rtol=0)


def test_out_of_memory_with_the_half_is_the_users_to_fix(model, monkeypatch):
    no_memory_at(monkeypatch, 1, 4)
    with pytest.raises(UserError, match=r"80 tokens.* 40 as well.*--max_tokens_per_batch"):
        score(model, GROUPS * 6, Budget(80))


def test_out_of_memory_of_one_of_several_processes_is_the_users_to_fix(model, monkeypatch):
    """The others would wait for a batch that this one does in halves."""
    no_memory_at(monkeypatch, 1)
    with pytest.raises(UserError, match="80 tokens a batch; give a smaller --max_tokens_per_batch"):
        score(model, GROUPS, Budget(80, common=True))


def test_other_errors_are_not_out_of_memory(model, monkeypatch):
    def broken(self, batch):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(LogProbs, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        score(model, GROUPS, Budget(80))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries cannot be told")
def test_memory_that_a_tensor_freed_is_there_for_the_next(model):
    """Without pages that the kernel gives and fills with zeros again."""

    def new_pages() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(10_000_000)  # 40 MB, 9766 pages
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    score(model, GROUPS, Budget(100))
    assert min(new_pages() for _ in range(3)) < 1000
