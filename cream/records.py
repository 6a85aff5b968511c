"""The typed records that stages exchange; decoding validates them.

The JSON layouts are those of the released CREAM data. In a `.json` file a record is the value of its uuid (evaluation
data: an element of a list, with a `uuid` key); in a `.jsonl` file it is one line with its `uuid`. Keys that are not in
the layout are kept in `extra` and written out again.
"""

import re
from functools import cache
from typing import Annotated, Literal, TypeVar

import msgspec

from cream.errors import UserError

Count = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
Finite = Annotated[float, msgspec.Meta(ge=-1e300, le=1e300)]  # so that sums of them are finite
Probability = Annotated[float, msgspec.Meta(ge=0, le=1)]
Text = Annotated[str, msgspec.Meta(pattern=r"\S")]  # not blank
Role = Literal["system", "user", "assistant"]
FinishReason = Literal["stop", "stop_string", "length"]
METHODS = ("original", "consistency_avg", "consistency_dyn")  # the C that DPO trains with; recorded with the pairs
RANKS = ("kendall", "spearman", "toporder")  # measures of the agreement of two rankings; recorded with the pairs


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One turn of a conversation. Other keys are refused, unless they are null (`decode`): they would be lost, and may
    change what it means."""

    role: Role
    content: str

    def __post_init__(self):
        if self.role == "user" and not self.content.strip():
            raise ValueError("a user's turn is empty")


def _check_turns(messages: list[Message]) -> None:
    """[system] user (assistant user)* [assistant], as every chat template expects."""
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    if not turns:
        raise ValueError("a conversation needs at least one user turn")
    for index, message in enumerate(turns):
        expected = ("user", "assistant")[index % 2]
        if message.role != expected:
            raise ValueError(f"turn {index} is the {message.role}'s, expected the {expected}'s")


def _check_prompt(messages: list[Message] | None) -> None:
    """[system] user (assistant user)*, or None."""
    if messages is not None:
        _check_turns(messages)
        if messages[-1].role != "user":
            raise ValueError("a prompt ends with a user's turn; this one already has its response")


class Record(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A record's uuid, and the keys that are not in its layout."""

    uuid: str = ""
    extra: dict = {}


class Conversation(Record, kw_only=True):
    """SFT data: a conversation that ends with an assistant's turn. Every assistant turn is trained on, with `only_last`
    the last one alone."""

    messages: list[Message]
    only_last: bool = False

    def __post_init__(self):
        _check_turns(self.messages)
        if self.messages[-1].role != "assistant":
            raise ValueError("the conversation ends without an assistant's turn")


class Prompt(Record, kw_only=True):
    """Unlabelled prompt: a conversation that ends with a user's turn."""

    messages: list[Message]

    def __post_init__(self):
        _check_prompt(self.messages)


class Samples(Record, kw_only=True):
    """Sampling output. Lists have an entry per response; without `finish_reason` all responses stopped.

    A response whose `finish_reason` is "stop_string" has the string of --stop, and no end-of-turn token.
    `source_prompt` is the prompt without the text of --sysprompt, absent if it equals `prompt`. `logprob` is the
    sampler's own, summed over the response, in nats. `thought_tokens` and `special_tokens` are how many of the sampled
    tokens are of its thought (null: it has none), and special ones before its end; absent if there are none.
    `thought_opened` says that the prompt ends with the tag that opens the thought.
    """

    prompt: list[Message]
    responses: list[str]
    finish_reason: list[FinishReason] | None = None
    num_tokens: list[Count] | None = None
    logprob: list[Finite | None] | None = None
    thought_tokens: list[Count | None] | None = None
    special_tokens: list[Count] | None = None
    thought_opened: bool = False
    source_prompt: list[Message] | None = None

    def __post_init__(self):
        _check_prompt(self.prompt)
        _check_prompt(self.source_prompt)
        own = ("finish_reason", "num_tokens", "logprob", "thought_tokens", "special_tokens")
        _check_parallel(self, "responses", own)


class Rewards(Record, kw_only=True):
    """Rewarding output. `response` holds full conversations; other lists have an entry per response, null = no reward.

    `score` and `ref_score` are the log-probabilities of rewards computed from them. Other rewards have their numbers in
    `parts` (name -> per response a number, or a list of numbers) and their texts in `texts`; `preferences`[i][j] is the
    probability that response i is better than j, null if unknown. `logprob` is the sampler's, copied from the samples:
    the behaviour policy of a policy gradient, and never the reference of DPO.
    """

    prompt: list[Message]
    response: list[list[Message]]
    score: list[Finite | None] | None = None
    ref_score: list[Finite | None] | None = None
    reward: list[Finite | None]
    reason: list[str | None] | None = None
    finish_reason: list[FinishReason] | None = None
    num_tokens: list[Count] | None = None
    logprob: list[Finite | None] | None = None
    source_prompt: list[Message] | None = None
    parts: dict[str, list[Finite | list[Finite | None] | None]] = {}
    texts: dict[str, list[str | None]] = {}
    preferences: list[list[Probability | None]] | None = None

    def __post_init__(self):
        _check_prompt(self.prompt)
        _check_prompt(self.source_prompt)
        own = ("score", "ref_score", "reward", "reason", "finish_reason", "num_tokens", "logprob", "preferences")
        _check_parallel(self, "response", own)
        count = len(self.response)
        for name in ("parts", "texts"):
            if odd := [key for key, values in getattr(self, name).items() if len(values) != count]:
                raise ValueError(f"`{name}.{odd[0]}` has another number of entries than `response`, {count}")
        for i, row in enumerate(self.preferences or ()):
            if len(row) != count or row[i] is not None:
                raise ValueError(f"`preferences` should be {count} x {count}, null on its diagonal")
        for index, conversation in enumerate(self.response):
            if conversation[:-1] != self.prompt or conversation[-1].role != "assistant":
                raise ValueError(f"response {index} is not this prompt followed by one assistant's turn")

    def responses(self) -> list[str]:
        """The responses without the prompt."""
        return [conversation[-1].content for conversation in self.response]


class Pair(Record, kw_only=True):
    """A preference pair; `selected` is the chosen response.

    `consistency` is the confidence in [0, 1] that `selected` is the better one: the prompt's C, the probability of a
    pseudo-label, 1/2 for "equally good"; null if unknown. `selected_truncated` and `rejected_truncated` say that the
    response has no end-of-turn token (it is truncated, or a stop string ended it): none is scored or trained on.
    `source_prompt` is the prompt before --sysprompt, absent where it is `prompt`.
    """

    prompt: list[Message]
    selected: list[Message]
    rejected: list[Message]
    consistency: Probability | None = msgspec.field(default_factory=lambda: None)  # written even if null
    tau: Annotated[float, msgspec.Meta(ge=-1.000001, le=1.000001)] | None = None  # τ or ρ, up to rounding
    selected_index: Count | None = None
    rejected_index: Count | None = None
    margin: Finite | None = None
    selected_logp: Finite | None = None
    rejected_logp: Finite | None = None
    selected_truncated: bool = False
    rejected_truncated: bool = False
    source_prompt: list[Message] | None = None

    @property
    def sampled(self) -> tuple[bool, bool]:
        """Whether `selected` and `rejected` are known to be a model's samples; those of an imported pair may be from
        anywhere, and SPIN's `selected` is from SFT data."""
        return (
            self.selected_index is not None or self.selected_logp is not None,
            self.rejected_index is not None or self.rejected_logp is not None,
        )

    @property
    def ordered(self) -> tuple[str, str] | None:
        """The better and the worse response: `rejected` is the better one where `consistency` is below 1/2; None at
        1/2, where neither is."""
        texts = self.selected[-1].content, self.rejected[-1].content
        c = 1.0 if self.consistency is None else self.consistency
        return None if c == 0.5 else texts if c > 0.5 else texts[::-1]

    def __post_init__(self):
        for name in ("selected", "rejected"):
            conversation = getattr(self, name)
            _check_turns(conversation)
            if conversation[:-1] != self.prompt or conversation[-1].role != "assistant":
                raise ValueError(f"`{name}` is not this prompt followed by one assistant's turn")


class Ratings(Record, kw_only=True):
    """A rated response: a conversation that ends with an assistant's turn, and the number of each attribute.

    `ratings` maps an attribute (helpsteer-helpfulness) to a number in its data set's scale, usually [0, 1]; null, or an
    absent attribute: nobody rated it.
    """

    messages: list[Message]
    ratings: dict[str, Finite | None]

    def __post_init__(self):
        _check_turns(self.messages)
        if self.messages[-1].role != "assistant":
            raise ValueError("the conversation ends without an assistant's turn")
        if all(value is None for value in self.ratings.values()):
            raise ValueError("`ratings` has no number")


class Steps(Record, kw_only=True):
    """A response in steps, and for each the probability that it is right.

    `labels` has an entry per step: 1 right, 0 wrong, between them a share (of completions from there that reach the
    right answer), null where nobody labelled it. The label of a whole response is that of its last step.
    """

    prompt: list[Message]
    steps: Annotated[list[Text], msgspec.Meta(min_length=1)]
    labels: list[Probability | None]

    def __post_init__(self):
        _check_prompt(self.prompt)
        _check_parallel(self, "steps", ("labels",))
        if all(label is None for label in self.labels):
            raise ValueError("no step has a label")


class Item(Record, kw_only=True):
    """Evaluation data: a question with the lettered options inside it, and the label (a letter or a number)."""

    question: Text
    label: Text | Annotated[int, msgspec.Meta(ge=-(10**18), le=10**18)] | Finite
    task: str | None = None
    grader: Literal["math"] | None = None  # what compares its answers; none: the rule of its task


FIRSTS = {  # of an answer: a key that is the first entry of another
    "responses": "all_responses",
    "finish_reason": "all_finish_reasons",
    "num_tokens": "all_num_tokens",
    "thought_tokens": "all_thought_tokens",
}
GRADED = ("all_predictions", "all_correct")


class Answer(Item, kw_only=True):
    """Evaluation output: the item with the model's response (`responses`, one text, as the released code spells it).

    Of several responses to one question, `responses`, `finish_reason` and `num_tokens` are the first one's; the lists
    have all of them; `final_prediction` is the answer of most, `correct` whether it is right. If options were compared,
    `option_logprob` (label -> log π) and `option_tokens` (label -> number of scored tokens) have all of them.
    `thought_tokens` is the thought's part of `num_tokens` (null: there is none); `thought_opened` says that the
    prompt ended with the tag that opens it.
    """

    responses: str
    final_prediction: str
    correct: bool
    finish_reason: FinishReason | None = None
    num_tokens: Count | None = None
    thought_tokens: Count | None = None
    thought_opened: bool = False
    all_responses: Annotated[list[str], msgspec.Meta(min_length=2)] | None = None
    all_predictions: list[str] | None = None
    all_correct: list[bool] | None = None
    all_finish_reasons: list[FinishReason] | None = None
    all_num_tokens: list[Count] | None = None
    all_thought_tokens: list[Count | None] | None = None
    option_logprob: dict[str, Finite] | None = None
    option_tokens: dict[str, Count] | None = None

    def __post_init__(self):
        options, tokens = self.option_logprob, self.option_tokens
        if options is not None or tokens is not None:
            if options is None or tokens is None or options.keys() != tokens.keys():
                raise ValueError("`option_logprob` and `option_tokens` are not of the same options")
            if 0 in tokens.values():
                raise ValueError("an option in `option_tokens` has no token")
        given = [name for name in (*FIRSTS.values(), *GRADED) if getattr(self, name) is not None]
        if not given:
            return
        for name in ("all_responses", *GRADED):
            if name not in given:
                raise ValueError(f"`{given[0]}` needs `{name}`")
        _check_parallel(self, "all_responses", tuple(given))
        for one, name in FIRSTS.items():
            if name in given and getattr(self, name)[0] != getattr(self, one):
                raise ValueError(f"`{one}` is not the first of `{name}`")


def ended_turn(reason: FinishReason | None) -> bool:
    """Whether a response ended with its end-of-turn token, by its `finish_reason`; None: it did. After any other, no
    such token is scored or trained on, since none was sampled."""
    return reason in (None, "stop")


R = TypeVar("R", bound=Record)
AS_LIST = (Conversation, Prompt)  # their value in a .json file is the bare list of messages


def _check_parallel(record: Record, of: str, names: tuple[str, ...]) -> None:
    count = len(getattr(record, of))
    for name in names:
        values = getattr(record, name)
        if values is not None and len(values) != count:
            raise ValueError(f"`{name}` has {len(values)} entries for {count} in `{of}`")


def decode(kind: type[R], uuid: str, value: object, where: str) -> R:
    """The record in `value` (plain JSON values). Raises UserError with `where` (the file), the uuid and JSON path."""
    if kind in AS_LIST and isinstance(value, list):
        value = {"messages": value}
    if not uuid.strip():
        raise UserError(f"{where}: a record's uuid is blank")
    fields = value
    if isinstance(value, dict) and not value.keys() <= _own_keys(kind):
        fields = {key: v for key, v in value.items() if key in _own_keys(kind)}
    try:
        record = _convert(fields, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        shown, layout = _found(fields, str(error)), kind.__doc__.strip().splitlines()[0]
        raise UserError(f"{where}: record {uuid!r}: {error}{shown} (expected: {layout})") from None
    record.uuid = uuid
    record.extra = {key: v for key, v in value.items() if key not in fields} if fields is not value else {}
    return record


@cache
def _own_keys(kind: type[Record]) -> frozenset[str]:
    """The keys of a layout; a user's own key may be called `extra`."""
    return frozenset(kind.__struct_fields__) - {"extra"}


def _convert(fields: object, kind: type[R]) -> R:
    """The record in these fields; a message's key that is null says nothing (`name`, as others write messages)."""
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        if "unknown field" not in str(error):
            raise
    return msgspec.convert({name: _without_nulls(value) for name, value in fields.items()}, kind)


def _without_nulls(value: object) -> object:
    """The messages in a list without other keys that are null; other values as they are."""
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        return value
    own = Message.__struct_fields__
    return [{key: v for key, v in each.items() if v is not None or key in own} for each in value]


def _found(value: object, error: str) -> str:
    """', found …' with the value, if short, at the JSON path at the end of a message."""
    if not error.endswith("`") or "at `$" not in error:
        return ""
    try:
        for key, index in re.findall(r"\.(\w+)|\[(\d+)\]", error.rpartition("at `$")[2]):
            value = value[key] if key else value[int(index)]
    except (KeyError, IndexError, TypeError):
        return ""
    shown = repr(value)
    return f", found {shown}" if len(shown) < 60 else ""


def encode(record: Record) -> dict:
    """Plain JSON values of a record, `uuid` first, extra keys last; an extra key with a field's name, copied from a
    record of another layout, becomes `input_<name>`."""
    value = msgspec.to_builtins(record)
    own = _own_keys(type(record))
    extra = {f"input_{key}" if key in own else key: v for key, v in value.pop("extra", {}).items()}
    return {"uuid": record.uuid, **value, **extra}


DISTINCT = {"selected": Pair, "reward": Rewards, "final_prediction": Answer, "ratings": Ratings, "steps": Steps}


WORDS = {  # what messages call the records of a layout
    Conversation: "conversation{s}",
    Prompt: "prompt{s}",
    Samples: "prompt{s} with responses",
    Rewards: "prompt{s} with rewards",
    Pair: "preference pair{s}",
    Ratings: "rated response{s}",
    Steps: "response{s} in steps",
    Item: "question{s} with labels",
    Answer: "graded response{s}",
}


def nouns(kind: type[Record]) -> str:
    """Records of a layout in words."""
    return WORDS[kind].format(s="s")


def counted(count: int, kind: type[Record]) -> str:
    """So many records of a layout in words."""
    return f"{count} {WORDS[kind].format(s='s' * (count != 1))}"


def kind_of(value: object) -> type[Record] | None:
    """The layout of one raw record, by its distinguishing keys; None if it has none of these."""
    if isinstance(value, list):
        value = {"messages": value}
    if not isinstance(value, dict):
        return None
    for key, kind in DISTINCT.items():
        if key in value:
            return kind
    if "responses" in value and "prompt" in value:
        return Samples
    if "question" in value:
        return Item
    messages = value.get("messages")
    if isinstance(messages, list) and messages and isinstance(messages[-1], dict):
        return Conversation if messages[-1].get("role") == "assistant" else Prompt
    return None
