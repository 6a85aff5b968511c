"""Strong scaling: the same rewarding and the same DPO by the command lines in one process and in two, a core each.

Start-up (interpreter, libraries, Ray or the process group, the model) is the time of a run with hardly any records; it
is taken off before throughputs are compared, and printed. For comparison there is a process with both cores, and for
training a cost model: a step takes compute / W + bytes of its all-reduce / bandwidth.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --memory          # bytes a GPU needs in each mode, by formula
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from measure import machine
from workload import ROOT, SHAPES, run, save_model

from cream.tiny.base import build_tokenizer

WAYS = {  # name -> (--device, threads of a process)
    "one process, one core": ("cpu", 1),
    "two processes, a core each": ("cpu,cpu", 1),
    "one process, two cores": ("cpu", 2),
}
FEW = 4  # records of the runs that show the start-up
# GB of n billion weights on w GPUs through a step, without activations: (on each GPU, in all machines together).
# Replicas: weights, gradients and AdamW's two moments in float32. ZeRO: as DeepSpeed's own estimators count it
# (estimate_zero2_model_states_mem_needs, estimate_zero3_…), with the 10^9 weights at hand that ds_stage3.json allows.
MODES = {
    "replicas": lambda n, w: (16 * n, 0),
    "replicas, adamw_bf16": lambda n, w: (12 * n, 0),
    "ZeRO-2": lambda n, w: (2 * n + 18 * n / w, 0),
    "ZeRO-2, offload": lambda n, w: (2 * n, 16 * n),
    "ZeRO-3": lambda n, w: (18 * n / w + 4, 0),
    "ZeRO-3, offload": lambda n, w: (4, 18 * n),
}
LLAMAS = {"8 B": (8.03e9, 4096, 14336, 32), "70 B": (70.6e9, 8192, 28672, 80)}  # weights, width, feed-forward, layers


def records(folder: Path, count: int) -> dict[str, Path]:
    """Samples and pairs whose answers are four of the tiny world's solutions on end, about 100 tokens."""
    known = list(json.loads((ROOT / "localdata/tiny/sft.json").read_text()).items())
    solutions = [solution["content"] for _, (_, solution) in known]
    samples, pairs = {}, {}
    for i in range(count):
        uuid, (question, _) = known[i % len(known)]
        texts = ["\n".join(solutions[(7 * i + 4 * k + j) % len(solutions)] for j in range(4)) for k in range(5)]
        samples[f"{uuid}-{i}"] = {"prompt": [question], "responses": texts}
        chosen, rejected = ([question, {"role": "assistant", "content": text}] for text in texts[:2])
        pair = {"prompt": [question], "selected": chosen, "rejected": rejected, "consistency": None}
        pairs[f"{uuid}-{i}"] = pair
    made = {}
    for name, rows in (("samples", samples), ("pairs", pairs)):
        for size in (FEW, count):
            made[f"{name} {size}"] = folder / f"{name}-{size}.json"
            made[f"{name} {size}"].write_text(json.dumps(dict(list(rows.items())[:size])))
    return made


def seconds(command: list[object], threads: int) -> float:
    """Of a command line, from its start to its end."""
    start = time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    words = [sys.executable, *map(str, command), "--show_example", "no"]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}\n{done.stdout}{done.stderr}")
    return time.perf_counter() - start


def rewarding(folder: Path, file: Path, device: str, threads: int) -> float:
    """Log-likelihoods of a file of samples; nothing kept from before."""
    file.with_name(f"{file.stem}.scores.jsonl").unlink(missing_ok=True)
    where = ["--device", device, "--model", folder, "--reward", "likelihood"]
    output = ["--output", file.with_suffix(".out.json"), "--overwrite", "yes"]
    return seconds(["rewarding.py", *where, "--input_file", file, *output], threads)


def training(folder: Path, file: Path, device: str, threads: int) -> float:
    """One epoch of DPO, 8 pairs a step."""
    file.with_name(f"{file.stem}.scores.jsonl").unlink(missing_ok=True)
    where = ["--device", device, "--model", folder, "--name", file, "--train_bsz", 8 // len(device.split(","))]
    output = ["--output_dir", file.with_suffix(".run"), "--overwrite", "yes"]
    return seconds(["train.py", *where, "--force", "yes", *output], threads)


def all_reduce_rate() -> float:
    """Bytes a second that two processes of gloo here add up."""
    code = """
import sys, time, torch, torch.distributed as dist
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=int(sys.argv[2]), world_size=2)
numbers, best = torch.ones(1 << 24), 1e9
for _ in range(5):
    start = time.perf_counter()
    dist.all_reduce(numbers)
    best = min(best, time.perf_counter() - start)
print(numbers.numel() * 4 / best)
"""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-c", code, f"{folder}/store"]
        started = [subprocess.Popen([*words, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(2)]
        return float([process.communicate()[0] for process in started][0])


def scale(args) -> None:
    """Measure, and print."""
    lines = []
    with tempfile.TemporaryDirectory() as name:
        folder = save_model(Path(name) / "model", SHAPES[args.shape], args.words, 0)
        build_tokenizer().save_pretrained(folder)
        made = records(Path(name), args.size)
        stages = {"rewarding": (rewarding, "samples"), "training": (training, "pairs")}
        for what in args.stage.split(","):
            stage, rows = stages[what]
            print(f"\n{what}, {args.size} records")
            rates = {}
            for way, (device, threads) in WAYS.items():
                runs = [
                    [stage(folder, made[f"{rows} {size}"], device, threads) for size in (FEW, args.size)]
                    for _ in range(args.rounds)
                ]
                few, many = map(statistics.median, zip(*runs, strict=True))
                if many <= few:
                    sys.exit(f"{way}: {args.size} records took no longer than {FEW}; give a larger --size")
                rates[way] = (args.size - FEW) / (many - few)
                print(f"  {way:28} {rates[way]:7.2f} records/s, start-up {few:5.1f} s, whole {many:5.1f} s")
            one, two, both = rates.values()
            lines.append(f"ratio scaling_{what}_2_processes {two / one:.3f}")
            lines.append(f"ratio scaling_{what}_2_cores {both / one:.3f}")
            if what == "training":
                weights = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
                rate, step = all_reduce_rate(), 8 / one
                told = 8 / (step / 2 + weights / rate)
                print(f"  model of cost, two processes {told:7.2f} records/s: half of a step's {step:.2f} s, and")
                size = f"{weights / 1e6:.0f} MB of gradients at {rate / 1e9:.2f} GB/s"
                print(f"  {size}, not hidden, {weights / rate:.2f} s")
                lines.append(f"ratio scaling_training_measured_of_model {two / told:.3f}")
    print()
    print("\n".join(lines))


def memory() -> None:
    """Print what a step needs in each mode, and what a token's activations add."""
    worlds = (1, 8, 16, 64)
    print(f"{'GB on a GPU':22}" + "".join(f"{f'{size} x {w}':>12}" for size in LLAMAS for w in worlds) + "  machines")
    for mode, need in MODES.items():
        billions = [weights / 1e9 for weights, *_ in LLAMAS.values()]
        row = "".join(f"{need(n, w)[0]:12.0f}" for n in billions for w in worlds)
        print(f"{mode:22}{row}  " + ", ".join(f"{need(n, 1)[1]:.0f}" for n in billions))
    for size, (_, hidden, inner, layers) in LLAMAS.items():
        layer = 16 * hidden + 4 * inner  # as cream.model.hardware.budget counts
        whole, again = 2 * layers * layer / 1e6, 2 * (layers * hidden + layer) / 1e6
        print(f"activations, {size}, bfloat16: {whole:.1f} MB a token, {again:.2f} with --grad_checkpointing")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true", help="only the table of memory")
    parser.add_argument("--stage", default="rewarding,training", help="one or both (default: %(default)s)")
    parser.add_argument("--size", type=int, default=160, help="records of a run (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--shape", choices=SHAPES, default="37m", help="(default: %(default)s)")
    parser.add_argument("--words", type=int, default=32000, help="vocabulary (default: %(default)s)")
    args = parser.parse_args()
    if args.memory:
        memory()
        return
    print(machine())
    scale(args)


if __name__ == "__main__":
    torch.set_num_threads(2)
    run(main)
