"""The records of an evaluation's file graded again: by another extraction of answers, or another length of options."""

from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path

import msgspec

from cream.cli import names
from cream.cli.screen import say_result
from cream.errors import UserError
from cream.evaluation import choices, generation
from cream.evaluation.options import EvaluationFlags
from cream.evaluation.statistics import format_table, table_rows
from cream.files import store
from cream.files.journal import Output
from cream.records import Answer, encode
from cream.text.thoughts import ThoughtFlags


def rescore(
    input_file: str | None, flags: EvaluationFlags, thoughts: ThoughtFlags, output_dir: str | None, run
) -> None:
    """Write the records of --input_file graded again, and say what changed. `run`: the script's flags of that name.

    Raises UserError for a flag that does not apply to the file, for a record that cannot be graded unless these are to
    be skipped, and where no other is left.
    """
    if input_file is None:
        raise UserError("--mode rescore needs --input_file, the results of an evaluation")
    source, skip = Path(input_file), run.skip
    records = list(store.read(source, Answer, skip=skip))
    if not records:
        raise store.nothing_left(source, Answer, "record is left to grade")
    flag, grade = _rule(records, flags, thoughts, source)
    value = getattr(flags, flag)
    before, now, ungradable = _regrade(records, grade, source, skip)
    name = value if flags.grader == EvaluationFlags.grader else f"{value}-{flags.grader}"
    default = source.with_name(f"{source.name.partition('.json')[0]}.rescored-{name}.json")
    provenance = run.provenance()
    provenance.output("input_file", source)
    settings = {flag: value, "on_bad_record": run.on_bad_record}
    if flag == "extraction":
        settings |= {"grader": flags.grader, "thinking_tags": thoughts.thinking_tags}
    output = Output(names.choose_output(output_dir, default), settings, provenance, overwrite=run.overwrite)
    say_result(_report(before, now, f"{flag} {value}", names.short(input_file)))
    if output.up_to_date:
        say_result("%s is up to date (same settings and inputs); skipping", output.path)
    elif not run.dry_run:
        with output:
            if skip:
                output.reject(chain(store.rejected(source, Answer), ungradable))
            output.finish(map(encode, now))
    say_result("results: %s", output.path)


def _rule(
    records: list[Answer], flags: EvaluationFlags, thoughts: ThoughtFlags, source: Path
) -> tuple[str, Callable[[Answer], Answer]]:
    """The flag that says how these records are graded, and the rule."""
    compared = any(record.option_logprob for record in records)  # nothing to extract, but an option to choose again
    flag, unused = ("length_norm", ("extraction", "grader")) if compared else ("extraction", ("length_norm",))
    for name in unused:
        if getattr(flags, name) != getattr(EvaluationFlags, name):
            how = "compared options" if compared else "generated responses"
            raise UserError(f"--{name} {getattr(flags, name)}: {source} has {how}, to which it does not apply")
    if compared:
        return flag, partial(choices.choose_option, norm=flags.length_norm)
    return flag, partial(generation.regrade, rules=flags.rules(thoughts.tags))


def _regrade(
    records: list[Answer], grade: Callable[[Answer], Answer], source: Path, skip: bool
) -> tuple[list[Answer], list[Answer], list[dict]]:
    """The records that can be graded, the same graded again, and the others, as `store.rejected` has malformed ones."""
    before, now, bad = [], [], []
    for record in records:
        try:
            now.append(grade(record))
            before.append(record)
        except UserError as error:
            if not skip:
                raise UserError(f"{source}: record {record.uuid!r}: {error}. {store.SKIP}") from None
            text = msgspec.json.encode(encode(record)).decode()
            bad.append({"uuid": record.uuid, "where": str(source), "reason": str(error), "record": text})
    if not now:
        raise UserError(f"{source}: no record can be graded; {bad[0]['uuid']!r}: {bad[0]['reason']}")
    return before, now, bad


def _report(before: list[Answer], now: list[Answer], rule: str, task: str) -> str:
    """Old and new accuracies, and the first of the predictions that changed. `task` is that of records without one."""
    lines = []
    for title, records in (("before", before), (f"now, {rule}", now)):
        lines += [title, format_table(table_rows(records, task=task))]
    changed = generation.changes(before, now)
    lines += [f"{len(changed)} of {len(now)} predictions changed", *(f"  {line}" for line in changed[:20])]
    return "\n".join(lines)
