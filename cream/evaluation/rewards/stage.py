"""What evaluate_reward.py does with a file of rewards: measure it, compare it with another, write the results."""

import logging
from collections.abc import Sequence
from pathlib import Path

from cream.cli.screen import say_result
from cream.errors import UserError
from cream.evaluation.rewards import measure as measures
from cream.evaluation.rewards import rows
from cream.evaluation.rewards.accuracy import Results, choose_benchmark
from cream.evaluation.rewards.measure import How
from cream.evaluation.rewards.report import format_comparison, format_summary
from cream.evaluation.rewards.rows import Row
from cream.files import store
from cream.files.journal import Output
from cream.records import Rewards, Samples

log = logging.getLogger("cream")


def find_benchmark(asked: str, samples: Sequence[Samples]) -> str | None:
    """The benchmark of samples; see `choose_benchmark`."""
    return choose_benchmark(asked, [rows.unrewarded(sample) for sample in samples])


def measure(path: Path, folder: Path, data, benchmark: str | None, flags, run, decide: dict) -> None:
    """Measure the rewards in `path`; write X.rows.jsonl and X.summary.json into `folder`, and print the table.

    data: the samples with gold (cream/data/benchmarks.py), or None; `flags`, `run`: the script's groups Measuring and
    Run, `decide`: those flags that decide the output. Raises UserError where rewards are missing or not finite.
    """
    provenance = run.provenance()
    found = _read(path, "--rewards", data, flags, run.skip)
    benchmark = benchmark if data else choose_benchmark(flags.benchmark, found)
    about = provenance.output("rewards", path)
    if data:
        data.add_to(provenance)
    if flags.gold:
        provenance.file("gold", flags.gold)
    how = How(flags.ties, flags.beta, flags.votes, flags.measure_seed)
    summary = measures.summarise(found, benchmark, how)
    summary["rewards"] = {"file": str(path)} | {key: about.get(key) for key in ("reward", "settings", "inputs")}
    if flags.against:
        other = Path(flags.against)
        provenance.output("against", other)
        summary["against"] = {"file": str(other), **_compare(found, other, data, benchmark, how, flags, run.skip)}
    stem = path.name.partition(".json")[0]
    target, beside = (folder / f"{stem}.{name}" for name in ("rows.jsonl", "summary.json"))
    output = Output(
        target, decide, provenance, overwrite=run.overwrite, beside=[beside], instead="another --output_dir"
    )
    log.info("A: %s\nB: %s\n" if flags.against else "%s\n", *filter(None, (path, flags.against)))
    say_result("%s", format_summary(summary))
    if flags.against:
        say_result("\n%s", format_comparison(summary["against"]))
    if run.dry_run:
        log.info("dry run: would write %s; nothing was written", target)
        return
    if output.up_to_date:
        say_result("\n%s is up to date (same settings and inputs)", target)
    else:
        results = Results.of(found, benchmark, flags.ties, flags.measure_seed)
        with output:
            each = zip(found, results.parts, results.wholes, strict=True)
            output.finish(measures.as_row(*one, flags.beta) for one in each)
    store.update_json(beside, summary)
    say_result("\nrows: %s\nsummary: %s", target, beside)


def _read(path: Path, flag: str, data, flags, skip: bool) -> list[Row]:
    store.refuse_other_kind(flag, path, Rewards, "which rewarding.py writes")
    gold = rows.gold_file(Path(flags.gold), skip) if flags.gold else rows.own_gold
    try:
        return rows.collect(store.read(path, Rewards, skip=skip), data and data.samples, gold, flags.length == "tokens")
    except UserError as error:
        raise UserError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None


def _compare(a: list[Row], path: Path, data, benchmark: str | None, how: How, flags, skip: bool) -> dict:
    """How the rewards in `path` differ from those of `a`, on the same prompts."""
    others = {row.uuid: row for row in _read(path, "--against", data, flags, skip)}
    if missing := [row.uuid for row in a if row.uuid not in others]:
        raise UserError(f"--against {path}: {len(missing)} of {len(a)} prompts are not in it, {missing[0]!r} is one")
    b = [others[row.uuid] for row in a]
    said = ("gold", "lengths") if flags.length == "characters" else ("gold",)  # tokens may be of two tokenizers
    if odd := [x.uuid for x, y in zip(a, b, strict=True) if any(getattr(x, n) != getattr(y, n) for n in said)]:
        raise UserError(f"--against {path}: record {odd[0]!r} is of other responses, or has other gold values, there")
    return measures.compare(a, b, benchmark, how)
