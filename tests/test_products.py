"""Linear layers on a CPU by oneDNN, with gradients in place, against PyTorch's own."""

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import LlamaConfig, LlamaForCausalLM

from cream.model import products
from cream.model.backbone import Backbone
from cream.model.logprobs import LogProbs
from cream.text.chat import Tokens
from cream.training.parallel import Replicas

GROUPS = [[Tokens([1, 7, 8, 9, 7, 2], [(3, 6)]), Tokens([1, 7, 8, 11, 2], [(3, 5)])]]
fast = pytest.mark.skipif(
    not torch.cpu.get_capabilities().get("avx512_f", False), reason="oneDNN's products are no faster here"
)


@pytest.fixture(params=[False, pytest.param(True, marks=fast)], ids=["PyTorch's products", "oneDNN's"])
def onednn(request, monkeypatch):
    monkeypatch.setattr(products, "LEAST", 8)
    monkeypatch.setattr(products, "onednn", lambda: request.param)
    return request.param


def close(ours, theirs, dtype=torch.float32):
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("kind", ["rows", "columns", "gaps"])
def test_products_of_any_layout(onednn, kind):
    torch.manual_seed(0)
    lay = {"rows": lambda x: x, "columns": lambda x: x.t().contiguous().t(), "gaps": lambda x: x.repeat(1, 2)[:, ::2]}
    a, b = (lay[kind](torch.randn(shape)) for shape in ((40, 16), (16, 24)))
    close(products.product(a, b), (a.double() @ b.double()).float())
    total = torch.ones(40, 24)
    products.add_product(total, a, b)
    close(total, 1 + a @ b)


def test_gaps_are_no_work_for_onednn():
    """It would multiply them 500 times as slowly."""
    rows = torch.randn(8, 8)
    assert products._dense(rows) and products._dense(rows.t()) and products._dense(rows[2:5])
    assert not products._dense(rows[:, 2:5]) and not products._dense(rows[:, 2:5].t())


@pytest.mark.parametrize("shape", [(0, 16), (3, 16), (2, 5, 16), (32, 16), (16,)])
def test_layers_of_any_number_of_rows(onednn, shape):
    """Where oneDNN would compile a product for a size that does not recur, the layer is PyTorch's own."""
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(16, 24, bias=False), torch.randn(shape)
    wanted = layer(x)
    products.install(layer)
    found = layer(x)
    assert type(layer) is products.Linear and found.shape == wanted.shape
    close(found, wanted)


def small_model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=2)).eval()


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_gradients_over_two_micro_batches_and_two_steps(onednn, monkeypatch, in_place, bf16):
    """The cast weights are those of each step; the plain layers are PyTorch's."""
    ours = small_model()
    theirs = copy.deepcopy(ours)
    ours = LogProbs(ours)
    assert type(ours.model.model.layers[0].mlp.up_proj) is products.Linear
    monkeypatch.setattr(products, "LEAST", 1000)
    theirs = LogProbs(theirs)
    assert type(theirs.model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    monkeypatch.setattr(products, "LEAST", 8)
    if in_place:
        ours.accumulate_in_place()
    for _ in range(2):
        found = []
        for model in (ours, theirs):
            for _ in range(2):
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    value = model(model.pack(GROUPS)).sum()
                value.backward()
            found.append(value)
        close(*found)
        for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert (mine.grad - other.grad).norm() <= (0.02 if bf16 else 1e-5) * other.grad.norm(), name
        for model in (ours, theirs):
            torch.optim.SGD(model.parameters(), lr=0.01).step()
            products.forget_casts(model)
            for parameter in model.parameters():
                parameter.grad.zero_()


def test_each_step_of_a_run_is_on_its_own_weights(onednn, monkeypatch):
    """Under autocast, by the fused optimiser of train.py, beside layers of which no cast is kept."""
    found = []
    for least in (8, 1000):
        monkeypatch.setattr(products, "LEAST", least)
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        model = LogProbs(small_model().train())
        weights, values = Replicas(accelerator, model, 0.01, 0.0), []
        if least == 1000:
            for parameter in model.parameters():
                del parameter.cast
        for _ in range(4):
            with accelerator.autocast():
                value = weights.model(model.pack(GROUPS)).sum()
            weights.backward(-value)
            weights.step(0.01, 1.0)
            values.append(value.item())
        found.append(values)
    ours, theirs = found
    assert ours[3] > ours[2] > ours[1] > ours[0] + 0.1
    assert ours == pytest.approx(theirs, rel=0.01)


@pytest.mark.parametrize("in_place", [False, True])
def test_recomputed_layers_have_the_same_gradients(onednn, in_place):
    found = []
    for recompute in (False, True):
        model = LogProbs(small_model())
        if recompute:
            model.model.gradient_checkpointing_enable({"use_reentrant": False})
            model.model.train()
        if in_place:
            model.accumulate_in_place()
        model(model.pack(GROUPS)).sum().backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


def test_a_frozen_weight_has_no_gradient(onednn):
    model = LogProbs(small_model().requires_grad_(False))
    model.accumulate_in_place()
    weight = model.model.model.layers[0].mlp.up_proj.weight.requires_grad_()
    model(model.pack(GROUPS)).sum().backward()
    assert [p is weight for p in model.parameters() if p.grad is not None] == [True]


def test_rows_are_rounded_up_where_products_are_compiled(onednn):
    model = LogProbs(small_model())
    assert isinstance(model, Backbone) and model.rounds_rows == onednn
    assert model.pack(GROUPS).input_ids.shape[1] == (32 if onednn else 8)


def test_the_narrow_layers_of_tiny_models_stay_as_they_are():
    model = LogProbs(small_model())
    assert not model.rounds_rows and not any(isinstance(layer, products.Linear) for layer in model.modules())
