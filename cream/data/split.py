"""`prepare_data.py split`: preference pairs -> a seed with labels, a pool without, and pairs to measure on.

Training from few labels (SSRM, SER) sees the labels of the seed alone. The pool has each pair's responses as samples,
in an order that is drawn, so that their places say nothing; which one is better is only in `gold`, which no rule reads:
it says afterwards how many pseudo-labels are right. No prompt is in two parts.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import xxhash

from cream.cli import advice
from cream.cli.flags import flag
from cream.cli.screen import say_result
from cream.data.mix import why_dropped
from cream.data.next_stages import next_stages
from cream.errors import UserError
from cream.files import journal, store
from cream.records import Pair, Record, Samples, encode
from cream.text.held_out import held_out, prompt_key

log = logging.getLogger("cream")
ENDINGS = {"seed": "seed.dpo.json", "pool": "pool.samples.json", "held_out": "held_out.dpo.json"}


@dataclass
class SplitFlags:
    """Few labels (split)"""

    part: str | None = flag(
        None,
        "split: write this part alone, to --output; none: all, into --output_dir",
        choices=tuple(ENDINGS),
        decides=False,
    )
    seed_share: float = flag(
        0.15, "split: share of the prompts, of those that are not held out, that keep their labels", above=0, high=1
    )


def assign(prompts: set[int], seed_share: float, out: float, seed: int) -> dict[str, set[int]]:
    """The prompts of each part, by their hashes: `out` held out, a share below 1 or a number; of the others
    `seed_share`, at least one, to the seed. Raises UserError unless a prompt is left for the seed."""
    draw = xxhash.xxh32_intdigest(b"split", seed)  # not as training holds prompts out of a part
    held = held_out(prompts, out, draw) if out else set()
    rest = prompts - held
    count = max(1, round(seed_share * len(rest)))
    seeds = held_out(rest, count, draw) if count < len(rest) else rest
    return {"seed": seeds, "pool": rest - seeds, "held_out": held}


def unlabelled(pair: Pair, seed: int) -> Samples:
    """A pair's responses as samples, in an order that is drawn by the seed and the uuid; `gold` is 1 for the better one
    and 0 for the other, 0 for both if neither is better. Other keys of the pair may say it, and are not kept."""
    texts = pair.selected[-1].content, pair.rejected[-1].content
    better = pair.ordered and pair.ordered[0]
    both = zip(texts, (pair.selected_truncated, pair.rejected_truncated), strict=True)
    rows = [(text, "length" if cut else "stop", int(text == better)) for text, cut in both]
    if xxhash.xxh3_64_intdigest(f"pool {pair.uuid}".encode(), seed) % 2:
        rows.reverse()
    responses, ended, gold = map(list, zip(*rows, strict=True))
    return Samples(
        uuid=pair.uuid,
        prompt=pair.prompt,
        responses=responses,
        finish_reason=ended if "length" in ended else None,
        source_prompt=pair.source_prompt,
        extra={"gold": gold},
    )


def make(path: Path, flags: SplitFlags, out: float, seed: int, places: Mapping[str, Path], run) -> None:
    """Write the parts that have a place. Raises UserError where `path` holds no pairs, or a part has none of them."""
    store.refuse_other_kind("split:", path, Pair, "which make_pairs.py and prepare_data.py import write")
    outputs = {part: _output(path, part, place, flags, out, seed, run) for part, place in places.items()}
    if all(output.up_to_date for output in outputs.values()):
        say_result("%s: up to date (same settings and inputs); skipping", ", ".join(map(str, places.values())))
        return
    dropped, keys = Counter(), set()
    for pair in store.read(path, Pair, skip=run.skip):
        reason = why_dropped(pair)
        dropped.update([reason] if reason else ())
        keys.update(() if reason else (prompt_key(pair),))
    if not keys:
        raise UserError(f"{path}: no pair is left of it ({'; '.join(dropped) or 'it has none'})")
    parts = assign(keys, flags.seed_share, out, seed)
    if empty := [part for part in places if not parts[part]]:
        raise UserError(f"{path}: {len(keys)} prompts leave none for the part {empty[0]}; change the shares")
    for part, output in outputs.items():
        if run.dry_run:
            log.info("dry run: would write %s; nothing was written", output.path)
        elif not output.up_to_date:
            with output:
                output.dropped += dropped
                output.reject(store.rejected(path, Pair) if run.skip else ())
                records = map(encode, _records(path, part, parts[part], seed, run.skip))
                count = output.finish(records, part=part, prompts=len(parts[part]))
            say_result("%s: %d pairs of %d prompts", output.path, count, len(parts[part]))
    for reason, count in dropped.items():
        log.info("  %d skipped: %s", count, reason)
    if "seed" in places:
        advice.say("next: %s", next_stages(Pair, places["seed"], places.get("held_out"))[-1])


def _output(path: Path, part: str, place: Path, flags: SplitFlags, out: float, seed: int, run) -> journal.Output:
    provenance = run.provenance()
    provenance.file("pairs", path)
    settings = {"part": part, "held_out": out, "seed": seed, "on_bad_record": run.on_bad_record}
    settings |= {} if part == "held_out" else {"seed_share": flags.seed_share}
    return journal.Output(place, settings, provenance, overwrite=run.overwrite)


def _records(path: Path, part: str, prompts: set[int], seed: int, skip: bool) -> Iterator[Record]:
    for pair in store.read(path, Pair, skip=skip):
        if not why_dropped(pair) and prompt_key(pair) in prompts:
            yield unlabelled(pair, seed) if part == "pool" else pair
