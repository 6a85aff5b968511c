"""Records -> rows in the formats of other tools; table.py reads them back.

- trl (https://huggingface.co/docs/trl/dataset_formats, conversational): `messages`; `prompt`; or `prompt`, `chosen`,
  `rejected`
- sharegpt: `conversations` of {"from", "value"}; for pairs also `chosen` and `rejected`, as in LLaMA-Factory
- alpaca: `instruction`, `input`, `output`; LLaMA-Factory's `system`, `history`, and for pairs `chosen`, `rejected`

All other keys of a record are kept; one of the same name becomes `input_<name>`.
"""

from collections.abc import Sequence

from cream.errors import UserError
from cream.records import Conversation, Message, Pair, Prompt, Record, encode, nouns

FORMS = ("trl", "sharegpt", "alpaca")
SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt"}


def export_row(record: Record, form: str) -> dict:
    """A conversation, a prompt or a pair as a row of one of FORMS. Raises UserError for other records."""
    if not isinstance(record, Conversation | Prompt | Pair):
        kind = nouns(type(record))
        raise UserError(f"record {record.uuid!r}: conversations, prompts and pairs have a {form} form, not {kind}")
    if isinstance(record, Conversation) and record.only_last:
        raise UserError(
            f"record {record.uuid!r}: only its last response is trained on, which the {form} form cannot say"
        )
    own = {"trl": _trl, "sharegpt": _sharegpt, "alpaca": _alpaca}[form](record)
    used = ("messages", "prompt", "selected", "rejected")
    rest = {key: value for key, value in encode(record).items() if key not in used}
    return {"uuid": rest.pop("uuid"), **own, **{f"input_{key}" if key in own else key: v for key, v in rest.items()}}


def _trl(record: Conversation | Prompt | Pair) -> dict:
    if isinstance(record, Pair):
        parts = {"prompt": record.prompt, "chosen": record.selected[-1:], "rejected": record.rejected[-1:]}
    else:
        parts = {"messages" if isinstance(record, Conversation) else "prompt": record.messages}
    return {name: [{"role": m.role, "content": m.content} for m in messages] for name, messages in parts.items()}


def _sharegpt(record: Conversation | Prompt | Pair) -> dict:
    if isinstance(record, Pair):
        chosen, rejected = (_speakers(messages)[-1] for messages in (record.selected, record.rejected))
        return {"conversations": _speakers(record.prompt), "chosen": chosen, "rejected": rejected}
    return {"conversations": _speakers(record.messages)}


def _speakers(messages: Sequence[Message]) -> list[dict]:
    return [{"from": SPEAKERS[message.role], "value": message.content} for message in messages]


def _alpaca(record: Conversation | Prompt | Pair) -> dict:
    match record:
        case Pair():
            responses = {"chosen": record.selected[-1].content, "rejected": record.rejected[-1].content}
            return _turns(record.prompt) | responses
        case Conversation():
            return _turns(record.messages[:-1]) | {"output": record.messages[-1].content}
        case Prompt():
            return _turns(record.messages)


def _turns(messages: Sequence[Message]) -> dict:
    """A prompt as instruction, system message and earlier turns."""
    system = messages[0].content if messages[0].role == "system" else ""
    turns = [message.content for message in messages if message.role != "system"]
    history = [list(turn) for turn in zip(turns[:-1:2], turns[1::2], strict=True)]
    return {"instruction": turns[-1], "input": "", "system": system, "history": history}
