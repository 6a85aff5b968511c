"""The study on a real model behind docs/results.md: what CREAM's pieces do with SmolLM2-135M and real text.

    make real
    python prepare_data.py build all --task_limit 60 --output_dir localdata/small    # --from ../shared/data, say
    python benchmarks/real_study.py                       # runs what is missing, then prints all tables
    python benchmarks/real_study.py --parts accuracy,consistency

It runs the two recipes configs/recipes/smollm2_*.yaml (50 minutes together on two cores), and reads their outputs.

accuracy     of every model, by log-likelihood and by greedy responses; paired differences
consistency  C of every round and source of prompts: mean, spread, how much of it is below 1/2
labels       pairs of prompts with a known answer: how often the chosen and the rejected response are right
length       rewards against length within prompts; chosen minus rejected in tokens
truncation   what responses that stop at the length limit do to C and to rewards
beta         M2 trained from the same pairs with other beta: margins, accuracy
perplexity   of texts in ../shared, float32 and bfloat16; nats per byte with and without the rule that splits off digits

Intervals are 95 %: Wilson's of a share, Student's of a mean, the bootstrap's of a difference of paired accuracies.
"""

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from itertools import product
from math import sqrt
from pathlib import Path
from typing import NamedTuple

import numpy as np
from options import Options
from scipy.stats import t

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cream.cli.flags import spell  # noqa: E402
from cream.consistency import consistency, margin_cap  # noqa: E402
from cream.evaluation.compare import compare, join  # noqa: E402
from cream.evaluation.grade import grade_item  # noqa: E402
from cream.evaluation.statistics import wilson_interval  # noqa: E402
from cream.files.provenance import meta_path  # noqa: E402
from cream.files.store import read, read_json  # noqa: E402
from cream.loops.reading import read_loop  # noqa: E402
from cream.records import Answer, Conversation, Item, Pair, Rewards  # noqa: E402

OUT, DATA = ROOT / "outputs/smollm2", ROOT / "localdata/small"
BY = ("mean", "sum")
RECIPES = ("smollm2_cream", "smollm2_srlm")
SOURCES = {"arc-easy": "ARC-Easy", "arc-challenge": "ARC-Challenge", "openbookqa": "OpenBookQA", "gsm8k": "GSM8K"}
MODELS = {"M0": OUT / "M0", "M1": OUT / "M1"}
MODELS |= {f"{title} {m}": OUT / arm / m for m in ("M2", "M3") for arm, title in (("cream", "CREAM"), ("srlm", "SRLM"))}
ROUNDS = {"1, both": OUT / "round1", "2, CREAM": OUT / "cream/round2", "2, SRLM": OUT / "srlm/round2"}
PAIRS = {"1": OUT / "cream/round1", "2, CREAM": OUT / "cream/round2", "2, SRLM": OUT / "srlm/round2"}


def main() -> None:
    parser = Options(__doc__)
    parser.add("--parts", ",".join(PARTS), "with commas between")
    parts = parser.parse_args().parts.split(",")
    stage("iterate.py", config=",".join(f"configs/recipes/{name}.yaml" for name in RECIPES))
    for part in parts:
        print(f"\n## {part}\n", flush=True)
        PARTS[part]()


def stage(script: str, **flags) -> None:
    """Run a command as a user does; it does nothing where its output is up to date. Its log goes to stderr."""
    words = [word for name, value in flags.items() for word in (f"--{name}", spell(value))]
    print("$ python", script, *words, file=sys.stderr, flush=True)
    subprocess.run([sys.executable, script, *words, "--device", "cpu"], cwd=ROOT, check=True, stdout=sys.stderr)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    for row in (head, ["---"] * len(head), *rows):
        print("|", " | ".join(map(str, row)), "|")


def percent(successes: int, n: int) -> str:
    low, high = wilson_interval(successes, n)
    return f"{100 * successes / n:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def mean(values: Sequence[float], digits: int = 2) -> str:
    """The mean with Student's interval."""
    values = np.asarray(values, dtype=float)
    half = float(t.ppf(0.975, len(values) - 1)) * values.std(ddof=1) / sqrt(len(values))
    centre = values.mean()
    return f"{centre:.{digits}f} [{centre - half:.{digits}f}, {centre + half:.{digits}f}]"


# Accuracy -------------------------------------------------------------------------------------------------------------


def answers(model: Path, kind: str) -> list[Answer]:
    return list(read(model.with_name(f"{model.name}.{kind}.evaluation.json"), Answer))


def accuracy() -> None:
    for kind, what in (("loglikelihood", "by log-likelihood"), ("responses", "by greedy responses")):
        summaries = {
            name: read_json(path.with_name(f"{path.name}.{kind}.evaluation.summary.json"))["tasks"]
            for name, path in MODELS.items()
        }
        tasks = [row["task"] for row in summaries["M0"]]
        print(f"Accuracy {what}, %, n = {', '.join(str(row['n']) for row in summaries['M0'][:-1])}:\n")
        rows = []
        for name, found in summaries.items():
            cells = [percent(row["correct"], row["n"]) for row in found[:-1]]
            rows.append([name, *cells, f"{100 * found[-1]['accuracy']:.1f}"])
        table(["model", *tasks], rows)
        print()
    print("Differences by log-likelihood, points, mean over tasks:\n")
    found = {name: answers(path, "loglikelihood") for name, path in MODELS.items()}
    compared = [("M1", "M0"), ("CREAM M2", "M1"), ("SRLM M2", "M1"), ("CREAM M3", "M1"), ("SRLM M3", "M1")]
    compared += [("CREAM M2", "SRLM M2"), ("CREAM M3", "SRLM M3")]
    rows = []
    for better, base in compared:
        row = next(row for row in compare(join(found[base], found[better])) if row["task"] == "macro")
        difference, low, high = (f"{100 * row[key]:+.1f}" for key in ("difference", "low", "high"))
        rows.append([f"{better} - {base}", f"{difference} [{low}, {high}]", f"{row['only_b']} / {row['only_a']}"])
    table(["difference", "points", "items that only the first / only the second has right"], rows)


# Consistency ----------------------------------------------------------------------------------------------------------


class Ranking(NamedTuple):
    """A model's rewards of the N responses to a prompt, their lengths in tokens, and whether they are complete."""

    reward: np.ndarray
    tokens: np.ndarray
    complete: np.ndarray


def rankings(place: Path, which: str, by: str) -> dict[str, Ranking]:
    """uuid -> the ranking by the current or the previous model, its rewards per token ("mean", as the recipes have
    them) or summed over the response ("sum", the released code's DPO reward; M0's likelihood is a mean there as well).
    """
    path, found = place.with_name(f"{place.name}.rewards.{which}.json"), {}
    summed = by == "sum" and read_json(meta_path(path))["settings"]["reward"] == "dpo"
    for row in read(path, Rewards):
        tokens = np.array(row.num_tokens)
        reward = np.array(row.reward) * (tokens if summed else 1)
        found[row.uuid] = Ranking(reward, tokens, np.array(row.finish_reason) == "stop")
    return found


def agreement(place: Path, by: str, complete: bool = False) -> dict[str, float]:
    """uuid -> C of the two rankings, of complete responses only if asked; none where a ranking is constant."""
    current, previous = (rankings(place, which, by) for which in ("current", "previous"))
    found = {}
    for uuid, row in current.items():
        kept = row.complete if complete else np.ones_like(row.complete)
        if kept.sum() > 1:
            (value,), _ = consistency([row.reward[kept]], [previous[uuid].reward[kept]])
            if not np.isnan(value):
                found[uuid] = float(value)
    return found


def labelled() -> dict[str, tuple[str, Item]]:
    """uuid -> (its source, the question with its label), of training questions."""
    return {
        item.uuid: (title, item)
        for source, title in SOURCES.items()
        for item in read(DATA / source / "train.json", Item)
    }


def consistencies() -> None:
    known, rows = labelled(), []
    for name, place in ROUNDS.items():
        for by in BY:
            groups: dict[str, list[float]] = {}
            for uuid, value in agreement(place, by).items():
                for group in ("all", known[uuid][0] if uuid in known else "OASST"):
                    groups.setdefault(group, []).append(value)
            for group in ("all", "OASST", *SOURCES.values()) if by == "mean" else ("all",):
                c = np.array(groups[group])
                shares = [f"{100 * share:.0f}" for share in ((c < 0.5).mean(), (c > 0.7).mean())]
                rows.append([name, by, group, len(c), mean(c), f"{c.std(ddof=1):.2f}", *shares])
    head = ["round", "reward per response", "prompts", "n", "mean C", "standard deviation", "C < 1/2, %", "C > 0.7, %"]
    table(head, rows)


# Labels ---------------------------------------------------------------------------------------------------------------


def labels() -> None:
    known, rows = labelled(), []
    for name, place in PAIRS.items():
        outcomes: dict[str, list[tuple[bool, bool]]] = {}
        for pair in read(place.with_name(f"{place.name}.pairs.json"), Pair):
            if pair.uuid in known:
                source, item = known[pair.uuid]
                both = (pair.selected[-1].content, pair.rejected[-1].content)
                graded = tuple(grade_item(item.question, item.label, text)[1] for text in both)
                for group in ("all", "GSM8K" if source == "GSM8K" else "multiple choice"):
                    outcomes.setdefault(group, []).append(graded)
        for group, graded in sorted(outcomes.items()):
            chosen, rejected = (sum(each) for each in zip(*graded, strict=True))
            apart = [a for a, b in graded if a != b]
            decided = percent(sum(apart), len(apart)) if apart else "none"
            rows.append([name, group, *(percent(k, len(graded)) for k in (chosen, rejected)), len(apart), decided])
    head = ["round", "prompts", "chosen right, %", "rejected right, %", "pairs with one right"]
    table([*head, "of these the chosen, %"], rows)


# Lengths and truncation -----------------------------------------------------------------------------------------------


def correlation(x: np.ndarray, y: np.ndarray) -> str:
    """Pearson's r with Fisher's interval."""
    r = float(np.corrcoef(x, y)[0, 1])
    low, high = np.tanh(np.arctanh(r) + np.array([-1.96, 1.96]) / sqrt(len(x) - 3))
    return f"{r:+.2f} [{low:+.2f}, {high:+.2f}]"


def lengths() -> None:
    rows = []
    for name, place in ROUNDS.items():
        for which, by in product(("current", "previous"), BY):
            found = rankings(place, which, by).values()
            x, y = (
                np.concatenate([each - each.mean() for each in column]) for column in list(zip(*found, strict=True))[:2]
            )
            apart = [row.tokens[row.reward.argmax()] - row.tokens[row.reward.argmin()] for row in found]
            rows.append([name, which, by, correlation(x, y), mean(apart, 1)])
    head = ["round", "ranking", "reward per response", "reward and length within a prompt, r"]
    table([*head, "tokens, best minus worst response"], rows)


def truncation() -> None:
    rows = []
    for (name, place), by in product(ROUNDS.items(), BY):
        current = rankings(place, "current", by).values()
        cut = [not complete for row in current for complete in row.complete]
        every, whole = agreement(place, by), agreement(place, by, complete=True)
        changed = [every[uuid] - value for uuid, value in whole.items() if uuid in every]
        mixed = [row for row in current if 0 < row.complete.sum() < len(row.complete)]
        gaps = [row.reward[~row.complete].mean() - row.reward[row.complete].mean() for row in mixed]
        means = [mean(list(each.values())) for each in (every, whole)]
        rows.append([name, by, percent(sum(cut), len(cut)), *means, mean(changed), mean(gaps)])
    head = ["round", "reward per response", "truncated, %", "mean C, all responses", "complete ones only"]
    table([*head, "difference on the same prompts", "reward, truncated minus complete, nats"], rows)


# Beta -----------------------------------------------------------------------------------------------------------------


def beta() -> None:
    """M2 by CREAM and by plain self-rewarding at other beta, from the pairs of round 1; all else as in the recipes."""
    rows = []
    for arm in ("cream", "srlm"):
        c = np.mean([pair.consistency for pair in read(OUT / arm / "round1.pairs.json", Pair)])
        recipe = read_loop(ROOT / f"configs/recipes/smollm2_{arm}.yaml").flags
        for value in (0.1, 1.0):
            folder = OUT / arm if value == 0.1 else OUT / f"{arm}_beta_{value:g}"
            if value != 0.1:
                same = {"model": "smollm2", "seed": 0}
                data = {"checkpoint": OUT / "M1/checkpoint-last", "name": OUT / arm / "round1.pairs.json"}
                own = recipe["train"] | {"beta": value, "output_dir": folder / "M2"}
                stage("train.py", train_stage="dpo", **same, **data, **own)
                own = recipe["accuracy.loglikelihood"] | {"checkpoint": folder / "M2/checkpoint-last"}
                target = folder / "M2.loglikelihood.evaluation.json"
                stage("infer.py", mode="evaluation", **same, **own, output_dir=target)
            log = [json.loads(line) for line in (folder / "M2/log.jsonl").read_text().splitlines()]
            cap = "none" if arm == "srlm" else f"{float(margin_cap(c, value)):.2f}"
            macro = read_json(folder / "M2.loglikelihood.evaluation.summary.json")["tasks"][-1]["accuracy"]
            difference = compare(join(answers(OUT / "M1", "loglikelihood"), answers(folder / "M2", "loglikelihood")))
            change = next(row for row in difference if row["task"] == "macro")
            low, high = (f"{100 * change[key]:+.1f}" for key in ("low", "high"))
            margin = log[-1]["margin"] / value  # a line of the log is the mean since the one before
            steps = f"{log[-2]['step'] + 1} to {log[-1]['step']}"
            cells = [f"{margin:.2f}", f"{100 * macro:.1f}", f"{100 * change['difference']:+.1f} [{low}, {high}]"]
            rows.append(["CREAM" if arm == "cream" else "SRLM", f"{value:g}", cap, *cells])
    head = ["method", "beta", "cap of the margin, nats", f"mean margin of steps {steps}, nats", "accuracy of M2, %"]
    table([*head, "M2 - M1, points"], rows)


# Perplexity -----------------------------------------------------------------------------------------------------------


def perplexity() -> None:
    """Of windows of 512 tokens, each scored from its second token on."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, shared = ROOT / "assets/smollm2", ROOT.parent / "shared/data"
    solutions = [json.loads(line) for line in (shared / "eval/gsm8k_test.jsonl").read_text().splitlines()[:60]]
    threads = list(read(shared / "sft/oasst1.sft.json", Conversation))
    texts = {
        "TinyStories": (shared / "models/tinystories_sample.txt").read_text(),
        "GSM8K, questions and solutions": "\n\n".join(f"{row['question']}\n{row['answer']}" for row in solutions),
        "OASST, best responses": "\n\n".join(row.messages[-1].content for row in threads),
    }
    ruled, plain = (AutoTokenizer.from_pretrained(folder) for _ in range(2))
    plain.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    models = {
        dtype: AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        for dtype in (torch.float32, torch.bfloat16)
    }

    @torch.no_grad()
    def nats(model, tokenizer, text: str) -> tuple[float, int]:
        ids, total, count = torch.tensor(tokenizer(text, verbose=False)["input_ids"][:20_000]), 0.0, 0
        for window in ids.split(512):
            logprobs = model(window[None]).logits[0, :-1].float().log_softmax(-1)
            total -= logprobs.gather(1, window[1:, None]).sum().item()
            count += len(window) - 1
        return total, count

    rows = []
    for name, text in texts.items():
        text = text[:60_000]
        by = [nats(models[torch.float32], ruled, text), nats(models[torch.bfloat16], ruled, text)]
        other = nats(models[torch.float32], plain, text)
        size = len(text.encode())
        cells = [f"{np.exp(total / count):.3f}" for total, count in by]
        rows.append([name, by[0][1], *cells, *(f"{total / size:.4f}" for total, _ in (by[0], other))])
    head = ["text", "tokens", "perplexity, float32", "bfloat16", "nats per byte, float32", "without the digits rule"]
    table(head, rows)


PARTS = {"accuracy": accuracy, "consistency": consistencies, "labels": labels, "length": lengths}
PARTS |= {"truncation": truncation, "beta": beta, "perplexity": perplexity}

if __name__ == "__main__":
    main()
