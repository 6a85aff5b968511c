"""Reward models on preference pairs (Bradley-Terry, ODIN): losses against trl, scipy and plain Python, held-out
records, terms of a whole global batch, folders that other tools read alike, and the command lines."""

import copy
import json
import logging
import math
from collections import Counter, defaultdict
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import pearsonr
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM, pipeline
from workspace import LOOP, M1, ON

from cream import losses
from cream.errors import UserError
from cream.evaluation.statistics import wilson_interval
from cream.files.provenance import REWARD_MODEL
from cream.files.store import read
from cream.model.checkpoint import save
from cream.model.hardware import Budget
from cream.model.load import load, load_chat, load_tokenizer
from cream.model.reward_head import Heads, choose_pad, read_heads
from cream.records import Conversation, Message, Pair, Prompt, Rewards
from cream.text.chat import UNFINISHED, Chat
from cream.text.held_out import prompt_key
from cream.training.heldout import LEAKED, HeldOut, HeldOutOptions, split, without_trained
from cream.training.loop import GlobalBatches
from cream.training.parallel import Replicas
from cream.training.stages import bradley_terry, odin

CPU = torch.device("cpu")
HEAD = {"outputs": 1, "reads": "last_token"}


@pytest.fixture(autouse=True)
def fresh_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)


def pairs(count=12):
    """Pairs of two lengths, with labels of all kinds and margins."""
    prompts = [[Message("user", f"Tom has {20 + i} books. How many now?")] for i in range(count)]
    return [
        Pair(
            uuid=f"p{i}",
            prompt=prompt,
            selected=[*prompt, Message("assistant", f"Answer: {20 + i}")],
            rejected=[*prompt, Message("assistant", "5 + 3 = 8. " * (1 + i % 4))],
            consistency=(None, 0.2, 0.9, 0.5)[i % 4],
            margin=(0.0, 0.5, 1.5)[i % 3],
            rejected_truncated=i % 5 == 0,
        )
        for i, prompt in enumerate(prompts)
    ]


def stage_of(module=bradley_terry, **options):
    return module.Stage(module.Options(**options), {})


def prepared(stage, chat, records=None):
    return [example for _, example in stage.prepare(records or pairs(), chat, 128, Counter())]


def model_of(folder, outputs=1, seed=0):
    """A new head on a policy, with rewards of about 1."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = load(folder, REWARD_MODEL, torch.float32, CPU, new_head=HEAD | {"outputs": outputs})
        model.score.weight.data.normal_(0, 0.2)
    return model


def gradients(model):
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in model.parameters()])


# Losses ---------------------------------------------------------------------------------------------------------------


def log_sigma(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


@pytest.mark.parametrize("name", bradley_terry.LOSSES)
def test_a_pair_s_loss_is_that_of_the_formula(name):
    """-C log σ(d - m) - (1 - C) log σ(-d - m) in plain Python; and hinge, max(0, 1 - d + m), mixed alike."""
    one = {"logistic": lambda x: -log_sigma(x), "hinge": lambda x: max(0, 1 - x)}[name]
    rows = [(1.5, 0.25, 1.0, 0.0), (1.5, 0.25, 0.3, 0.0), (-2.0, 1.0, 0.9, 0.75), (0.5, 0.5, 0.5, 2.0)]
    examples = [bradley_terry.Example(None, None, c, m) for *_, c, m in rows]
    chosen, rejected = (torch.tensor(column) for column in list(zip(*rows, strict=True))[:2])
    loss = getattr(losses, bradley_terry.LOSSES[name])
    found, metrics = bradley_terry.pair_loss(chosen, rejected, examples, loss)
    wanted = [c * one(a - b - m) + (1 - c) * one(b - a - m) for a, b, c, m in rows]
    assert found.tolist() == pytest.approx(wanted, abs=1e-6)
    assert metrics["margin"].tolist() == [1.25, 1.25, -3.0, 0.0]
    assert bradley_terry.right(chosen - rejected, examples)["accuracy"].tolist() == [1, 0, 0, 0.5]


def trl_loss(model, rows, margin=None, centring=None):
    """The mean loss of trl's RewardTrainer over a batch of padded rows, chosen ones first."""
    from trl.trainer.reward_trainer import RewardTrainer

    width = max(map(len, rows))
    inputs = {
        "input_ids": torch.tensor([row.ids + [model.config.pad_token_id] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
    } | ({} if margin is None else {"margin": margin})
    trainer = SimpleNamespace(
        model=model,
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        args=SimpleNamespace(center_rewards_coefficient=centring),
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    return RewardTrainer.compute_loss(trainer, model, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("margin, centring", [(None, 0.0), ("scores", 0.1)])
def test_loss_and_gradient_are_trl_s(tiny_folder, tiny_chat, margin, centring):
    stage = stage_of(soft_labels=False, reward_margin=margin, center_rewards=centring)
    examples, model = prepared(stage, tiny_chat), Heads(model_of(tiny_folder))
    assert model.share
    ours, metrics = stage.loss(model, model.pack(list(map(stage.group, examples))), examples)
    (ours / len(examples)).backward()
    plain = model_of(tiny_folder)
    rows = [e.chosen for e in examples] + [e.rejected for e in examples]
    theirs = trl_loss(plain, rows, margin and torch.tensor([e.margin for e in examples]), centring or None)
    theirs.backward()
    assert ours.item() / len(examples) == pytest.approx(theirs.item(), abs=1e-5)
    assert metrics["loss"] == ours
    found, wanted = gradients(model), gradients(plain)
    assert wanted.norm() > 0.1 and (found - wanted).norm() <= 1e-4 * wanted.norm()


def test_odin_s_length_loss_is_that_of_scipy_s_correlations():
    generator = torch.Generator().manual_seed(0)
    quality, length = torch.randn(2, 40, generator=generator)
    tokens = torch.randint(1, 200, (40,), generator=generator).float()
    found = losses.length_separation(quality, length, tokens)
    rho = [pearsonr(x, tokens).statistic for x in (quality, length)]
    assert [x.item() for x in found] == pytest.approx([abs(rho[0]) - rho[1], *rho], abs=1e-6)
    assert losses.pearson(quality, torch.ones(40)) == 0


def test_odin_s_loss_is_that_of_the_formula(tiny_folder, tiny_chat):
    """The paper's form, by hand: pairs by the sum of both outputs, and |cos| of the centred rows of the head."""
    stage = stage_of(odin, ortho_weight=0.5)
    examples, model = prepared(stage, tiny_chat), Heads(model_of(tiny_folder, outputs=2))
    found, metrics = stage.loss(model, model.pack(list(map(stage.group, examples))), examples)
    values = read_heads(model, list(map(stage.group, examples)), Budget(1000))
    wanted, right = 0.0, 0.0
    for example, ((l1, q1), (l2, q2)) in zip(examples, values, strict=True):
        d, c = l1 + q1 - l2 - q2, example.consistency
        wanted -= c * log_sigma(d) + (1 - c) * log_sigma(-d)
        right += 0.5 if c == 0.5 else float((q1 - q2) * (c - 0.5) > 0)
    a, b = ([x - sum(row) / len(row) for x in row] for row in model.head.weight.tolist())
    cosine = sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)
    assert metrics["loss_rank"].item() == pytest.approx(wanted, rel=1e-5) and metrics["accuracy"] == right
    assert found.item() == pytest.approx(wanted + 0.5 * 12 * abs(cosine), rel=1e-5)


@pytest.mark.parametrize("max_tokens", [10_000, 150])
def test_a_term_of_the_whole_batch_has_its_own_gradient_in_micro_batches(tiny_folder, tiny_chat, tmp_path, max_tokens):
    """ODIN's correlations, of which no part is a micro-batch's: against autograd through all responses at once."""
    stage, model = stage_of(odin), Heads(model_of(tiny_folder, outputs=2))
    examples, accelerator, summed = prepared(stage, tiny_chat), Accelerator(cpu=True), Counter()
    batches = GlobalBatches(accelerator, Replicas(accelerator, model, 0.1, 0.0), stage, examples, Budget(max_tokens))
    logger = SimpleNamespace(add=lambda m: summed.update({k: v.item() for k, v in m.items()}), add_work=lambda *a: None)
    total = batches.backward(range(12), logger)
    whole = Heads(model_of(tiny_folder, outputs=2))
    batch = whole.pack(list(map(stage.group, examples)))
    term, metrics = stage.of_all(whole(batch).view(12, 2, 2), examples)
    loss = stage.loss(whole, batch, examples)[0] / 12 + term
    loss.backward()
    found, wanted = gradients(model), gradients(whole)
    assert abs(term.item()) > 0.01 and (found - wanted).norm() <= 1e-4 * wanted.norm()
    assert summed["loss"] / total == pytest.approx(loss.item(), abs=1e-5)
    assert summed["rho_length"] / total == pytest.approx(metrics["rho_length"].item(), abs=1e-5)


def test_few_responses_have_no_correlation(tiny_chat):
    stage = stage_of(odin)
    examples = prepared(stage, tiny_chat)[:7]
    term, _ = stage.of_all(torch.randn(7, 2, 2, requires_grad=True), examples)
    assert term == 0
    alike = [bradley_terry.Example(examples[0].chosen, examples[0].chosen)] * 12
    assert stage.of_all(torch.randn(12, 2, 2), alike)[0] == 0


# Pairs ----------------------------------------------------------------------------------------------------------------


def test_pairs_become_examples_or_are_counted(tiny_chat):
    """Both conversations whole, as the template writes them, whatever the pair says of their ends."""
    dropped, records = Counter(), pairs(4)
    prompt = records[0].prompt
    same = Pair(uuid="same", prompt=prompt, selected=records[0].selected, rejected=records[0].selected)
    long = Pair(
        uuid="long", prompt=prompt, selected=records[0].selected, rejected=[*prompt, Message("assistant", "x" * 200)]
    )
    stage = stage_of(reward_margin="scores")
    kept = stage.prepare([*records, same, long], tiny_chat, 128, dropped)
    assert [uuid for uuid, _ in kept] == ["p0", "p1", "p2", "p3"]
    assert dropped == {"both responses are the same": 1, "longer than 128 tokens": 1}
    assert [(e.consistency, e.margin) for _, e in kept] == [(1.0, 0.0), (0.2, 0.5), (0.9, 1.5), (0.5, 0.0)]
    turns = [{"role": m.role, "content": m.content} for m in records[0].rejected]
    ids = tiny_chat.tokenizer.apply_chat_template(turns, return_dict=False)
    assert kept[0][1].rejected.ids == ids and kept[0][1].rejected.num_response_tokens == len(ids) - len(
        tiny_chat.encode_prompt(prompt)
    )
    assert all(e.consistency == 1 for e in prepared(stage_of(soft_labels=False), tiny_chat))
    bare = Pair(uuid="bare", prompt=prompt, selected=records[0].selected, rejected=records[0].rejected)
    bare.extra = {"chosen_score": 4, "rejected_score": 1.5}
    assert prepared(stage, tiny_chat, [bare])[0].margin == 2.5
    bare.extra = {}
    assert not stage.prepare([bare], tiny_chat, 128, dropped) and dropped[bradley_terry.NO_MARGIN] == 1


def test_a_conversation_is_read_to_the_end_that_its_template_writes(tiny_tokenizer):
    """ChatML ends it with a line break after the end of turn: there others read a reward model, too."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    )
    chat, prompt = Chat(tokenizer), [Message("user", "How many?")]
    turns = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": " Answer: 5 "}]
    (row,) = chat.encode_written(prompt, [" Answer: 5 "], 99)
    assert row.ids == tokenizer.apply_chat_template(turns, return_dict=False) and row.ids[-1] == chat.last_written()
    assert row.ids[-2] == chat.end_of_turn and row.spans == [(len(chat.encode_prompt(prompt)), len(row))]
    assert chat.encode_written(prompt, [" Answer: 5 "], 9) == ["longer than 9 tokens"]


def test_a_thought_is_removed_where_thoughts_are_dropped(tiny_tokenizer):
    chat, prompt = Chat(tiny_tokenizer, thoughts="drop"), [Message("user", "How many?")]
    texts = ["<think>\nhm\n</think>\n\n5", "hm</think>5", "<think>hm", "5"]
    found = chat.encode_written(prompt, texts, 99, opened=False)
    assert found[0] == found[1] == found[3] and found[2] == UNFINISHED
    assert chat.encode_written(prompt, texts[3:], 99, opened=True) == [UNFINISHED]


@pytest.mark.parametrize("text", ["-1", "nan", "inf", "margin"])
def test_a_margin_is_scores_or_a_number(text):
    with pytest.raises(UserError, match=f"--reward_margin {text}: expected scores"):
        stage_of(reward_margin=text)
    assert stage_of(reward_margin="0.5").margin == 0.5


# Held-out records -----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.floats(0.05, 0.95), st.integers(0, 5))
def test_no_prompt_is_on_both_sides(prompts, share, seed):
    records = [pairs(31)[i] for i in prompts]
    with suppress(UserError):  # too few prompts
        trained, held = split(records, share, seed)
        assert sorted(r.uuid for r in trained + held) == sorted(r.uuid for r in records)
        assert {prompt_key(r) for r in trained}.isdisjoint(prompt_key(r) for r in held) and trained and held


def test_about_a_share_is_held_out():
    trained, held = split(pairs(1000), 0.2, 0)
    assert 160 < len(held) < 240 and [r.uuid for r in split(pairs(1000), 0.2, 1)[1]] != [r.uuid for r in held]


def test_a_prompt_that_is_trained_on_is_not_held_out():
    """Nor another wording of it in case and white space, nor a conversation that continues it."""
    records, dropped = pairs(4), Counter()
    other = Pair(uuid="x", prompt=(p := [Message("user", "TOM has 20  books.\nHow many now?")]),
                 selected=[*p, Message("assistant", "1")], rejected=[*p, Message("assistant", "2")])  # fmt: skip
    assert without_trained([other, records[3]], records[:2], dropped) == [records[3]]
    assert dropped == {LEAKED: 1}
    talk = Conversation(messages=[*p, Message("assistant", "3")])
    longer = Prompt(messages=[*talk.messages, Message("user", "Sure?")])
    assert prompt_key(longer) == prompt_key(talk) == prompt_key(records[0])


@pytest.mark.parametrize("module, outputs", [(bradley_terry, 1), (odin, 2)])
def test_held_out_metrics_are_those_of_all_at_once(tiny_folder, tiny_chat, module, outputs):
    stage, model = stage_of(module), Heads(model_of(tiny_folder, outputs))
    examples, accelerator = prepared(stage, tiny_chat), Accelerator(cpu=True)
    held = HeldOut(stage, [("", example) for example in examples], every=3)
    assert [held.due(step, step == 4) for step in range(1, 7)] == [False, False, True, True, False, True]
    found = held(accelerator, SimpleNamespace(whole=model), 150)
    batch = model.pack(list(map(stage.group, examples)))
    loss, metrics = stage.loss(model, batch, examples)
    whole = loss.item() / 12 + (stage.of_all(model(batch).view(12, 2, 2), examples)[0].item() if outputs == 2 else 0)
    assert found["eval_loss"] == pytest.approx(whole, rel=1e-4) and found["eval_n"] == 12
    assert found["eval_accuracy"] == pytest.approx(metrics["accuracy"].item() / 12)
    low, high = wilson_interval(metrics["accuracy"].item(), 12)
    assert (found["eval_accuracy_low"], found["eval_accuracy_high"]) == (low, high)
    assert model.training and held.last == found


def test_flags_of_held_out_records_that_contradict_each_other():
    with pytest.raises(UserError, match="--eval_name and --eval_share"):
        stage_of(eval_name="x.json", eval_share=0.1)
    with pytest.raises(UserError, match="--eval_every needs held-out records"):
        stage_of(odin, eval_every=3)
    assert HeldOutOptions().settings() == {} and HeldOutOptions(eval_share=0.1).settings() == {"eval_share": 0.1}


# Folders --------------------------------------------------------------------------------------------------------------


def test_transformers_pipeline_gives_the_same_rewards(tiny_folder, tiny_tokenizer, tmp_path):
    """In padded batches, with its own default: the output as it is."""
    save(model_of(tiny_folder), tiny_tokenizer, tmp_path / "rm", None, {})
    chat, pipe = load_chat(tmp_path / "rm"), pipeline("text-classification", str(tmp_path / "rm"), device="cpu")
    prompt, texts = [Message("user", "How many?")], ["Answer: 5", "7 + 3 = 10. Answer: 10", ""]
    rows = chat.encode_written(prompt, texts, 100)
    (ours,) = read_heads(Heads(load(tmp_path / "rm", REWARD_MODEL, torch.float32, CPU)), [rows], Budget(999))
    written = [chat._render([*prompt, Message("assistant", text)], False) for text in texts]
    for side in ("left", "right"):
        pipe.tokenizer.padding_side = side
        theirs = [each["score"] for each in pipe(written, batch_size=3, add_special_tokens=False)]
        assert [output for (output,) in ours] == pytest.approx(theirs, abs=1e-4)


@pytest.mark.slow
@pytest.mark.xdist_group("vllm")
def test_vllm_gives_the_same_rewards(tiny_folder, tiny_tokenizer, tmp_path, with_vllm, repo):
    """By its pooling runner, with its own default: the output as it is, at the last token."""
    save(model_of(tiny_folder), tiny_tokenizer, tmp_path / "rm", None, {})
    chat = load_chat(tmp_path / "rm")
    rows = chat.encode_written([Message("user", "How many?")], ["Answer: 5", "7 + 3 = 10. Answer: 10", ""], 100)
    (ours,) = read_heads(Heads(load(tmp_path / "rm", REWARD_MODEL, torch.float32, CPU)), [rows], Budget(999))
    done = with_vllm.run(repo, ["tests/pooled.py", str(tmp_path / "rm"), json.dumps([row.ids for row in rows])])
    assert done.code == 0, done.err
    assert torch.allclose(torch.tensor(json.loads(done.out.splitlines()[-1])), torch.tensor(ours), atol=1e-4)


def test_pad_never_ends_a_conversation(tiny_folder, tiny_tokenizer, caplog, monkeypatch):
    """A policy's pad that is its end of turn gives way; a reward model keeps its own, and what differs is said."""
    monkeypatch.setattr(logging.getLogger("cream"), "propagate", True)
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    chat, model = Chat(tokenizer), model_of(tiny_folder)
    model.config.pad_token_id = tokenizer.eos_token_id
    choose_pad(model, chat, keep=True)
    assert model.config.pad_token_id == tokenizer.eos_token_id and "vLLM reads the last one" in caplog.text
    caplog.clear()
    choose_pad(model, chat, keep=False)
    assert model.config.pad_token_id == tokenizer.pad_token_id == tokenizer.bos_token_id and "vLLM" not in caplog.text
    model.config.pad_token_id = None
    choose_pad(model, Chat(copy.deepcopy(tiny_tokenizer)), keep=True)
    assert model.config.pad_token_id == tiny_tokenizer.pad_token_id


# Command lines --------------------------------------------------------------------------------------------------------

TRAIN = f"train.py {ON} --train_stage bradley_terry --name {LOOP}/pairs.json --limit_size 60 --train_bsz 8 --lr 1e-3"
REWARD = f"rewarding.py {ON} --input_file {LOOP}/samples.jsonl --limit_size 6"


@pytest.fixture(scope="module")
def world(looped):
    """A reward model that was trained on the loop's pairs, with adapters, some prompts held out."""
    looped.done = looped.run(f"{TRAIN} --eval_share 0.3 --lora yes --epoch 2 --output_dir outputs/rm --register rm")
    return looped


def test_a_reward_model_is_trained_and_rewards(world):
    """Its rewards are those of transformers' own class over what the template writes; then they are cached."""
    rows = [json.loads(line) for line in (world.folder / "outputs/rm/log.jsonl").read_text().splitlines()]
    held = [row for row in rows if "eval_accuracy" in row]
    assert (
        len(held) == 2 and held[-1]["eval_accuracy_low"] < held[-1]["eval_accuracy"] <= held[-1]["eval_accuracy_high"]
    )
    folder = world.folder / "outputs/rm/checkpoint-last"
    about = json.loads((folder / "cream.json").read_text())
    assert about["held_out"]["eval_loss"] == held[-1]["eval_loss"] and about["head"] == HEAD
    assert "--reward bradley_terry --reward_model rm --input_file SAMPLES" in world.done.out
    done = world.run(f"{REWARD} --reward bradley_terry --reward_model rm --output outputs/r.json")
    assert "outputs of responses: " in done.out and "computed" in done.out
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(folder)
    for record in read(world.folder / "outputs/r.json", Rewards):
        for conversation, reward in zip(record.response, record.reward, strict=True):
            turns = [{"role": m.role, "content": m.content} for m in conversation]
            ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=False)
            with torch.no_grad():
                assert reward == pytest.approx(model(ids).logits.item(), abs=1e-4)
    again = world.run(f"{REWARD} --reward bradley_terry --reward_model {folder} --output outputs/r2.json").out
    assert "from the score cache" in again and "computed" not in again
    assert world.read("outputs/r2.json") == world.read("outputs/r.json")
    world.run("make_pairs.py --strategy extremes --rewards outputs/r.json --output outputs/rm_pairs.json")
    world.run(f"{REWARD} {M1} --ref_model_ckpt none --output outputs/r6.json")
    world.run("cal_consistency.py --file1 outputs/r6.json --file2 outputs/r.json --output outputs/c.json")


def test_wrong_reward_models_are_refused(world):
    """One message each, before anything is written."""
    folder = world.folder / "outputs/rm/checkpoint-last"
    two, broken = world.folder / "outputs/two", world.folder / "outputs/broken"
    for place, outputs in ((two, 2), (broken, 1)):
        model = model_of(world.folder / "assets/tiny_m0", outputs)
        if place == broken:
            model.model.norm.weight.data[:] = math.nan
        save(model, load_tokenizer(folder), place, None, {})
    refused = {
        "bradley_terry": "needs --reward_model NAME|FOLDER|HUB ID",
        "bradley_terry --reward_model nothing": "neither a folder",
        "bradley_terry --reward_model tiny": "expected a reward model, found a policy",
        "bradley_terry --reward_model outputs/two": "has 2 outputs, and --reward bradley_terry takes 1",
        "odin --reward_model rm": "its head has 1 output, and --reward odin takes 2",
        "dpo --reward_model rm": "--reward_model belongs to --reward bradley_terry, odin, pairwise",
    }
    for flags, message in refused.items():
        assert message in world.refused(f"{REWARD} --reward {flags} --output outputs/x.json"), flags
    error = world.refused(f"{REWARD} --reward bradley_terry --reward_model outputs/broken --output outputs/x.json")
    assert "its outputs for a probe are not finite numbers" in error
    done = world.run(f"{REWARD} --reward odin --reward_model outputs/two --output outputs/two.json")
    record = next(read(world.folder / "outputs/two.json", Rewards))
    assert len(record.parts["length"]) == len(record.reward) and "have no reward" not in done.out


def test_held_out_records_of_a_file(world):
    """What is trained on is left out of it; nothing is left of the very same file."""
    assert "no record is held out" in world.refused(f"{TRAIN} --eval_name {LOOP}/pairs.json --output_dir outputs/same")
    error = world.refused(f"{TRAIN} --eval_name localdata/tiny/sft.json --output_dir outputs/other")
    assert "holds conversations, on which bradley_terry does not train" in error
    assert "neither a file" in world.refused(f"{TRAIN} --eval_name nothing --output_dir outputs/other")
    few = TRAIN.replace("bradley_terry", "odin").replace("--train_bsz 8", "--train_bsz 4")
    assert "needs at least 8 pairs a step, and here are 4" in world.refused(f"{few} --output_dir outputs/other")


# Real data ------------------------------------------------------------------------------------------------------------

SOURCES = ("rm_anthropic_helpful", "rm_shp", "rm_summarize", "ultra_binary")  # HH-RLHF is written as it is published
OTHER_DATA = {  # of stages that do not train on pairs
    "prm": "--name localdata/mix.steps.json --limit_size 5 --epoch 4 --lr 1e-2",  # with less it does not sign yet
    "sft": "--name localdata/pairwise.sft.json --limit_size 8",
}
HELD_OUT, MEASURED = "localdata/mix.held_out.dpo.json", "outputs/reward_eval/mix.held_out"


def as_hh(row):
    """A row of HH-RLHF: its conversations as texts."""
    names = {"human": "Human", "gpt": "Assistant"}
    turns = {side: [f"\n\n{names[m['from']]}: {m['value']}" for m in row[side]] for side in ("chosen", "rejected")}
    return json.dumps({side: "".join(texts) for side, texts in turns.items()})


@pytest.fixture(scope="module")
def real(looped, shared):
    """Public samples as pairs with held-out prompts, as comparisons and as steps; and two models: a real one, and a
    random Llama of head size 32 with another tokenizer."""
    data = shared / "data"
    looped.models = [data / "models/stories260K", looped.folder / "outputs/llama"]
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokenizer = load_tokenizer(data / "tokenizers/mistral")
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **shape)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save(LlamaForCausalLM(config), tokenizer, looped.models[1], None, {})
    sources = [data / f"pref/upstream_samples/{name}.jsonl" for name in SOURCES]
    rows = map(json.loads, sources[0].read_text().splitlines())
    (looped.folder / "hh.jsonl").write_text("\n".join(map(as_hh, rows)))
    with looped.stages.together():
        steps = [data / f"prm/samples_{name}.jsonl" for name in ("math-shepherd", "prm800k")]
        for path in ("hh.jsonl", *sources[1:], *steps):
            looped.run(f"prepare_data.py import {path}")
        pairs = " ".join(f"localdata/{name}.dpo.json" for name in ("hh", *SOURCES[1:]))
        done = looped.run(f"prepare_data.py mix {pairs} --held_out 0.3")
        assert f"--name localdata/mix.dpo.json --eval_name {HELD_OUT}" in done.out
        looped.run("prepare_data.py pairwise localdata/mix.dpo.json --output localdata/pairwise.sft.json")
        looped.run(
            "prepare_data.py mix localdata/samples_math-shepherd.steps.json localdata/samples_prm800k.steps.json"
        )
    return looped


@pytest.mark.parametrize("model, kinds", [(0, "odin prm"), (1, "bradley_terry sft")])
def test_public_preferences_to_a_measured_reward(real, model, kinds):
    """An optimiser step or a few on real text, and the commands that training prints; a reward model on pairs is, when
    it is measured, as good as it was while training."""
    train = f"train.py --device cpu --model {real.models[model]} --train_bsz 32 --train_stage"
    pairs = f"--name localdata/mix.dpo.json --eval_name {HELD_OUT}"
    with real.stages.together():
        for stage in kinds.split():
            run = f"outputs/{stage}{model}"
            done = real.run(f"{train} {stage} {OTHER_DATA.get(stage, pairs)} --output_dir {run}")
            reward, measure = done.commands()
            if stage in OTHER_DATA:
                reward = reward.replace("SAMPLES", f"{MEASURED}/samples.jsonl")
                real.run(f"{reward} --output {run}/r.json")
                continue
            real.run(measure.replace("DATA", HELD_OUT))
            (summary,) = (real.folder / MEASURED).glob(f"*{stage}{model}*.summary.json")
            found, held = json.loads(summary.read_text())["calibration"], real.read(f"{run}/checkpoint-last/cream.json")
            assert found["all"]["accuracy_at_100"]["value"] == pytest.approx(held["held_out"]["eval_accuracy"])
            if stage == "bradley_terry":
                assert found["all"]["nll"]["value"] == pytest.approx(held["held_out"]["eval_loss"], rel=1e-4)
        if model == 0:
            error = real.refused(f"{train} sft {OTHER_DATA['sft']} --output_dir outputs/no")
            assert "the label 'A' is not one token" in error
