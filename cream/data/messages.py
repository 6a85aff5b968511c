"""The messages of a row, in any of the usual forms -> turns of a role and a text.

- messages: `role` or `from`; `content` or `value`, a text or a list of text parts; turns as {"input", "output"} are two
- texts: one turn; or several, as in Anthropic's data ("\\n\\nHuman: …\\n\\nAssistant: …")

A message's other keys are refused by name, because a record has no place for them, unless they are empty, say what
training does anyway (`weight` 1), or Keys says what becomes of them.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from cream.pairs.validity import PROMPTS, why_invalid

ROLES = {"human": "user", "user": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant"}
ROLES |= {"assistant": "assistant", "model": "assistant", "bot": "assistant", "system": "system"}
TEXTS = {"role", "from", "content", "value"}
EXCHANGE = ("input", "output")  # Capybara's form of a user's turn and its response
TRAINED = ("weight", "train", "training", "trainable", "loss")  # whether a turn is trained on; of these the opposite:
MASKED = ("mask", "masked")
THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thought")
TOOLS = ("tool_calls", "function_call", "tool_call_id")
UNTRAINED = "untrained"  # the mark of an assistant's turn that is not trained on: the key that says so
TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):")
# Messages in a cell of a .csv file.
WRITTEN = re.compile(r"""\s*\[\s*\{\s*["'](?:role|from|content|value)["']\s*:.*\}\s*\]\s*$""", re.DOTALL)


class Dropped(ValueError):
    """A filter drops a row, which is not an error; its text is the reason. Of pairs: cream/pairs/validity.py."""


class Keys(NamedTuple):
    """What becomes of keys of messages: `ignored` ones are dropped; `thought` names the one with the thought that
    precedes an assistant's text, and becomes a part of it."""

    ignored: frozenset[str] = frozenset()
    thought: str | None = None


NONE = Keys()


def conversation(fields: Mapping, keys: Keys = NONE) -> list[dict]:
    """The messages of a row: its `messages`, or its `system`, `history`, `prompt` and `response`.

    If they end with an assistant's turn, each such turn is trained on: raises ValueError if a key says that one is not.
    """
    messages = _turns(fields, keys)
    if messages and messages[-1]["role"] == "assistant":
        _refuse_untrained(messages, "every assistant's turn of a conversation")
    return _spoken(messages)


def pair(fields: Mapping, keys: Keys = NONE) -> dict:
    """`prompt`, `selected` and `rejected` of a row whose `chosen` and `rejected` are texts, messages or whole
    conversations. Raises Dropped where the validity filter drops it, and ValueError if a key says that one of these
    responses is not trained on."""
    asked = _turns({key: value for key, value in fields.items() if key not in ("response", "thought")}, keys)
    both = [_messages(fields[name], "assistant", keys) for name in ("chosen", "rejected")]
    for turns in (asked, *both):
        _refuse_untrained([turn for turn in turns[-1:] if turn["role"] == "assistant"], "either response of a pair")
    prompt, *both = map(_spoken, (asked, *both))
    if prompt and prompt[-1]["role"] == "assistant":  # the whole chosen conversation, as UltraFeedback's messages
        if both[0][-1:] != prompt[-1:]:
            raise ValueError("its messages end with an assistant's turn that is not the chosen one")
        prompt = prompt[:-1]
    chosen, rejected = (prompt + each if [turn["role"] for turn in each] == ["assistant"] else each for each in both)
    turns = [[(turn["role"], turn["content"]) for turn in each] for each in (chosen, rejected)]
    reason = why_invalid(*turns) or (PROMPTS if prompt and chosen[:-1] != prompt else None)
    if reason is not None:
        raise Dropped(reason)
    return {"prompt": chosen[:-1], "selected": chosen, "rejected": rejected}


def is_transcript(value: object) -> bool:
    """Whether a text is several turns, as in Anthropic's data; one that only begins like them may be a response."""
    return isinstance(value, str) and value.startswith("\n\nHuman:") and "\n\nAssistant:" in value


def _refuse_untrained(turns: Sequence[Mapping], trained: str) -> None:
    """Raises ValueError if a key says that one of these turns is not trained on; `trained` says which turns are."""
    if odd := [turn[UNTRAINED] for turn in turns if UNTRAINED in turn]:
        raise ValueError(
            f"by its {odd[0]!r} an assistant's turn is not to be trained on, but {trained} is; --ignore_keys {odd[0]} "
            "trains on it"
        )


def _spoken(messages: Sequence[Mapping]) -> list[dict]:
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _turns(fields: Mapping, keys: Keys) -> list[dict]:
    system = [_message("system", fields["system"])] if "system" in fields else []
    if "messages" in fields:
        messages = _messages(fields["messages"], "user", keys)
        return messages if messages[:1] and messages[0]["role"] == "system" else system + messages
    past = [_message(role, text) for turn in _past(fields.get("history", [])) for role, text in _both(turn)]
    prompt = _messages(fields.get("prompt", []), "user", keys)
    response = _messages(fields.get("response", []), "assistant", keys)
    if response and "thought" in fields:
        response[-1] = response[-1] | {"content": _thinking(fields["thought"], response[-1]["content"])}
    return [*system, *past, *prompt, *response]


def _messages(value: object, role: str, keys: Keys) -> list[dict]:
    """Messages in any form; a bare text is a turn of `role`. Raises ValueError for messages written as a text."""
    if is_transcript(value):
        turns = _transcript(value)
        return turns[:-1] if role == "user" and turns[-1] == _message("assistant", "") else turns
    if isinstance(value, str):
        if WRITTEN.match(value):
            raise ValueError(
                f"messages are written as a text, {value!r:.60}; give them as a list, in .jsonl or .parquet"
            )
        return [_message(role, value)]
    values = [value] if isinstance(value, Mapping) else value
    if not isinstance(values, Sequence):
        raise ValueError(f"expected a text or messages, found {value!r:.60}")
    messages = [turn for each in values for turn in _exchange(each)]
    more = [each for each in messages if not each.keys() <= TEXTS]  # none, as a rule
    if unread := list(dict.fromkeys(key for each in more for key in _unread(each, keys))):
        raise ValueError(_refusal(unread))
    return [_turn(each, keys) for each in messages]


def _transcript(text: str) -> list[dict]:
    speakers, texts = (TRANSCRIPT.split(text)[start::2] for start in (1, 2))
    return [_message(ROLES[who.lower()], said.strip()) for who, said in zip(speakers, texts, strict=True)]


def _exchange(value: object) -> list[Mapping]:
    """A message, or the two of Capybara's form."""
    if not isinstance(value, dict):
        raise ValueError(f"expected a message with role and content, found {value!r:.60}")
    if EXCHANGE[0] not in value or EXCHANGE[1] not in value or value.keys() & TEXTS:
        return [value]
    both = [{"role": role, "content": value[key]} for role, key in zip(("user", "assistant"), EXCHANGE, strict=True)]
    both[1] |= {key: each for key, each in value.items() if key not in EXCHANGE}
    return both


def _others(message: Mapping, keys: Keys) -> dict:
    """A message's keys besides role and text that hold something and are not ignored."""
    return {
        key: value
        for key, value in message.items()
        if key not in TEXTS and key not in keys.ignored and value not in (None, "", [], {})
    }


def _unread(message: Mapping, keys: Keys) -> list[str]:
    return [key for key in _others(message, keys) if key not in (*TRAINED, *MASKED, keys.thought)]


def _refusal(names: Sequence[str]) -> str:
    ignored = ",".join(names)
    if thoughts := [name for name in names if name in THOUGHTS]:
        choice = f"--thought_key {thoughts[0]} puts it into the response as <think>…</think>, --ignore_keys {ignored} "
        return f"its messages have a thought besides their text, {', '.join(names)}: {choice}drops it"
    why = "calls of tools cannot be sampled or trained on here" if {*names} & {*TOOLS} else "records have no such keys"
    return f"its messages have {', '.join(names)}: {why}; --ignore_keys {ignored} drops them"


def _turn(value: Mapping, keys: Keys) -> dict:
    role = value.get("role") or value.get("from")
    text = value["content"] if value.get("content") is not None else value.get("value")
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"role {role!r} is none of {', '.join(ROLES)}")
    turn = _message(ROLES[role], text if isinstance(text, str) else _joined(text))
    if value.keys() <= TEXTS:
        return turn
    others = _others(value, keys)
    if keys.thought in others:
        if turn["role"] != "assistant":
            raise ValueError(f"the {turn['role']}'s turn has a thought, {keys.thought}")
        turn["content"] = _thinking(others.pop(keys.thought), turn["content"])
    for key, flag in others.items():
        if flag not in (0, 1):
            raise ValueError(f"{key} {flag!r:.40}: a turn is trained on (1, true) or not (0, false)")
        trained = bool(flag) != (key in MASKED)
        if turn["role"] == "assistant" and not trained:
            turn[UNTRAINED] = key
        elif turn["role"] != "assistant" and trained:
            raise ValueError(f"by its {key!r} the {turn['role']}'s turn is to be trained on: only responses are")
    return turn


def _joined(text: object) -> object:
    """The text of a list of text parts; other values as they are. Raises ValueError for parts that are not text."""
    if not isinstance(text, list) or not all(isinstance(part, dict) for part in text):
        return text
    if odd := [part for part in text if part.get("type") != "text" or not isinstance(part.get("text"), str)]:
        raise ValueError(f"a message has a part of type {odd[0].get('type')!r}: only text can be read")
    return "".join(part["text"] for part in text)


def _thinking(thought: object, text: str) -> str:
    """A response with its thought, as Qwen3's and DeepSeek's templates write it; a blank one is none."""
    if not isinstance(thought, str):
        raise ValueError(f"the thought is not text: {thought!r:.60}")
    if not thought.strip():
        return text
    if "</think>" in text:
        raise ValueError("a response has a thought in its text, and another one besides")
    thought, text = thought.strip("\n"), text.lstrip("\n")
    return f"<think>\n{thought}\n</think>\n\n{text}"


def _message(role: str, text: object) -> dict:
    if not isinstance(text, str):
        raise ValueError(f"the {role}'s turn is not text: {text!r:.60}")
    return {"role": role, "content": text}


def _past(history: object) -> Sequence:
    if not isinstance(history, Sequence) or isinstance(history, str):
        raise ValueError(f"history: expected a list of pairs of texts, found {history!r:.60}")
    return history


def _both(turn: object) -> Iterator[tuple[str, object]]:
    if not isinstance(turn, Sequence) or isinstance(turn, str) or len(turn) != 2:
        raise ValueError(f"history: expected pairs of texts, found {turn!r:.60}")
    return zip(("user", "assistant"), turn, strict=True)
