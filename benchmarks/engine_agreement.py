"""Agreement of the two engines: greedy responses of vLLM and of transformers to the same questions or prompts.

    python benchmarks/engine_agreement.py --model tiny --name tiny_test
    python benchmarks/engine_agreement.py --model smollm2 --name localdata/small/prompt.3.json --mode sampling \\
        --limit_size 100 --gen_max_tokens 128

All runs go through infer.py. Of questions (--mode evaluation), in float32: the share of equal responses and of equal
predictions, both accuracies, and every response that differs. Of prompts (--mode sampling), in float32 and bfloat16:
how many texts are those of transformers in float32, how far each engine's log-probability of a response is from a
float32 pass over the same tokens (rewarding.py), and where the float32 texts part.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

ENGINES = {"hf": "hf", "vllm": "vLLM"}
DTYPES = {"no": "float32", "yes": "bfloat16"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", default="evaluation", choices=MODES, help="(default: %(default)s)")
    parser.add_argument("--model", default="tiny", help="(default: %(default)s)")
    parser.add_argument("--checkpoint", default="none", help="(default: %(default)s)")
    parser.add_argument("--name", default="tiny_test", help="questions, or prompts (default: %(default)s)")
    parser.add_argument("--limit_size", default="none", help="(default: %(default)s)")
    parser.add_argument("--device", default="auto", help="(default: %(default)s)")
    parser.add_argument("--gen_max_tokens", default="64", help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs/engine_agreement", help="(default: %(default)s)")
    args = parser.parse_args()
    args.output /= re.sub(r"[^\w.-]+", "_", f"{args.model}-{args.name}")  # a folder for each
    MODES[args.mode](args)


def respond(args: argparse.Namespace, path: Path, **flags: str) -> None:
    """Run infer.py, which does nothing where its output is up to date."""
    same = ("mode", "model", "checkpoint", "name", "limit_size", "device", "gen_max_tokens")
    run("infer.py", **{name: getattr(args, name) for name in same}, **flags, output_dir=path)


def run(script: str, **flags) -> None:
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    if code := subprocess.run([sys.executable, ROOT / script, *words]).returncode:
        sys.exit(code)  # it has said why


def compare_evaluations(args: argparse.Namespace) -> None:
    from cream.records import Answer

    answers = {}
    for engine in ENGINES:
        respond(args, path := args.output / f"{engine}.json", engine=engine)
        answers[engine] = _read(path, Answer)
    hf, vllm = answers["hf"], answers["vllm"]
    other = [uuid for uuid in hf if hf[uuid].responses != vllm[uuid].responses]
    for uuid in other:
        print(f"{uuid} (label {hf[uuid].label})\n  hf    {hf[uuid].responses}\n  vllm  {vllm[uuid].responses}")
    predictions = sum(hf[uuid].final_prediction == vllm[uuid].final_prediction for uuid in hf)
    print(f"{len(hf)} questions: {len(hf) - len(other)} equal responses ({1 - len(other) / len(hf):.2%}), ", end="")
    print(f"{predictions} equal predictions ({predictions / len(hf):.2%}); ", end="")
    print("accuracy " + ", ".join(f"{e} {sum(a.correct for a in f.values()) / len(f):.2%}" for e, f in answers.items()))


def compare_samples(args: argparse.Namespace) -> None:
    from cream.records import Rewards, Samples

    samples, errors = {}, {}
    for engine in ENGINES:
        for bf16 in DTYPES:
            path = args.output / f"sampling-{engine}-{DTYPES[bf16]}.json"
            respond(args, path, engine=engine, bf16=bf16, do_sample="no")
            scored = path.with_suffix(".scored.json")
            flags = {"model": args.model, "checkpoint": args.checkpoint, "device": args.device, "bf16": "no"}
            run("rewarding.py", **flags, reward="likelihood", normalize="sum", input_file=path, output=scored)
            samples[engine, bf16], plain = _read(path, Samples), _read(scored, Rewards)
            errors[engine, bf16] = [
                abs(sample.logprob[0] - plain[uuid].reward[0])
                for uuid, sample in samples[engine, bf16].items()
                if sample.logprob[0] is not None and plain[uuid].reward[0] is not None
            ]
    texts = {key: {uuid: each.responses[0] for uuid, each in own.items()} for key, own in samples.items()}
    base = texts["hf", "no"]
    for (engine, bf16), own in texts.items():
        same, apart = sum(own[uuid] == text for uuid, text in base.items()), errors[engine, bf16]
        print(
            f"{ENGINES[engine]}, {DTYPES[bf16]}: {same} of {len(base)} texts are those of hf, float32; log-probability "
            f"of a response off by {fmean(apart):.2g} nats on average, {max(apart):.2g} at most"
        )
    for uuid, text in base.items():
        if (other := texts["vllm", "no"][uuid]) != text:
            at = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), len(other))
            print(f"{uuid}: after {at} characters hf has {text[at : at + 30]!r}, vLLM {other[at : at + 30]!r}")


def _read(path: Path, kind: type) -> dict:
    from cream.files.store import read

    return {record.uuid: record for record in read(path, kind)}


MODES = {"evaluation": compare_evaluations, "sampling": compare_samples}

if __name__ == "__main__":
    main()
