"""What every test shares: an offline, single-threaded CPU environment, and the two folders that tests read from.

The variables are set before anything imports torch or transformers. Each is a default: CUDA_VISIBLE_DEVICES=0 in the
environment lets the tests see a GPU.
"""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that asks the hub fails instead of waiting
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # no warnings, no deadlocks, when a test forks
os.environ.setdefault("OMP_NUM_THREADS", "1")  # `make test` runs one worker per core
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

REPO = Path(__file__).resolve().parent.parent


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
