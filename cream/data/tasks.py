"""Labelled questions, multiple choice and mathematics: what the sources differ in is their column map (table.py)."""

from collections.abc import Iterable, Mapping
from functools import partial

from cream.data import Parsed, Source, Split
from cream.data.columns import fields_of, parts_of
from cream.data.making import Reading, record
from cream.data.table import uuid_of
from cream.errors import UserError
from cream.records import Item


def read(rows: Iterable[dict], prefix: str, *, columns: Mapping[str, str], first: int | None) -> Parsed:
    """The items of a split. A row without an id gets <prefix>-<its number>, from 0000 on; `first`: see `letter`."""
    parsed = Parsed()
    for index, row in enumerate(rows):
        parsed.rows += 1
        fields = fields_of(row, columns)
        uuid = uuid_of(fields, f"{prefix}-{index:04d}")
        try:
            parsed.items.append(record(Item, uuid, fields, {}, Reading(first)))
        except (ValueError, UserError) as error:
            parsed.reject(index, uuid, str(error), row)
    return parsed


def _task(name: str, columns: Mapping[str, str], first: int | None = None, **about) -> Source:
    reader = partial(read, columns=columns, first=first)
    return Source(name=name, read=reader, columns=parts_of(columns), **about)


_arc = partial(
    _task,
    columns={"uuid": "id", "question": "question", "choices": "choices", "answer": "answerKey"},
    gives="grade-school science, 3 to 5 options",
    hub="allenai/ai2_arc",
    licence="CC BY-SA 4.0",
)
DECLARED = (
    _arc(
        "arc_easy",
        subset="ARC-Easy",
        names=("arc_easy", "ARC-E"),
        splits={"train": Split("train", 2251), "test": Split("test", 2376)},
    ),
    _arc(
        "arc_challenge",
        subset="ARC-Challenge",
        names=("arc_challenge", "ARC-C"),
        splits={"train": Split("train", 1119), "test": Split("test", 1172)},
    ),
    _task(
        "openbookqa",
        columns={"uuid": "id", "question": "question_stem", "choices": "choices", "answer": "answerKey"},
        gives="elementary science, 4 options",
        hub="allenai/openbookqa",
        subset="main",
        names=("openbookqa", "obqa"),
        splits={"train": Split("train", 4957), "test": Split("test", 500)},
        licence="Apache-2.0 (its repository; the hub states none)",
    ),
    _task(
        "siqa",
        columns={"uuid": "id", "question": "context+question", "choices": "answerA+answerB+answerC", "answer": "label"},
        first=1,
        gives="social situations, 3 options; the test is the public validation split",
        hub="lighteval/siqa",  # allenai/social_i_qa row for row, without its loading script
        names=("siqa", "social_i_qa", "social_iqa"),
        splits={"train": Split("train", 33410), "test": Split("validation", 1954, ("validation", "dev", "test"))},
        licence="none stated (Allen Institute for AI)",
    ),
    _task(
        "gsm8k",
        columns={"uuid": "id", "question": "question", "answer": "answer"},
        gives="grade-school mathematics, the answer a number, with worked solutions",
        hub="openai/gsm8k",
        subset="main",
        names=("gsm8k",),
        splits={"train": Split("train", 7473), "test": Split("test", 1319)},
        licence="MIT",
    ),
)
