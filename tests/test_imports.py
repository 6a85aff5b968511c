"""What a stage does not import, and that it can be imported all the same."""

import importlib
import subprocess
import sys
from importlib import metadata

import pytest

from cream.cli import imports

VAIN = ("torch._dynamo.config", "torch._inductor", "torch.distributed.tensor._ops", "torch.distributed.fsdp", "triton")
VAIN += ("scipy", "sklearn.base", "datasets", "pandas", "trl", "vllm", "deepspeed", "ray", "plotly")
TRAIN = ["--device", "cpu", "--model", "tiny", "--name", "tiny_sft", "--limit_size", "2", "--output_dir", "outputs/y"]
TRAIN += ["--lora", "yes"]  # peft asks for DTensors, which it does not import


@pytest.fixture
def standing(tmp_path, monkeypatch):
    """A stand-in for a package of two modules, which counts how often they are executed."""
    (tmp_path / "standing").mkdir()
    count = "import sys\nsys.executed.append(__name__)\n"
    (tmp_path / "standing/__init__.py").write_text(f"{count}import standing.one\nvalue = 1\nsimple = 'real'\n")
    for name in ("one", "two"):
        (tmp_path / f"standing/{name}.py").write_text(count)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "executed", [], raising=False)
    monkeypatch.setattr(sys, "meta_path", [imports.Finder(), *sys.meta_path])
    yield imports.StandIn("standing", simple="plain")
    for name in ("standing", "standing.one", "standing.two"):
        sys.modules.pop(name, None)


def test_a_stand_in_has_what_is_plain(standing):
    assert importlib.import_module("standing") is standing and standing.simple == "plain" and not sys.executed
    assert not hasattr(standing, "__file__") and importlib.util.find_spec("standing") and not sys.executed
    assert standing.value == 1 and standing.simple == "real"
    assert importlib.import_module("standing") is not standing and sys.executed == ["standing", "standing.one"]


@pytest.mark.parametrize("name", ["one", "two"])
def test_a_module_of_what_a_stand_in_stands_for_is_executed_once(standing, name):
    module = importlib.import_module(f"standing.{name}")
    package = sys.modules["standing"]
    assert getattr(package, name) is module is sys.modules[f"standing.{name}"] and module.__spec__.origin
    assert sorted({*sys.executed, "standing.two"}) == ["standing", "standing.one", "standing.two"]
    assert len(sys.executed) == len({*sys.executed}) and standing.value == package.value


@pytest.mark.slow
def test_packages_of_distributions_with_their_names():
    every = metadata.packages_distributions()
    for name in imports.OWN:
        assert [each.replace("-", "_") for each in every.get(name, [name])] == [name]
    assert imports.Packages().get("no such package", ["default"]) == ["default"]


@pytest.mark.slow
def test_a_training_imports_nothing_in_vain_and_compiling_works(workspace):
    code = f"""
import sys, train
train.main({TRAIN})
print("imported:", *(name for name in {VAIN} if sys.modules.get(name)))
import torch
from torch.distributed.tensor import DTensor as dtensor
compiler = sys.modules["torch._dynamo"]
disabled, allowed = torch.compiler.disable(lambda x: (x, torch.compiler.is_compiling())), lambda x: x
compiler.allow_in_graph(allowed)
import torch._dynamo.config as config
assert config is torch._dynamo.config and torch._dynamo is not compiler and torch.optim.SGD
assert torch._dynamo.trace_rules.is_callable_allowed(allowed)
assert compiler.graph_break is torch._dynamo.graph_break and compiler.disable is torch._dynamo.disable
x, compiling = torch.compile(lambda x: disabled(x + 1), backend="eager")(torch.zeros(1))
print(float(x), compiling)
one = torch.Tensor._make_subclass(torch.distributed.tensor.DTensor, torch.zeros(1))
print(isinstance(one, dtensor), isinstance(x, dtensor), dtensor is type(one))
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=workspace.folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "imported:\n1.0 False\nTrue False False\n" in run.stdout
