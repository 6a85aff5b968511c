"""Policy gradients: the gradient of a plain implementation, response by response, and trl's loss; estimators of the KL
divergence; rewards that teach nothing; data and flags that cannot be trained on."""

import json
import logging
import math
from collections import Counter, defaultdict
from types import SimpleNamespace

import pytest
import torch

from cream import losses
from cream.advantages import deviation, group_relative, leave_one_out
from cream.errors import UserError
from cream.model.load import load_policy
from cream.model.logprobs import LogProbs
from cream.records import Message, Rewards
from cream.training.stages import grpo, rloo

ANSWERS = ["Answer: 7", "5 + 3 = 8. Answer: 8", "5 + 3 = 8. " * 3, "Answer: 7", "Answer: 12"]
REWARDS = [[1.0, 0.0, 0.25, 1.0, None], [0.5, 2.0, -1.0, 0.5, 0.0]]  # the first and the fourth response are equal


def records(rewards=REWARDS, **more):
    found = []
    for i, group in enumerate(rewards):
        prompt = [Message("user", f"Tom has {20 + i} books. How many now?")]
        response = [[*prompt, Message("assistant", text)] for text in ANSWERS[: len(group)]]
        finish = ["length" if text.endswith(". ") else "stop" for text in ANSWERS[: len(group)]]
        found.append(
            Rewards(uuid=f"u{i}", prompt=prompt, response=response, reward=group, finish_reason=finish, **more)
        )
    return found


def make(stage, about=(), **options):
    return stage.Stage(stage.Options(**options), dict(about))


def prepared(stage, chat, given=None, dropped=None):
    rows = stage.prepare(given or records(), chat, 128, Counter() if dropped is None else dropped)
    return [example for _, example in rows]


@pytest.fixture(scope="module")
def model(tiny_folder):
    return LogProbs(load_policy(tiny_folder, torch.float32, torch.device("cpu")))


def plain_logps(model, tokens):
    """log π of a response's tokens, by the library's model on this row alone."""
    ids = torch.tensor([tokens.ids])
    logps = model.plain(ids).logits[0, :-1].log_softmax(-1)
    return logps[torch.tensor(tokens.predicted()) - 1, ids[0, tokens.predicted()]]


@pytest.fixture
def padded(tiny_folder):
    """The same weights, over padded rows."""
    return LogProbs(load_policy(tiny_folder, torch.float32, torch.device("cpu")), share=False)


def disturbed(padded, stage, examples, name, seed, sums=False):
    """Other policies' log-probabilities: near this one's, some beyond the clip."""
    noise = torch.Generator().manual_seed(seed)
    for example in examples:
        with torch.no_grad():
            rows = [plain_logps(padded, tokens) for tokens in stage.group(example)]
        moved = [row + 0.3 * torch.randn(len(row), generator=noise) for row in rows]
        setattr(example, name, [row.sum().item() if sums else row.tolist() for row in moved])


def plain_loss(padded, stage, examples, kl_coef):
    """The sum over all responses, equal ones each, in plain words."""
    o, total = stage.options, 0.0
    tokens = [n * t.num_response_tokens for e in examples for t, n in zip(e.rows, e.counts, strict=True)]
    mean_tokens = sum(tokens) / sum(sum(e.counts) for e in examples)
    for e in examples:
        for row, count, a, old, ref in zip(e.rows, e.counts, e.advantages, e.behaviour, e.kl_reference, strict=True):
            logp = plain_logps(padded, row)
            ratio = logp - torch.tensor(old) if isinstance(old, list) else logp.sum() - old
            if stage.ratio == "sequence":
                ratio = ratio.mean() if stage.kl_in == "loss" else ratio.sum()
            w = ratio.exp()
            terms = -torch.minimum(w * a, torch.clamp(w, 1 - o.clip_low, 1 + o.clip_high) * a)
            if kl_coef:
                back = torch.tensor(ref) - logp
                kl = {"k2": back**2 / 2, "k3": back.exp() - back - 1}[stage.kl_estimator]
                terms = terms + kl_coef * kl
            if stage.ratio == "sequence":
                value = terms.mean()
            else:
                value = (
                    terms.sum()
                    / {"response": len(logp), "token": mean_tokens, "constant": o.loss_constant}[stage.loss_norm]
                )
            total = total + count * value
    return total


def gradient(model, loss):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


CASES = [
    (rloo, {}),
    (rloo, {"ratio": "token", "clip_high": 0.28}),
    (rloo, {"ratio": "token", "loss_norm": "token", "mask_truncated": True}),
    (grpo, {}),
    (grpo, {"kl_coef": 0.3, "kl_reference": "some", "loss_norm": "constant", "loss_constant": 40.0}),
    (grpo, {"kl_coef": 0.3, "kl_reference": "some", "kl_estimator": "k2", "ratio": "sequence", "clip_high": 0.01}),
]


@pytest.mark.parametrize("stage, options", CASES)
def test_the_gradient_is_that_of_a_plain_implementation(model, padded, tiny_chat, stage, options):
    stage = make(stage, **options)
    examples = prepared(stage, tiny_chat)
    disturbed(padded, stage, examples, "behaviour", seed=1)
    disturbed(padded, stage, examples, "kl_reference", seed=2)
    loss, metrics = stage.loss(model, model.pack([stage.group(e) for e in examples]), examples)
    wanted = plain_loss(padded, stage, examples, stage.options.kl_coef)
    assert metrics["clipped"] > 0 and metrics["ratio_max"] > 1
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
    found, wanted = gradient(model, loss), gradient(padded, wanted)
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


def test_advantages_are_of_the_whole_group(tiny_chat):
    """Equal responses are one row that counts twice; one without a reward is in no group, a masked one is."""
    first, second = prepared(make(rloo), tiny_chat)
    assert (len(first.rows), first.counts, first.truncated) == (3, [2, 1, 1], [False, False, True])
    assert first.advantages == pytest.approx([leave_one_out(REWARDS[0])[i] for i in (0, 1, 2)])
    assert second.advantages == pytest.approx([leave_one_out(REWARDS[1])[i] for i in (0, 1, 2, 4)])
    masked, _ = prepared(make(rloo, mask_truncated=True), tiny_chat)
    assert masked.counts == [2, 1] and masked.advantages == pytest.approx(first.advantages[:2])
    filled, _ = prepared(make(rloo, missing_reward=-1.0), tiny_chat)
    assert filled.advantages == pytest.approx([leave_one_out([1.0, 0.0, 0.25, 1.0, -1.0])[i] for i in (0, 1, 2, 4)])
    _, second = prepared(make(grpo), tiny_chat)
    scale = deviation(REWARDS[1]) + 1e-4
    assert second.advantages == pytest.approx([group_relative(REWARDS[1])[i] / scale for i in (0, 1, 2, 4)])
    whole = deviation([r for group in REWARDS for r in group]) + 1e-4
    _, second = prepared(make(grpo, divide_by_std="file"), tiny_chat)
    assert second.advantages == pytest.approx([group_relative(REWARDS[1])[i] / whole for i in (0, 1, 2, 4)])


def test_the_kl_term_of_rloo_is_part_of_the_reward(padded, tiny_chat):
    """Whatever estimates it: per token, or by the sampler's sum."""
    for options in ({"kl_estimator": "k1"}, {"kl_estimator": "k3"}, {"behaviour": "sampler"}):
        stage = make(rloo, kl_coef=0.2, kl_reference="base", **options)
        given = records(REWARDS[1:], logprob=[-3.0, -4.0, -5.0, -3.0, -6.0])
        examples = prepared(stage, tiny_chat, given)
        before = examples[0].advantages
        disturbed(padded, stage, examples, "kl_reference", seed=2)
        if stage.reference:
            disturbed(padded, stage, examples, "behaviour", seed=1)
        stage.settle(examples)
        (e,), rewards = examples, []
        for r, own, other in zip(e.rewards, e.behaviour, e.kl_reference, strict=True):
            ratios = [own - sum(other)] if isinstance(own, float) else [a - b for a, b in zip(own, other, strict=True)]
            kl = sum(math.exp(-x) - 1 + x if stage.kl_estimator == "k3" else x for x in ratios)
            rewards.append(r - 0.2 * kl)
        wanted = leave_one_out([rewards[0], *rewards])[1:]
        assert e.advantages == pytest.approx(wanted) and e.advantages != pytest.approx(before)


# trl ----------------------------------------------------------------------------------------------------------------


def trl_loss(trainer_class, logps, old, reference, advantage, mask, **settings):
    """The mean loss of trl's trainer when its model returns these log-probabilities, (B, T) each."""
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, torch.zeros_like(logps), None),
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1),
        model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
        epsilon_low=0.2,
        epsilon_high=0.2,
        aux_loss_enabled=False,
        **settings,
    )
    prompt = torch.ones(len(logps), 1, dtype=torch.long)
    inputs = {"prompt_ids": prompt, "prompt_mask": prompt, "completion_ids": mask.long(), "completion_mask": mask}
    inputs |= {"old_logps": (old * mask).sum(1), "old_per_token_logps": old, "ref_per_token_logps": reference}
    return trainer_class._compute_loss(trainer, None, inputs | {"advantages": advantage})


GRPO = {
    "off_policy_mask_threshold": None,
    "top_entropy_quantile": 1.0,
    "use_vllm": False,
    "_entropy_bonus_enabled": False,
}
GRPO |= {"current_gradient_accumulation_steps": 1, "max_completion_length": 40}
GRPO |= {"args": SimpleNamespace(use_bias_correction_kl=False, delta=None)}
LIKE_TRL = [  # stage, its flags, trl's settings
    (rloo, {}, {}),
    (grpo, {}, {"loss_type": "grpo", "importance_sampling_level": "token", "beta": 0.0}),
    (grpo, {"kl_coef": 0.3}, {"loss_type": "grpo", "importance_sampling_level": "token", "beta": 0.3}),
    (grpo, {"ratio": "sequence"}, {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.0}),
    (grpo, {"loss_norm": "token"}, {"loss_type": "bnpo", "importance_sampling_level": "token", "beta": 0.0}),
    (
        grpo,
        {"loss_norm": "constant", "loss_constant": 40.0, "divide_by_std": "no"},
        {"loss_type": "dr_grpo", "importance_sampling_level": "token", "beta": 0.0},
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("stage, options, settings", LIKE_TRL)
def test_the_loss_is_trls(model, padded, tiny_chat, stage, options, settings):
    from trl import GRPOTrainer, RLOOTrainer

    trainer, more = (RLOOTrainer, {}) if stage is rloo else (GRPOTrainer, GRPO)
    stage = make(stage, **options | ({"kl_reference": "some"} if "kl_coef" in options else {}))
    examples = prepared(stage, tiny_chat)
    disturbed(padded, stage, examples, "behaviour", seed=1)
    disturbed(padded, stage, examples, "kl_reference", seed=2)
    loss, _ = stage.loss(model, model.pack([stage.group(e) for e in examples]), examples)
    columns = [[], [], [], []]  # a row for every response that was sampled
    for e in examples:
        for row, n, *values in zip(e.rows, e.counts, e.behaviour, e.kl_reference, e.advantages, strict=True):
            for column, value in zip(columns, [plain_logps(padded, row), *map(torch.tensor, values)], strict=True):
                column += [value] * n
    *padded_rows, advantage = columns
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row)) for row in padded_rows[0]], batch_first=True)
    logps, old, ref = (torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) for rows in padded_rows)
    wanted = trl_loss(trainer, logps, old, ref, torch.stack(advantage), mask, **settings, **more)
    mean = loss / sum(map(stage.weight, examples))
    torch.testing.assert_close(mean, wanted, rtol=1e-5, atol=1e-6)
    found, wanted = gradient(model, mean), gradient(padded, wanted)
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


# Estimators ---------------------------------------------------------------------------------------------------------


def test_the_estimators_means_and_gradients_by_enumeration():
    """Of a categorical of six values: k1 and k3 are unbiased, k2 nearly. In a loss, k2's gradient is that of
    KL(p || q), k3's that of KL(q || p), and k1's is 0."""
    torch.manual_seed(0)
    logits, other = torch.randn(6, dtype=torch.float64, requires_grad=True), torch.randn(6, dtype=torch.float64)
    log_p, log_q = logits.log_softmax(-1), other.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    kl, back = (p * (log_p - log_q)).sum(), (q * (log_q - log_p)).sum()

    def mean(values):
        return (p.detach() * values).sum()

    def slope(value):
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    k1, k2, k3 = (estimate(log_p - log_q) for estimate in (losses.k1, losses.k2, losses.k3))
    torch.testing.assert_close(mean(k1), kl)
    torch.testing.assert_close(mean(k3), kl)
    assert (k2 >= 0).all() and (k3 >= 0).all() and k1.min() < 0
    assert mean((k3 - kl) ** 2) < mean((k1 - kl) ** 2)
    near = (log_p.detach() - (log_p + 0.01 * other).log_softmax(-1)).detach()
    exact = (p.detach() * near).sum()
    torch.testing.assert_close((p.detach() * losses.k2(near)).sum(), exact, rtol=0.02, atol=0)
    torch.testing.assert_close(slope(mean(k1)), torch.zeros(6, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(slope(mean(k2)), slope(kl))
    torch.testing.assert_close(slope(mean(k3)), slope(back))


def test_what_the_clip_decides_has_no_gradient():
    ratio = torch.tensor([0.5, 0.5, 1.0, 1.0, 1.5, 1.5])
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    log_ratio = ratio.log().requires_grad_()
    values, cut = losses.clipped(log_ratio, advantage, 0.2, 0.3)
    assert cut.tolist() == [False, True, False, False, True, False]
    torch.testing.assert_close(values.detach(), torch.tensor([-0.5, 0.8, -1.0, 1.0, -1.3, 1.5]))
    (slope,) = torch.autograd.grad(values.sum(), log_ratio)
    torch.testing.assert_close(slope, torch.where(cut, 0.0, -ratio * advantage))


# What cannot be learned from ----------------------------------------------------------------------------------------


def test_equal_rewards_have_no_gradient_and_are_counted(model, tiny_chat, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("cream"), "propagate", True)
    given, dropped = records([[1 / 3] * 5, [1 / 3, None, 1 / 3]]), Counter()
    for kind in (rloo, grpo):
        stage = make(kind)
        examples = prepared(stage, tiny_chat, given)
        assert stage.facts(examples)["groups_without_gradient"] == 2
        loss, metrics = stage.loss(model, model.pack([stage.group(e) for e in examples]), examples)
        assert not gradient(model, loss).any() and metrics["no_gradient"] == 7
    assert "all rewards of every group are equal: nothing can be learned" in caplog.text
    stage = make(rloo, drop_equal=True)
    assert len(prepared(stage, tiny_chat, given + records()[1:], dropped)) == 1
    assert dropped == {"all rewards are equal (--drop_equal)": 2}


def test_the_behaviour_policy_may_be_the_samplers_sums(model, padded, tiny_chat):
    """A response without one of its own counts in the mean of its group; its tokens' number says whose the sum is."""
    given = records(REWARDS[1:], logprob=[-3.0, None, -9.0, -3.0, -4.0])
    stage = make(rloo, behaviour="sampler")
    (e,) = prepared(stage, tiny_chat, given)
    assert e.behaviour == [-3.0, -9.0, -4.0] and e.counts == [2, 1, 1] and stage.reference is None
    assert e.advantages == pytest.approx([leave_one_out(REWARDS[1])[i] for i in (0, 2, 4)])
    loss, metrics = stage.loss(model, model.pack([stage.group(e)]), [e])
    torch.testing.assert_close(loss, plain_loss(padded, stage, [e], 0.0), rtol=1e-5, atol=1e-5)
    right = [row.num_response_tokens for row in e.rows]
    given[0].num_tokens = [right[0], 9, right[1] + 1, right[0], right[2]]
    (e,) = prepared(stage, tiny_chat, given)
    assert e.behaviour == [-3.0, -4.0]
    assert stage.skipped == {"no log-probability of the sampler's for these tokens": 2}
    given[0].logprob = None
    with pytest.raises(UserError, match="'u0' has no `logprob`: --behaviour sampler"):
        prepared(stage, tiny_chat, given)
    stage.check_first({"log_ratio_abs": 3.0}, 1e-3)
    with pytest.raises(UserError, match="differs from the starting policy's by 3 nats"):
        make(grpo).check_first({"log_ratio_abs": 3.0}, 1e-3)


def test_groups_of_one_are_refused(tiny_chat):
    with pytest.raises(UserError, match="record 'u1' has one response.*--gen_n 2 or more"):
        prepared(make(rloo), tiny_chat, records([[1.0, 0.0], [1.0]]))
    dropped = Counter()
    assert len(prepared(make(rloo), tiny_chat, records([[1.0, 0.0], [1.0, None, None]]), dropped)) == 1
    assert dropped == {"fewer than two of its responses have a reward": 1}


REFUSED = [
    (rloo, {"behaviour": "sampler", "ratio": "token"}, "needs one per token"),
    (grpo, {"behaviour": "sampler"}, "needs one per token"),
    (rloo, {"kl_coef": 0.1}, "--kl_coef needs --kl_reference"),
    (rloo, {"kl_coef": 0.1, "kl_reference": "start"}, "and so always 0"),
    (rloo, {"kl_reference": "base", "kl_estimator": "k2"}, "--kl_estimator k2: there is no KL term"),
    (grpo, {"kl_coef": 0.1, "kl_estimator": "k1"}, "its gradient is 0 on average"),
    (rloo, {"kl_coef": 0.1, "kl_reference": "base", "kl_estimator": "k3", "behaviour": "sampler"}, "give k1"),
    (rloo, {"loss_norm": "token"}, "a response is one term"),
    (grpo, {"loss_constant": 9.0}, "belongs to --ratio token with --loss_norm constant"),
    (rloo, {"reward_baseline": 0.3}, "belongs to --reward_shape sigmoid"),
    (rloo, {"reward_clip_low": 1.0, "reward_clip_high": 0.0}, "--reward_clip_low 1 is not below"),
    (rloo, {"clip_low": 0.0, "clip_high": 0.0}, "only the first step would have a gradient"),
]


@pytest.mark.parametrize("stage, options, message", REFUSED)
def test_flags_that_contradict_each_other(stage, options, message):
    with pytest.raises(UserError, match=message):
        make(stage, **options)


def test_samples_of_a_changed_distribution_are_said_to_be_so(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("cream"), "propagate", True)
    make(rloo, {"sampler": {"gen_temperature": 1.0, "top_p": 1.0}})
    assert not caplog.text
    make(rloo, {"sampler": {"gen_temperature": 0.8, "top_p": 0.95}})
    assert "were sampled with gen_temperature 0.8, top_p 0.95" in caplog.text


# The command line ---------------------------------------------------------------------------------------------------

ON = "--device cpu --model tiny --checkpoint outputs/loop/m1/checkpoint-last --show_example no"
RLOO = f"train.py {ON} --train_stage rloo --limit_size 6 --train_bsz 3 --lr 1e-4"


def test_a_run_says_what_it_is_made_of(looped):
    """The policy of the KL term is an input by its hash, and where samples are from is handed on."""
    rewards = "outputs/loop/current.jsonl"
    out = looped.run(f"{RLOO} --name {rewards} --kl_coef 0.1 --kl_reference base --output_dir outputs/rloo").out
    assert "6 groups of 24 responses" in out
    about = looped.read("outputs/rloo/meta.json")
    assert about["inputs"]["kl_reference"] != about["inputs"]["start"]
    assert about["settings"]["kl_estimator"] == "k1" and about["settings"]["ratio"] == "sequence"
    sampled = looped.read(f"{rewards}.meta.json")["sampler"]
    assert (sampled["gen_temperature"], sampled["top_p"]) == (1.0, 0.95)
    assert "were sampled with top_p 0.95" in out
    first = json.loads((looped.folder / "outputs/rloo/log.jsonl").read_text().splitlines()[0])
    assert first["kl_reference"] > 0 and first["log_ratio_abs"] < 1e-4 and first["ratio_max"] < 1.0001
    assert (
        "is up to date"
        in looped.run(
            f"{RLOO} --name {rewards} --kl_coef 0.1 --kl_reference assets/tiny_m0 --output_dir outputs/rloo"
        ).out
    )


def test_rewards_without_the_samplers_log_probabilities_are_refused(looped):
    records = [json.loads(line) for line in (looped.folder / "outputs/loop/current.jsonl").read_text().splitlines()]
    without = [{key: value for key, value in record.items() if key != "logprob"} for record in records]
    (looped.folder / "localdata/without.jsonl").write_text("".join(json.dumps(record) + "\n" for record in without))
    error = looped.refused(f"{RLOO} --name localdata/without.jsonl --behaviour sampler")
    assert "has no `logprob`: --behaviour sampler needs the sampler's" in error
