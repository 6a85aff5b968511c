"""Model folders of other tools through the stages: a head that the config does not know of, tokens that the model does
not embed, settings that are loaded and not saved."""

import copy
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from cream.files import store

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("vllm")]
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
SAMPLE = "infer.py --device cpu --name tiny_prompt_1 --limit_size 4 --gen_n 2 --gen_max_tokens 16"
EVALUATE = "infer.py --device cpu --mode evaluation --name tiny_val --limit_size 4 --gen_max_tokens 8"
REWARD = "rewarding.py --device cpu --reward likelihood --checkpoint none --input_file outputs/loop/samples.jsonl"
TRAIN = "train.py --device cpu --name tiny_sft --limit_size 8 --train_bsz 4 --lr 1e-3"


# A folder whose config ties the head to the embeddings, but that holds a head of its own: every stage and engine keeps
# that head, as with a folder of the same weights whose config says so.


@pytest.fixture(scope="module")
def world(looped):
    """localdata/tied, whose config is wrong, and localdata/untied, both with a head that the base has not."""
    for name in ("tied", "untied"):
        folder = shutil.copytree(looped.folder / "assets/tiny_m0", looped.folder / "localdata" / name)
        state = load_file(folder / "model.safetensors")
        noise = torch.randn(state[EMBEDDINGS].shape, generator=torch.Generator().manual_seed(0))
        save_file(state | {HEAD: state[EMBEDDINGS] + 0.02 * noise}, folder / "model.safetensors", {"format": "pt"})
    config = store.read_json(folder / "config.json")
    store.write_json(folder / "config.json", config | {"tie_word_embeddings": False})
    return looped


def both(world, command, output):
    """What a command writes for either model, and for the base."""
    models = ("localdata/tied", "localdata/untied", "assets/tiny_m0")
    for i, model in enumerate(models):
        world.run(f"{command} --model {model} --{output}{i}.json")
    return [world.read(f"{output.split()[1]}{i}.json") for i in range(len(models))]


def test_rewarding_keeps_it(world):
    tied, untied, base = (
        [record["score"] for record in rewards.values()] for rewards in both(world, REWARD, "output outputs/rewards")
    )
    assert tied == untied != base


@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_sampling_keeps_it(world, with_vllm, engine):
    if engine == "vllm":
        world = copy.copy(world)
        world.stages = with_vllm
    samples = both(world, f"{SAMPLE} --engine {engine}", f"output_dir outputs/{engine}")
    tied, untied, base = ([record["responses"] for record in each.values()] for each in samples)
    assert tied == untied != base


@pytest.mark.parametrize("lora", ["", " --lora yes --lora_dropout 0"])
def test_training_keeps_it_and_says_so(world, lora):
    """Head and embeddings are trained each; the checkpoint is one that no reader ties."""
    runs = [f"outputs/{name}{len(lora)}" for name in ("tied", "untied")]
    for name, run in zip(("tied", "untied"), runs, strict=True):
        world.run(f"{TRAIN}{lora} --model localdata/{name} --output_dir {run}")
    tied, untied = (load_file(world.folder / run / "checkpoint-last/model.safetensors") for run in runs)
    assert tied.keys() == untied.keys() and all(torch.equal(tied[name], untied[name]) for name in tied)
    config = world.read(f"{runs[0]}/checkpoint-last/config.json")
    assert HEAD in tied and config["tie_word_embeddings"] is False
    start = load_file(world.folder / "localdata/tied/model.safetensors")
    assert all(torch.equal(tied[name], start[name]) == bool(lora) for name in (HEAD, EMBEDDINGS))


# Others ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(looped):
    """localdata/model, the tiny model to change."""
    folder = shutil.copytree(looped.folder / "assets/tiny_m0", looped.folder / "localdata/model")
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "command",
    [
        SAMPLE,
        EVALUATE,
        f"{EVALUATE} --scoring loglikelihood",
        REWARD,
        TRAIN,
        "prepare_data.py validate localdata/tiny/sft.json",
    ],
)
def test_a_tokenizer_larger_than_the_model_is_refused_by_every_stage(looped, folder, command):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<more>"]})
    tokenizer.save_pretrained(folder)
    error = looped.refused(f"{command} --model localdata/model")
    assert "its tokenizer has token 319 (<more>), but the model embeds 319 tokens only" in error


@pytest.mark.parametrize("given", [{"temperature": 0.9, "top_p": 0.6}, {"do_sample": False, "temperature": 1e-6}])
def test_generation_settings_that_are_not_saved_do_not_end_a_run(looped, folder, given):
    settings = folder / "generation_config.json"
    store.write_json(settings, store.read_json(settings) | given)
    run = f"outputs/generation{len(given)}{'do_sample' in given}"
    looped.run(f"{TRAIN} --model localdata/model --output_dir {run}")
    assert given.items() <= looped.read(f"{run}/checkpoint-last/generation_config.json").items()
    looped.run(f"{TRAIN} --model tiny --checkpoint {run}/checkpoint-last --output_dir {run}_next")  # a start like any


def test_what_cannot_be_saved_is_refused_before_the_first_step(looped, folder):
    """A template whose name has no file name."""
    settings, template = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    named = [{"name": name, "template": template.read_text()} for name in ("default", "tools/json")]
    store.write_json(settings, store.read_json(settings) | {"chat_template": named})
    template.unlink()
    error = looped.refused(f"{TRAIN} --model localdata/model --output_dir outputs/unsaved")
    assert "its checkpoints could not be saved" in error and "tools/json" in error
