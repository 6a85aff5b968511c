"""Names: a path beats a name, a stale entry breaks only itself, and an unknown name meets the nearest ones."""

import json
import threading

import pytest

from cream import names
from cream.errors import UserError

KNOWN = {"tiny_sft": "localdata/tiny/sft.json", "gsm8k_test": "localdata/gsm8k/test.json"}


@pytest.fixture
def registry(tmp_path):
    return tmp_path / "checkpoint.json"


def test_a_checkpoint_is_a_folder_or_a_registered_name(tmp_path, registry, repo):
    (tmp_path / "run").mkdir()
    names.register(registry, "m1", tmp_path / "run")
    names.register(registry, "here", repo / "cream")
    assert names.checkpoint("m1", registry) == tmp_path / "run" == names.checkpoint(str(tmp_path / "run"), registry)
    assert json.loads(registry.read_text())["here"] == "cream"  # relative to the repository, which may move
    assert names.checkpoint("here", registry) == repo / "cream"


def test_a_link_is_registered_as_itself(tmp_path, registry):
    """checkpoint-last is a link to the newest checkpoint; the name follows it."""
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-last").symlink_to("checkpoint-3")
    names.register(registry, "m1", tmp_path / "checkpoint-last")
    assert names.checkpoint("m1", registry).name == "checkpoint-last"


def test_a_stale_entry_breaks_only_itself(tmp_path, registry):
    (tmp_path / "run").mkdir()
    registry.write_text(json.dumps({"gone": str(tmp_path / "gone"), "m1": str(tmp_path / "run")}))
    assert names.checkpoint("m1", registry) == tmp_path / "run"
    with pytest.raises(UserError, match="--ref_model_ckpt gone"):
        names.checkpoint("gone", registry, "--ref_model_ckpt")


def test_an_unknown_name_meets_the_nearest(tmp_path, registry):
    registry.write_text(json.dumps({"llama3_sft": "x"}))
    with pytest.raises(UserError, match="--checkpoint lama3_sft.*llama3_sft"):
        names.checkpoint("lama3_sft", registry)
    with pytest.raises(UserError, match="--name gsm8k_tset.*gsm8k_test"):
        names.dataset("gsm8k_tset", KNOWN, registry)
    with pytest.raises(UserError, match="--model lama3.*llama3"):
        names.model("lama3", {"llama3": "meta-llama/Meta-Llama-3-8B-Instruct"})


def test_a_dataset_is_a_file_a_builtin_or_registered(tmp_path, registry, repo):
    mine = tmp_path / "mine.jsonl"
    mine.touch()
    names.register(registry, "pairs_1", mine)
    assert names.dataset(str(mine), KNOWN, registry) == mine == names.dataset("pairs_1", KNOWN, registry)
    assert names.dataset("TINY_sft", KNOWN, registry) == repo / "localdata/tiny/sft.json"


def test_a_name_is_not_taken_twice(tmp_path, registry):
    names.register(registry, "m1", tmp_path / "a")
    names.register(registry, "m1", tmp_path / "a")  # the same again is no change
    with pytest.raises(UserError, match="--register m1"):
        names.register(registry, "m1", tmp_path / "b")
    names.register(registry, "m1", tmp_path / "b", overwrite=True)
    assert names.read_registry(registry) == {"m1": str(tmp_path / "b")}


@pytest.mark.parametrize("name", ["", "none", "None", "a/b", "two words"])
def test_what_cannot_be_a_name(tmp_path, registry, name):
    with pytest.raises(UserError, match="--register"):
        names.register(registry, name, tmp_path)
    assert not registry.exists()


@pytest.mark.parametrize("content", ["[]", '{"a": 1}', "{"])
def test_a_broken_registry_is_named(registry, content):
    registry.write_text(content)
    with pytest.raises(UserError, match=registry.name):
        names.checkpoint("m1", registry)


def test_many_register_at_once(tmp_path, registry):
    wanted = {f"m{i}": tmp_path / str(i) for i in range(16)}
    threads = [threading.Thread(target=names.register, args=(registry, *entry)) for entry in wanted.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names.read_registry(registry) == {name: str(path) for name, path in wanted.items()}


def test_a_model_is_a_folder_a_builtin_or_a_hub_id(tmp_path, repo):
    assert names.model(str(tmp_path), {}) == tmp_path
    assert names.model("TINY", {"tiny": "cream/tiny"}) == repo / "cream/tiny"
    with pytest.raises(UserError, match="--model nobody/no-such-model.*HF_HUB_OFFLINE"):
        names.model("nobody/no-such-model", {})
