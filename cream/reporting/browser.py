"""The browser of preferences: pairs with all responses to their prompts, both rankings, correctness, a judge's texts.

The page gets an index (numbers and the beginning of each prompt, by column), which is filtered and sorted at once, and
blocks of texts, which it unpacks when a prompt is shown or searched. assets/browser.js reads both.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import msgspec

from cream.errors import UserError
from cream.evaluation.tasks import grade_record
from cream.files import store
from cream.pairs.build import usable
from cream.pairs.choice import NUMBERED, pair_uuid
from cream.pairs.match import MISSING, OTHER, matched
from cream.records import Item, Message, Pair, Rewards
from cream.reporting.blocks import SIDES, Blocks, Numbers, Prompt, joined
from cream.reporting.outputs import Output, Run, read_labels, task_of
from cream.reporting.page import Section, asset
from cream.reporting.sections.consistency import ranking_name

NAME = "preferences"
LIMIT = 22_000_000  # characters of the page that its data may take
SNIPPET = 120  # characters of a prompt in the list
NO_LABELS: Mapping[str, Item] = MappingProxyType({})


class Group(NamedTuple):
    """The preference pairs of one round: `rewards` by the current model and `previous` by the one before, of the same
    samples. `models`: what the two are called. `keep_truncated`: truncated responses were ranked, too."""

    title: str
    pairs: Path
    rewards: Path | None = None
    previous: Path | None = None
    models: tuple[str, str] = ("current model", "previous model")
    keep_truncated: bool = False


def of_runs(runs: Sequence[Run]) -> Section | None:
    """The section of the pairs of these runs, each file of pairs once; None if they have no pairs. Raises as `section`
    does."""
    found: dict[Path, tuple[str, Output, Run]] = {}
    for run in runs:
        for output in run.of("pairs"):
            name = output.name.removesuffix(".pairs")
            title = name if len(runs) == 1 else f"{run.title}: {name}"
            found.setdefault(output.path.resolve(), (title, output, run))
    if not found:
        return None
    titles = Counter(title for title, _, _ in found.values())
    groups = []
    for title, output, run in found.values():
        folder = "" if titles[title] == 1 else f" ({_relative(output.path.parent)})"
        groups.append(_group(title + folder, output, run))
    return section(groups, read_labels(runs))


def _group(title: str, output: Output, run: Run) -> Group:
    """A file of pairs, with the rewards that they were made from as far as these are unchanged."""
    here = {each.about["output"]: each for each in run.of("rewards") if "output" in each.about}
    current, previous = (here.get(output.input(*names)) for names in (("file1", "rewards"), ("file2", "previous")))
    names = (ranking_name(each, run) if each else "" for each in (current, previous))
    paths = (each and each.path for each in (current, previous if current else None))
    return Group(title, output.path, *paths, tuple(names), bool(output.settings.get("keep_truncated")))


def section(groups: Sequence[Group], labels: Mapping[str, Item] = NO_LABELS, limit: int = LIMIT) -> Section:
    """The section of these groups. `labels`: questions with the right answers, by uuid. `limit`: characters of the page
    that its data may take; where all prompts take more, blocks of them are skipped at equal distances, and the section
    says so.

    Raises UserError for a missing or malformed file, and where a pair's prompt is not in the file of its rewards.
    """
    skipped: Counter[str] = Counter()
    blocks = Blocks(limit)
    for number, group in enumerate(groups):
        for prompt in read(group, labels, skipped):
            blocks.add(number, prompt)
    kept = blocks.finish()
    shown = sum(block.prompts for block in kept)
    index = {
        "groups": [{"title": each.title, "source": _relative(each.pairs), "models": each.models} for each in groups],
        "blocks": [block.prompts for block in kept],
        "rows": joined(kept),
        "prompts": {"shown": shown, "all": blocks.prompts, "skipped": dict(skipped)},
    }
    data = {NAME + "-index": msgspec.json.encode(index)}
    data |= {f"{NAME}-{number}": block.texts for number, block in enumerate(kept)}
    html, script, style = (asset(f"browser.{suffix}") for suffix in ("html", "js", "css"))
    return Section(NAME, "Preferences", html, data, script, style)


def _relative(path: Path) -> str:
    """A path as in the folder that the report is made in: a page that is published names no other."""
    inside = path.is_absolute() and path.is_relative_to(Path.cwd())
    return str(path.relative_to(Path.cwd()) if inside else path)


# Reading --------------------------------------------------------------------------------------------------------------


def read(group: Group, labels: Mapping[str, Item], skipped: Counter[str]) -> Iterator[Prompt]:
    """The prompts of a group, those without a pair included; without rewards, each pair with its two responses.
    `skipped` counts prompts that are not in the previous ranking, by reason."""
    if group.rewards is None:
        yield from (_bare(pair, labels) for pair in store.read(group.pairs, Pair))
        return
    pairs = {pair.uuid: _facts(pair) for pair in store.read(group.pairs, Pair)}
    previous = group.previous and store.read(group.previous, Rewards)
    current = store.read(group.rewards, Rewards)
    both = matched(current, previous, (MISSING, OTHER), lambda: None, skipped, str(group.previous))
    for record, other in both:
        own = list(_of(record.uuid, pairs))
        yield _prompt(record, other if group.previous else None, own, labels, group.keep_truncated)
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


def _bare(pair: Pair, labels: Mapping[str, Item]) -> Prompt:
    """A pair whose other responses are not known."""
    facts = _facts(pair) | {"chosen": 0, "rejected": 1}
    texts = [pair.selected[-1].content, pair.rejected[-1].content]
    item = labels.get(NUMBERED.sub("", pair.uuid))
    return Prompt(
        pair.uuid,
        pair.prompt,
        texts,
        [facts],
        task_of(pair, labels),
        _snippet(pair.source_prompt or pair.prompt),
        gold=[_correct(item, text) for text in texts] if item else (),
    )


def _prompt(
    record: Rewards, previous: Numbers | None, pairs: list[dict], labels: Mapping[str, Item], keep_truncated: bool
) -> Prompt:
    texts, item = record.responses(), labels.get(record.uuid)
    for pair in pairs:
        for side in SIDES:
            pair[side] = _position(texts, pair[side])
    more = len(texts) - len(record.response)  # responses from elsewhere, which have no reward
    gold = [_correct(item, text) for text in texts] if item else record.extra.get("gold")
    pieces = record.extra.get("tokens")
    return Prompt(
        record.uuid,
        record.prompt,
        texts,
        pairs,
        task_of(record, labels),
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


def _snippet(messages: Sequence[Message]) -> str:
    return " ".join(messages[-1].content[: 2 * SNIPPET].split())[:SNIPPET]


def _short(value: float | list | None) -> float | list | None:
    """Five significant digits: what is shown, in a third of the space."""
    if isinstance(value, list):
        return [_short(each) for each in value]
    return value if value is None else float(f"{value:.5g}")
