"""Records in the forms that other tools of this field read; table.py reads them back.

- trl (https://huggingface.co/docs/trl/dataset_formats, conversational): `messages`; `prompt`; or `prompt`, `chosen`,
  `rejected`
- sharegpt: `conversations` of {"from", "value"}; of pairs `chosen` and `rejected` beside them, as in LLaMA-Factory
- alpaca: `instruction`, `input`, `output`; LLaMA-Factory's `system`, `history`, and for pairs `chosen`, `rejected`

All other keys of a record stand beside these, an equal name as `input_<name>`.
"""

from collections.abc import Sequence

from cream.errors import UserError
from cream.records import Conversation, Message, Pair, Prompt, Record, encode

FORMS = ("trl", "sharegpt", "alpaca")
SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt"}


def export(record: Record, form: str) -> dict:
    """A row of one of FORMS: of a conversation, a prompt or a pair. Raises UserError for records of another layout."""
    if not isinstance(record, Conversation | Prompt | Pair):
        kind = type(record).__name__
        raise UserError(
            f"record {record.uuid!r}: {form} has no form for {kind} records, but for Conversation, Prompt, Pair"
        )
    own = {"trl": _trl, "sharegpt": _sharegpt, "alpaca": _alpaca}[form](record)
    told = encode(record)
    rest = {key: value for key, value in told.items() if key not in ("messages", "prompt", "selected", "rejected")}
    return {"uuid": rest.pop("uuid"), **own, **{f"input_{key}" if key in own else key: v for key, v in rest.items()}}


def _trl(record: Conversation | Prompt | Pair) -> dict:
    if isinstance(record, Pair):
        parts = {"prompt": record.prompt, "chosen": record.selected[-1:], "rejected": record.rejected[-1:]}
    else:
        parts = {"messages" if isinstance(record, Conversation) else "prompt": record.messages}
    return {name: [{"role": m.role, "content": m.content} for m in messages] for name, messages in parts.items()}


def _sharegpt(record: Conversation | Prompt | Pair) -> dict:
    if isinstance(record, Pair):
        chosen, rejected = (_spoken(messages)[-1] for messages in (record.selected, record.rejected))
        return {"conversations": _spoken(record.prompt), "chosen": chosen, "rejected": rejected}
    return {"conversations": _spoken(record.messages)}


def _spoken(messages: Sequence[Message]) -> list[dict]:
    return [{"from": SPEAKERS[message.role], "value": message.content} for message in messages]


def _alpaca(record: Conversation | Prompt | Pair) -> dict:
    match record:
        case Pair():
            answers = {"chosen": record.selected[-1].content, "rejected": record.rejected[-1].content}
            return _asked(record.prompt) | answers
        case Conversation():
            return _asked(record.messages[:-1]) | {"output": record.messages[-1].content}
        case Prompt():
            return _asked(record.messages)


def _asked(messages: Sequence[Message]) -> dict:
    """Messages that end with a user's."""
    system = messages[0].content if messages[0].role == "system" else ""
    turns = [message.content for message in messages if message.role != "system"]
    history = [list(turn) for turn in zip(turns[:-1:2], turns[1::2], strict=True)]
    return {"instruction": turns[-1], "input": "", "system": system, "history": history}
