"""Rewards by vLLM's pooling runner, as it gives them by default: pooled.py FOLDER ROWS, a JSON list of token ids."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cream.engines.vllm import engine_options  # noqa: E402


def main(folder: str, rows: str) -> None:
    options = engine_options("cpu", "float32", 128)  # which sets the environment that vLLM reads
    from vllm import LLM, TokensPrompt

    llm = LLM(folder, runner="pooling", **options)
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in json.loads(rows)]
    print(json.dumps([found.outputs.probs for found in llm.classify(prompts, use_tqdm=False)]))


if __name__ == "__main__":
    main(*sys.argv[1:])
