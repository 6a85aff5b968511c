"""The thought that a reasoning model writes before its final text, between tags such as <think> and </think>.

Only the final text is an answer: extraction and lengths of both go through `split_thought`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from cream.cli.flags import flag
from cream.errors import UserError

Tags = Sequence[tuple[str, str]]  # pairs of an opening and a closing tag

USUAL: Tags = (
    ("<think>", "</think>"),  # DeepSeek-R1, Qwen3, GLM, Nemotron, LFM2.5, OLMo 3
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("<mm:think>", "</mm:think>"),  # MiniMax
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    ("<|channel>", "<channel|>"),  # Gemma 4
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),  # gpt-oss
)


@dataclass
class ThoughtFlags:
    """Thoughts"""

    thinking_tags: str | None = flag(
        "usual",
        "tags around a thought: OPEN CLOSE with a space between, pairs separated by commas; usual, which may be one of "
        "these: <think> </think> and nine others (cream/text/thoughts.py); none: responses have no thoughts",
    )

    def __post_init__(self):
        parse_tags(self.thinking_tags)

    @property
    def tags(self) -> Tags:
        """Pairs of an opening and a closing tag."""
        return parse_tags(self.thinking_tags)


class Split(NamedTuple):
    """The parts of a response, without tags. `thought` is None if there is no tag; `closed` is false if the text ends
    within a thought."""

    thought: str | None
    final: str
    closed: bool


def parse_tags(text: str | None) -> Tags:
    """The pairs that --thinking_tags gives. Raises UserError for anything but pairs of distinct tags."""
    if text is None:
        return ()
    parts = [part.strip() for part in text.split(",")]
    pairs = [pair for part in parts for pair in (USUAL if part.lower() == "usual" else [tuple(part.split())])]
    tags = [tag for pair in pairs for tag in pair]
    if any(len(pair) != 2 for pair in pairs) or len({*tags}) < len(tags):
        raise UserError(
            f"--thinking_tags {text!r}: expected an opening and a closing tag with a space between, pairs separated by "
            "commas, no tag twice, such as '<think> </think>,[THINK] [/THINK]'; or usual, or none"
        )
    return tuple(pairs)


def split_thought(text: str, tags: Tags = USUAL, opened: bool = False) -> Split:
    """A response's thought and its final text.

    A thought ends with the closing tag of its opening one. Text before the first thought belongs to it, as does text
    before a closing tag that nothing opened, since the template may have done so: `opened` says that it did, so that
    the text begins within a thought even if no tag follows. Several thoughts are joined, and so is the text between
    and after them.

    >>> split_thought("<think>3 or 4?</think>It is 4.")
    Split(thought='3 or 4?', final='It is 4.', closed=True)
    >>> split_thought("3 or 4?</think>It is 4.")
    Split(thought='3 or 4?', final='It is 4.', closed=True)
    >>> split_thought("<think>3 or")
    Split(thought='3 or', final='', closed=False)
    """
    if not tags:
        return Split(None, text, True)
    closing_tag = dict(tags)
    thoughts: list[str] = []
    finals: list[str] = []
    start, ends = 0, {*closing_tag.values()} if opened else set()  # `ends`: what closes the thought that is open
    for tag in _any_tag(tuple(tags)).finditer(text):
        if ends and tag[0] not in ends:
            continue
        part, start = text[start : tag.start()], tag.end()
        if tag[0] not in closing_tag:  # it closes a thought, whether or not that was opened
            thoughts += [part] if ends else [*finals, part]
            finals, ends = finals if ends else [], set()
        else:
            (finals if thoughts else thoughts).append(part)
            ends = {closing_tag[tag[0]]}
    (thoughts if ends else finals).append(text[start:])
    return Split("".join(thoughts) if thoughts else None, "".join(finals), not ends)


def final_text(text: str, tags: Tags = USUAL, opened: bool = False) -> str | None:
    """A response's final text, without the line breaks between it and its thought; None where it ends within that."""
    split = split_thought(text, tags, opened)
    if not split.closed:
        return None
    return text if split.thought is None else split.final.lstrip("\n")


def opens_thought(prompt: str, tags: Tags = USUAL) -> bool:
    """Whether a rendered prompt ends with an opening tag, so that the response begins within a thought."""
    return prompt.rstrip().endswith(tuple(opening for opening, _ in tags))


@cache
def _any_tag(tags: Tags) -> re.Pattern:
    """A pattern of any tag, the longest of those that begin alike."""
    each = {tag for pair in tags for tag in pair}
    return re.compile("|".join(map(re.escape, sorted(each, key=lambda tag: (-len(tag), tag)))))
