"""Reward models: a head on a model's body, read at the last token of each response, or at its step tokens.

The head is that of transformers' sequence classification (last token) or token classification (step tokens). Where
sequence classification reads is its own rule, by which models from elsewhere were trained: the last token that is not
the config's pad token. Where pad is eos, that is the token before the end of the turn.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from cream.errors import UserError
from cream.files.folders import HEADS, kind_of
from cream.files.provenance import Head
from cream.model.backbone import ROUNDING, Backbone, exact_products, probe_groups, run
from cream.model.batches import Batch, Group, pad
from cream.model.hardware import Budget
from cream.text.chat import Tokens

log = logging.getLogger("cream")


class Heads(Backbone):
    """A reward model that gives its outputs at one place of each response, or at the end of each step.

    `reads` is "last_token", or "step_token": the last token of each of the row's spans, a span being a step. Dropout
    before the head, which token classification has, is off in training too. Raises UserError for a model whose own
    forward pass gives other outputs.
    """

    def __init__(self, model, share: bool = True):
        plain = getattr(model, "get_base_model", lambda: model)()
        _, self.reads = kind_of([type(plain).__name__])
        super().__init__(model, share)

    @property
    def head(self) -> torch.nn.Module:
        """What makes the outputs of hidden states; with adapters the copy of it that peft trains."""
        head = getattr(self.plain, head_name(self.plain))
        return head.modules_to_save[head.active_adapter] if hasattr(head, "modules_to_save") else head

    def head_parameters(self) -> list[torch.nn.Parameter]:
        """Of the reward head."""
        return list(self.head.parameters())

    def choose_layout(self, share: bool = True) -> None:
        """As every backbone does, after the outputs proved to be those of the model's own forward pass."""
        self.share = False
        _check_outputs(self)
        super().choose_layout(share)

    def places(self, row: Tokens) -> list[int]:
        """The last token that is not pad, or the last token of each step."""
        if self.reads == "step_token":
            return [end - 1 for start, end in row.spans if end > start]
        pad_id = self.plain.config.get_text_config().pad_token_id
        return [next((i for i in reversed(range(len(row))) if row.ids[i] != pad_id), 0)]

    def forward(self, batch: Batch, cosines: bool = False) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The outputs at the batch's places, (K, outputs) float32; a linear head computes in float32. `cosines`: also
        those between the centred rows of its weights, (outputs, outputs), which under ZeRO-3 are whole only here."""
        hidden, head = self.hidden(batch), self.head
        if type(head) is not torch.nn.Linear and not cosines:
            return head(hidden).float()
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if head.bias is None else head.bias.float()
            outputs = F.linear(hidden.float(), head.weight.float(), bias)
            if not cosines:
                return outputs
            rows = head.weight.float() - head.weight.float().mean(1, keepdim=True)
            rows = F.normalize(rows, dim=1)
            return outputs, rows @ rows.T

    def probed(self, batch: Batch) -> torch.Tensor:
        """Hidden states, (K, D) float32: a new head may say nothing of them."""
        return self.hidden(batch).float()

    def per_response(self, batch: Batch) -> Sequence[torch.Tensor]:
        """Each response's outputs, (its places, outputs)."""
        return self(batch).split(torch.bincount(batch.owner, minlength=batch.responses).tolist())


def read_heads(
    model: Heads, groups: Sequence[Group], budget: Budget, progress: Callable[[int], object] = lambda responses: None
) -> list[list[list]]:
    """The outputs for each response of each group, in the groups' order: a list of them (last_token), or one for each
    step (step_token). A batch holds at most `budget` tokens."""
    outputs = run(model, groups, budget, progress)
    once = model.reads == "last_token"
    return [[(value[0] if once else value).tolist() for value in group] for group in outputs]


def choose_pad(plain, chat, keep: bool) -> None:
    """Give a reward model that is to be trained, and its tokenizer, a pad token with which no conversation ends, so
    that all tools read it at the same place: transformers and trl at the last token that is not pad, vLLM at the last.

    It is the model's own, else the tokenizer's, else a token that has another use: of unknown text, or BOS, which is at
    the beginning only. `keep`: the model is a reward model, which keeps its pad if it has one.
    """
    tokenizer, end = chat.tokenizer, chat.last_written()
    own = plain.config.get_text_config().pad_token_id
    choices = [own, tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id]
    pad_id = next((token for token in choices if token not in (None, end)), end)
    pad_id = own if keep and own is not None else pad_id
    name = tokenizer.convert_ids_to_tokens(pad_id)
    if pad_id != tokenizer.pad_token_id:
        log.info("pad token: %s", name)
    for config in (plain.config, plain.config.get_text_config()):
        config.pad_token_id = pad_id
    tokenizer.pad_token = name
    check_pad(plain.name_or_path, plain.config, chat)


def check_pad(name: str | Path, config, chat) -> None:
    """Say so where conversations end with a reward model's pad token: tools read it at different tokens."""
    if config.get_text_config().pad_token_id == (end := chat.last_written()):
        log.warning(
            "%s: conversations end with its pad token, %s: as in transformers and trl its outputs are those of the "
            "last token that is another; vLLM reads the last one, and gives others",
            *(name, chat.tokenizer.convert_ids_to_tokens(end)),
        )


def describe_head(plain) -> Head:
    """The head of a reward model as cream.json has it."""
    return {"outputs": plain.config.num_labels, "reads": kind_of([type(plain).__name__])[1]}


def head_name(plain) -> str:
    """The head's name in a transformers model. Raises UserError where it has none that is known."""
    for name in HEADS:
        if isinstance(getattr(plain, name, None), torch.nn.Module):
            return name
    raise UserError(f"{plain.name_or_path}: {type(plain).__name__} has no head named {' or '.join(HEADS)}")


@torch.no_grad()
def _check_outputs(model: Heads) -> None:
    """Raises UserError where the model's own forward pass on a probe, row by row, gives other outputs than `forward`
    over padded rows: it reads elsewhere, or does more than its head."""
    plain, training = model.plain, model.model.training
    pad_id = plain.config.get_text_config().pad_token_id
    rows = [row for group in probe_groups(model) for row in group]
    if pad_id is not None:
        rows += [Tokens([*row.ids, pad_id], row.spans) for row in rows[:2]]
    own = []
    model.model.eval()
    with exact_products():
        for row in rows:
            logits = model.model(input_ids=torch.tensor([row.ids], device=model.device), use_cache=False).logits
            own.append(logits if model.reads == "last_token" else logits[0, model.places(row)])
        own = torch.cat(own).float()
        outputs = model(pad([rows], places=model.places).to(model.device))
    model.model.train(training)
    if not outputs.isfinite().all():
        raise UserError(f"{plain.name_or_path}: its outputs for a probe are not finite numbers: its weights are broken")
    dtype = next(plain.parameters()).dtype
    tolerance = ROUNDING[dtype] * own.std().item() + torch.finfo(dtype).eps * own.abs().mean().item()
    if outputs.shape != own.shape or not (apart := (outputs - own).abs().mean().item()) <= tolerance:
        how = f"{tuple(own.shape)} of them" if outputs.shape != own.shape else f"by {apart:.2g} on a probe"
        raise UserError(
            f"{plain.name_or_path}: {type(plain).__name__}'s own forward pass gives other outputs than its head "
            f"`{head_name(plain)}` at the {model.reads.replace('_', ' ')} ({how}): it reads elsewhere, or its head is "
            "more than that layer; such a reward model is not supported"
        )
