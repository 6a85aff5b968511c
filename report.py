"""Inspect outputs. PATH is a file, a checkpoint's folder, or a registered name.

html RUN...   one page with accuracy, consistency, rewards, training and lineage; needs no network. A RUN is a loop or
              recipe file, or a folder; files and registered names are one run together, with all they were made from
watch RUN...  the same page, served on this machine alone and shown again whenever a stage ends
lineage PATH  how an output or checkpoint was made: all its inputs, down to the raw data
verify PATH   hash all files of its lineage again; exit code 1 if one of them is not as recorded
compare A B   compare two evaluations of the same data: accuracy per task with confidence intervals, flipped items; A
              and B are their result files or folders, or two checkpoints, whose evaluations are looked for
card PATH     README.md for a finished checkpoint: method, data and lineage, settings, evaluation with intervals,
              limits; --push_to_hub uploads it and the checkpoint
judge FILE    how good a judge's rewards are: share parsed, scores, ties, agreement, effects of order and length; with
              --labels or --ranks also how far they agree with gold
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from config import CHECKPOINTS, DATASETS, Run, group
from cream.cli import console, names
from cream.cli.flags import as_dict, flag, parse
from cream.cli.screen import say_result
from cream.errors import UserError, nearest
from cream.evaluation import compare as comparison
from cream.evaluation.compare import CompareFlags
from cream.evaluation.find import choose_pair, evaluations_of
from cream.evaluation.tasks import questions_in
from cream.files import journal, lineage, store
from cream.files.raw import did_you_mean
from cream.records import Answer, Record, Rewards

EXAMPLE = """\
  python report.py html configs/recipes/tiny_srlm.yaml configs/recipes/tiny_cream.yaml
  python report.py watch configs/recipes/tiny_cream.yaml
  python report.py lineage tiny_m2
  python report.py verify outputs/sampling.json
  python report.py compare tiny_m1 tiny_m2
  python report.py judge outputs/judged.json --ranks human.jsonl
  python report.py card tiny_m2 --push_to_hub me/tiny-m2 --dry_run
  python report.py compare outputs/evaluation/tiny_m1-tiny_test outputs/evaluation/tiny_m2-tiny_test"""


@dataclass
class Several:
    """Flags of several commands"""

    output: str | None = flag(
        None,
        "html: the page, none: report.html; card: none: README.md in the checkpoint's folder; compare: a file for all "
        "flipped items with both responses, .jsonl or .json",
        aliases=("o",),
    )
    labels: str | None = flag(
        None,
        "judge, html, watch: gold, a file of labelled questions, matched by uuid; html and watch also read labels.json "
        "next to the prompts",
    )
    seed: int = flag(0, "seed of the bootstrap intervals", low=0)


@dataclass
class HtmlFlags:
    """html and watch"""

    figures: str | None = flag(None, "folder for all figures as PNG and SVG; needs a Chromium or Chrome")
    markdown: str | None = flag(None, "file, .md, for a section of a model card with the main numbers")
    json: str | None = flag(None, "file, .json, for all numbers of the page")
    output_root: str | None = flag(None, "folder in front of all of a loop's folders, as in iterate.py")
    port: int = flag(0, "watch: port of the page; 0: a free one", low=0, high=65535)


@dataclass
class CardFlags:
    """card"""

    push_to_hub: str | None = flag(
        None,
        "upload the checkpoint and its card to this repository of the Hugging Face hub, OWNER/NAME; --dry_run lists "
        "the files and stops; none: nothing is uploaded",
    )
    private: bool = flag(True, "the repository is private; yes refuses one that is public already")
    license: str | None = flag(
        None, "licence as the hub names it, such as apache-2.0; none: the one in the base model's card, if any"
    )


@dataclass
class JudgeFlags:
    """judge"""

    ranks: str | None = flag(
        None, "gold: a file of records with a uuid and `ranks`, a number per response, the lowest is best"
    )


@dataclass
class ReportConfig:
    """report.py"""

    READS_FILES = False  # there is no --config

    several: Several = group(Several)
    html: HtmlFlags = group(HtmlFlags)
    compare: CompareFlags = group(CompareFlags)
    card: CardFlags = group(CardFlags)
    judge: JudgeFlags = group(JudgeFlags)
    run: Run = group(Run)

    def __post_init__(self):
        if self.several.labels and self.judge.ranks:
            raise UserError("judge: --labels and --ranks are both gold; give one of them")
        if not self.card.private and not self.card.push_to_hub:
            raise UserError("card: --private no is for --push_to_hub")


class Command(NamedTuple):
    """A command: what follows its name, how many words that are (0: any number above 0), the flags that it takes, and
    what it does."""

    words: str
    count: int
    flags: tuple[str, ...]
    run: Callable[[ReportConfig, list[str]], None]


@console.stage
def main(argv=None):
    words: list[str] = []
    config = parse(ReportConfig, argv, description=__doc__, example=EXAMPLE, words=words)
    name, *places = words or [""]
    command = COMMANDS.get(name)
    if command is None or len(places) != (command.count or max(1, len(places))):
        *most, last = (f"{each} {command.words}" for each, command in COMMANDS.items())
        near = nearest(name, COMMANDS) if name and command is None else ""
        raise UserError(f"expected a command and its paths: {', '.join(most)}, or {last}{near}")
    default = as_dict(ReportConfig())
    if foreign := [
        flag for flag, value in as_dict(config).items() if value != default[flag] and flag not in command.flags
    ]:
        own = f"takes {', '.join(f'--{flag}' for flag in command.flags)}" if command.flags else "takes no flags"
        raise UserError(f"{name} {own}; --{foreign[0]} is not for it")
    command.run(config, places)


def _registered() -> dict[str, str]:
    return names.read_registry(DATASETS) | names.read_registry(CHECKPOINTS)


def _named(word: str) -> Path:
    """A path, or the path of a registered name."""
    if Path(word).exists() or word not in _registered():
        return Path(word)
    return Path(os.path.relpath(names.in_root(_registered()[word])))


def _place(word: str) -> Path:
    """The same. Raises UserError where nothing is there."""
    place = _named(word)
    if not place.exists():
        near = did_you_mean(place, _registered())
        raise UserError(f"{word}: no such file or folder, nor a registered name{near}")
    return place


def html(config: ReportConfig, words: list[str]) -> None:
    """Write the page of runs, and what else was asked for."""
    from cream.reporting.report import Files, write_all

    flags = config.html
    files = Files(config.several.output or "report.html", flags.markdown, flags.json, flags.figures)
    write_all(files, find_runs(config, words), config.several.seed)


def watch(config: ReportConfig, words: list[str]) -> None:
    """Serve the page of runs until the process is interrupted."""
    from cream.reporting.report import serve_page

    serve_page(lambda: find_runs(config, words, started=False), config.several.seed, config.html.port)


def find_runs(config: ReportConfig, words: list[str], *, started: bool = True) -> list:
    """The runs that the words mean: a loop or folder each; all files together one. Raises UserError where there is
    nothing to report on; of a loop that has not `started` there may be nothing yet."""
    from cream.reporting import outputs

    gold, runs, files = [Path(config.several.labels)] if config.several.labels else [], [], {}
    for word in words:
        place = Path(word) if word.endswith((".yaml", ".yml")) else _place(word)
        if place.suffix in (".yaml", ".yml"):
            runs.append(_loop(place, config.html.output_root, gold))
            if started and not runs[-1].outputs:
                raise UserError(f"{place}: none of its outputs is there; run it: python iterate.py --config {place}")
        elif place.is_dir() and not (place / "config.json").exists():
            runs.append(outputs.of_places(place.name or str(place), [place], gold))
        else:
            files[word] = place
    return runs + ([outputs.of_places(", ".join(files), files.values(), gold)] if files else [])


def _loop(path: Path, output_root: str | None, gold: list[Path]):
    """The run of a loop file."""
    from cream.loops.course import Course
    from cream.loops.plan import plan
    from cream.loops.reading import read_loop
    from cream.reporting.outputs import of_loop
    from iterate import SCRIPTS, config_of

    configs = {script: config_of(script) for script in SCRIPTS}
    loop = read_loop(path, output_root=output_root)
    course = Course(loop, lambda loop, parents: plan(loop, configs, "cpu", parents=parents))
    if course.problems:
        raise UserError("\n".join([f"{path} is not a loop that could run:", *course.problems]))
    return of_loop(course, gold)


def describe_lineage(_: ReportConfig, words: list[str]) -> None:
    """Print how an output was made."""
    say_result("%s", "\n".join(lineage.describe(_place(words[0]))))


def verify(_: ReportConfig, words: list[str]) -> None:
    """Print the state of each file of the chain; exit code 1 if one is not as recorded."""
    bad = 0
    for line, changed in lineage.verify(_place(words[0])):
        say_result("%s", line)
        bad += changed
    if bad:
        print(f"{bad} of these are not as recorded", file=sys.stderr)
        sys.exit(1)
    say_result("all files are as recorded")


def card(config: ReportConfig, words: list[str]) -> None:
    """Write a checkpoint's model card, and upload both if asked to."""
    from cream.reporting import hub, model_card
    from cream.reporting.checkpoints import CARD, read_model

    flags, run = config.card, config.run
    if flags.push_to_hub:
        hub.check_repo(flags.push_to_hub)
    model = read_model(words[0], _place(words[0]), force=run.force)
    path = Path(config.several.output or model.folder / CARD)
    model_card.check_free(path, overwrite=run.overwrite)
    text = model_card.build(model, license=flags.license, repo=flags.push_to_hub, seed=config.several.seed)
    if flags.push_to_hub:
        files = hub.files_to_upload(model.folder, text, CARD)
        kind = "private" if flags.private else "public"
        say_result("to %s, %s, of %s:\n%s", flags.push_to_hub, kind, model.folder, "\n".join(hub.describe_files(files)))
        if not run.dry_run:
            message = f"{model.name}, by report.py card"
            say_result("uploaded: %s", hub.upload(flags.push_to_hub, files, private=flags.private, message=message))
    if not run.dry_run:
        model_card.write(path, text)
    say_result("model card: %s%s", path, " (dry run: not written)" if run.dry_run else "")


def judge(config: ReportConfig, words: list[str]) -> None:
    """Print what a judge's rewards are worth."""
    from cream.evaluation import judges

    skip, labels, ranks, path = config.run.skip, config.several.labels, config.judge.ranks, _place(words[0])
    store.refuse_other_kind("judge:", path, Rewards, "which rewarding.py writes")
    found = judges.collect(store.read(path, Rewards, skip=skip), texts=labels is not None)
    gold = None
    if ranks:
        gold = judges.gold_ranks(found, store.read(Path(ranks), Record, skip=skip))
        if not any(value is not None for row in gold for value in row):
            raise UserError(f"--ranks {ranks}: no record has `ranks`; docs/judges.md says what they are")
    elif labels:
        items = store.read(Path(labels), questions_in(Path(labels)), skip=skip)
        gold = judges.gold_labels(found, {item.uuid: item for item in items})
    say_result("%s", "\n".join(judges.describe(found, gold, config.several.seed)))


def compare(config: ReportConfig, words: list[str]) -> None:
    """Print how two evaluations differ, and the first flipped items; write all of these to --output."""
    known = _registered()
    a, b = choose_pair(*(evaluations_of(word, _named(word), known) for word in words), tuple(words))
    run, flags, provenance = config.run, config.several, config.run.provenance()
    settings = [provenance.output(name, path).get("settings") for name, path in (("a", a), ("b", b))]
    for path in (a, b):
        store.refuse_other_kind("compare:", path, Answer, "which infer.py --mode evaluation writes")
    joined = comparison.join(*(store.read(path, Answer, skip=run.skip) for path in (a, b)))
    bad = [bad for path in (a, b) for bad in store.rejected(path, Answer)] if run.skip else []
    output = None
    if flags.output is not None:
        decides = {"seed": flags.seed, "on_bad_record": run.on_bad_record}
        output = journal.Output(Path(flags.output), decides, provenance, overwrite=run.overwrite)
    say_result("A: %s\nB: %s", a, b)
    if bad:
        say_result("%d malformed records are skipped, the first %s", len(bad), bad[0]["where"])
    for note in comparison.describe_settings(joined, *settings):
        say_result("%s", note)
    rows, flipped = comparison.compare(joined, flags.seed), joined.flipped()
    say_result("%s\n%s", comparison.format_comparison(rows), comparison.format_flips(flipped, config.compare.show))
    if output is None or run.dry_run:
        return
    if output.up_to_date:
        say_result("flipped items: %s is up to date (same settings and inputs); skipping", output.path)
        return
    with output:
        output.reject(bad)
        output.finish((comparison.flip_row(*item) for item in flipped), comparison=rows)
    say_result("flipped items: %s", output.path)


RUN = ("overwrite", "force", "on_bad_record", "dry_run")
PAGE = ("labels", "seed", "output_root")
COMMANDS = {
    "html": Command("RUN...", 0, ("output", "figures", "markdown", "json", *PAGE), html),
    "watch": Command("RUN...", 0, ("port", *PAGE), watch),
    "lineage": Command("PATH", 1, (), describe_lineage),
    "verify": Command("PATH", 1, (), verify),
    "compare": Command("A B", 2, ("output", "seed", "show", *RUN), compare),
    "card": Command(
        "CHECKPOINT", 1, ("output", "push_to_hub", "private", "license", "seed", "overwrite", "force", "dry_run"), card
    ),
    "judge": Command("FILE", 1, ("labels", "ranks", "seed", *RUN), judge),
}

if __name__ == "__main__":
    main()
