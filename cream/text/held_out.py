"""Held-out prompts: what a model is measured on shares no prompt with what it is trained on. Pure functions.

The released reward-model scripts take their evaluation rows from the training set after a shuffle, and several pairs
have one prompt: both leak.
"""

from collections.abc import Collection

import xxhash

from cream.errors import UserError
from cream.records import Conversation, Message, Prompt, Ratings, Record
from cream.text.overlap import whole


def prompt_key(record: Record) -> int:
    """Hash of the words of a record's first user turn: conversations that continue one another have the same one, and
    so have prompts that differ in white space, punctuation or case."""
    has_messages = isinstance(record, Conversation | Prompt | Ratings)
    messages: list[Message] = record.messages if has_messages else record.prompt
    return whole(next(message.content for message in messages if message.role == "user"))


def held_out(keys: Collection[int], amount: float, seed: int) -> set[int]:
    """The prompts that are held out, of all `keys`: `amount` of them, drawn by the seed; if it is below 1 about that
    share, at least one, where a prompt's place depends on no other: it is the same in every file. Raises UserError
    unless a prompt is left."""
    places = {key: (xxhash.xxh3_64_intdigest(key.to_bytes(8, "big"), seed), key) for key in {*keys}}
    ordered = sorted(places, key=places.__getitem__)
    if amount < 1:
        limit = int(amount * 2**64)
        count = max(sum(place < limit for place, _ in places.values()), 1 if amount else 0)
    else:
        count = int(amount)
    if count >= len(ordered) and count:
        raise UserError(f"{amount:g} to be held out of {len(ordered)} prompts: none would be left to train on")
    return {*ordered[:count]}
