"""ArmoRM (2406.12845): the attributes of a response, read by a linear layer from a frozen reward model, and weighted by
a gate that reads the prompt. Of K attributes, and the hidden states h of D numbers at two places:

    r  = W h(response)                   at the token that the reward model's own head reads
    r' = r T                             without what goes with length: r'_i = r_i - lambda_i r_v, r'_v = 0
    g  = softmax(gate(h(prompt)) / t)    where the user's last turn ends; nothing of the response is seen there
    score = s * sum_k g_k r'_k = sum_k c_k r_k, with the coefficients c = s * T g

The folder is the reward model's own, which any tool loads as such, with `armo.json` and the weights of all of the above
in `armo/`: nothing that a score needs is elsewhere.
"""

import itertools
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import torch

from cream.errors import UserError
from cream.files import store
from cream.files.fingerprints import fingerprint_file, fingerprint_folder
from cream.files.provenance import KIND
from cream.model.batches import Batch
from cream.model.reward_head import Heads
from cream.text.chat import Tokens

ABOUT, WEIGHTS = "armo.json", "armo/armo.safetensors"
NO_GATE = "the conversation does not have the tokens that end a user's turn, at which the gate reads the prompt"


class Gate(torch.nn.Module):
    """An MLP with ReLU: features of the prompt (B, D) -> the weights of the K attributes (B, K), which sum to 1."""

    def __init__(self, inputs: int, outputs: int, shape: "GateShape"):
        super().__init__()
        sizes = [inputs, *[shape.width] * shape.layers]
        self.hidden = torch.nn.ModuleList(torch.nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.last = torch.nn.Linear(sizes[-1], outputs)
        self.dropout = torch.nn.Dropout(shape.dropout)
        self.logit_scale = torch.nn.Parameter(torch.ones(()))
        self.temperature = shape.temperature

    def forward(self, prompt: torch.Tensor) -> torch.Tensor:
        """Softmax over the attributes, the last axis, whatever is in front of it."""
        for layer in self.hidden:
            prompt = self.dropout(torch.relu(layer(prompt)))
        return torch.softmax(self.last(prompt) / self.temperature, dim=-1)


@dataclass
class GateShape:
    """The sizes of a gate."""

    width: int = 1024
    layers: int = 3
    dropout: float = 0.2
    temperature: float = 10.0


class Facts(msgspec.Struct):
    """armo.json: the attributes in their order; the ids that end a prompt, with the first of which the gate reads; the
    gate's sizes; lambda of each attribute and the one that stands for length, if any; the hash of the weights' file."""

    attributes: list[str]
    lead: list[int]
    features: int
    gate: dict[str, float]
    verbosity: str | None
    lambdas: list[float]
    weights: str = ""


class Armo(torch.nn.Module):
    """All of a model but the reward model that it reads."""

    def __init__(self, facts: Facts):
        super().__init__()
        count, shape = len(facts.attributes), facts.gate
        sizes = {"width": int(shape["width"]), "layers": int(shape["layers"])}
        self.facts = facts
        self.gate = Gate(facts.features, count, GateShape(**shape | sizes))
        self.register_buffer("weight", torch.zeros(count, facts.features))
        self.register_buffer("transform", torch.eye(count))

    def coefficients(self, prompt: torch.Tensor) -> torch.Tensor:
        """(B, K) c, of features of prompts (B, D)."""
        return self.gate.logit_scale * self.gate(prompt) @ self.transform.T

    def forward(self, prompt: torch.Tensor, response: torch.Tensor) -> torch.Tensor:
        """(B, 1 + 2 K): the score, the attributes r and their coefficients c, of features (B, D) and (B, D)."""
        r, c = response @ self.weight.T, self.coefficients(prompt)
        return torch.cat([(r * c).sum(dim=-1, keepdim=True), r, c], dim=-1)


class Features(Heads):
    """A frozen reward model that gives, instead of its head's output, the hidden states at two places of each response:
    where the prompt's last turn ends, and where its own head reads."""

    lead: Sequence[int] | None = None  # None while the reward model's own outputs are checked

    def places(self, row: Tokens) -> list[int]:
        places = super().places(row)
        return places if self.lead is None else [gate_place(row, self.lead), *places]

    def per_response(self, batch: Batch) -> Sequence[torch.Tensor]:
        """Of each response (2, D) float32: the prompt's, the response's."""
        return self.hidden(batch).float().view(batch.responses, 2, -1).unbind()


class ArmoHeads(Features):
    """A reward model that scores: each response's 1 + 2 K outputs, as Armo gives them."""

    armo: Armo

    def per_response(self, batch: Batch) -> Sequence[torch.Tensor]:
        return self.armo(*torch.stack(super().per_response(batch)).unbind(1)).unbind()


def gate_place(row: Tokens, lead: Sequence[int]) -> int:
    """Where the ids `lead` begin, the last time at the end of the prompt or before: a response may have them, too.
    Raises UserError where they are not there."""
    count = len(lead)
    starts = range(row.spans[0][0] - count, -1, -1)
    found = next((start for start in starts if row.ids[start : start + count] == list(lead)), None)
    if found is None:
        raise UserError(NO_GATE)
    return found


def find_lead(chat) -> list[int]:
    """The ids that a chat template writes after a user's last turn, before the response: all that prompts which end in
    different words have in common at their end."""
    from cream.records import Message

    prompts = [chat.encode_prompt([Message("user", text)])[::-1] for text in ("What is 5", "Say it", "Why so?")]
    shared = itertools.takewhile(lambda ids: len({*ids}) == 1, zip(*prompts, strict=False))
    if not (found := [ids[0] for ids in shared][::-1]):
        raise UserError(
            f"{chat.tokenizer.name_or_path}: its chat template writes nothing between a prompt and the response, "
            "where a gate could read"
        )
    return found


def read_facts(folder: Path) -> Facts | None:
    """What a folder's armo.json says; None where it has none. Raises UserError on a damaged one."""
    path = folder / ABOUT
    if not path.exists():
        return None
    try:
        return msgspec.convert(store.read_json(path), Facts)
    except msgspec.ValidationError as error:
        raise UserError(f"{path}: is damaged: {error}") from None


def load_armo(folder: Path) -> Armo:
    """Raises UserError where the weights are not those that were saved."""
    from safetensors.torch import load_file

    facts = read_facts(folder)
    if facts is None:
        raise UserError(f"{folder}: has no {ABOUT}: it is not an ArmoRM; train_armo.py makes one")
    if not (folder / WEIGHTS).exists() or fingerprint_file(folder / WEIGHTS) != facts.weights:
        raise UserError(f"{folder / WEIGHTS}: is not what was saved, or not there; train it again")
    armo = Armo(facts)
    armo.load_state_dict(load_file(folder / WEIGHTS))
    return armo.eval()


def save_armo(armo: Armo, backbone: Path, folder: Path, about: dict) -> None:
    """The folder of an ArmoRM: the reward model's files in `backbone`, linked where the disk allows it, and its own.
    `about`: what cream.json says. It is written under another name and renamed."""
    from safetensors.torch import save_file

    staged = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(staged, ignore_errors=True)
    shutil.copytree(backbone, staged, ignore=_other_files, copy_function=_link)
    (staged / WEIGHTS).parent.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in armo.state_dict().items()}, staged / WEIGHTS)
    shutil.copymode(staged / "config.json", staged / WEIGHTS)
    armo.facts.weights = fingerprint_file(staged / WEIGHTS)
    store.write_json(staged / ABOUT, msgspec.to_builtins(armo.facts))
    store.write_json(staged / KIND, about | {"fingerprint": fingerprint_folder(staged, cached=False)})
    store.sync(staged)
    if folder.exists():
        shutil.rmtree(folder)
    staged.rename(folder)
    store.sync(folder.parent)


def _other_files(folder: str, names: list[str]) -> list[str]:
    """Of a reward model's folder what is not the model: adapters that are merged, another ArmoRM's parts, states."""
    return [name for name in names if name in (KIND, ABOUT, Path(WEIGHTS).parent.name, "adapter") or name[0] == "."]


def _link(source: str, target: str) -> None:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:  # another disk
        shutil.copy(source, target)


def shape_of(shape: GateShape) -> dict[str, float]:
    """A gate's sizes as armo.json has them."""
    return asdict(shape)
