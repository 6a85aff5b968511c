"""Model folders: what is refused, what a saved one holds, and adapters that start, merge and unmerge exactly."""

import json
import logging
import os
import shutil

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from cream.engines.choice import choose
from cream.errors import UserError
from cream.files import folders
from cream.files.fingerprints import fingerprint_folder, fingerprint_text
from cream.files.provenance import read_kind
from cream.model.adapters import adapter_merged
from cream.model.checkpoint import check_saving, context_length, length_limit, save, stored_dtype
from cream.model.load import load_chat, load_policy, load_tokenizer
from cream.model.lora import add_lora, check_lora, merged
from cream.model.precision import choose_precision

CPU = torch.device("cpu")
IDS = torch.tensor([[1, 3, 90, 41, 42, 2, 4]])


def load(folder):
    return load_policy(folder, torch.float32, CPU)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture
def copied(tiny_folder, tmp_path):
    """A copy of the tiny folder, to break."""
    return shutil.copytree(tiny_folder, tmp_path / "copy")


def adapted(folder, seed=0):
    """The folder's model with trained-looking adapters, dropout off."""
    model = add_lora(load(folder), r=8, alpha=16, dropout=0.1)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.mark.parametrize(
    "bf16, training, dtype, autocast",
    [
        (None, True, torch.float32, False),
        (None, False, torch.float32, False),
        (True, True, torch.float32, True),  # float32 masters whatever the flag says
        (True, False, torch.bfloat16, False),
        (False, False, torch.float32, False),
    ],
)
def test_precision_on_a_cpu(bf16, training, dtype, autocast):
    found = choose_precision(bf16, CPU, training=training)
    assert (found.dtype, found.autocast) == (dtype, autocast)
    assert "cpu" in found.reason if bf16 is None else "--bf16" in found.reason


def test_a_clusters_gpus_are_taken_to_have_bfloat16_where_this_machine_has_none():
    found = choose_precision(None, torch.device("cuda"), training=False)
    assert found.dtype == torch.bfloat16 and "the device supports it" in found.reason


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_short(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:50_000])


def within_the_header(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def a_pipe(folder):
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


def shard_outside(folder):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))


def tensor_elsewhere(folder):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))


def one_tensor_less(folder):
    state = load_file(folder / "model.safetensors")
    del state["model.layers.0.mlp.up_proj.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def one_shard_less(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def more_layers(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 10**12}))


def shards(folder):
    """Its weights in two shards with their index, as any tool saves them; nothing else is changed."""
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors").unlink()


def shards_beside_a_single_file(folder):
    single = (folder / "model.safetensors").read_bytes()
    shards(folder)
    (folder / "model.safetensors").write_bytes(single)


def shards_that_overlap(folder):
    shards(folder)
    first, *_, last = sorted(folder.glob("model-*.safetensors"))
    save_file(load_file(last) | load_file(first), last, {"format": "pt"})


def index_of_the_single_file_alone(folder):
    """Beside shards that it does not name: what transformers and vLLM read is the same."""
    shards_beside_a_single_file(folder)
    names = load_file(folder / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def copied_weights(name):
    return lambda folder: shutil.copy(folder / "model.safetensors", folder / name)


def settings(name="config.json", **changes):
    def change(folder):
        path = folder / name
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))

    return change


def a_row_less(folder):
    state = load_file(folder / "model.safetensors")
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"][:-1].contiguous()
    save_file(state, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "damage, named",
    [
        (shards_beside_a_single_file, "holds model.safetensors and shards"),
        (shards_that_overlap, "two of its weight files have model.embed_tokens.weight"),
        (copied_weights("model.fp16.safetensors"), "model.safetensors and model.fp16.safetensors both have"),
        (copied_weights("model-00001-of-00002.safetensors"), "both have"),
        (settings(transformers_weights="other.safetensors"), "`transformers_weights` is 'other.safetensors'"),
        (settings("adapter_config.json", peft_type="LORA"), "holds a model and an adapter"),
        (settings(vocab_size=400), "`vocab_size` in its config.json is 400"),
        (a_row_less, "model.embed_tokens.weight has"),
        (remove("config.json"), "config.json"),
        (more_layers, "`num_hidden_layers` is 1000000000000, but the weights have"),
        (remove("tokenizer.json"), "tokenizer"),
        (remove("model.safetensors"), "no model.safetensors"),
        (pickled, "pytorch_model.bin is a pickle"),
        (one_shard_less, "model-00002-of-00002.safetensors"),
        (one_tensor_less, "model.layers.0.mlp.up_proj.weight"),
        (cut_short, "50000 bytes where its header says"),
        (within_the_header, "header is damaged"),
        (a_pipe, "not a regular file"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: not valid JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json: expected one object"),
        (lambda folder: (folder / "config.json").write_text("{}"), "cannot be loaded"),
        (shard_outside, "'../model.safetensors' is not a file in this folder"),
        (tensor_elsewhere, "model.safetensors lacks 1 tensors: a"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "weight_map"),
    ],
)
def test_a_damaged_folder_ends_in_one_message(copied, damage, named):
    damage(copied)
    with pytest.raises(UserError) as error:
        folders.check_folder(copied)
        load(copied)
    assert str(copied) in str(error.value) and named in str(error.value)


def test_only_the_models_own_weights_are_counted(copied):
    """Some repositories have them in a second form beside the shards."""
    count = folders.parameter_count(copied)
    assert count == sum(tensor.numel() for tensor in load_file(copied / "model.safetensors").values())
    shutil.copy(copied / "model.safetensors", copied / "consolidated.safetensors")
    assert folders.parameter_count(copied) == count
    names = list(load_file(copied / "model.safetensors"))
    (copied / "model.safetensors").rename(copied / "model-1-of-1.safetensors")
    shards = dict.fromkeys(names, "model-1-of-1.safetensors")
    (copied / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert folders.parameter_count(copied) == count


def test_files_that_no_loader_mistakes_for_the_weights_are_let_pass(copied, monkeypatch):
    """Shards that the index does not name; the weights in Mistral's own names, where vLLM would take both."""
    monkeypatch.setattr("cream.engines.choice._vllm_build", lambda: "cpu")
    save_file({"output.weight": torch.zeros(1)}, copied / "consolidated.safetensors")
    folders.check_folder(copied)
    assert choose("auto", copied, "cpu") == (
        "hf",
        "vLLM would read consolidated.safetensors as well as model.safetensors",
    )
    (copied / "consolidated.safetensors").unlink()
    index_of_the_single_file_alone(copied)
    folders.check_folder(copied)
    assert [path.name for path in folders.weight_files(copied)] == ["model.safetensors"]


def test_a_tokenizer_of_more_tokens_than_the_model_is_refused(copied):
    tokenizer = AutoTokenizer.from_pretrained(copied)
    size = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(copied)
    with pytest.raises(UserError, match=rf"token {size} \(\[PAD\]\), but the model embeds {size} tokens only"):
        load_chat(copied)


def test_a_policy_has_no_dropout(tmp_path, tiny_tokenizer):
    config = GPT2Config(vocab_size=len(tiny_tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=16)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    assert config.resid_pdrop > 0
    model = load(tmp_path)
    assert not model.training
    model.train()
    assert torch.equal(logits(model), logits(model))
    assert context_length(tmp_path) == 16


def test_the_length_limit_is_the_smaller_one(tiny_folder):
    assert context_length(tiny_folder) == 128
    assert [length_limit(flag, tiny_folder) for flag in (None, 64, 4096)] == [128, 64, 128]


def test_a_chat_template_file_replaces_the_folders(copied, tmp_path):
    file = tmp_path / "mine.jinja"
    template = "{% for m in messages %}{{ m.content }}<end>{% endfor %}"
    file.write_text(template)
    assert load_tokenizer(copied, file).chat_template == template
    with pytest.raises(UserError, match="absent.jinja"):
        load_tokenizer(copied, tmp_path / "absent.jinja")


def test_a_checkpoint_says_its_text_format_and_another_one_is_warned_of(tiny_folder, tiny_tokenizer, tmp_path, caplog):
    """By a hash; the template that is saved with it is the one, as a base model's always is."""
    folder, file = tmp_path / "checkpoint-1", tmp_path / "mine.jinja"
    save(load(tiny_folder), tiny_tokenizer, folder, None, {})
    assert read_kind(folder)["chat_template"] == fingerprint_text(tiny_tokenizer.chat_template)
    file.write_text(tiny_tokenizer.chat_template)
    logging.getLogger("cream").propagate = True
    for same in (load_chat(folder), load_chat(folder, file), load_chat(tiny_folder, file)):
        assert same.tokenizer.chat_template == tiny_tokenizer.chat_template
    assert not caplog.records
    file.write_text(tiny_tokenizer.chat_template.replace("+ '>' +", "+ '> ' +"))
    load_chat(folder, file)
    (line,) = caplog.messages
    assert line == f"{folder}: was trained on another chat template than {file}"


def test_a_chat_stops_at_the_models_own_ends(copied):
    (copied / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert load_chat(copied).stop_ids == (2, 7)


def test_the_fingerprint_is_of_what_decides_the_output(copied, tiny_folder):
    first = fingerprint_folder(tiny_folder)
    (copied / "cream.json").write_text("{}")
    (copied / "args.json").write_text("{}")
    assert fingerprint_folder(copied) == first  # neither the place nor our notes count
    seen = {first}
    for name in ("chat_template.jinja", "tokenizer.json", "generation_config.json", "model.safetensors"):
        path = copied / name
        path.write_bytes(path.read_bytes()[:-1] + b" ")
        seen.add(fingerprint_folder(copied))
    assert len(seen) == 5


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_saved_folder_loads_with_any_tool(tiny_folder, tiny_tokenizer, tmp_path, dtype):
    model, folder = load(tiny_folder), tmp_path / "checkpoint-1"
    for step in (1, 2):  # the second replaces the first
        save(model, tiny_tokenizer, folder, dtype, {"step": step})
    assert json.loads((folder / "cream.json").read_text())["step"] == 2
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # safetensors' own file is its owner's alone
    assert stored_dtype(folder) == (dtype or torch.float32)
    assert len(load_file(folder / "model.safetensors")) == len(load_file(tiny_folder / "model.safetensors"))  # tied
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert again.dtype == (dtype or torch.float32)
    for name, value in load(tiny_folder).state_dict().items():
        assert torch.equal(again.state_dict()[name], value.to(again.dtype)), name
    assert AutoTokenizer.from_pretrained(folder).chat_template == tiny_tokenizer.chat_template
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


GENERATION = [  # settings that transformers loads and refuses to save: Vicuna's, and others
    {"temperature": 0.9, "top_p": 0.6},
    {"do_sample": False, "temperature": 1e-06},
    {"do_sample": False, "top_k": 3},
    {"typical_p": 0.5},
    {"early_stopping": True, "length_penalty": 0.5},
]


@pytest.mark.parametrize("given", GENERATION)
def test_generation_settings_are_saved_as_they_came(copied, tmp_path, given):
    settings("generation_config.json", **given)(copied)
    model = load(copied)
    with pytest.raises(ValueError):
        model.generation_config.save_pretrained(tmp_path)
    check_saving(model, load_tokenizer(copied))
    save(model, load_tokenizer(copied), tmp_path / "checkpoint-1", torch.float32, {})
    saved = json.loads((tmp_path / "checkpoint-1/generation_config.json").read_text())
    assert given.items() <= saved.items() and saved["eos_token_id"] == model.config.eos_token_id
    load(tmp_path / "checkpoint-1")


def named_template(model, tokenizer):
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tools/json": tokenizer.chat_template}


def long_template_name(model, tokenizer):
    tokenizer.chat_template = {"default": tokenizer.chat_template, "a" * 300: tokenizer.chat_template}


def undeclared_tie(model, tokenizer):
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight


def generation_setting_in_the_config(model, tokenizer):
    model.config.temperature = 0.5


def vocabulary_that_cannot_be_written(model, tokenizer):
    tokenizer.init_kwargs["extra"] = {1, 2}


UNSAVABLE = [
    (named_template, "tools/json"),
    (long_template_name, "File name too long"),
    (undeclared_tie, "shared tensors"),
    (generation_setting_in_the_config, "temperature"),
    (vocabulary_that_cannot_be_written, "set"),
]


@pytest.mark.parametrize("change, named", UNSAVABLE)
def test_what_could_not_be_saved_is_refused_before_training(tiny_folder, tmp_path, change, named):
    model, tokenizer = load(tiny_folder), load_tokenizer(tiny_folder)
    check_saving(model, tokenizer)
    change(model, tokenizer)
    with pytest.raises(UserError, match="its checkpoints could not be saved") as error:
        check_saving(model, tokenizer)
    assert named in str(error.value)


def test_weights_are_not_lost_to_a_file_beside_them(tiny_folder, tmp_path):
    """Were it to fail all the same, at the end of a run."""
    model, tokenizer = load(tiny_folder), load_tokenizer(tiny_folder)
    vocabulary_that_cannot_be_written(model, tokenizer)
    with pytest.raises(UserError, match="the weights are in .*checkpoint-1.weights"):
        save(model, tokenizer, tmp_path / "checkpoint-1", None, {})
    state, saved = model.state_dict(), load_file(tmp_path / "checkpoint-1.weights/model.safetensors")
    assert saved and all(torch.equal(state[name], value) for name, value in saved.items())
    save(model, load_tokenizer(tiny_folder), tmp_path / "checkpoint-1", None, {})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize(
    "config_class, experts",
    [
        ("MixtralConfig", {"num_local_experts": 4}),
        ("Qwen3MoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16}),
        ("Qwen2MoeConfig", {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}),
    ],
)
def test_lora_on_fused_experts_is_refused_before_anything_is_loaded(tmp_path, config_class, experts):
    """Where peft puts adapters on them: it has no dropout there. Qwen2's get none."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    getattr(transformers, config_class)(**sizes, **heads, **experts).save_pretrained(tmp_path)  # no weights at all
    check_lora(tmp_path, 4, 8, 0.0)
    if config_class == "Qwen2MoeConfig":
        return check_lora(tmp_path, 4, 8, 0.1)
    with pytest.raises(UserError, match="its experts are fused: give --lora_dropout 0"):
        check_lora(tmp_path, 4, 8, 0.1)


def test_adapters_start_as_the_identity(tiny_folder):
    base = load(tiny_folder)
    before = logits(base)
    model = add_lora(base, r=8, alpha=16, dropout=0.1)
    model.train()  # the dropout on the adapters' input cannot matter while B = 0
    assert torch.equal(logits(model), before)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)


def test_merging_is_exact_and_leaves_the_adapters_alone(tiny_folder):
    model = adapted(tiny_folder)
    wanted = logits(model)
    assert (wanted - logits(load(tiny_folder))).abs().max() > 1
    plain = merged(model)
    torch.testing.assert_close(logits(plain), wanted, atol=1e-4, rtol=0)
    assert torch.equal(logits(model), wanted)


def test_a_merge_that_loses_precision_is_refused(tiny_folder):
    with pytest.raises(UserError, match="merging"):
        merged(adapted(tiny_folder).bfloat16(), tolerance=1e-4)


def test_an_adapter_from_elsewhere_is_merged_once(tiny_folder, tmp_path):
    model = adapted(tiny_folder)
    model.save_pretrained(tmp_path / "adapter")
    folder = adapter_merged(tmp_path / "adapter", tiny_folder, tmp_path / "cache")
    torch.testing.assert_close(logits(load(folder)), logits(model), atol=1e-4, rtol=0)
    assert adapter_merged(tmp_path / "adapter", tiny_folder, tmp_path / "cache") == folder
    again = PeftModel.from_pretrained(load(tiny_folder), tmp_path / "adapter")  # merging left the adapter as it was
    torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=0)


OWN_CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({mark!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_models_own_code_runs_only_when_it_is_trusted(copied, tmp_path, monkeypatch):
    mark = tmp_path / "ran"
    (copied / "own.py").write_text(OWN_CODE.format(mark=str(mark)))
    config = json.loads((copied / "config.json").read_text()) | {"model_type": "own", "architectures": ["OwnModel"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (copied / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.delenv(folders.REMOTE_CODE, raising=False)
    with pytest.raises(UserError, match="--trust_remote_code yes"):
        load(copied)
    assert not mark.exists()
    monkeypatch.setenv(folders.REMOTE_CODE, "yes")
    assert type(load(copied)).__name__ == "OwnModel"
    assert mark.exists()
