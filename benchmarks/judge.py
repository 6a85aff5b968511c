"""Judging N responses to each prompt: sampled against a bare vLLM, expected against sampled, trees against padded rows.

    python benchmarks/judge.py
    python benchmarks/judge.py --parts trees --prompts 4
    python benchmarks/judge.py --shape tiny --words 400 --prompts 2 --judge_tokens 4     # without ../shared, quick

bare      vllm.LLM.generate on the requests' token ids, with its prefix cache; it gives the texts back
sampled   what rewarding.py --reward judge --engine vllm does after its start: rubric, template, tokenising, seeds, the
          scores in the texts, journal, the finished file
expected  the same with --judge_mode expected: nothing is generated, and requests are laid out as trees
padded    one row for each request, eight of a length together, the model's own forward pass and head at the last token
trees     the same requests as trees: the expected scores without records and files

Questions and responses are random words, the rubric is one of about --rubric tokens, the model a Llama with random
weights. A judgement has --judge_tokens tokens (no stop token), so that bare and sampled do equal work. Both vLLM
engines run in this process, each with a prefix cache of its own, emptied before every run. Ratios are of seconds, the
median over rounds; trees and padded rows give the same expected scores, which is checked.
"""

import argparse
import random
import tempfile
from functools import cache, partial
from pathlib import Path

import torch
from measure import Layout, interleaved, machine, ratio, rectangle, side
from options import Options
from sampling import tokenizer, with_model
from workload import SHAPES, run, save_model

from cream.engines import load
from cream.engines.vllm import engine_options
from cream.files import store
from cream.files.journal import Output
from cream.files.provenance import Provenance
from cream.model.hardware import Budget, matrix_rate
from cream.model.load import load_policy
from cream.model.logprobs import LogProbs, score
from cream.model.trees import branches
from cream.records import Message, Samples
from cream.rewards import judge, passes
from cream.scoring import completions, logprobs
from cream.scoring.pool import Pool
from cream.text.chat import Chat

MEMORY = 0.4  # of a GPU, for each of the two engines
ROWS = 8  # of a padded batch
PARTS = ("sampled", "expected", "trees")
ROLE = "judge"


def main() -> None:
    parser = flags()
    args = parser.parse_args()
    parts = args.parts.split(",")
    if not {*parts} <= {*PARTS}:
        parser.error(f"--parts {args.parts}: expected {', '.join(PARTS)}")
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), args)
        sides = {"sampled": bench.sampled} if {"sampled", "expected"} & {*parts} else {}
        sides |= {"bare": bench.bare} if "sampled" in parts else {}
        sides |= {"expected": bench.expected} if "expected" in parts else {}
        sides |= {"padded": bench.padded, "trees": bench.trees} if "trees" in parts else {}
        seconds = interleaved({name: make() for name, make in sides.items()}, args.rounds)
        rate = matrix_rate(bench.device, bench.dtype, 2048)
        shape = SHAPES[args.shape]
        operations = {name: layout.operations(shape, args.words) for name, layout in bench.counted().items()}
    for name, found in seconds.items():
        side(name, found, operations[name], rate)
    lines = []
    if "sampled" in parts:
        lines += ratio("judge_sampled_vs_vllm", seconds["bare"], seconds["sampled"])
    if "expected" in parts:
        lines += ratio("judge_expected_vs_sampled", seconds["sampled"], seconds["expected"])
    if "trees" in parts:
        most = operations["padded"] / operations["trees"]
        lines += ratio("judge_trees_vs_padded", seconds["padded"], seconds["trees"], most)
    print("", *lines, sep="\n")


def flags() -> Options:
    parser = Options(__doc__)
    parser.add("--parts", ",".join(PARTS), "comparisons, with commas between")
    parser.add("--prompts", 8, "questions of a run")
    parser.add("--answers", 4, "N, responses to each")
    parser.add("--rubric", 350, "tokens of the rubric, about")
    parser.add("--prompt_len", 120, "tokens of a question, +-20 %%")
    parser.add("--answer_len", 250, "tokens of a response, +-20 %%")
    parser.add("--judge_tokens", 60, "tokens of a sampled judgement")
    parser.add("--judge_samples", 3, "sampled judgements of a response")
    parser.add("--max_tokens_per_batch", 4096, "of trees")
    return with_model(parser)


class Bench:
    """The model, the samples, and a maker of each side, which judges all of them once."""

    def __init__(self, folder: Path, args: argparse.Namespace):
        self.folder, self.args = folder, args
        self.model = save_model(folder / "model", SHAPES[args.shape], args.words, args.seed)
        self.device = torch.device(args.device)
        self.dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
        words = tokenizer(args.words)
        words.save_pretrained(self.model)
        self.chat = Chat(words, **passes.QUOTING)
        self.samples = folder / "samples.jsonl"
        store.write(self.samples, random_samples(self.chat, args))
        (folder / "judge.txt").write_text(rubric(self.chat, args))
        form = {"judge_prompt": str(folder / "judge.txt"), "judge_parse": "Score: {{ reward }}", "valid_reward": "0:5"}
        tokens = {"judge_samples": args.judge_samples, "judge_max_tokens": args.judge_tokens, "seed": args.seed}
        batch = {"max_tokens_per_batch": args.max_tokens_per_batch}
        self.runs = {
            "sampled": self._run(judge.Options(**form, **tokens)),
            "expected": self._run(judge.Options(**form, **batch, judge_mode="expected")),
        }
        self.ids = [self.chat.encode_prompt(request.messages) for request in self.runs["sampled"].items(ROLE)]
        self.rows = [logprobs.encode(group, self.chat, 4096)[0] for group in self.runs["expected"].items(ROLE)]
        self.found: dict[str, list[float]] = {}  # expected scores, by side
        print(
            f"{args.shape}, {args.words} words: {args.prompts} prompts x {args.answers} responses, requests of "
            f"{min(map(len, self.ids))} to {max(map(len, self.ids))} tokens, {args.judge_samples} judgements of "
            f"{args.judge_tokens}"
        )

    def _run(self, options: judge.Options) -> passes.Run:
        return passes.Run(judge, options, self.samples, partial(store.read, self.samples, Samples))

    def _record(self, name: str, worker, module) -> None:
        """Judge all samples, and write their rewards as rewarding.py does."""
        judged, output = self.runs[name], Output(self.folder / f"{name}.jsonl", {}, Provenance(), overwrite=True)
        with output:
            for key, result in worker(judged.items(ROLE)):
                output.append({"uuid": key, **module.as_row(result, self.chat)})
            output.finish(passes.rewards(judged, output))

    def _engine_options(self) -> tuple:
        dtype = str(self.dtype).removeprefix("torch.")
        return self.args.device, dtype, max(map(len, self.ids)) + self.args.judge_tokens, MEMORY

    def bare(self):
        """vLLM alone."""
        from vllm import LLM, SamplingParams
        from vllm.inputs import TokensPrompt

        options, args = self.runs["sampled"].options, self.args
        llm = LLM(model=str(self.model), **engine_options(*self._engine_options()))
        how = {"temperature": options.judge_temperature, "top_p": options.judge_top_p}
        params = SamplingParams(n=args.judge_samples, max_tokens=args.judge_tokens, ignore_eos=True, **how)

        def answer() -> None:
            llm.reset_prefix_cache()
            given = [TokensPrompt(prompt_token_ids=row) for row in self.ids]
            texts = [each for output in llm.generate(given, params, use_tqdm=False) for each in output.outputs]
            assert sum(len(each.token_ids) for each in texts) == len(self.ids) * args.judge_samples * args.judge_tokens

        return answer

    def sampled(self):
        device, dtype, context, memory = self._engine_options()
        how = {"device": device, "dtype": dtype, "gpu_memory_utilization": memory, "max_model_len": context}
        engine = load("vllm", self.model, self.chat.tokenizer, **how)
        worker = completions.Responder(engine, self.chat, self.runs["sampled"].options.sampling(), context)

        def answer() -> None:
            engine.engine.reset_prefix_cache()
            self._record("sampled", worker, completions)

        return answer

    def expected(self):
        count = self.args.prompts * self.args.answers
        how = 4096, self.args.max_tokens_per_batch, logprobs.chunk_of(Pool(self.args.device), count), 1
        worker = logprobs.Scorer(self.model, self.chat, self.dtype, *how, self.args.device)
        return partial(self._record, "expected", worker, logprobs)

    def trees(self):
        """The requests as trees, and what the scores' log-probabilities make of them."""
        model = LogProbs(load_policy(self.model, self.dtype, self.device))
        scores, forms = self.runs["expected"].options.form.scores, self.runs["expected"].options.form.continuations
        joined, budget = logprobs.join_groups(self.rows), Budget(self.args.max_tokens_per_batch)

        def answer() -> None:
            values = iter([value for group in score(model, joined, budget) for value in group])
            found = []
            for rows in self.rows:
                own = [next(values) for _ in rows]
                shares = judge.distribution(own, [row.num_response_tokens for row in rows], forms)
                found.append(sum(p * value for p, value in zip(shares, scores, strict=True)))
            self._same("trees", found)

        return answer

    def padded(self):
        """A row up to where the score stands for each request, left-padded, in batches of like lengths."""
        model, scores = load_policy(self.model, self.dtype, self.device), self.runs["expected"].options.form.scores
        ends = [[row.ids[-1] for row in rows] for rows in self.rows]
        assert all(len({tuple(row.ids[:-1]) for row in rows}) == 1 for rows in self.rows), (
            "scores are not single tokens"
        )

        @torch.inference_mode()
        def answer() -> None:
            found: dict[int, float] = {}
            for batch in self._batches():
                width = max(len(self.rows[i][0]) - 1 for i in batch)
                lead = [self.rows[i][0].ids[:-1] for i in batch]
                ids = torch.tensor([[0] * (width - len(row)) + row for row in lead], device=self.device)
                mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in lead], device=self.device)
                positions = (mask.cumsum(1) - 1).clamp(min=0)
                how = {"attention_mask": mask, "position_ids": positions, "logits_to_keep": 1, "use_cache": False}
                logits = model(input_ids=ids, **how).logits[:, -1].float()
                for i, row in zip(batch, logits, strict=True):
                    shares = row[ends[i]].softmax(0).tolist()
                    found[i] = sum(p * value for p, value in zip(shares, scores, strict=True))
            self._same("padded", [found[i] for i in range(len(self.rows))])

        return answer

    def _batches(self) -> list[list[int]]:
        order = sorted(range(len(self.rows)), key=lambda i: len(self.rows[i][0]))
        return [order[start : start + ROWS] for start in range(0, len(order), ROWS)]

    def _same(self, name: str, found: list[float]) -> None:
        """Both sides of trees against padded rows find the same, up to rounding."""
        self.found[name] = found
        within = 1e-3 if self.dtype == torch.float32 else 0.1
        for other in self.found.values():
            assert max(abs(a - b) for a, b in zip(found, other, strict=True)) < within

    def counted(self) -> dict[str, Layout]:
        """What each side lays out; decoding counts as its tokens, each over all before it."""
        joined, head = logprobs.join_groups(self.rows), len(self.rows)
        own = sum((tree(group) for group in joined), Layout())
        widths = [(len(batch), max(len(self.rows[i][0]) - 1 for i in batch)) for batch in self._batches()]
        rows = sum((rectangle(*size, head=size[0]) for size in widths), Layout())
        n = self.args.judge_samples * self.args.judge_tokens
        prompts = sum((tree([rows[0]], head=1) for rows in self.rows), Layout())  # less what the prefix cache saves
        decoded = prompts + Layout(n * head, n * head, sum(n * len(ids) for ids in self.ids))
        return {"bare": decoded, "sampled": decoded, "expected": own, "trees": own, "padded": rows}


def tree(group: list, head: int | None = None) -> Layout:
    """A group's tree: each of its branches over those that it grows out of and itself."""
    found, pairs = branches(group), 0
    for branch in found:
        own = branch.end - branch.start
        pairs += own * branch.start + own * (own + 1) // 2
    read = sum(row.num_response_tokens for row in group) if head is None else head
    return Layout(sum(branch.end - branch.start for branch in found), read, pairs)


def random_words(chat: Chat, count: int, draw: random.Random) -> str:
    """So many tokens of text: words that are one token each."""
    return " ".join(draw.choices(_words(chat), k=count))


@cache
def _words(chat: Chat) -> list[str]:
    texts = {chat.tokenizer.decode([i]).strip() for i in range(len(chat.tokenizer)) if i not in chat.special}
    words = sorted(text for text in texts if text.isascii() and text.isalnum())
    rows = chat.tokenizer([f"of {word} of" for word in words], add_special_tokens=False)["input_ids"]
    shortest = min(map(len, rows))
    return [word for word, row in zip(words, rows, strict=True) if len(row) == shortest]


def random_samples(chat: Chat, args: argparse.Namespace):
    """Questions and responses of random words."""
    draw = random.Random(args.seed)

    def about(mean: int) -> int:
        return draw.randint(round(0.8 * mean), round(1.2 * mean))

    for i in range(args.prompts):
        prompt = [Message("user", random_words(chat, about(args.prompt_len), draw))]
        responses = [random_words(chat, about(args.answer_len), draw) for _ in range(args.answers)]
        yield Samples(uuid=f"p{i}", prompt=prompt, responses=responses)


def rubric(chat: Chat, args: argparse.Namespace) -> str:
    """A judge's form with a rubric of so many tokens."""
    words = random_words(chat, args.rubric, random.Random(args.seed))
    return f"{words}\n<question>\n{{{{ prompt }}}}\n</question>\n<response>\n{{{{ response }}}}\n</response>\nScore?"


if __name__ == "__main__":
    run(main)
