"""A list of instructions that a model continues: how it is put, and which of the new ones can be used. Pure functions.

Self-Instruct (Wang et al., arXiv 2212.10560, §2.2 and appendix), as Self-Rewarding Language Models use it: eight
examples, six of them seeds and two the model's own. Departures from the later code (AutoAlign): only the first letter
becomes a capital (names and code keep theirs), every instruction passes the filters, the first one too, and one that a
length limit cut off is not used.
"""

import random
import re
import string
from collections.abc import Iterator, Sequence

from cream.records import Message

SHOWN = 8  # examples in a query
OWN = 2  # of them from the model's own instructions, as soon as there are so many
FEWEST, MOST = 4, 150  # words

NUMBER = re.compile(r"^[ \t]*\d{1,3}[ \t]*[.)](?=\s|$)", re.MULTILINE)  # opens an item of the list
OTHER_MEDIA = re.compile(r"\b(?:images?|graphs?|pictures?|files?|maps?|draw|plot|go to)\b", re.IGNORECASE)

CUT = "truncated, as the last one of a text that ends at its limit of tokens"
UNLISTED = "not an item of a numbered list"
SHORT, LONG = f"fewer than {FEWEST} words", f"more than {MOST} words"
MEDIA = "asks for what a text cannot hold: an image, a graph, a file, a map, a drawing, a visit"
PROGRAM = "starts with 'Write a program'"
PUNCTUATION = "starts with punctuation"
NOT_ASCII = "starts with a character that is not ASCII"


def examples(seeds: Sequence[str], own: Sequence[str], seed: int, number: int) -> list[str]:
    """The examples of query `number`, shuffled: a function of what is there, `seed` and `number` alone."""
    draw = random.Random(f"{seed} {number}")
    mine = draw.sample(own, OWN) if len(own) >= OWN else []
    chosen = [*draw.sample(seeds, SHOWN - len(mine)), *mine]
    draw.shuffle(chosen)
    return [" ".join(text.split()).removesuffix(":") for text in chosen]


def query(shown: Sequence[str], chat: bool) -> list[Message]:
    """The list with the examples that the model continues: as a text that ends with the next number, or as a request in
    a user's turn."""
    listed = "\n".join(f"{i}. {text}" for i, text in enumerate(shown, 1))
    if not chat:
        return [Message("user", f"A list of tasks, each of another kind:\n\n{listed}\n{len(shown) + 1}.")]
    ask = (
        f"Here are {len(shown)} tasks that people gave to an AI assistant:\n\n{listed}\n\nContinue this list with "
        f"{len(shown)} new tasks, each of another kind. Write the tasks only, one a line, with numbers from "
        f"{len(shown) + 1} on."
    )
    return [Message("user", ask)]


def instructions(text: str, cut: bool, chat: bool) -> Iterator[tuple[str, str | None]]:
    """(instruction, None) or (instruction, why it cannot be used) of each item in a model's text; `cut`: the text ends
    at its limit of tokens. What precedes the first number of a response in a chat is no item."""
    before, *items = NUMBER.split(text if chat else f"{SHOWN + 1}. {text}")
    if not items:
        yield before, UNLISTED
    for i, item in enumerate(items):
        item = " ".join(item.split())
        item = item[:1].upper() + item[1:]
        yield item, CUT if cut and i + 1 == len(items) else unusable(item)


def unusable(instruction: str) -> str | None:
    """Why an instruction cannot be used; None if it can."""
    words = len(instruction.split())
    if words < FEWEST:
        return SHORT
    if words > MOST:
        return LONG
    if OTHER_MEDIA.search(instruction):
        return MEDIA
    if instruction.startswith("Write a program"):
        return PROGRAM
    if instruction[0] in string.punctuation:
        return PUNCTUATION
    return None if instruction[0].isascii() else NOT_ASCII
