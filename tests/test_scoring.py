"""A tensor-parallel model: the scores of one process, or a clear end.

Its processes are forks of a server that has imported the libraries, but for one case, where they are spawned.
"""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from test_trees import END, GROUPS, MODELS, difference, random_model
from transformers import AutoConfig, AutoModelForSequenceClassification

from cream.errors import UserError
from cream.files.provenance import POLICY, REWARD_MODEL
from cream.model.load import check_tp_size
from cream.scoring import team as module
from cream.scoring.team import Local, Team

together = pytest.mark.xdist_group("both cores")
CPU = torch.device("cpu")
SLIDING = "sliding_attention"
LIBRARIES = ["cream.scoring.team", "transformers.models.llama.modeling_llama", "torch.distributed.tensor"]


@pytest.fixture
def make(tmp_path):
    """Makes a folder with a small model of an architecture."""

    def make(name, **changes) -> Path:
        config = AutoConfig.for_model(name, **END, **MODELS[name] | changes)
        random_model(config).save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture
def team(monkeypatch):
    """Makes a team of two, which is ended with the test."""
    made = []
    multiprocessing.set_forkserver_preload(LIBRARIES)

    def make(folder, start="forkserver", kind=POLICY):
        monkeypatch.setattr(module, "START", start)
        made.append(Team(folder, torch.float32, "cpu", 300, 2, kind))
        return made[-1]

    yield make
    for one in made:
        one.close()


@together
@pytest.mark.slow
@pytest.mark.parametrize(
    "name, changes",
    [
        ("llama", {"num_hidden_layers": 6, "tie_word_embeddings": True}),  # more layers than are probed
        ("qwen3", {}),
        ("gemma2", {}),
        ("phi3", {}),
        ("mixtral", {}),
        ("gemma3_text", {"num_hidden_layers": 7, "layer_types": [*[SLIDING] * 5, "full_attention", SLIDING]}),
    ],
)
def test_two_processes_score_as_one(make, team, name, changes):
    folder = make(name, **changes)
    wanted = Local(folder, torch.float32, CPU, 300).score(GROUPS)
    both = team(folder, "spawn" if name == "llama" else "forkserver")
    assert difference(both.score(GROUPS), wanted) <= 1e-4
    assert difference(both.score(GROUPS[:2]), wanted[:2], GROUPS[:2]) <= 1e-4
    assert both.score([]) == []


@together
@pytest.mark.slow
def test_two_processes_hold_a_reward_model(team, tmp_path):
    """Its head is whole in both."""
    config = AutoConfig.for_model("llama", num_labels=2, **END, **MODELS["llama"])
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    wanted = Local(tmp_path, torch.float32, CPU, 300, kind=REWARD_MODEL).score(GROUPS)
    found = team(tmp_path, kind=REWARD_MODEL).score(GROUPS)
    assert [len(group) for group in found] == list(map(len, GROUPS))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=1e-4, rtol=0)


@together
@pytest.mark.slow
def test_a_plan_that_cuts_nothing_is_refused(make, team):
    folder = make("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"base_model_tp_plan": {"layers.*.other": "colwise"}}))
    with pytest.raises(UserError, match="nothing of it is cut"):
        team(folder)


@together
@pytest.mark.slow
def test_a_plan_that_makes_another_model_is_refused(make, team):
    folder = make("llama")
    config = json.loads((folder / "config.json").read_text())
    plan = AutoConfig.for_model("llama").base_model_tp_plan | {"layers.*.input_layernorm": "all_reduce"}
    (folder / "config.json").write_text(json.dumps(config | {"base_model_tp_plan": plan}))
    with pytest.raises(
        UserError, match="--tensor_parallel_size 2: the library's plan for .* does not give the same model.*nats"
    ):
        team(folder)


@together
@pytest.mark.slow
def test_a_lost_process_ends_the_team(make, team):
    both = team(make("llama"))
    os.kill(both.processes[1].pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"--tensor_parallel_size 2: process 1 \(exit code -9\) of 2 was lost"):
        both.score(GROUPS)
    assert not any(process.is_alive() for process in both.processes)


@together
@pytest.mark.slow
def test_an_error_in_a_process_comes_with_its_traceback(make, team):
    with pytest.raises(RuntimeError, match=r"(?s)in process \d of --tensor_parallel_size 2:.*Traceback"):
        team(make("llama")).score([None])


@pytest.mark.parametrize(
    "name, changes, tp_size, message",
    [
        ("llama", {}, 3, "4 attention heads, 2 key-value heads"),
        ("llama", {}, 4, "4 attention heads, 2 key-value heads"),
        ("gpt2", {}, 2, "no tensor-parallel plan for models of type gpt2"),
    ],
)
def test_a_size_that_cannot_be_is_refused_at_once(make, name, changes, tp_size, message):
    with pytest.raises(UserError, match=f"--tensor_parallel_size {tp_size}: .*{message}"):
        check_tp_size(make(name, **changes), tp_size)
