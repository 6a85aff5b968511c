"""The flags of engines and of sampling."""

import logging
from dataclasses import dataclass

from cream.cli.flags import flag
from cream.engines import COLDEST, ENGINES, GREEDY, HOTTEST, REPEATED, Sampling
from cream.engines.stops import parse_stops
from cream.errors import UserError
from cream.text.prompts import AUTO, SYSPROMPTS

log = logging.getLogger("cream")


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

    def plan(self, mode: str, seed: int) -> Sampling:
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
