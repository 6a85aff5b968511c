"""Messages -> token ids and response spans, by a chat template.

A response's span has the ids of the rendered conversation after those of the rendered prompt with generation prompt, up
to and including the end-of-turn token, without whitespace that the template adds after it. Loss masks come from spans,
never from comparing ids with pad (pad may equal eos). BOS appears only as the template renders it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cream.errors import UserError
from cream.records import Message
from cream.text.templates import check_numbers, limit_rendering, probe_in_subprocess
from cream.text.tokens import Tokens, describe_length, show_spans

NOT_A_PREFIX = "the template or tokenizer merges the prompt's last token with the response"
TEMPLATE_ERRORS = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)
PROBE = [Message("user", "What is 2 + 3?"), Message("assistant", "5")]
HUGE = 1 << 20  # characters; for a longer text the number of tokens in its beginning may suffice


class Chat:
    """A tokenizer with its chat template, checked once on a probe.

    Raises UserError if there is no template, its prompt is not a prefix of its conversation, it does not end a response
    with a special token (a model could not learn to stop), or it renders two BOS.
    """

    def __init__(self, tokenizer, generation_eos: Sequence[int] = (), template: Path | None = None):
        self.tokenizer = tokenizer
        self._name = f"{template or tokenizer.name_or_path}: {'the' if template else 'its'} chat template"
        if not tokenizer.chat_template:
            raise UserError(
                f"{tokenizer.name_or_path}: the tokenizer has no chat template; give the one this model was trained "
                "with: --chat_template FILE (Jinja)"
            )
        self.special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special} | {
            *tokenizer.all_special_ids
        }
        probe_in_subprocess(lambda: [self._render(PROBE[:1], True), self._render(PROBE, False)], self._name)
        with self._explain_errors():
            check_numbers(tokenizer.get_chat_template(), self._name)
        try:
            prompt, ids = self._ids([self._render(PROBE[:1], True), self._render(PROBE, False)])
        except TEMPLATE_ERRORS as error:  # a wrong type in its configuration, say
            raise UserError(f"{tokenizer.name_or_path}: its tokenizer cannot encode text: {error}") from None
        if ids[: len(prompt)] != prompt:
            raise UserError(self._mismatch(prompt, ids))
        ends = [token for token in self._ids([self._after_response()])[0] if token in self.special]
        if not ends:
            raise UserError(
                f"{self._name} does not end a response with a special token, so that a model could not learn to stop; "
                "give another with --chat_template FILE"
            )
        self.end_of_turn = ends[0]  # others may close the whole conversation
        eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.stop_ids = tuple(sorted({self.end_of_turn, *eos, *generation_eos}))
        self._opening = self._find_opening(prompt)

    def exceeds(self, messages: Sequence[Message], limit: int) -> bool:
        """Whether a huge conversation certainly has more than `limit` tokens. Tokenising all of it would take 100 times
        its size in memory. False for all others: count their tokens."""
        if sum(len(message.content) for message in messages) <= HUGE:
            return False
        text = "\n".join(message.content.strip() for message in messages)  # templates may strip them, too
        return len(self._ids([text[:HUGE]])[0]) > limit + 1  # the last one may be incomplete

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the rendered prompt, the generation prompt included."""
        return self._ids([self._render(messages, True)])[0]

    def encode_responses(
        self,
        prompt: Sequence[Message],
        responses: Sequence[str],
        complete: Sequence[bool],
        prompt_ids: list[int] | None = None,
    ) -> list[Tokens | None]:
        """Each response after the same prompt, as the template renders the conversation.

        A truncated response (`complete` false) gets no end-of-turn token. None where the prompt's ids are not a prefix
        of the conversation's (reason: NOT_A_PREFIX). `prompt_ids`: the ids of `prompt`, if the caller has them.
        """
        rendered = self._render(prompt, True)
        texts = [self._render([*prompt, Message("assistant", response)], False) for response in responses]
        text, opening = self._opening
        first = [] if prompt_ids else [rendered]  # for short texts one call of the tokenizer is cheaper than two
        if apart := rendered.endswith(text) and all(t.startswith(rendered) for t in texts):
            texts, wholes = [t[len(rendered) - len(text) :] for t in texts], texts
        rows = self._ids([*first, *texts])
        ids = prompt_ids or rows.pop(0)
        if apart and ids[-len(opening) :] == opening:
            rows = [ids[: -len(opening)] + row for row in rows]  # nothing merges across a special token
        elif apart:
            rows = self._ids(wholes)
        return [self._span(ids, row, whole) for row, whole in zip(rows, complete, strict=True)]

    def encode_within_limit(
        self, prompt: Sequence[Message], responses: Sequence[str], complete: Sequence[bool], limit: int
    ) -> list[Tokens | str]:
        """As `encode_responses`, with the reason instead of a row that is None or has more than `limit` tokens."""
        long = describe_length(limit)
        short = [i for i, r in enumerate(responses) if not self.exceeds([*prompt, Message("assistant", r)], limit)]
        found = self.encode_responses(prompt, [responses[i] for i in short], [complete[i] for i in short])
        rows = dict(zip(short, found, strict=True))
        return [
            long if i not in rows or len(rows[i] or ()) > limit else rows[i] or NOT_A_PREFIX
            for i in range(len(responses))
        ]

    def encode_conversation(self, messages: Sequence[Message]) -> Tokens | None:
        """A conversation with a span for every assistant turn; None if a turn's prompt is not a prefix of it (some
        templates change earlier turns)."""
        turns = [i for i, message in enumerate(messages) if message.role == "assistant"]
        texts = [self._render(messages[:i], True) for i in turns]
        texts += [self._render(messages[: i + 1], False) for i in turns]
        rows = self._ids(texts)
        prompts, wholes = rows[: len(turns)], rows[len(turns) :]
        parts = [self._span(p, ids, True) for p, ids in zip(prompts, wholes, strict=True)]
        if any(part is None or wholes[-1][: len(part)] != part.ids for part in parts):
            return None
        return Tokens(parts[-1].ids, [part.spans[0] for part in parts])

    def _find_opening(self, prompt: list[int]) -> tuple[str, list[int]]:
        """The end of every prompt, from its last special token on, given the probe's ids: as text and ids."""
        rendered = self._render(PROBE[:1], True)
        at = max((i for i, token in enumerate(prompt) if token in self.special), default=0)
        text = rendered[max(0, rendered.rfind(self.tokenizer.convert_ids_to_tokens(prompt[at]))) :]
        return (text, prompt[at:]) if self._ids([text])[0] == prompt[at:] else (rendered, prompt)

    def _after_response(self) -> str:
        """The text that the template writes after the probe's response."""
        whole, start = self._render(PROBE, False), len(self._render(PROBE[:1], True))
        if PROBE[1].content not in whole[start:]:
            raise UserError(
                f"{self._name} does not render the assistant's response; give another with --chat_template FILE"
            )
        return whole[whole.rindex(PROBE[1].content, start) + len(PROBE[1].content) :]

    def _span(self, prompt: list[int], ids: list[int], complete: bool) -> Tokens | None:
        start = len(prompt)
        if ids[:start] != prompt or self.end_of_turn not in ids[start:]:
            return None
        last = len(ids) - 1 - ids[::-1].index(self.end_of_turn)
        end = last + 1 if complete else last
        return Tokens(ids[:end], [(start, end)])

    def _render(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        plain = [{"role": m.role, "content": m.content} for m in messages]
        apply = self.tokenizer.apply_chat_template
        with self._explain_errors():
            text = apply(plain, tokenize=False, add_generation_prompt=generation_prompt)
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"{self._name} renders text that is not valid Unicode (a lone surrogate)") from None
        return text

    @contextmanager
    def _explain_errors(self) -> Iterator[None]:
        """Within it a template has limits on time and memory, and its errors become UserErrors."""
        from jinja2 import TemplateError

        try:
            with limit_rendering(self._name):
                yield
        except (TemplateError, *TEMPLATE_ERRORS) as error:
            raise UserError(f"{self._name} refuses a conversation: {error}") from None

    def _ids(self, texts: list[str]) -> list[list[int]]:
        rows = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        bos = self.tokenizer.bos_token_id
        if bos is not None and bos != self.tokenizer.eos_token_id and any(ids[:2] == [bos, bos] for ids in rows):
            raise UserError(f"{self._name} renders two BOS tokens; a model expects one")
        return rows

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
