"""prepare_data.py import: any table -> a record file."""

import logging
import os
from collections import Counter, deque
from collections.abc import Mapping
from itertools import chain
from pathlib import Path

from cream.data.commands import Table, add_input, describe_dropped, is_needed, skips
from cream.errors import UserError
from cream.files import journal
from cream.records import Conversation, Item, Pair, Prompt, Samples, encode

log = logging.getLogger("cream")
NEXT = {  # the stage that takes an imported file
    Conversation: "train.py --train_stage sft",
    Pair: "train.py",
    Prompt: "infer.py --mode sampling",
    Item: "infer.py --mode evaluation",
    Samples: "rewarding.py --reward judge",
}


def import_table(word: str, flags: Table, folder: Path, run) -> None:
    """Write a record file in `folder` from any table, whose first good row decides the layout."""
    from cream.data import plain, preferences, reading, table
    from cream.data.columns import parse_columns, plan, without_header
    from cream.data.messages import Keys

    place, columns = reading.Place(word, flags.subset, flags.split), parse_columns(flags.columns or "")
    keys = Keys(frozenset(_words(flags.ignore_keys)), flags.thought_key)
    best = preferences.parse_best(flags.best) if flags.best else {}
    how = table.Reading(flags.first_answer, keys, best, flags.grader)
    cells = plain.Cells(_separator(flags.sep), header=not without_header(columns))
    if place.file and (flags.subset, flags.split) != (Table.subset, Table.split):
        raise UserError(f"{place}: --subset and --split are for hub ids and folders like them; this is one file")
    stem = Path(os.path.abspath(word)).name.partition(".")[0]
    with reading.open_rows(place, cells) as rows:
        head = next(iter(rows), {})
        kind, names = plan(columns, head, str(place))
        _check_flags(flags, names)
        _describe_columns(f"{place}: {len(rows)} rows", head, names, flags)
        rejected, dropped = [], Counter()
        results = table.records(rows, kind, names, stem, str(place), how)
        records = table.keep_good(results, rejected, dropped, run.skip)
        if (first := next(records, None)) is None:
            why = rejected[0]["reason"] if rejected else next(iter(dropped), "none")
            raise UserError(f"{place}: no row makes a record; the first: {why}")
        target = Path(flags.output or folder / f"{stem}.{table.WORDS[type(first)]}.json")
        provenance = run.provenance()
        add_input(provenance, "table", place, reading.digest(rows) if not place.file else "")
        settings = {"columns": flags.columns, "first_answer": flags.first_answer} | skips(run)
        more = {name: getattr(flags, name) for name in ("best", "thought_key", "ignore_keys", "sep", "grader")}
        settings |= {name: value for name, value in more.items() if value is not None}
        settings |= {} if place.file else {"table": place.path, "subset": flags.subset, "split": flags.split}
        output = journal.Output(target, settings, provenance, overwrite=run.overwrite)
        if is_needed(output, run):
            with output:
                output.reject(rejected)  # both are complete after the last record
                output.dropped = dropped
                count = output.finish(map(encode, chain([first], records)))
            log.info("%s: %d %s records", target, count, type(first).__name__)
            describe_dropped(dropped)
        elif output.up_to_date:
            deque(records, maxlen=0)  # an older version may have written rows that are refused now
    name = "--input_file" if isinstance(first, Samples) else "--name"
    log.info("next: python prepare_data.py validate %s\nthen: python %s %s %s", target, NEXT[type(first)], name, target)


def _words(text: str | None) -> list[str]:
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def _separator(text: str | None) -> str | None:
    sep = {"tab": "\t", "\\t": "\t"}.get(text, text)
    if sep is not None and len(sep) != 1:
        raise UserError(f"--sep {text}: expected one character, or tab")
    return sep


def _check_flags(flags: Table, names: Mapping[str, str]) -> None:
    """Raises UserError for a flag of import that the columns do not use."""
    if flags.best and "best" not in names:
        raise UserError("--best is the meaning of a column's values: name the column with --columns best=…")


def _describe_columns(what: str, head: Mapping, names: Mapping[str, str], flags: Table) -> None:
    """Log what each column becomes, and how the first row shows that the columns could be read otherwise."""
    from cream.data import layouts
    from cream.data.columns import copied, parts_of
    from cream.data.messages import is_transcript

    kept = [name for name in copied(head, names) if name not in parts_of(names)]
    used = ", ".join(f"{name}={column}" for name, column in names.items())
    log.info("%s; %s%s", what, used, f"; only copied: {', '.join(kept)}" if kept else "")
    texts = parts_of({name: names[name] for name in ("prompt", "chosen", "rejected") if name in names})
    if seen := [name for name in texts if is_transcript(head.get(name))]:
        log.info("  the turns in %s are those after Human: and Assistant:", ", ".join(seen))
    if not flags.columns and (known := layouts.flags_for(head)):
        log.info("  these are columns of %s; for pairs: %s", *known)
