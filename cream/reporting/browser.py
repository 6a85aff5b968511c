"""The browser of preferences: pairs with all responses to their prompts, both rankings, correctness, a judge's texts.

The page gets an index (numbers and the beginning of each prompt, by column), which is filtered and sorted at once, and
blocks of texts, which it unpacks when a prompt is shown or searched. assets/browser.js reads both.
"""

import gzip
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import NamedTuple

import msgspec

from cream.errors import UserError
from cream.evaluation.tasks import grade_record, questions_in
from cream.files import store
from cream.pairs.build import usable
from cream.pairs.choice import pair_uuid
from cream.pairs.match import MISSING, OTHER, matched
from cream.records import Item, Message, Pair, Rewards
from cream.reporting.page import ASSETS, Section

NAME = "preferences"
LIMIT = 20_000_000  # characters of the page that its data may take
BLOCK = 1 << 19  # characters of text in a block: a few milliseconds to unpack
SNIPPET = 120  # characters of a prompt in the list
MANY_TASKS, RARE = 50, 3  # filters are that many of the commonest tasks, each with so many rows
OTHER_TASK = "other"
TOKEN_LOG_RATIO = "token_log_ratio"  # a part of rewards: log π - log π_ref of each token of a response

Numbers = Sequence[float | None]


class Group(NamedTuple):
    """The preference pairs of one round: `rewards` by the current model and `previous` by the one before, of the same
    samples; `labels`: questions with the right answers, by uuid. `models`: what the two are called. `keep_truncated`:
    truncated responses were ranked, too."""

    title: str
    pairs: Path
    rewards: Path | None = None
    previous: Path | None = None
    labels: Path | None = None
    models: tuple[str, str] = ("current model", "previous model")
    keep_truncated: bool = False


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


def section(groups: Sequence[Group], limit: int = LIMIT) -> Section:
    """The section of these groups. `limit`: characters of the page that its data may take; where all prompts take more,
    blocks of them are skipped at equal distances, and the section says so.

    Raises UserError for a missing or malformed file, and where a pair's prompt is not in the file of its rewards.
    """
    skipped: Counter[str] = Counter()
    blocks = Blocks(limit)
    for number, group in enumerate(groups):
        for prompt in read(group, skipped):
            blocks.add(number, prompt)
    kept = blocks.finish()
    shown = sum(block.prompts for block in kept)
    index = {
        "groups": [{"title": each.title, "source": _relative(each.pairs), "models": each.models} for each in groups],
        "blocks": [block.prompts for block in kept],
        "rows": _joined(kept),
        "prompts": {"shown": shown, "all": blocks.prompts, "skipped": dict(skipped)},
    }
    data = {NAME + "-index": msgspec.json.encode(index)}
    data |= {f"{NAME}-{number}": block.texts for number, block in enumerate(kept)}
    html, script, style = (
        (ASSETS / f"browser.{suffix}").read_text(encoding="utf-8") for suffix in ("html", "js", "css")
    )
    return Section(NAME, "Preferences", html, data, script, style)


def _relative(path: Path) -> str:
    """A path as in the folder that the report is made in: a page that is published names no other."""
    inside = path.is_absolute() and path.is_relative_to(Path.cwd())
    return str(path.relative_to(Path.cwd()) if inside else path)


# Reading --------------------------------------------------------------------------------------------------------------


def read(group: Group, skipped: Counter[str]) -> Iterator[Prompt]:
    """The prompts of a group, those without a pair included; without rewards, each pair with its two responses.
    `skipped` counts prompts that are not in the previous ranking, by reason."""
    if group.rewards is None:
        yield from map(_bare, store.read(group.pairs, Pair))
        return
    pairs = {pair.uuid: _facts(pair) for pair in store.read(group.pairs, Pair)}
    labels = {}
    if group.labels is not None:
        labels = {item.uuid: item for item in store.read(group.labels, questions_in(group.labels))}
    previous = group.previous and store.read(group.previous, Rewards)
    current = store.read(group.rewards, Rewards)
    both = matched(current, previous, (MISSING, OTHER), lambda: None, skipped, str(group.previous))
    for record, other in both:
        own = list(_of(record.uuid, pairs))
        yield _prompt(record, other if group.previous else None, own, labels.get(record.uuid), group.keep_truncated)
    if pairs and not skipped:
        raise UserError(f"{group.pairs}: pair {next(iter(pairs))!r} is of no prompt in {group.rewards}")


def _of(uuid: str, pairs: dict[str, dict]) -> Iterator[dict]:
    """A prompt's pairs, which are removed from `pairs`."""
    for number in count(1):
        if (pair := pairs.pop(pair_uuid(uuid, number), None)) is None:
            return
        yield pair


def _facts(pair: Pair) -> dict:
    """What the index says of a pair; its responses as positions, or as texts where these are not known."""
    return {
        "uuid": pair.uuid,
        "c": _short(pair.consistency),
        "tau": _short(pair.tau),
        "margin": _short(pair.margin),
        "chosen": pair.selected[-1].content if pair.selected_index is None else pair.selected_index,
        "rejected": pair.rejected[-1].content if pair.rejected_index is None else pair.rejected_index,
    }


def _bare(pair: Pair) -> Prompt:
    """A pair whose other responses are not known."""
    facts = _facts(pair) | {"chosen": 0, "rejected": 1}
    texts = [pair.selected[-1].content, pair.rejected[-1].content]
    task = _task(pair.uuid.partition("#")[0], pair.extra, None)
    return Prompt(pair.uuid, pair.prompt, texts, [facts], task, _snippet(pair.source_prompt or pair.prompt))


def _prompt(
    record: Rewards, previous: Numbers | None, pairs: list[dict], item: Item | None, keep_truncated: bool
) -> Prompt:
    texts = record.responses()
    for pair in pairs:
        for side in ("chosen", "rejected"):
            pair[side] = _position(texts, pair[side])
    more = len(texts) - len(record.response)  # responses from elsewhere, which have no reward
    gold = [_correct(item, text) for text in texts] if item else record.extra.get("gold")
    pieces = record.extra.get("tokens")
    return Prompt(
        record.uuid,
        record.prompt,
        texts,
        pairs,
        _task(record.uuid, record.extra, item),
        _snippet(record.source_prompt or record.prompt),
        reward=[*map(_short, record.reward), *[None] * more],
        previous=[*map(_short, previous), *[None] * more] if previous else (),
        ranked=usable(record, previous or record.reward, keep_truncated, Counter()),
        gold=gold if _are_numbers(gold) and len(gold) >= len(record.response) else (),
        tokens=record.num_tokens or (),
        finish=record.finish_reason or (),
        reason=record.reason or (),
        texts=record.texts,
        parts={name: [_short(value) for value in values] for name, values in record.parts.items()},
        pieces=pieces if isinstance(pieces, list) and len(pieces) == len(record.response) else (),
    )


def _position(texts: list[str], response: int | str) -> int:
    """The position of a pair's response, which is appended where it is none of the prompt's."""
    if isinstance(response, int):
        return response
    if response not in texts:
        texts.append(response)
    return texts.index(response)


def _correct(item: Item, text: str) -> int | None:
    prediction, correct = grade_record(item, text)
    return None if prediction == "none" and not correct else int(correct)


def _are_numbers(values: object) -> bool:
    return isinstance(values, list) and all(each is None or type(each) in (int, float) for each in values)


def _task(uuid: str, extra: dict, item: Item | None) -> str:
    """The task that a record or its label names, else its uuid up to the number at its end (gsm8k-train-12)."""
    named = (item and item.task) or extra.get("task") or extra.get("subset")
    return named if isinstance(named, str) else uuid.rstrip("0123456789").rstrip("-_.") or OTHER_TASK


def _snippet(messages: Sequence[Message]) -> str:
    return " ".join(messages[-1].content[: 2 * SNIPPET].split())[:SNIPPET]


def _short(value: float | list | None) -> float | list | None:
    """Five significant digits: what is shown, in a third of the space."""
    if isinstance(value, list):
        return [_short(each) for each in value]
    return value if value is None else float(f"{value:.5g}")


# Blocks ---------------------------------------------------------------------------------------------------------------


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


SIDES, CORRECT = ("chosen", "rejected"), ("chosen_right", "rejected_right")
COLUMNS = ("uuid", "item", "group", "task", "snippet", "c", "tau", "margin", *SIDES, *CORRECT)


def _joined(blocks: Iterable[Block]) -> dict[str, list]:
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
