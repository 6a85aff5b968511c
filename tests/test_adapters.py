"""Adapter folders from elsewhere: applied whole, as peft's own model has them, or refused with what does not fit."""

import shutil

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cream.errors import UserError
from cream.files import store
from cream.files.folders import check_folder, is_adapter
from cream.model.adapters import adapter_merged
from cream.model.load import load_chat, load_policy, load_tokenizer
from cream.model.lora import probe

CPU = torch.device("cpu")
ATTENTION = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def load(folder):
    return load_policy(folder, torch.float32, CPU)


def train(model, config, folder):
    """An adapter of a model, as if it were trained, saved by peft itself."""
    torch.manual_seed(0)
    live = get_peft_model(model, config)
    for parameter in live.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    live.save_pretrained(folder)
    return live


@pytest.fixture
def adapter(tiny_folder, tmp_path):
    """The folder of an adapter that fits, to change."""
    train(load(tiny_folder), LoraConfig(**ATTENTION), tmp_path / "adapter")
    return tmp_path / "adapter"


def merge(folder, base, tmp_path):
    return adapter_merged(folder, base, tmp_path / "cache")


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(**ATTENTION),
        LoraConfig(**ATTENTION | {"target_modules": "all-linear", "use_rslora": True, "use_dora": True}),
        LoraConfig(**ATTENTION, rank_pattern={"layers.1.self_attn.q_proj": 2}, alpha_pattern={"v_proj": 3}),
        LoraConfig(**ATTENTION, bias="lora_only"),
        LoraConfig(**ATTENTION | {"target_modules": ["q_proj", "embed_tokens"]}),
        LoraConfig(**ATTENTION | {"target_modules": ["q_proj", "lm_head"]}),
        LoraConfig(**ATTENTION, modules_to_save=["lm_head"]),
        LoraConfig(**ATTENTION, modules_to_save=["embed_tokens"]),
        LoraConfig(**ATTENTION, trainable_token_indices={"embed_tokens": [40, 41]}),
        LoraConfig(**ATTENTION, init_lora_weights="pissa"),
        IA3Config(task_type="CAUSAL_LM"),
    ],
)
def test_what_fits_is_merged_as_peft_has_it(tiny_folder, tmp_path, config):
    """peft's live model, loaded by peft from the same folder, against the merged folder as any tool loads it. The base
    ties its head to its embeddings: a head that an adapter makes another is saved as one of its own, and the config
    says so."""
    train(load(tiny_folder), config, tmp_path / "adapter")
    wanted = probe(PeftModel.from_pretrained(load(tiny_folder), tmp_path / "adapter"))
    folder = merge(tmp_path / "adapter", tiny_folder, tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(probe(saved), wanted, atol=1e-4, rtol=1e-4)
    assert (wanted - probe(load(tiny_folder))).abs().max() > 0.01
    tied = "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert store.read_json(folder / "config.json").get("tie_word_embeddings", False) == tied


def renamed(old, new):
    return lambda name, value: (name.replace(old, new), value)


def without(part):
    return lambda name, value: None if part in name else (name, value)


@pytest.mark.parametrize(
    "change, named",
    [
        (renamed("model.model.", "model._orig_mod.model."), "no place in the model: base_model._orig_mod.model"),
        (renamed("model.model.", "model.model.language_model."), "language_model"),
        (renamed("model.model.", "model.module.model."), "no place"),
        (renamed("lora_A.weight", "lora_A.mine.weight"), "no place"),
        (renamed("q_proj", "k_proj"), "k_proj"),
        (without(".layers.1."), "places have no tensor: base_model.model.model.layers.1"),
        (without("lora_B"), "places have no tensor"),
        (lambda name, value: (name, torch.zeros(0)), "size mismatch"),
        (lambda name, value: (name, value[:, :-1].contiguous()), "size mismatch"),
        (lambda name, value: (name, value * torch.nan), "not finite"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(tiny_folder, tmp_path, adapter, change, named):
    file = adapter / "adapter_model.safetensors"
    save_file(dict(filter(None, (change(name, value) for name, value in load_file(file).items()))), file)
    with pytest.raises(UserError) as error:
        merge(adapter, tiny_folder, tmp_path)
    assert str(adapter) in str(error.value) and named in str(error.value), error.value
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"peft_type": "FROM_THE_FUTURE"}, "no adapters of type FROM_THE_FUTURE"),
        ({"scale_by_depth": True}, "does not know, and would ignore, scale_by_depth"),
        ({"r": 8}, "does not fit"),
        ({"target_modules": ["no_such"]}, "does not fit"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "places have no tensor"),
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
        ({"alora_invocation_tokens": [1, 2]}, "cannot be merged"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tiny_folder, tmp_path, adapter, settings, named):
    store.write_json(adapter / "adapter_config.json", store.read_json(adapter / "adapter_config.json") | settings)
    with pytest.raises(UserError, match=named):
        merge(adapter, tiny_folder, tmp_path)


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_prompts_that_were_trained_cannot_be_merged(tiny_folder, tmp_path, config):
    get_peft_model(load(tiny_folder), config(task_type="CAUSAL_LM", num_virtual_tokens=3)).save_pretrained(
        tmp_path / "a"
    )
    with pytest.raises(UserError, match="cannot be merged"):
        merge(tmp_path / "a", tiny_folder, tmp_path)


def test_two_tensors_for_one_that_the_model_ties_are_refused(tiny_folder, tmp_path, adapter):
    file = adapter / "adapter_model.safetensors"
    embeddings = load_file(tiny_folder / "model.safetensors")["model.embed_tokens.weight"]
    both = {"base_model.model.model.embed_tokens.weight": embeddings, "base_model.model.lm_head.weight": 2 * embeddings}
    save_file(load_file(file) | both, file)
    with pytest.raises(UserError, match="embed_tokens.weight are different, and the model ties them"):
        merge(adapter, tiny_folder, tmp_path)


def test_its_own_tokenizer_and_template_are_used(tiny_folder, tiny_tokenizer, tmp_path, adapter):
    """A tokenizer's files, or a chat template alone; a part of a tokenizer is refused."""
    folders = [merge(adapter, tiny_folder, tmp_path)]
    (adapter / "chat_template.jinja").write_text(CHATML)
    folders.append(merge(adapter, tiny_folder, tmp_path))
    own = load_tokenizer(tiny_folder)
    own.chat_template = CHATML.replace("im_start", "turn")
    own.save_pretrained(adapter)
    folders.append(merge(adapter, tiny_folder, tmp_path))
    templates = [load_tokenizer(folder).chat_template for folder in folders]
    assert templates == [tiny_tokenizer.chat_template, CHATML, own.chat_template]
    (adapter / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="a part of the tokenizer"):
        merge(adapter, tiny_folder, tmp_path)


@pytest.mark.parametrize(
    "config, complete",
    [
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, True),
        ({"modules_to_save": ["embed_tokens"]}, True),
        ({"trainable_token_indices": None}, True),  # peft saves all embeddings where their number changed
        ({"modules_to_save": ["embed_tokens"]}, False),
    ],
)
def test_tokens_that_it_adds(tiny_folder, tmp_path, config, complete):
    """With their embeddings in its folder they are the merged model's; what is nowhere is not made up."""
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    tokenizer, model = AutoTokenizer.from_pretrained(base), load(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    model.resize_token_embeddings(len(tokenizer))
    live = train(model, LoraConfig(**ATTENTION, **config), tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    if not complete:
        file = tmp_path / "adapter/adapter_model.safetensors"
        state = {k: v for k, v in load_file(file).items() if "lm_head" not in k and "original_module" not in k}
        save_file(state, file)
        with pytest.raises(UserError, match="no embeddings for the 2 tokens that it adds"):
            merge(tmp_path / "adapter", base, tmp_path)
        return
    folder = merge(tmp_path / "adapter", base, tmp_path)
    torch.testing.assert_close(probe(load(folder)), probe(live), atol=1e-4, rtol=1e-4)
    chat = load_chat(folder)
    assert chat.tokenizer.convert_ids_to_tokens(chat.end_of_turn) == "<|im_end|>"


def test_a_tokenizer_of_more_tokens_than_the_model_is_refused(tiny_folder, tmp_path, adapter):
    own = load_tokenizer(tiny_folder)
    own.add_tokens(["<more>"])
    own.save_pretrained(adapter)
    with pytest.raises(UserError, match=r"has token \d+ \(<more>\), but the model embeds"):
        merge(adapter, tiny_folder, tmp_path)


def test_an_adapter_with_its_bases_config_is_still_one(tiny_folder, adapter):
    """Some trainers save that beside it."""
    shutil.copy(tiny_folder / "config.json", adapter)
    assert is_adapter(adapter) and not is_adapter(tiny_folder)
    with pytest.raises(UserError, match="an adapter; give it as a checkpoint"):
        check_folder(adapter)
