"""The study of reward models behind docs/results.md: what they learn in tiny worlds, and what their choice is worth.

    python benchmarks/reward_study.py --seeds 0             # development: settings are chosen here
    python benchmarks/reward_study.py --seeds 400-404       # the study: fresh worlds, run once

A world has M1, its six samples to each of 1200 problems, of which reward models learn by gold labels, and its eight
samples to each of 450 other problems, on which they are measured. Intervals are Student's, over worlds. Run again, the
study resumes. The stages are the ones that users run.

learning  accuracy of held-out pairs by the number of pairs trained on; beside it what nobody trained
best_of   the accuracy of the best of N by each reward, and of votes that are weighed by it
length    Bradley-Terry and ODIN where annotators prefer long responses
"""

import importlib
import random
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from statistics import fmean

from msgspec import structs
from options import Options
from workload import ROOT

from cream.cli.flags import as_words
from cream.evaluation.rewards.accuracy import right
from cream.evaluation.rewards.measure import How, summarise
from cream.evaluation.rewards.rows import Row, collect, gold_file
from cream.evaluation.statistics import paired_difference
from cream.files.store import read, write, write_json
from cream.records import Item, Message, Pair, Prompt, Rewards, Samples, encode
from cream.tiny.problems import problem_sets, uuid, write_world

SIZES = (30, 100, 300, 1000)  # pairs that a Bradley-Terry model is trained on
EPOCHS = {30: 6, 100: 6, 300: 6, 1000: 2}
RESPONSES = 2000  # labelled responses that the process and outcome models are trained on, as many as in 1000 pairs
COMPARED = 100  # problems that the pairwise model is measured on: it compares each two of their responses
FIT = {"lr": 1e-3, "train_bsz": 32, "save_eval_step_ratio": 1}
SAMPLING = {"mode": "sampling", "gen_temperature": 1.0, "top_p": 1.0, "gen_max_tokens": 64, "show_example": False}
AGGREGATES = ("mean", "min", "prod", "last")
LEARNT, MEASURED = "judge", "val"  # the world's sets of problems
OPENING, MOST_OPENINGS = "Listen. ", 4  # what makes a response longer and no better
PREFER_LONG = 0.5  # share of the pairs in which the annotator takes the longer response
KINDS = {  # of a pair: whether the right and the wrong response show their working
    (True, False): "working beats none",
    (True, True): "both with working",
    (False, False): "both without",
    (False, True): "none beats working",
}
DIFFERENCES = {  # part -> rows whose differences are shown
    "learning": [
        ("Bradley-Terry, 1000 pairs", "Bradley-Terry, 30 pairs"),
        ("Bradley-Terry, 1000 pairs", "pairwise, 1000 pairs"),
        ("Bradley-Terry, 1000 pairs", "length"),
        ("Bradley-Terry, 1000 pairs", "likelihood"),
    ],
    "best_of": [("Bradley-Terry", "length"), ("Bradley-Terry", "likelihood"), ("ORM", "PRM mean"), ("ORM", "majority")],
    "length": [("ODIN, misled", "Bradley-Terry, misled")],
}
Table = dict[str, dict[str, float]]  # row -> column -> number


def main() -> None:
    parser = Options(__doc__)
    parser.add("--seeds", "400-404", "worlds, first-last")
    parser.add("--base", ROOT / "assets/tiny_m0", "the base model's folder", type=Path)
    parser.add("--output", ROOT / "outputs/reward_study", "folder", type=Path)
    parser.add_parts(PARTS)
    args = parser.parse_args()
    first, _, last = args.seeds.partition("-")
    seeds, began, found = range(int(first), int(last or first) + 1), time.monotonic(), defaultdict(list)
    args.output.mkdir(parents=True, exist_ok=True)
    with open(args.output / "log", "a") as log:  # of all worlds: the stages log to where the first one did
        for part in args.parts:
            for seed in seeds:
                with redirect_stdout(log), redirect_stderr(log):
                    found[part].append(PARTS[part](World(args.output / f"seed{seed}", args.base, seed)))
                write_json(args.output / f"{part}-{args.seeds}.json", found[part])
                print(f"{part}, world {seed}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
            print(f"\n## {part}\n\n{report(found[part], DIFFERENCES[part])}", flush=True)


class World:
    """One world's files and models; what is missing is made."""

    def __init__(self, folder: Path, base: Path, seed: int):
        self.folder, self.base, self.seed = folder, base, seed
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "labels.json").exists():
            write_world(folder / "world", seed)
            self._write_problems()
        self.gold = gold_file(folder / "labels.json", skip=False)

    def _write_problems(self) -> None:
        items = []
        for name in (LEARNT, MEASURED):
            problems = [(uuid(p, name, i), p) for i, p in enumerate(problem_sets(self.seed)[name])]
            prompts = (Prompt(uuid=own, messages=[Message("user", p.question)]) for own, p in problems)
            write(self.folder / f"{name}.prompts.json", prompts)
            items += [Item(uuid=own, question=p.question, label=p.answer_label, task=p.task) for own, p in problems]
        write_json(self.folder / "labels.json", [encode(item) for item in items])

    def stage(self, script: str, *words: object, **flags: object) -> None:
        """Run a stage in this process."""
        argv = [*map(str, words), *(word for name, value in flags.items() for word in as_words(name, value))]
        try:
            importlib.import_module(script).main(argv)
        except SystemExit as stop:
            raise RuntimeError(f"{script}: exit code {stop.code}; see the log in {self.folder.parent}") from None

    def train(self, name: str, stage: str, data: Path, start: Path | None, **flags: object) -> Path:
        """The checkpoint of a training run, on one CPU."""
        run, shown = self.folder / name, {} if start is None else {"checkpoint": start}
        flags = {"model": self.base, "train_stage": stage, "name": data, "output_dir": run, "seed": self.seed} | flags
        self.stage("train", device="cpu", **shown, **FIT | flags)
        return run / "checkpoint-last"

    @cached_property
    def m1(self) -> Path:
        """The policy, as in the other studies."""
        return self.train("M1", "sft", self.folder / "world/sft.json", None, epoch=2, lr=4e-5)

    def samples(self, name: str, n: int) -> Path:
        """M1's n responses to each problem of a set."""
        target, prompts = self.folder / f"{name}.json", self.folder / f"{name}.prompts.json"
        shared = {"device": "cpu", "model": self.base, "checkpoint": self.m1, "seed": self.seed}
        self.stage("infer", name=prompts, gen_n=n, output_dir=target, **shared, **SAMPLING)
        return target

    @cached_property
    def measured(self) -> Path:
        """The samples that rewards are measured on."""
        return self.samples(MEASURED, 8)

    @cached_property
    def labelled(self) -> Path:
        """The samples to learn from, with gold labels as rewards."""
        target, labels = self.folder / "labelled.json", self.folder / "labels.json"
        self.stage("rewarding", input_file=self.samples(LEARNT, 6), reward="labels", labels=labels, output=target)
        return target

    @cached_property
    def pairs(self) -> Path:
        """A right and a wrong response to each problem that has both."""
        target = self.folder / "pairs.json"
        self.stage("make_pairs", strategy="all_pairs", rewards=self.labelled, max_pairs_per_prompt=1, output=target)
        return target

    def bradley_terry(self, pairs: int) -> Path:
        """A reward model trained on so many pairs."""
        flags = {"epoch": EPOCHS[pairs], "limit_size": pairs}
        return self.train(f"bradley_terry_{pairs}", "bradley_terry", self.pairs, self.m1, **flags)

    def signing(self, stage: str) -> Path:
        """A process or outcome reward model (prm, orm)."""
        steps = self.folder / "steps.json"
        split = {"step_split": "sentences", "step_labeller": "tiny"}
        self.stage("prepare_data", "steps", self.labelled, output=steps, **split)
        return self.train(stage, stage, steps, self.m1, epoch=2, limit_size=RESPONSES)

    def pairwise(self) -> Path:
        """A pairwise preference model."""
        data = self.folder / "pairwise.sft.json"
        self.stage("prepare_data", "pairwise", self.pairs, orders="both", output=data)
        return self.train("pairwise", "sft", data, self.m1, epoch=2, limit_size=RESPONSES)

    def rows(self, name: str, samples: Path | None = None, **flags: object) -> list[Row]:
        """Samples with their rewards by `rewarding.py --FLAGS`, and gold values."""
        samples = samples or self.measured
        target = samples.with_name(f"{samples.stem}.by_{name}.json")
        shared = {"input_file": samples, "output": target, "show_example": False}
        self.stage("rewarding", device="cpu", model=self.base, **shared, **flags)
        return collect(read(target, Rewards), None, self.gold, False)

    def rewards(self) -> Iterator[tuple[str, list[Row]]]:
        """What nobody trained: the policy's likelihood per token, its DPO reward, and length."""
        likelihood = self.rows("likelihood", reward="likelihood", checkpoint=self.m1)
        yield "likelihood", likelihood
        yield "DPO reward", self.rows("dpo", reward="dpo", checkpoint=self.m1, ref_model_ckpt="none")
        yield "length", by_length(likelihood)


def by_length(rows: Iterable[Row]) -> list[Row]:
    """The rows with the lengths as rewards."""
    return [replace(row, rewards=[float(n) for n in row.lengths]) for row in rows]


# Parts ----------------------------------------------------------------------------------------------------------------


def learning(world: World) -> Table:
    """Accuracy of all pairs of a right and a wrong response to one problem, in %; a tie is half right."""
    worked = {s.uuid: [not text.startswith("Answer") for text in s.responses] for s in read(world.measured, Samples)}
    found = {}
    for pairs in SIZES:
        model = world.bradley_terry(pairs)
        rows = world.rows(f"bradley_terry_{pairs}", reward="bradley_terry", reward_model=model)
        found[f"Bradley-Terry, {pairs} pairs"] = accuracies(rows, worked)
    flags = {"reward_model": world.pairwise(), "limit_size": COMPARED}
    rows = world.rows("pairwise", reward="pairwise", **flags)
    found["pairwise, 1000 pairs"] = accuracies(rows, worked)
    return found | {name: accuracies(rows, worked) for name, rows in world.rewards()}


def accuracies(rows: Iterable[Row], worked: dict[str, list[bool]]) -> dict[str, float]:
    """Accuracy of all pairs and of each kind, in %."""
    of = defaultdict(list)
    for row in rows:
        for i, j in row.pairs():
            kind = KINDS[worked[row.uuid][i], worked[row.uuid][j]]
            for name in ("all", kind):
                of[name].append(right(row.log_odds(i, j, 1), "half"))
    return {name: 100 * fmean(of[name]) for name in ("all", *KINDS.values())}


def best_of(world: World) -> Table:
    """Accuracy of the best of N, and of votes of 8 weighed by the reward, in %."""
    found = {}

    def add(name: str, rows: list[Row], votes: str = "softmax") -> list[dict]:
        by_n = summarise(rows, None, How(votes=votes))["best_of_n"]["by_n"]
        found[name] = {f"N = {own['n']}": 100 * own["best"]["value"] for own in by_n}
        found[name]["weighted vote of 8"] = 100 * by_n[-1][f"weighted_majority_{votes}"]["value"]
        return by_n

    model = world.bradley_terry(1000)
    add("Bradley-Terry", world.rows("bradley_terry_1000", reward="bradley_terry", reward_model=model))
    for how in AGGREGATES:
        flags = {"reward_model": world.signing("prm"), "step_split": "sentences", "prm_aggregate": how}
        add(f"PRM {how}", world.rows(f"prm_{how}", reward="prm", **flags), "reward")
    add("ORM", world.rows("orm", reward="orm", reward_model=world.signing("orm")), "reward")
    for name, rows in world.rewards():
        by_n = add(name, rows)
    for name in ("majority", "oracle"):
        found[name] = {f"N = {own['n']}": 100 * own[name]["value"] for own in by_n}
    return found


def length(world: World) -> Table:
    """Every response is opened by up to MOST_OPENINGS sentences that say nothing. Annotators take the longer response
    in PREFER_LONG of the pairs, else the right one; what counts in the end is what is right."""
    draw, opened = random.Random(world.seed), world.folder / "opened.json"
    samples = read(world.measured, Samples)
    write(
        opened,
        (Samples(uuid=s.uuid, prompt=s.prompt, responses=[lengthened(t, draw) for t in s.responses]) for s in samples),
    )
    found = {}
    for name, stage, misled in (
        ("Bradley-Terry, right labels", "bradley_terry", False),
        ("Bradley-Terry, misled", "bradley_terry", True),
        ("ODIN, misled", "odin", True),
    ):
        kind = "misled" if misled else "right"
        data = world.folder / f"pairs.{kind}.json"
        write(data, annotated(read(world.pairs, Pair), random.Random(world.seed), misled))
        model = world.train(f"{stage}_{kind}", stage, data, world.m1, epoch=EPOCHS[1000], limit_size=1000)
        rows = world.rows(f"{stage}_{kind}", opened, reward=stage, reward_model=model)
        found[name] = bias(rows)
    return found | {"length": bias(by_length(rows))}


def lengthened(text: str, draw: random.Random) -> str:
    return OPENING * draw.randint(0, MOST_OPENINGS) + text


def annotated(pairs: Iterable[Pair], draw: random.Random, misled: bool) -> Iterator[Pair]:
    """The pairs with longer responses, and with the annotators' labels."""
    for pair in pairs:
        texts = [lengthened(side[-1].content, draw) for side in (pair.selected, pair.rejected)]
        by_length = draw.random() < PREFER_LONG
        if misled and by_length and len(texts[1]) > len(texts[0]):
            texts.reverse()
        selected, rejected = ([*pair.prompt, Message("assistant", text)] for text in texts)
        yield structs.replace(pair, selected=selected, rejected=rejected)


def bias(rows: list[Row]) -> dict[str, float]:
    """Accuracy in %, by which response is longer; the correlation of reward and length within prompts."""
    summary = summarise(rows, None, How(ties="half"))
    own, best = summary["length"], summary["best_of_n"]["by_n"][-1]
    return {
        "all pairs": 100 * summary["all"]["all"]["value"],
        "right one longer": 100 * own["accuracy_chosen_longer"]["value"],
        "right one shorter": 100 * own["accuracy_chosen_shorter"]["value"],
        "best of 8": 100 * best["best"]["value"],
        "its length / mean": best["length_of_best"]["value"],
        "correlation with length": own["pearson_within_prompt"]["value"],
    }


# Tables ---------------------------------------------------------------------------------------------------------------


def report(worlds: Sequence[Table], differences: Iterable[tuple[str, str]]) -> str:
    """Means over worlds with their 95 % intervals; then differences between rows, paired within worlds."""
    names = [*worlds[0]]
    columns = list(dict.fromkeys(column for name in names for column in worlds[0][name]))
    lines = [f"{len(worlds)} worlds", "", f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name in names:
        cells = (_cell([world[name].get(column) for world in worlds], column) for column in columns)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for a, b in differences:
        cells = (_cell([_minus(world[a].get(c), world[b].get(c)) for world in worlds], c, "+") for c in columns)
        lines.append(f"| {a} - {b} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _cell(values: list[float | None], column: str, sign: str = "") -> str:
    """Percentages with one digit, ratios and correlations with two; empty where a row has no such number."""
    if None in values:
        return ""
    form = f"{sign}.{2 if 'length' in column else 1}f"
    if len(values) == 1:
        return f"{values[0]:{form}}"
    mean, low, high = paired_difference(values, [0.0] * len(values))
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"


PARTS = {"learning": learning, "best_of": best_of, "length": length}

if __name__ == "__main__":
    main()
