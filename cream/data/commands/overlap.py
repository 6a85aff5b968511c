"""`prepare_data.py overlap`: the records of a file that share words with those of others, and the file without them."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cream.cli.screen import say_result
from cream.data.outputs import Output, is_needed, skips
from cream.files import journal, store
from cream.records import encode

log = logging.getLogger("cream")
WORDS = "FILE FILE …"
ABOUT = "records of the first file that share 13 words in a row with those of others, such as test questions"
SHOWN = 10  # overlapping records that are listed


@dataclass
class Options(Output):
    """Overlap"""


def run(words: Sequence[str], flags: Options, config) -> None:
    overlap([Path(config.file(word)) for word in words], flags.output, config.run)


def overlap(paths: Sequence[Path], target: str | None, run) -> None:
    """Say which prompts or questions of the first file share words with those of the others; with --output, write the
    first file without them."""
    from cream.text.overlap import CONTAMINATED, N, first_shared, grams, prompt_text, share

    path, *others = paths
    provenance = run.provenance()
    for name, each in zip(("file", *(f"other_{number}" for number, _ in enumerate(others, 1))), paths, strict=True):
        provenance.output(name, each)
    kinds = {each: store.detect(each, skip=run.skip) for each in paths}
    known, count = {}, 0  # gram -> the first record that has it
    for each in others:
        for record in store.read(each, kinds[each], skip=run.skip):
            count += 1
            known |= {gram: (each, record.uuid) for gram in grams(prompt_text(record)) if gram not in known}
    shared = {}  # uuid -> what it shares with whom
    total = 0
    for record in store.read(path, kinds[path], skip=run.skip):
        total += 1
        text = prompt_text(record)
        if found := first_shared(text, known):
            own, (file, uuid) = grams(text), known[found[0]]
            shared[record.uuid] = (
                f"{100 * share(own, known.keys()):3.0f} % of its runs, one with {uuid} of {file}: {found[1]}"
            )
    say_result("%s: %d of %d records share %d words in a row (shorter ones: all words) with one of %d records of %s",
             path, len(shared), total, N, count, ", ".join(map(str, others)))  # fmt: skip
    for uuid, what in [*shared.items()][:SHOWN]:
        log.info("  %s: %s", uuid, what)
    if len(shared) > SHOWN:
        log.info("  … and %d more", len(shared) - SHOWN)
    if target is None:
        log.info("to write the others: --output FILE" if shared else "they do not overlap")
        return
    output = journal.Output(Path(target), {"overlap": N} | skips(run), provenance, overwrite=run.overwrite)
    if is_needed(output, run):
        with output:
            output.reject(store.rejected(path, kinds[path]) if run.skip else ())
            output.dropped[CONTAMINATED] += len(shared)
            kept = (each for each in store.read(path, kinds[path], skip=run.skip) if each.uuid not in shared)
            say_result("%s: %d records", output.path, output.finish(map(encode, kept)))
