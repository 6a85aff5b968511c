"""The stages with a real model on real text, SmolLM2-135M of `make real`, against their peers on the same work.

    python benchmarks/real.py                         # all parts, float32
    python benchmarks/real.py --parts sft,dpo --bf16 yes

sft       a step over OASST conversations, trained on every response, against trl's SFTTrainer at its best settings
dpo       steps of 8 pairs, OASST's best against its worst human-ranked response, against trl's DPOTrainer at its best
score     log-probabilities of OASST's ranked responses, against padded batches of 6 with all logits (released code)
sampling  five responses to GSM8K questions by vLLM, against bare vLLM.generate on the same token ids
choice    ARC-Easy by log-likelihood, against lm-evaluation-harness with the quickest of its batch sizes

Ratios are the median over rounds of the peer's seconds / ours. A side's share is what its counted operations would take
at the machine's measured rate of matrix products, in its seconds. --bf16 yes: training under bfloat16 autocast.
"""

import argparse
import json
import statistics
import tempfile
from itertools import islice
from pathlib import Path

import evaluation
import lmeval
import sampling
import torch
from dpo_step import BATCH, Ours
from measure import interleaved, machine, ratio, side, trees
from options import Options
from peers import (
    DPO_BEST,
    SFT_BEST,
    TRL,
    conversation_rows,
    preference_rows,
    released_batches,
    released_layout,
    released_score,
)
from workload import ROOT, SHARED, Shape, run

from cream.cli.names import SMOLLM2
from cream.engines.vllm import engine_options
from cream.errors import UserError
from cream.files.store import read
from cream.model.hardware import Budget, matrix_rate
from cream.model.load import load_chat, load_policy
from cream.model.logprobs import LogProbs, score
from cream.records import Conversation, Message, Prompt
from cream.text.chat import Chat, Tokens
from cream.training.stages import dpo, sft

MODEL = ROOT / SMOLLM2
SHAPE, WORDS = Shape(576, 30, 9, 1536, key_heads=3), 49152
LONGEST = 768  # tokens of a conversation, of a response with its prompt, and of a row that trl packs


def main() -> None:
    parser = Options(__doc__)
    parser.add_parts(PARTS)
    parser.add("--size", 8, "conversations, pairs, prompts; of choice four times as many questions")
    parser.add("--rounds", 3, "runs of each side, in turn, after one that is not counted")
    parser.add("--bf16", "no", "training under bfloat16 autocast, on both sides", choices=("yes", "no"))
    parser.add("--answer_len", 64, "tokens of a sampled response")
    args = parser.parse_args()
    for needed in (MODEL, SHARED):
        if not needed.is_dir():
            raise UserError(f"{needed} is not there; `make real` makes {SMOLLM2}, shared lies beside the repository")
    print(machine())
    chat, lines = load_chat(MODEL), []
    for part in args.parts:
        print(f"\n{part}", flush=True)
        lines += PARTS[part](chat, args)
    print("", *lines, sep="\n")


def train_sft(chat: Chat, args: argparse.Namespace) -> list[str]:
    records = read(SHARED / "sft/oasst1.sft.json", Conversation)
    encoded = (row for record in records for row in chat.encode_conversation(record.messages))
    rows = list(islice((row for row in encoded if len(row) <= LONGEST), 2 * args.size))
    bf16, data = args.bf16 == "yes", (MODEL, WORDS, "cpu", conversation_rows(rows), "SFT")
    settings = SFT_BEST | {"bf16": bf16, "max_length": LONGEST, "gradient_accumulation_steps": len(rows)}
    sides = {"trl, packing": TRL(*data, **settings, packing=True), "trl, one by one": TRL(*data, **settings)}
    sides["ours"] = Ours(MODEL, sft.Stage(sft.Options(), {}), [[row] for row in rows], len(rows), bf16, "cpu", None)
    return training("sft", sides, trees([row] for row in rows), args)


def train_dpo(chat: Chat, args: argparse.Namespace) -> list[str]:
    pairs = [(group[0], group[-1]) for group in ranked(chat, args.size)]
    bf16 = args.bf16 == "yes"
    settings = DPO_BEST | {"max_length": 4096, "bf16": bf16}
    examples = [dpo.Example(chosen, rejected, 1.0, (0.0, 0.0)) for chosen, rejected in pairs]
    sides = {
        "trl, best settings": TRL(MODEL, WORDS, "cpu", preference_rows(pairs), "DPO", **settings),
        "ours": Ours(MODEL, dpo.Stage(dpo.Options(), {}), examples, BATCH, bf16, "cpu", None),
    }
    return training("dpo", sides, trees(map(list, pairs)), args)


def training(name: str, sides: dict, work, args: argparse.Namespace) -> list[str]:
    """Seconds, tokens a second (of trees: each prompt once) and share of the matrix rate, of the peers and ours."""
    dtype = torch.bfloat16 if args.bf16 == "yes" else torch.float32
    rate, seconds = matrix_rate(torch.device("cpu"), dtype, 2048), interleaved(sides, args.rounds)
    peers = [each for each in sides if each != "ours"]
    # trl's head computes its logits once more in the backward pass
    counted = {each: sides[each].layout.operations(SHAPE, WORDS, 3, head=4) for each in peers}
    counted["ours"] = work.operations(SHAPE, WORDS, 3)
    for each, runs in seconds.items():
        side(each, runs, counted[each], rate)
    best = min(peers, key=lambda each: statistics.median(seconds[each]))
    return [
        *ratio(f"real_{name}_vs_trl_best", seconds[best], seconds["ours"], counted[best] / counted["ours"]),
        *speed(name, work.tokens, counted["ours"], seconds["ours"], rate),
    ]


def speed(name: str, tokens: int, operations: float, seconds: list[float], rate: float) -> list[str]:
    middle = statistics.median(seconds)
    print(f"  {tokens} tokens, {tokens / middle:.0f} a second")
    return [f"share real_{name}_of_matrix_rate {operations / rate / middle:.3f}"]


def ranked(chat: Chat, count: int) -> list[list[Tokens]]:
    """The human-ranked responses of OASST prompts, best first, of those whose responses all fit."""
    groups = []
    for row in map(json.loads, (SHARED / "pref/oasst_human_ranked.jsonl").read_text().splitlines()):
        prompt = [Message(message["role"], message["content"]) for message in row["prompt"]]
        group = chat.encode_responses(prompt, row["ranked"], [True] * len(row["ranked"]))
        if all(isinstance(each, Tokens) and len(each) <= LONGEST for each in group):
            groups.append(group)
    return groups[:count]


def score_responses(chat: Chat, args: argparse.Namespace) -> list[str]:
    groups = ranked(chat, args.size)
    plain, policy = (load_policy(MODEL, torch.float32, torch.device("cpu")) for _ in range(2))
    model, batches = LogProbs(policy), released_batches(groups)
    sides = {
        "released procedure": lambda: released_score(plain, batches).tolist(),
        "ours": lambda: score(model, groups, Budget(4096)),
    }
    rate, seconds = matrix_rate(torch.device("cpu"), torch.float32, 2048), interleaved(sides, args.rounds)
    work = trees(groups)
    counted = released_layout(batches).operations(SHAPE, WORDS), work.operations(SHAPE, WORDS)
    for (each, runs), operations in zip(seconds.items(), counted, strict=True):
        side(each, runs, operations, rate)
    return [
        *ratio("real_score_vs_released", *seconds.values(), counted[0] / counted[1]),
        *speed("score", work.tokens, counted[1], seconds["ours"], rate),
    ]


def sample(chat: Chat, args: argparse.Namespace) -> list[str]:
    rows = map(json.loads, islice(open(SHARED / "eval/gsm8k_test.jsonl"), 2 * args.size))
    prompts = [Prompt(uuid=row["id"], messages=[Message("user", row["question"])]) for row in rows]
    ids = [chat.encode_prompt(prompt.messages) for prompt in prompts]
    how = argparse.Namespace(answers=5, answer_len=args.answer_len, temperature=0.8, top_p=0.95, seed=0, device="cpu")
    options = engine_options("cpu", "float32", max(map(len, ids)) + args.answer_len, sampling.MEMORY)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model").symlink_to(MODEL)
        sides = {
            "bare": sampling.bare(MODEL, options, ids, how),
            "ours": sampling.ours(Path(folder), chat, options, prompts, how),
        }
        seconds = interleaved(sides, args.rounds)
    tokens = len(prompts) * how.answers * args.answer_len
    rate = matrix_rate(torch.device("cpu"), torch.float32, 2048)
    operations = 2.0 * tokens * (SHAPE.weights + SHAPE.hidden * WORDS)
    for each, runs in seconds.items():
        side(each, runs, operations, rate)
    return [
        *ratio("real_sampling_vs_vllm", *seconds.values()),
        *speed("sampling", tokens, operations, seconds["ours"], rate),
    ]


def choose(chat: Chat, args: argparse.Namespace) -> list[str]:
    how = argparse.Namespace(items=4 * args.size, batch_sizes="4,16", shots=0, gen_max_tokens=64)
    peer = lmeval.model(MODEL, 1, "cpu")
    with tempfile.TemporaryDirectory() as folder:
        task = lmeval.task("arc_easy", Path(folder))
        theirs, ours = evaluation.peer_side(peer, task, how), evaluation.choice(MODEL, task, how)
        peer.batch_size_per_gpu, tried = evaluation.quickest(peer, theirs, how)
        seconds = interleaved({"peer": theirs, "ours": ours}, args.rounds)
        evaluation.check(theirs(), ours(), "arc_easy")
    print(f"  the peer by {tried}")
    for each, runs in seconds.items():
        print(f"  {each}  {how.items / statistics.median(runs):.2f} questions/s")
    return ratio("real_choice_vs_lm_eval", seconds["peer"], seconds["ours"])


PARTS = {"sft": train_sft, "dpo": train_dpo, "score": score_responses, "sampling": sample, "choice": choose}

if __name__ == "__main__":
    run(main)
