"""Preference pairs -> SFT data for a pairwise preference model: two responses in an order, and which is better.

As RLHFlow builds it (2405.07863): each pair once, in an order that is drawn. Departures from the released code: the
order is drawn by the seed and the pair's uuid, so that it is the same wherever the pair stands; dropped pairs are
counted; both orders can be had, and a third label, Same, for pairs of which neither response is better (RRM).
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import xxhash

from cream.cli.flags import flag
from cream.cli.screen import say_result
from cream.errors import UserError
from cream.files import journal, store
from cream.records import Conversation, Message, Pair, encode
from cream.text import pairwise
from cream.text.thoughts import final_text

log = logging.getLogger("cream")
EMPTY = "a response is empty"
EQUAL = "neither response is better (--with_same yes labels it Same)"
ALIKE = "both responses are equal"
UNFINISHED = "a response ends within its thought"


@dataclass
class PairwiseFlags:
    """Pairwise preference data (pairwise)"""

    orders: str = flag(
        "one",
        "pairwise: one, each pair in one order, drawn by --seed; both, in one and in the other",
        choices=("one", "both"),
    )
    with_same: bool = flag(
        False, "pairwise: a pair of which neither is better (`consistency` ½) gets the label Same; no: it is dropped"
    )


def chosen_first(uuid: str, seed: int) -> bool:
    """Whether a pair's chosen response is A; hashed, so that it does not depend on other pairs."""
    return xxhash.xxh3_64_intdigest(f"order {uuid}".encode(), seed) % 2 == 0


def examples(pair: Pair, flags: PairwiseFlags, seed: int) -> list[Conversation] | str:
    """The SFT records of a pair, or the reason why it has none."""
    texts = pair.ordered or (pair.selected[-1].content, pair.rejected[-1].content)
    better, worse = map(final_text, texts)
    if better is None or worse is None:
        return UNFINISHED
    if not better.strip() or not worse.strip():
        return EMPTY
    if better == worse:
        return ALIKE
    if (why := pairwise.refusal(pair.prompt)) or not pair.ordered and not flags.with_same:
        return why or EQUAL
    first = chosen_first(pair.uuid, seed)
    found = []
    for number, in_a in enumerate([first] if flags.orders == "one" else [first, not first], 1):
        label = pairwise.SAME if not pair.ordered else pairwise.A if in_a else pairwise.B
        request = pairwise.ask(pair.prompt, *((better, worse) if in_a else (worse, better)))
        uuid = pair.uuid if flags.orders == "one" else f"{pair.uuid}#{number}"
        found.append(Conversation(uuid=uuid, messages=[*request, Message("assistant", label)], extra=pair.extra))
    return found


def make(path: Path, flags: PairwiseFlags, output: Path, seed: int, run) -> None:
    """Write the training file. Raises UserError where `path` holds no pairs, or none that can be trained on."""
    store.refuse_other_kind("pairwise:", path, Pair, "which make_pairs.py and prepare_data.py import write")
    provenance = run.provenance()
    provenance.file("pairs", path)
    settings = {"orders": flags.orders, "with_same": flags.with_same, "seed": seed, "on_bad_record": run.on_bad_record}
    written = journal.Output(output, settings, provenance, overwrite=run.overwrite)
    if written.up_to_date:
        say_result("%s is up to date (same settings and inputs); skipping", output)
        return
    if run.dry_run:
        log.info("dry run: would write %s; nothing was written", output)
        return
    dropped, labels = Counter(), Counter()
    records = _records(store.read(path, Pair, skip=run.skip), flags, seed, dropped, labels)
    if (first := next(records, None)) is None:
        why = "; ".join(f"{number} pairs: {reason}" for reason, number in dropped.items())
        raise UserError(f"{path}: no pair is left to train on ({why or 'it has none'})")
    with written:
        if run.skip:
            written.reject(store.rejected(path, Pair))
        written.dropped = dropped  # complete after the last record
        form = {"pairwise": pairwise.describe_form(flags.with_same)}
        count = written.finish(map(encode, chain([first], records)), **form)
    say_result("%s: %d records, %s", output, count, ", ".join(f"{n} {label}" for label, n in sorted(labels.items())))
    for reason, number in dropped.items():
        log.info("  %d pairs dropped: %s", number, reason)
    log.info("next, train a model on it:\n  python train.py --train_stage sft --name %s", output)


def _records(
    pairs: Iterable[Pair], flags: PairwiseFlags, seed: int, dropped: Counter[str], labels: Counter[str]
) -> Iterator[Conversation]:
    for pair in pairs:
        found = examples(pair, flags, seed)
        if isinstance(found, str):
            dropped[found] += 1
            continue
        labels.update(record.messages[-1].content for record in found)
        yield from found
