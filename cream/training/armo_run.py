"""Making an ArmoRM of a reward model, rated responses and preference pairs: features, attributes, debiasing, the gate.

The reward model is frozen, so each conversation goes through it once. Its hidden states are written to a folder next to
the output, in pieces, and removed when that is finished: an interrupted run loses one piece at most.
"""

import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import msgspec
import numpy as np
import torch
import xxhash

from cream.cli import console
from cream.errors import UserError
from cream.files import store
from cream.files.provenance import REWARD_MODEL, Provenance, origin, read_kind
from cream.model import hardware
from cream.model.armo import Armo, Facts, Features, GateShape, find_lead, save_armo, shape_of
from cream.model.backbone import run
from cream.model.checkpoint import length_limit
from cream.model.load import load, load_chat
from cream.model.precision import choose_precision
from cream.records import Message, Pair, Prompt, Ratings
from cream.rewards.armo import COEFFICIENTS
from cream.scoring.heads import encode
from cream.scoring.logprobs import Group, join_groups
from cream.text.held_out import held_out, prompt_key
from cream.training.armo import GateTraining, fit_attributes, penalties, train_gate, transformation

log = logging.getLogger("cream")
PIECE = 256  # groups whose features are kept together
EQUAL = "neither response is better (consistency ½)"
Files = dict[str, tuple[Path, type]]


@dataclass
class Job:
    """What decides an ArmoRM. `backbone`: the reward model's folder; `files`: ratings, pairs, and reference if it is
    not the pairs; `header`: settings and inputs."""

    backbone: Path
    files: dict[str, Path]
    output: Path
    header: dict
    provenance: Provenance
    device: torch.device
    bf16: bool | None
    text: dict
    max_length: int
    max_tokens: int | None
    verbosity: str | None
    most: float
    shape: GateShape
    gate: GateTraining
    seed: int
    skip: bool = False
    dropped: Counter[str] = field(default_factory=Counter)


def is_up_to_date(output: Path, header: dict, overwrite: bool) -> bool:
    """Whether the folder has the ArmoRM of this header. Raises UserError where it has something else; with `overwrite`
    another ArmoRM is replaced, and nothing but an ArmoRM."""
    if not output.exists():
        return False
    about = read_kind(output) if output.is_dir() else {}
    if overwrite and about.get("stage") == "armo":
        return False
    if about.get("stage") == "armo" and all(about[name] == header[name] for name in header):
        return True
    raise UserError(
        f"{output}: holds something else, or an ArmoRM of other settings or inputs; give another --output_dir, or "
        "--overwrite to replace an ArmoRM"
    )


def attributes_of(path: Path, records: Sequence[Ratings]) -> list[str]:
    """The names of the attributes, in the order in which they come. Raises UserError for one that fewer than two
    records rate: nothing can be fitted to it and held out."""
    counts: dict[str, int] = {}
    for record in records:
        for name, value in record.ratings.items():
            counts[name] = counts.get(name, 0) + (value is not None)
    if COEFFICIENTS in counts:
        raise UserError(f"{path}: an attribute is called {COEFFICIENTS!r}, as a part of the rewards is; rename it")
    few = [f"{name} ({count})" for name, count in counts.items() if count < 2]
    if few or not counts:
        raise UserError(f"{path}: attributes need at least two ratings each; too few have: {', '.join(few) or 'all'}. "
                        "Remove them from the records, or give records that are rated")  # fmt: skip
    return [*counts]


def make(job: Job) -> dict:
    """Train and save; returns what cream.json says of the result."""
    ratings = list(store.read(job.files["ratings"], Ratings, skip=job.skip))
    names = attributes_of(job.files["ratings"], ratings)
    if job.verbosity is not None and job.verbosity not in names:
        raise UserError(
            f"--verbosity {job.verbosity}: not an attribute of {job.files['ratings']} ({', '.join(names)}); give "
            "the one that stands for length, or none"
        )
    reader = _Reader(job)
    rated = [(each.messages[:-1], [each.messages[-1].content]) for each in ratings]
    x, kept = reader.read("ratings", rated, places=slice(1, 2))
    y = np.array([[_number(ratings[i].ratings.get(name)) for name in names] for i in kept]).reshape(-1, len(names))
    attributes_of(job.files["ratings"], [ratings[i] for i in kept])
    fits = fit_attributes(x[:, 0], y, job.seed)
    for name, fit in zip(names, fits, strict=True):
        log.info("%s: alpha %g, mean squared error %.4f on %d of %d ratings held out", name, fit.alpha, fit.error,
                 fit.held_out, fit.held_out + fit.fitted)  # fmt: skip
    weight = np.stack([fit.weight for fit in fits])

    sides = _sides(job, "pairs")
    pairs, kept = reader.read("pairs", sides)
    prompts = [prompt_key(Prompt(messages=sides[i][0])) for i in kept]
    if len(pairs) < 2:
        raise UserError(
            f"{job.files['pairs']}: fewer than two pairs are left to train the gate on ({dict(job.dropped)})"
        )
    reference, _ = reader.read("reference", _sides(job, "reference")) if "reference" in job.files else (pairs, None)
    lambdas, matrix = np.zeros(len(names)), np.eye(len(names))
    if job.verbosity is not None:
        v = names.index(job.verbosity)
        lambdas = penalties((reference[:, 1:] @ weight.T).reshape(-1, len(names)), v, job.most)
        matrix = transformation(lambdas, v)
        log.info("lambda: %s", ", ".join(f"{name} {value:g}" for name, value in zip(names, lambdas, strict=True)))

    facts = Facts(names, reader.lead, x.shape[2], shape_of(job.shape), job.verbosity, lambdas.tolist())
    torch.manual_seed(job.seed)
    armo = Armo(facts)
    armo.weight.copy_(torch.from_numpy(weight))
    armo.transform.copy_(torch.from_numpy(matrix))
    try:
        held = held_out(prompts, 0.2, job.seed)
    except UserError as error:
        raise UserError(f"{job.files['pairs']}: {error}") from None
    out = torch.tensor([prompt in held for prompt in prompts])
    found = train_gate(armo.gate, torch.from_numpy(pairs[:, 0]), debiased(armo, pairs), out, job.gate, job.seed)
    log.info("gate: accuracy %.3f on %d pairs, %.3f on %d held out", *(
        found[part][name] for part in ("fitted", "held_out") for name in ("accuracy", "pairs")
    ))  # fmt: skip
    return _save(job, armo, fits, found, reader)


def debiased(armo: Armo, pairs: np.ndarray) -> torch.Tensor:
    """(N, 2, K) r' of the chosen and rejected responses, of features (N, 3, D): prompt, chosen, rejected."""
    return torch.from_numpy(pairs[:, 1:]) @ armo.weight.T @ armo.transform


def _save(job: Job, armo: Armo, fits: Sequence, gate: dict, reader: "_Reader") -> dict:
    own = {name: read_kind(job.backbone)[name] for name in ("head", "chat_template") if name in read_kind(job.backbone)}
    attributes = {
        name: {"alpha": fit.alpha, "error": fit.error, "ratings": fit.fitted + fit.held_out}
        for name, fit in zip(armo.facts.attributes, fits, strict=True)
    }
    about = {"kind": REWARD_MODEL, **own, "stage": "armo", "started_from": str(job.backbone), **job.header}
    about |= origin() | job.provenance.record(job.output)
    about |= {"attributes": attributes, "gate": gate, "counts": {"dropped": dict(job.dropped)}}
    job.provenance.check_unchanged()
    job.output.parent.mkdir(parents=True, exist_ok=True)
    save_armo(armo, job.backbone, job.output, about)
    for folder in job.output.parent.iterdir():
        if folder.name.startswith(reader.prefix):
            shutil.rmtree(folder, ignore_errors=True)
    return about


def _number(value: float | None) -> float:
    return np.nan if value is None else value


def _sides(job: Job, name: str) -> list[tuple[list[Message], list[str]]]:
    """The prompt of each pair with its better and its worse response."""
    found = []
    for pair in store.read(job.files[name], Pair, skip=job.skip):
        if pair.ordered is None:
            job.dropped[EQUAL] += 1
        else:
            found.append((pair.prompt, [*pair.ordered]))
    return found


class _Reader:
    """The features of conversations by the frozen reward model, which is loaded when the first ones are missing."""

    def __init__(self, job: Job):
        self.job, self.model = job, None
        self.precision = choose_precision(job.bf16, job.device, training=False)
        self.chat, self.limit = load_chat(job.backbone, **job.text), length_limit(job.max_length, job.backbone)
        self.lead = find_lead(self.chat)
        what = {"inputs": job.header["inputs"], "variables": job.text.get("variables"), "lead": self.lead}
        what |= {"dtype": self.precision.name, "device": job.device.type, "limit": self.limit}
        digest = xxhash.xxh3_64_hexdigest(msgspec.json.encode(what, order="deterministic"))[:8]
        self.prefix = f".{job.output.name}.features-"
        self.folder = job.output.with_name(self.prefix + digest)

    def read(
        self, name: str, groups: Sequence[tuple[list[Message], list[str]]], places: slice = slice(None)
    ) -> tuple[np.ndarray, list[int]]:
        """(N, 1 + n, D) float32, of each of the N kept groups the features of its prompt and of its n responses, or of
        those `places` alone; and which groups they are of: one with a response that is too long is dropped."""
        found = np.zeros((0, 2, 1), np.float32)
        with console.bar(len(groups), f"features, {name}", "conversations") as bar:
            for number, start in enumerate(range(0, len(groups), PIECE)):
                some, path = groups[start : start + PIECE], self.folder / f"{name}-{number:06d}.npy"
                if not path.exists():
                    _write(path, self._compute(some))
                piece = np.load(path)[:, places]
                if not number:
                    found = np.empty((len(groups), *piece.shape[1:]), np.float32)
                found[start : start + len(piece)] = piece
                for _ in some:
                    bar.update()
        whole = ~np.isnan(found).any(axis=(1, 2))
        if lost := int((~whole).sum()):
            self.job.dropped[f"{name}: longer than {self.limit} tokens, or not a finite number"] += lost
            log.info("%s: %d of %d dropped: longer than %d tokens, or not finite", name, lost, len(whole), self.limit)
        return found[whole] if lost else found, np.flatnonzero(whole).tolist()

    def _compute(self, groups: Sequence[tuple[list[Message], list[str]]]) -> np.ndarray:
        """(N, 1 + n, D), NaN where a response has no features."""
        if self.model is None:
            self.model = Features(load(self.job.backbone, REWARD_MODEL, self.precision.dtype, self.job.device))
            self.model.lead = self.lead
            self.budget = hardware.budget(self.job.max_tokens, self.model.model, self.job.device, training=False)
        rows = [
            encode(Group("", prompt, texts, [True] * len(texts)), self.chat, self.limit)[0] for prompt, texts in groups
        ]
        joined = join_groups([own for each in rows if (own := [row for row in each if row])])
        states: Iterable = iter([*chain.from_iterable(run(self.model, joined, self.budget))])
        width = self.model.plain.config.get_text_config().hidden_size
        found = np.full((len(rows), 1 + len(groups[0][1]), width), np.nan, np.float32)
        for i, each in enumerate(rows):
            for k, row in enumerate(each):
                if row:
                    prompt, response = next(states).cpu().numpy()
                    found[i, 0], found[i, 1 + k] = prompt, response
        return found


def _write(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_suffix(".tmp")
    with open(staged, "wb") as file:
        np.save(file, array)
    os.replace(staged, path)
