"""How far the log-probabilities of a sampler are from those that training computes of the same tokens: the bias of a
policy gradient that takes the sampler's for the behaviour policy.

    python benchmarks/behaviour.py --model tiny --name tiny_prompt_1 --limit_size 64
    python benchmarks/behaviour.py --model smollm2 --name tiny_prompt_1 --limit_size 16 --gen_max_tokens 128

Engines sample in float32 and in bfloat16; the training's forward pass (LogProbs, over trees) is in float32 and under
bfloat16 autocast. d is trained minus sampled, in nats: of a token, and summed over a response. exp(d) is the ratio that
a step begins with: 1 where both agree. The last column is the share of responses that a clip of 0.2 would take.
"""

import math
import sys
from pathlib import Path
from statistics import fmean

from options import Options

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
CLIP = 0.2
DTYPES = ("float32", "bfloat16")


def main() -> None:
    parser = Options(__doc__)
    parser.add("--model", "tiny", "base model")
    parser.add("--checkpoint", None, "a checkpoint, as of infer.py", type=str)
    parser.add("--name", "tiny_prompt_1", "prompts")
    parser.add("--limit_size", 64, "prompts")
    parser.add("--gen_n", 4, "responses to each")
    parser.add("--gen_max_tokens", 48, "tokens of a response at most")
    parser.add("--engines", "hf,vllm", "with commas between")
    parser.add("--dtypes", ",".join(DTYPES), "of sampler and trainer, with commas between")
    parser.add("--device", "cpu", "cpu or cuda")
    args = parser.parse_args()
    folder, chat, prompts = load(args)
    print("sampler          trainer            tokens  responses  d of a token: mean, mean |d|, max |d|  "
          "d of a response: mean, mean |d|, max |d|  exp(d): min, max  clipped")  # fmt: skip
    for engine in args.engines.split(","):
        for dtype in args.dtypes.split(","):
            try:
                sampled = sample(args, engine, dtype, folder, chat, prompts)
            except Exception as error:  # vLLM is not for every model and machine
                print(f"{engine:6}{dtype:11}not here: {str(error).splitlines()[0]}")
                continue
            for trained in args.dtypes.split(","):
                report(f"{engine:6}{dtype:11}{trained:12}", differences(args, folder, trained, sampled))


def load(args):
    """The policy's folder, its text format, and the prompts."""
    from config import CHECKPOINTS, DATASET_FILES, DATASETS, MODEL_FILES
    from cream.cli import names
    from cream.files import store
    from cream.model.load import load_chat
    from cream.records import Prompt

    folder = names.model(args.model, MODEL_FILES)
    if args.checkpoint:
        folder = names.checkpoint(args.checkpoint, CHECKPOINTS, "--checkpoint")
    path = names.dataset(args.name, DATASET_FILES, DATASETS)
    return folder, load_chat(folder), list(store.read(path, Prompt, args.limit_size))


def sample(args, name: str, dtype: str, folder: Path, chat, prompts) -> list[tuple[list[int], list[tuple]]]:
    """Per prompt its ids, and of each response the ids and the engine's log-probability of each of them."""
    from cream.engines import Request, Sampling, load
    from cream.model.checkpoint import length_limit

    engine = load(
        name, folder, chat.tokenizer, device=args.device, dtype=dtype, max_model_len=length_limit(2048, folder)
    )
    kept = tap(name, engine)
    how = Sampling(args.gen_n, 1.0, 1.0, args.gen_max_tokens, stop_token_ids=chat.stop_ids)
    requests = [Request(prompt.uuid, chat.encode_prompt(prompt.messages)) for prompt in prompts]
    of = {request.uuid: request.prompt_ids for request in requests}
    found = [
        (of[uuid], [(each.token_ids, kept[id(each)][1]) for each in responses])
        for uuid, responses in engine.generate(requests, how)
    ]
    engine.close()
    for _, responses in found:
        for ids, logprobs in responses:
            assert len(ids) == len(logprobs)
    return found


def tap(name: str, engine) -> dict[int, tuple]:
    """Lets an engine note the log-probabilities of a response's tokens: id of the Completion -> (it, these)."""
    kept, own = {}, engine._completion

    def hf(ids, logprobs, *more):
        made = own(ids, logprobs, *more)
        kept[id(made)] = made, logprobs[: len(made.token_ids)]
        return made

    def vllm(output, sampling):
        made = own(output, sampling)
        values = [output.logprobs[i][token].logprob for i, token in enumerate(made.token_ids)]
        kept[id(made)] = made, values
        return made

    engine._completion = {"hf": hf, "vllm": vllm}[name]
    return kept


def differences(args, folder: Path, dtype: str, sampled) -> list[list[float]]:
    """Of each response trained minus sampled, token by token."""
    import torch

    from cream.model.load import load_policy
    from cream.model.logprobs import LogProbs
    from cream.text.tokens import Tokens

    device = torch.device(args.device)
    model = LogProbs(load_policy(folder, torch.float32, device))
    found = []
    for prompt, responses in sampled:
        group = [Tokens(prompt + ids, [(len(prompt), len(prompt) + len(ids))]) for ids, _ in responses]
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            values = iter(model(model.pack([group]).to(device)).float().tolist())
        found += [[next(values) - logprob for logprob in logprobs] for _, logprobs in responses]
    return found


def report(name: str, d: list[list[float]]) -> None:
    tokens, sums = [each for own in d for each in own], [math.fsum(own) for own in d]
    ratios = [math.exp(each) for each in sums]
    clipped = sum(abs(ratio - 1) > CLIP for ratio in ratios) / len(ratios)
    of = "  ".join(f"{fmean(v):+.1e} {fmean(map(abs, v)):.1e} {max(map(abs, v)):.1e}" for v in (tokens, sums))
    print(f"{name}{len(tokens):13}{len(sums):11}  {of}  {min(ratios):.6f} {max(ratios):.6f}  {clipped:.2%}", flush=True)


if __name__ == "__main__":
    main()
