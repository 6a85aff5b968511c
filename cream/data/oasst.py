"""OpenAssistant conversations: English prompts, each with the reply that people ranked best.

Both published forms are read: flat messages (the hub's rows, *.messages.jsonl), and nested trees (*.trees.jsonl).
Köpf et al., "OpenAssistant Conversations", arXiv 2304.07327.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator

from cream.data import Parsed, Source, Split
from cream.records import Conversation, Message, Prompt

LANGUAGE = "en"
READY = "ready_for_export"
NO_REPLY = "it has no usable reply"
COLUMNS = "message_id parent_id message_tree_id tree_state text role lang review_result deleted rank synthetic prompt"


def read(rows: Iterable[dict], prefix: str, *, multi_turn: bool = False) -> Parsed:
    """Prompts: usable first turns. Conversations: these with their best reply, with `multi_turn` the whole thread of
    best replies. uuid: the tree's id. Rows are messages or trees, in any order."""
    parsed = Parsed()
    replies: dict[str, list[dict]] = defaultdict(list)
    roots = []
    for index, row in enumerate(rows):
        parsed.rows += 1
        for message in _messages(row):
            if not isinstance(message.get("message_id"), str) or not isinstance(message.get("text"), str):
                parsed.reject(index, f"row {index}", "no message_id or no text", row)
            elif message.get("parent_id") is None:
                roots.append(message)
            else:
                replies[message["parent_id"]].append(message)
    for root in roots:
        if reason := _refused(root):
            parsed.dropped[f"the prompt is {reason}"] += 1
            continue
        uuid = root["message_id"]
        parsed.prompts.append(Prompt(uuid=uuid, messages=[_to_message(root)]))
        if best(replies[uuid]) is None:
            usable = any(not _refused(reply) for reply in replies[uuid])
            parsed.unanswered["none of its usable replies is ranked best" if usable else NO_REPLY] += 1
            continue
        thread = [_to_message(message) for message in _thread(root, replies)]
        parsed.conversations.append(Conversation(uuid=uuid, messages=thread if multi_turn else thread[:2]))
    return parsed


def _messages(row: dict) -> Iterator[dict]:
    """The messages of a row: itself, or all of a tree."""
    if not isinstance(row.get("prompt"), dict):
        yield {key: _typed(key, value) if isinstance(value, str) else value for key, value in row.items()}
        return
    waiting = [row["prompt"] | {"parent_id": None, "tree_state": row.get("tree_state")}]
    while waiting:
        message = waiting.pop()
        if isinstance(own := message.get("message_id"), str):
            waiting += [reply | {"parent_id": own} for reply in message.get("replies") or []]
        yield {key: value for key, value in message.items() if key != "replies"}


def _typed(key: str, text: str) -> object:
    """The value of a text from a .csv file, where everything is text."""
    if key in ("review_result", "deleted", "synthetic"):
        return text.lower() == "true"
    if key == "rank" and text in ("0", "0.0"):
        return 0
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
    usable = [reply for reply in replies if not _refused(reply)]
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
        following = [each for each in following if best(replies[each["message_id"]])]
        message = min(following, key=lambda each: each["message_id"], default=None)
    return thread


def _to_message(message: dict) -> Message:
    return Message("assistant" if message["role"] == "assistant" else "user", message["text"])


DECLARED = (
    Source(
        name="oasst1",
        gives="English conversations with people's rankings: the SFT set, and unlabelled prompts",
        hub="OpenAssistant/oasst1",
        names=("oasst1", "oasst"),
        splits={"train": Split("train", 84437, ("messages", "trees"))},
        licence="Apache-2.0",
        read=read,
        columns=tuple(COLUMNS.split()),
        flags=("multi_turn",),
    ),
)
