"""What every test shares: an offline, single-threaded CPU environment, the folders that tests read, a tiny policy.

The variables are set before anything imports torch or transformers. Each is a default: CUDA_VISIBLE_DEVICES=0 in the
environment lets the tests see a GPU.
"""

import gc
import logging
import os
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest
from _pytest.nodeid import coerce_node_id
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that asks the hub fails instead of waiting
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # no warnings, no deadlocks, when a test forks
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # a workspace's modules are compiled once, not by each command
os.environ.setdefault("OMP_NUM_THREADS", "1")  # `make test` runs one worker per core
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")  # torch need not compile a program to see what this CPU can do
if shutil.which("g++"):  # for what DeepSpeed and torch compile
    os.environ.setdefault("CXX", str(Path(__file__).with_name("quick_g++")))
sys.modules.setdefault("sklearn", None)  # as in every stage (cream/cli/console.py)
gc.disable()  # until all is imported, of which nothing is garbage

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # by a shell that runs the tests in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("cream", deadline=None)  # a busy machine is no bug
settings.load_profile("cream")

REPO = Path(__file__).resolve().parent.parent

# What vLLM imports for a Llama on a CPU, and its environment: without compilers, which a kill would leave behind.
VLLM_MODULES = ("vllm.v1.engine.llm_engine", "vllm.v1.engine.core", "vllm.v1.executor.uniproc_executor")
VLLM_MODULES += ("vllm.v1.worker.cpu_worker", "vllm.model_executor.models.llama")
VLLM_QUICK = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "TORCH_COMPILE_DISABLE": "1"}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Workers take a group of tests at a time: those of one xdist_group mark, else those of one file."""
    from xdist.scheduler import LoadGroupScheduling

    class ByGroup(LoadGroupScheduling):
        def _split_scope(self, nodeid: str) -> str:
            group = super()._split_scope(nodeid)
            return group.partition("::")[0]

    return ByGroup(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that run command lines are slow. The longest groups first: tests that start several processes, then files
    by their number of slow tests; quick ones fill what is left at the end."""
    for item in items:
        if "stages" in item.fixturenames:
            item.add_marker("slow")
    if config.getoption("loadgroup", False):  # xdist names groups in `_nodeid`, which pytest 9.2 does not read
        for item in items:
            if group := _group(item):
                item._id = coerce_node_id(f"{item.nodeid}@{group}")
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (_group(item) != "both cores", -slow[item.path]))


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)  # as in every stage
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else some libraries report at exit what was never freed


def _group(item: pytest.Item) -> str | None:
    mark = item.get_closest_marker("xdist_group")
    return mark and mark.args[0]


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory) -> None:
    """Nothing is kept in the user's own cache."""
    os.environ["CREAM_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def fresh_log():
    """A stage that runs inside a test's process leaves no handler of its log, on that test's stdout, to the next."""
    log = logging.getLogger("cream")
    before = log.handlers[:], log.propagate, log.level
    yield
    log.handlers[:], log.propagate = before[:2]
    log.setLevel(before[2])


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the repository."""
    return REPO


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared` beside the repository (real models and data); tests that need it are skipped without it."""
    folder = REPO.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs ../shared: real models and data beside the repository")
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """The tiny world's tokenizer with its chat template; a test that changes it copies it first."""
    from cream.tiny.base import build_tokenizer

    return build_tokenizer()


@pytest.fixture(scope="session")
def tiny_chat(tiny_tokenizer):
    """The tiny world's tokenizer and template, as the stages see them."""
    from cream.text.chat import Chat

    return Chat(tiny_tokenizer)


@pytest.fixture(scope="session")
def tiny_folder(tiny_tokenizer, tmp_path_factory) -> Path:
    """A small random float32 Llama with the tiny world's tokenizer, as a Hugging Face folder. Read only."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    special = {name: getattr(tiny_tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.1,  # so that the logits spread as a trained model's do
        tie_word_embeddings=True,
        **special,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**special)
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def common(tmp_path_factory) -> Path:
    """A folder that all workers share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def stages(common):
    """The process in whose forks command lines run (tests/workspace.py)."""
    from workspace import Stages

    process = Stages(common / "door")
    yield process
    process.close()


@pytest.fixture(scope="session")
def with_vllm(common):
    """Another, which has imported vLLM (15 s). Tests that use it are of the group "vllm", so that there is one."""
    from workspace import Stages

    pytest.importorskip("vllm", exc_type=ImportError)
    process = Stages(common / "door to vLLM", *VLLM_MODULES, **VLLM_QUICK)
    yield process
    process.close()


@pytest.fixture(scope="module")
def workspace(stages, tmp_path_factory):
    """A copy of the repository in which a file of tests runs real command lines; the repository stays as it is."""
    from workspace import Workspace

    return Workspace(tmp_path_factory.mktemp("workspace"), REPO, stages)


@pytest.fixture(scope="session")
def loop(stages, common) -> Path:
    """A workspace in which the tiny loop has run (workspace.ROUND): built once for all workers. Read only."""
    from filelock import FileLock
    from workspace import ROUND, Workspace

    folder = common / "loop"
    with FileLock(common / "loop.lock"):
        if not (folder / "finished").exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a worker in which a command failed
            world = Workspace(folder, REPO, stages)
            for command in ROUND:
                world.run(command)
            (folder / "finished").touch()
    return folder


@pytest.fixture(scope="module")
def looped(stages, loop, tmp_path_factory):
    """A workspace that has the tiny loop's outputs, for tests of something else than how they are made."""
    from workspace import Workspace

    return Workspace(tmp_path_factory.mktemp("workspace"), REPO, stages, loop)


@pytest.fixture(scope="module")
def quick(loop, common, tmp_path_factory):
    """As `looped`, but its stages run in forks of a process that has also imported the project: for many commands."""
    from workspace import Stages, Workspace

    world = Workspace(tmp_path_factory.mktemp("workspace"), REPO, None, loop)
    world.stages = Stages(common / "door", project=world.folder)
    yield world
    world.stages.close()
