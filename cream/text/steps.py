"""A response in steps, and the conversation in which a model gives each of them its sign (RLHFlow, math-rm).

    user: question + " " + step 1,  assistant: +,  user: step 2,  assistant: +,  ...

The model's probability of "+" against "-" where a sign stands is that of the step being right. The conversation has "+"
at every sign, whatever the labels, in training as in scoring: so one pass has all steps of a response, and no label is
given away to the steps after it. (The released code trains behind the true signs and scores behind "+".) An outcome
reward model is the same with the whole response as its one step.
"""

import copy
import re
from collections.abc import Sequence
from typing import NamedTuple

from cream.errors import UserError
from cream.records import Message
from cream.text.chat import Chat
from cream.text.tokens import Tokens, describe_length

PLUS, MINUS = "+", "-"
SPLITS = {  # how a text is split into steps -> the separator (a pattern), what joins them again
    "lines": (r"\n", "\n"),
    "paragraphs": (r"\n\s*\n", "\n\n"),
    "sentences": (r"(?<=[.!?])\s+", " "),
}
SPLIT_HELP = (
    f"where a step ends: {', '.join(SPLITS)} (after . ! ? and a space), or a text that separates them, such as a tag "
    "that the generator writes"
)
NO_STEPS = "no text to split into steps"
NO_SIGN = "the tokenizer merges a sign with what is around it"
PROBE = [Message("user", "2 + 3?")], ["2 + 3 = 5.", "5.", "Answer: 5"]


def split_steps(text: str, by: str) -> list[str]:
    """A response's steps, without the separators and spaces around them; empty ones are no steps."""
    pattern = SPLITS[by][0] if by in SPLITS else re.escape(by)
    return [step for part in re.split(pattern, text) if (step := part.strip())]


def join_steps(steps: Sequence[str], by: str) -> str:
    """The response that `split_steps` splits into these, without a tag between them."""
    return (SPLITS[by][1] if by in SPLITS else "\n").join(steps)


def step_conversation(prompt: Sequence[Message], steps: Sequence[str]) -> list[Message]:
    """The conversation above."""
    *before, question = prompt
    turns = [f"{question.content} {steps[0]}", *steps[1:]]
    return [*before, *(message for turn in turns for message in (Message("user", turn), Message("assistant", PLUS)))]


class SignTokens(NamedTuple):
    """What a model needs of the signs: the ids of + and -, and the rows of a probe, as `Signs.encode` gives them."""

    ids: tuple[int, int]
    probe: list[Tokens]


class Signs:
    """The signs of a model's chat, of one token each; `ids`: of + and -, `tokens`: these with a probe.

    Raises UserError where a sign has several tokens, of which none alone would be its probability.
    """

    def __init__(self, chat: Chat):
        self._chat = copy.copy(chat)
        self._chat.literal, self._chat.thoughts = True, "score"  # steps are quoted
        plus, minus = (self._chat.encode_conversation([*PROBE[0], Message("assistant", s)]) for s in (PLUS, MINUS))
        name = chat.tokenizer.name_or_path
        if isinstance(plus, str) or isinstance(minus, str):
            raise UserError(f"{name}: cannot write a sign as a response: {plus if isinstance(plus, str) else minus}")
        ids = [row[-1].ids for row in (plus, minus)]
        places = [i for i, (a, b) in enumerate(zip(*ids, strict=False)) if a != b]
        if len(places) != 1 or len(ids[0]) != len(ids[1]):
            shown = (chat.tokenizer.convert_ids_to_tokens(row[places[0] if places else 0 :]) for row in ids)
            raise UserError(
                f"{name}: the signs of a step, + and -, should be one token each, and are written "
                f"{' and '.join(map(repr, shown))} here; use a model whose tokenizer has a token for each"
            )
        self.ids: tuple[int, int] = (ids[0][places[0]], ids[1][places[0]])
        several = self._turn_by_turn(step_conversation(*PROBE), len(PROBE[1]))
        if isinstance(several, str):
            raise UserError(f"{name}: {several}")
        self._stable = len(several) == 1  # each turn is written alike whatever follows
        one = self._turn_by_turn(step_conversation(PROBE[0], PROBE[1][:1]), 1)  # an ORM knows no other
        self.tokens = SignTokens(self.ids, one)

    def encode(self, prompt: Sequence[Message], steps: Sequence[str], limit: int) -> list[Tokens] | str:
        """The rows of a response, whose spans are its signs in the order of its steps, one token each; or the reason
        why it has none. One row, but for chat templates that write a turn otherwise once another follows."""
        if not steps:
            return NO_STEPS
        conversation = step_conversation(prompt, steps)
        if self._chat.exceeds(conversation, limit):
            return describe_length(limit)
        rows = self._at_once(conversation, len(steps)) if self._stable else None
        rows = rows or self._turn_by_turn(conversation, len(steps))
        if not isinstance(rows, str) and max(map(len, rows)) > limit:
            return describe_length(limit)
        return rows

    def _at_once(self, conversation: Sequence[Message], count: int) -> list[Tokens] | None:
        """The one row, its signs where a + follows what begins every response. None unless there are `count` of them:
        templates may begin the turns in several ways, and a turn of the prompt may begin with a + too."""
        (row,) = self._chat.encode_responses(conversation[:-1], [PLUS], [False], sampled=False)
        if isinstance(row, str):
            return None
        places = [i for i in self._chat.response_starts(row.ids) if row.ids[i] == self.ids[0]]
        return [_signed(row.ids, places)] if len(places) == count else None

    def _turn_by_turn(self, conversation: Sequence[Message], count: int) -> list[Tokens] | str:
        rows = self._chat.encode_conversation(conversation)
        if isinstance(rows, str):
            return rows
        others = sum(len(row.spans) for row in rows) - count  # turns of the prompt, which come first
        signed = []
        for row in rows:
            spans, others = row.spans[others:], max(0, others - len(row.spans))
            places = [next((i for i in range(*span) if row.ids[i] == self.ids[0]), None) for span in spans]
            if None in places:
                return NO_SIGN
            if places:
                signed.append(_signed(row.ids, places))
        return signed


def _signed(ids: list[int], places: list[int]) -> Tokens:
    """A row whose spans are the signs at some places, without what follows the last one."""
    return Tokens(ids[: places[-1] + 1], [(i, i + 1) for i in places])
