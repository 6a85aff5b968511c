"""Generation with transformers alone: for machines without vLLM and for tiny models.

`model.generate` draws from one generator for a whole batch, so that a response would depend on its neighbours, computes
a prompt again for each of its responses, and carries those that have ended along until the last one ends. Here each
response brings its own noise: argmax(log p + g) is a draw from p when the g are independent standard Gumbel (the
Gumbel-max trick: Maddison et al. 2014, arXiv 1411.0030), and each g is a hash of (the response's seed, step, token id).
"""

import inspect
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from cream.cli import interrupts
from cream.engines import Completion, Request, Sampling, row_seed
from cream.engines.draw import in_cache
from cream.engines.noise import gumbel
from cream.engines.stops import find_stop
from cream.engines.warp import penalize_repeated, warp
from cream.model.hardware import keep_freed_memory
from cream.model.load import load_policy

WINDOW = 1024  # prompts that are sorted by length together
ROOM = 16  # tokens that the cache gets room for at once
PAD = 0  # any id will do: the attention mask hides it
ENOUGH = 64  # rows that keep a CPU busy: from here on a batch takes prompts of one length only, which need no padding
LEAVING = 8  # rows leave a batch once this fraction of them, an eighth, has ended: their cache must be copied


class HfEngine:
    """Batches of prompts of like length; each prompt is computed once, and a response leaves the batch as it ends. Of a
    loaded `model`; `load` makes it of a folder."""

    def __init__(self, model, tokenizer, max_model_len: int, batch_tokens: int):
        self.model, self.tokenizer = model, tokenizer
        self.max_model_len, self.batch_tokens = max_model_len, batch_tokens
        self.enough = ENOUGH if model.device.type == "cpu" else math.inf

    @classmethod
    def load(
        cls, model_folder: str | Path, tokenizer, device: str, dtype: str, max_model_len: int, batch_tokens: int
    ) -> "HfEngine":
        """With the model in this folder."""
        model = load_policy(Path(model_folder), getattr(torch, dtype), torch.device(device))
        if device == "cpu":
            keep_freed_memory()
        return cls(model, tokenizer, max_model_len, batch_tokens)

    def generate(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[tuple[str, list[Completion]]]:
        """As Engine.generate; prompts are taken 1024 at a time and given back batch by batch, longest prompts first.

        After a signal no further batch is begun."""
        requests = iter(requests)
        while window := list(islice(requests, WINDOW)):
            for batch in self._batches(window, sampling):
                if all(request.done for request in batch):
                    continue
                if interrupts.received():
                    return
                for request, responses in zip(batch, self._respond(batch, sampling), strict=True):
                    if not request.done:
                        yield request.uuid, responses

    def close(self) -> None:
        """Give the model's memory back."""
        self.model = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _batches(self, window: list[Request], sampling: Sampling) -> Iterator[list[Request]]:
        """Prompts by falling length, as many as fit `batch_tokens` cells of the cache if every response is long; of
        several lengths only while a batch has fewer than `enough` rows."""
        batch: list[Request] = []
        for request in sorted(window, key=lambda r: len(r.prompt_ids), reverse=True):
            longest = batch[0] if batch else request
            row = len(longest.prompt_ids) + request.room(sampling, self.max_model_len)
            full = (len(batch) + 1) * sampling.n * row > self.batch_tokens
            shorter = batch and len(request.prompt_ids) < len(batch[-1].prompt_ids)
            if batch and (full or shorter and len(batch) * sampling.n >= self.enough):
                yield batch
                batch = []
            batch.append(request)
        yield batch

    @torch.inference_mode()
    def _respond(self, batch: list[Request], sampling: Sampling) -> list[list[Completion]]:
        n, device = sampling.n, self.model.device
        rows = [request for request in batch for _ in range(n)]
        seeds = torch.tensor([row_seed(sampling.seed, row.uuid, i % n) for i, row in enumerate(rows)], device=device)
        room = torch.tensor([row.room(sampling, self.max_model_len) for row in rows], device=device)
        stops = torch.tensor(sampling.stop_token_ids, dtype=torch.int64, device=device)
        decoder = Decoder(self.model, [request.prompt_ids for request in batch], self.max_model_len)
        watch = StopStrings(self.tokenizer, sampling.stop, len(rows), decoder.ids.shape[1])
        each = torch.arange(len(batch), device=device).repeat_interleave(n)
        logits = decoder.logits()[each]
        decoder.select(each)
        sampler = GumbelMax(seeds, sampling, decoder.padding)
        alive = torch.arange(len(rows), device=device)  # which of the responses each row of the decoder is
        ended = torch.zeros_like(alive, dtype=torch.bool)
        ids = torch.zeros(len(rows), int(room.max()), dtype=torch.int64, device=device)
        logprobs = torch.zeros(ids.shape, device=device)
        while True:
            step = sampler.step
            tokens = sampler(decoder.ids, logits).argmax(-1)
            decoder.append(tokens)
            ids[alive, step] = tokens
            if sampling.logprobs:
                logprobs[alive, step] = sampler.logprobs.pop()
            ended |= torch.isin(tokens, stops) | (room[alive] == step + 1)
            if sampling.stop:
                ended |= watch(decoder.ids, alive.tolist())
            count = int(ended.sum())
            if count == len(ended):
                break
            if count * LEAVING >= len(ended):
                staying = (~ended).nonzero().squeeze(1)
                decoder.select(staying)
                sampler.select(staying)
                alive, ended = alive[staying], ended[staying]
            logits = decoder.logits()
        values = logprobs.double().tolist() if sampling.logprobs else [None] * len(rows)
        found = zip(ids.tolist(), values, room.tolist(), watch.lengths, strict=True)
        responses = [self._completion(*row, sampling) for row in found]
        return [responses[i * n : (i + 1) * n] for i in range(len(batch))]

    def _completion(
        self, ids: list[int], logprobs: list[float] | None, room: int, matched: int | None, sampling: Sampling
    ) -> Completion:
        """A row up to its first stop token, its stop string (`matched` tokens) or its own limit: it may have stayed in
        the batch for some tokens more."""
        room = min(room, matched or room)
        stops = (i + 1 for i, token in enumerate(ids[:room]) if token in sampling.stop_token_ids)
        length = next(stops, room)
        logprob = None if logprobs is None else sum(logprobs[:length])
        return Completion.of(ids[:length], logprob, sampling, self.tokenizer, length == matched)


class Decoder:
    """The rows that a model is writing, with its key-value cache.

    ids: (A, T) int64, all tokens so far, prompts padded on the left; padding: (A,) int64, tokens before each prompt.
    """

    def __init__(self, model, prompts: Sequence[list[int]], max_model_len: int):
        self.model, self.last, device = model, max_model_len - 1, model.device
        width = max(map(len, prompts))
        self.padding = torch.tensor([width - len(prompt) for prompt in prompts], device=device)
        self.ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
        self.padded = bool(self.padding.any())
        self.takes = inspect.signature(model.forward).parameters
        self.seen = 0  # tokens of each row that are in the cache
        self.cache = None  # without one, which some architectures have not, each step computes the whole rows
        if "past_key_values" in self.takes and model._supports_default_dynamic_cache():
            self.cache = DynamicCache(config=model.config.get_text_config(decoder=True))
            layers = self.cache.layers
            self.cache.layers = [Roomy() if type(layer) is DynamicLayer else layer for layer in layers]

    def logits(self) -> Tensor:
        """(A, V): of the token that follows each row."""
        inputs = {"input_ids": self.ids[:, self.seen :]}
        places = torch.arange(self.ids.shape[1], device=self.ids.device)
        if self.padded:
            inputs["attention_mask"] = (places >= self.padding[:, None]).long()
        if "position_ids" in self.takes:  # a row that has ended stays at the context's last for the time being
            positions = places[self.seen :] - self.padding[:, None]
            inputs["position_ids"] = positions.clamp(0, self.last)
        if "logits_to_keep" in self.takes:
            inputs["logits_to_keep"] = 1
        if self.cache is not None:
            inputs |= {"past_key_values": self.cache, "use_cache": True}
            self.seen = self.ids.shape[1]
        return self.model(**inputs).logits[:, -1]

    def append(self, tokens: Tensor) -> None:
        """One token (A,) for each row."""
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=1)

    def select(self, rows: Tensor) -> None:
        """Continue with these rows, each as often as it occurs."""
        self.ids, self.padding = self.ids[rows], self.padding[rows]
        if self.cache is not None:
            self.cache.reorder_cache(rows)


class Roomy(DynamicLayer):
    """A layer's keys and values (A, H, T, D), written where they stay: transformers' own copies all of them at every
    step. They are views of `rooms`, which have room for some tokens more."""

    def __init__(self):
        super().__init__()
        self.rooms: list[Tensor | None] = [None, None]

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """As DynamicLayer's."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        self.keys = self._add(0, self.keys, start, key_states)
        self.values = self._add(1, self.values, start, value_states)
        return self.keys, self.values

    def _add(self, which: int, old: Tensor, start: int, new: Tensor) -> Tensor:
        room, end = self.rooms[which], start + new.shape[-2]
        if room is None or room.data_ptr() != old.data_ptr() or end > room.shape[-2]:  # the first, other rows, or full
            room = self.rooms[which] = new.new_empty(*new.shape[:-2], end + ROOM, new.shape[-1])
            if start:
                room[..., :start, :] = old
        room[..., start:end, :] = new
        return room[..., :end, :]


class StopStrings:
    """Ends a row with the token that completes a stop string in its response's text, special tokens included.

    As vLLM's detokenizer: a token that ends within a character counts once the character is complete, and a response
    has the space that it begins with. `lengths`: for each of the `rows` how many tokens its response then has, or None.
    `start`: where responses begin, after one token of the prompt at least.
    """

    def __init__(self, tokenizer, stops: Sequence[str], rows: int, start: int):
        self.tokenizer, self.stops, self.start = tokenizer, stops, start
        self.lengths: list[int | None] = [None] * rows
        # Each of its tokens has a byte of it at least; a character after it may be incomplete until its fourth byte.
        self.reach = 4 + max((len(stop.encode()) for stop in stops), default=0)

    def __call__(self, ids: Tensor, rows: Sequence[int]) -> Tensor:
        """ids: (A, T) so far, of these `rows`. Returns (A,) bool: those that have ended."""
        end = ids.shape[1]
        before = max(self.start, end - self.reach) - 1
        for row, own in zip(rows, ids[:, before:].tolist(), strict=True):
            if self.lengths[row] is None and self._complete(own):
                self.lengths[row] = end - self.start
        return torch.tensor([self.lengths[row] is not None for row in rows], device=ids.device)

    def _complete(self, ids: list[int]) -> bool:
        """Whether the text of these ids without their first, after which it is read, has a stop string."""
        before, text = (
            self.tokenizer.decode(each, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            for each in (ids[:1], ids)
        )
        return not text.endswith("\ufffd") and find_stop(text[len(before) :], self.stops) is not None


class GumbelMax:
    """Scores whose argmax is a sample from softmax(warp(logits)), row by row.

    seeds: (B,) int64, one per row; padding: (B,) int64, tokens before a row's prompt (None: 0). `logprobs` gains one
    (B,) float32 per step: the argmax's log-probability by the logits themselves, if `sampling` asks for it. Greedy: the
    scores are the logits, after the repetition penalty.
    """

    def __init__(self, seeds: Tensor, sampling: Sampling, padding: Tensor | None = None):
        self.seeds, self.sampling = seeds, sampling
        self.padding = torch.zeros_like(seeds) if padding is None else padding
        self.logprobs: list[Tensor] = []
        self.step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids: (B, T) so far. scores: logits (B, V). Returns (B, V) float32."""
        logits = scores.float()
        scores = logits
        if self.sampling.repetition_penalty != 1:
            scores = penalize_repeated(scores, self._unpadded(input_ids), self.sampling.repetition_penalty)
        if not self.sampling.greedy:
            scores = torch.cat([self._noisy(*part) for part in in_cache(scores, self.seeds)])
        if self.sampling.logprobs:
            chosen = scores.argmax(-1, keepdim=True)
            self.logprobs.append(logits.log_softmax(-1).gather(-1, chosen).squeeze(-1))
        self.step += 1
        return scores

    def select(self, rows: Tensor) -> None:
        """Continue with these rows."""
        self.seeds, self.padding = self.seeds[rows], self.padding[rows]

    def _noisy(self, scores: Tensor, seeds: Tensor) -> Tensor:
        return warp(scores, self.sampling) + gumbel(seeds, step=self.step, size=scores.shape[-1])

    def _unpadded(self, input_ids: Tensor) -> Tensor:
        """The ids (B, T), with each row's last one in place of its padding, which is a word of the model's as well."""
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        return input_ids.where(places >= self.padding[:, None], input_ids[:, -1:])
