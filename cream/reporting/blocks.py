"""Prompts with all that is known of their responses, packed into blocks that the browser of preferences unpacks."""

import gzip
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from cream.records import Message

BLOCK = 1 << 19  # characters of text in a block: a few milliseconds to unpack
MANY_TASKS, RARE = 50, 3  # filters are that many of the commonest tasks, each with so many rows
OTHER_TASK = "other"
SIDES, CORRECT = ("chosen", "rejected"), ("chosen_right", "rejected_right")
COLUMNS = ("uuid", "item", "group", "task", "snippet", "c", "tau", "margin", *SIDES, *CORRECT)

Numbers = Sequence[float | None]


@dataclass
class Prompt:
    """A prompt with its responses, and lists of numbers and texts about each; `pairs` of them; columns that are empty
    are not written."""

    uuid: str
    messages: Sequence[Message]
    responses: list[str]
    pairs: list[dict]
    task: str
    snippet: str
    reward: Numbers = ()
    previous: Numbers = ()
    ranked: Sequence[int] = ()  # responses that both rankings have
    gold: Numbers = ()
    tokens: Numbers = ()
    finish: Sequence[str] = ()
    reason: Sequence[str | None] = ()
    texts: dict[str, list[str | None]] = field(default_factory=dict)
    parts: dict[str, list] = field(default_factory=dict)
    pieces: Sequence[Sequence[str] | None] = ()  # the texts of a response's tokens


class Block(NamedTuple):
    """Some prompts in a row: their rows of the index by column, and their texts, compressed."""

    prompts: int
    rows: dict[str, list]
    texts: bytes

    @property
    def size(self) -> int:
        """Characters that it takes in the page, about: texts exactly, numbers at a third of their JSON."""
        return len(self.texts) * 4 // 3 + len(msgspec.json.encode(self.rows)) // 3


class Blocks:
    """Blocks as they are filled. At most four times the limit is held in memory: of more, every second block goes."""

    def __init__(self, limit: int):
        self.limit, self.prompts = limit, 0
        self._blocks: list[tuple[int, Block]] = []  # with its size
        self._size, self._number, self._step = 0, 0, 1
        self._start()

    def _start(self) -> None:
        self._strings: dict[str, int] = {}  # each text once
        self._columns: dict[str, list] = {}
        self._rows: list[dict] = []
        self._texts = self._prompts = 0

    def add(self, group: int, prompt: Prompt) -> None:
        gold = prompt.gold
        for pair in prompt.pairs or [{"uuid": prompt.uuid}]:
            golds = [gold[at] if (at := pair.get(side)) is not None and at < len(gold) else None for side in SIDES]
            sides = [value if value in (0, 1) else None for value in golds]
            place = {"item": self._prompts, "group": group, "task": prompt.task, "snippet": prompt.snippet}
            self._rows.append(dict.fromkeys(COLUMNS) | place | pair | dict(zip(CORRECT, sides, strict=True)))
        self._columns.setdefault("prompt", []).append(
            [part for turn in prompt.messages for part in (turn.role, self._string(turn.content))]
        )
        self._column("responses", [self._string(text) for text in prompt.responses])
        for name in ("reward", "previous", "ranked", "gold", "tokens", "finish"):
            self._column(name, getattr(prompt, name))
        self._column("reason", [self._string(text) for text in prompt.reason])
        self._column("texts", {name: [self._string(text) for text in each] for name, each in prompt.texts.items()})
        self._column("parts", prompt.parts)
        self._column("pieces", prompt.pieces)
        self._prompts += 1
        self.prompts += 1
        if self._texts >= BLOCK:
            self._close()

    def _string(self, text: str | None) -> int | None:
        if text is None:
            return None
        if text not in self._strings:
            self._texts += len(text)
        return self._strings.setdefault(text, len(self._strings))

    def _column(self, name: str, value: Sequence | dict) -> None:
        """Adds a prompt's value to a column, which begins where the first prompt has one."""
        if value or name in self._columns:
            column = self._columns.setdefault(name, [])
            column += [None] * (self._prompts - len(column))
            column.append(value or None)

    def _close(self) -> None:
        if not self._prompts:
            return
        if self._number % self._step == 0:
            texts = msgspec.json.encode({"strings": list(self._strings), **self._columns})
            rows = {name: [row[name] for row in self._rows] for name in COLUMNS}
            block = Block(self._prompts, rows, gzip.compress(texts, 6, mtime=0))
            self._blocks.append((block.size, block))
            self._size += block.size
            while self._size > 4 * self.limit and len(self._blocks) > 1:
                self._blocks, self._step = self._blocks[::2], 2 * self._step
                self._size = sum(size for size, _ in self._blocks)
        self._number += 1
        self._start()

    def finish(self) -> list[Block]:
        """The blocks that fit into the limit, at equal distances."""
        self._close()
        share = min(1.0, self.limit / max(1, self._size))
        return [block for at, (_, block) in enumerate(self._blocks) if int((at + 1) * share) > int(at * share)]


def joined(blocks: Iterable[Block]) -> dict[str, list]:
    """The rows of all blocks by column; `item` counts prompts over all of them, and task names are numbered."""
    rows: dict[str, list] = {name: [] for name in COLUMNS}
    before = 0
    for block in blocks:
        for name in COLUMNS:
            rows[name] += block.rows[name] if name != "item" else [before + item for item in block.rows[name]]
        before += block.prompts
    known = [task for task, number in Counter(rows["task"]).most_common(MANY_TASKS) if number >= RARE]
    tasks = sorted({task if task in known else OTHER_TASK for task in {*rows["task"]}})
    numbers = {task: number for number, task in enumerate(tasks)}
    return rows | {"task": [numbers.get(task, numbers.get(OTHER_TASK)) for task in rows["task"]], "tasks": tasks}
