"""Agreement with lm-evaluation-harness: the same model and items on both sides, compared item by item.

python benchmarks/harness.py                                 # stories260K, all five tasks of ../shared
python benchmarks/harness.py --model FOLDER --tasks arc_easy,siqa --limit 100

Multiple choice: infer.py --scoring loglikelihood --prompt_format plain against the peer's acc (--length_norm none) and
acc_norm (chars). GSM8K: the peer's prompt, without solved examples, answered greedily by the hf engine of infer.py
and by the peer; both texts graded by the peer's flexible-extract, and ours by the rules of infer.py as well. Then both
rules on the GSM8K release's graded solutions, without a model.

The peer takes its own task definitions and models; only the place of its rows is changed, and social_iqa, which has acc
alone, gets acc_norm. It cuts a question that does not fit from the left, where infer.py counts a wrong answer.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import lmeval
from options import Options
from transformers import GenerationConfig
from workload import SHARED, run

import infer
from cream.engines import Request, Sampling, load
from cream.evaluation.choices import choose_option, likeliest
from cream.evaluation.grade import options_of
from cream.evaluation.tasks import grade
from cream.files import store
from cream.model.checkpoint import length_limit
from cream.model.load import load_tokenizer
from cream.records import Answer, Message
from cream.text.plain import Plain

FOLDERS = {task: task.replace("_", "-") for task in lmeval.TASKS}  # of localdata/, as DatasetEnum has them
METRICS = {"acc": "none", "acc_norm": "chars"}


def main() -> None:
    args = flags().parse_args()
    lm = lmeval.model(args.model, args.batch_size, "cpu")
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for task in args.tasks.split(","):
            make = generated if task == "gsm8k" else compared
            lines += make(task, lm, args, Path(folder))
    print("", *lines, sep="\n")


def flags() -> Options:
    parser = Options(__doc__)
    parser.add("--model", SHARED / "models/stories260K", "a Hugging Face folder", type=Path)
    parser.add("--tasks", ",".join(lmeval.TASKS), "with commas between")
    parser.add("--data", SHARED / "eval_cream_layout", "the same items in our layout: TASK/test.json", type=Path)
    parser.add("--limit", None, "items of a task, the first ones", type=int)
    parser.add("--batch_size", 16, "of the peer")
    parser.add("--gen_max_tokens", 128, "GSM8K: tokens of an answer")
    return parser


# Multiple choice ------------------------------------------------------------------------------------------------------


def compared(task: str, lm, args: argparse.Namespace, folder: Path) -> list[str]:
    """Both accuracies of a task by both metrics, and every item on which the sides differ."""
    samples = lmeval.evaluate(lm, lmeval.task(task, folder), args.limit)
    theirs = {sample["doc"]["id"]: sample for sample in samples}
    logprobs = lmeval.logprobs(samples)
    ours = answers(task, args, folder)
    assert [record.uuid for record in ours] == list(theirs)
    apart = max(gap(record, logprobs[record.uuid]) for record in ours)
    print(f"\n{task}: {len(ours)} items; log-likelihoods differ by {apart:.2g} nats at most")
    lines = []
    for metric, norm in METRICS.items():
        picks = [choose_option(record, norm) for record in ours]
        other = [pick for pick in picks if pick.correct != bool(theirs[pick.uuid][metric])]
        here, there = (100 * sum(found) / len(ours) for found in ([p.correct for p in picks], correct(theirs, metric)))
        same = sum(pick.final_prediction == peers_pick(pick, logprobs[pick.uuid], norm) for pick in picks)
        print(f"  {metric:8} here {here:5.1f} %, there {there:5.1f} %; {len(other)} items differ")
        print(f"  {'':8} the same option in {same} of {len(picks)}")
        for pick in other:
            print(f"    {pick.uuid}: {reason(pick, logprobs[pick.uuid])}")
        lines.append(f"disagreements {task}_{metric} {len(other)} of {len(ours)}")
    return lines


def answers(task: str, args: argparse.Namespace, folder: Path) -> list[Answer]:
    """The graded records of the command that a user types."""
    target = folder / f"{task}.jsonl"
    limit = [] if args.limit is None else ["--limit_size", str(args.limit)]
    infer.main(
        [
            *("--mode", "evaluation", "--scoring", "loglikelihood", "--prompt_format", "plain", "--device", "cpu"),
            *("--model", str(args.model.resolve()), "--name", str(args.data.resolve() / FOLDERS[task] / "test.json")),
            *("--bf16", "no", "--output_dir", str(target), "--show_example", "no", *limit),
        ]
    )
    return list(store.read(target, Answer))


def correct(theirs: dict[str, dict], metric: str) -> list[float]:
    return [sample[metric] for sample in theirs.values()]


def peers_pick(record: Answer, theirs: Sequence[float], norm: str) -> str:
    """The option that the peer's log-likelihoods choose."""
    options = options_of(record.question)
    return likeliest(options, dict(zip(options, theirs, strict=True)), dict.fromkeys(options, 1), norm).lower()


def gap(record: Answer, theirs: Sequence[float]) -> float:
    """Largest difference of an option's log-likelihood, 0 where there is none here."""
    return max((abs(a - b) for a, b in zip((record.option_logprob or {}).values(), theirs, strict=False)), default=0.0)


def reason(record: Answer, theirs: Sequence[float]) -> str:
    """Why the two sides grade an item otherwise."""
    if record.option_logprob is None:
        return f"{record.extra['reason']}; the peer scores it all the same"
    apart, best = gap(record, theirs), sorted(theirs)[-2:]
    what = "rounding" if apart < 1e-3 else "NOT EXPLAINED"
    return f"{what}: log-likelihoods differ by {apart:.2g}, the peer's two best are {best[1] - best[0]:.2g} apart"


# Generation -----------------------------------------------------------------------------------------------------------


def generated(task: str, lm, args: argparse.Namespace, folder: Path) -> list[str]:
    """Greedy texts of both sides, graded by the peer's rules and by this project's."""
    made = lmeval.task(task, folder, max_gen_toks=args.gen_max_tokens)
    flexible = [s for s in lmeval.evaluate(lm, made, args.limit) if s["filter"] == "flexible-extract"]
    texts = completions(made, flexible, args)
    own = {uuid: text for uuid, text in texts.items() if text is not None}
    theirs = {sample["doc"]["id"]: sample for sample in flexible}
    regraded = lmeval.regraded(made, {uuid: (theirs[uuid]["doc"], text) for uuid, text in own.items()})
    print(f"\n{task}: {len(theirs)} items, {len(theirs) - len(own)} of which do not fit here and are cut there")
    same = [uuid for uuid, text in own.items() if text == theirs[uuid]["resps"][0][0]]
    print(f"  {len(same)} of {len(own)} texts are equal")
    for uuid in own.keys() - set(same):
        print(f"    {uuid}: the texts part after {parted(own[uuid], theirs[uuid]['resps'][0][0])} characters")
    grades = {"flexible-extract": regraded, "infer.py's extraction": mine(theirs, own)}
    there = {uuid: bool(theirs[uuid]["exact_match"]) for uuid in own}
    lines = [f"disagreements {task}_texts {len(own) - len(same)} of {len(own)}"]
    for (rules, here), name in zip(grades.items(), ("flexible", "own_extraction"), strict=True):
        other = [uuid for uuid in own if here[uuid][1] != there[uuid]]
        share = [
            100 * sum(found) / max(1, len(own)) for found in ([right for _, right in here.values()], there.values())
        ]
        print(
            f"  here by {rules} {share[0]:.1f} %, there by flexible-extract {share[1]:.1f} %; {len(other)} items differ"
        )
        for uuid in other:
            read = theirs[uuid]["filtered_resps"][0]
            print(f"    {uuid}: here {here[uuid][0]!r}, there {read!r}, the answer {gold(theirs[uuid]['doc'])!r}")
        lines.append(f"disagreements {task}_{name} {len(other)} of {len(own)}")
    return [*lines, on_solutions(made)]


def on_solutions(made) -> str:
    """Both rules on solutions whose correctness is given; where they grade otherwise, what each reads."""
    lines = (SHARED / "prm/orm_gsm8k_solutions.jsonl").read_text().splitlines()
    rows = {row["id"]: row for row in map(json.loads, lines)}
    docs = {uuid: {"question": row["question"], "answer": f"#### {row['gold']}"} for uuid, row in rows.items()}
    theirs = lmeval.regraded(made, {uuid: (docs[uuid], row["solution"]) for uuid, row in rows.items()})
    ours = {uuid: grade(row["question"], row["gold"], row["solution"]) for uuid, row in rows.items()}
    right = [sum(found[uuid][1] == rows[uuid]["is_correct"] for uuid in rows) for found in (ours, theirs)]
    print(f"  {len(rows)} graded solutions: infer.py's rules are right about {right[0]}, flexible-extract {right[1]}")
    other = [uuid for uuid in rows if ours[uuid][1] != theirs[uuid][1]]
    for uuid in other:
        row = rows[uuid]
        print(
            f"    {uuid}, {'correct' if row['is_correct'] else 'wrong'}: here {ours[uuid][0]!r}, there "
            f"{theirs[uuid][0]!r}, the answer {row['gold']!r}; ends {row['solution'][-40:]!r}"
        )
    return f"disagreements gsm8k_rules {len(other)} of {len(rows)}"


def completions(made, samples: Sequence[dict], args: argparse.Namespace) -> dict[str, str | None]:
    """Greedy texts of the hf engine after the peer's prompts, up to the peer's stop words; None: it does not fit."""
    chat, eos = Plain(load_tokenizer(args.model)), GenerationConfig.from_pretrained(args.model).eos_token_id
    stops = (eos,) if isinstance(eos, int) else tuple(eos or ())
    context = length_limit(None, args.model)
    asked = {s["doc"]["id"]: chat.encode_prompt([Message("user", s["arguments"][0][0])]) for s in samples}
    fits = [Request(uuid, ids) for uuid, ids in asked.items() if len(ids) + args.gen_max_tokens <= context]
    engine = load("hf", args.model, chat.tokenizer, device="cpu", dtype="float32", max_model_len=context)
    sampling = Sampling(n=1, temperature=0.0, max_tokens=args.gen_max_tokens, stop_token_ids=stops)
    found: dict[str, str | None] = dict.fromkeys(asked)
    for uuid, (answer,) in engine.generate(iter(fits), sampling):
        found[uuid] = answer.text
        for word in made.config.generation_kwargs["until"]:
            found[uuid] = found[uuid].split(word)[0]
    return found


def mine(theirs: dict[str, dict], texts: dict[str, str]) -> dict[str, tuple[str, bool]]:
    """What infer.py reads out of each text, and whether that is right."""
    return {
        uuid: grade(theirs[uuid]["doc"]["question"], gold(theirs[uuid]["doc"]), text) for uuid, text in texts.items()
    }


def gold(doc: dict) -> str:
    return doc["answer"].rpartition("#### ")[2].replace(",", "")


def parted(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


if __name__ == "__main__":
    run(main)
