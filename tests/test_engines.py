"""Engines against plain forward passes, numpy, scipy, transformers' own warpers and each other."""

import itertools
import json
import math
import shutil
import subprocess
import sys
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
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TopPLogitsWarper,
)

from cream import engines
from cream.engines import Request, Sampling, row_seed
from cream.engines.hf import GumbelMax, HfEngine, gumbel, nucleus, splitmix64
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


def plain_greedy(model, ids, max_tokens, stops=()):
    answer = []
    while len(answer) < max_tokens and not (answer and answer[-1] in stops):
        answer.append(int(plain_logits(model, ids + answer)[-1].argmax()))
    return answer


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


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.3, 0.8)])
def test_sampled_frequencies_match_the_warped_softmax(temperature, top_p):
    logits = np.array([2.0, 1.5, 1.0, 0.0, -0.5, -1.0, -2.5, -4.0])
    expected = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    order = np.argsort(-expected)
    kept = order[: 1 + np.searchsorted(np.cumsum(expected[order]), min(top_p, 1 - 1e-9))]
    expected = np.where(np.isin(np.arange(8), kept), expected, 0) / expected[kept].sum()
    rows = 100_000
    seeds = torch.tensor([row_seed(3, f"p{i // 5}", i % 5) for i in range(rows)])
    sampler = GumbelMax(seeds, Sampling(n=5, temperature=temperature, top_p=top_p))
    batch = torch.tensor(logits, dtype=torch.float32).expand(rows, -1)
    draws = [sampler(None, batch).argmax(-1) for _ in range(2)]
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


@given(st.integers(0, 10**6), st.text(max_size=20), st.integers(0, 64))
def test_row_seeds_fit_every_generator_and_lie_apart(seed, uuid, index):
    here = row_seed(seed, uuid, index)
    assert 0 <= here < 2**63
    others = [row_seed(seed + 1, uuid, index), row_seed(seed, uuid + "x", index), row_seed(seed, uuid, index + 1)]
    assert min(abs(here - other) for other in others) > 1000


# Both engines ---------------------------------------------------------------------------------------------------------


def test_greedy_equals_plain_decoding(engine, model, requests):
    """Also: nothing of the folder's generation_config.json leaks in."""
    got = ids_of(engine, requests, Sampling(temperature=0, max_tokens=16, stop_token_ids=STOPS))
    wanted = {r.uuid: [plain_greedy(model, r.prompt_ids, 16, STOPS)] for r in requests}
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


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_logprob_is_the_raw_one(engine, model, requests, temperature):
    sampling = Sampling(n=3 if temperature else 1, temperature=temperature, max_tokens=24, stop_token_ids=STOPS)
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


def test_first_tokens_follow_the_model(engine, model, requests):
    prompt = requests[3].prompt_ids
    logits = plain_logits(model, prompt)[-1].double() / 0.5
    expected = logits.softmax(-1).numpy()
    sampling = Sampling(n=5, temperature=0.5, top_p=1.0, max_tokens=1)
    answers = ids_of(engine, [Request(f"q{i}", prompt) for i in range(400)], sampling)
    counts = np.bincount([ids[0] for group in answers.values() for ids in group], minlength=VOCAB)
    likely = 2000 * expected >= 5  # the rest is one class
    seen = [*counts[likely], counts[~likely].sum()]
    assert likely.sum() > 10
    assert scipy.stats.chisquare(seen, [*2000 * expected[likely], 2000 * expected[~likely].sum()]).pvalue > ALPHA


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


def test_hf_bfloat16_stops_and_scores_in_float32(folder, tokenizer, requests):
    engine = start("hf", folder, tokenizer, dtype="bfloat16")
    assert isinstance(engine, HfEngine) and engine.model.dtype == torch.bfloat16
    for _, (answer,) in engine.generate(requests[:4], Sampling(max_tokens=8)):
        assert -math.inf < answer.logprob < 0
        assert torch.tensor(answer.logprob).bfloat16().double() != answer.logprob


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
    if engines._vllm_build() != "cpu":
        pytest.skip("vLLM for CPU is not installed")


def test_choose_takes_vllm_for_a_large_model(tmp_path, needs_cpu_vllm):
    large = make_folder(tmp_path, 1_200_000_000, **LLAMA)
    assert engines.parameter_count(large) == 1_200_000_000
    assert engines.choose("auto", large, "cpu")[0] == "vllm"
    assert engines.choose("vllm", large, "cpu")[0] == "vllm"
    assert engines.choose("hf", large, "cpu")[0] == "hf"
    name, why = engines.choose("auto", large, "cuda:0")
    assert name == "hf" and "built for cpu" in why


def test_choose_takes_hf_for_a_tiny_model(tmp_path, needs_cpu_vllm):
    name, why = engines.choose("auto", make_folder(tmp_path, 580_000, **LLAMA), "cpu")
    assert name == "hf" and "0.58 M" in why


@pytest.mark.parametrize("config", [{"head_dim": 8}, {"n_embd": 64, "n_head": 8}, {"text_config": {"head_dim": 8}}])
def test_choose_looks_at_the_head_size(tmp_path, needs_cpu_vllm, config):
    large = make_folder(tmp_path, 1_200_000_000, **(LLAMA | config if "head_dim" in config else config))
    assert engines.head_size(large) == 8
    name, why = engines.choose("auto", large, "cpu")
    assert name == "hf" and "head size 8" in why
    with pytest.raises(UserError, match="head size 8.*--engine hf"):
        engines.choose("vllm", large, "cpu")


def test_choose_refuses_what_is_not_there(tmp_path):
    with pytest.raises(UserError, match="did you mean vllm"):
        engines.choose("vlm", tmp_path, "cpu")
    with pytest.raises(UserError, match="config.json"):
        engines.head_size(tmp_path)


@pytest.mark.slow
@pytest.mark.xdist_group("vllm")
def test_head_sizes_are_vllms_own():
    backend = pytest.importorskip("vllm.v1.attention.backends.cpu_attn", exc_type=ImportError)
    assert list(engines.CPU_HEAD_SIZES) == backend.CPUAttentionBackend.get_supported_head_sizes()


@pytest.mark.parametrize(
    "wrong",
    [
        *({"temperature": t} for t in (-1, math.nan, math.inf, 0.001, 0.005, 0.0099999, 2.0001, 3)),
        {"n": 0},
        {"top_p": 0},
        {"top_p": 1.1},
        {"max_tokens": 0},
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
def test_vllm_is_given_what_is_recorded(vllm, temperature, top_p, seed):
    """Its parameters change some values without a word; what `Sampling` allows stays as it is."""
    greedy = temperature < 0.001
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
    assert params.stop_token_ids == [5, VOCAB - 1]  # it refuses what is none of the model's words


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
