"""Reward models: transformers' own outputs over trees, folders that any tool loads, and never taken for a policy."""

import json
import logging
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_trees import END, GROUPS, MODELS, PADDED, PRECISIONS, WRONG, gradient
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from cream.errors import UserError
from cream.files import folders
from cream.files.provenance import REWARD_MODEL, read_kind
from cream.model import trees
from cream.model.adapters import adapter_base
from cream.model.checkpoint import save
from cream.model.hardware import Budget
from cream.model.load import load, load_policy
from cream.model.logprobs import LogProbs
from cream.model.lora import add_lora, merged
from cream.model.reward_head import Heads, read_heads
from cream.text.chat import Tokens

CPU = torch.device("cpu")
READS = {"last_token": AutoModelForSequenceClassification, "step_token": AutoModelForTokenClassification}
HEADS = [
    (name, reads)
    for name in MODELS
    for reads, auto in READS.items()
    if AutoConfig.for_model(name).__class__ in auto._model_mapping
]
STEPS = [  # the responses in steps of up to 7 tokens; those of one group have none
    [
        Tokens(row.ids, [] if g == 3 else [(s, min(s + 7, len(row))) for s in range(row.spans[0][0], len(row), 7)])
        for row in group
    ]
    for g, group in enumerate(GROUPS)
]


def rows_of(reads):
    return GROUPS if reads == "last_token" else STEPS


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Makes a folder as transformers itself saves it, with large weights, and a head of 3 outputs of about 1."""
    home = tmp_path_factory.mktemp("reward models")

    def make(name, reads="last_token", std=0.25, **changes):
        place = home / f"{name}-{reads}-{std}-{changes}"
        if not place.exists():
            config = AutoConfig.for_model(name, num_labels=3, **END | (MODELS | PADDED)[name] | changes)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = READS[reads].from_config(config)
                for parameter in model.parameters():
                    if parameter.ndim > 1 or parameter.shape == (3,):
                        parameter.data.normal_(0, std)
            model.save_pretrained(place)
        return place

    return make


@pytest.fixture
def said(caplog, monkeypatch):
    """What the toolkit's log says."""
    monkeypatch.setattr(logging.getLogger("cream"), "propagate", True)
    caplog.set_level(logging.INFO, "cream")
    return caplog


def own(folder, reads, groups):
    """Outputs by transformers alone, each group as padded rows: (reads, outputs) of each response. Eager attention:
    sdpa, its default, leaves Gemma 2's caps out."""
    model = READS[reads].from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    outputs = []
    for group in groups:
        width = max(map(len, group))
        ids = torch.tensor([row.ids + [0] * (width - len(row)) for row in group])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in group])
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        if reads == "last_token":
            outputs.append(list(logits[:, None]))
        else:
            outputs.append([logits[i, [end - 1 for _, end in row.spans]] for i, row in enumerate(group)])
    return outputs


def close(found, wanted, tolerance=1e-4):
    """The same outputs of each response."""
    for ours, theirs in zip(found, wanted, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            a = torch.as_tensor(a).reshape(-1, 3)
            torch.testing.assert_close(a, b.reshape(-1, 3), atol=tolerance, rtol=0)


# Outputs --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("name", "reads"), HEADS)
def test_outputs_equal_transformers_own(make, name, reads):
    """Over trees, in one row or many, and over padded rows; pad is eos, with which most responses end."""
    folder, groups = make(name, reads), rows_of(reads)
    wanted = own(folder, reads, groups)
    model, padded = (Heads(load(folder, REWARD_MODEL, torch.float32, CPU), share) for share in (True, False))
    assert model.share and not padded.share and model.reads == reads
    assert torch.cat([x for group in wanted for x in group]).std() > 0.3
    for found in (read_heads(model, groups, Budget(4000)), read_heads(padded, groups, Budget(4000))):
        close(found, wanted)
    close(read_heads(model, groups[::5], Budget(40)), wanted[::5])
    if reads == "last_token":  # a list of outputs; of steps a list of lists
        assert len(read_heads(model, groups[:1], Budget(40))[0][0]) == 3


@pytest.mark.parametrize(
    ("name", "reads"), [h for h in HEADS if h[0] in ("llama", "qwen3", "gemma2", "gpt2", "mistral")]
)
def test_a_gradient_equals_that_of_each_row_alone(make, name, reads):
    """Of a Bradley-Terry loss of pairs (arXiv 2203.02155, eq. 1), against transformers' own forward pass row by row."""
    folder = make(name, reads)
    groups = [[row for row in group[:2] if row.spans] for group in rows_of(reads)[1:]]
    groups = [group for group in groups if len(group) == 2]
    model = Heads(load(folder, REWARD_MODEL, torch.float32, CPU))
    model.train()  # nothing in it drops out
    batch = model.pack(groups)
    rewards = batch.response_sums(model(batch)[:, 0]).view(-1, 2)
    found = gradient(model, -torch.nn.functional.logsigmoid(rewards[:, 0] - rewards[:, 1]).sum())
    plain, losses = load(folder, REWARD_MODEL, torch.float32, CPU), []
    for pair in groups:
        scores = []
        for row in pair:
            logits = plain(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0]
            scores.append(logits[0] if reads == "last_token" else sum(logits[end - 1, 0] for _, end in row.spans))
        losses.append(-torch.nn.functional.logsigmoid(scores[0] - scores[1]))
    wanted = gradient(plain, sum(losses))
    assert wanted.norm() > 1
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("pad_id", [None, 0, 5])
def test_the_last_token_is_the_last_that_is_not_pad(make, pad_id):
    """As transformers has it: however many pads end a row, wherever else they are; of pads alone the first."""
    folder = make("llama", pad_token_id=pad_id)
    rows = [Tokens(ids, []) for ids in ([7, 0, 8, 0, 0], [7, 5, 5], [0, 0], [9], [5, 5, 5, 3], [0, 4, 0])]
    model, plain = (load(folder, REWARD_MODEL, torch.float32, CPU) for _ in range(2))
    with torch.no_grad():
        wanted = [plain(input_ids=torch.tensor([row.ids])).logits for row in rows]
    for share in (True, False):
        close(
            [[x] for group in read_heads(Heads(model, share), [rows], Budget(99)) for x in group], [[x] for x in wanted]
        )


def test_a_linear_head_computes_in_float32(make):
    """Whatever the weights, and under autocast: a bfloat16 reward of 4.3 is one in 1/32."""
    folder = make("llama")
    for autocast in (False, True):
        model = Heads(load(folder, REWARD_MODEL, torch.float32 if autocast else torch.bfloat16, CPU))
        batch = model.pack(GROUPS)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found, hidden = model(batch), model.hidden(batch)
        exact = hidden.double() @ model.head.weight.double().T
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, atol=1e-4, rtol=0)


@pytest.mark.parametrize("max_tokens", [1, 90, 10_000])
def test_outputs_do_not_depend_on_the_batch(make, max_tokens):
    folder, done = make("mistral"), []
    model = Heads(load(folder, REWARD_MODEL, torch.float32, CPU))
    close(read_heads(model, GROUPS[:6], Budget(max_tokens), done.append), own(folder, "last_token", GROUPS[:6]))
    assert sum(done) == sum(map(len, GROUPS[:6]))
    assert read_heads(model, [], Budget(9)) == []


def test_parameters_and_operations_of_a_head(make):
    """A reward head is small, and a language model's is its vocabulary, however the embeddings are tied."""
    reward = Heads(load(make("llama", "step_token"), REWARD_MODEL, torch.float32, CPU))
    assert sorted(tuple(p.shape) for p in reward.head_parameters()) == [(3,), (3, 32)]
    vocabulary = 97 * 32
    body = sum(p.numel() for p in reward.parameters()) - vocabulary - 99
    assert reward.flops() == (2 * body, 2 * 99)
    for tied in (True, False):
        config = AutoConfig.for_model("llama", **END, **MODELS["llama"], tie_word_embeddings=tied)
        policy = LogProbs(AutoModelForCausalLM.from_config(config))
        assert policy.flops() == (2 * body, 2 * vocabulary)
        assert [p.shape for p in policy.head_parameters()] == [(97, 32)]


# The probe ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "std"), PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gemma3_text", "mistral", "gpt2"])
def test_trees_are_taken_in_every_precision(make, said, name, dtype, std):
    assert Heads(load(make(name, std=std), REWARD_MODEL, dtype, CPU)).share
    assert not said.records


@pytest.mark.parametrize(("dtype", "std"), PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize(("name", "at_once", "whose", "part", "wrong"), WRONG.values(), ids=WRONG)
def test_a_wrong_attention_is_found_out(make, monkeypatch, said, name, at_once, whose, part, wrong, dtype, std):
    """By hidden states, so that it is for a head of zeros too."""
    monkeypatch.setattr(trees, "at_once_is_faster", lambda layout, width: at_once)
    monkeypatch.setattr(whose, part, wrong)
    folder = make(name, std=std)
    reward = load(folder, REWARD_MODEL, dtype, CPU)
    reward.score.weight.data.zero_()
    model = Heads(reward)
    (line,) = (record.getMessage() for record in said.records if record.name == "cream")
    assert not model.share and "each takes a padded row: " in line
    if dtype == torch.float32:
        model = Heads(load(folder, REWARD_MODEL, dtype, CPU))
        close(read_heads(model, GROUPS[:4], Budget(100)), own(folder, "last_token", GROUPS[:4]))


@pytest.mark.parametrize("name", ["falcon", "bloom"])
def test_models_that_trees_cannot_carry_take_padded_rows(make, said, name):
    folder = make(name)
    model = Heads(load(folder, REWARD_MODEL, torch.float32, CPU))
    assert not model.share and "each takes a padded row: " in said.text
    close(read_heads(model, GROUPS[:4], Budget(100)), own(folder, "last_token", GROUPS[:4]))


def other_scale(model):
    forward = model.forward

    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output

    model.forward = scaled


def other_place(model):
    forward = model.forward
    model.forward = lambda input_ids, **others: forward(input_ids[:, :-1], **others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", [other_scale, other_place])
def test_a_model_whose_own_outputs_are_others_is_refused(make, change, dtype):
    model = load(make("llama", std=0.1), REWARD_MODEL, dtype, CPU)
    change(model)
    with pytest.raises(
        UserError, match="LlamaForSequenceClassification's own forward pass gives other outputs.*`score`"
    ):
        Heads(model)


# Folders --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("reads", READS)
def test_a_reward_model_started_saved_and_loaded(tiny_folder, tiny_tokenizer, tmp_path, reads, dtype):
    """A new head on a policy; any tool loads what is saved of it, and it loads here as it was."""
    torch.manual_seed(0)
    head = {"outputs": 2, "reads": reads}
    model = load(tiny_folder, REWARD_MODEL, torch.float32, CPU, new_head=head)
    assert model.score.weight.std().item() == pytest.approx(65**-0.5, rel=0.3)
    body = load_policy(tiny_folder, torch.float32, CPU).model.state_dict()
    assert all(torch.equal(value, body[name]) for name, value in model.model.state_dict().items())
    folder = tmp_path / "reward"
    save(model, tiny_tokenizer, folder, dtype, {"started_from": str(tiny_folder)})
    about = read_kind(folder)
    assert about["kind"] == "reward_model" and about["head"] == head and about["started_from"] == str(tiny_folder)
    saved = load_file(folder / "model.safetensors")
    assert saved["score.weight"].dtype == (dtype or torch.float32) and "lm_head.weight" not in saved
    theirs = READS[reads].from_pretrained(folder, dtype=torch.float32).eval()
    again = load(folder, REWARD_MODEL, torch.float32, CPU)
    for other in (theirs, again):
        assert other.config.num_labels == 2
        for name, value in model.state_dict().items():
            assert torch.equal(other.state_dict()[name], value.to(dtype or value.dtype).float()), name
    (folder / "cream.json").unlink()  # as one from elsewhere
    assert Heads(load(folder, REWARD_MODEL, torch.float32, CPU)).reads == reads


@pytest.fixture
def reward_folder(make, tiny_tokenizer, tmp_path):
    """A reward model from elsewhere, with a tokenizer."""
    folder = shutil.copytree(make("llama"), tmp_path / "rm")
    tiny_tokenizer.save_pretrained(folder)
    return folder


def test_the_wrong_kind_is_refused_by_name(reward_folder, tiny_folder, tiny_tokenizer, tmp_path):
    with pytest.raises(UserError) as error:
        load_policy(reward_folder, torch.float32, CPU)
    assert str(error.value) == (
        f"{reward_folder}: expected a policy (a language model that generates text), found a reward model "
        "(config.json: LlamaForSequenceClassification)"
    )
    with pytest.raises(UserError, match=r"expected a reward model, found a policy .*\(config.json: LlamaForCausalLM\)"):
        load(tiny_folder, REWARD_MODEL, torch.float32, CPU)
    policy = tmp_path / "policy"
    save(load_policy(tiny_folder, torch.float32, CPU), tiny_tokenizer, policy, None, {})
    with pytest.raises(UserError, match=r"expected a reward model, found a policy .*\(cream.json\)"):
        load(policy, REWARD_MODEL, torch.float32, CPU)
    with pytest.raises(UserError, match="expected a policy .*, found a reward model"):
        load(reward_folder, REWARD_MODEL, torch.float32, CPU, new_head={"outputs": 1, "reads": "last_token"})


@pytest.mark.parametrize("classes", [["Qwen2ForRewardModel"], ["X", "OwnForTokenClassification"]])
def test_classes_of_others_say_their_kind_too(reward_folder, classes):
    path = reward_folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": classes}))
    with pytest.raises(UserError, match="expected a policy .*, found a reward model"):
        folders.check_folder(reward_folder)
    folders.check_folder(reward_folder, REWARD_MODEL)


def without_its_head(state):
    del state["score.weight"]


def with_a_bias(state):
    state["score.bias"] = torch.ones(3)


def another_size(state):
    state["score.weight"] = state["score.weight"][:2].contiguous()


@pytest.mark.parametrize(
    "change, message",
    [
        (without_its_head, "1 weights are missing: score.weight"),
        (with_a_bias, "score.bias; without them LlamaForSequenceClassification would give other rewards"),
        (another_size, "cannot be loaded as a reward model"),
    ],
)
def test_a_head_that_is_not_the_configs_is_refused(reward_folder, change, message):
    state = load_file(reward_folder / "model.safetensors")
    change(state)
    save_file(state, reward_folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError) as error:
        load(reward_folder, REWARD_MODEL, torch.float32, CPU)
    assert str(reward_folder) in str(error.value) and message in str(error.value)


def test_a_head_that_transformers_does_not_have_is_named(make, tmp_path):
    config = AutoConfig.for_model("gemma3_text", **END | MODELS["gemma3_text"])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no TokenClassification for models of type gemma3_text.*step_token"):
        load(tmp_path, REWARD_MODEL, torch.float32, CPU, new_head={"outputs": 1, "reads": "step_token"})


@pytest.mark.parametrize(
    "about, message",
    [
        ({"kind": 7}, "cream.json: is damaged"),
        ({"kind": "critic"}, "cream.json: is damaged"),
        ({"head": {"outputs": "one", "reads": "last_token"}}, "cream.json: is damaged"),
        ({"head": {"outputs": 1, "reads": "last_token"}}, "its head has 3 outputs, by cream.json 1"),
    ],
)
def test_a_damaged_kind_is_refused(reward_folder, about, message):
    (reward_folder / "cream.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=message):
        load(reward_folder, REWARD_MODEL, torch.float32, CPU)


# Adapters -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reads", READS)
def test_adapters_train_the_head_and_save_it_with_them(tiny_folder, tiny_tokenizer, tmp_path, reads):
    head = {"outputs": 3, "reads": reads}

    def start():
        torch.manual_seed(0)
        return load(tiny_folder, REWARD_MODEL, torch.float32, CPU, new_head=head)

    model = Heads(add_lora(start(), r=4, alpha=8, dropout=0.0))
    assert model.share and model.reads == reads
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "score.modules_to_save" in name for name in trained)
    assert any("score.modules_to_save" in name for name in trained) and not any(
        "score" in n and "lora_" in n for n in trained
    )
    groups = [[Tokens([1, 7, 8, 9, 3], [(3, 5)]), Tokens([1, 7, 8, 11, 12, 3], [(3, 6)])]]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.001)
    for _ in range(3):
        optimizer.zero_grad()
        model(model.pack(groups)).square().sum().backward()
        optimizer.step()
    wanted = read_heads(model, groups, Budget(99))
    plain = merged(model.model)
    assert not torch.equal(plain.score.weight, start().score.weight)
    save(plain, tiny_tokenizer, tmp_path / "merged", None, {})
    model.model.save_pretrained(tmp_path / "adapter")
    from_adapter = PeftModel.from_pretrained(start(), tmp_path / "adapter").eval()
    for other in (load(tmp_path / "merged", REWARD_MODEL, torch.float32, CPU), from_adapter):
        found = read_heads(Heads(other), groups, Budget(99))
        close(found, [[torch.tensor(x) for x in group] for group in wanted])
    with pytest.raises(UserError, match="expected a policy .*, found the adapter of a reward model"):
        adapter_base(tmp_path / "adapter", "tiny", tiny_folder)


# Command lines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        "train.py --device cpu --name tiny_sft --train_bsz 2 --model MODEL",
        "train.py --device cpu --name tiny_sft --model tiny --checkpoint MODEL --dry_run",
        "infer.py --device cpu --name tiny_prompt_1 --model MODEL",
        "infer.py --device cpu --mode evaluation --name tiny_test --model tiny --checkpoint MODEL",
        "rewarding.py --device cpu --input_file localdata/s.json --reward likelihood --model MODEL",
        "rewarding.py --device cpu --input_file localdata/s.json --model tiny --checkpoint none --ref_model_ckpt MODEL",
        "rewarding.py --device cpu --input_file localdata/s.json --model tiny --checkpoint MODEL --ref_model_ckpt none",
    ],
)
def test_no_stage_takes_a_reward_model_for_a_policy(workspace, reward_folder, command):
    """Before anything is spent or written."""
    layout = {"prompt": [{"role": "user", "content": "What is 2 + 3?"}], "responses": ["5", "6"]}
    workspace.write("localdata/s.json", {"u": layout})
    error = workspace.refused(command.replace("MODEL", str(reward_folder)))
    assert f"{reward_folder}: expected a policy" in error and "found a reward model (config.json" in error
    assert len(error.strip().splitlines()) == 1
