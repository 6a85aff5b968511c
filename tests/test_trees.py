"""Trees against padded rows on every architecture: the same log-probabilities and gradients, and nothing else seen."""

import logging
import random
import shutil
from itertools import chain, pairwise
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from cream.model import trees
from cream.model.batches import Layout, pad
from cream.model.checkpoint import length_limit
from cream.model.hardware import Budget
from cream.model.load import load_policy
from cream.model.logprobs import LogProbs, score
from cream.model.lora import add_lora
from cream.text.chat import Tokens
from cream.training.stages import dpo, sft

CPU = torch.device("cpu")
VOCAB, WINDOW = 97, 16
END = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0}  # pad is eos
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
HEADS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
BOTH = ["sliding_attention", "full_attention"]
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8}
WINDOWED = {
    "mistral": SIZES | {"sliding_window": WINDOW},
    "qwen2": SIZES | {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": BOTH},
    "qwen3": SIZES | {"head_dim": 8, "use_sliding_window": True, "sliding_window": WINDOW, "layer_types": BOTH},
    "gemma2": SIZES | {"head_dim": 8, "sliding_window": WINDOW, "layer_types": BOTH, **CAPS},
    "gemma3_text": SIZES | {"head_dim": 8, "sliding_window": WINDOW, "layer_types": BOTH},
    "phi3": SIZES | {"sliding_window": WINDOW},
    "mixtral": SIZES | {"num_local_experts": 4, "sliding_window": WINDOW},
}
MODELS = WINDOWED | {
    "llama": SIZES,
    "gemma": SIZES | {"head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "olmo2": SIZES,
    "opt": HEADS | {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 128},
    "gpt_neox": HEADS | {"intermediate_size": 64, "max_position_embeddings": 128},
    "cohere": SIZES | {"logit_scale": 0.5},
    "granite": SIZES | {"logits_scaling": 2.0, "attention_multiplier": 0.25, "residual_multiplier": 0.5},
}
PADDED = {
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2},
    "falcon": HEADS,
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "llama4_text": SIZES | {"head_dim": 8, "num_local_experts": 2, "attention_chunk_size": WINDOW},
}


def random_model(config):
    """A model whose logits spread as a trained one's do."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(0, 0.25)
    return model


def make_groups():
    """1 to 16 answers to a prompt of 1 to 60 tokens: some of one token, most ended by eos, which is also the pad."""
    r, groups = random.Random(0), []
    for n in range(1, 17):
        start = r.randint(1, 60)
        prompt = [r.randrange(VOCAB) for _ in range(start)]
        lengths = [r.choice([1, 5, 20, 40]) for _ in range(n)]
        answers = [[*(r.randrange(VOCAB) for _ in range(length - 1)), r.choice([0, 0, 7])] for length in lengths]
        groups.append([Tokens(prompt + answer, [(start, start + len(answer))]) for answer in answers])
    return groups


GROUPS = make_groups()
CONVERSATIONS = [  # over several turns, most of them
    Tokens(row.ids, [(at, at + 3) for at in range(1, len(row) - 2, 9)]) for group in GROUPS[:8] for row in group
]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """Makes a model of an architecture, loaded as the stages load it; its weights are so large that a wrong mask shows
    by far more than rounding."""
    folder = tmp_path_factory.mktemp("architectures")

    def make(name, dtype=torch.float32, std=0.25, **changes):
        place = folder / f"{name}-{std}-{changes}"
        if not place.exists():
            config = AutoConfig.for_model(name, **END, **(MODELS | PADDED)[name] | changes)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = AutoModelForCausalLM.from_config(config)
                for parameter in model.parameters():
                    if parameter.ndim > 1:
                        parameter.data.normal_(0, std)
            model.save_pretrained(place)
        return load_policy(place, dtype, CPU)

    return make


@pytest.fixture(params=[False, True], ids=["by branch", "at once"])
def way(request, monkeypatch):
    """Attention of either kind, whatever the sizes."""
    monkeypatch.setattr(trees, "at_once_is_faster", lambda layout, width: request.param)


@pytest.fixture
def said(caplog, monkeypatch):
    """What the toolkit's log says."""
    monkeypatch.setattr(logging.getLogger("cream"), "propagate", True)
    caplog.set_level(logging.INFO, "cream")
    return caplog


def difference(found, wanted, groups=GROUPS):
    """Largest |difference| of two lists of scores, in nats a token."""
    return max(
        abs(a - b) / row.num_response_tokens
        for scores, others, group in zip(found, wanted, groups, strict=True)
        for a, b, row in zip(scores, others, group, strict=True)
    )


def plain(policy, group):
    """Scores by transformers alone: every row by itself, all logits, log-softmax in float64."""
    found = []
    with torch.no_grad():
        for row in group:
            logprobs = policy(torch.tensor([row.ids]), use_cache=False).logits[0].double().log_softmax(-1)
            found.append(sum(logprobs[t - 1, row.ids[t]].item() for start, end in row.spans for t in range(start, end)))
    return found


def gradient(model, loss):
    """All trained parameters' gradients of a scalar as one vector."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained, materialize_grads=True)])


# Architectures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_scores_equal_those_of_padded_rows(policy, name, way):
    """Also where a row holds one answer only, and where the prompt alone is longer than a row."""
    model, padded = LogProbs(policy(name)), LogProbs(policy(name), share=False)
    assert model.share and not padded.share
    wanted = score(padded, GROUPS, Budget(4000))
    assert difference([plain(padded.model, GROUPS[2])], wanted[2:3], GROUPS[2:3]) <= 1e-4
    assert difference(score(model, GROUPS, Budget(4000)), wanted) <= 1e-4
    assert difference(score(model, GROUPS[::5], Budget(40)), wanted[::5], GROUPS[::5]) <= 1e-4


@pytest.mark.parametrize("name", WINDOWED)
def test_windows_of_these_models_decide(policy, name):
    """Else the test above would not notice a wrong one."""
    narrow, wide = (policy(name, sliding_window=window) for window in (WINDOW, 1000))
    assert difference([plain(narrow, GROUPS[2])], [plain(wide, GROUPS[2])], GROUPS[2:3]) > 0.1


@pytest.mark.parametrize("name", MODELS)
def test_a_dpo_gradient_equals_that_of_padded_rows(policy, name, way):
    stage = dpo.Stage(dpo.Options(beta=0.1), {})
    examples = [dpo.Example(*group[:2], consistency=0.7) for group in GROUPS[1:]]
    for i, example in enumerate(examples):  # margins on both sides of 0, of a few nats
        example.reference = [
            -4.5 * row.num_response_tokens + shift
            for row, shift in ((example.chosen, i), (example.rejected, len(examples) - i))
        ]
    found = []
    for share in (True, False):
        model = LogProbs(policy(name), share)
        batch = model.pack([stage.group(example) for example in examples])
        found.append(gradient(model, stage.loss(model, batch, examples)[0]))
    assert found[1].norm() > 1
    assert (found[0] - found[1]).norm() <= 1e-5 * found[1].norm()


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_in_bfloat16_trees_err_as_padded_rows_do(policy, name, way):
    """Against the same weights in float32, answer by answer: both err by rounding, neither by more."""
    exact, found = policy(name, torch.bfloat16).float(), []
    wanted = score(LogProbs(exact, share=False), GROUPS, Budget(4000))
    for share in (True, False):
        model = LogProbs(policy(name, torch.bfloat16), share)
        assert model.share is share
        scores = score(model, GROUPS, Budget(4000))
        errors = [
            abs(a - b) / row.num_response_tokens
            for xs, ys, group in zip(scores, wanted, GROUPS, strict=True)
            for a, b, row in zip(xs, ys, group, strict=True)
        ]
        found.append(sum(errors) / len(errors))
    print(f"{name}: bfloat16 errs by {found[0]:.3g} nats a token over trees, by {found[1]:.3g} over padded rows")
    assert found[0] <= 1.3 * found[1]


PRECISIONS = {  # dtype, spread of the weights: in bfloat16 rounding must not hide what is wrong, however even the model
    "float32": (torch.float32, 0.25),
    "bfloat16": (torch.bfloat16, 0.25),
    "bfloat16, even": (torch.bfloat16, 0.1),
}


@pytest.mark.parametrize(("dtype", "std"), PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize("name", PADDED)
def test_models_that_trees_cannot_carry_take_padded_rows(policy, said, name, dtype, std):
    check_padded(LogProbs(policy(name, dtype, std)), policy(name, dtype, std), said)


def check_padded(model, policy, said):
    """The model takes padded rows, has said so in one line, and its numbers are the policy's."""
    (line,) = (record.getMessage() for record in said.records if record.name == "cream")
    assert not model.share and "each takes a padded row: " in line and "\n" not in line
    wanted = [plain(policy, group) for group in GROUPS[:4]]
    tolerance = 1e-4 if policy.dtype == torch.float32 else 0.05
    assert difference(score(model, GROUPS[:4], Budget(100)), wanted, GROUPS[:4]) <= tolerance


PACK, SEEN, MASK = trees.pack, trees._seen, Layout.mask


def without_siblings_apart(groups, *others):
    """Each answer sees the ones before it."""
    batch = PACK(groups, *others)
    seen = {}
    for i, (*before, own) in enumerate(batch.layout.branches):
        siblings = seen.setdefault(tuple(before), []) if before else []
        batch.layout.branches[i] = (*before, *siblings, own)
        siblings.append(own)
    return batch


def with_siblings_seen(groups, *others):
    """The same, as a mask has it."""
    batch = PACK(groups, *others)
    for (start, _), *own in filter(lambda spans: len(spans) > 1, batch.layout.branches):
        batch.layout.ends[own[-1][0] : own[-1][1]] = batch.layout.ends[start]
    return batch


def with_running_positions(groups, *others):
    """A token's position is its place in the row."""
    batch = PACK(groups, *others)
    batch.position_ids = torch.arange(batch.input_ids.shape[1])[None]
    return batch


WRONG = {  # model, whether attention is at once, and the part that is wrong
    "siblings are seen": ("llama", False, trees, "pack", without_siblings_apart),
    "positions run on": ("llama", False, trees, "pack", with_running_positions),
    "positions run on, learned": ("gpt2", False, trees, "pack", with_running_positions),
    "no window": ("mistral", False, trees, "_seen", lambda q, k, _, device: SEEN(q, k, None, device)),
    "a window too wide by one": ("mistral", False, trees, "_seen", lambda q, k, w, on: SEEN(q, k, w and w + 1, on)),
    "the future is seen": ("mistral", False, trees, "_seen", lambda q, k, *_: torch.ones(q, k).bool()),
    "siblings are seen, at once": ("llama", True, trees, "pack", with_siblings_seen),
    "no window, at once": ("mistral", True, Layout, "mask", lambda layout, _: MASK(layout, None)),
    "a window too wide by one, at once": ("mistral", True, Layout, "mask", lambda layout, w: MASK(layout, w and w + 1)),
}


@pytest.mark.parametrize(("dtype", "std"), PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize(("name", "at_once", "whose", "part", "wrong"), WRONG.values(), ids=WRONG)
def test_a_wrong_attention_is_found_out(policy, monkeypatch, said, name, at_once, whose, part, wrong, dtype, std):
    """The probe notices, says so, and the model goes on over padded rows as if nothing had been tried."""
    monkeypatch.setattr(trees, "at_once_is_faster", lambda layout, width: at_once)
    monkeypatch.setattr(whose, part, wrong)
    model = LogProbs(policy(name, dtype, std))
    check_padded(model, policy(name, dtype, std), said)
    assert model.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["mistral", "gemma2", "granite"])
def test_a_model_made_ready_for_trees_still_takes_padded_rows(policy, name):
    """Windows, caps and scales included."""
    model = LogProbs(policy(name))
    found = score(LogProbs(model.model, share=False), GROUPS[:4], Budget(100))
    assert difference(found, [plain(policy(name), group) for group in GROUPS[:4]], GROUPS[:4]) <= 1e-4
    assert LogProbs(model.model).share


def test_the_longest_in_a_batch_does_not_decide_for_the_others(policy):
    """LongRoPE (arXiv 2402.13753) has other frequencies beyond a length, and the library takes them for a whole batch:
    up to the limit that the stages keep to, all have the same."""
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    long = {"rope_parameters": rope | {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}}
    model, reference = LogProbs(policy("llama", **long)), policy("llama", **long)
    limit = length_limit(None, Path(reference.name_or_path))
    assert limit == 64
    longest = max((row for group in GROUPS for row in group), key=len)
    groups = [[row for row in group if len(row) <= limit] for group in GROUPS]
    groups = [*filter(None, groups), [Tokens(longest.ids[:limit], [(40, limit)])]]
    wanted = [plain(reference, group) for group in groups]
    assert difference(score(model, groups, Budget(4000)), wanted, groups) <= 1e-4
    too_long = [*groups, [Tokens(longest.ids[: limit + 1], [(40, limit + 1)])]]
    assert difference(score(model, too_long, Budget(4000))[:-1], wanted, groups) > 0.1


def test_adapters_share_too(policy, said):
    """A PEFT model scores and learns over trees as over padded rows."""
    found = []
    for share in (True, False):
        adapted = add_lora(policy("llama"), r=4, alpha=8, dropout=0.0)
        torch.manual_seed(0)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.2)
        model = LogProbs(adapted, share)
        assert model.share is share
        values = model(model.pack(GROUPS[:6]))
        found.append((values.detach(), gradient(model, values.sum())))
    torch.testing.assert_close(*(values for values, _ in found), atol=1e-4, rtol=0)
    first, second = (gradient for _, gradient in found)
    assert (first - second).norm() <= 1e-5 * second.norm() and second.norm() > 1
    assert not said.records


# Rows ---------------------------------------------------------------------------------------------------------------


@st.composite
def trees_of(draw, words=3, size=5):
    """Answers to one prompt; few words, so that their beginnings are often equal; any tokens may be scored."""
    word = st.integers(0, words - 1)
    prompt = draw(st.lists(word, max_size=size))
    group = []
    for answer in draw(st.lists(st.lists(word, min_size=1, max_size=size), min_size=1, max_size=size)):
        ids = prompt + answer
        cuts = sorted(draw(st.sets(st.integers(0, len(ids)))))
        group.append(Tokens(ids, list(zip(cuts[::2], cuts[1::2], strict=False))))
    return group


forests = st.lists(trees_of(), min_size=1, max_size=4)
deep = st.booleans()  # whether a branch forks again to save a single token


def pack(groups, multiple=1, deep=False):
    with patch.object(trees, "SAVED", 1 if deep else trees.SAVED):
        return trees.pack(groups, multiple)


def scored(batch):
    """(answer, the place that predicts, the token that is predicted) of every scored token."""
    return list(zip(batch.owner.tolist(), batch.source.tolist(), batch.target.tolist(), strict=True))


@given(forests, st.sampled_from([1, 8, 128]), st.none() | st.integers(1, 6), deep)
def test_a_token_sees_its_own_conversation_up_to_itself(groups, multiple, window, deep):
    """Read from the layout as FlexAttention reads it (sees) and as the CPU does (by branch and at once); every token is
    scored."""
    groups = [[Tokens(row.ids, [(0, len(row))]) for row in group] for group in groups]
    batch = pack(groups, multiple, deep)
    (ids,), (positions,), layout = batch.input_ids, batch.position_ids, batch.layout
    size = len(ids)
    assert size % multiple == 0 and size - batch.tokens < multiple
    index = torch.arange(size)
    seen = layout.sees(window)(0, 0, index[:, None], index)
    rows = [row for group in groups for row in group]
    expected = [(a, t) for a, row in enumerate(rows) for t in range(1, len(row))]
    for (answer, source, target), (a, t) in zip(scored(batch), expected, strict=True):
        (sight,) = seen[source].nonzero(as_tuple=True)
        first = 0 if window is None else max(0, t - window)
        assert (answer, target) == (a, rows[a].ids[t])
        assert positions[sight].tolist() == list(range(first, t))
        assert ids[sight].tolist() == rows[a].ids[first:t]
    nothing, itself = torch.zeros(1, size, 1, 1), torch.eye(size)[None, :, None]
    attended = trees._by_branch(nothing, nothing, itself, layout, None, window, None)[0, :, 0] > 0
    computed = attended.any(1)  # all but what leads up to no place that is read: a row's very last token alone
    assert torch.equal(attended[computed], seen[computed])
    assert computed[seen[batch.source].any(0)].all()
    assert torch.equal(trees._at_once(nothing, nothing, itself, layout, None, window, None)[0, :, 0] > 0, seen)
    assert torch.equal(seen[batch.tokens :], torch.eye(size, dtype=torch.bool)[batch.tokens :])


@given(forests, deep)
def test_spans_decide_what_is_scored(groups, deep):
    """Of the whole rows' tokens those in spans, the very first token of a row excepted."""
    whole = scored(pack([[Tokens(row.ids, [(0, len(row))]) for row in group] for group in groups], deep=deep))
    rows = [row for group in groups for row in group]
    places = [(a, t) for a, row in enumerate(rows) for t in range(1, len(row))]
    inside = [any(start <= t < end for start, end in rows[a].spans) for a, t in places]
    batch = pack(groups, deep=deep)
    assert scored(batch) == [entry for entry, is_in in zip(whole, inside, strict=True) if is_in]
    assert batch.responses == len(rows)
    assert scored(pad(groups)) == sorted(scored(pad(groups))) and len(batch.target) == len(pad(groups).target)


@given(trees_of())
def test_what_is_shared_is_all_that_can_be(group):
    shared, shortest = trees.shared(group), min(map(len, group))
    assert 0 <= shared < shortest  # each answer keeps a token to itself
    assert all(row.ids[:shared] == group[0].ids[:shared] for row in group)
    assert shared == shortest - 1 or len({row.ids[shared] for row in group}) > 1
    batch = trees.pack([group])
    assert trees.tree_shape(group) == (batch.tokens, 1) == (batch.input_ids.shape[1], 1)  # unless padding is asked for


@given(trees_of())
def test_a_prefix_that_neighbours_share_is_there_once(group):
    """Where one token is worth a branch: a row adds what it does not share with the one before it."""
    group = [Tokens([*row.ids, 100 + i], row.spans) for i, row in enumerate(group)]  # none is the beginning of another
    with patch.object(trees, "SAVED", 1):
        size, _ = trees.tree_shape(group)
    assert size == sum(map(len, group)) - sum(map(trees.shared, pairwise(group))) == pack([group], deep=True).tokens


@given(trees_of(size=8), st.integers(1, 60), deep)
def test_a_group_too_large_for_a_row_is_split_by_answers(group, max_tokens, deep):
    with patch.object(trees, "SAVED", 1 if deep else 1000):
        runs = trees.split(group, max_tokens)
        assert list(chain(*runs)) == list(range(len(group)))
        prompt = trees.shared(group)
        for run, following in zip(runs, [*runs[1:], None], strict=True):
            assert len(run) == 1 or trees.tree_shape([group[i] for i in run])[0] <= max_tokens
            if following and not deep:  # as few runs as the prompt allows
                assert prompt + sum(len(group[i]) - prompt for i in [*run, following[0]]) > max_tokens


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 3, 6, 7])
@pytest.mark.parametrize("scaling", [None, 0.7])
@pytest.mark.parametrize("queries", [4, 7])
def test_attention_of_the_last_tokens_is_its_definition(queries, scaling, window, softcap):
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, count, 8) for count in (queries, 7, 7))
    wanted = torch.empty_like(query)
    for head in range(2):
        for at in range(queries):
            last = 7 - queries + at
            seen = slice(0 if window is None else max(0, last - window + 1), last + 1)
            scores = key[0, head, seen] @ query[0, head, at] * (8**-0.5 if scaling is None else scaling)
            scores = scores if softcap is None else softcap * (scores / softcap).tanh()
            wanted[0, head, at] = scores.softmax(0) @ value[0, head, seen]
    torch.testing.assert_close(trees._causal(query, key, value, scaling, window, softcap), wanted)


@given(forests, st.sampled_from([1, 32]), st.none() | st.integers(1, 6), st.sampled_from([None, 2.0]), deep)
def test_both_ways_of_attention_give_the_same(groups, multiple, window, softcap, deep):
    """Values and gradients, of the places that are read."""
    batch, found = pack(groups, multiple, deep), []
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, batch.input_ids.shape[1], 2, 4, generator=generator) for _ in range(3)]
    weight = torch.zeros(tensors[0].shape)
    weight[:, batch.source] = torch.randn(weight[:, batch.source].shape, generator=generator)
    for way in (trees._by_branch, trees._at_once):
        own = [x.clone().requires_grad_() for x in tensors]
        values = way(*own, batch.layout, 0.7, window, softcap) * weight
        none = 0 * sum(x.sum() for x in own)  # a gradient, also where nothing is read
        found.append([values, *torch.autograd.grad(values.sum() + none, own)])
    torch.testing.assert_close(*found, atol=1e-5, rtol=0)


def test_small_trees_are_attended_at_once():
    """One call for all of them where a call takes longer than its products."""
    row = lambda prompt, n: Tokens([3] * prompt + [n] * n, [(prompt, prompt + n)])  # noqa: E731
    small, large = [row(25, n) for n in (19, 20)], [row(120, n) for n in (149, 150)]
    faster = lambda group, width: trees.at_once_is_faster(trees.pack([group] * 5).layout, width)  # noqa: E731
    assert faster(small, 128) and not faster(small, 4096)
    assert not faster(large, 128) and faster(small[:1], 128) and not faster(small[:1], 4096)


@pytest.mark.parametrize("others", [{}, {"is_causal": False}])
def test_without_a_layout_attention_is_the_librarys(others):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 5, 8)
    found, wanted = (
        attention(torch.nn.Module(), query, key, value, None, scaling=0.7, **others)[0]
        for attention in (trees.attend, sdpa_attention_forward)
    )
    torch.testing.assert_close(found, wanted)


def test_without_a_layout_scores_may_be_capped():
    """As no attention of the library's is; there may be fewer keys than queries."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 5, 8) for heads in (4, 2, 2))
    wanted = trees._causal(query, *(x.repeat_interleave(2, dim=1) for x in (key, value)), 0.7, None, 2.0)
    found, _ = trees.attend(torch.nn.Module(), query, key, value, None, scaling=0.7, softcap=2.0)
    torch.testing.assert_close(found, wanted.transpose(1, 2))
    half = (x.bfloat16() for x in (query, key, value))
    assert trees.attend(torch.nn.Module(), *half, None, softcap=2.0)[0].dtype == torch.bfloat16


def test_on_cuda_flex_attention_takes_the_mask_of_the_layout(monkeypatch):
    taken = []
    name = "transformers.integrations.flex_attention.flex_attention_forward"
    monkeypatch.setattr(name, lambda *values, **settings: taken.append((values, settings)) or "attended")
    query = SimpleNamespace(device=torch.device("cuda"))
    layout = SimpleNamespace(block_mask=lambda window: f"mask of window {window}")
    settings = {"scaling": 0.7, "softcap": 2.0}
    found = trees.attend("layer", query, "key", "value", None, sliding_window=3, tree_layout=layout, **settings)
    assert found == "attended"
    assert taken == [(("layer", query, "key", "value", "mask of window 3"), settings)]


@settings(max_examples=10)
@given(forests)
def test_the_mask_is_one_that_flex_attention_can_evaluate(groups):
    batch = trees.pack(groups, 8)
    index = torch.arange(batch.input_ids.shape[1])
    for window in (None, 2):
        mask = batch.layout.sees(window)
        assert torch.equal(
            create_mask(mask, 1, 1, len(index), len(index), "cpu")[0, 0], mask(0, 0, index[:, None], index)
        )


@pytest.mark.parametrize("multiple", [1, 128])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2"])
def test_neighbours_and_padding_change_nothing(policy, name, multiple):
    """Each group by itself against all in one row, of a length that CUDA takes."""
    model = LogProbs(policy(name))
    with torch.no_grad():
        together = model(trees.pack(GROUPS, multiple))
        alone = torch.cat([model(trees.pack([group])) for group in GROUPS])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)


@settings(max_examples=25)
@given(
    groups=st.lists(trees_of(words=VOCAB, size=30) | trees_of(), min_size=1, max_size=3),
    deep=deep,
    at_once=st.booleans(),
)
def test_any_trees_score_as_padded_rows(both, groups, deep, at_once):
    over, padded = both
    with torch.no_grad(), patch.object(trees, "at_once_is_faster", lambda layout, width: at_once):
        found, wanted = over(pack(groups, 32, deep)), padded(padded.pack(groups))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def both(policy):
    """Mistral, with windows, over trees and over padded rows."""
    return LogProbs(policy("mistral")), LogProbs(policy("mistral"), share=False)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
def test_packed_conversations_learn_as_each_alone(policy, name):
    """SFT: the gradient of a row of conversations is the sum of theirs, each over the library's plain path."""
    stage, packed, padded = sft.Stage(sft.Options(), {}), LogProbs(policy(name)), LogProbs(policy(name), share=False)
    examples = [[tokens] for tokens in CONVERSATIONS]
    batch = packed.pack([stage.group(example) for example in examples])
    tokens = sum(map(len, CONVERSATIONS))
    assert batch.tokens == tokens and batch.input_ids.shape == (1, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = packed.pack([stage.group(example) for example in examples])
    assert rounded.tokens == tokens and rounded.input_ids.shape == (1, tokens + -tokens % trees.MULTIPLE["cpu"])
    together = gradient(packed, stage.loss(packed, batch, examples)[0])
    alone = sum(gradient(padded, stage.loss(padded, padded.pack([each]), [each])[0]) for each in examples)
    assert (together - alone).norm() <= 1e-5 * alone.norm()


# FlexAttention ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.xdist_group("compiled")  # with that of test_training, which needs the same headers
@pytest.mark.skipif(shutil.which("g++") is None, reason="FlexAttention is compiled, on a CPU by g++")
@pytest.mark.parametrize("window, softcap", [(None, None), (WINDOW, 2.0)])
def test_flex_attention_gives_what_branches_give(window, softcap):
    """What CUDA runs, its block mask included, on the CPU; there it has no gradient."""
    from transformers.integrations.flex_attention import flex_attention_forward

    torch.manual_seed(0)
    torch._dynamo.reset()  # else variable sizes are compiled for a second mask, at which torch 2.13 fails on CPUs
    batch = trees.pack(GROUPS[:8], trees.MULTIPLE["cuda"])
    size = batch.input_ids.shape[1]
    query, key, value = (torch.randn(1, heads, size, 16) for heads in (4, 2, 2))
    with torch.no_grad():
        mask = batch.layout.block_mask(window)
        found, _ = flex_attention_forward(torch.nn.Module(), query, key, value, mask, scaling=0.3, softcap=softcap)
        wanted = trees._by_sdpa(query, key, value, batch.layout, 0.3, window, softcap)
    torch.testing.assert_close(found[:, batch.source], wanted[:, batch.source], atol=1e-5, rtol=0)
    assert found.isfinite().all() and mask.sparsity() > 30  # padding, too; and blocks without a pair are left out
