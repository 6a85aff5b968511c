"""The preference loss against its closed form and against trl's own loss code; the SFT loss against torch's."""

import math
from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cream.losses import hinge, ipo, likelihood_loss, log_ratio, preference_loss, sigmoid, simpo

BETA = 0.1


def dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta, c=None):
    scores = log_ratio(policy_chosen, reference_chosen), log_ratio(policy_rejected, reference_rejected)
    return preference_loss(*scores, beta, c)


def logps(batch=64, seed=0):
    """Summed log-probabilities of answers of some hundred tokens: policy and reference, chosen and rejected."""
    generator = torch.Generator().manual_seed(seed)
    reference = -100 - 100 * torch.rand(2, batch, generator=generator)
    policy = reference + 20 * torch.randn(2, batch, generator=generator)
    return policy[0], policy[1], reference[0], reference[1]


def test_without_consistency_it_is_dpo():
    pc, pr, rc, rr = logps()
    losses, margins = dpo_loss(pc, pr, rc, rr, BETA)
    h = [BETA * ((a - c) - (b - d)) for a, b, c, d in zip(*(x.tolist() for x in (pc, pr, rc, rr)), strict=True)]
    assert margins.tolist() == pytest.approx(h, abs=1e-5)
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-x)) for x in h], abs=1e-5)
    assert torch.equal(dpo_loss(pc, pr, rc, rr, BETA, 1.0)[0], losses)


def test_log_two_at_the_first_step_for_any_consistency():
    pc, pr, _, _ = logps()
    losses, margins = dpo_loss(pc, pr, pc, pr, BETA, torch.linspace(0, 1, 64))
    assert margins.abs().max() == 0
    torch.testing.assert_close(losses, torch.full((64,), math.log(2)), atol=1e-7, rtol=0)


def test_no_gradient_at_one_half_and_zero_margin():
    policy = torch.tensor([-50.0, -70.0], requires_grad=True)
    dpo_loss(policy[:1], policy[1:], policy[:1].detach(), policy[1:].detach(), BETA, 0.5)[0].sum().backward()
    assert policy.grad.tolist() == [0, 0]


@given(
    st.lists(st.tuples(st.floats(-300, 300), st.floats(0, 1)), min_size=1, max_size=20),
    st.sampled_from([0.1, 1.0, 3.0]),
)
def test_gradient_is_beta_times_sigma_minus_c(pairs, beta):
    margin = torch.tensor([m for m, _ in pairs], requires_grad=True)
    c = torch.tensor([c for _, c in pairs])
    zero = torch.zeros_like(c)
    losses, h = dpo_loss(margin, zero, zero, zero, beta, c)
    assert torch.isfinite(losses).all()
    losses.sum().backward()
    torch.testing.assert_close(margin.grad, beta * (torch.sigmoid(h.detach()) - c), atol=1e-6, rtol=1e-6)


@given(st.floats(-30, 30), st.floats(0, 1))
def test_swapping_the_pair_swaps_the_consistency(margin, c):
    m, zero = torch.tensor([margin]), torch.zeros(1)
    forward, _ = dpo_loss(m, zero, zero, zero, 1.0, c)
    swapped, _ = dpo_loss(zero, m, zero, zero, 1.0, 1 - torch.tensor([c]))
    torch.testing.assert_close(forward, swapped)


@given(st.floats(0.02, 0.98))
def test_the_optimum_is_the_logit_of_c(c):
    h = torch.linspace(-6, 6, 12001)
    zero = torch.zeros_like(h)
    losses, _ = dpo_loss(h, zero, zero, zero, 1.0, c)
    assert abs(h[losses.argmin()].item() - math.log(c / (1 - c))) < 0.02  # the minimum is flat to float32 around it


def test_half_precision_comes_back_as_float32():
    arguments = [x.bfloat16() for x in logps()]
    for c in (0.8, torch.full((64,), 0.8, dtype=torch.float64)):  # C as it is read from a file
        losses, margins = dpo_loss(*arguments, BETA, c)
        assert losses.dtype == margins.dtype == likelihood_loss(*logps()[:2], c).dtype == torch.float32


def test_the_consistency_goes_to_the_device_of_the_scores():
    chosen, rejected = torch.empty(2, 3, device="meta")
    c = torch.tensor([0.9, 0.5, 0.2])
    assert preference_loss(chosen, rejected, BETA, c)[0].device.type == "meta"
    assert likelihood_loss(chosen, rejected, c).device.type == "meta"


def trl_loss(arguments, loss_types, tokens=None, weights=(1.0,), smoothing=0.0):
    """The mean loss that trl's DPOTrainer computes when its model returns these log-probabilities.

    DPOTrainer._compute_loss is the real one; it runs on an object with the settings that its constructor would have
    set, and on a model of sequences of one prompt token and responses of `tokens` (B,) chosen and rejected tokens (one
    each by default), whose summed log-probability falls on the first.
    """
    from trl import DPOTrainer

    policy_chosen, policy_rejected, reference_chosen, reference_rejected = arguments
    counts = torch.ones(2 * len(policy_chosen), dtype=torch.long) if tokens is None else torch.cat(tokens).long()
    mask = (torch.arange(counts.max()) < counts[:, None]).long()
    summed = torch.cat([policy_chosen, policy_rejected])
    logps = torch.cat([summed.unsqueeze(1), torch.zeros(len(summed), counts.max() - 1)], dim=1)
    outputs = SimpleNamespace(
        log_probs=logps, entropy=logps, mean_logits=logps, is_top1=torch.ones_like(logps, dtype=torch.bool)
    )
    trainer = SimpleNamespace(
        model=torch.nn.Identity(),
        accelerator=SimpleNamespace(device=logps.device, gather=lambda x: x, gather_for_metrics=lambda x: x),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=list(loss_types),
        loss_weights=list(weights),
        label_smoothing=smoothing,
        beta=BETA,
        use_weighting=False,
    )
    prompt = torch.ones(len(counts), 1, dtype=torch.long)
    inputs = {
        "input_ids": torch.ones(len(counts), 1 + mask.shape[1], dtype=torch.long),
        "attention_mask": torch.cat([prompt, mask], dim=1),
        "completion_mask": torch.cat([0 * prompt, mask], dim=1),
        "ref_chosen_logps": reference_chosen,
        "ref_rejected_logps": reference_rejected,
    }
    return DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, return_outputs=False)


def cpo_loss(arguments, loss_type, gamma=0.0, smoothing=0.0):
    """The mean loss of trl's CPOTrainer, which has SimPO: of what it calls log-probabilities, means per token."""
    from trl.experimental.cpo import CPOTrainer

    trainer = SimpleNamespace(alpha=0.0, beta=BETA, label_smoothing=smoothing, simpo_gamma=gamma, loss_type=loss_type)
    trainer.accelerator = SimpleNamespace(device=arguments[0].device)
    return CPOTrainer.cpo_loss(trainer, *arguments[:2])[0].mean()


def with_gradients(loss, arguments):
    """The loss's value and its gradients with respect to the policy's log-probabilities, chosen and rejected."""
    policy = [x.clone().requires_grad_() for x in arguments[:2]]
    value = loss([*policy, *arguments[2:]])
    return value, *torch.autograd.grad(value, policy)


def assert_equal(ours, theirs, arguments):
    for mine, other in zip(with_gradients(ours, arguments), with_gradients(theirs, arguments), strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-6)


def ours(arguments, loss=sigmoid, c=None, tokens=(1.0, 1.0)):
    scores = [log_ratio(*each) / count for *each, count in zip(arguments[:2], arguments[2:], tokens, strict=True)]
    return preference_loss(*scores, BETA, c, loss)[0].mean()


def lengths(batch=64, seed=1):
    """Tokens of chosen and rejected responses."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 200, (batch,), generator=generator) for _ in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("c", [0.0, 0.1, 0.46, 0.5, 0.7, 0.92, 1.0])
def test_equals_trl_with_label_smoothing(c):
    """trl 1.16 ignores label_smoothing for `sigmoid`; `aot` honours it and on a batch of one sorts nothing."""
    arguments = logps(batch=40)
    for i in range(40):
        one = [x[i : i + 1] for x in arguments]
        assert_equal(lambda x: ours(x, c=c), lambda x: trl_loss(x, ["aot"], smoothing=1 - c), one)


@pytest.mark.slow
def test_equals_trl_with_a_consistency_per_pair():
    """`robust` at e' = -e / (1 - 2e) is label smoothing by e, for e < 1/2, and its formula takes one e' a pair."""
    c = torch.linspace(0.55, 1.0, 64)
    epsilon = 1 - c
    smoothing = -epsilon / (1 - 2 * epsilon)
    assert_equal(lambda x: ours(x, c=c), lambda x: trl_loss(x, ["robust"], smoothing=smoothing), logps())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, loss, per_token",
    [("sigmoid", sigmoid, False), ("hinge", hinge, False), ("ipo", partial(ipo, beta=BETA), True)]
    + [("sigmoid_norm", sigmoid, True)],
)
def test_equals_trl_by_name(name, loss, per_token):
    """trl's ipo and sigmoid_norm take means per token, its other losses sums."""
    tokens = lengths()
    mine = tokens if per_token else (1.0, 1.0)
    assert_equal(lambda x: ours(x, loss, tokens=mine), lambda x: trl_loss(x, [name], tokens), logps())


@pytest.mark.slow
@pytest.mark.parametrize("gamma, c", [(0.5, None), (1.6, None), (0.0, None), (0.0, 0.7), (0.0, 0.2)])
def test_simpo_equals_trl(gamma, c):
    """With C, where gamma is 0: there trl's label smoothing is the mixture with the pair turned round."""
    arguments = [x / n for x, n in zip(logps()[:2], lengths(), strict=True)]
    zero = torch.zeros(64)
    loss = partial(simpo, gamma=gamma)
    smoothing = 0.0 if c is None else 1 - c
    assert_equal(lambda x: ours([*x, zero, zero], loss, c), lambda x: cpo_loss(x, "simpo", gamma, smoothing), arguments)


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_the_likelihood_term_equals_trl(alpha):
    """trl's mean is over the tokens of a batch, the paper's and ours over a pair's, then over pairs: equal in a batch
    of one pair, and in one whose chosen responses have as many tokens."""

    def mine(arguments, tokens):
        means = [x / n for x, n in zip(arguments[:2], tokens, strict=True)]
        return ours(arguments) + alpha * likelihood_loss(*means).mean()

    arguments, (chosen, rejected) = logps(batch=40), lengths(batch=40)
    cases = [([x[i : i + 1] for x in arguments], [chosen[i : i + 1], rejected[i : i + 1]]) for i in range(40)]
    for case, tokens in [*cases, (arguments, [torch.full((40,), 37), rejected])]:
        theirs = partial(trl_loss, loss_types=["sigmoid", "sft"], tokens=tokens, weights=[1.0, alpha])
        assert_equal(partial(mine, tokens=tokens), theirs, case)


@pytest.mark.parametrize("loss", [sigmoid, hinge, partial(simpo, gamma=0.0)])
@given(st.floats(-5, 5), st.floats(0, 1))
def test_a_mixture_is_the_loss_of_the_pair_and_of_the_pair_turned_round(loss, margin, c):
    m, zero = torch.tensor([margin]), torch.zeros(1)
    mixed, _ = preference_loss(m, zero, 1.0, c, loss)
    one, other = (preference_loss(*pair, 1.0, None, loss)[0] for pair in ((m, zero), (zero, m)))
    torch.testing.assert_close(mixed, c * one + (1 - c) * other)


@given(st.floats(-5, 5), st.floats(0, 1))
def test_c_would_only_move_the_target_of_ipo(margin, c):
    """Why --loss ipo takes no C: the mixture's gradient is that of ipo with the target (2C - 1) / (2 beta)."""
    h = torch.tensor([margin], dtype=torch.float64, requires_grad=True)
    mixed = c * ipo(h, beta=0.5) + (1 - c) * ipo(-h, beta=0.5)
    moved = (h / 0.5 - (2 * c - 1) / (2 * 0.5)) ** 2
    torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), h)[0] for loss in (mixed, moved)))


def test_with_a_target_margin_trls_label_smoothing_is_no_mirror_image():
    """Why --loss simpo takes no C unless gamma is 0: trl keeps gamma where the pair is turned round, swapping does
    not."""
    h = torch.linspace(-3, 3, 7)
    swapped, kept = simpo(-h, gamma=0.5), simpo(-h, gamma=-0.5)
    ours, theirs = (0.7 * simpo(h, gamma=0.5) + 0.3 * other for other in (swapped, kept))
    trl = [cpo_loss([x[None] / BETA, torch.zeros(1)], "simpo", 0.5, 0.3) for x in h]
    torch.testing.assert_close(torch.stack(trl), theirs)
    assert (ours - theirs).abs().min() > 0.01


@given(st.floats(-8, 8))
def test_losses_by_hand(h):
    margin = torch.tensor([h], dtype=torch.float64)
    assert hinge(margin).item() == pytest.approx(max(0, 1 - h))
    assert ipo(margin, beta=0.1).item() == pytest.approx((10 * h - 5) ** 2)
    assert simpo(margin, gamma=0.5).item() == pytest.approx(math.log1p(math.exp(0.5 - h)))


def test_the_likelihood_term_counts_the_pair_turned_round_by_c():
    chosen, rejected = torch.tensor([-2.0, -2.0, -2.0]), torch.tensor([-3.0, -3.0, -3.0])
    assert likelihood_loss(chosen, rejected).tolist() == [2, 2, 2]
    assert likelihood_loss(chosen, rejected, torch.tensor([1.0, 0.5, 0.0])).tolist() == [2, 2.5, 3]
