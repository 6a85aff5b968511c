"""`prepare_data.py import`: any table of messages, prompts and responses, pairs, ratings, steps or questions."""

import logging
import os
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from itertools import chain
from pathlib import Path

from cream.cli import advice
from cream.cli.flags import flag
from cream.cli.screen import say_result
from cream.data.next_stages import next_stages
from cream.data.outputs import Output, add_input, describe_dropped, is_needed, skips
from cream.data.preferences import HOW, Selection, parse_best
from cream.data.ratings import Scale, parse_ranges
from cream.data.steps import COLUMNS, FORMS, NEUTRAL, form_of
from cream.errors import UserError
from cream.files import journal
from cream.records import Pair, Ratings, Steps, counted, encode, nouns

log = logging.getLogger("cream")
FILTER = 1  # version of the validity filter, and of the keys that import gives a pair


@dataclass
class Table(Output):
    """Import"""

    columns: str | None = flag(
        None,
        "what each column is, field=column,…; a+b joins two columns, a.b is a key (or number) inside one, #1 the first "
        "column of a .csv file without a header; none: by their usual names",
    )
    best: str | None = flag(
        None, "meaning of the column that --columns names as best, value=N,…: response 1 or 2 is better, 0 a tie"
    )
    thought_key: str | None = flag(
        None, "key of messages with a response's thought, which is put into the response as <think>…</think>"
    )
    ignore_keys: str | None = flag(None, "keys of messages to drop, key,…; other unknown ones are refused")
    sep: str | None = flag(
        None, "character between the cells of a .csv file, or tab; none: a comma, in a .tsv file a tab"
    )
    subset: str | None = flag(None, "configuration of a data set on the hub, or in a folder with the hub's layout")
    split: str = flag("train", "split of such a data set")
    first_answer: int | None = flag(None, "number of the first option, if answers are numbers", choices=(0, 1))
    grader: str | None = flag(
        None,
        "math: answers may be formulas, which evaluation compares by math-verify; none: letters and numbers only",
        choices=("math",),
    )


@dataclass
class Preferences:
    """Import of preferences, ratings and steps"""

    pairs: str = flag(
        "extremes",
        "import: which pairs the scored responses to a prompt make: extremes, the best and the worst; best_random, the "
        "best and a worse one at random; all, every two that are not equally good",
        choices=HOW,
    )
    min_ratio: float | None = flag(
        None, "import: only pairs whose scores, both positive, have a ratio above this; none: all", low=1
    )
    max_pairs: int | None = flag(
        None, "import: at most this many pairs of a prompt, chosen by the seed; none: all", low=1
    )
    rating_prefix: str = flag("", "import: text before the name of each rating, such as helpsteer-")
    rating_range: str | None = flag(
        None,
        "import: LOW..HIGH of the ratings, which become 0 and 1, or one for each with commas; none: as they are",
    )
    neutral: str = flag("right", "import: what PRM800K's rating 0 says of a step", choices=NEUTRAL)
    step_separator: str = flag("\\n", "import: what separates the steps of a response that is one text")

    def selection(self, seed: int) -> Selection:
        return Selection(self.pairs, self.min_ratio, self.max_pairs, seed)


def import_table(word: str, flags: Table, choice: Preferences, seed: int, folder: Path, run) -> None:
    """Write a record file in `folder` from any table, whose first good row decides the layout."""
    from cream.data import plain, reading, table
    from cream.data.columns import parse_columns, plan, without_header

    place, columns = reading.Place(word, flags.subset, flags.split), parse_columns(flags.columns or "")
    cells = plain.Cells(_separator(flags.sep), header=not without_header(columns))
    if place.file and (flags.subset, flags.split) != (Table.subset, Table.split):
        raise UserError(f"{place}: --subset and --split are for hub ids and folders like them; this is one file")
    stem = Path(os.path.abspath(word)).name.partition(".")[0]
    with reading.open_rows(place, cells) as rows:
        head = next(iter(rows), {})
        form = None if columns else form_of(head)
        kind, names = (Steps, COLUMNS) if form else plan(columns, head, str(place))
        _check_flags(flags, choice, names, form, kind)
        _describe_columns(f"{place}: {len(rows)} rows{f' of {form}' if form else ''}", head, names, flags, form)
        rejected, dropped = [], Counter()
        results = table.records(rows, kind, names, stem, str(place), _how(flags, choice, seed, form))
        records = table.keep_good(results, rejected, dropped, run.skip)
        if choice.max_pairs is not None:
            records = iter(table.capped(records, choice.selection(seed), dropped))
        if (first := next(records, None)) is None:
            why = rejected[0]["reason"] if rejected else next(iter(dropped), "none")
            raise UserError(f"{place}: no row makes a record; the first: {why}")
        target = Path(flags.output or folder / f"{stem}.{table.WORDS[type(first)]}.json")
        provenance = run.provenance()
        add_input(provenance, "table", place, reading.digest(rows) if not place.file else "")
        settings = _settings(flags, choice, seed, place, run)
        settings |= {"pair_filter": FILTER} if isinstance(first, Pair) else {}
        output = journal.Output(target, settings, provenance, overwrite=run.overwrite)
        if is_needed(output, run):
            with output:
                output.reject(rejected)  # both are complete after the last record
                output.dropped = dropped
                count = output.finish(map(encode, chain([first], records)))
            say_result("%s: %s", target, counted(count, type(first)))
            describe_dropped(dropped)
        elif output.up_to_date:
            deque(records, maxlen=0)  # an older version may have written rows that are refused now
    advice.say("next: python prepare_data.py validate %s", target)
    for word, command in zip(("then", "or"), next_stages(type(first), target), strict=False):
        advice.say("%s: %s", word, command)


def _how(flags: Table, choice: Preferences, seed: int, form: str | None):
    """How the rows are read (cream/data/making.py)."""
    from cream.data.making import Reading
    from cream.data.messages import Keys

    take_apart = FORMS[form][1] if form else None
    return Reading(
        flags.first_answer,
        Keys(frozenset(_words(flags.ignore_keys)), flags.thought_key),
        parse_best(flags.best) if flags.best else {},
        flags.grader,
        choice.selection(seed),
        Scale(choice.rating_prefix, parse_ranges(choice.rating_range) if choice.rating_range else ()),
        choice.step_separator.replace("\\n", "\n"),
        partial(take_apart, neutral=NEUTRAL[choice.neutral]) if form == "PRM800K" else take_apart,
    )


def _settings(flags: Table, choice: Preferences, seed: int, place, run) -> dict:
    """The flags that decide the output; those that are at their defaults are not there, as in older files."""
    settings = {"columns": flags.columns, "first_answer": flags.first_answer} | skips(run)
    more = {name: getattr(flags, name) for name in ("best", "thought_key", "ignore_keys", "sep", "grader")}
    settings |= {name: value for name, value in more.items() if value is not None}
    names = [each.name for each in fields(Preferences)]
    settings |= {name: value for name in names if (value := getattr(choice, name)) != getattr(Preferences, name)}
    drawn = choice.pairs == "best_random" or choice.max_pairs is not None
    settings |= {"seed": seed} if drawn else {}
    return settings | ({} if place.file else {"table": place.path, "subset": flags.subset, "split": flags.split})


def _words(text: str | None) -> list[str]:
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def _separator(text: str | None) -> str | None:
    sep = {"tab": "\t", "\\t": "\t"}.get(text, text)
    if sep is not None and len(sep) != 1:
        raise UserError(f"--sep {text}: expected one character, or tab")
    return sep


def _check_flags(flags: Table, choice: Preferences, names: Mapping[str, str], form: str | None, kind: type) -> None:
    """Raises UserError for a flag of import that the columns do not use."""
    if flags.best and "best" not in names:
        raise UserError("--best is the meaning of a column's values: name the column with --columns best=…")
    scored = kind is Pair and bool(names.keys() & {"score", "rank"})
    used = {
        "pairs": (scored, "--columns score=… or rank=…"),
        "min_ratio": (kind is Pair and "score" in names, "--columns score=…"),
        "max_pairs": (kind is Pair, "pairs"),
        "rating_prefix": (kind is Ratings, "--columns ratings=…"),
        "rating_range": (kind is Ratings, "--columns ratings=…"),
        "neutral": (form == "PRM800K", "PRM800K"),
        "step_separator": (kind is Steps and not form, "--columns steps=…"),
    }
    for name, (is_used, needed) in used.items():
        if getattr(choice, name) != getattr(Preferences, name) and not is_used:
            raise UserError(f"--{name} is for {needed}, and would have no effect on these {nouns(kind)}")


def _describe_columns(
    what: str, head: Mapping, names: Mapping[str, str], flags: Table, form: str | None = None
) -> None:
    """Log what each column becomes, and how the first row shows that the columns could be read otherwise."""
    from cream.data import layouts
    from cream.data.columns import copied, parts_of
    from cream.data.messages import is_transcript

    if form:
        log.info("%s", what)
        return
    kept = [name for name in copied(head, names) if name not in parts_of(names)]
    used = ", ".join(f"{name}={column}" for name, column in names.items())
    log.info("%s; %s%s", what, used, f"; only copied: {', '.join(kept)}" if kept else "")
    texts = parts_of({name: names[name] for name in ("prompt", "chosen", "rejected") if name in names})
    if seen := [name for name in texts if is_transcript(head.get(name))]:
        log.info("  the turns in %s are those after Human: and Assistant:", ", ".join(seen))
    if not flags.columns and (known := layouts.flags_for(head)):
        log.info("  these are columns of %s; for pairs: %s", *known)
