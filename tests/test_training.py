"""Training: what a gradient is the mean of, a policy that starts as its reference, runs that can be cut anywhere."""

import dataclasses
import json
import logging
import math
import os
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.optimization import _get_cosine_schedule_with_warmup_lr_lambda

from config import Device, RandomRun
from cream.cli.flags import as_dict, deciding, parse
from cream.errors import UserError, user_error
from cream.files import store
from cream.files.fingerprints import fingerprint_folder
from cream.model.batches import by_tokens, pad
from cream.model.checkpoint import stored_dtype
from cream.model.hardware import Budget
from cream.model.load import load_chat, load_policy, load_with_head
from cream.model.logprobs import LogProbs, score
from cream.records import Conversation, Message, Pair, Rewards
from cream.training import launch, loop, parallel, run, state
from cream.training.job import Job
from cream.training.log import Log
from cream.training.loop import (
    common_budget,
    global_batches,
    learning_rate,
    micro_batches,
    save_steps,
    train,
)
from cream.training.options import LoraFlags, Optimisation, TrainData, TrainOutput, settings
from cream.training.parallel import Replicas
from cream.training.report import line as describe_line
from cream.training.run import work
from cream.training.stages import STAGES, dpo, sft
from train import TrainConfig

CPU = torch.device("cpu")
FLAGS = Optimisation(epoch=2, train_bsz=4, lr=3e-4, save_eval_step_ratio=1, log_every=1)  # 6 steps over 12 examples


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps its precision for the whole process; each test chooses its own."""
    AcceleratorState._reset_state(reset_partial_state=True)


def conversations(count=12):
    """Answers of very different lengths, a third of them over two turns."""
    records = []
    for i in range(count):
        turns = [
            Message("user", f"Tom has {20 + i} books. How many now?"),
            Message("assistant", "5 + 3 = 8. " * (i % 4)),
        ]
        if i % 3 == 0:
            turns += [Message("user", "And then?"), Message("assistant", f"Answer: {i}")]
        records.append(Conversation(uuid=f"c{i}", messages=turns))
    return records


def pairs(count=12):
    prompts = [[Message("user", f"Tom has {20 + i} books. How many now?")] for i in range(count)]
    return [
        Pair(
            uuid=f"p{i}",
            prompt=prompt,
            selected=[*prompt, Message("assistant", f"Answer: {20 + i}")],
            rejected=[*prompt, Message("assistant", "5 + 3 = 8. " * (1 + i % 4))],
            consistency=(None, 0.2, 0.9, 1.0)[i % 4],
            rejected_truncated=i % 5 == 0,
        )
        for i, prompt in enumerate(prompts)
    ]


def rewards(count=12):
    """Scored groups of the pairs' responses, one of them twice."""
    return [
        Rewards(
            uuid=pair.uuid,
            prompt=pair.prompt,
            response=[pair.selected, pair.rejected, pair.selected],
            reward=[1.0, i % 3 / 2, 1.0],
            finish_reason=["stop", "length" if pair.rejected_truncated else "stop", "stop"],
        )
        for i, pair in enumerate(pairs(count))
    ]


def load(folder, share=True):
    """The folder's policy, over trees or over padded rows."""
    return LogProbs(load_policy(folder, torch.float32, CPU), share)


SFT = sft.Stage(sft.Options(), {})


def dpo_stage(**options):
    return dpo.Stage(dpo.Options(**options), {})


def stage_of(name):
    return SFT if name == "sft" else dpo_stage(beta=0.5)


def sft_examples(chat):
    return [tokens for _, tokens in SFT.prepare(conversations(), chat, 128, Counter())]


def dpo_examples(chat, model, method="consistency_dyn"):
    """Examples that know their C and the model's own log-probabilities as reference."""
    stage = dpo_stage(method=method)
    examples = [example for _, example in stage.prepare(pairs(), chat, 128, Counter())]
    values = score(model, [stage.group(example) for example in examples], Budget(10_000))
    for example, logps in zip(examples, values, strict=True):
        example.reference = logps
    return examples


def gradient(model, loss):
    """All parameters' gradients of a scalar as one vector."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def logged(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_mark_of_compiling_is_found(tmp_path, monkeypatch):
    """Where torch looks for it: it would wait for ever for a process that was killed."""
    from torch.utils.cpp_extension import _get_build_directory
    from torch.utils.file_baton import FileBaton

    for root in (None, tmp_path / "extensions"):
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
        if root is not None:
            monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(root))
        assert parallel.compiling() == []
        mark = Path(_get_build_directory("cpu_adam", False)) / "lock"
        assert FileBaton(mark).try_acquire()
        assert parallel.compiling() == [mark]


@pytest.mark.parametrize("name", ["ds_stage2", "ds_stage3", "ds_stage2_offload", "ds_stage3_offload"])
def test_deepspeed_needs_a_compiler_for_what_is_offloaded_alone(name, repo, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    path = str(repo / f"configs/{name}.json")
    if name.endswith("offload"):
        with pytest.raises(UserError, match=r"on the CPU and needs a C\+\+ compiler: install g\+\+"):
            parallel.read_settings(path)
    else:
        assert not parallel.compiles(parallel.read_settings(path))


# Planning -----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 50), st.integers(1, 20), st.integers(1, 3), st.integers(0, 9))
def test_every_epoch_sees_every_example_once(count, size, epochs, seed):
    plan = list(global_batches(count, size, epochs, seed))
    assert plan == list(global_batches(count, size, epochs, seed))
    per_epoch = math.ceil(count / size)
    assert len(plan) == epochs * per_epoch and max(map(len, plan)) <= size
    for epoch in range(epochs):
        batches = plan[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(i for batch in batches for i in batch) == list(range(count))


def test_epochs_and_seeds_differ_in_order():
    orders = [tuple(batch) for seed in (0, 1) for batch in global_batches(50, 50, 2, seed)]
    assert len(set(orders)) == 4


tree, row = st.tuples(st.integers(1, 30), st.just(1)), st.tuples(st.integers(1, 3), st.integers(1, 9))
shapes = st.lists(tree | row, min_size=1)


@given(shapes, st.integers(1, 60), st.integers(1, 4))
def test_processes_share_a_batch_in_equal_numbers_of_micro_batches(shapes, max_tokens, world):
    shares = [micro_batches(shapes, max_tokens, world, rank) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1  # else collectives would hang
    chunks = [chunk for share in shares for chunk in share if chunk]
    assert sorted(i for chunk in chunks for i in chunk) == list(range(len(shapes)))
    for chunk in chunks:
        size = sum(shapes[i][0] for i in chunk) * max(shapes[i][1] for i in chunk)
        assert size <= max_tokens or len(chunk) == 1
    assert len(shares[0]) == math.ceil(len(by_tokens(shapes, max_tokens)) / world)  # no more than the budget asks for


def test_micro_batches_are_even():
    """Two processes and 100 tokens: not 90 and 20, which one would wait for."""
    shares = [micro_batches([(10, 1)] * 11, 90, 2, rank) for rank in (0, 1)]
    assert [[len(chunk) for chunk in share] for share in shares] == [[6], [5]]


@given(st.integers(1, 200), st.integers(1, 30))
def test_saves_are_even_and_include_the_last_step(steps, saves):
    chosen = sorted(save_steps(steps, saves))
    gaps = np.diff([0, *chosen])
    assert len(chosen) == min(steps, saves) and chosen[-1] == steps
    assert gaps.max() - gaps.min() <= 1


@given(st.integers(1, 300), st.floats(0, 1))
def test_the_rate_warms_up_then_follows_the_cosine_of_transformers(steps, ratio):
    warmup = math.ceil(ratio * steps)
    for done in range(steps):
        rate = learning_rate(done, steps, warmup)
        if done < warmup:
            assert rate == (done + 1) / warmup  # the first step moves too
        else:
            options = {"num_warmup_steps": warmup, "num_training_steps": steps, "num_cycles": 0.5}
            assert rate == pytest.approx(_get_cosine_schedule_with_warmup_lr_lambda(done, **options))


# SFT ----------------------------------------------------------------------------------------------------------------


def test_sft_is_cross_entropy_on_answer_tokens(tiny_folder, tiny_chat):
    model, examples = load(tiny_folder), sft_examples(tiny_chat)
    loss, _ = SFT.loss(model, model.pack(examples), examples)
    batch, plain = pad(examples), load(tiny_folder, share=False).model
    labels = torch.full_like(batch.input_ids, -100)
    for row, (tokens,) in zip(labels, examples, strict=True):
        for start, end in tokens.spans:
            row[start:end] = torch.tensor(tokens.ids[start:end])
    assert {row[row != -100][-1].item() for row in labels} == {tiny_chat.end_of_turn}  # it learns to stop
    logits = plain(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    wanted = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient(model, loss), gradient(plain, wanted), rtol=1e-4, atol=1e-3)
    assert sum(map(SFT.weight, examples)) == (labels != -100).sum()


class Table(torch.nn.Module):
    """The smallest language model: its logits at every position of a batch are its parameters."""

    def __init__(self, rows, width, vocabulary):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.randn(rows, width, vocabulary))

    def forward(self, input_ids, attention_mask, logits_to_keep, use_cache):
        from transformers.modeling_outputs import CausalLMOutput

        return CausalLMOutput(logits=self.logits[:, logits_to_keep])


def test_sft_puts_no_gradient_on_prompt_or_padding(tiny_chat):
    examples = sft_examples(tiny_chat)
    batch = pad(examples)
    model = LogProbs(Table(*batch.input_ids.shape, len(tiny_chat.tokenizer)), share=False)
    SFT.loss(model, batch, examples)[0].backward()
    touched = model.model.logits.grad.abs().sum(-1) > 0
    answers = torch.zeros_like(touched)
    for row, (tokens,) in zip(answers, examples, strict=True):
        for start, end in tokens.spans:
            row[start - 1 : end - 1] = True  # what predicts them
    assert torch.equal(touched, answers)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_the_pad_id_changes_no_gradient(tiny_folder, tiny_chat, stage):
    """Also when it is the end of turn, which the loss must not take for padding."""
    model = load(tiny_folder, share=False)
    examples = sft_examples(tiny_chat) if stage == "sft" else dpo_examples(tiny_chat, model)
    stage = stage_of(stage)
    groups = [stage.group(example) for example in examples]
    batches = [pad(groups, pad_id) for pad_id in (0, tiny_chat.end_of_turn)]
    first, second = (gradient(model, stage.loss(model, batch, examples)[0]) for batch in batches)
    assert torch.equal(first, second) and first.abs().max() > 0


def test_what_does_not_fit_is_dropped_and_not_cut(tiny_chat):
    dropped = Counter()
    lengths = {r.uuid: len(*tiny_chat.encode_conversation(r.messages)) for r in conversations()}
    limit = sorted(lengths.values())[5]
    kept = SFT.prepare(conversations(), tiny_chat, limit, dropped)
    assert {uuid: len(tokens) for uuid, (tokens,) in kept} == {u: n for u, n in lengths.items() if n <= limit}
    assert dropped == {f"longer than {limit} tokens": 12 - len(kept)} and 0 < len(kept) < 12


def test_sft_on_pairs_trains_on_the_chosen_answer(tiny_chat):
    (_, tokens), *_ = SFT.prepare(pairs(), tiny_chat, 128, Counter())
    assert tokens == tiny_chat.encode_conversation(pairs()[0].selected)


# DPO ----------------------------------------------------------------------------------------------------------------


def test_pairs_become_examples_or_are_counted(tiny_chat):
    same = msgspec.structs.replace(pairs()[0], uuid="same", rejected=pairs()[0].selected)
    dropped = Counter()
    kept = dpo_stage().prepare([*pairs(), same], tiny_chat, 40, dropped)
    assert dropped["both responses are the same"] == 1 and dropped["longer than 40 tokens"] == 12 - len(kept) > 0
    for uuid, example in kept:
        (record,) = (p for p in pairs() if p.uuid == uuid)
        assert example.chosen.ids[-1] == tiny_chat.end_of_turn
        assert (example.rejected.ids[-1] == tiny_chat.end_of_turn) is not record.rejected_truncated


@pytest.mark.parametrize(
    "method, fixed, used",
    [
        ("original", None, [1.0, 1.0, 1.0, 1.0]),
        ("consistency_avg", None, [0.7, 0.7, 0.7, 0.7]),
        ("consistency_dyn", None, [0.7, 0.2, 0.9, 1.0]),  # a null takes the mean of the others
        ("consistency_dyn", 0.25, [0.25, 0.25, 0.25, 0.25]),
    ],
)
def test_the_method_decides_c(tiny_chat, method, fixed, used):
    stage = dpo_stage(method=method, fixed_consistency=fixed, allow_reversed=True)
    examples = [example for _, example in stage.prepare(pairs(4), tiny_chat, 128, Counter())]
    facts = stage.facts(examples)
    assert [example.consistency for example in examples] == pytest.approx(used)
    assert facts["mean_c_used"] == pytest.approx(sum(used) / 4) and facts["mean_c"] == pytest.approx(0.7)
    assert facts["pairs_without_c"] == 1 and facts["trained_in_reverse"] == sum(c < 0.5 for c in used)


def test_a_method_without_any_c_is_refused(tiny_chat):
    with pytest.raises(UserError, match="--method consistency_avg"):
        dpo_stage(method="consistency_avg").prepare(pairs(1), tiny_chat, 128, Counter())


@pytest.mark.parametrize(
    "own, options, refused",
    [
        ([0.4, 0.3, 0.2, 0.9], {"method": "consistency_dyn"}, "3 of 4 pairs have C < 1/2 (mean C 0.450)"),
        ([0.4, 0.3, 0.2, 0.9], {"method": "consistency_avg"}, "4 of 4 pairs have C < 1/2 (mean C 0.450)"),
        ([0.4, 0.3, 0.6, 0.6], {"method": "consistency_avg"}, "4 of 4 pairs"),  # half of them are reversed one by one
        ([0.4, 0.3, 0.6, 0.6], {"method": "consistency_dyn"}, None),
        ([0.1, 0.1, 0.1, 0.1], {"method": "original"}, None),
        ([0.9, 0.9, 0.9, 0.9], {"fixed_consistency": 0.2}, "4 of 4 pairs have C < 1/2 (--fixed_consistency 0.2)"),
        ([0.5, 0.5, 0.5, 0.5], {"method": "consistency_dyn", "loss": "hinge"}, None),
        ([0.4, 0.4, 0.4, 0.4], {"method": "consistency_dyn", "loss": "hinge"}, "4 of 4 pairs"),
    ],
)
def test_most_pairs_in_reverse_are_asked_for(tiny_chat, own, options, refused):
    records = [msgspec.structs.replace(pair, consistency=c) for pair, c in zip(pairs(4), own, strict=True)]
    for allow in (False, True):
        stage, told = dpo_stage(**options, allow_reversed=allow), None
        try:
            assert len(stage.prepare(records, tiny_chat, 128, Counter())) == 4
        except UserError as error:
            told = str(error)
        assert (told is None) is (refused is None or allow)
        assert told is None or refused in told and "--allow_reversed trains all the same" in told
        assert "allow_reversed" not in stage.settings  # the same run, whether it had to be asked for or not


def test_a_line_of_training_says_how_long_it_takes(caplog):
    """Without the first step, from which a resumed run counts too."""
    now = iter([0.0, 10.0, 30.0, 130.0, 250.0])
    report = run.Report(clock=lambda: next(now))
    with caplog.at_level("INFO", logger="cream"):
        for step in (41, 50, 100, 160):
            report(step, 160, {"loss": 0.5})
    assert [record.message.partition("0.5")[2] for record in caplog.records] == [
        "",
        "  30 s, about 4.07 min left",
        "  2.17 min, about 2.03 min left",
        "",
    ]
    names = "loss margin accuracy logp_chosen ratio_chosen kl kl_per_token grad_norm lr pairs_per_second"
    line = describe_line(dict.fromkeys([*names.split(), "tokens_per_second", "peak_memory_gb"], 0.123456))
    assert line == "loss 0.1235  margin 0.123  accuracy 0.123  grad_norm 0.123  lr 0.123  0.123 pairs/s"


def test_each_example_has_the_c_of_its_own_record(tiny_chat):
    own = {f"p{i}": i / 20 for i in range(12)}
    records = [msgspec.structs.replace(p, uuid=u, consistency=own[u]) for u, p in zip(own, pairs(), strict=False)]
    stage = dpo_stage(method="consistency_dyn", beta=0.5, allow_reversed=True)
    rows = stage.prepare(records, tiny_chat, 128, Counter())
    assert len(rows) > 5 and all(example.consistency == own[uuid] for uuid, example in rows)


def test_each_pair_weighs_its_two_directions_by_its_own_c(tiny_folder, tiny_chat):
    """∇L = C ∇L_DPO(+, -) + (1 - C) ∇L_DPO(-, +) (Algorithm 1), away from the reference, pair by pair."""
    model, stage = load(tiny_folder), dpo_stage(beta=0.5)
    padded = load(tiny_folder, share=False)
    examples = dpo_examples(tiny_chat, model)
    for i, example in enumerate(examples):
        example.reference[0] += 0.3 * i

    def plain(example):
        """-log sigma of the margin, written out."""
        batch = pad([[example.chosen, example.rejected]])
        chosen, rejected = batch.response_sums(padded(batch))
        margin = (chosen - example.reference[0]) - (rejected - example.reference[1])
        return F.softplus(-0.5 * margin), F.softplus(0.5 * margin)

    loss, metrics = stage.loss(model, model.pack([stage.group(example) for example in examples]), examples)
    wanted = sum(e.consistency * forward + (1 - e.consistency) * back for e in examples for forward, back in [plain(e)])
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient(model, loss), gradient(padded, wanted), rtol=1e-3, atol=1e-4)
    assert metrics["ratio_abs"] == pytest.approx(sum(0.3 * i for i in range(12)) / 2, abs=1e-3)


@pytest.mark.parametrize("loss, expected", [("sigmoid", "0.6931"), ("hinge", "1.0000"), ("ipo", "25.0000")])
def test_a_policy_that_is_not_its_reference_at_the_first_step_is_refused(loss, expected):
    stage = dpo_stage(loss=loss)
    stage.check_first({"ratio_abs": 1e-4, "loss": 0.0}, tolerance=1e-3)
    for apart in (0.1, math.nan):
        with pytest.raises(UserError, match=rf"expected {expected}\): likely causes"):
            stage.check_first({"ratio_abs": apart, "loss": 0.5}, tolerance=1e-3)
    with pytest.raises(UserError, match=f"expected {expected} and the likelihood term"):
        dpo_stage(loss=loss, rpo_alpha=1.0).check_first({"ratio_abs": 0.1, "loss": 0.5}, tolerance=1e-3)


def test_nothing_is_known_of_a_first_loss_without_a_reference():
    dpo_stage(loss="simpo").check_first({"loss": 7.0}, tolerance=0.0)
    SFT.check_first({"loss": 7.0}, tolerance=0.0)


# The loop -----------------------------------------------------------------------------------------------------------


def spread(model, stage, examples, flags):
    """What the loop takes, up to the run's folder: in one process."""
    accelerator = Accelerator(cpu=True)
    weights = Replicas(accelerator, model, flags.lr, flags.weight_decay)
    tokens = common_budget(accelerator, weights, flags.max_tokens_per_batch)
    return accelerator, weights, stage, examples, flags, 0, tokens


def trained(folder, stage, examples, flags, where, **options):
    """The weights after a run of the loop, as one vector."""
    where.mkdir()
    model = load(folder)
    train(*spread(model, stage, examples, flags), where, lambda step: None, **options)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_accumulation_equals_the_large_batch(tiny_folder, tiny_chat, tmp_path, name):
    """Micro-batches of one example, of some, of all: though examples have unequal numbers of answer tokens and an
    epoch's last batch is short."""
    start = load(tiny_folder)
    stage = stage_of(name)
    examples = (sft_examples(tiny_chat) if name == "sft" else dpo_examples(tiny_chat, start))[:10]
    ends, budgets = [], (10_000, 130, 1)
    for max_tokens in budgets:
        flags = dataclasses.replace(FLAGS, max_tokens_per_batch=max_tokens)
        ends.append(trained(tiny_folder, stage, examples, flags, tmp_path / str(max_tokens)))
    shapes = [start.shape(stage.group(example)) for example in examples[:4]]
    assert len({len(by_tokens(shapes, max_tokens)) for max_tokens in budgets}) == 3
    moved = (ends[0] - torch.cat([p.detach().flatten() for p in start.parameters()])).norm()
    assert max((end - ends[0]).norm() for end in ends) <= 1e-3 * moved
    first = [logged(tmp_path / str(max_tokens))[0] for max_tokens in budgets]
    for metric in ("loss", "grad_norm"):
        assert first[1][metric] == pytest.approx(first[0][metric], rel=1e-4)
        assert first[2][metric] == pytest.approx(first[0][metric], rel=1e-4)


def test_a_step_is_the_mean_over_the_global_batchs_answer_tokens(tiny_folder, tiny_chat, tmp_path):
    examples, model = sft_examples(tiny_chat), load(tiny_folder, share=False)
    flags = dataclasses.replace(FLAGS, train_bsz=12, max_tokens_per_batch=50, epoch=1)
    trained(tiny_folder, SFT, examples, flags, tmp_path / "run")
    total = sum(map(SFT.weight, examples))
    loss = -model(pad(examples)).sum() / total
    (entry,) = logged(tmp_path / "run")
    assert entry["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert entry["grad_norm"] == pytest.approx(gradient(model, loss).norm().item(), rel=1e-4)


def test_the_log_has_the_rate_of_each_step(tiny_folder, tiny_chat, tmp_path):
    flags = dataclasses.replace(FLAGS, warmup_step_ratio=0.5)
    trained(tiny_folder, SFT, sft_examples(tiny_chat), flags, tmp_path / "run")
    wanted = [3e-4 * learning_rate(done, 6, 3) for done in range(6)]
    assert [entry["lr"] for entry in logged(tmp_path / "run")] == pytest.approx(wanted)


@pytest.mark.parametrize("log_every", [1, 4, 10])
def test_a_line_of_the_log_is_the_mean_since_the_line_before(tiny_folder, tiny_chat, tmp_path, log_every):
    """Loss a trained token; tokens computed a trained one, as the quotient of their rates."""
    examples = sft_examples(tiny_chat)
    flags = dataclasses.replace(FLAGS, log_every=log_every, lr=1e-12)
    trained(tiny_folder, SFT, examples, flags, tmp_path / "run")
    plan = list(global_batches(12, 4, 2, seed=0))
    ends = [step for step in range(1, 7) if step in (1, 6) or not step % log_every]
    entries = logged(tmp_path / "run")
    assert [entry["step"] for entry in entries] == ends
    model = load(tiny_folder, share=False)
    for entry, since in zip(entries, [0, *ends], strict=False):
        seen = [examples[i] for batch in plan[since : entry["step"]] for i in batch]
        answers = sum(map(SFT.weight, seen))
        assert entry["loss"] == pytest.approx(-model(pad(seen)).sum().item() / answers, rel=1e-5)
        per_answer_token = entry["tokens_per_second"] / entry["answer_tokens_per_second"]
        assert per_answer_token == pytest.approx(sum(len(tokens) for (tokens,) in seen) / answers)
        assert 0.01 < entry["peak_memory_gb"] < 1000


@pytest.mark.parametrize("more", [b'\n{"step": 2, "loss": 0.6}\n{"step": 2, "lo', b""], ids=["within", "at its end"])
def test_a_log_that_was_cut_short_is_gone_on_with(tiny_folder, tiny_chat, tmp_path, more):
    """By a full disk or a kill, within its last line; what a run did after its last state is not told twice."""
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1, "loss": 0.7}' + more)
    accelerator = Accelerator(cpu=True)
    log = Log(accelerator, tmp_path, 1, 9, 1, "pairs", lambda *told: None)
    assert (tmp_path / "log.jsonl").read_bytes() == b'{"step": 1, "loss": 0.7}\n'
    log.add({"loss": torch.ones(())})
    log.add_work(1, 1.0)
    log.path.unlink()
    log.path.symlink_to("/dev/full")
    with pytest.raises(OSError) as error:
        log.end_step(2, 1, torch.ones(()), 0.1, None)
    assert "log.jsonl: No space left" in str(user_error(error.value))


def test_a_gradient_that_is_not_finite_is_never_saved(tiny_folder, tiny_chat, tmp_path):
    """Also when it comes between two lines of the log."""
    examples, saved = dpo_examples(tiny_chat, load(tiny_folder)), []
    _, second, *_ = global_batches(12, 4, 1, seed=0)
    examples[second[0]].reference[0] = math.nan
    flags = dataclasses.replace(FLAGS, epoch=1, log_every=10, save_eval_step_ratio=2)
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="by step 2 a gradient is not finite"):
        given = spread(load(tiny_folder), dpo_stage(beta=0.5), examples, flags)
        train(*given, tmp_path / "run", saved.append)
    assert not saved and len(logged(tmp_path / "run")) == 1


def no_memory_at(monkeypatch, *calls):
    """A device that runs out of memory in the training passes of these numbers, from 1; returns the batches' sizes."""
    forward, tried = LogProbs.forward, []

    def limited(self, batch):
        if not torch.is_grad_enabled():  # the probe
            return forward(self, batch)
        tried.append(batch.tokens)
        values = forward(self, batch)
        if len(tried) in calls:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return values

    monkeypatch.setattr(LogProbs, "forward", limited)
    return tried


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_out_of_memory_halves_the_micro_batches_once(tiny_folder, tiny_chat, tmp_path, monkeypatch, caplog, name):
    """The step is done again from its start: the weights are those of a run that never had to."""
    monkeypatch.setattr(logging.getLogger("cream"), "propagate", True)
    start = load(tiny_folder)
    stage = stage_of(name)
    examples = sft_examples(tiny_chat) if name == "sft" else dpo_examples(tiny_chat, start)
    flags = dataclasses.replace(FLAGS, max_tokens_per_batch=100)
    shapes = [start.shape(stage.group(example)) for example in examples]
    first = next(global_batches(12, 4, 2, 0))
    assert len(micro_batches([shapes[i] for i in first], 100, 1, 0)) > 1
    undisturbed = trained(tiny_folder, stage, examples, flags, tmp_path / "undisturbed")
    tried = no_memory_at(monkeypatch, 2)  # the first micro-batch's gradient is there already
    halved = trained(tiny_folder, stage, examples, flags, tmp_path / "halved")
    moved = (undisturbed - torch.cat([p.detach().flatten() for p in start.parameters()])).norm()
    assert (halved - undisturbed).norm() <= 1e-3 * moved
    assert max(tried[:2]) > 50 and max(tried[2:]) <= max(50, max(shapes)[0])
    (line,) = (record.getMessage() for record in caplog.records if "out of memory" in record.getMessage())
    assert "100 tokens" in line and "50" in line
    for one, other in zip(logged(tmp_path / "halved"), logged(tmp_path / "undisturbed"), strict=True):
        assert (one["loss"], one["grad_norm"]) == pytest.approx((other["loss"], other["grad_norm"]), rel=1e-3)


def test_out_of_memory_with_the_half_is_the_users_to_mend(tiny_folder, tiny_chat, tmp_path, monkeypatch):
    no_memory_at(monkeypatch, 2, 5)
    flags = dataclasses.replace(FLAGS, max_tokens_per_batch=100)
    with pytest.raises(UserError, match=r"100 tokens.*50 as well.*--max_tokens_per_batch"):
        trained(tiny_folder, SFT, sft_examples(tiny_chat), flags, tmp_path / "run")


# Whole runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def job(tiny_folder, tmp_path):
    """Makes the job of a stage whose run stands in tmp_path / name."""
    store.write(tmp_path / "sft.json", conversations())
    for name in ("dpo", "bradley_terry"):
        store.write(tmp_path / f"{name}.json", pairs())
    store.write(tmp_path / "rloo.json", rewards())

    def make(stage, name, start=tiny_folder, flags=FLAGS, **options):
        """`options`: flags of any group, and of the stage."""
        own = {"beta": 0.5, **options} if stage == "dpo" else options
        header = {"settings": {}, "inputs": {"start": fingerprint_folder(start)}}

        def group(first, taken=options):
            return dataclasses.replace(first, **{name: taken[name] for name in vars(first).keys() & taken.keys()})

        config = TrainConfig(
            device=group(Device(device="cpu")),
            data=group(TrainData()),
            optimisation=group(flags),
            lora=options.get("lora", NONE),
            output=group(TrainOutput(show_example=False)),
            run=group(RandomRun()),
        )
        made = STAGES[stage].Stage(group(STAGES[stage].Options(), own), {})
        data, limit = tmp_path / f"{stage}.json", options.get("limit_size")
        return Job(config, stage, made, start, data, tmp_path / name, header, limit)

    return make


def weights(job):
    state = load_file(job.run / "checkpoint-last" / "model.safetensors")
    return torch.cat([state[name].float().flatten() for name in sorted(state)])


NONE, LORA = LoraFlags(), LoraFlags(lora=True, lora_r=8, lora_alpha=16, lora_dropout=0.1)


@pytest.mark.parametrize("lora", [NONE, LORA])
@pytest.mark.parametrize("method", ["original", "consistency_avg", "consistency_dyn"])
def test_the_first_loss_is_ln_2(job, method, lora):
    made = job("dpo", "run", method=method, lora=lora)
    work(made)
    first, *_, last = logged(made.run)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5) and abs(first["margin"]) < 1e-4
    assert last["margin"] > 0.1


def test_no_gradient_at_one_half(job):
    norms = []
    for c in (0.5, 1.0):
        made = job("dpo", f"run{c}", fixed_consistency=c)
        work(made)
        norms.append(logged(made.run)[0]["grad_norm"])
    assert norms[0] < 1e-4 * norms[1]


def test_below_one_half_a_pair_is_trained_in_reverse(job):
    margins = []
    for c in (0.1, 0.9):
        made = job("dpo", f"run{c}", fixed_consistency=c, allow_reversed=True)
        work(made)
        margins.append(logged(made.run)[-1]["margin"])
    assert margins[0] < 0 < margins[1]


def by_own_c(stage):
    return {"method": "consistency_dyn"} if stage == "dpo" else {}


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage, lora, killed_at, optim",
    [
        ("sft", NONE, 1, "adamw"),
        ("dpo", NONE, 5, "adamw"),
        ("dpo", LORA, 3, "adamw"),
        ("dpo", NONE, 3, "adamw_bf16"),
        ("bradley_terry", LORA, 3, "adamw"),
        ("rloo", NONE, 3, "adamw"),
    ],
)
def test_an_interrupted_run_ends_with_the_same_weights(job, monkeypatch, stage, lora, killed_at, optim):
    flags = dataclasses.replace(FLAGS, save_eval_step_ratio=3, optim=optim)
    options = {"lora": lora, **by_own_c(stage), "flags": flags}
    undisturbed, disturbed = (job(stage, name, **options) for name in ("whole", "cut"))
    work(undisturbed)

    def interrupt(step, steps, metrics):
        if step == killed_at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run, "Report", lambda: interrupt)
        work(disturbed)
    assert not (disturbed.run / "meta.json").exists()
    steps = []
    monkeypatch.setattr(run, "Report", lambda: lambda step, *_: steps.append(step))
    work(disturbed)
    assert steps == list(range((killed_at - 1) // 2 * 2 + 1, 7))  # on from the last save, made every second step
    assert torch.equal(weights(disturbed), weights(undisturbed))
    losses = [[(entry["step"], entry["loss"]) for entry in logged(j.run)] for j in (disturbed, undisturbed)]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    names = [sorted(path.name for path in j.run.iterdir()) for j in (disturbed, undisturbed)]
    assert names[0] == names[1]
    checkpoints = ["checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-last"]
    assert names[0] == ["args.json", *checkpoints, "log.jsonl", "meta.json"]


@pytest.mark.slow
def test_a_state_is_saved_where_checkpoints_are_long_in_coming(job, monkeypatch):
    monkeypatch.setattr(loop, "STATE_EVERY", 0.0)
    monkeypatch.setattr(loop, "STATE_SHARE", 0)
    undisturbed, disturbed = (job("sft", name, flags=FLAGS) for name in ("whole", "cut"))
    assert FLAGS.saves == 1
    work(undisturbed)
    steps = []

    def interrupt(step, steps_in_all, metrics):
        steps.append(step)
        if steps.count(step) == 1 and step in (3, 5):
            raise KeyboardInterrupt

    monkeypatch.setattr(run, "Report", lambda: interrupt)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            work(disturbed)
    monkeypatch.setattr(state.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))  # none has room
    work(disturbed)
    assert steps == [1, 2, 3, 3, 4, 5, 5, 6]
    assert torch.equal(weights(disturbed), weights(undisturbed))


def test_data_that_change_before_the_first_step_are_not_trained_on(job):
    made = job("sft", "run")
    made.provenance.file("data", made.data)
    made.data.write_text(made.data.read_text() + " ")
    with pytest.raises(UserError, match="sft.json was changed while this ran"):
        work(made)
    assert not made.run.exists()


POISON = b"cos\nsystem\n(S'touch %s'\ntR."  # a pickle that runs a command when it is loaded


@pytest.mark.parametrize("planted", ["random_states_0.pkl", "optimizer.bin", "custom_checkpoint_0.pkl"])
def test_a_state_that_is_not_what_was_saved_is_not_loaded(job, monkeypatch, tmp_path, planted):
    made, mark = job("sft", "run", flags=dataclasses.replace(FLAGS, save_eval_step_ratio=3)), tmp_path / "ran"

    def interrupt(step, steps, metrics):
        if step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run, "Report", lambda: interrupt)
        work(made)
    (made.run / "state/2" / planted).write_bytes(POISON % str(mark).encode())
    with pytest.raises(UserError, match=f"{planted} is not what was saved"):
        work(made)
    (made.run / "state/whole").write_text('{"step": 2}')
    with pytest.raises(UserError, match="whole: damaged"):
        work(made)
    assert not mark.exists()


def test_a_finished_run_says_what_it_was(job, tiny_folder, tiny_tokenizer):
    made = job("sft", "run", max_length=60)
    work(made)
    meta = store.read_json(made.run / "meta.json")
    assert meta["counts"]["records"] == 12 == meta["counts"]["trained_on"] + sum(meta["counts"]["dropped"].values())
    assert (made.run / "checkpoint-last").resolve().name == "checkpoint-" + str(logged(made.run)[-1]["step"])
    kind = store.read_json(made.run / "checkpoint-last" / "cream.json")
    assert (kind["kind"], kind["stage"], kind["started_from"]) == ("policy", "sft", str(tiny_folder))
    assert load_chat(made.run / "checkpoint-last").tokenizer.chat_template == tiny_tokenizer.chat_template
    config = store.read_json(made.run / "checkpoint-last" / "config.json")
    assert config == store.read_json(tiny_folder / "config.json")  # nothing of how it was trained
    work(job("dpo", "next", start=made.run / "checkpoint-last"))  # the folder is a model like any other


def test_lora_checkpoints_hold_the_merged_weights_and_the_adapter(job, tiny_folder):
    from peft import PeftModel

    made = job("dpo", "run", lora=LORA)
    work(made)
    folder, ids = made.run / "checkpoint-last", torch.arange(1, 50)[None]
    assert len({path.stat().st_mode for path in (folder / "adapter").iterdir()}) == 1
    adapter = PeftModel.from_pretrained(load(tiny_folder).model, folder / "adapter").eval()
    with torch.no_grad():
        merged, unmerged, start = (
            model(ids).logits for model in (load(folder).model, adapter, load(tiny_folder).model)
        )
    torch.testing.assert_close(merged, unmerged, atol=1e-4, rtol=0)
    assert (merged - start).abs().max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("lora", [NONE, LORA])
def test_gradient_checkpointing_changes_nothing(job, lora):
    ends = []
    for checkpointing in (False, True):
        made = job("sft", f"run{checkpointing}", lora=lora, grad_checkpointing=checkpointing)
        work(made)
        ends.append(weights(made))
    torch.testing.assert_close(*ends, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.xdist_group("compiled")
@pytest.mark.skipif(shutil.which("g++") is None, reason="on a CPU layers are compiled by g++")
def test_compiled_layers_change_nothing(job, tiny_folder, tmp_path):
    """Of a model of one layer: each kernel takes the compiler a second."""
    start = shutil.copytree(tiny_folder, tmp_path / "one layer")
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, num_hidden_layers=1)
    model.save_pretrained(start)
    ends = []
    for compiled in (False, True):
        made = job("dpo", f"run{compiled}", start, compile=compiled)
        work(made)
        ends.append(weights(made))
    torch.testing.assert_close(*ends, atol=1e-5, rtol=0)


def test_bfloat16_products_on_float32_masters(job):
    made = job("dpo", "run", bf16=True, flags=dataclasses.replace(FLAGS, lr=1e-6))
    work(made)
    assert stored_dtype(made.run / "checkpoint-last") == torch.float32
    start = load_file(made.start / "model.safetensors")
    end = load_file(made.run / "checkpoint-last" / "model.safetensors")
    changed = [(end[name] != start[name]).float().mean().item() for name in start if "proj" in name]
    assert min(changed) > 0.9  # in pure bfloat16 about 2 % of the weights move at this rate


def test_malformed_records_are_counted_where_nothing_is_left_to_train_on(job):
    made = job("sft", "run", on_bad_record="skip")
    made.data.write_text('{"a": [{"role": "user", "content": " "}, {"role": "assistant", "content": "x"}]}')
    with pytest.raises(UserError, match=r"no record is left to train on \(dropped: {'malformed record': 1}\)"):
        work(made)


def test_nothing_left_to_train_on_is_an_error(job):
    with pytest.raises(UserError, match=r"sft\.json.*longer than 3 tokens"):
        work(job("sft", "run", max_length=3))


def identity(*words):
    """The settings of a run with these flags, on pairs made for consistency_avg, that all runs do not share."""
    config = parse(TrainConfig, list(words), description="", example="")
    name = config.optimisation.train_stage
    stage = STAGES[name].Stage(getattr(config.stage, name), {"method": "consistency_avg"} if name == "dpo" else {})
    made, every = settings(config, name, stage, 32), deciding(Optimisation())
    return {flag: value for flag, value in made.items() if flag not in every and flag in as_dict(config.stage)}


def test_a_run_is_known_by_the_flags_of_its_own_stage():
    """SFT and plain DPO by those alone that the first version had, so that its runs are found again."""
    before = {"method": "original", "beta": 0.1, "fixed_consistency": None}
    dpo, own = ("--train_stage", "dpo"), before | {"method": "consistency_avg"}
    assert identity("--train_stage", "sft") == before and identity(*dpo) == own
    assert identity(*dpo, "--beta", "1") == own | {"beta": 1}
    added = {"loss": "sigmoid", "rpo_alpha": 0.5, "length_normalize": False}
    assert identity(*dpo, "--rpo_alpha", "0.5") == own | added
    assert identity(*dpo, "--length_normalize", "no") == own
    simpo = identity(*dpo, "--loss", "simpo", "--fixed_consistency", "1", "--simpo_gamma", "0.5")
    assert simpo == identity(*dpo, "--loss", "simpo", "--fixed_consistency", "1")
    assert simpo["simpo_gamma"] == 0.5 and simpo["length_normalize"] is True


# Command lines ------------------------------------------------------------------------------------------------------

TRAIN = "train.py --device cpu --model tiny --train_bsz 4 --lr 1e-3 --log_every 1 --show_example no"
ON_PAIRS = f"{TRAIN} --name localdata/pairs.json --beta 0.5 --output_dir outputs/"
ANCHOR = '''
from dataclasses import dataclass

from cream.cli.flags import flag
from cream.errors import UserError
from cream.records import Conversation

RECORDS = (Conversation,)


@dataclass
class Options:
    """Anchored fine-tuning"""

    strength: float = flag(1.0, "weight of the squared distance to the starting policy", low=0)


class Example:
    def __init__(self, tokens):
        self.tokens, self.prior = tokens, [float("nan")]


class Stage:
    model, unit, made_for_policy, reference, label = "logprobs", "conversations", False, "prior", "anchored"

    def __init__(self, options, about):
        self.strength, self.settings = options.strength, {"strength": options.strength}
        self.summary = f"strength {options.strength:g}"

    def prepare(self, records, chat, limit, dropped):
        return [(record.uuid, Example(*chat.encode_conversation(record.messages))) for record in records]

    def facts(self, examples):
        return {"anchors": len(examples)}

    def group(self, example):
        return [example.tokens]

    def weight(self, example):
        return 1

    def loss(self, model, batch, examples):
        import torch

        sums = batch.response_sums(model(batch))
        away = sums - torch.tensor([example.prior[0] for example in examples])
        total = (self.strength * away**2 - sums).sum()
        return total, {"loss": total.detach(), "away": away.abs().sum().detach()}

    def check_first(self, metrics, tolerance):
        if metrics["away"] > tolerance:
            raise UserError("the policy is not where it started")
'''


REWARD = '''
from collections import namedtuple
from dataclasses import dataclass

from cream.records import Pair

RECORDS = (Pair,)
Example = namedtuple("Example", "chosen rejected")


@dataclass
class Options:
    """Bradley-Terry reward model"""


class Stage:
    model, head, reference = "heads", {"outputs": 1, "reads": "last_token"}, None
    unit, made_for_policy, label, summary = "pairs", False, None, ""

    def __init__(self, options, about):
        self.settings = {}

    def prepare(self, records, chat, limit, dropped):
        texts = [[record.selected[-1].content, record.rejected[-1].content] for record in records]
        encoded = [chat.encode_within_limit(r.prompt, t, [True, True], limit) for r, t in zip(records, texts)]
        return [(record.uuid, Example(*rows)) for record, rows in zip(records, encoded)]

    def facts(self, examples):
        return {}

    def group(self, example):
        return list(example)

    def weight(self, example):
        return 1

    def loss(self, model, batch, examples):
        import torch.nn.functional as F

        chosen, rejected = model(batch)[:, 0].view(-1, 2).unbind(1)
        total = -F.logsigmoid(chosen - rejected).sum()
        return total, {"loss": total.detach(), "accuracy": (chosen > rejected).float().sum()}

    def check_first(self, metrics, tolerance):
        pass
'''


@pytest.fixture(scope="module")
def commands(workspace):
    """The workspace with eight pairs of unknown origin, and two stages of a user's own."""
    store.write(workspace.folder / "localdata/pairs.json", pairs(8))
    stages = workspace.folder / "cream/training/stages"
    (stages / "anchor.py").write_text(ANCHOR)
    (stages / "reward.py").write_text(REWARD)
    text = (stages / "__init__.py").read_text().replace("stages import ", "stages import anchor, reward, ")
    (stages / "__init__.py").write_text(text.replace('"dpo": dpo', '"dpo": dpo, "anchor": anchor, "reward": reward'))
    workspace.shorten("localdata/tiny/sft.json", 8)
    return workspace


@pytest.mark.slow
def test_a_stage_is_a_file_and_a_line(commands):
    """It trains by its own loss and flags, from a reference of its own; the other stages refuse its flags, as it does
    theirs."""
    run = commands.folder / "outputs/anchored"
    out = commands.run(f"{TRAIN} --train_stage anchor --strength 3 --output_dir outputs/anchored").out
    assert "ANCHOR of" in out and "strength 3" in out and "8 examples: 0 from the data, 0 cached, 8 computed" in out
    first, last = logged(run)
    assert first["away"] < 1e-3 < last["away"] and "conversations_per_second" in first
    chat = load_chat(commands.folder / "assets/tiny_m0")
    records = store.read(commands.folder / "localdata/tiny/sft.json", Conversation)
    examples = [chat.encode_conversation(record.messages) for record in records]
    start = load(commands.folder / "assets/tiny_m0")
    plan = next(global_batches(8, 4, 1, seed=0))
    wanted = -sum(score(start, [examples[i]], Budget(1000))[0][0] for i in plan) / 4
    assert first["loss"] == pytest.approx(wanted, rel=1e-4)
    meta = store.read_json(run / "meta.json")
    assert meta["settings"]["train_stage"] == "anchor" and meta["settings"]["strength"] == 3
    assert meta["counts"]["anchors"] == 8
    assert store.read_json(run / "checkpoint-last/cream.json")["stage"] == "anchor"
    again = commands.run(f"{TRAIN} --train_stage anchor --strength 3 --output_dir outputs/anchored").out
    assert "is up to date (same settings and inputs); skipping" in again
    assert "strength: 3.0 -> 4.0" in commands.refused(
        f"{TRAIN} --train_stage anchor --strength 4 --output_dir outputs/anchored"
    )
    assert "--strength belongs to --train_stage anchor" in commands.refused(f"{TRAIN} --strength 2")
    assert "--beta belongs to --train_stage dpo" in commands.refused(f"{TRAIN} --train_stage anchor --beta 2")
    refused = commands.refused(f"{TRAIN} --train_stage anchor --name localdata/pairs.json")
    assert "holds preference pairs; anchor trains on conversations" in refused
    assert "did you mean anchor" in commands.refused(f"{TRAIN} --train_stage ancor")
    assert "SFT of" in commands.run(f"{TRAIN} --dry_run").out  # data imply the stage that was there first
    assert "Anchored fine-tuning:" in commands.run("train.py --help").out


ZERO3 = pytest.param(" --deepspeed configs/ds_stage3.json", marks=pytest.mark.xdist_group("both cores"))


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["", ZERO3])
def test_a_stage_that_trains_a_reward_head_is_a_file_and_a_line(commands, flags):
    """A new head on a policy, trained by a loss of the stage's own. Any tool loads the checkpoint as a reward model;
    training goes on from it with its head, and it is refused where a policy is expected. ZeRO-3's shards of a head as
    small as this are "persistent": DeepSpeed frees them until the first step."""
    train = f"{TRAIN} --train_stage reward --name localdata/pairs.json --output_dir outputs/reward{len(flags)}"
    done = commands.run(f"{train} --epoch 4{flags}")
    assert done.commands() == []  # none of a policy's next steps
    run = commands.folder / f"outputs/reward{len(flags)}"
    folder = run / "checkpoint-last"
    assert logged(run)[-1]["loss"] < 0.5 * logged(run)[0]["loss"] and "pairs_per_second" in logged(run)[0]
    about = store.read_json(folder / "cream.json")
    assert (about["kind"], about["head"]) == ("reward_model", {"outputs": 1, "reads": "last_token"})
    theirs = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    chat, losses = load_chat(folder), []
    for record in pairs(8):
        texts = [record.selected[-1].content, record.rejected[-1].content]
        rows = chat.encode_within_limit(record.prompt, texts, [True, True], 2048)
        with torch.no_grad():
            chosen, rejected = (theirs(torch.tensor([row.ids])).logits.item() for row in rows)
        losses.append(math.log1p(math.exp(rejected - chosen)))
    again = train.replace("--train_bsz 4 --lr 1e-3", "--train_bsz 8 --lr 1e-12")
    commands.run(f"{again}b --checkpoint {folder}")
    assert logged(run.with_name(f"{run.name}b"))[0]["loss"] == pytest.approx(sum(losses) / 8, rel=1e-3)
    for other in ("train.py --name tiny_sft", "infer.py --name tiny_prompt_1"):
        refused = commands.refused(f"{other} --device cpu --model tiny --checkpoint {folder} --dry_run")
        assert "expected a policy" in refused and "found a reward model (cream.json)" in refused
    with pytest.raises(UserError, match="its head has other outputs than the stage trains"):
        load_with_head(folder, {"outputs": 2, "reads": "last_token"}, torch.float32, CPU)


@pytest.mark.slow
def test_the_first_value_of_every_loss(commands):
    """What each is at h = 0, where it has a reference; without one it is that of the log-probabilities themselves."""
    chat, start = load_chat(commands.folder / "assets/tiny_m0"), load(commands.folder / "assets/tiny_m0")
    examples = [example for _, example in dpo_stage().prepare(pairs(8), chat, 128, Counter())]
    plan = next(global_batches(8, 4, 1, seed=0))
    groups = [dpo_stage().group(examples[i]) for i in plan]
    means = [
        [s / len(t.predicted()) for s, t in zip(sums, group, strict=True)]
        for sums, group in zip(score(start, groups, Budget(1000)), groups, strict=True)
    ]
    nll = -sum(chosen for chosen, _ in means) / 4
    simpo = sum(math.log1p(math.exp(0.3 - 2 * (chosen - rejected))) for chosen, rejected in means) / 4
    wanted = {
        "sigmoid --method consistency_dyn": math.log(2),
        "sigmoid --length_normalize yes": math.log(2),
        "sigmoid --rpo_alpha 0.5": math.log(2) + 0.5 * nll,
        "hinge --method consistency_dyn": 1,
        "ipo": 1 / (4 * 0.5**2),
        "simpo --simpo_gamma 0.3": simpo,
    }
    for number, (flags, value) in enumerate(wanted.items()):
        beta = "--beta 2" if flags.startswith("simpo") else ""
        command = f"{ON_PAIRS}{number} --loss {flags}".replace("--beta 0.5", beta or "--beta 0.5")
        out = commands.run(command).out
        first, last = logged(commands.folder / f"outputs/{number}")
        assert first["loss"] == pytest.approx(value, rel=1e-4), flags
        assert ("no reference" in out) == ("ratio_abs" not in first) == flags.startswith("simpo")
        assert last["margin"] > first["margin"] and ("nll" in first) == ("rpo" in flags)
        settings = commands.read(f"outputs/{number}/meta.json")["settings"]
        assert settings.get("loss", "sigmoid") == flags.split()[0]
        assert settings.get("length_normalize", False) is (flags.split()[0] in ("ipo", "simpo") or "length" in flags)
    assert store.read_json(commands.folder / "outputs/5/meta.json")["settings"]["simpo_gamma"] == 0.3


REFUSED = {
    "ipo --method consistency_avg": "--loss ipo with --method consistency_avg",
    "ipo --fixed_consistency 0.9": "--loss ipo with --fixed_consistency 0.9",
    "ipo --fixed_consistency 0": "--loss ipo with --fixed_consistency 0",
    "simpo --method consistency_dyn": "or --simpo_gamma 0",
    "hinge --simpo_gamma 1": "--simpo_gamma belongs to --loss simpo",
    "ippo": "did you mean ipo",
    "hinge --train_stage sft": "--loss belongs to --train_stage dpo",
    "hinge --rpo_alpha -1": "--rpo_alpha",
}


@pytest.mark.slow
@pytest.mark.parametrize("flags", REFUSED)
def test_losses_that_are_not_defined_are_refused(commands, flags):
    assert REFUSED[flags] in commands.refused(f"{ON_PAIRS}x --loss {flags}")


@pytest.mark.slow
def test_a_loss_with_a_target_trains_where_every_c_is_1(commands):
    """Also pairs that were made for a method with C."""
    commands.run(f"{ON_PAIRS}ipo --loss ipo --method consistency_avg --fixed_consistency 1 --dry_run")
    commands.run(f"{ON_PAIRS}simpo --loss simpo --simpo_gamma 0 --method consistency_dyn --dry_run")


# Several processes --------------------------------------------------------------------------------------------------


@pytest.fixture
def forks(monkeypatch):
    """Training processes that need not import torch again."""
    monkeypatch.setattr(launch, "START", "fork")


def work_with_uneven_memory(made):
    """As on two GPUs of which one has more memory free."""
    loop.budget = lambda *args, **more: Budget(80 if os.environ.get("RANK") == "1" else 40)
    work(made)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_two_processes_of_unequal_memory_equal_one(job, tiny_folder, stage, forks):
    """9 examples in batches of 4, each in micro-batches: the last is one example, so that one process gets an empty
    micro-batch."""
    batches = {
        name: dataclasses.replace(FLAGS, train_bsz=size, max_tokens_per_batch=80)
        for name, size in {"one": 4, "two": 2}.items()
    }
    one, two = (job(stage, name, **by_own_c(stage), limit_size=9, flags=batches[name]) for name in batches)
    launch.run(work_with_uneven_memory, two, ["cpu", "cpu"], "localhost", None, {})
    two.data.with_name("dpo.scores.jsonl").unlink(missing_ok=True)  # each computes its own reference
    work(one)
    state = load_file(tiny_folder / "model.safetensors")
    start = torch.cat([state[name].flatten() for name in sorted(state)])
    assert (weights(two) - weights(one)).norm() <= 1e-3 * (weights(one) - start).norm()
    for metric in ("loss", "grad_norm"):
        assert logged(two.run)[0][metric] == pytest.approx(logged(one.run)[0][metric], rel=1e-4)


@pytest.mark.slow
def test_a_users_mistake_in_a_worker_ends_all_of_them(job, capfd, forks):
    with pytest.raises(SystemExit) as ended:
        launch.run(work, job("sft", "run", max_length=3), ["cpu", "cpu"], "localhost", None, {})
    assert ended.value.code == 2 and "longer than 3 tokens" in capfd.readouterr().err


def test_a_launchers_world_is_taken_as_it_is(monkeypatch):
    calls = []
    assert launch.given_world() is None
    launch.run(calls.append, "job", ["cpu"], "localhost", None, {})
    monkeypatch.setattr(launch, "_join", lambda worker, config, kind, about: worker(f"{config}, joined"))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launch.given_world() == 2
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(UserError, match="not LOCAL_RANK"):  # accelerate would train alone, unsaid
        launch.run(calls.append, "job", ["cpu"], "localhost", None, {})
    for name, value in launch._place(0, 0, 2, 2, "localhost", 29500).items():
        monkeypatch.setenv(name, value)
    launch.run(calls.append, "job", ["cpu", "cpu"], "localhost", None, {})  # starts nothing
    assert calls == ["job", "job, joined"]
