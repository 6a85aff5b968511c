"""The preference loss against its closed form and against trl's own loss code; the SFT loss against torch's."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cream.losses import preference_loss

BETA = 0.1


def logps(batch=64, seed=0):
    """Summed log-probabilities of answers of some hundred tokens: policy and reference, chosen and rejected."""
    generator = torch.Generator().manual_seed(seed)
    reference = -100 - 100 * torch.rand(2, batch, generator=generator)
    policy = reference + 20 * torch.randn(2, batch, generator=generator)
    return policy[0], policy[1], reference[0], reference[1]


def test_without_consistency_it_is_dpo():
    pc, pr, rc, rr = logps()
    losses, margins = preference_loss(pc, pr, rc, rr, BETA)
    h = [BETA * ((a - c) - (b - d)) for a, b, c, d in zip(*(x.tolist() for x in (pc, pr, rc, rr)), strict=True)]
    assert margins.tolist() == pytest.approx(h, abs=1e-5)
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-x)) for x in h], abs=1e-5)
    assert torch.equal(preference_loss(pc, pr, rc, rr, BETA, 1.0)[0], losses)


def test_log_two_at_the_first_step_for_any_consistency():
    pc, pr, _, _ = logps()
    losses, margins = preference_loss(pc, pr, pc, pr, BETA, torch.linspace(0, 1, 64))
    assert margins.abs().max() == 0
    torch.testing.assert_close(losses, torch.full((64,), math.log(2)), atol=1e-7, rtol=0)


def test_no_gradient_at_one_half_and_zero_margin():
    policy = torch.tensor([-50.0, -70.0], requires_grad=True)
    preference_loss(policy[:1], policy[1:], policy[:1].detach(), policy[1:].detach(), BETA, 0.5)[0].sum().backward()
    assert policy.grad.tolist() == [0, 0]


@given(
    st.lists(st.tuples(st.floats(-300, 300), st.floats(0, 1)), min_size=1, max_size=20),
    st.sampled_from([0.1, 1.0, 3.0]),
)
def test_gradient_is_beta_times_sigma_minus_c(pairs, beta):
    margin = torch.tensor([m for m, _ in pairs], requires_grad=True)
    c = torch.tensor([c for _, c in pairs])
    zero = torch.zeros_like(c)
    losses, h = preference_loss(margin, zero, zero, zero, beta, c)
    assert torch.isfinite(losses).all()
    losses.sum().backward()
    torch.testing.assert_close(margin.grad, beta * (torch.sigmoid(h.detach()) - c), atol=1e-6, rtol=1e-6)


@given(st.floats(-30, 30), st.floats(0, 1))
def test_swapping_the_pair_swaps_the_consistency(margin, c):
    m, zero = torch.tensor([margin]), torch.zeros(1)
    forward, _ = preference_loss(m, zero, zero, zero, 1.0, c)
    swapped, _ = preference_loss(zero, m, zero, zero, 1.0, 1 - torch.tensor([c]))
    torch.testing.assert_close(forward, swapped)


@given(st.floats(0.02, 0.98))
def test_the_optimum_is_the_logit_of_c(c):
    h = torch.linspace(-6, 6, 12001)
    zero = torch.zeros_like(h)
    losses, _ = preference_loss(h, zero, zero, zero, 1.0, c)
    assert abs(h[losses.argmin()].item() - math.log(c / (1 - c))) < 0.02  # the minimum is flat to float32 around it


def test_half_precision_comes_back_as_float32():
    losses, margins = preference_loss(*(x.bfloat16() for x in logps()), BETA, 0.8)
    assert losses.dtype == margins.dtype == torch.float32


def trl_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, loss_type, smoothing):
    """The mean loss that trl's DPOTrainer computes when its model returns these log-probabilities.

    DPOTrainer._compute_loss is the real one; it runs on an object with the settings that its constructor would have
    set, and on a model of sequences of one prompt and one answer token.
    """
    from trl import DPOTrainer

    pairs = len(policy_chosen)
    answers = torch.cat([policy_chosen, policy_rejected]).unsqueeze(1)
    outputs = SimpleNamespace(
        log_probs=answers, entropy=answers, mean_logits=answers, is_top1=torch.ones_like(answers, dtype=torch.bool)
    )
    trainer = SimpleNamespace(
        model=torch.nn.Identity(),
        accelerator=SimpleNamespace(device=answers.device, gather=lambda x: x, gather_for_metrics=lambda x: x),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        label_smoothing=smoothing,
        beta=BETA,
        use_weighting=False,
    )
    ids = torch.ones(2 * pairs, 2, dtype=torch.long)
    inputs = {
        "input_ids": ids,
        "attention_mask": ids,
        "completion_mask": torch.tensor([[0, 1]]).expand(2 * pairs, 2),
        "ref_chosen_logps": reference_chosen,
        "ref_rejected_logps": reference_rejected,
    }
    return DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, return_outputs=False)


def with_gradients(loss, arguments):
    """The loss's value and its gradients with respect to the policy's log-probabilities, chosen and rejected."""
    policy = [x.clone().requires_grad_() for x in arguments[:2]]
    value = loss(*policy, *arguments[2:])
    return value, *torch.autograd.grad(value, policy)


def assert_equal_to_trl(arguments, c, loss_type, smoothing):
    ours = with_gradients(lambda *x: preference_loss(*x, BETA, c)[0].mean(), arguments)
    theirs = with_gradients(lambda *x: trl_loss(*x, loss_type, smoothing), arguments)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("c", [0.0, 0.1, 0.46, 0.5, 0.7, 0.92, 1.0])
def test_equals_trl_with_label_smoothing(c):
    """trl 1.16 ignores label_smoothing for `sigmoid`; `aot` honours it and on a batch of one sorts nothing."""
    arguments = logps(batch=40)
    for i in range(40):
        assert_equal_to_trl([x[i : i + 1] for x in arguments], c, "aot", 1 - c)


@pytest.mark.slow
def test_equals_trl_with_a_consistency_per_pair():
    """`robust` at e' = -e / (1 - 2e) is label smoothing by e, for e < 1/2, and its formula takes one e' a pair."""
    c = torch.linspace(0.55, 1.0, 64)
    epsilon = 1 - c
    assert_equal_to_trl(logps(), c, "robust", -epsilon / (1 - 2 * epsilon))


@pytest.mark.slow
def test_equals_trl_dpo_without_consistency():
    assert_equal_to_trl(logps(), None, "sigmoid", 0.0)
