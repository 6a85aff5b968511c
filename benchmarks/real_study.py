"""The study on a real model behind docs/results.md: what CREAM's pieces do with SmolLM2-135M and real text.

    make real
    python prepare_data.py build all --from ../shared/data --task_limit 60 --output_dir localdata/small
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

Intervals are 95 %: Wilson's of a share, Student's of a mean, the bootstrap's of a mean accuracy over tasks and of a
difference between two; where fewer than five items differ that one is too narrow, and McNemar's p says more.
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
from workload import ROOT, SHARED, run

from cream.cli.flags import spell
from cream.cli.names import SMOLLM2
from cream.consistency import consistency, margin_cap
from cream.evaluation.compare import FEW, compare, join
from cream.evaluation.grade import grade_item
from cream.evaluation.statistics import bootstrap_difference, wilson_interval
from cream.files.provenance import meta_path
from cream.files.store import read, read_json
from cream.loops.reading import read_loop
from cream.records import Answer, Conversation, Item, Pair, Rewards

BY = ("mean", "sum")
RECIPES = {title: f"configs/recipes/smollm2_{title.lower()}.yaml" for title in ("CREAM", "SRLM")}
LOOPS = {title: read_loop(ROOT / path) for title, path in RECIPES.items()}
BASE, DATA = ROOT / LOOPS["CREAM"].base_dir, (ROOT / LOOPS["CREAM"].flags["sft"]["name"]).parent
OWN = {title: ROOT / loop.output_dir for title, loop in LOOPS.items()}
SOURCES = {"arc-easy": "ARC-Easy", "arc-challenge": "ARC-Challenge", "openbookqa": "OpenBookQA", "siqa": "SIQA"}
SOURCES |= {"gsm8k": "GSM8K"}
MODELS = {"M0": BASE / "M0", "M1": BASE / "M1"}
MODELS |= {f"{title} {m}": own / m for m in ("M2", "M3") for title, own in OWN.items()}
SECOND = {f"2, {title}": own / "round2" for title, own in OWN.items()}
ROUNDS, PAIRS = {"1, both": BASE / "round1"} | SECOND, {"1": OWN["CREAM"] / "round1"} | SECOND


def main() -> None:
    parser = Options(__doc__)
    parser.add_parts(PARTS)
    parts = parser.parse_args().parts
    stage("iterate.py", config=",".join(RECIPES.values()))
    for part in parts:
        print(f"\n## {part}\n", flush=True)
        PARTS[part]()


def stage(script: str, **flags) -> None:
    """Run a command as a user does; it does nothing where its output is up to date. Its log goes to stderr. Where it
    fails, it has said why, and its exit code is this one's."""
    words = [word for name, value in flags.items() for word in (f"--{name}", spell(value))]
    print("$ python", script, *words, file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, script, *words, "--device", "cpu"], cwd=ROOT, stdout=sys.stderr)
    if done.returncode:
        sys.exit(done.returncode)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    for row in (head, ["---"] * len(head), *rows):
        print("|", " | ".join(map(str, row)), "|")


def percent(successes: int, n: int) -> str:
    low, high = wilson_interval(successes, n)
    return f"{100 * successes / n:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def macro(rows: Sequence[dict]) -> str:
    """The mean of the tasks' accuracies, from the rows of a summary, with the bootstrap's interval: that of a
    difference to nothing right."""
    low, high = bootstrap_difference([(0, row["correct"], row["n"]) for row in rows[:-1]])
    return f"{100 * rows[-1]['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def change(base: Path, better: Path) -> list[str]:
    """Points by log-likelihood, mean over tasks, with their interval; items that only one of the two has right; p."""
    *_, mean_of_tasks, items = compare(join(answers(base, "loglikelihood"), answers(better, "loglikelihood")))
    difference, low, high = (f"{100 * mean_of_tasks[key]:+.1f}" for key in ("difference", "low", "high"))
    return [f"{difference} [{low}, {high}]", f"{items['only_b']} / {items['only_a']}", f"{items['p']:.3g}"]


CHANGE = ["points", "items that only the first / only the second has right", "McNemar's p"]


def mean(values: Sequence[float], digits: int = 2) -> str:
    """The mean with Student's interval."""
    values = np.asarray(values, dtype=float)
    half = float(t.ppf(0.975, len(values) - 1)) * values.std(ddof=1) / sqrt(len(values))
    centre = values.mean()
    return f"{centre:.{digits}f} [{centre - half:.{digits}f}, {centre + half:.{digits}f}]"


# Accuracy -------------------------------------------------------------------------------------------------------------


def answers(model: Path, kind: str) -> list[Answer]:
    return list(read(model.with_name(f"{model.name}.{kind}.evaluation.json"), Answer))


def summary(model: Path, kind: str) -> list[dict]:
    """A row per task, and the one of their mean."""
    return read_json(model.with_name(f"{model.name}.{kind}.evaluation.summary.json"))["tasks"]


def accuracy() -> None:
    for kind, what in (("loglikelihood", "by log-likelihood"), ("responses", "by greedy responses")):
        summaries = {name: summary(path, kind) for name, path in MODELS.items()}
        tasks = [row["task"] for row in summaries["M0"]]
        print(f"Accuracy {what}, %, n = {', '.join(str(row['n']) for row in summaries['M0'][:-1])}:\n")
        rows = []
        for name, own in summaries.items():
            rows.append([name, *(percent(row["correct"], row["n"]) for row in own[:-1]), macro(own)])
        table(["model", *tasks], rows)
        print()
    print("Differences by log-likelihood, points, mean over tasks (with fewer than", FEW, "items go by p):\n")
    compared = [("M1", "M0"), ("CREAM M2", "M1"), ("SRLM M2", "M1"), ("CREAM M3", "M1"), ("SRLM M3", "M1")]
    compared += [("CREAM M2", "SRLM M2"), ("CREAM M3", "SRLM M3")]
    rows = [[f"{better} - {base}", *change(MODELS[base], MODELS[better])] for better, base in compared]
    table(["difference", *CHANGE], rows)


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
    path, by_uuid = place.with_name(f"{place.name}.rewards.{which}.json"), {}
    summed = by == "sum" and read_json(meta_path(path))["settings"]["reward"] == "dpo"
    for row in read(path, Rewards):
        tokens = np.array(row.num_tokens)
        reward = np.array(row.reward) * (tokens if summed else 1)
        by_uuid[row.uuid] = Ranking(reward, tokens, np.array(row.finish_reason) == "stop")
    return by_uuid


def agreement(place: Path, by: str, complete: bool = False) -> dict[str, float]:
    """uuid -> C of the two rankings, of complete responses only if asked; none where a ranking is constant."""
    current, previous = (rankings(place, which, by) for which in ("current", "previous"))
    by_uuid = {}
    for uuid, row in current.items():
        ranked = row.complete if complete else np.ones_like(row.complete)
        if ranked.sum() > 1:
            (value,), _ = consistency([row.reward[ranked]], [previous[uuid].reward[ranked]])
            if not np.isnan(value):
                by_uuid[uuid] = float(value)
    return by_uuid


def labelled() -> dict[str, tuple[str, Item]]:
    """uuid -> (its source, the question with its label), of training questions."""
    return {
        item.uuid: (title, item)
        for source, title in SOURCES.items()
        if (DATA / source / "train.json").exists()
        for item in read(DATA / source / "train.json", Item)
    }


def consistencies() -> None:
    questions, rows = labelled(), []
    for name, place in ROUNDS.items():
        for by in BY:
            groups: dict[str, list[float]] = {}
            for uuid, value in agreement(place, by).items():
                for group in ("all", questions[uuid][0] if uuid in questions else "OASST"):
                    groups.setdefault(group, []).append(value)
            shown = ("all", "OASST", *SOURCES.values()) if by == "mean" else ("all",)
            for group in (group for group in shown if len(groups.get(group, ())) > 1):
                c = np.array(groups[group])
                shares = [f"{100 * share:.0f}" for share in ((c < 0.5).mean(), (c > 0.7).mean())]
                rows.append([name, by, group, len(c), mean(c), f"{c.std(ddof=1):.2f}", *shares])
    head = ["round", "reward per response", "prompts", "n", "mean C", "standard deviation", "C < 1/2, %", "C > 0.7, %"]
    table(head, rows)


# Labels ---------------------------------------------------------------------------------------------------------------


def labels() -> None:
    questions, rows = labelled(), []
    for name, place in PAIRS.items():
        outcomes: dict[str, list[tuple[bool, bool]]] = {}
        for pair in read(place.with_name(f"{place.name}.pairs.json"), Pair):
            if pair.uuid in questions:
                source, item = questions[pair.uuid]
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


def correlation(groups: Sequence[tuple[np.ndarray, np.ndarray]]) -> str:
    """Pearson's r within groups, that is of values minus their group's means, with Fisher's interval: of a partial
    correlation, the means of all groups but one being further variables (Fisher, Metron 3, 1924)."""
    x, y = (np.concatenate([each - each.mean() for each in column]) for column in zip(*groups, strict=True))
    r = float(np.corrcoef(x, y)[0, 1])
    low, high = np.tanh(np.arctanh(r) + np.array([-1.96, 1.96]) / sqrt(len(x) - (len(groups) - 1) - 3))
    return f"{r:+.2f} [{low:+.2f}, {high:+.2f}]"


def lengths() -> None:
    rows = []
    for name, place in ROUNDS.items():
        for which, by in product(("current", "previous"), BY):
            ranked = list(rankings(place, which, by).values())
            apart = [row.tokens[row.reward.argmax()] - row.tokens[row.reward.argmin()] for row in ranked]
            within = correlation([(row.reward, row.tokens) for row in ranked])
            rows.append([name, which, by, within, mean(apart, 1)])
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
    for title, loop in LOOPS.items():
        c = np.mean([pair.consistency for pair in read(OWN[title] / "round1.pairs.json", Pair)])
        usual = loop.flags["train"]["beta"]
        for value in (usual, 1.0):
            folder = OWN[title] if value == usual else BASE / f"{OWN[title].name}_beta_{value:g}"
            if value != usual:
                same = {"model": loop.model, "seed": loop.seed}
                data = {"checkpoint": BASE / "M1/checkpoint-last", "name": OWN[title] / "round1.pairs.json"}
                own = loop.flags["train"] | {"beta": value, "output_dir": folder / "M2"}
                stage("train.py", train_stage="dpo", **same, **data, **own)
                own = loop.flags["accuracy.loglikelihood"] | {"checkpoint": folder / "M2/checkpoint-last"}
                target = folder / "M2.loglikelihood.evaluation.json"
                stage("infer.py", mode="evaluation", **same, **own, output_dir=target)
            log = [json.loads(line) for line in (folder / "M2/log.jsonl").read_text().splitlines()]
            cap = "none" if title == "SRLM" else f"{float(margin_cap(c, value)):.2f}"
            margin = log[-1]["margin"] / value  # a line of the log is the mean since the one before
            steps = f"{log[-2]['step'] + 1} to {log[-1]['step']}"
            cells = [f"{margin:.2f}", macro(summary(folder / "M2", "loglikelihood"))]
            rows.append([title, f"{value:g}", cap, *cells, *change(BASE / "M1", folder / "M2")])
    head = ["method", "beta", "cap of the margin, nats", f"mean margin of steps {steps}, nats", "accuracy of M2, %"]
    print("Differences are M2 - M1:\n")
    table([*head, *CHANGE], rows)


# Perplexity -----------------------------------------------------------------------------------------------------------


def perplexity() -> None:
    """Of windows of 512 tokens, each scored from its second token on."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = ROOT / SMOLLM2
    solutions = [json.loads(line) for line in (SHARED / "eval/gsm8k_test.jsonl").read_text().splitlines()[:60]]
    threads = list(read(SHARED / "sft/oasst1.sft.json", Conversation))
    texts = {
        "TinyStories": (SHARED / "models/tinystories_sample.txt").read_text(),
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
    run(main)
