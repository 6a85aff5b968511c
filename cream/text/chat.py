"""Messages -> token ids and response spans, by a chat template.

A response that a model sampled is scored and trained on as it was sampled: the ids of the rendered prompt with
generation prompt, those of its text, and the end-of-turn token if it ended by itself. Templates write a turn otherwise
once it is part of a conversation: Qwen3's adds an empty thought, DeepSeek-R1's removes one, Llama-3's trims. A response
from elsewhere (SFT data, imported pairs, options) is written by the template, as the last turn of its conversation.
Loss masks come from spans, never from comparing ids with pad (pad may equal eos). BOS appears only as the template
renders it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from cream.errors import UserError
from cream.records import Message
from cream.text.rendering import PROBE, TEMPLATE_ERRORS, Template
from cream.text.thoughts import USUAL, Tags, opens_thought, split_thought
from cream.text.tokens import Tokens, describe_length, show_spans

NOT_A_PREFIX = "the tokenizer merges the prompt's last token with the response"
REWRITTEN = "the template rewrites the prompt once a response follows"
CLOSED = "the response has a thought, but the template's generation prompt has an empty one already"
UNFINISHED = "the response ends within its thought"


class Chat(Template):
    """A tokenizer with its chat template, checked once on a probe.

    thoughts: what becomes of a response's thought, between `tags`: score it as a part of the response, mask it (it is
    there, and neither scored nor trained on), or drop it. generation_eos: tokens at which generation ends besides.

    Raises UserError if its template is refused (Template), its generation prompt is not a prefix of its conversation
    (but for the beginning of a thought), it does not end a response with a special token (a model could not learn to
    stop), or it renders two BOS.
    """

    def __init__(
        self,
        tokenizer,
        generation_eos: Sequence[int] = (),
        template: Path | None = None,
        variables: Mapping[str, object] | None = None,
        thoughts: str = "score",
        tags: Tags = USUAL,
        literal: bool = False,
    ):
        super().__init__(tokenizer, template, variables, literal)
        self.thoughts, self.tags = thoughts, tags
        prompt, whole = self._render(PROBE[:1], True), self._render(PROBE, False)
        try:
            ids, whole_ids = self._ids([prompt, whole])
        except TEMPLATE_ERRORS as error:  # a wrong type in its configuration, say
            raise UserError(f"{tokenizer.name_or_path}: its tokenizer cannot encode text: {error}") from None
        self.opened = opens_thought(prompt, tags)  # the generation prompt begins a thought
        if not whole.startswith(prompt) and not self.opened:
            raise UserError(self._mismatch(ids, whole_ids))
        before, after = self._around_response(prompt, whole)
        self._lead = self._find_lead(before, whole_ids[len(ids) :])
        eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        stops = {*eos, *generation_eos}
        ends = self._special_in(after)
        self._closing = ends.count(ends[0]) if ends else 0  # 0: the next turn's header ends a response, as GLM-4's
        if not ends and stops:
            followed = self._render([*PROBE, PROBE[0]], False)
            ends = [end for end in self._special_in(self._around_response(prompt, followed)[1])[:1] if end in stops]
        if not ends:
            raise UserError(
                f"{self._name} does not end a response with a special token, so that a model could not learn to stop; "
                "give another with --chat_template FILE"
            )
        self.end_of_turn = ends[0]  # others may close the whole conversation
        self.stop_ids = tuple(sorted({self.end_of_turn, *stops}))
        self._opening = text, opening = self._find_opening(prompt, ids)
        response = PROBE[1].content
        self._separable = self._ids([text + response])[0] == [*opening, *self._bare_ids(response)]

    @property
    def rewrites(self) -> bool:
        """Whether the template writes some response otherwise than it was sampled."""
        thought = "".join((*self.tags[0], "5")) if self.tags else "5"
        texts, complete = ["5", " 5\n", thought, "5"], [True, True, True, False]
        as_sampled, written = (
            self.encode_responses(PROBE[:1], texts, complete, sampled=sampled) for sampled in (True, False)
        )
        return as_sampled != written

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the rendered prompt, the generation prompt included."""
        return self._ids([self._render(messages, True)])[0]

    def encode_responses(
        self,
        prompt: Sequence[Message],
        responses: Sequence[str],
        complete: Sequence[bool],
        prompt_ids: list[int] | None = None,
        *,
        sampled: bool | Sequence[bool] = True,
    ) -> list[Tokens | str]:
        """Each response after the same prompt, or the reason why it has no tokens. `sampled`: by a model, so that its
        text follows the prompt as it is; else the template writes it. One value for all, or one for each.

        A truncated response (`complete` false) gets no end-of-turn token. `prompt_ids`: the ids of `prompt`, if the
        caller has them.
        """
        rendered = self._render(prompt, True)
        ids = prompt_ids or self._ids([rendered])[0]
        texts = list(responses)
        verbatim = [sampled] * len(texts) if isinstance(sampled, bool) else list(sampled)
        found: list[Tokens | str | None] = [None] * len(texts)
        if self.thoughts == "drop":
            for i, text in enumerate(texts):
                split = split_thought(text, self.tags, verbatim[i] and self.opened)
                if split.thought is not None:
                    texts[i], verbatim[i] = split.final.lstrip("\n"), False
                    found[i] = None if split.closed else UNFINISHED
        own = [i for i, each in enumerate(verbatim) if each]
        for i, row in zip(own, self._append(rendered, ids, [self._lead + texts[i] for i in own]), strict=True):
            found[i] = self._close(row, ids, complete[i])
        for i, text in enumerate(texts):
            found[i] = found[i] or self._written(prompt, rendered, ids, text, complete[i])
        return [self._mask(tokens) for tokens in found] if self.thoughts == "mask" else found

    def encode_within_limit(
        self,
        prompt: Sequence[Message],
        responses: Sequence[str],
        complete: Sequence[bool],
        limit: int,
        *,
        sampled: bool | Sequence[bool] = True,
    ) -> list[Tokens | str]:
        """As `encode_responses`, with the reason instead of a row that has more than `limit` tokens."""
        long = describe_length(limit)
        short = [i for i, r in enumerate(responses) if not self.exceeds([*prompt, Message("assistant", r)], limit)]
        texts, whole = [responses[i] for i in short], [complete[i] for i in short]
        sampled = sampled if isinstance(sampled, bool) else [sampled[i] for i in short]
        found = self.encode_responses(prompt, texts, whole, sampled=sampled)
        rows = dict(zip(short, found, strict=True))
        return [
            long if i not in rows or not isinstance(rows[i], str) and len(rows[i]) > limit else rows[i]
            for i in range(len(responses))
        ]

    def encode_written(
        self, prompt: Sequence[Message], responses: Sequence[str], limit: int, opened: bool | None = None
    ) -> list[Tokens | str]:
        """The conversation of each response as the template writes it, all of it, with what follows the end of turn; or
        the reason why it has none of at most `limit` tokens. Its span begins where it parts from the prompt's ids.

        As trl, vLLM and transformers' own chat methods give it to a reward model, which reads its end. Of a response's
        thought the template has what it writes; it is removed first where thoughts are dropped. `opened`: each response
        begins within one; None: as after this template's generation prompt.
        """
        found: list = [self._whole(prompt, response, limit, opened) for response in responses]
        kept = [i for i, whole in enumerate(found) if not isinstance(whole, str)]
        start = self.encode_prompt(prompt) if kept else []
        for i, ids in zip(kept, self._ids([self._render(found[i], False) for i in kept]), strict=True):
            shared = next((k for k, (a, b) in enumerate(zip(ids, start, strict=False)) if a != b), len(start))
            found[i] = Tokens(ids, [(shared, len(ids))]) if len(ids) <= limit else describe_length(limit)
        return found

    def _whole(self, prompt: Sequence[Message], response: str, limit: int, opened: bool | None) -> list[Message] | str:
        """The conversation that the template is to write, or why there is none."""
        split = split_thought(response, self.tags, self.opened if opened is None else opened)
        if self.thoughts == "drop" and split.thought is not None:
            if not split.closed:
                return UNFINISHED
            response = split.final.lstrip("\n")
        whole = [*prompt, Message("assistant", response)]
        return describe_length(limit) if self.exceeds(whole, limit) else whole

    def last_written(self) -> int:
        """The token with which the template ends a conversation, after the end of turn perhaps."""
        return self._ids([self._render(PROBE, False)])[0][-1]

    def encode_conversation(
        self, messages: Sequence[Message], complete: bool = True, sampled: bool = False
    ) -> list[Tokens] | str:
        """A conversation with a span for every assistant turn, or the reason why it has no tokens. `complete` and
        `sampled` are of its last turn, as in `encode_responses`.

        One row, unless the template writes a turn otherwise once another follows: then every turn has a row, in which
        it is the last, as a model that is asked for it sees what is before it.
        """
        rows: list[Tokens] = []
        before = [self._without_thought(message) for message in messages] if self.thoughts == "drop" else messages
        for i, message in enumerate(messages):
            if message.role != "assistant":
                continue
            how = {"sampled": sampled, "complete": [complete]} if i + 1 == len(messages) else {"sampled": False}
            (row,) = self.encode_responses(before[:i], [message.content], **{"complete": [True]} | how)
            if isinstance(row, str):
                return row
            if rows and row.ids[: len(rows[-1])] == rows[-1].ids:
                row = Tokens(row.ids, rows.pop().spans + row.spans)
            rows.append(row)
        return rows

    def _without_thought(self, message: Message) -> Message:
        """A turn of the conversation so far, as it is when thoughts are dropped."""
        split = split_thought(message.content, self.tags)
        if message.role != "assistant" or split.thought is None:
            return message
        return Message(message.role, split.final.lstrip("\n"))

    def response_starts(self, ids: Sequence[int]) -> list[int]:
        """Where responses begin in a conversation's ids: after what every generation prompt ends with."""
        opening = self._opening[1]
        ends = (i + len(opening) for i in range(len(ids) - len(opening)) if ids[i] == opening[0])
        return [end for end in ends if ids[end - len(opening) : end] == opening]

    def thought_tokens(self, ids: Sequence[int], text: str | None = None) -> int | None:
        """How many of a response's ids are its thought, the tags included; None if it has none. All of them, if it ends
        within. `text`: that of the ids, without special tokens perhaps."""
        marks = (tag for pair in self.tags for tag in pair)
        if text is not None and not (self.opened or self.special.intersection(ids) or any(m in text for m in marks)):
            return None
        text = self.decode(ids)
        split = split_thought(text, self.tags, self.opened)
        if split.thought is None or not split.closed:
            return None if split.thought is None else len(ids)
        end = max(text.rfind(closing) + len(closing) for _, closing in self.tags if closing in text)
        low, high = 0, len(ids)
        while low < high:  # the first place whose text has the closing tag
            middle = (low + high) // 2
            low, high = (low, middle) if len(self.decode(ids[:middle])) >= end else (middle + 1, high)
        return low

    def thought_marks(self) -> set[int]:
        """The special tokens among the tags of thoughts."""
        tags = [tag for pair in self.tags for tag in pair]
        return {token for row in self._ids(tags) for token in row} & self.special

    def _mask(self, tokens: Tokens | str) -> Tokens | str:
        """The tokens without the thought of their last span as a part of that span."""
        if isinstance(tokens, str):
            return tokens
        *others, (start, end) = tokens.spans
        thought = self.thought_tokens(tokens.ids[start:end]) or 0
        return UNFINISHED if 0 < thought == end - start else Tokens(tokens.ids, [*others, (start + thought, end)])

    def _written(
        self, prompt: Sequence[Message], rendered: str, ids: list[int], response: str, complete: bool
    ) -> Tokens | str:
        """A response as the template writes it after `prompt`, which is `rendered` and has these ids."""
        whole = self._render([*prompt, Message("assistant", response)], False)
        if whole.startswith(rendered):
            (row,) = self._append(rendered, ids, [whole[len(rendered) :]])
            if row is None or not self._closing:
                return self._close(row, ids, complete)
            ends = [i for i in range(len(ids), len(row)) if row[i] == self.end_of_turn]
            if len(ends) < self._closing:
                return REWRITTEN
            end = ends[-self._closing] + complete
            return Tokens(row[:end], [(len(ids), end)])
        thought = split_thought(response, self.tags).thought
        if not opens_thought(rendered, self.tags):
            return REWRITTEN if thought is None else CLOSED
        # The template, such as DeepSeek-R1's, opens a thought for a response that it would write without one.
        opening, closing = next(pair for pair in self.tags if rendered.rstrip().endswith(pair[0]))
        line = rendered[len(rendered.rstrip()) :]
        empty = f"{line}{closing}{line}{line}{response}"
        text = empty if thought is None else response.lstrip().removeprefix(opening).lstrip("\n")
        return self._close(self._append(rendered, ids, [text])[0], ids, complete)

    def _close(self, row: list[int] | None, prompt: list[int], complete: bool) -> Tokens | str:
        """A prompt and the response after it, with its end of turn if it is complete."""
        if row is None:
            return NOT_A_PREFIX
        row = [*row, self.end_of_turn] if complete else row
        return Tokens(row, [(len(prompt), len(row))])

    def _append(self, rendered: str, ids: list[int], texts: Sequence[str]) -> list[list[int] | None]:
        """The ids of each text after a prompt's, which is tokenised once for all.

        Both are tokenised together, from the prompt's last special token on, across which nothing merges. Where they
        would merge all the same, the text is tokenised by itself: a model that is given the prompt's ids cannot write
        otherwise. None with tokenizers that put a space before such a text.
        """
        text, opening = self._opening
        if not rendered.endswith(text) or ids[-len(opening) :] != opening:
            text, opening = rendered, ids
        before, found = ids[: len(ids) - len(opening)], []
        for row, added in zip(self._ids([text + added for added in texts]), texts, strict=True):
            if row[: len(opening)] == opening:
                found.append(before + row)
            else:
                found.append([*ids, *self._bare_ids(added)] if self._separable else None)
        return found

    def _find_opening(self, rendered: str, prompt: list[int]) -> tuple[str, list[int]]:
        """The end of every prompt, from its last special token on, given the probe's: as text and ids."""
        at = max((i for i, token in enumerate(prompt) if token in self.special), default=0)
        text = rendered[max(0, rendered.rfind(self.tokenizer.convert_ids_to_tokens(prompt[at]))) :]
        return (text, prompt[at:]) if self._ids([text])[0] == prompt[at:] else (rendered, prompt)

    def _find_lead(self, before: str, response: list[int]) -> str:
        """The space that the template writes before a response, and decoding removes from one: Llama-2's."""
        return before if before.isspace() and not self.decode(response).startswith(before) else ""

    def _around_response(self, prompt: str, whole: str) -> tuple[str, str]:
        """The texts that the template writes before the probe's response, after its generation prompt, and after it."""
        question, response = (message.content for message in PROBE)
        at, start = whole.rfind(response), whole.find(question)
        if start < 0 or at < start + len(question):
            raise UserError(
                f"{self._name} does not render the assistant's response; give another with --chat_template FILE"
            )
        before = whole[len(prompt) : whole.find(response, len(prompt))] if whole.startswith(prompt) else ""
        return before, whole[at + len(response) :]

    def _mismatch(self, prompt: list[int], ids: list[int]) -> str:
        at = next((i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), min(len(prompt), len(ids)))
        show = self.tokenizer.convert_ids_to_tokens
        return (
            f"{self._name}'s prompt is not a prefix of its conversation: after "
            f"{at} equal tokens the prompt has {show(prompt[at : at + 4])}, the conversation {show(ids[at : at + 4])}; "
            "give another with --chat_template FILE"
        )

    def show(self, tokens: Tokens) -> str:
        """The tokens as text, the scored ones between ⟦ and ⟧."""
        return show_spans(self.tokenizer, tokens)
