"""A summary of a record file: records, duplicates, lengths, and everything that stages would refuse."""

from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import xxhash

from cream.evaluation.tasks import Question
from cream.files import store
from cream.files.fingerprints import fingerprint_file
from cream.files.provenance import read_meta
from cream.records import (
    Answer,
    Conversation,
    Item,
    Message,
    Pair,
    Prompt,
    Ratings,
    Record,
    Rewards,
    Samples,
    Steps,
    counted,
)
from cream.text.chat import Chat
from cream.text.rendering import Refused

SHOWN = 10  # bad records that are listed one by one


@dataclass
class Summary:
    """Counts over a file's good records; lengths are in tokens if there is a tokenizer, else in characters."""

    kind: type[Record]
    records: int = 0
    responses: int = 0
    notes: Counter[str] = field(default_factory=Counter)  # legal, and worth knowing
    first: dict[str, str] = field(default_factory=dict)  # the first record of some of these notes
    prompts: array = field(default_factory=lambda: array("Q"))  # lengths; of prompts, and with each response
    wholes: array = field(default_factory=lambda: array("Q"))
    bad: list[str] = field(default_factory=list)  # place and reason of the first SHOWN
    bad_count: int = 0

    def note(self, what: str, uuid: str, more: str = "", count: int = 1) -> None:
        """Count a note, and keep the first record that it is of."""
        self.notes[what] += count
        self.first.setdefault(what, f"record {uuid!r}{more}")

    def add_bad(self, line: str) -> None:
        """Count a bad record, and keep the first ones' lines."""
        self.bad_count += 1
        if len(self.bad) < SHOWN:
            self.bad.append(line)

    sidecar: str = "no sidecar: stages use it unverified"


def validate(path: Path, chat: Chat | None, limit: int) -> Summary:
    """Read a file as stages do, and count. `limit`: a stage's limit on tokens of prompt and response.

    Raises UserError if the file cannot be read at all, or has no known layout.
    """
    kind = store.detect(path, skip=True)
    summary = Summary(kind)
    kind = Question if kind is Item else kind
    seen = array("Q")
    for record in store.read(path, kind, skip=True):
        prompt, responses = _parts(record)
        summary.records += 1
        summary.responses += len(responses)
        seen.append(xxhash.xxh3_64_intdigest(msgspec.json.encode(prompt)))
        summary.notes.update(_notes(record, responses))
        if chat and (mark := chat.find_mark([m.content for m in prompt if m.role != "assistant"])):
            summary.note("prompts with a mark of the chat template in their text", record.uuid, f", {mark!r}")
        try:
            lengths = _lengths(record, prompt, responses, chat, limit, summary)
        except Refused as error:
            summary.add_bad(f"{path}: record {record.uuid!r}: {error}")
            continue
        for length in lengths:
            summary.notes["longer than --max_length"] += length > limit and chat is not None
    summary.notes["prompts that equal an earlier one"] = len(seen) - len(np.unique(np.asarray(seen)))
    for row in store.rejected(path, kind):
        summary.add_bad(f"{row['where']}: {row['reason']}")
    if (meta := read_meta(path)) is not None:
        same = meta["output"] == fingerprint_file(path) if "output" in meta else None
        summary.sidecar = {
            True: "matches its sidecar",
            False: "changed since it was made: stages refuse it",
            None: "its sidecar has no hash of it: stages use it unverified",
        }[same]
    return summary


def report(path: Path, summary: Summary, unit: str) -> Iterator[str]:
    """The lines to print."""
    counts = f"{counted(summary.records, summary.kind)}, {summary.responses} responses, {summary.bad_count} bad"
    yield f"{path}: {counts}"
    for what, lengths in (("prompts", summary.prompts), ("prompts with a response", summary.wholes)):
        if lengths:
            low, middle, high, most = np.percentile(np.asarray(lengths), (0, 50, 95, 100))
            yield f"  {what}: {low:.0f} to {most:.0f} {unit}, median {middle:.0f}, 95 % within {high:.0f}"
    for what, count in summary.notes.items():
        if count:
            yield f"  {count} {what}" + (f" (the first: {summary.first[what]})" if what in summary.first else "")
    yield f"  {summary.sidecar}"
    yield from (f"  bad: {line}" for line in summary.bad)
    if summary.bad_count > len(summary.bad):
        yield f"  … and {summary.bad_count - len(summary.bad)} more"


def _parts(record: Record) -> tuple[list[Message], list[str]]:
    """A record's prompt, and its responses."""
    match record:
        case Conversation() | Ratings():
            return record.messages[:-1], [record.messages[-1].content]
        case Prompt():
            return record.messages, []
        case Samples():
            return record.prompt, record.responses
        case Steps():
            return record.prompt, ["\n".join(record.steps)]
        case Rewards():
            return record.prompt, record.responses()
        case Pair():
            return record.prompt, [record.selected[-1].content, record.rejected[-1].content]
        case Answer():
            return [Message("user", record.question)], [record.responses]
        case Item():
            return [Message("user", record.question)], []
    raise TypeError(f"a layout that validate does not know: {type(record).__name__}")


def _notes(record: Record, responses: list[str]) -> dict[str, int]:
    return {
        "empty responses": sum(not response.strip() for response in responses),
        "responses that equal another to the same prompt": len(responses) - len({*responses}),
        "truncated responses": (getattr(record, "finish_reason", None) or []).count("length"),
        "responses without a reward": (getattr(record, "reward", None) or []).count(None),
        "steps without a label": (getattr(record, "labels", None) or []).count(None),
        "pairs without a consistency": isinstance(record, Pair) and record.consistency is None,
    }


def _lengths(
    record: Record, prompt: list[Message], responses: list[str], chat: Chat | None, limit: int, summary: Summary
) -> list[int]:
    """The lengths that a stage limits: of the prompt with each response, or of the prompt alone."""
    if chat is None:
        start = sum(len(message.content) for message in prompt)
        wholes = [start + len(response) for response in responses]
    else:
        if any(chat.exceeds([*prompt, Message("assistant", text)], limit) for text in responses or [""]):
            return [limit + 1]  # its length is not counted
        ids = chat.encode_prompt(prompt)
        start, found = len(ids), _rows(record, prompt, responses, chat, ids)
        wholes = [max(map(len, rows)) for rows in found if not isinstance(rows, str)]
        for rows in found:
            if isinstance(rows, str):
                summary.note(f"responses that training drops: {rows}", record.uuid)
            elif len(rows) > 1:
                summary.note(
                    "conversations that are trained on turn by turn, as the template rewrites turns", record.uuid
                )
    summary.prompts.append(start)
    summary.wholes.extend(wholes)
    return wholes or [start]


def _rows(record: Record, prompt: list[Message], responses: list[str], chat: Chat, ids: list[int]) -> list:
    """Per response its rows of tokens as training has them, or the reason why it has none."""
    if isinstance(record, Conversation):
        return [chat.encode_conversation(record.messages)]
    sampled = record.sampled if isinstance(record, Pair) else True
    rows = chat.encode_responses(prompt, responses, [True] * len(responses), ids, sampled=sampled)
    return [row if isinstance(row, str) else [row] for row in rows]
