"""Records that the chat template refuses: named before anything is spent, or skipped as malformed ones are."""

from collections.abc import Iterable
from pathlib import Path

from cream.errors import UserError
from cream.files import store
from cream.records import Conversation, Message, Pair, Prompt, Record, Samples, Steps
from cream.text.chat import Chat
from cream.text.steps import step_conversation


def find_refusals(path: Path, records: Iterable[Record], chat: Chat, skip: bool) -> dict[str, str]:
    """uuid -> reason, of the records in the file `path` that the template refuses. Raises UserError for the first one,
    unless they are to be skipped."""
    refused: dict[str, str] = {}
    for record in records:
        reasons = (chat.refusal(messages) for messages in _rendered(record))
        if (why := next(filter(None, reasons), None)) is not None:
            refused[record.uuid] = why
    if refused and not skip:
        (uuid, why), more = next(iter(refused.items())), len(refused) - 1
        further = f"; {more} more are refused" if more else ""
        raise UserError(f"{path}: record {uuid!r}: {why}{further}. {store.SKIP}")
    return refused


def _rendered(record: Record) -> list[list[Message]]:
    """What the template renders of a record; a sampled response follows its prompt as it is."""
    match record:
        case Prompt():
            return [record.messages]
        case Samples():
            return [record.prompt]
        case Conversation():
            return [record.messages[:-1], record.messages]
        case Pair():
            return [record.prompt] if all(record.sampled) else [record.prompt, record.selected, record.rejected]
        case Steps():
            return [step_conversation(record.prompt, record.steps)]
    return []
