"""How the cost of each stage grows: seconds and peak memory of whole commands against the number of records, of
responses to a prompt, of tokens of a prompt, and of words in the vocabulary, with fitted exponents.

    python benchmarks/growth.py --quick                         # few sizes: some minutes on two cores
    python benchmarks/growth.py --axes records --stages rewarding,dpo --records 1000,10000,100000,1000000

The model is one narrow layer, so that what grows is mostly the stages' own work. An exponent is the slope of log y over
log n, by least squares, where y is what a run takes above the start, a run with a single record; runs that take less
than half a second or 10 MB more than the start say nothing and are skipped. 1 is linear. Nothing should be above it
but attention within one response, which this model hardly has: what is above 1.15 is named at the end.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from measure import machine
from options import Options
from workload import ROOT, run

from cream.files import store

LAUNCHER = """
import json, resource, subprocess, sys, time
began = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
seconds = time.perf_counter() - began
if done.returncode:
    sys.exit(done.stderr[-2000:])
print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024]))
"""  # a small process of its own: what a child holds before it is another program counts as its peak
STAGES = ("sft", "sampling", "rewarding", "consistency", "dpo")
AXES = {"records": "records", "responses": "responses to a prompt", "length": "tokens of a prompt", "words": "words"}
UNAFFECTED = {("sft", "responses"), ("dpo", "responses"), ("consistency", "words")}  # what a stage has not
ABOVE = 1.15
FULL = {"records": "1000,10000,100000", "responses": "2,8,32,64", "length": "16,64,256,1024", "words": "400,8000,64000"}
QUICK = {"records": "300,1000,3000", "responses": "2,8,32", "length": "16,128,512", "words": "400,8000"}


@dataclass(frozen=True)
class Size:
    """Of a run's input."""

    records: int = 300
    responses: int = 2
    length: int = 16
    words: int = 400


def main() -> None:
    args = flags().parse_args()
    print(machine(), flush=True)
    steep = []
    for axis in args.axes.split(","):
        text = getattr(args, axis) or (QUICK if args.quick else FULL)[axis]
        sizes = [int(value) for value in text.split(",")]
        for stage in args.stages.split(","):
            if (stage, axis) in UNAFFECTED:
                continue
            base = measured(stage, replace(Size(), **{axis: sizes[0]} | {"records": 1}))
            rows = []
            for size in sizes:
                seconds, memory = measured(stage, replace(Size(), **{axis: size}))
                rows.append((size, seconds - base[0], memory - base[1]))
                print(
                    f"{stage:12}{size:9} {AXES[axis]:22}{seconds:8.1f} s, {rows[-1][1]:7.1f} of them after the start"
                    f"{memory / 1e6:9.0f} MB, {rows[-1][2] / 1e6:7.1f} above the start",
                    flush=True,
                )
            time, memory = (
                exponent([(row[0], row[i]) for row in rows if row[i] >= least]) for i, least in ((1, 0.5), (2, 1e7))
            )
            print(f"{stage:12}by {AXES[axis]}: seconds ~ n^{time:.2f}, memory ~ n^{memory:.2f}", flush=True)
            steep += [f"{stage} by {AXES[axis]} ({time:.2f})"] if time > ABOVE else []
    print(f"above linear: {', '.join(steep) or 'none'}")


def flags() -> Options:
    parser = Options(__doc__)
    parser.add("--axes", ",".join(AXES), "what grows, with commas between")
    parser.add("--stages", ",".join(STAGES), "with commas between")
    for axis, sizes in FULL.items():
        parser.add(f"--{axis}", None, f"{AXES[axis]}, with commas between; none: {sizes}, {QUICK[axis]} with --quick")
    parser.add_argument("--quick", action="store_true", help="smaller sizes")
    return parser


def measured(stage: str, size: Size) -> tuple[float, int]:
    """(seconds, bytes of resident memory at its peak) of a stage's command."""
    with tempfile.TemporaryDirectory() as folder:
        words = command(stage, size, Path(folder))
        launched = [sys.executable, "-c", LAUNCHER, sys.executable, *map(str, words)]
        done = subprocess.run(launched, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{stage} at {size}: {done.stderr}")
        return tuple(json.loads(done.stdout))


def command(stage: str, size: Size, folder: Path) -> list[object]:
    """The words of a stage's command line, its input files written before."""
    given, out = folder / "given.jsonl", folder / "out.jsonl"
    where = ["--device", "cpu", "--model", model(folder / "model", size.words), "--max_length", size.length + 64]
    train = ["--train_bsz", 32, "--epoch", 1, "--log_every", 1000, "--output_dir", folder / "run", "--name", given]
    if stage == "sft":
        store.write_rows(given, ({"uuid": u, "messages": [*p, answer("Answer: 3")]} for u, p in prompts(size)))
        return ["train.py", *where, "--train_stage", "sft", *train]
    if stage == "dpo":
        store.write_rows(given, pairs(size))
        return ["train.py", *where, "--train_stage", "dpo", *train]
    if stage == "sampling":
        store.write_rows(given, ({"uuid": u, "messages": p} for u, p in prompts(size)))
        how = ["--engine", "hf", "--gen_n", size.responses, "--gen_max_tokens", 4, "--top_p", 0.95]
        return ["infer.py", *where, *how, "--name", given, "--output_dir", out]
    if stage == "rewarding":
        texts = [f"Answer: {i}" for i in range(size.responses)]
        store.write_rows(given, ({"uuid": u, "prompt": p, "responses": texts} for u, p in prompts(size)))
        return ["rewarding.py", *where, "--reward", "likelihood", "--input_file", given, "--output", out]
    other = folder / "other.jsonl"
    for path, sign in ((given, 1), (other, -1)):
        store.write_rows(path, rewards(size, sign))
    return ["cal_consistency.py", "--file1", given, "--file2", other, "--output", out]


def model(folder: Path, words: int) -> Path:
    """A Llama of one narrow layer, with the tiny world's tokenizer and made-up words."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from cream.tiny.base import build_tokenizer

    tokenizer = build_tokenizer()
    tokenizer.add_tokens([f"word{i:07d}" for i in range(words - len(tokenizer))])
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    shape["max_position_embeddings"] = 4096
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape, **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def answer(text: str) -> dict:
    return {"role": "assistant", "content": text}


def prompts(size: Size) -> Iterator[tuple[str, list[dict]]]:
    """(uuid, messages) of prompts of about `length` tokens."""
    for number in range(size.records):
        text = " ".join([str(number % 90), *["eggs"] * (size.length - 1)])
        yield f"prompt-{number:09d}", [{"role": "user", "content": text}]


def rewards(size: Size, sign: int) -> Iterator[dict]:
    """Responses with rewards that rank them one way or the other."""
    values = [sign * 0.1 * i for i in range(size.responses)]
    for uuid, prompt in prompts(size):
        whole = [[*prompt, answer(f"Answer: {i}")] for i in range(size.responses)]
        yield {"uuid": uuid, "prompt": prompt, "response": whole, "reward": values}


def pairs(size: Size) -> Iterator[dict]:
    """Preference pairs."""
    for uuid, prompt in prompts(size):
        yield {
            "uuid": uuid,
            "prompt": prompt,
            "selected": [*prompt, answer("Answer: 3")],
            "rejected": [*prompt, answer("Answer: 4")],
        }


def exponent(points: list[tuple[float, float]]) -> float:
    """The slope of log(y) over log(x) by least squares; of one point none."""
    if len(points) < 2:
        return math.nan
    xs, ys = zip(*((math.log(x), math.log(y)) for x, y in points), strict=True)
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


if __name__ == "__main__":
    run(main)
