"""OpenAssistant conversations: English prompts, each with the reply that people ranked best, or with all ranked ones.

Both published forms are read: flat messages (the hub's rows, *.messages.jsonl), and nested trees (*.trees.jsonl).
Köpf et al., "OpenAssistant Conversations", arXiv 2304.07327.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress

from cream.data import Parsed, Source, Split
from cream.errors import UserError
from cream.records import Conversation, Message, Prompt, Samples

LANGUAGE = "en"
READY = "ready_for_export"
NO_REPLY = "it has no usable reply"
QUALITY = 0.6  # label that a prompt and its reply exceed with --selection quality
WORDS = 5  # and their number of words
LOW = f"its quality label, or its reply's, is not above {QUALITY:g}"
SHORT = f"it, or its reply, has at most {WORDS} words"
COLUMNS = "message_id parent_id message_tree_id tree_state text role lang review_result deleted rank synthetic prompt"


def read(rows: Iterable[dict], prefix: str, *, multi_turn: bool = False, selection: str = "rank") -> Parsed:
    """Prompts: usable first turns. Conversations: these with their best reply, with `multi_turn` the whole thread of
    best replies; uuid: the tree's id. Ranked: every usable prompt, later turns too, with the replies that people
    ranked; uuid: the prompt's. Rows are messages or trees, in any order.

    selection: `rank`, all of these conversations (arXiv 2401.10020, §3.1); `quality`, those whose prompt and reply
    both have a quality label above QUALITY and more than WORDS words, by falling sum of both labels (AutoAlign). Raises
    UserError where no message has such a label.
    """
    parsed = Parsed()
    replies: dict[str, list[dict]] = defaultdict(list)
    roots, seen = [], set()
    for index, row in enumerate(rows):
        parsed.rows += 1
        for message in _messages(row):
            if reason := _malformed(message, seen):
                parsed.reject(index, f"row {index}", reason, row)
                continue
            seen.add(message["message_id"])  # each once, so that no chain of replies leads back to itself
            if message.get("parent_id") is None:
                roots.append(message)
            else:
                replies[message["parent_id"]].append(message)
    scores: dict[str, float] = {}
    for root in roots:
        if reason := _refused(root):
            parsed.dropped[f"the prompt is {reason}"] += 1
            continue
        uuid = root["message_id"]
        parsed.prompts.append(Prompt(uuid=uuid, messages=[_to_message(root)]))
        parsed.ranked += _ranked(root, replies)
        if (reply := best(replies[uuid])) is None:
            usable = any(not _refused(reply) for reply in replies[uuid])
            parsed.unanswered["none of its usable replies is ranked best" if usable else NO_REPLY] += 1
            continue
        if selection == "quality":
            if reason := _too_poor(root, reply):
                parsed.unanswered[reason] += 1
                continue
            scores[uuid] = _quality(root) + _quality(reply)
        thread = [_to_message(message) for message in _thread(root, replies)]
        parsed.conversations.append(Conversation(uuid=uuid, messages=thread if multi_turn else thread[:2]))
    if selection == "quality":
        if not any(_quality(message) for message in (*roots, *(each for some in replies.values() for each in some))):
            raise UserError("--selection quality: no message of these rows has a `quality` label; --selection rank")
        parsed.conversations.sort(key=lambda conversation: (-scores[conversation.uuid], conversation.uuid))
    return parsed


def _messages(row: dict) -> Iterator[dict]:
    """The messages of a row: itself, or all of a tree."""
    if not isinstance(row.get("prompt"), dict):
        yield {key: _typed(key, value) if isinstance(value, str) else value for key, value in row.items()}
        return
    waiting = [row["prompt"] | {"parent_id": None, "tree_state": row.get("tree_state")}]
    while waiting:
        message = waiting.pop()
        own, below = message.get("message_id"), message.get("replies") or []
        for reply in below if isinstance(below, list) else [below]:
            if isinstance(reply, dict):
                waiting.append(reply | {"parent_id": own})
            else:
                yield {}
        yield {key: value for key, value in message.items() if key != "replies"}


def _malformed(message: dict, seen: set[str]) -> str | None:
    """Why a message is none; `seen`: the ids of others."""
    own, parent, role = (message.get(key) for key in ("message_id", "parent_id", "role"))
    if not isinstance(own, str) or not isinstance(message.get("text"), str):
        return "no message_id or no text"
    if own in seen:
        return f"a second message with the id {own}"
    if not isinstance(parent, str | None):
        return "its parent_id is not a text"
    if not isinstance(role, str) or (parent is None and role == "assistant"):
        return "its role is not that of a person" if parent is None else "it has no role"
    return None


def _typed(key: str, text: str) -> object:
    """The value of a text from a .csv file, where everything is text."""
    if key in ("review_result", "deleted", "synthetic"):
        return text.lower() == "true"
    if key == "rank":
        with suppress(ValueError, OverflowError):
            return int(float(text))
    return text if text or key == "text" else None


def _refused(message: dict) -> str | None:
    """Why a message is not used; None where it is."""
    if message.get("tree_state") not in (None, READY):
        return "of a tree that was not finished"
    if message.get("lang") != LANGUAGE:
        return "not in English"
    if message.get("deleted") or message.get("synthetic"):
        return "deleted or synthetic"
    return None if message.get("review_result") and message["text"].strip() else "refused, or not seen, in review"


def best(replies: list[dict]) -> dict | None:
    """The usable reply of rank 0; an only reply needs no rank. None if nobody ranked one as best."""
    usable = [reply for reply in replies if not _refused(reply) and reply["role"] == "assistant"]
    ranked = [reply for reply in usable if reply.get("rank") == 0]
    return ranked[0] if ranked else replies[0] if usable and len(replies) == 1 else None


def _thread(message: dict, replies: dict[str, list[dict]]) -> list[dict]:
    """A prompt, its best reply, and so on. Follow-up prompts are not ranked: of those with a best reply, the first by
    id is taken."""
    thread = []
    while message is not None:
        reply = best(replies[message["message_id"]])
        thread += [message, reply]
        following = [each for each in replies[reply["message_id"]] if not _refused(each)]
        following = [e for e in following if e["role"] != "assistant" and best(replies[e["message_id"]])]
        message = min(following, key=lambda each: each["message_id"], default=None)
    return thread


def _ranked(root: dict, replies: dict[str, list[dict]]) -> Iterator[Samples]:
    """The prompts of a tree that have two ranked replies or more, each with these, best first, and their `ranks`."""
    waiting = [(root, [])]
    while waiting:
        prompt, before = waiting.pop()
        thread = [*before, _to_message(prompt)]
        usable = [each for each in replies[prompt["message_id"]] if not _refused(each) and each["role"] == "assistant"]
        ranked = [each for each in usable if isinstance(each.get("rank"), int | float)]
        if len(ranked) > 1:
            ranked.sort(key=lambda each: (each["rank"], each["message_id"]))
            ranks = [int(each["rank"]) for each in ranked]
            texts = [each["text"] for each in ranked]
            yield Samples(uuid=prompt["message_id"], prompt=thread, responses=texts, extra={"ranks": ranks})
        following = [
            (each, [*thread, _to_message(reply)])
            for reply in usable
            for each in replies[reply["message_id"]]
            if not _refused(each) and each["role"] != "assistant"
        ]
        waiting += sorted(following, key=lambda each: each[0]["message_id"], reverse=True)


def _too_poor(prompt: dict, reply: dict) -> str | None:
    """Why --selection quality has no place for an exchange."""
    if min(_quality(prompt), _quality(reply)) <= QUALITY:
        return LOW
    return SHORT if min(len(each["text"].split()) for each in (prompt, reply)) <= WORDS else None


def _quality(message: dict) -> float:
    """A message's mean quality label in [0, 1], 0 without one that is a number; labels are {"quality": {"value": …}} in
    files, and {"name": […], "value": […]} on the hub."""
    match message.get("labels"):
        case {"name": [*names], "value": [*values]}:
            value = next((value for name, value in zip(names, values, strict=False) if name == "quality"), None)
        case {"quality": {"value": value}}:
            pass
        case _:
            value = None
    return value if type(value) in (int, float) else 0.0


def _to_message(message: dict) -> Message:
    return Message("assistant" if message["role"] == "assistant" else "user", message["text"])


DECLARED = (
    Source(
        name="oasst1",
        gives="English conversations with people's rankings: the SFT set, ranked responses, and unlabelled prompts",
        hub="OpenAssistant/oasst1",
        names=("oasst1", "oasst"),
        splits={"train": Split("train", 84437, ("messages", "trees"))},
        licence="Apache-2.0",
        read=read,
        columns=tuple(COLUMNS.split()),
        flags=("multi_turn", "selection"),
        labels=("labels",),
    ),
)
