"""Batches and log-probabilities against one float64 forward pass per sequence: padding and company change nothing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from cream.batches import by_tokens, pad
from cream.chat import Tokens
from cream.logprobs import answer_logprobs, score, token_logprobs

VOCAB = 300
ROWS = [
    Tokens([1, 7, 8, 9, 2], [(3, 5)]),
    Tokens([1, 7, 2], [(2, 3)]),
    Tokens([1, *range(20, 40), 2, 50, 51, 52, 2], [(10, 22), (24, 26)]),  # two turns
    Tokens([1, 60, 61, 62], [(1, 4)]),
]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request, tiny_folder):
    """Rotary positions, and learned ones, which left padding without position ids would get wrong by many nats."""
    if request.param == "llama":
        return LlamaForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=64, n_layer=2, n_head=2, initializer_range=0.1)
    return GPT2LMHeadModel(config).eval()


def oracle(model, row) -> dict[int, float]:
    """Position -> log-probability of each answer token: the row alone, full logits, log-softmax in float64."""
    with torch.no_grad():
        logprobs = model(torch.tensor([row.ids])).logits[0].double().log_softmax(-1)
    return {i: logprobs[i - 1, row.ids[i]].item() for start, end in row.spans for i in range(start, end)}


def test_pad_marks_tokens_by_position():
    batch = pad([Tokens([1, 7, 8, 2], [(2, 4)]), Tokens([1, 9, 2], [(2, 3)])], pad_id=2)
    assert batch.input_ids.tolist() == [[1, 7, 8, 2], [1, 9, 2, 2]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.answer_mask.int().tolist() == [[0, 0, 1, 1], [0, 0, 1, 0]]  # the end of turn counts, the pad does not


@given(st.lists(st.integers(0, 50), max_size=40), st.integers(1, 200))
def test_batches_hold_every_row_once_within_the_budget(lengths, max_tokens):
    batches = by_tokens(lengths, max_tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    longest = [max(lengths[i] for i in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)
    for batch, width in zip(batches, longest, strict=True):
        assert len(batch) == 1 or len(batch) * width <= max_tokens or width == 0


def test_token_logprobs_equal_one_sequence_at_a_time(model):
    with torch.no_grad():
        found = token_logprobs(model, pad(ROWS))
    for row, values in zip(ROWS, found, strict=True):
        expected = torch.zeros(found.shape[1])
        for position, value in oracle(model, row).items():
            expected[position - 1] = value
        torch.testing.assert_close(values, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("max_tokens", [1, 30, 10_000])
def test_scores_do_not_depend_on_the_company(model, max_tokens):
    done = []
    scores = score(model, ROWS, max_tokens, done.append)
    assert scores == pytest.approx([sum(oracle(model, row).values()) for row in ROWS], abs=1e-4)
    assert sum(done) == len(ROWS)


def test_the_pad_id_and_what_is_after_an_answer_change_nothing(model):
    with torch.no_grad():
        assert torch.equal(token_logprobs(model, pad(ROWS, 0)), token_logprobs(model, pad(ROWS, 2)))


def test_no_rows_and_a_row_without_an_answer(model):
    assert score(model, [], 100) == []
    with torch.no_grad():
        assert answer_logprobs(model, pad([Tokens([1, 2, 3], [])])).tolist() == [0.0]


def test_the_softmax_is_in_float32_whatever_the_weights(model):
    import copy

    half = copy.deepcopy(model).bfloat16()
    batch = pad(ROWS[:1])
    with torch.no_grad():
        found = token_logprobs(half, batch)
        logits = half(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    assert logits.dtype == torch.bfloat16 and found.dtype == torch.float32
    exact = logits[0, [2, 3]].double().log_softmax(-1)[[0, 1], ROWS[0].ids[3:]]
    torch.testing.assert_close(found[0, [2, 3]].double(), exact, atol=1e-5, rtol=0)
