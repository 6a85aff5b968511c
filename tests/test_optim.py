"""AdamW with moments in bfloat16: whose numbers it has, how it rounds, what it is refused with."""

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import Parameter

from cream.cli.flags import deciding, parse
from cream.errors import UserError
from cream.training import optim, options
from cream.training.optim import AdamWBF16, round_at_random
from train import TrainConfig

SHAPES = ((40, 30), (7,), (), (300, 11))
HOW = {"lr": 1e-2, "weight_decay": 0.1}


def weights():
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def train(optimizer, ours, first=0, last=40):
    """Steps of gradients that differ a thousandfold within a tensor, the same for every optimizer."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(1000 + step)
        for p in ours:
            p.grad = torch.randn(p.shape, generator=generator) * torch.logspace(-3, 0, max(1, p.numel())).view(p.shape)
        optimizer.step()


def bits(tensors):
    return [t.detach().clone() for t in tensors]


def moments(optimizer):
    return [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]


def test_the_first_step_is_adamws_to_the_bit_and_later_ones_stay_near(monkeypatch):
    """Its moments are rounded after they were used. Chunks of any size, parts of tensors, change nothing."""
    monkeypatch.setitem(optim.CHUNK, "cpu", 100)
    plain, ours = weights(), weights()
    exact, rounded = torch.optim.AdamW(plain, fused=True, **HOW), AdamWBF16(ours, **HOW)
    for p, q in ((exact, plain), (rounded, ours)):
        train(p, q, 0, 1)
    assert all(torch.equal(p, q) for p, q in zip(plain, ours, strict=True))
    start = bits(plain)
    for p, q in ((exact, plain), (rounded, ours)):
        train(p, q, 1)
    for p, q, before in zip(plain, ours, start, strict=True):
        assert 0 < (p - q).norm() < 0.01 * (p - before).norm()
    for moment, wanted in zip(moments(rounded), moments(exact), strict=True):
        assert (moment.float() - wanted).norm() < 0.03 * wanted.norm()


def test_moments_take_half_the_memory():
    sizes = []
    for build in (torch.optim.AdamW, AdamWBF16):
        ours = weights()
        train(optimizer := build(ours, **HOW), ours, 0, 1)
        sizes.append(sum(moment.nbytes for moment in moments(optimizer)))
    assert sizes == [options.MOMENT_BYTES[name] * sum(p.numel() for p in weights()) for name in ("adamw", "adamw_bf16")]


def test_a_state_that_is_saved_and_loaded_goes_on_to_the_same_bits():
    """Whatever else draws random numbers, as dropout does: of processes each has its own."""
    whole, part = weights(), weights()
    train(AdamWBF16(whole, **HOW), whole)
    train(before := AdamWBF16(part, **HOW), part, 0, 20)
    torch.save(before.state_dict(), file := io.BytesIO())
    torch.manual_seed(5)
    (after := AdamWBF16(part, lr=1.0, weight_decay=0.0)).load_state_dict(torch.load(io.BytesIO(file.getvalue())))
    assert {moment.dtype for moment in moments(after)} == {torch.bfloat16}
    train(after, part, 20)
    assert all(torch.equal(p, q) for p, q in zip(whole, part, strict=True))


@settings(max_examples=30)
@given(st.floats(0, 2.0**100, width=32, allow_subnormal=False))
def test_rounding_is_to_a_neighbour_and_right_on_average(x):
    """Over all random bits: exactly."""
    rounded = round_at_random(torch.full((1 << 16,), x), torch.arange(1 << 16, dtype=torch.int32)).double()
    assert rounded.mean().item() == x
    low, high = rounded.unique().tolist() if len(rounded.unique()) > 1 else (x, x)
    assert low <= x <= high and high - low <= x / 128
    assert torch.equal(rounded, rounded.bfloat16().double())


def test_a_second_moment_falls_where_gradients_vanish():
    """By 0.999 a step, which rounding to the nearest would lose: 1 - 0.001 is 1 in bfloat16."""
    p = Parameter(torch.zeros(1000))
    p.grad = torch.ones(1000)
    optimizer = AdamWBF16([p], **HOW)
    optimizer.step()
    first = optimizer.state[p]["exp_avg_sq"].float().mean().item()
    p.grad.zero_()
    for _ in range(300):
        optimizer.step()
    assert optimizer.state[p]["exp_avg_sq"].float().mean().item() == pytest.approx(first * 0.999**300, rel=0.01)


def test_the_flag_decides_a_run_where_it_is_given_and_shards_are_refused():
    given = [["--model", "tiny", *more] for more in ([], ["--optim", "ADAMW_BF16"])]
    plain, ours = (parse(TrainConfig, words, description="", example="") for words in given)
    assert "optim" not in deciding(plain) and deciding(ours)["optim"] == "adamw_bf16"
    options.check_optimizer(ours.optimisation)
    ours.optimisation.deepspeed = "configs/ds_stage2.json"
    with pytest.raises(UserError, match="--optim adamw_bf16 does not work with --deepspeed"):
        options.check_optimizer(ours.optimisation)
