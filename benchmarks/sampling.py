"""Sampling against a bare vLLM: tokens per second, on the same weights and prompts, with the same engine options.

    python benchmarks/sampling.py
    python benchmarks/sampling.py --work oasst --answer_len 256
    python benchmarks/sampling.py --top_p 1     # harder: vLLM need not sort
    python benchmarks/sampling.py --prompt_len 100 --prompts 16 --answer_len 32     # without ../shared, quick

bare   vllm.LLM.generate on token ids: no seeds, no log-probabilities; it gives the texts back
ours   what infer.py does with messages: template, tokenising, seeds, log-probabilities, the check that an answer's text
       gives its sampled ids back, records in a journal, the finished file

Both engines run in this process and take turns, each with weights and prefix cache of its own, emptied before every
run. Every answer has --answer_len tokens (no stop token), so that both do equal work. The model is a Llama with random
weights; the prompts are random words, as many as real prompts have (--work) or --prompt_len. Temperature and top-p are
infer.py's own; on a CPU vLLM spends most of a step on sorting the vocabulary for top-p below 1.
The ratio is ours / bare in tokens per second, the median over rounds.
"""

import argparse
import random
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from measure import bandwidth, interleaved, machine, ratio
from options import Options
from workload import ROOT, SHAPES, SHARED, lengths, run, save_model

from cream.engines import Sampling, load
from cream.engines.vllm import engine_options
from cream.files.folders import parameter_count
from cream.files.journal import Output
from cream.files.provenance import Provenance
from cream.model.hardware import matrix_rate
from cream.model.load import load_tokenizer
from cream.records import Message, Prompt
from cream.scoring.completions import Responder
from cream.scoring.sampling import record_samples
from cream.text.chat import Chat

MEMORY = 0.4  # of a GPU, for each of the two engines


def main() -> None:
    args = flags().parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        chat = Chat(tokenizer(args.words))
        chat.tokenizer.save_pretrained(save_model(folder / "model", SHAPES[args.shape], args.words, args.seed))
        prompts = random_prompts(chat, args)
        ids = [chat.encode_prompt(prompt.messages) for prompt in prompts]
        tokens = args.prompts * args.answers * args.answer_len
        print(
            f"{args.shape}, {args.words} words: {args.prompts} prompts of {min(map(len, ids))} to {max(map(len, ids))} "
            f"tokens, {args.answers} answers of {args.answer_len} to each, top-p {args.top_p}: {tokens} tokens a run"
        )
        dtype = "float32" if args.device == "cpu" else "bfloat16"
        options = engine_options(args.device, dtype, max(map(len, ids)) + args.answer_len, MEMORY)
        sides = {
            "bare": bare(folder / "model", options, ids, args),
            "ours": ours(folder, chat, options, prompts, args),
        }
        seconds, weights = interleaved(sides, args.rounds), parameter_count(folder / "model")
    for name, found in seconds.items():
        rates = [tokens / second for second in found]
        print(f"  {name}  {statistics.median(rates):8.1f} tokens/s ({min(rates):.1f} to {max(rates):.1f})")
    # Decoded alone, a token reads every weight; a batch shares that and multiplies, two operations a weight and token.
    device = torch.device(args.device)
    size, speed = weights * (4 if dtype == "float32" else 2), bandwidth(device)
    rate = matrix_rate(device, getattr(torch, dtype), 2048)
    print(
        f"  limits: {2 * weights * tokens / rate:.1f} s for {2 * weights * tokens / 1e9:.0f} G operations at "
        f"{rate / 1e9:.0f} G/s; {args.answer_len * size / speed:.2f} s to read {size / 1e6:.0f} MB of weights "
        f"{args.answer_len} times at {speed / 1e9:.0f} GB/s"
    )
    print(*ratio("sampling_vs_vllm", seconds["bare"], seconds["ours"]), sep="\n")


def flags() -> Options:
    parser = Options(__doc__)
    parser.add("--work", "gsm8k", "whose prompts' lengths: gsm8k or oasst, from ../shared", choices=("gsm8k", "oasst"))
    parser.add("--prompt_len", None, "tokens of a prompt, +-20 %%, instead", type=int)
    parser.add("--prompts", 64, "prompts of a run")
    parser.add("--answers", 5, "answers to each")
    parser.add("--answer_len", 64, "tokens of an answer")
    parser.add("--temperature", 0.8, "of both sides")
    parser.add("--top_p", 0.95, "of both sides")
    return with_model(parser)


def with_model(parser: Options) -> Options:
    """A parser with the flags of the rounds, the model and its words as well."""
    parser.add("--rounds", 5, "runs of each side, in turn, after one that is not counted")
    parser.add("--shape", "37m", "model", choices=SHAPES)
    parser.add("--words", 32000, "vocabulary; at 32000 Mistral's tokenizer if ../shared is there")
    parser.add("--device", "cpu", "cpu in float32, or cuda in bfloat16", choices=("cpu", "cuda"))
    parser.add("--seed", 0, "of lengths, words, weights and sampling")
    return parser


def tokenizer(words: int):
    """Mistral's where it is at hand; else the tiny world's, filled up with made-up words."""
    if SHARED.is_dir() and words == 32000:
        return load_tokenizer(SHARED / "tokenizers/mistral")
    tiny = load_tokenizer(ROOT / "assets/tiny_m0")
    if words < len(tiny):
        sys.exit(f"--words {words}: the tokenizer of the tiny world has {len(tiny)} already")
    tiny.add_tokens([f"word{i:07d}" for i in range(words - len(tiny))])
    return tiny


def random_prompts(chat: Chat, args: argparse.Namespace) -> list[Prompt]:
    """Prompts of random words, about as long as the real ones."""
    work = f"{args.prompt_len}/{args.answer_len}" if args.prompt_len else args.work
    draw = random.Random(args.seed)
    plain = [token for token in range(len(chat.tokenizer)) if token not in chat.special]
    texts = [chat.tokenizer.decode(draw.choices(plain, k=n)) for n, _ in lengths(work, args.prompts, 1, 0.2, args.seed)]
    return [Prompt(uuid=f"p{i}", messages=[Message("user", text)]) for i, text in enumerate(texts)]


def bare(model: Path, options: dict, ids: list[list[int]], args: argparse.Namespace):
    """vLLM alone, answering all prompts once."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    llm = LLM(model=str(model), **options)
    n, length = args.answers, args.answer_len
    params = SamplingParams(n=n, temperature=args.temperature, top_p=args.top_p, max_tokens=length, ignore_eos=True)

    def answer() -> None:
        llm.reset_prefix_cache()
        given = [TokensPrompt(prompt_token_ids=row) for row in ids]
        answers = [answer for output in llm.generate(given, params, use_tqdm=False) for answer in output.outputs]
        assert all(answer.text for answer in answers)
        assert sum(len(answer.token_ids) for answer in answers) == len(ids) * n * length

    return answer


def ours(folder: Path, chat: Chat, options: dict, prompts: list[Prompt], args: argparse.Namespace):
    """The library as infer.py uses it, answering all prompts once and writing their records."""
    context, n, length = options["max_model_len"], args.answers, args.answer_len
    how = {"device": args.device, "dtype": options["dtype"], "gpu_memory_utilization": MEMORY}
    engine = load("vllm", folder / "model", chat.tokenizer, max_model_len=context, **how)
    sampling = Sampling(n=n, temperature=args.temperature, top_p=args.top_p, max_tokens=length, seed=args.seed)

    def answer() -> None:
        engine.engine.reset_prefix_cache()
        output, tokens = Output(folder / "samples.jsonl", {}, Provenance(), overwrite=True), 0
        for _, (prompt, ids, answers) in Responder(engine, chat, sampling, context)(prompts):
            output.append(record := record_samples(chat, prompt, ids, answers))
            tokens += sum(record.num_tokens)
        output.finish(output.rows([prompt.uuid for prompt in prompts]))
        assert tokens == len(prompts) * n * length

    return answer


if __name__ == "__main__":
    run(main)
