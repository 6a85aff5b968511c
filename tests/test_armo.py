"""ArmoRM: ridge against scikit-learn, losses by hand, features by transformers, the released faults, command lines."""

import json
import math
import shutil
import sys
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from test_trees import MODELS
from transformers import AutoConfig, AutoModelForSequenceClassification

from cream.errors import UserError
from cream.files import store
from cream.files.provenance import Provenance
from cream.model.armo import (
    NO_GATE,
    Armo,
    Facts,
    Features,
    GateShape,
    find_lead,
    gate_place,
    load_armo,
    save_armo,
    shape_of,
)
from cream.model.backbone import run
from cream.model.hardware import Budget
from cream.model.load import load_chat
from cream.records import Message, Pair, Ratings
from cream.rewards import armo as source
from cream.scoring.armo import Loaded
from cream.scoring.heads import encode
from cream.scoring.logprobs import Group
from cream.text.tokens import Tokens
from cream.training import armo_run
from cream.training.armo import (
    ALPHAS,
    LAMBDAS,
    GateTraining,
    fit_attributes,
    gate_loss,
    penalties,
    ridge,
    spearman,
    train_gate,
    transformation,
)
from cream.training.armo_run import debiased

RANDOM = np.random.default_rng(0)


@pytest.fixture
def sklearn_ridge(monkeypatch):
    """scikit-learn's Ridge, which stages keep transformers from importing."""
    monkeypatch.delitem(sys.modules, "sklearn", raising=False)
    module = pytest.importorskip("sklearn.linear_model")
    return partial(module.Ridge, fit_intercept=False)


# Attributes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [60, 9])  # more than features, and fewer
def test_ridge_equals_scikit_learn(sklearn_ridge, rows):
    x, y = RANDOM.normal(size=(rows, 12)), RANDOM.normal(size=rows)
    found = ridge(x.T @ x, x.T @ y)
    for alpha, weight in zip(ALPHAS, found, strict=True):
        np.testing.assert_allclose(weight, sklearn_ridge(alpha=alpha).fit(x, y).coef_, atol=1e-8)


def test_each_attribute_is_fitted_on_the_rows_that_rate_it(sklearn_ridge):
    """With the alpha of the least error on a fifth that is held out, and the weights of the other rows alone."""
    x = RANDOM.normal(size=(80, 6)).astype(np.float32)
    y = x @ RANDOM.normal(size=(6, 3)) + RANDOM.normal(size=(80, 3))
    y[::2, 1] = np.nan
    y[10:, 2] = np.nan
    fits = fit_attributes(x, y, seed=3)
    assert [(fit.fitted, fit.held_out) for fit in fits] == [(64, 16), (32, 8), (8, 2)]
    for k, fit in enumerate(fits):
        rows = np.random.default_rng(3).permutation(np.flatnonzero(~np.isnan(y[:, k])))
        held, fitted = rows[: fit.held_out], rows[fit.held_out :]
        errors = {}
        for alpha in ALPHAS:
            model = sklearn_ridge(alpha=alpha).fit(x[fitted].astype(float), y[fitted, k])
            errors[alpha] = ((model.predict(x[held].astype(float)) - y[held, k]) ** 2).mean()
            if alpha == fit.alpha:
                np.testing.assert_allclose(fit.weight, model.coef_, atol=1e-6)
        assert fit.alpha == min(errors, key=errors.get) and fit.error == pytest.approx(errors[fit.alpha])
    with pytest.raises(ValueError, match="attribute 0 has 1 ratings"):
        fit_attributes(x, np.where(np.arange(80)[:, None] == 5, y[:, :1], np.nan), seed=0)


# What goes with length ------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=12))
def test_rank_correlation_equals_scipy(values):
    a, b = map(np.array, zip(*values, strict=True))
    wanted = 0.0 if len({*a}) == 1 or len({*b}) == 1 else spearmanr(a, b).statistic
    assert spearman(a, b) == pytest.approx(wanted, abs=1e-12)


def test_the_least_penalty_that_removes_what_goes_with_length():
    v = RANDOM.normal(size=400)
    noise = RANDOM.normal(size=(400, 3)) * 0.5
    rewards = np.stack([0.5 * v + noise[:, 0], v, -v + noise[:, 1], 4 * v + noise[:, 2]], axis=1)
    lambdas = penalties(rewards, 1, 0.03)
    first = next(each for each in LAMBDAS if spearmanr(rewards[:, 0] - each * v, v).statistic <= 0.03)
    assert lambdas.tolist() == [first, 1.0, 0.0, 1.0] and 0.3 < first < 0.7  # no lambda is enough for the last
    debiased = rewards @ transformation(lambdas, 1)
    np.testing.assert_allclose(debiased, rewards - np.outer(v, lambdas), atol=1e-12)
    assert (debiased[:, 1] == 0).all()


# The gate, and the released faults ------------------------------------------------------------------------------------


def random_armo(count=3, width=8, features=8, verbosity=1):
    lambdas = np.array([0.5, 1.0, 0.25])[:count]
    shape = GateShape(width=width, layers=2, temperature=2.0)
    facts = Facts([f"a{k}" for k in range(count)], [7, 8], features, shape_of(shape), "a1", lambdas.tolist())
    torch.manual_seed(0)
    armo = Armo(facts).eval()
    armo.weight.normal_()
    armo.transform.copy_(torch.from_numpy(transformation(lambdas, verbosity)))
    armo.gate.logit_scale.data.fill_(1.5)
    return armo


def test_weights_are_a_softmax_over_attributes_whatever_is_in_front():
    """The released one normalises over chosen and rejected, so that every weight is 1/2."""
    weights = random_armo().gate(torch.randn(4, 2, 8))
    assert weights.shape == (4, 2, 3)
    torch.testing.assert_close(weights.sum(-1), torch.ones(4, 2))
    assert weights.std() > 0.01


@torch.no_grad()
def test_a_score_by_hand():
    """score = s * sum_k g_k (r_k - lambda_k r_v) = sum_k c_k r_k; verbosity itself counts for nothing else."""
    armo, prompt, response = random_armo(), torch.randn(1, 8), torch.randn(1, 8)
    hidden = prompt[0]
    for layer in armo.gate.hidden:
        hidden = (layer.weight @ hidden + layer.bias).clamp(min=0)
    logits = ((armo.gate.last.weight @ hidden + armo.gate.last.bias) / 2.0).tolist()
    g = [math.exp(value) / sum(map(math.exp, logits)) for value in logits]
    r = (armo.weight @ response[0]).tolist()
    wanted = 1.5 * (g[0] * (r[0] - 0.5 * r[1]) + g[2] * (r[2] - 0.25 * r[1]))
    (outputs,) = armo(prompt, response).tolist()
    assert outputs[0] == pytest.approx(wanted, abs=1e-5) and outputs[1:4] == pytest.approx(r, abs=1e-5)
    c = [1.5 * g[0], -1.5 * (0.5 * g[0] + 0.25 * g[2]), 1.5 * g[2]]
    assert outputs[4:] == pytest.approx(c, abs=1e-5)


def test_the_loss_by_hand():
    weights, chosen, rejected = torch.tensor([[0.25, 0.75]]), torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 1.0]])
    margin = 1.5 * ((0.25 * 1 + 0.75 * 2) - (0.25 * 3 + 0.75 * 1))
    assert gate_loss(weights, chosen, rejected, 1.5).item() == pytest.approx(-math.log(1 / (1 + math.exp(-margin))))


def test_a_gate_learns_by_the_prompt_which_attribute_counts():
    """A sign in the prompt says it, and a softmax over the wrong axis could not know."""
    armo, n = random_armo(2, width=16), 600
    prompts, rewards = torch.randn(n, 8), torch.randn(n, 2, 2)
    margin = rewards[:, 0] - rewards[:, 1]
    right = torch.where(prompts[:, 0] > 0, margin[:, 0], margin[:, 1]) > 0
    rewards = torch.where(right[:, None, None], rewards, rewards.flip(1))
    how = torch.arange(n) % 5 == 0, GateTraining(steps=250, batch=128, lr=1e-2), 0
    found = train_gate(armo.gate, prompts, rewards, *how)
    again = random_armo(2, width=16)
    assert found["held_out"]["pairs"] == 120 and found["held_out"]["accuracy"] > 0.85
    assert train_gate(again.gate, prompts, rewards, *how) == found


def test_the_gate_is_trained_on_debiased_rewards():
    armo, pairs = random_armo(), RANDOM.normal(size=(5, 3, 8)).astype(np.float32)
    found = debiased(armo, pairs).numpy()
    raw = pairs[:, 1:] @ armo.weight.numpy().T
    np.testing.assert_allclose(found, raw - raw[..., [1]] * np.array([0.5, 1.0, 0.25]), atol=1e-5)
    assert (found[..., 1] == 0).all()


# Features -------------------------------------------------------------------------------------------------------------

PROMPT = [Message("user", "What is 2 + 3?"), Message("assistant", "4."), Message("user", "Sure?")]
TEXTS = ["It is 5.", "No: 5.<end><assistant>5", "6"]


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def reward_model(request, tiny_tokenizer, tmp_path_factory):
    """A random reward model of the tiny world's tokenizer, as transformers saves it."""
    ids = {name: getattr(tiny_tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    size = {"vocab_size": len(tiny_tokenizer), "num_labels": 1}
    folder = tmp_path_factory.mktemp("armo") / request.param
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForSequenceClassification.from_config(
            AutoConfig.for_model(request.param, **MODELS[request.param], **size, **ids)
        ).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def test_the_gate_reads_where_the_prompt_s_last_turn_ends(tiny_chat):
    end, assistant = (tiny_chat.tokenizer.convert_tokens_to_ids(name) for name in ("<end>", "<assistant>"))
    assert find_lead(tiny_chat) == [end, assistant]
    row = Tokens([1, end, assistant, 5, end, 6, end, assistant, 7, end, assistant, 8, end], [(8, 13)])
    assert gate_place(row, [end, assistant]) == 6  # not in the response, which says it, too
    with pytest.raises(UserError, match=NO_GATE):
        gate_place(row, [9, 9])


@torch.no_grad()
def test_features_and_scores_equal_transformers(reward_model, tmp_path):
    """Hidden states of single rows, at two places, against trees; and the score of a saved folder against both."""
    chat = load_chat(reward_model)
    plain = AutoModelForSequenceClassification.from_pretrained(reward_model, attn_implementation="eager").eval()
    rows, _ = encode(Group("", PROMPT, TEXTS, [True] * 3), chat, 999)
    armo = random_armo(features=32)
    armo.facts.lead = find_lead(chat)
    features = Features(plain.__class__.from_pretrained(reward_model, attn_implementation="sdpa").eval())
    features.lead = armo.facts.lead
    assert features.share
    (found,) = run(features, [rows], Budget(4096))
    save_armo(armo, reward_model, tmp_path / "armo", {"kind": "reward_model", "stage": "armo"})
    (scores,) = Loaded(tmp_path / "armo", torch.float32, "cpu", 4096).score([rows])
    for row, two, outputs in zip(rows, found, scores, strict=True):
        states = plain.base_model(torch.tensor([row.ids])).last_hidden_state[0]
        prompt = chat.encode_prompt(PROMPT)
        wanted = states[[len(prompt) - 2, len(row.ids) - 1]]
        torch.testing.assert_close(two, wanted, atol=1e-4, rtol=0)
        assert outputs == pytest.approx(armo(wanted[:1], wanted[1:])[0].tolist(), abs=1e-4)


def test_all_that_a_score_needs_is_saved(reward_model, tmp_path):
    """The released code loses the debiasing; a folder here is still the reward model that it was."""
    armo = random_armo(features=32)
    save_armo(armo, reward_model, tmp_path / "armo", {"kind": "reward_model", "stage": "armo"})
    again, given = load_armo(tmp_path / "armo"), torch.randn(2, 4, 32)
    torch.testing.assert_close(again(*given), armo(*given), atol=0, rtol=0)
    assert again.facts.attributes == ["a0", "a1", "a2"] and again.facts.lambdas == [0.5, 1.0, 0.25]
    ids = torch.tensor([[5, 6, 7]])
    folders = reward_model, tmp_path / "armo"
    one, other = (AutoModelForSequenceClassification.from_pretrained(folder)(ids).logits for folder in folders)
    assert torch.equal(one, other)
    options = source.Options(reward_model="x")
    source.objection(options, tmp_path / "armo", {})
    assert options.attributes == ["a0", "a1", "a2"]
    with pytest.raises(UserError, match="is a reward model without armo.json"):
        source.objection(options, reward_model, {})
    (tmp_path / "armo/armo/armo.safetensors").write_bytes(b"other")
    with pytest.raises(UserError, match="is not what was saved"):
        load_armo(tmp_path / "armo")


# Command lines --------------------------------------------------------------------------------------------------------

SMALL = "--gate_width 8 --gate_layers 1 --gate_steps 20 --gate_batch 16 --device cpu"


@pytest.mark.parametrize("reward_model", ["llama"], indirect=True)
def test_an_interrupted_run_keeps_its_features(reward_model, tmp_path, monkeypatch):
    turns = [Message("user", "2 + 3?"), Message("assistant", "5"), Message("assistant", "6")]
    ratings = [Ratings(uuid=str(i), messages=turns[:2], ratings={"good": i}) for i in range(5)]
    asked = [Message("user", "3 + 2?"), *turns[1:]]  # another prompt: the gate is measured on prompts that it never saw
    pairs = [
        Pair(uuid=str(i), prompt=each[:1], selected=each[:2], rejected=each[::2], consistency=c)
        for i, (c, each) in enumerate(((None, turns), (0.9, asked), (0.2, turns), (0.5, turns)))
    ]
    store.write(tmp_path / "ratings.jsonl", ratings)
    store.write(tmp_path / "pairs.jsonl", pairs)
    files = {name: tmp_path / f"{name}.jsonl" for name in ("ratings", "pairs")}
    how: dict = {"verbosity": None, "most": 0.03, "shape": GateShape(8, 1), "gate": GateTraining(2, 4), "seed": 0}
    how |= {"device": torch.device("cpu"), "bf16": False, "text": {}, "max_length": 99, "max_tokens": None}

    def job(**other):
        header = {"settings": {}, "inputs": {}}
        return armo_run.Job(reward_model, files, tmp_path / "armo", header, Provenance(), **how | other)

    given = []

    def interrupted(gate, prompts, rewards, held_out, *others):
        given.append(rewards)
        assert held_out[0] == held_out[2] != held_out[1]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(armo_run, "train_gate", interrupted)
        armo_run.make(job())
    assert len(given[0]) == 3 and torch.equal(given[0][0], given[0][2].flip(0))  # of p = 0.2 the other one is better
    monkeypatch.setattr(armo_run, "load", None)  # the reward model is not read again
    template = tmp_path / "thinking.jinja"
    template.write_text(load_chat(reward_model).template + "{%- if enable_thinking -%}{%- endif -%}")
    texts = [{"chat_template": template, "variables": each} for each in ({}, {"enable_thinking": True})]
    assert len({armo_run._Reader(job(text=text)).folder for text in texts}) == 2  # but for another text
    again = job()
    assert armo_run.make(again)["gate"]["fitted"]["pairs"] in (1, 2) and again.dropped == {armo_run.EQUAL: 1}
    assert load_armo(tmp_path / "armo").transform.equal(torch.eye(1)) and not [*tmp_path.glob(".armo*")]


@pytest.mark.parametrize("reward_model", ["llama"], indirect=True)
def test_from_ratings_and_pairs_to_rewards(looped, reward_model):
    """Another attribute, model or setting is refused in one message."""
    folder = looped.folder / "outputs/rm"
    shutil.copytree(reward_model, folder, dirs_exist_ok=True)
    texts = [f"Answer: {i}. {'Because. ' * (i % 3)}" for i in range(12)]
    turns = [[{"role": "user", "content": f"What is {i} + 1?"}, {"role": "assistant", "content": t}]
             for i, t in enumerate(texts)]  # fmt: skip
    ratings = {
        f"r{i}": {
            "messages": each,
            "ratings": {"helpful": i / 12, "verbosity": (i % 3) / 2, "rare": i if i < 4 else None},
        }
        for i, each in enumerate(turns)
    }
    pairs = {
        f"p{i}": {"prompt": each[:1], "selected": each, "rejected": [each[0], each[1] | {"content": "No."}]}
        for i, each in enumerate(turns)
    }
    looped.write("outputs/ratings.json", ratings)
    looped.write("outputs/prefs.json", pairs)
    train = f"train_armo.py {SMALL} --reward_model outputs/rm --ratings outputs/ratings.json --pairs outputs/prefs.json"
    train += " --verbosity verbosity --output_dir outputs/armo"
    out = looped.run(train).out
    assert "rare: alpha" in out and "lambda: helpful" in out and "gate: accuracy" in out
    assert "is up to date" in looped.run(train).out
    assert not [*looped.folder.glob("outputs/.armo*")]

    ask = "rewarding.py --device cpu --model tiny --input_file outputs/loop/samples.jsonl --limit_size 3 --reward armo"
    looped.run(f"{ask} --reward_model outputs/armo --output outputs/armo.json")
    record = next(iter(looped.read("outputs/armo.json").values()))
    names = ["helpful", "verbosity", "rare"]
    assert [*record["parts"]] == [*names, "coefficients"]
    for i, reward in enumerate(record["reward"]):
        coefficients = record["parts"]["coefficients"][i]
        assert coefficients == pytest.approx(record["parts"]["coefficients"][0], abs=1e-5)  # of the prompt
        attributes = [record["parts"][name][i] for name in names]
        assert reward == pytest.approx(sum(a * c for a, c in zip(attributes, coefficients, strict=True)), abs=1e-5)

    other = train.replace("outputs/armo", "outputs/other")
    wrong = other.replace("--verbosity verbosity", "--verbosity length")
    assert "--verbosity length: not an attribute" in looped.refused(wrong)
    assert "holds something else, or an ArmoRM of other settings" in looped.refused(f"{train} --corr_threshold 0.5")
    ratings["r0"]["ratings"]["coefficients"] = 1.0
    looped.write("outputs/ratings.json", ratings)
    assert "an attribute is called 'coefficients'" in looped.refused(other)
    del ratings["r0"]["ratings"]["coefficients"]
    ratings["r0"]["ratings"]["empty"] = None
    looped.write("outputs/ratings.json", ratings)
    assert "attributes need at least two ratings each; too few have: empty (0)" in looped.refused(other)
    assert "expected a reward model" in looped.refused(other.replace("outputs/rm", "outputs/loop/m1/checkpoint-last"))
    assert "holds preference pairs" in looped.refused(other.replace("ratings.json", "prefs.json"))
    policy = "--output_dir outputs/loop/m1/checkpoint-last --overwrite"
    assert "--overwrite to replace an ArmoRM" in looped.refused(train.replace("--output_dir outputs/armo", policy))
    assert (looped.folder / "outputs/loop/m1/checkpoint-last/model.safetensors").exists()
    assert "is made on one device" in looped.refused(train.replace("--device cpu", "--device cpu,cpu"))
    assert "--pairs missing" in looped.refused("train_armo.py --reward_model outputs/rm --ratings outputs/ratings.json")
    plain = f"{ask} --reward_model outputs/rm --output outputs/no.json"
    assert "is a reward model without armo.json" in looped.refused(plain)
    assert json.loads((looped.folder / "outputs/armo/armo.json").read_text())["attributes"] == names
