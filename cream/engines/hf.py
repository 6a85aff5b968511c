"""Generation with transformers alone: for machines without vLLM and for tiny models.

`model.generate` draws from one generator for a whole batch, so a response would depend on its neighbours. Here each
brings its own noise instead: argmax(log p + g) is a draw from p when the g are independent standard Gumbel (the
Gumbel-max trick: Maddison et al. 2014, arXiv 1411.0030), and each g is a hash of (the response's seed, step, token id).
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from cream.cli import interrupts
from cream.engines import Completion, Request, Sampling, row_seed
from cream.engines.stops import find_stop
from cream.model.load import load_policy

WINDOW = 1024  # prompts that are sorted by length together
PAD = 0  # any id will do: the attention mask hides it in prompts, and responses end by their length


class HfEngine:
    """transformers generation in left-padded batches with a key-value cache; prompts of like length share a batch.

    Of a loaded `model`, which is as it was once the engine is closed; `load` makes it of a folder.
    """

    def __init__(self, model, tokenizer, max_model_len: int, batch_tokens: int):
        self.model, self.tokenizer, self.max_model_len, self.batch_tokens = (
            model,
            tokenizer,
            max_model_len,
            batch_tokens,
        )
        # `generate` takes from here what it is not told: the folder's penalties and stop tokens must not leak in.
        self._own_config, model.generation_config = model.generation_config, GenerationConfig()
        self._hook = model.register_forward_pre_hook(self._stay_in_context, with_kwargs=True)

    @classmethod
    def load(
        cls, model_folder: str | Path, tokenizer, device: str, dtype: str, max_model_len: int, batch_tokens: int
    ) -> "HfEngine":
        """With the model in this folder."""
        model = load_policy(Path(model_folder), getattr(torch, dtype), torch.device(device))
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
        """Give the model back, and its memory."""
        if self.model is not None:
            self._hook.remove()
            self.model.generation_config, self.model = self._own_config, None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _batches(self, window: list[Request], sampling: Sampling) -> Iterator[list[Request]]:
        """Prompts by falling length, as many as fit `batch_tokens` cells of the cache if every response is long."""
        batch: list[Request] = []
        for request in sorted(window, key=lambda r: len(r.prompt_ids), reverse=True):
            longest = batch[0] if batch else request
            row = len(longest.prompt_ids) + request.room(sampling, self.max_model_len)
            if batch and (len(batch) + 1) * sampling.n * row > self.batch_tokens:
                yield batch
                batch = []
            batch.append(request)
        yield batch

    @torch.inference_mode()
    def _respond(self, batch: list[Request], sampling: Sampling) -> list[list[Completion]]:
        rows = [request for request in batch for _ in range(sampling.n)]
        room = [request.room(sampling, self.max_model_len) for request in rows]
        width = max(len(request.prompt_ids) for request in batch)
        padding = [width - len(request.prompt_ids) for request in rows]
        ids = torch.tensor([[PAD] * p + request.prompt_ids for p, request in zip(padding, rows, strict=True)])
        mask = torch.tensor([[0] * p + [1] * (width - p) for p in padding])
        seeds = [row_seed(sampling.seed, request.uuid, i) for request in batch for i in range(sampling.n)]
        device = self.model.device
        sampler = GumbelMax(torch.tensor(seeds, device=device), sampling, torch.tensor(padding, device=device))
        watch = StopStrings(self.tokenizer, sampling.stop, len(rows), width)
        config = GenerationConfig(
            do_sample=False,  # the argmax of what `sampler` returns
            max_new_tokens=max(room),
            eos_token_id=list(sampling.stop_token_ids) or None,
            pad_token_id=PAD,
        )
        sequences = self.model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=config,
            logits_processor=LogitsProcessorList([sampler]),
            stopping_criteria=StoppingCriteriaList([watch] if sampling.stop else []),
        )
        logprobs = torch.stack(sampler.logprobs, dim=1).double().tolist() if sampling.logprobs else [None] * len(rows)
        found = zip(sequences[:, width:].tolist(), logprobs, room, watch.lengths, strict=True)
        responses = [self._completion(*row, sampling) for row in found]
        n = sampling.n
        return [responses[i * n : (i + 1) * n] for i in range(len(batch))]

    def _completion(
        self, ids: list[int], logprobs: list[float] | None, room: int, matched: int | None, sampling: Sampling
    ) -> Completion:
        """A row up to its first stop token, its stop string (`matched` tokens) or its own limit: the batch continues
        until its last row has ended."""
        room = min(room, matched or room)
        stops = (i + 1 for i, token in enumerate(ids[:room]) if token in sampling.stop_token_ids)
        length = next(stops, room)
        logprob = None if logprobs is None else sum(logprobs[:length])
        return Completion.of(ids[:length], logprob, sampling, self.tokenizer, length == matched)

    def _stay_in_context(self, _model, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Rows that have ended while others continue keep the last position: none past the context is ever computed."""
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"].clamp(max=self.max_model_len - 1)
        return args, kwargs


class StopStrings(StoppingCriteria):
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

    def __call__(self, input_ids: Tensor, scores: Tensor, **_) -> Tensor:
        """input_ids: (B, T) so far. Returns (B,) bool: the rows that have ended."""
        end = input_ids.shape[1]
        before = max(self.start, end - self.reach) - 1
        for row, ids in enumerate(input_ids[:, before:].tolist()):
            if self.lengths[row] is None and self._complete(ids):
                self.lengths[row] = end - self.start
        return torch.tensor([found is not None for found in self.lengths], device=input_ids.device)

    def _complete(self, ids: list[int]) -> bool:
        """Whether the text of these ids without their first, after which it is read, has a stop string."""
        before, text = (
            self.tokenizer.decode(each, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            for each in (ids[:1], ids)
        )
        return not text.endswith("\ufffd") and find_stop(text[len(before) :], self.stops) is not None


class GumbelMax(LogitsProcessor):
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
            scores = warp(scores, self.sampling) + gumbel(self.seeds, step=self.step, size=logits.shape[-1])
        if self.sampling.logprobs:
            chosen = scores.argmax(-1, keepdim=True)
            self.logprobs.append(logits.log_softmax(-1).gather(-1, chosen).squeeze(-1))
        self.step += 1
        return scores

    def _unpadded(self, input_ids: Tensor) -> Tensor:
        """The ids (B, T), with each row's last one in place of its padding, which is a word of the model's as well."""
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        return input_ids.where(places >= self.padding[:, None], input_ids[:, -1:])


def warp(logits: Tensor, sampling: Sampling) -> Tensor:
    """(B, V) logits of the tokens that may be sampled, -inf for others: temperature, min-p, top-k and top-p, in the
    order of vLLM's sampler (transformers has min-p last)."""
    logits = keep_min_p(logits / sampling.temperature, sampling.min_p)
    return nucleus(keep_top_k(logits, sampling.top_k), sampling.top_p)


def penalize_repeated(logits: Tensor, ids: Tensor, penalty: float) -> Tensor:
    """(B, V) logits, of the tokens in `ids` (B, T) divided by the penalty, or multiplied where negative.

    Keskar et al. 2019, CTRL, arXiv 1909.05858, section 4.1; for negative logits as transformers and vLLM have it.
    """
    own = logits.gather(-1, ids)
    return logits.scatter(-1, ids, torch.where(own > 0, own / penalty, own * penalty))


def keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    """(B, V) logits with -inf where the probability is less than min_p times the largest.

    Nguyen et al. 2024, arXiv 2407.01082.
    """
    if min_p <= 0:
        return logits
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -torch.inf)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """(B, V) logits with -inf outside the k largest, and those equal to the smallest of them; all of them if k is 0.

    Fan et al. 2018, arXiv 1805.04833.
    """
    if not 0 < k < logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[:, -1:], -torch.inf)


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """(B, V) logits with -inf outside the smallest set of most probable tokens whose mass reaches top_p.

    Holtzman et al. 2020, arXiv 1904.09751, section 3.1.
    """
    if top_p >= 1:
        return logits
    probs, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
    outside = probs.cumsum(-1) - probs >= top_p  # the mass before a token already reaches top_p
    return logits.masked_fill(torch.empty_like(outside).scatter(-1, order, outside), -torch.inf)


def gumbel(seeds: Tensor, step: int, size: int) -> Tensor:
    """(B, size) float32 standard Gumbel noise; entry [b, v] is a function of (seeds[b], step, v) and nothing else.

    seeds: (B,) int64.
    """
    streams = splitmix64(seeds, torch.tensor(step, device=seeds.device))
    bits = splitmix64(streams[:, None], torch.arange(size, device=seeds.device))
    # 52 bits and a half: never 0 or 1, exact in float64 (float32 would end the tail at 17 and flatten it before).
    uniform = ((bits >> 12 & 2**52 - 1).double() + 0.5) * 2.0**-52
    return -(-uniform.log()).log().float()


def splitmix64(seed: Tensor, index: Tensor) -> Tensor:
    """Output number `index` (from 0) of the SplitMix64 generator started at `seed`; int64 that carry unsigned bits.

    Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014, figure 16 (constants: Vigna's).
    """
    z = seed + (index + 1) * _signed(0x9E3779B97F4A7C15)  # integer products of tensors wrap around
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's own carries the sign along."""
    return z >> bits & 2 ** (64 - bits) - 1


def _signed(constant: int) -> int:
    """The int64 with the bits of this unsigned 64-bit constant (its top bit is set)."""
    return constant - 2**64
