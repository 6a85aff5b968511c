"""Text generation behind one small protocol; adding an engine is one file here and its lines in ENGINES and `load`.

Engines take token ids and never text, so no second BOS can creep in, and give token ids, text and log-probability back.
Which prompts fit is settled before: an engine shortens the response to what the context leaves, never the prompt.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import xxhash

from cream.engines.stops import find_stop
from cream.errors import UserError
from cream.records import FinishReason

ENGINES = ("hf", "vllm")
GREEDY = 0.001  # temperature; below, the most probable token is taken at every step
COLDEST, HOTTEST = 0.01, 2.0  # vLLM 0.32's SamplingParams raises what is below to 0.01 without a word, and refuses more
REPEATED = 0.1, 10.0  # limits of the repetition penalty; far beyond them logits overflow in one engine or the other
OFF = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "stop": ()}  # flags of `Sampling` that are off by default


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample: repetition penalty, temperature, min-p, top-k, top-p (nucleus), in this order, and nothing else.
    Raises UserError on senseless values, and on those that one of the engines would change."""

    n: int = 1  # responses per prompt
    temperature: float = 0.8  # below 0.001: greedy; otherwise from 0.01 to 2
    top_p: float = 0.95  # in (0, 1]
    max_tokens: int = 768  # per response, its end-of-turn token included
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()  # these end a response, and nothing else but its length and `stop` does
    keep_special: bool = True  # whether a response's text has the special tokens in it
    special: frozenset[int] = frozenset()  # the tokenizer's
    dropped: frozenset[int] = frozenset()  # those of them that the text lacks
    logprobs: bool = True  # no: responses come without their log-probability, which costs a softmax at every step
    top_k: int = 0  # number of the most likely tokens; 0: all
    min_p: float = 0.0  # share of the most likely token's probability, in [0, 1]; 0: all tokens
    repetition_penalty: float = 1.0  # for tokens of the prompt and of the response so far
    stop: tuple[str, ...] = ()  # a response ends with the token that completes one of these in its text
    keep_stop: bool = True  # whether a response's text has all tokens of that string, or ends before it

    def __post_init__(self):
        problems = []
        if self.n < 1 or self.max_tokens < 1:
            problems.append(f"n ({self.n}) and max_tokens ({self.max_tokens}) must be at least 1")
        if not (0 <= self.temperature < GREEDY or COLDEST <= self.temperature <= HOTTEST):
            problems.append(
                f"temperature ({self.temperature}) must be 0 (greedy), or from {COLDEST:g} to {HOTTEST:g}: vLLM "
                f"samples at {COLDEST:g} below that and refuses more, and engines must not differ"
            )
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p ({self.top_p}) must lie in (0, 1]; 1 keeps every token")
        if self.top_k < 0 or not 0 <= self.min_p <= 1:
            problems.append(f"top_k ({self.top_k}) must be at least 0, min_p ({self.min_p}) lie in [0, 1]; 0 keeps all")
        if not REPEATED[0] <= self.repetition_penalty <= REPEATED[1]:
            problems.append(f"repetition_penalty ({self.repetition_penalty}) must be from 0.1 to 10; 1 changes nothing")
        if "" in self.stop:
            problems.append("stop: an empty text would end every response")
        if self.greedy and self.n > 1:
            problems.append(
                f"temperature {self.temperature} is greedy: {self.n} responses would be equal; ask for n = 1"
            )
        if problems:
            raise UserError("sampling: " + "; ".join(problems))

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken at every step."""
        return self.temperature < GREEDY

    @property
    def idle_flags(self) -> list[str]:
        """Flags that are off. They are no part of an output's identity, so that outputs of versions that did not have
        them are up to date."""
        return [name for name, off in OFF.items() if getattr(self, name) == off]


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to respond to; the uuid names its responses and seeds their sampling.

    `done`: it has its responses from an earlier run. It gets none, but has its place in an engine's batches, so that
    the others are in the same company as in a run without interruption.
    """

    uuid: str
    prompt_ids: list[int]
    done: bool = False

    def room(self, sampling: Sampling, max_model_len: int) -> int:
        """Tokens a response may have: `max_tokens`, or what the context leaves. Raises ValueError when that is none."""
        if len(self.prompt_ids) >= max_model_len:
            raise ValueError(f"{self.uuid}: {len(self.prompt_ids)} prompt tokens leave no room in {max_model_len}")
        return min(sampling.max_tokens, max_model_len - len(self.prompt_ids))


@dataclass(frozen=True, slots=True)
class Completion:
    """One response. `token_ids` and `logprob` include the stop token of one that stopped; `text` does not. `special` is
    the number of special tokens before it. All of them include the tokens of a stop string, `text` if it is kept."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logprob: float | None  # sum of log p(token | prompt, tokens before), nats: the model's own, whatever `Sampling` is
    special: int = 0

    @classmethod
    def of(
        cls, token_ids: list[int], logprob: float | None, sampling: Sampling, tokenizer, matched: bool = False
    ) -> "Completion":
        """The response in these sampled ids, which end with the first stop token, with the token that completes a stop
        string (`matched`), or at the length limit."""
        stopped = token_ids[-1] in sampling.stop_token_ids
        spoken = token_ids[:-1] if stopped else token_ids
        if special := sum(token in sampling.special for token in spoken):
            spoken = [token for token in spoken if token not in sampling.dropped]
        # No tidying of spaces: the text should tokenise back to the sampled ids.
        text = tokenizer.decode(spoken, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if matched and not sampling.keep_stop:
            text = text[: find_stop(text, sampling.stop)]
        return cls(text, token_ids, "stop" if stopped else "stop_string" if matched else "length", logprob, special)


class Engine(Protocol):
    """A loaded model that responds to prompts."""

    def generate(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[tuple[str, list[Completion]]]:
        """(uuid, its n responses) of each prompt as it is finished, in any order; requests are taken as needed.

        A response depends on (seed, uuid, index of the response) alone, up to rounding that varies with the batch.
        """

    def close(self) -> None:
        """Give the device back."""


def row_seed(seed: int, uuid: str, index: int) -> int:
    """Seed of response `index` to prompt `uuid`, in [0, 2^63): hashed, so that neighbours share no part of a stream."""
    return xxhash.xxh3_64_intdigest(f"{seed} {index} {uuid}".encode()) >> 1


def load(
    name: str,
    model_folder: str | Path,
    tokenizer,
    *,
    device: str,
    dtype: str,
    max_model_len: int,
    batch_tokens: int = 32_768,
    gpu_memory_utilization: float = 0.9,
    tensor_parallel_size: int = 1,
) -> Engine:
    """The engine `name` (from `choose`) with the model in `model_folder` on `device` ("cpu", "cuda", "cuda:1"…).

    dtype: "float32", "bfloat16"… max_model_len: tokens of prompt and response together, at most the model's context.
    batch_tokens: hf, cells of the key-value cache of a batch. gpu_memory_utilization: vllm, share of a GPU's memory.
    tensor_parallel_size: vllm on CUDA, GPUs that hold the model together. Raises UserError where an engine has no such.
    """
    if tensor_parallel_size > 1 and (name, device) != ("vllm", "cuda"):
        raise UserError(
            f"--tensor_parallel_size {tensor_parallel_size}: only vLLM on GPUs samples from a tensor-parallel model"
        )
    model = model_folder, tokenizer, device, dtype, max_model_len
    if name == "hf":
        from cream.engines.hf import HfEngine

        return HfEngine.load(*model, batch_tokens)
    from cream.engines.vllm import VllmEngine

    return VllmEngine(*model, gpu_memory_utilization, tensor_parallel_size)
