"""Speed of evaluation against lm-evaluation-harness: items a second, the same engine, weights and requests.

python benchmarks/evaluation.py
python benchmarks/evaluation.py --tasks arc_challenge --shots 5 --items 16    # a long text before every question

Multiple choice: what the peer's own task asks (context and options), scored by its transformers model, option by option
in padded batches, and here with the options of a question in one tree. Both sides tokenise; values are compared.
Generation: GSM8K's prompts answered greedily by transformers on both sides, --gen_max_tokens each.

Both models are loaded before: start-up counts on neither side. The peer's batch size is the quickest of --batch_sizes,
by a run of each that is not counted. Weights are random, the words are Mistral's.
The ratio is the peer's seconds / ours, the median over rounds.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import lmeval
import torch
from measure import interleaved, machine, ratio
from options import Options
from workload import SHAPES, SHARED, run, save_model

from cream.engines import Request, Sampling, load
from cream.evaluation.choices import CHUNK
from cream.model.checkpoint import length_limit
from cream.model.load import load_tokenizer
from cream.records import Message
from cream.scoring.logprobs import Group, Scorer
from cream.text.plain import Plain

WORDS = 32000  # of Mistral's tokenizer


def main() -> None:
    args = flags().parse_args()
    print(machine())
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model = save_model(folder / "model", SHAPES[args.shape], WORDS, args.seed)
        load_tokenizer(SHARED / "tokenizers/mistral").save_pretrained(model)
        peer = lmeval.model(model, 1, "cpu")
        for task in args.tasks.split(","):
            made = lmeval.task(task, folder, args.shots, args.gen_max_tokens)
            theirs = peer_side(peer, made, args)
            ours = (generation if task == "gsm8k" else choice)(model, made, args)
            peer.batch_size_per_gpu, tried = quickest(peer, theirs, args)
            seconds = interleaved({"peer": theirs, "ours": ours}, args.rounds)
            print(f"\n{task}, {args.shots} examples before each of {args.items} items; the peer by {tried}")
            for name, found in seconds.items():
                rates = [args.items / second for second in found]
                print(f"  {name}  {statistics.median(rates):7.2f} items/s ({min(rates):.2f} to {max(rates):.2f})")
            check(theirs(), ours(), task)
            lines += ratio(f"evaluation_{task}", seconds["peer"], seconds["ours"])
    print("", *lines, sep="\n")


def flags() -> Options:
    parser = Options(__doc__)
    parser.add("--tasks", "arc_easy,arc_challenge,openbookqa,siqa,gsm8k", "with commas between")
    parser.add("--items", 32, "of a task, the first ones")
    parser.add("--shots", 0, "solved examples before each item (not for siqa, which has no training rows here)")
    parser.add("--batch_sizes", "1,4,16,32", "of the peer, rows")
    parser.add("--gen_max_tokens", 64, "tokens of an answer")
    parser.add("--rounds", 5, "runs of each side, in turn, after one that is not counted")
    parser.add("--shape", "37m", "model", choices=SHAPES)
    parser.add("--seed", 0, "of the weights")
    return parser


def peer_side(peer, made, args: argparse.Namespace):
    """The peer's model on the requests of its task, in their order: log π of each option, or texts."""
    asked = lmeval.requests(made, args.items)

    def answer() -> list:
        if made.OUTPUT_TYPE == "generate_until":
            return peer.generate_until(asked, disable_tqdm=True)
        return [value for value, _ in peer.loglikelihood(asked, disable_tqdm=True)]

    return answer


def quickest(peer, theirs, args: argparse.Namespace) -> tuple[int, str]:
    """(the batch size that takes least, what all took in words)."""
    took = {}
    for size in map(int, args.batch_sizes.split(",")):
        peer.batch_size_per_gpu = size
        took[size] = min(interleaved({"peer": theirs}, 1)["peer"])
    best = min(took, key=took.get)
    return best, f"batches of {best} (" + ", ".join(f"{size}: {s:.1f} s" for size, s in took.items()) + ")"


def choice(model: Path, made, args: argparse.Namespace):
    """The worker of infer.py --scoring loglikelihood on the same contexts and options."""
    groups = [
        Group(
            question.uuid,
            [Message("user", question.context)],
            question.continuations,
            [True] * len(question.continuations),
        )
        for question in lmeval.questions(made, args.items)
    ]
    chat = Plain(load_tokenizer(model))
    worker = Scorer(model, chat, torch.float32, length_limit(None, model), None, CHUNK, 1, "cpu")

    def answer() -> list[float]:
        return [value for _, found in worker(groups) for value in found.logprob]

    return answer


def generation(model: Path, made, args: argparse.Namespace):
    """The hf engine of infer.py on the same prompts."""
    chat, questions = Plain(load_tokenizer(model)), lmeval.questions(made, args.items)
    context = length_limit(None, model)
    engine = load("hf", model, chat.tokenizer, device="cpu", dtype="float32", max_model_len=context, batch_tokens=16384)
    stops = (chat.tokenizer.eos_token_id,)
    how = {"max_tokens": args.gen_max_tokens, "stop_token_ids": stops, "logprobs": False}  # as infer.py evaluates
    sampling = Sampling(n=1, temperature=0.0, **how)

    def answer() -> list[str]:
        asked = (Request(q.uuid, chat.encode_prompt([Message("user", q.context)])) for q in questions)
        texts = {uuid: answer.text for uuid, (answer,) in engine.generate(asked, sampling)}
        return [texts[question.uuid] for question in questions]

    return answer


def check(theirs: list, ours: list, task: str) -> None:
    """Prints how far the two sides' results are apart."""
    assert len(theirs) == len(ours)
    if task == "gsm8k":
        print(f"  {sum(a == b for a, b in zip(theirs, ours, strict=True))} of {len(ours)} texts are equal")
    else:
        apart = max(abs(a - b) for a, b in zip(theirs, ours, strict=True))
        print(f"  log-likelihoods of {len(ours)} options differ by {apart:.2g} nats at most")


if __name__ == "__main__":
    run(main)
