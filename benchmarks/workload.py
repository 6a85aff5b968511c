"""What the benchmarks work on: a Llama-shaped model with random weights, and token rows of real or given lengths.

Time depends on lengths and not on words: the ids are random. Lengths are

  oasst    prompts (threads, often of several turns) and their human-ranked answers, of OpenAssistant
  gsm8k    GSM8K's questions, each with its solution and the four sampled ones of the GSM8K release
  P/A      prompts of about P tokens and answers of about A, each drawn evenly from +-20 % (--spread)

oasst and gsm8k are counted with Mistral's tokenizer and chat template and need the folder `shared` beside this one.
"""

import argparse
import json
import os
import random
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from options import Options

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cream.errors import UserError  # noqa: E402
from cream.text.chat import Tokens  # noqa: E402

SHARED = ROOT.parent / "shared/data"
EOS = 2


@dataclass(frozen=True)
class Shape:
    """A Llama: width, layers, attention heads, feed-forward width, heads of keys and values (None: as many); the output
    layer is tied to the embeddings."""

    hidden: int
    layers: int
    heads: int
    inner: int
    key_heads: int | None = None

    @property
    def weights(self) -> int:
        """Weights of the matrix products of all layers."""
        keys = self.hidden * (self.key_heads or self.heads) // self.heads
        return self.layers * (2 * self.hidden**2 + 2 * self.hidden * keys + 3 * self.hidden * self.inner)


SHAPES = {
    "tiny": Shape(64, 2, 2, 128),
    "37m": Shape(512, 6, 8, 1536),  # 36.8 M parameters with 32 000 words, 16.4 M of them embeddings
    "1b": Shape(2048, 16, 32, 8192),
}


def flags(doc: str, work: str, size: int, words: int = 32000) -> Options:
    """The flags that all benchmarks have; `work`, `size` and `words` are the defaults of this one."""
    parser = Options(doc)
    parser.add("--work", work, "lengths, several with commas: oasst, gsm8k, PROMPT/ANSWER")
    parser.add("--prompt_len", None, "with --answer_len, the same as --work PROMPT/ANSWER", type=int)
    parser.add("--answer_len", None, "mean tokens of an answer", type=int)
    parser.add("--spread", 0.2, "PROMPT/ANSWER: lengths are drawn from this share below and above")
    parser.add("--sizes", str(size), "prompts (pairs, conversations) of a run; several with commas show how cost grows")
    parser.add("--rounds", 5, "runs of each side, in turn, after one that is not counted")
    parser.add("--shape", "37m", "model", choices=SHAPES)
    parser.add("--words", words, "vocabulary")
    parser.add("--device", "cpu", "cpu or cuda, where both sides run in bfloat16", choices=("cpu", "cuda"))
    parser.add("--seed", 0, "of lengths, ids and weights")
    parser.add_argument("--quick", action="store_true", help="the first of --work, the smallest of --sizes, one round")
    return parser


def parse(parser: Options) -> argparse.Namespace:
    """The flags' values, with `work` as a list of names and `sizes` as a list of numbers."""
    args = parser.parse_args()
    if (args.prompt_len is None) != (args.answer_len is None):
        parser.error("--prompt_len and --answer_len go together")
    args.work = [f"{args.prompt_len}/{args.answer_len}"] if args.prompt_len else args.work.split(",")
    try:
        args.sizes = [int(size) for size in args.sizes.split(",")]
    except ValueError:
        parser.error(f"--sizes {args.sizes}: expected numbers with commas between")
    if args.quick:
        args.work, args.sizes, args.rounds = args.work[:1], [min(args.sizes)], 1
    if min(*args.sizes, args.rounds) < 1 or not 0 <= args.spread < 1:
        parser.error("--sizes and --rounds are at least 1, --spread is from 0 to below 1")
    return args


def save_model(folder: Path, shape: Shape, words: int, seed: int) -> Path:
    """A Hugging Face folder with random float32 weights; returns it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def run(main: Callable[[], None]) -> None:
    """Call a benchmark's main; a user error ends in one message and exit code 2."""
    import transformers

    warnings.filterwarnings("ignore")
    os.environ["TQDM_DISABLE"] = "1"  # trl reads it
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


# Lengths --------------------------------------------------------------------------------------------------------------


def lengths(work: str, count: int, answers: int, spread: float, seed: int) -> list[tuple[int, list[int]]]:
    """(tokens of the prompt, of each of its answers), `count` times; raises UserError for a name without its data."""
    draw = random.Random(f"{work} {seed}")
    if work in REAL:
        known = REAL[work]()
        chosen = [draw.choice(known) for _ in range(count)]
        return [(p, a[:answers] if len(a) >= answers else draw.choices(a, k=answers)) for p, a in chosen]
    try:
        prompt, answer = map(int, work.split("/"))
    except ValueError:
        raise UserError(f"--work {work}: expected oasst, gsm8k or PROMPT/ANSWER, such as 600/250") from None

    def about(mean: int) -> int:
        return max(2, draw.randint(round(mean * (1 - spread)), round(mean * (1 + spread))))

    return [(about(prompt), [about(answer) for _ in range(answers)]) for _ in range(count)]


def _oasst() -> list[tuple[int, list[int]]]:
    chat = _chat()
    rows = _rows("pref/oasst_human_ranked.jsonl")
    return [_counted(chat, [m["content"] for m in row["prompt"]], row["ranked"]) for row in rows]


def _gsm8k() -> list[tuple[int, list[int]]]:
    chat = _chat()
    solutions = {row["question"]: [row["answer"]] for row in _rows("eval/gsm8k_test.jsonl")}
    for row in _rows("prm/orm_gsm8k_solutions.jsonl"):
        solutions.setdefault(row["question"], []).append(row["solution"])
    return [_counted(chat, [question], found) for question, found in solutions.items() if len(found) == 5]


REAL = {"oasst": _oasst, "gsm8k": _gsm8k}


def _counted(chat, turns: list[str], answers: list[str]) -> tuple[int, list[int]]:
    from cream.records import Message

    prompt = [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(turns)]
    encoded = chat.encode_responses(prompt, answers, [True] * len(answers))
    rows = [row for row in encoded if not isinstance(row, str)]
    return rows[0].spans[0][0], [row.num_response_tokens for row in rows]


def _chat():
    from cream.model.load import load_tokenizer
    from cream.text.chat import Chat

    if not SHARED.is_dir():
        raise UserError(f"oasst and gsm8k need {SHARED}, which is not there; give --prompt_len and --answer_len")
    return Chat(load_tokenizer(SHARED / "tokenizers/mistral"))


def _rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (SHARED / name).read_text().splitlines()]


# Token rows -----------------------------------------------------------------------------------------------------------


def groups(work: list[tuple[int, list[int]]], words: int, seed: int) -> list[list[Tokens]]:
    """Answers by prompt, of these lengths, with random ids; each ends with EOS."""
    draw = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [draw.randrange(3, words) for _ in range(count)]

    made = []
    for prompt_length, answer_lengths in work:
        prompt = ids(prompt_length)
        rows = [prompt + ids(length - 1) + [EOS] for length in answer_lengths]
        made.append([Tokens(row, [(prompt_length, len(row))]) for row in rows])
    return made


def conversations(work: str, count: int, longest: int, words: int, args: argparse.Namespace) -> list[Tokens]:
    """Whole conversations of at most `longest` tokens: OASST threads with every answer trained on, or P/A rows."""
    if work != "oasst":
        return [group[0] for group in groups(lengths(work, count, 1, args.spread, args.seed), words, args.seed)]
    from cream.records import Message

    chat = _chat()
    draw = random.Random(args.seed)
    rows = [[Message(m["role"], m["content"]) for m in row["messages"]] for row in _rows("sft/oasst_threads.jsonl")]
    encoded = [found for found in map(chat.encode_conversation, rows) if not isinstance(found, str)]
    known = [row for found in encoded for row in found if len(row) <= longest]
    chosen = [draw.choice(known) for _ in range(count)]
    return [Tokens([draw.randrange(3, words) for _ in row.ids], row.spans) for row in chosen]
