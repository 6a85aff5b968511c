"""Engines against plain forward passes, numpy, scipy, transformers' own warpers and each other."""

import itertools
import json
import math
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import scipy.stats
import torch
import torch._dynamo
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cream import engines
from cream.engines import Request, Sampling, choice, row_seed
from cream.engines.draw import draw, masses_before, pick
from cream.engines.hf import GumbelMax, HfEngine, StopStrings
from cream.engines.noise import gumbel, splitmix64
from cream.engines.stops import ESCAPES, find_stop, parse_stops
from cream.engines.warp import keep_min_p, keep_top_k, nucleus, penalize_repeated, warp
from cream.errors import UserError

VOCAB = 512
CONTEXT = 128
STOPS = tuple(range(3, 23))
ALPHA = 1e-4  # of each statistical test: there are a dozen, and their seeds are fixed


@pytest.fixture(scope="module")
def tokenizer():
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama with head size 32, and a generation_config.json whose every entry would change the answers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.08,  # so that the logits spread as a trained model's do
    )
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(path)
    leaks = {"do_sample": True, "top_k": 1, "repetition_penalty": 5.0, "temperature": 0.1, "eos_token_id": [30, 40, 50]}
    leaks |= {"no_repeat_ngram_size": 1, "suppress_tokens": list(range(100, 400)), "min_length": 100}
    (path / "generation_config.json").write_text(json.dumps(leaks))
    return path


@pytest.fixture(scope="module")
def model(folder):
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def requests():
    rng = np.random.default_rng(0)
    return [Request(f"p{i}", rng.integers(3, VOCAB, rng.integers(2, 60)).tolist()) for i in range(50)]


def start(name, folder, tokenizer, **changed):
    options = {"device": "cpu", "dtype": "float32", "max_model_len": CONTEXT} | changed
    return engines.load(name, folder, tokenizer, **options)


@pytest.fixture(scope="module")
def hf(folder, tokenizer):
    engine = start("hf", folder, tokenizer)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def vllm(folder, tokenizer):
    """As by default but for the compiler, which takes 10 s."""
    pytest.importorskip("vllm", exc_type=ImportError)
    with mock.patch.object(torch._dynamo.config, "disable", True):
        engine = start("vllm", folder, tokenizer)
        yield engine
        engine.close()


WITH_VLLM = [pytest.mark.slow, pytest.mark.xdist_group("vllm")]


@pytest.fixture(params=["hf", pytest.param("vllm", marks=WITH_VLLM)])
def engine(request):
    return request.getfixturevalue(request.param)


def ids_of(engine, requests, sampling):
    return {uuid: [answer.token_ids for answer in answers] for uuid, answers in engine.generate(requests, sampling)}


@torch.no_grad()
def plain_logits(model, ids):
    """(T, V) float32 logits of one unpadded sequence, without a cache."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


def plain_greedy(model, ids, max_tokens, stops=(), penalty=1.0):
    answer = []
    while len(answer) < max_tokens and not (answer and answer[-1] in stops):
        logits = plain_logits(model, ids + answer)[-1].numpy()
        answer.append(int(distribution(logits, ids + answer, repetition_penalty=penalty).argmax()))
    return answer


def distribution(logits, ids=(), temperature=1.0, top_k=0, min_p=0.0, top_p=1.0, repetition_penalty=1.0):
    """What is sampled from after `ids`, by the definitions, in the order of vLLM's sampler."""
    z = np.array(logits, dtype=np.float64)
    for token in {*ids}:
        z[token] = z[token] / repetition_penalty if z[token] > 0 else z[token] * repetition_penalty
    p = np.exp((z - z.max()) / temperature)
    p[p < min_p * p.max()] = 0
    order = np.argsort(-p, kind="stable")
    p[order[top_k or len(p) :]] = 0
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]  # mass of likelier tokens
    p[order[before >= min(top_p, 1 - 1e-9)]] = 0
    return p / p.sum()


# Noise ----------------------------------------------------------------------------------------------------------------


def splitmix64_in_python(seed: int, count: int) -> list[int]:
    state, out = seed, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        out.append(z ^ z >> 31)
    return out


def test_splitmix64_published_outputs():
    got = splitmix64(torch.tensor(1234567), torch.arange(3)).tolist()
    assert [z % 2**64 for z in got] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(st.integers(-(2**63), 2**63 - 1))
def test_splitmix64_is_the_sequential_generator(seed):
    got = splitmix64(torch.tensor(seed), torch.arange(20)).tolist()
    assert [z % 2**64 for z in got] == splitmix64_in_python(seed % 2**64, 20)


def test_gumbel_noise_is_gumbel_distributed_and_uncorrelated():
    seeds = torch.tensor([row_seed(0, f"p{i}", 0) for i in range(400)])
    noise = torch.stack([gumbel(seeds, step, 50) for step in range(4)]).double().numpy()  # (step, row, token)
    assert scipy.stats.kstest(noise.ravel(), "gumbel_r").pvalue > ALPHA
    for axis in range(3):  # between neighbouring steps, rows and tokens
        left, right = noise.take(range(noise.shape[axis] - 1), axis), noise.take(range(1, noise.shape[axis]), axis)
        assert scipy.stats.pearsonr(left.ravel(), right.ravel()).pvalue > ALPHA


def test_gumbel_noise_depends_on_its_own_row_only():
    seeds = torch.tensor([row_seed(0, f"p{i}", 0) for i in range(8)])
    assert torch.equal(gumbel(seeds, 5, 40)[[6, 2], :30], gumbel(seeds[[6, 2]], 5, 30))


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 1.0, "top_p": 1.0},
        {"temperature": 0.7, "top_p": 1.0},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.3, "top_k": 6, "min_p": 0.05, "top_p": 0.9, "repetition_penalty": 1.4},
    ],
)
def test_sampled_frequencies_match_the_warped_softmax(how):
    logits = np.array([2.0, 1.5, 1.0, 0.0, -0.5, -1.0, -2.5, -4.0])
    expected = distribution(logits, [1, 5], **how)
    rows = 100_000
    seeds = torch.tensor([row_seed(3, f"p{i // 5}", i % 5) for i in range(rows)])
    sampler = GumbelMax(seeds, Sampling(n=5, **how))
    batch = torch.tensor(logits, dtype=torch.float32).expand(rows, -1)
    ids = torch.tensor([[1, 5]]).expand(rows, -1)
    draws = [sampler(ids, batch).argmax(-1) for _ in range(2)]
    for drawn in draws:
        counts = np.bincount(drawn, minlength=8)
        assert counts[expected == 0].sum() == 0
        seen = expected > 0
        assert scipy.stats.chisquare(counts[seen], rows * expected[seen]).pvalue > ALPHA
    table = scipy.stats.contingency.crosstab(*(d.numpy() for d in draws)).count
    assert scipy.stats.chi2_contingency(table).pvalue > ALPHA  # steps are independent
    raw = torch.log_softmax(batch[0], -1)
    assert torch.allclose(torch.stack(sampler.logprobs), raw[torch.stack(draws)], atol=1e-6)


@settings(deadline=None)
@given(st.lists(st.integers(-8, 8), min_size=2, max_size=12, unique=True), st.floats(0.02, 1.0))
def test_nucleus_equals_transformers(logits, top_p):
    scores = torch.tensor([logits, logits[::-1]], dtype=torch.float32) * 0.37
    probs = scores.softmax(-1).sort(-1, descending=True).values.cumsum(-1)
    if ((probs - top_p).abs() < 1e-5).any():
        return  # the two sum from opposite ends, so rounding decides
    assert torch.equal(nucleus(scores, top_p), TopPLogitsWarper(top_p)(None, scores))


@settings(deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=2, max_size=40), st.floats(1e-6, 1.0))
def test_nucleus_of_equal_tokens_has_those_with_the_lowest_ids(logits, top_p):
    """By the definition, on indices in a stable order."""
    scores = torch.tensor([logits, logits[::-1]], dtype=torch.float32)
    probs, order = scores.softmax(-1).sort(dim=-1, descending=True, stable=True)
    outside = torch.empty_like(order, dtype=torch.bool).scatter(-1, order, probs.cumsum(-1) - probs >= top_p)
    wanted = scores.masked_fill(outside, -math.inf) if top_p < 1 else scores
    assert torch.equal(nucleus(scores, top_p), wanted)


LOGITS = st.lists(st.integers(-3, 3).map(float) | st.just(-math.inf), min_size=2, max_size=40)
LOGITS = LOGITS.filter(lambda values: max(values) > -math.inf)


def kept_by_sorting(logits, top_p):
    """The ids of the nucleus, by the definition: (surely, perhaps), where rounding decides on the last one."""
    p = np.exp(np.array(logits) - max(logits))
    order = np.argsort(-p, kind="stable")
    order = order[p[order] > 0]
    before = np.cumsum(p[order] / p.sum()) - p[order] / p.sum()
    return {*order[before < top_p - 1e-6]}, {*order[before < top_p + 1e-6]}


@settings(deadline=None, max_examples=60)
@given(LOGITS, st.sampled_from([1e-9, 1e-3, 0.5, 0.95, 1 - 1e-5, 1.0]) | st.floats(1e-6, 1.0), st.floats(0.01, 2))
def test_draws_are_the_nucleus_of_a_sort(logits, top_p, temperature):
    """What lies before a token decides on each as a sort does; and nothing else is ever drawn, at either end too."""
    surely, perhaps = kept_by_sorting(np.array(logits) / temperature, top_p)
    scores = torch.tensor([logits]) / temperature
    ids = torch.arange(len(logits))
    probs = scores.softmax(-1)
    before = masses_before(probs.expand(len(ids), -1), ids)
    for i, row in enumerate(before):  # only tokens that are likelier, or equal and earlier
        first = (probs[0] > probs[0, i]) | (probs[0] == probs[0, i]) & (ids < i)
        assert torch.equal(row, probs[0].where(first, 0.0))
    kept = {i for i in ids.tolist() if probs[0, i] > 0 and before[i].sum() < top_p}
    assert {i for i in surely if probs[0, i] > 0} <= kept <= perhaps
    assert {*draw(scores.expand(300, -1), top_p, torch.arange(300)).tolist()} <= kept


def test_equal_tokens_of_a_nucleus_are_those_with_the_lowest_ids():
    for top_p, count in ((1e-9, 1), (0.25, 2), (0.26, 3), (0.5, 4), (0.95, 8), (1.0, 8)):  # exact in binary
        drawn = draw(torch.zeros(2000, 8), top_p, torch.arange(2000))
        assert {*drawn.tolist()} == {*range(count)}


def test_a_quantile_picks_the_token_that_has_it():
    masses = torch.tensor([[0.0, 1.0, 0.0, 3.0, 0.0]])
    quantiles = [1e-300, 0.249, 0.25, 0.251, 1 - 2**-53]
    assert pick(masses.expand(5, -1), torch.tensor(quantiles, dtype=torch.float64)).tolist() == [1, 1, 3, 3, 3]


@pytest.mark.slow
@pytest.mark.parametrize("top_p", [0.3, 0.95, 1.0])
def test_drawn_frequencies_match_the_nucleus(top_p):
    """10^5 draws, of rows that lie in several parts; those of neighbouring seeds are independent."""
    rng = np.random.default_rng(5)
    logits, rows = rng.normal(0, 1.5, 30).round(1), 100_000  # some are equal
    expected = distribution(logits, top_p=top_p)
    drawn = draw(torch.tensor(logits, dtype=torch.float32).expand(rows, -1), top_p, torch.arange(rows)).numpy()
    counts, seen = np.bincount(drawn, minlength=30), expected > 0
    assert counts[~seen].sum() == 0
    assert scipy.stats.chisquare(counts[seen], rows * expected[seen]).pvalue > ALPHA
    likely = np.argsort(-expected)[:5]  # each against the rest
    table = scipy.stats.contingency.crosstab(np.isin(drawn[:-1], likely), drawn[1:] % 4).count
    assert scipy.stats.chi2_contingency(table).pvalue > ALPHA


def test_draws_do_not_depend_on_their_company():
    logits = torch.tensor(np.random.default_rng(0).normal(0, 2, (50, 30_000)), dtype=torch.float32)
    seeds = torch.arange(50)
    drawn = draw(logits, 0.3, seeds)
    assert torch.equal(draw(logits[20:23], 0.3, seeds[20:23]), drawn[20:23])
    assert not torch.equal(draw(logits, 0.3, seeds + 1), drawn)
    sampling = Sampling(temperature=0.9, top_p=0.8)
    noisy = GumbelMax(seeds, sampling)(seeds[:, None], logits)
    assert torch.equal(noisy, warp(logits, sampling) + gumbel(seeds, 0, 30_000))


@settings(deadline=None)
@given(
    st.lists(st.integers(-8, 8), min_size=2, max_size=12, unique=True),
    st.integers(1, 14),
    st.floats(0.01, 1.0),
    st.floats(0.5, 2.0),
    st.data(),
)
def test_each_warp_equals_transformers(logits, k, min_p, penalty, data):
    scores = torch.tensor([logits, logits[::-1]], dtype=torch.float32) * 0.37
    assert torch.equal(keep_top_k(scores, k), TopKLogitsWarper(k)(None, scores))
    shares = scores.softmax(-1) / scores.softmax(-1).amax(-1, keepdim=True)
    if not ((shares - min_p).abs() < 1e-5).any():  # rounding decides
        assert torch.equal(keep_min_p(scores, min_p), MinPLogitsWarper(min_p)(None, scores))
    token = st.integers(0, len(logits) - 1)
    ids = torch.tensor([data.draw(st.lists(token, min_size=3, max_size=3)) for _ in range(2)])
    wanted = RepetitionPenaltyLogitsProcessor(penalty)(ids, scores)
    assert torch.equal(penalize_repeated(scores, ids, penalty), wanted)
    for off in (keep_top_k(scores, 0), keep_min_p(scores, 0.0), penalize_repeated(scores, ids, 1.0)):
        assert torch.equal(off, scores)


def test_warps_in_vllms_order():
    """All at once, against the definitions and transformers' warpers; in transformers' own order, where min-p is last
    and looks at the same shares, top-p would keep more or fewer tokens."""
    rng, differ = np.random.default_rng(0), 0
    for _ in range(50):
        temperature, top_p, min_p = rng.uniform(0.3, 2), rng.uniform(0.3, 1), rng.uniform(0, 0.3)
        sampling = Sampling(temperature=temperature, top_p=top_p, top_k=int(rng.integers(1, 30)), min_p=min_p)
        logits = torch.tensor(rng.normal(0, 2, (3, 40)), dtype=torch.float32)
        how = {name: getattr(sampling, name) for name in ("temperature", "top_k", "min_p", "top_p")}
        wanted = np.stack([distribution(row, **how) for row in logits.numpy()])
        found = warp(logits, sampling).softmax(-1)
        np.testing.assert_allclose(found, wanted, atol=1e-6)
        heat, last = TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p)
        warpers = heat, MinPLogitsWarper(min_p), TopKLogitsWarper(sampling.top_k), last
        assert torch.equal(LogitsProcessorList(warpers)(None, logits).softmax(-1), found)
        theirs = LogitsProcessorList([heat, warpers[2], last, warpers[1]])(None, logits).softmax(-1)
        differ += not torch.allclose(theirs, found)
    assert differ > 10


def test_padding_is_not_a_repeated_token():
    """With the id of its padding, a word like any other, in front of the first prompt, and within the second."""
    ids = torch.tensor([[0, 0, 3], [2, 0, 3]])
    logits = torch.tensor([[4.0, 3.0, 2.0, -1.0]] * 2)
    sampler = GumbelMax(torch.tensor([1, 2]), Sampling(temperature=0, repetition_penalty=2.0), torch.tensor([2, 0]))
    assert sampler(ids, logits).tolist() == [[4.0, 3.0, 2.0, -2.0], [2.0, 3.0, 1.0, -2.0]]
    raw = logits.log_softmax(-1)
    assert torch.stack(sampler.logprobs).tolist() == [[raw[0, 0], raw[1, 1]]]


@given(st.integers(0, 10**6), st.text(max_size=20), st.integers(0, 64))
def test_row_seeds_fit_every_generator_and_lie_apart(seed, uuid, index):
    here = row_seed(seed, uuid, index)
    assert 0 <= here < 2**63
    others = [row_seed(seed + 1, uuid, index), row_seed(seed, uuid + "x", index), row_seed(seed, uuid, index + 1)]
    assert min(abs(here - other) for other in others) > 1000


# Both engines ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("penalty", "count"), [(1.0, 50), (1.3, 15)])
def test_greedy_equals_plain_decoding(engine, model, requests, penalty, count):
    """Also: nothing of the folder's generation_config.json leaks in."""
    sampling = Sampling(temperature=0, max_tokens=16, stop_token_ids=STOPS, repetition_penalty=penalty)
    got = ids_of(engine, requests[:count], sampling)
    wanted = {r.uuid: [plain_greedy(model, r.prompt_ids, 16, STOPS, penalty)] for r in requests[:count]}
    assert got.keys() == wanted.keys()
    same = sum(got[uuid] == wanted[uuid] for uuid in wanted)
    assert same >= 0.95 * len(wanted), f"{same} of {len(wanted)}"


@pytest.mark.slow
@pytest.mark.xdist_group("vllm")
def test_engines_agree_greedily(hf, vllm, requests):
    sampling = Sampling(temperature=0, max_tokens=40)
    one, two = ids_of(hf, requests, sampling), ids_of(vllm, requests, sampling)
    same = sum(one[uuid] == two[uuid] for uuid in one)
    assert same >= 0.95 * len(requests), f"{same} of {len(requests)}"


WARPED = {"temperature": 0.9, "top_k": 30, "min_p": 0.02, "top_p": 0.9, "repetition_penalty": 1.4}


@pytest.mark.parametrize("how", [{"temperature": 0, "repetition_penalty": 1.3}, {"temperature": 0.7}, WARPED])
def test_logprob_is_the_raw_one(engine, model, requests, how):
    sampling = Sampling(n=3 if how["temperature"] else 1, max_tokens=24, stop_token_ids=STOPS, **how)
    prompts = {r.uuid: r.prompt_ids for r in requests}
    for uuid, answers in engine.generate(requests[:20], sampling):
        for answer in answers:
            logits = plain_logits(model, prompts[uuid] + answer.token_ids)[len(prompts[uuid]) - 1 : -1]
            plain = logits.log_softmax(-1).gather(-1, torch.tensor(answer.token_ids)[:, None]).sum()
            assert answer.logprob == pytest.approx(float(plain), abs=5e-4)


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_answers_without_their_logprob_are_the_same(engine, requests, temperature):
    sampling = Sampling(n=3 if temperature else 1, temperature=temperature, max_tokens=24, stop_token_ids=STOPS)
    without = replace(sampling, logprobs=False)
    assert ids_of(engine, requests[:20], without) == ids_of(engine, requests[:20], sampling)
    assert all(a.logprob is None for _, answers in engine.generate(requests[:4], without) for a in answers)


@pytest.mark.slow
def test_samples_depend_on_seed_and_uuid_alone(engine, requests):
    sampling = Sampling(n=4, temperature=1.0, top_p=0.9, max_tokens=24, seed=7, stop_token_ids=STOPS)
    first = ids_of(engine, requests, sampling)
    assert ids_of(engine, requests, sampling) == first
    assert ids_of(engine, requests[::-1], sampling) == first
    assert ids_of(engine, requests[5:9], sampling) == {r.uuid: first[r.uuid] for r in requests[5:9]}
    fewer = ids_of(engine, requests[:6], Sampling(2, 1.0, 0.9, 24, 7, STOPS))
    assert fewer == {r.uuid: first[r.uuid][:2] for r in requests[:6]}
    assert ids_of(engine, requests, Sampling(4, 1.0, 0.9, 24, 8, STOPS)) != first
    same_prompt = ids_of(engine, [Request(u, requests[0].prompt_ids) for u in ("p0", "other")], sampling)
    assert same_prompt["p0"] == first["p0"] != same_prompt["other"]
    assert all(len({tuple(ids) for ids in answers}) > 1 for answers in first.values())


@pytest.mark.slow
@pytest.mark.xdist_group("vllm")
def test_vllm_draws_from_the_nucleus_alone(vllm, model, requests):
    """10 000 draws in vLLM's place: each token as often as its share, and none from outside."""
    prompt = requests[3].prompt_ids
    expected = distribution(plain_logits(model, prompt)[-1].numpy(), prompt, temperature=1.0, top_p=0.9)
    sampling = Sampling(n=500, temperature=1.0, top_p=0.9, max_tokens=1, logprobs=False)
    answers = ids_of(vllm, [Request(f"q{i}", prompt) for i in range(20)], sampling)
    counts = np.bincount([ids[0] for group in answers.values() for ids in group], minlength=VOCAB)
    assert ((counts > 0) == (expected > 0)).all()
    assert scipy.stats.chisquare(counts[expected > 0], counts.sum() * expected[expected > 0]).pvalue > ALPHA


@pytest.mark.parametrize("how", [{"temperature": 0.5, "top_p": 1.0}, WARPED])
def test_first_tokens_follow_the_model(engine, model, requests, how):
    prompt = requests[3].prompt_ids
    expected = distribution(plain_logits(model, prompt)[-1].numpy(), prompt, **how)
    sampling = Sampling(n=5, max_tokens=1, **how)
    answers = ids_of(engine, [Request(f"q{i}", prompt) for i in range(400)], sampling)
    counts = np.bincount([ids[0] for group in answers.values() for ids in group], minlength=VOCAB)
    assert not counts[expected == 0].any()
    likely = 2000 * expected >= 5  # the rest is one class, empty where few tokens are left
    seen, wanted = ([*values[likely], *filter(None, [values[~likely].sum()])] for values in (counts, 2000 * expected))
    assert likely.sum() > 10
    assert scipy.stats.chisquare(seen, wanted).pvalue > ALPHA


def test_stop_and_length(engine, tokenizer, requests):
    dropped = {"dropped": frozenset(tokenizer.all_special_ids), "special": frozenset(tokenizer.all_special_ids)}
    sampling = Sampling(n=2, temperature=1.0, top_p=1.0, max_tokens=20, stop_token_ids=STOPS, **dropped)
    reasons = set()
    for _, answers in engine.generate(requests, sampling):
        for answer in answers:
            reasons.add(answer.finish_reason)
            *body, last = answer.token_ids
            assert not set(body) & set(STOPS)
            if answer.finish_reason == "stop":
                assert last in STOPS
                spoken = body
            else:
                assert last not in STOPS and len(answer.token_ids) == 20
                spoken = answer.token_ids
            assert answer.text == tokenizer.decode(spoken, skip_special_tokens=True)
    assert reasons == {"stop", "length"}


@pytest.mark.parametrize("keep", [True, False])
def test_stop_strings(engine, model, tokenizer, requests, keep):
    """A response ends with the token that completes one of them, wherever the tokens begin and end, and is otherwise
    what it would have been; its log-probability is that of all its tokens."""
    stops = ("7 w1", "w44", "w9 ")
    free = Sampling(n=3, temperature=1.0, top_p=1.0, max_tokens=24, stop_token_ids=STOPS)
    requests = requests[:25]
    whole, prompts = ids_of(engine, requests, free), {r.uuid: r.prompt_ids for r in requests}
    reasons = Counter()
    for uuid, answers in engine.generate(requests, replace(free, stop=stops, keep_stop=keep)):
        for answer, ids in zip(answers, whole[uuid], strict=True):
            texts = [tokenizer.decode(ids[: i + 1]) for i in range(len(ids) - (ids[-1] in STOPS))]
            end = next((i + 1 for i, text in enumerate(texts) if any(stop in text for stop in stops)), None)
            reasons[answer.finish_reason] += 1
            assert answer.token_ids == ids[:end]
            if end is None:
                assert answer.finish_reason == ("stop" if ids[-1] in STOPS else "length")
                assert answer.text == texts[-1] if texts else answer.text == ""
                continue
            text = texts[end - 1]
            _, begin = min((text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text)
            assert answer.finish_reason == "stop_string"
            assert answer.text == (text if keep else text[:begin])
            if keep and reasons["stop_string"] < 5:
                logits = plain_logits(model, prompts[uuid] + answer.token_ids)[len(prompts[uuid]) - 1 : -1]
                plain = logits.log_softmax(-1).gather(-1, torch.tensor(answer.token_ids)[:, None]).sum()
                assert answer.logprob == pytest.approx(float(plain), abs=5e-4)
    assert len(reasons) == 3 and reasons["stop_string"] > 5, reasons


def test_answers_end_where_the_context_ends(engine, model):
    rng = np.random.default_rng(1)
    lengths = [CONTEXT - 1, CONTEXT - 5, CONTEXT - 30, 10]
    long = [Request(f"l{n}", rng.integers(3, VOCAB, n).tolist()) for n in lengths]
    got = {uuid: answers[0] for uuid, answers in engine.generate(long, Sampling(temperature=0, max_tokens=20))}
    for request, room in zip(long, (1, 5, 20, 20), strict=True):
        assert got[request.uuid].finish_reason == "length"
        assert got[request.uuid].token_ids == plain_greedy(model, request.prompt_ids, room)
    with pytest.raises(ValueError, match="no room"):
        list(engine.generate([Request("full", [5] * CONTEXT)], Sampling()))


def test_requests_are_taken_as_needed_and_may_be_left(engine, requests):
    taken = itertools.count()
    endless = (Request(f"e{next(taken)}", [5, 6, 7]) for _ in itertools.repeat(None))
    stream = engine.generate(endless, Sampling(temperature=1.0, max_tokens=4))
    assert len(list(itertools.islice(stream, 10))) == 10
    stream.close()
    assert next(taken) < 5000
    sampling = Sampling(temperature=0, max_tokens=4)
    assert ids_of(engine, requests[:3], sampling).keys() == {"p0", "p1", "p2"}  # no stragglers
    assert ids_of(engine, [], sampling) == {}


# hf alone -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_hf_batch_budget_changes_nothing(folder, tokenizer, hf, requests):
    sampling = Sampling(n=3, temperature=1.0, max_tokens=24, stop_token_ids=STOPS)
    narrow = start("hf", folder, tokenizer, batch_tokens=300)
    sizes = [len(batch) for batch in narrow._batches(requests, sampling)]
    assert sum(sizes) == len(requests) and max(sizes) < 5
    assert ids_of(narrow, requests, sampling) == ids_of(hf, requests, sampling)


def test_hf_learned_positions_near_the_end_of_the_context(tmp_path, tokenizer):
    """GPT-2 has no position past its context: a full row must not be run on while its neighbours answer."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=32, n_layer=2, n_head=4)).eval()
    model.save_pretrained(tmp_path)
    engine = start("hf", tmp_path, tokenizer, max_model_len=32)
    prompts = [Request("long", list(range(100, 130))), Request("short", [40, 50])]
    got = ids_of(engine, prompts, Sampling(temperature=0, max_tokens=25))
    assert got == {
        "long": [plain_greedy(model, prompts[0].prompt_ids, 2)],
        "short": [plain_greedy(model, [40, 50], 25)],
    }


SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}
SMALL |= {"intermediate_size": 64, "num_key_value_heads": 1, "max_position_embeddings": CONTEXT}
ARCHITECTURES = {
    "gemma2": {"sliding_window": 8, "head_dim": 16},  # layers with a window and without
    "bloom": {"n_layer": 2, "n_head": 2},  # positions from the mask
    "lfm2": {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3},  # a state instead of keys and values
    "mamba": {"state_size": 8, "expand": 2},  # no key-value cache at all
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_hf_every_kind_of_cache_is_shared_and_left(tmp_path, tokenizer, requests, kind):
    """Prompts that are computed once, several lengths, rows that end early: log-probabilities of plain passes."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SMALL | ARCHITECTURES[kind])
    config.initializer_range = 0.2
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    prompts = {r.uuid: r.prompt_ids for r in requests[:6]}
    lengths = set()
    for uuid, answers in start("hf", tmp_path, tokenizer).generate(
        requests[:6], Sampling(n=3, temperature=1.0, max_tokens=20, stop_token_ids=tuple(range(3, 60)))
    ):
        for answer in answers:
            lengths.add(len(answer.token_ids))
            logits = plain_logits(model, prompts[uuid] + answer.token_ids)[len(prompts[uuid]) - 1 : -1]
            plain = logits.log_softmax(-1).gather(-1, torch.tensor(answer.token_ids)[:, None]).sum()
            assert answer.logprob == pytest.approx(float(plain), abs=5e-4)
    assert len(lengths) > 3


def test_hf_bfloat16_stops_and_scores_in_float32(folder, tokenizer, requests):
    engine = start("hf", folder, tokenizer, dtype="bfloat16")
    assert isinstance(engine, HfEngine) and engine.model.dtype == torch.bfloat16
    for _, (answer,) in engine.generate(requests[:4], Sampling(max_tokens=8)):
        assert -math.inf < answer.logprob < 0
        assert torch.tensor(answer.logprob).bfloat16().double() != answer.logprob


PIECES = st.sampled_from(["Tom", " has", " 28", "\n", "\n\n", "é", "🙂", "\u200b", "##", "#", "<end>", " "])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(PIECES, min_size=1, max_size=9), min_size=2, max_size=2), st.data())
def test_hf_finds_a_stop_string_with_the_token_that_completes_it(tiny_tokenizer, pieces, data):
    """By the definition, on the whole text so far, where its last character is complete."""
    texts = ["".join(row) for row in pieces]
    start = data.draw(st.integers(0, len(texts[0]) - 1))
    stops = [texts[0][start : start + data.draw(st.integers(1, 6))], data.draw(PIECES)]
    rows = tiny_tokenizer(texts, add_special_tokens=False)["input_ids"]
    length = max(map(len, rows))
    ids = torch.tensor([[4, *row, *[0] * (length - len(row))] for row in rows])
    soon = [[tiny_tokenizer.decode(row[1 : i + 2]) for i in range(length)] for row in ids]
    matches = [[not t.endswith("\ufffd") and find_stop(t, stops) is not None for t in texts] for texts in soon]
    watch = StopStrings(tiny_tokenizer, stops, rows=2, start=1)
    for t in range(1, length + 1):
        ended = watch(ids[:, : t + 1], [0, 1]).tolist()
        for row, found in zip(matches, watch.lengths, strict=True):
            assert found == (row.index(True) + 1 if True in row[:t] else None)
        assert ended == [found is not None for found in watch.lengths]


# vLLM alone -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.xdist_group("vllm")
def test_vllm_computes_a_shared_prompt_once(vllm):
    """And samples from what it kept as from what it computes."""
    from vllm.inputs import TokensPrompt

    rng = np.random.default_rng(1)
    requests = [Request(f"s{i}", rng.integers(3, VOCAB, 100).tolist()) for i in range(3)]
    sampling = Sampling(n=5, temperature=1.0, top_p=0.9, max_tokens=24, seed=7, stop_token_ids=STOPS)
    assert vllm.engine.reset_prefix_cache()
    cold = ids_of(vllm, requests, sampling)
    assert ids_of(vllm, requests, sampling) == cold
    prompt, params = TokensPrompt(prompt_token_ids=requests[0].prompt_ids), vllm._params(requests[0], Sampling())
    vllm.engine.add_request("again", prompt, params)
    while not (found := vllm.engine.step()):
        pass
    assert found[0].num_cached_tokens == 96  # three blocks of 32
    for request in requests:
        assert vllm.engine.reset_prefix_cache()
        assert ids_of(vllm, [request], sampling) == {request.uuid: cold[request.uuid]}


@pytest.mark.slow
@pytest.mark.xdist_group("vllm")
def test_vllm_batches_stay_full(vllm, monkeypatch):
    """While prompts are left, there are more answers under way than are decoded together, however uneven they are."""
    under_way, step = [], vllm.engine.step
    monkeypatch.setattr(
        vllm.engine, "step", lambda: under_way.append(vllm.engine.get_num_unfinished_requests()) or step()
    )
    left = iter(range(200))
    requests = (Request(f"u{i}", [5, 6, 7 + i]) for i in left)
    sampling = Sampling(n=16, temperature=1.0, max_tokens=40, stop_token_ids=STOPS)
    counts = []
    for _, answers in vllm.generate(requests, sampling):
        counts += [len(answer.token_ids) for answer in answers]
    assert len(counts) == 200 * 16 and min(counts) == 1 and max(counts) > 30
    full = under_way[: next(i for i, n in enumerate(under_way) if n < vllm.window)]
    assert len(full) > 0.5 * len(under_way) and max(under_way) < vllm.window + 16


# Stop strings as a flag -----------------------------------------------------------------------------------------------


@given(st.lists(st.text(st.sampled_from("ab,\\\n\t n"), min_size=1), min_size=1))
def test_stops_are_read_as_they_were_written(stops):
    spelled = {char: f"\\{letter}" for letter, char in ESCAPES.items()}
    text = ",".join("".join(spelled.get(char, char) for char in stop) for stop in stops)
    assert parse_stops(text) == tuple(stops)


def test_stops_on_a_command_line_and_in_yaml():
    assert (
        parse_stops(r"\n\nQuestion:,###, Human")
        == parse_stops("\n\nQuestion:,###, Human")
        == (
            "\n\nQuestion:",
            "###",
            " Human",
        )
    )
    assert parse_stops(None) == ()


@pytest.mark.parametrize(
    ("text", "problem"),
    [("a,,b", "is empty"), ("a,", "is empty"), (r"\boxed", r"\\b means nothing"), ("a\\", "means nothing")],
)
def test_stops_that_mean_nothing_are_refused(text, problem):
    with pytest.raises(UserError, match=problem):
        parse_stops(text)


# Choosing -------------------------------------------------------------------------------------------------------------


def make_folder(path, parameters=1000, **config):
    """A folder with a config and the header of a weights file of that many bf16 parameters (the rest is a hole)."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    header = json.dumps({"w": {"dtype": "BF16", "shape": [parameters // 10, 10], "data_offsets": [0, 2 * parameters]}})
    with open(path / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(8 + len(header) + 2 * parameters)
    return path


LLAMA = {"hidden_size": 2048, "num_attention_heads": 32}  # head size 64


@pytest.fixture
def needs_cpu_vllm():
    if choice._vllm_build() != "cpu":
        pytest.skip("vLLM for CPU is not installed")


def test_choose_takes_vllm_for_a_large_model(tmp_path, needs_cpu_vllm):
    large = make_folder(tmp_path, 1_200_000_000, **LLAMA)
    assert choice.parameter_count(large) == 1_200_000_000
    assert choice.choose("auto", large, "cpu")[0] == "vllm"
    assert choice.choose("vllm", large, "cpu")[0] == "vllm"
    assert choice.choose("hf", large, "cpu")[0] == "hf"
    name, why = choice.choose("auto", large, "cuda:0")
    assert name == "hf" and "built for cpu" in why


def test_choose_takes_hf_for_a_tiny_model(tmp_path, needs_cpu_vllm):
    name, why = choice.choose("auto", make_folder(tmp_path, 580_000, **LLAMA), "cpu")
    assert name == "hf" and "0.58 M" in why


@pytest.mark.parametrize("config", [{"head_dim": 8}, {"n_embd": 64, "n_head": 8}, {"text_config": {"head_dim": 8}}])
def test_choose_looks_at_the_head_size(tmp_path, needs_cpu_vllm, config):
    large = make_folder(tmp_path, 1_200_000_000, **(LLAMA | config if "head_dim" in config else config))
    assert choice.head_size(large) == 8
    name, why = choice.choose("auto", large, "cpu")
    assert name == "hf" and "head size 8" in why
    with pytest.raises(UserError, match="head size 8.*--engine hf"):
        choice.choose("vllm", large, "cpu")


def test_choose_refuses_what_is_not_there(tmp_path):
    with pytest.raises(UserError, match="did you mean vllm"):
        choice.choose("vlm", tmp_path, "cpu")
    with pytest.raises(UserError, match="config.json"):
        choice.head_size(tmp_path)


@pytest.mark.slow
@pytest.mark.xdist_group("vllm")
def test_head_sizes_are_vllms_own():
    backend = pytest.importorskip("vllm.v1.attention.backends.cpu_attn", exc_type=ImportError)
    assert list(choice.CPU_HEAD_SIZES) == backend.CPUAttentionBackend.get_supported_head_sizes()


@pytest.mark.parametrize(
    "wrong",
    [
        *({"temperature": t} for t in (-1, math.nan, math.inf, 0.001, 0.005, 0.0099999, 2.0001, 3)),
        {"n": 0},
        {"top_p": 0},
        {"top_p": 1.1},
        {"max_tokens": 0},
        {"top_k": -1},
        *({"min_p": p} for p in (-0.1, 1.1, math.nan)),
        *({"repetition_penalty": p} for p in (0, 0.09, 10.1, math.nan, math.inf)),
        {"stop": ("a", "")},
        {"n": 5, "temperature": 0},
        {"n": 5, "temperature": 0.0009},
    ],
)
def test_sampling_refuses_nonsense_and_what_an_engine_would_change(wrong):
    with pytest.raises(UserError, match=list(wrong)[-1]):
        Sampling(**wrong)


@pytest.mark.slow
@pytest.mark.xdist_group("vllm")
@pytest.mark.parametrize("seed", [0, 2**32 - 1])
@pytest.mark.parametrize("top_p", [1e-6, 0.5, 1 - 1e-7, 1.0])
@pytest.mark.parametrize("temperature", [0, 0.0009, 0.01, 0.0100001, 0.8, 2.0])
def test_vllm_is_given_what_is_recorded(vllm, monkeypatch, temperature, top_p, seed):
    """Its parameters change some values without a word; what `Sampling` allows stays as it is. Top-k and top-p are not
    for vLLM to compute on a CPU, but they are on a GPU."""
    greedy = temperature < 0.001
    monkeypatch.setattr(vllm, "chooser", None)
    sampling = Sampling(1 if greedy else 20_000, temperature, top_p, 9999, seed, (5, 5, VOCAB - 1, VOCAB, 10**6))
    params = vllm._params(Request("p", [3] * 20), sampling)
    assert (params.n, params.temperature, params.top_p) == (
        sampling.n,
        0.0 if greedy else temperature,
        1.0 if greedy else top_p,
    )
    assert (params.seed, params.max_tokens) == (row_seed(seed, "p", 0), CONTEXT - 20)
    assert (params.top_k, params.min_p, params.min_tokens, params.ignore_eos) == (0, 0.0, 0, True)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.0, 0.0, 1.0)
    assert (params.stop, params.detokenize) == ([], False)
    assert params.stop_token_ids == [5, VOCAB - 1]  # it refuses what is none of the model's words


@pytest.mark.slow
@pytest.mark.xdist_group("vllm")
def test_vllm_is_given_the_other_settings_too(vllm, monkeypatch):
    monkeypatch.setattr(vllm, "chooser", None)
    how = {"top_k": 10**6, "min_p": 1.0, "repetition_penalty": 0.1, "stop": ("\n", "a,b")}
    params = vllm._params(Request("p", [3] * 20), Sampling(n=2, temperature=0.01, **how))
    assert {name: getattr(params, name) for name in how} == how | {"stop": ["\n", "a,b"]}
    assert params.detokenize and not params.skip_special_tokens


def test_stop_ids_beyond_the_vocabulary_do_no_harm(engine, requests):
    """A generation_config.json may name some: no response can end with one."""
    sampling = Sampling(temperature=0, max_tokens=8, stop_token_ids=STOPS)
    beyond = replace(sampling, stop_token_ids=(*STOPS, VOCAB, 10**6))
    assert ids_of(engine, requests[:4], beyond) == ids_of(engine, requests[:4], sampling)


@pytest.mark.parametrize("name", engines.ENGINES)
@pytest.mark.parametrize("lost", ["lm_head", "model.layers.1.mlp.down_proj", "model.norm", "model.embed_tokens"])
def test_a_folder_that_lacks_weights_is_refused_by_both(folder, tmp_path, tokenizer, name, lost):
    """vLLM would serve it with whatever its memory holds."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if k != f"{lost}.weight"}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"1 weights are missing: {lost}.weight"):
        start(name, tmp_path, tokenizer)


@pytest.mark.parametrize("temperature", [0.01, 2.0])
def test_engines_sample_at_both_ends_of_the_temperature(engine, model, requests, temperature):
    """After the prompt whose two likeliest tokens are so close that 0.01 leaves both a chance, and 0.005 another."""
    tops = {r.uuid: plain_logits(model, r.prompt_ids)[-1].topk(2).values for r in requests}
    prompt = min(requests, key=lambda r: tops[r.uuid][0] - tops[r.uuid][1]).prompt_ids
    expected = (plain_logits(model, prompt)[-1].double() / temperature).softmax(-1).numpy()
    sampling = Sampling(n=5, temperature=temperature, top_p=1.0, max_tokens=1, seed=1)
    answers = ids_of(engine, [Request(f"t{i}", prompt) for i in range(400)], sampling)
    counts = np.bincount([ids[0] for group in answers.values() for ids in group], minlength=VOCAB)
    likely = 2000 * expected >= 5  # the rest is one class
    wanted = np.append(2000 * expected[likely], 2000 * expected[~likely].sum() + 1e-9)
    assert likely.sum() > 1
    assert scipy.stats.chisquare([*counts[likely], counts[~likely].sum()], wanted).pvalue > ALPHA


def test_importing_the_protocol_is_light():
    code = "import sys, cream.engines; sys.exit(bool({'torch', 'transformers', 'vllm', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
