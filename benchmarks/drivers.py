"""What a record costs in memory: peaks of whole stage commands on .jsonl files of growing size.

    python benchmarks/drivers.py                              # 10^4, 10^5, 10^6 records: an hour a round on 2 cores
    python benchmarks/drivers.py --records 10000,100000 --stages consistency --rounds 1

The model is the smallest that every part of a stage still runs with, so that what grows is the driver's. What a start
takes for a moment varies by 30 MB, more than 10^6 records add: a peak is the least of --rounds runs. consistency runs
twice: `same order`, and `other order`, its second file in another order than its first.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import machine  # noqa: E402
from workload import ROOT  # noqa: E402

from cream.files import store  # noqa: E402

STAGES = ("sampling", "rewarding", "judging", "consistency")
JUDGE = ["judge", "--judge_prompt", "plain", "--judge_mode", "expected"]
LAUNCHER = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""  # a small process of its own: what a child holds before it is another program counts as its peak


def tiny_model(folder: Path) -> Path:
    """A Llama of one narrow layer, with the tiny world's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from cream.tiny.base import build_tokenizer

    tokenizer = build_tokenizer()
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape, **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def prompts(count: int) -> Iterator[dict]:
    """Prompts of a few tokens."""
    for number in range(count):
        yield {"uuid": f"prompt-{number:09d}", "messages": [{"role": "user", "content": f"{number % 100} eggs"}]}


def samples(count: int) -> Iterator[dict]:
    """Two answers of a few tokens to each."""
    for row in prompts(count):
        yield {"uuid": row["uuid"], "prompt": row["messages"], "responses": ["Answer: 3", "Answer: 4"]}


def rewards(count: int, seed: int) -> Iterator[dict]:
    """The same, rewarded."""
    rng = random.Random(seed)
    for row in samples(count):
        answers = [[*row["prompt"], {"role": "assistant", "content": text}] for text in row["responses"]]
        reward = [rng.random(), rng.random()]
        yield {
            "uuid": row["uuid"],
            "prompt": row["prompt"],
            "response": answers,
            **dict.fromkeys(("score", "ref_score", "reward"), reward),
        }


def shuffled(source: Path, target: Path) -> None:
    """The lines of a file in another order."""
    lines = source.read_bytes().splitlines(keepends=True)
    random.Random(0).shuffle(lines)
    target.write_bytes(b"".join(lines))


def commands(stage: str, model: Path, folder: Path, count: int) -> Iterator[tuple[str, list[object]]]:
    """(name, words of a command line), its input files written before."""
    where = ["--device", "cpu", "--model", model]
    if stage == "sampling":
        store.write_rows(folder / "prompts.jsonl", prompts(count))
        how = ["--engine", "hf", "--gen_n", 1, "--gen_max_tokens", 1, "--max_length", 64]
        given = ["--name", folder / "prompts.jsonl", "--output_dir", folder / "samples.jsonl"]
        yield stage, ["infer.py", *where, *how, *given]
    elif stage in ("rewarding", "judging"):
        store.write_rows(folder / "samples.jsonl", samples(count))
        given = ["--input_file", folder / "samples.jsonl", "--output", folder / "rewards.jsonl"]
        yield stage, ["rewarding.py", *where, "--reward", *(["likelihood"] if stage == "rewarding" else JUDGE), *given]
    else:
        current, previous, other = (folder / f"{name}.jsonl" for name in ("current", "previous", "other"))
        store.write_rows(current, rewards(count, 0))
        store.write_rows(previous, rewards(count, 1))
        shuffled(previous, other)
        for order, second in (("same order", previous), ("other order", other)):
            files = ["--file1", current, "--file2", second, "--output", folder / f"{second.stem}.pairs.jsonl"]
            yield f"{stage}, {order}", ["cal_consistency.py", *files]


def peaks(stage: str, model: Path, count: int) -> Iterator[tuple[str, int]]:
    """(name, peak of resident memory in bytes) of a stage's commands."""
    with tempfile.TemporaryDirectory() as folder:
        for name, words in commands(stage, model, Path(folder), count):
            launched = [sys.executable, "-c", LAUNCHER, sys.executable, *map(str, words)]
            done = subprocess.run(launched, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
            yield name, json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", default="10000,100000,1000000", help="of each file (default: %(default)s)")
    parser.add_argument("--stages", default=",".join(STAGES), help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each (default: %(default)s)")
    args = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_model(Path(folder))
        for stage in args.stages.split(","):
            before: dict[str, tuple[int, int]] = {}
            for count in map(int, args.records.split(",")):
                runs = [dict(peaks(stage, model, count)) for _ in range(args.rounds)]
                for name, peak in {name: min(run[name] for run in runs) for name in runs[0]}.items():
                    grown = ""
                    if name in before:
                        records, least = before[name]
                        grown = f"{(peak - least) / (count - records):8.1f} bytes a record more"
                    before[name] = count, peak
                    print(f"{name:26}{count:10} records{peak / 1e6:10.1f} MB{grown}", flush=True)


if __name__ == "__main__":
    main()
