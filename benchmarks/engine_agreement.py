"""Agreement of the two engines: greedy responses of vLLM and of transformers to the same evaluation set.

    python benchmarks/engine_agreement.py --model tiny --name tiny_test

Both runs go through infer.py. Printed: the share of equal answers and of equal predictions, both accuracies, and every
answer that differs.
"""

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="(default: %(default)s)")
    parser.add_argument("--checkpoint", default="none", help="(default: %(default)s)")
    parser.add_argument("--name", default="tiny_test", help="evaluation set (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="(default: %(default)s)")
    parser.add_argument("--gen_max_tokens", default="64", help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs/engine_agreement", help="(default: %(default)s)")
    args = parser.parse_args()
    same = ("model", "checkpoint", "name", "device", "gen_max_tokens")
    flags = [word for name in same for word in (f"--{name}", getattr(args, name))]
    answers = {}
    for engine in ("hf", "vllm"):
        path = args.output / f"{engine}.json"
        command = [sys.executable, ROOT / "infer.py", "--mode", "evaluation", *flags, "--engine", engine]
        subprocess.run([*map(str, command), "--output_dir", str(path)], check=True)
        answers[engine] = _read(path)
    hf, vllm = answers["hf"], answers["vllm"]
    other = [uuid for uuid in hf if hf[uuid].responses != vllm[uuid].responses]
    for uuid in other:
        print(f"{uuid} (label {hf[uuid].label})\n  hf    {hf[uuid].responses}\n  vllm  {vllm[uuid].responses}")
    predictions = sum(hf[uuid].final_prediction == vllm[uuid].final_prediction for uuid in hf)
    print(f"{len(hf)} questions: {len(hf) - len(other)} equal answers ({1 - len(other) / len(hf):.2%}), ", end="")
    print(f"{predictions} equal predictions ({predictions / len(hf):.2%}); ", end="")
    print("accuracy " + ", ".join(f"{e} {sum(a.correct for a in f.values()) / len(f):.2%}" for e, f in answers.items()))


def _read(path: Path) -> dict:
    from cream.files.store import read
    from cream.records import Answer

    return {answer.uuid: answer for answer in read(path, Answer)}


if __name__ == "__main__":
    main()
