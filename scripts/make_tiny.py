"""Make the tiny world: localdata/tiny/*.json and the base model assets/tiny_m0.

    python scripts/make_tiny.py                          the repository's own (seed 0; ten minutes on one core)
    python scripts/make_tiny.py --part data              its files only (two seconds)
    python scripts/make_tiny.py --part base --seed 1 --base_folder outputs/tiny/m0_seed1
                                                         another base, as the study in benchmarks/ needs

The base model is a randomly initialised Llama, trained by train.py on 44 000 noisy solutions. A seed gives the same
files to the byte, and the same weights up to float noise.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors")
MODEL_FILES += ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("data", "base", "all"), default="all", help="what to make (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the world and of the base (default: 0)")
    parser.add_argument("--data_folder", type=Path, default=ROOT / "localdata/tiny", help="(default: %(default)s)")
    parser.add_argument("--base_folder", type=Path, default=ROOT / "assets/tiny_m0", help="(default: %(default)s)")
    args = parser.parse_args()
    if args.part in ("data", "all"):
        from cream.tiny.problems import write_world

        write_world(args.data_folder, args.seed)
        print(f"the world of seed {args.seed}: {args.data_folder}")
    if args.part in ("base", "all"):
        make_base(args.base_folder, args.seed)
        print(f"its base model: {args.base_folder}")


def make_base(folder: Path, seed: int) -> None:
    """Train a base model from scratch (3 epochs, AdamW at 3e-3, batch 64) into `folder`; its training data and log stay
    in outputs/tiny/base_seed<seed>."""
    from cream.files.store import write
    from cream.tiny.base import noisy_set, write_init

    workshop = ROOT / f"outputs/tiny/base_seed{seed}"
    init, noisy, trained = workshop / "init", workshop / "noisy.json", workshop / "trained"
    write_init(init, seed)
    write(noisy, noisy_set(seed))
    flags = {
        "--train_stage": "sft",
        "--model": init,
        "--checkpoint": "none",
        "--name": noisy,
        "--epoch": 3,
        "--lr": 3e-3,
        "--train_bsz": 64,
        "--warmup_step_ratio": 0.05,
        "--weight_decay": 0,
        "--seed": seed,
        "--output_dir": trained,
        "--device": "cpu",
    }
    command = [sys.executable, str(ROOT / "train.py"), *(str(part) for flag in flags.items() for part in flag)]
    result = subprocess.run(command, cwd=ROOT)
    if result.returncode:
        sys.exit(result.returncode)
    folder.mkdir(parents=True, exist_ok=True)
    for name in MODEL_FILES:
        shutil.copyfile(trained / "checkpoint-last" / name, folder / name)


if __name__ == "__main__":
    main()
