"""Inspect outputs. PATH is a file, a checkpoint's folder, or a registered name.

lineage PATH  how an output or checkpoint was made: all its inputs, down to the raw data
verify PATH   hash all files of its lineage again; exit code 1 if one of them is not as recorded
compare A B   compare two evaluations of the same data: accuracy per task with confidence intervals, flipped items; A
              and B are their result files or folders, or two checkpoints, whose evaluations are looked for
judge FILE    how good a judge's rewards are: share parsed, scores, ties, agreement, effects of order and length; with
              --labels or --ranks also how far they agree with gold
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from config import CHECKPOINTS, DATASETS, Run, group
from cream.cli import console, names
from cream.cli.console import log
from cream.cli.flags import flag, parse
from cream.errors import UserError
from cream.evaluation import compare as comparison
from cream.evaluation.compare import CompareFlags
from cream.evaluation.find import choose_pair, evaluations_of
from cream.evaluation.tasks import questions_in
from cream.files import journal, lineage, store
from cream.records import Answer, Record, Rewards

EXAMPLE = """\
  python report.py lineage tiny_m2
  python report.py verify outputs/sampling.json
  python report.py compare tiny_m1 tiny_m2
  python report.py judge outputs/judged.json --ranks human.jsonl
  python report.py compare outputs/evaluation/tiny_m1-tiny_test outputs/evaluation/tiny_m2-tiny_test"""


@dataclass
class JudgeFlags:
    """judge"""

    labels: str | None = flag(
        None, "gold: a file of labelled questions, matched by uuid; a correct response is better than a wrong one"
    )
    ranks: str | None = flag(
        None, "gold: a file of records with a uuid and `ranks`, a number per response, the lowest is best"
    )

    def __post_init__(self):
        if self.labels and self.ranks:
            raise UserError("judge: --labels and --ranks are both gold; give one of them")


@dataclass
class ReportConfig:
    """report.py"""

    compare: CompareFlags = group(CompareFlags)
    judge: JudgeFlags = group(JudgeFlags)
    run: Run = group(Run)


@console.stage
def main(argv=None):
    words: list[str] = []
    config = parse(ReportConfig, argv, description=__doc__, example=EXAMPLE, files=False, words=words)
    command, *places = words or [""]
    if command == "compare" and len(places) == 2:
        found = [evaluations_of(place, _place(place)) for place in places]
        compare(config, *choose_pair(*found, tuple(places)))
    elif command == "judge" and len(places) == 1:
        judge(config, _place(places[0]))
    elif command not in ("lineage", "verify") or len(places) != 1:
        raise UserError("expected a command and its paths: lineage PATH, verify PATH, compare A B, or judge FILE")
    elif config != ReportConfig():
        raise UserError(f"{command} takes no flags; those of --help are for compare and judge")
    elif command == "lineage":
        log.info("%s", "\n".join(lineage.describe(_place(places[0]))))
    else:
        verify(_place(places[0]))


def _place(word: str) -> Path:
    """A path, or the path of a registered name."""
    registered = names.read_registry(DATASETS) | names.read_registry(CHECKPOINTS)
    if Path(word).exists() or word not in registered:
        return Path(word)
    return Path(os.path.relpath(names.in_root(registered[word])))


def verify(path: Path) -> None:
    """Print the state of each file of the chain; exit code 1 if one is not as recorded."""
    bad = 0
    for line, changed in lineage.verify(path):
        log.info("%s", line)
        bad += changed
    if bad:
        print(f"{bad} of these are not as recorded", file=sys.stderr)
        sys.exit(1)
    log.info("all files are as recorded")


def judge(config: ReportConfig, path: Path) -> None:
    """Print what a judge's rewards are worth."""
    from cream.evaluation import judges

    skip, flags = config.run.skip, config.judge
    store.refuse_other_kind("judge:", path, Rewards, "which rewarding.py writes")
    found = judges.collect(store.read(path, Rewards, skip=skip), texts=flags.labels is not None)
    gold = None
    if flags.ranks:
        gold = judges.gold_ranks(found, store.read(Path(flags.ranks), Record, skip=skip))
        if not any(value is not None for row in gold for value in row):
            raise UserError(f"--ranks {flags.ranks}: no record has `ranks`; docs/judges.md says what they are")
    elif flags.labels:
        items = store.read(Path(flags.labels), questions_in(Path(flags.labels)), skip=skip)
        gold = judges.gold_labels(found, {item.uuid: item for item in items})
    log.info("%s", "\n".join(judges.describe(found, gold, config.compare.seed)))


def compare(config: ReportConfig, a: Path, b: Path) -> None:
    """Print how two evaluations differ, and the first flipped items; write all of these to --output."""
    run, flags, provenance = config.run, config.compare, config.run.provenance()
    settings = [provenance.output(name, path).get("settings") for name, path in (("a", a), ("b", b))]
    for path in (a, b):
        store.refuse_other_kind("compare:", path, Answer, "which infer.py --mode evaluation writes")
    joined = comparison.join(*(store.read(path, Answer, skip=run.skip) for path in (a, b)))
    bad = [bad for path in (a, b) for bad in store.rejected(path, Answer)] if run.skip else []
    output = None
    if flags.output is not None:
        decides = {"seed": flags.seed, "on_bad_record": run.on_bad_record}
        output = journal.Output(Path(flags.output), decides, provenance, overwrite=run.overwrite)
    log.info("A: %s\nB: %s", a, b)
    if bad:
        log.info("%d malformed records are skipped, the first %s", len(bad), bad[0]["where"])
    for note in comparison.describe_settings(joined, *settings):
        log.info("%s", note)
    rows, flipped = comparison.compare(joined, flags.seed), joined.flipped()
    log.info("%s\n%s", comparison.format_comparison(rows), comparison.format_flips(flipped, flags.show))
    if output is None or run.dry_run:
        return
    if output.up_to_date:
        log.info("flipped items: %s is up to date (same settings and inputs); skipping", output.path)
        return
    with output:
        output.reject(bad)
        output.finish((comparison.flip_row(*item) for item in flipped), comparison=rows)
    log.info("flipped items: %s", output.path)


if __name__ == "__main__":
    main()
