"""Held-out prompts: what a model is measured on shares no prompt with what it is trained on. Pure functions.

The released reward-model scripts take their evaluation rows from the training set after a shuffle, and several pairs
have one prompt: both leak.
"""

from collections.abc import Collection

import xxhash

from cream.data.overlap import whole
from cream.errors import UserError
from cream.records import Conversation, Message, Prompt, Ratings, Record


def prompt_key(record: Record) -> int:
    """Hash of the words of a record's first user turn: conversations that continue one another have the same one, and
    so have prompts that differ in white space, punctuation or case."""
    has_messages = isinstance(record, Conversation | Prompt | Ratings)
    messages: list[Message] = record.messages if has_messages else record.prompt
    return whole(next(message.content for message in messages if message.role == "user"))


def held_out(keys: Collection[int], amount: float, seed: int) -> set[int]:
    """The prompts that are held out, of all `keys`: `amount` of them, if it is below 1 that share of them (at least
    one); drawn by the seed, so that a prompt's place depends on no other. Raises UserError unless a prompt is left."""
    prompts = {*keys}
    count = int(amount) if amount >= 1 else max(1, round(amount * len(prompts))) if amount else 0
    if count >= len(prompts) and count:
        raise UserError(f"--held_out {amount:g}: there are {len(prompts)} prompts, and none would be left to train on")
    ordered = sorted(prompts, key=lambda key: (xxhash.xxh3_64_intdigest(key.to_bytes(8, "big"), seed), key))
    return {*ordered[:count]}
