"""Messages, or plain text -> token ids and answer spans. The one place that knows about chat templates.

An answer's span is the ids of the rendered conversation after the ids of the rendered prompt with generation prompt, up
to and including the end-of-turn token; whitespace that a template adds after it is not in the span. Masks come from
spans, never from comparing ids with pad (pad may equal eos). BOS appears only as the template renders it; before plain
text as the tokenizer puts it.
"""

from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import xxhash

from cream.errors import UserError
from cream.records import Message
from cream.text.templates import check_numbers, limited, tried

NOT_A_PREFIX = "the template or tokenizer merges the prompt's last token with the answer"
WRONG = (
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
)  # what a template may raise
PROBE = [Message("user", "What is 2 + 3?"), Message("assistant", "5")]
HUGE = 1 << 20  # characters; that a longer text has too many tokens is seen by those of its beginning


@dataclass(slots=True, frozen=True)
class Tokens:
    """Ids of a rendered conversation and, per assistant turn, the half-open span [start, end) of its answer tokens.

    >>> Tokens(ids=[1, 7, 8, 9, 2], spans=[(3, 5)])  # BOS, two prompt tokens, one answer token, end of turn
    """

    ids: list[int]
    spans: list[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_answer_tokens(self) -> int:
        """How many tokens are scored or trained on."""
        return sum(end - start for start, end in self.spans)

    def digest(self) -> str:
        """16 hex digits of xxh3-64 over ids and spans: equal for equal tokens of which the same are scored."""
        flat = array("q", [*self.ids, -1, *(end for span in self.spans for end in span)])
        return xxhash.xxh3_64_hexdigest(flat.tobytes())

    def predicted(self) -> list[int]:
        """Indices of the tokens that are scored or trained on; the very first token has nothing to predict it."""
        return [t for start, end in self.spans for t in range(max(start, 1), end)]


def longer(limit: int) -> str:
    """Why something is dropped that has too many tokens."""
    return f"longer than {limit} tokens"


class Chat:
    """A tokenizer with its chat template, checked once on a probe.

    Raises UserError when there is no template, when the template's prompt is not a prefix of its conversation, when it
    ends an answer with no special token (a model could not learn to stop), or when it renders two BOS.
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
        tried(lambda: [self._render(PROBE[:1], True), self._render(PROBE, False)], self._name)
        with self._limited():
            check_numbers(tokenizer.get_chat_template(), self._name)
        try:
            prompt, ids = self._ids([self._render(PROBE[:1], True), self._render(PROBE, False)])
        except WRONG as error:  # a number in its configuration is none, say
            raise UserError(f"{tokenizer.name_or_path}: its tokenizer takes no text: {error}") from None
        if ids[: len(prompt)] != prompt:
            raise UserError(self._mismatch(prompt, ids))
        ends = [token for token in self._ids([self._after_answer()])[0] if token in self.special]
        if not ends:
            raise UserError(
                f"{self._name} ends an answer with no special token, so that a model "
                "could not learn to stop; give another with --chat_template FILE"
            )
        self.end_of_turn = ends[0]  # others may close the whole conversation
        eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.stop_ids = tuple(sorted({self.end_of_turn, *eos, *generation_eos}))
        self._opening = self._find_opening(prompt)

    def exceeds(self, messages: Sequence[Message], limit: int) -> bool:
        """Whether a huge conversation surely has more than `limit` tokens; to tokenise all of it would take 100 times
        its size in memory. False of any other one: its tokens have to be counted."""
        if sum(len(message.content) for message in messages) <= HUGE:
            return False
        text = "\n".join(message.content.strip() for message in messages)  # templates may strip them, too
        return len(self._ids([text[:HUGE]])[0]) > limit + 1  # the last one may be cut

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the rendered prompt, the generation prompt included."""
        return self._ids([self._render(messages, True)])[0]

    def answers(
        self,
        prompt: Sequence[Message],
        answers: Sequence[str],
        complete: Sequence[bool],
        prompt_ids: list[int] | None = None,
    ) -> list[Tokens | None]:
        """Each answer after the same prompt, as the template renders the conversation.

        An answer that did not end by itself (`complete` false) gets no end-of-turn token. None stands where the
        prompt's ids are no prefix of the conversation's (reason: NOT_A_PREFIX). `prompt_ids`: those of `prompt`, from a
        caller who has them.
        """
        rendered = self._render(prompt, True)
        texts = [self._render([*prompt, Message("assistant", answer)], False) for answer in answers]
        text, opening = self._opening
        known = [] if prompt_ids else [rendered]  # of short texts a call of the tokenizer costs more than they do
        if apart := rendered.endswith(text) and all(t.startswith(rendered) for t in texts):
            texts, wholes = [t[len(rendered) - len(text) :] for t in texts], texts
        rows = self._ids([*known, *texts])
        ids = prompt_ids or rows.pop(0)
        if apart and ids[-len(opening) :] == opening:
            rows = [ids[: -len(opening)] + row for row in rows]  # nothing merges across a special token
        elif apart:
            rows = self._ids(wholes)
        return [self._span(ids, row, whole) for row, whole in zip(rows, complete, strict=True)]

    def fitting(
        self, prompt: Sequence[Message], answers: Sequence[str], complete: Sequence[bool], limit: int
    ) -> list[Tokens | str]:
        """As `answers`, with the reason in place of those that are None, or have more than `limit` tokens."""
        long = longer(limit)
        short = [i for i, a in enumerate(answers) if not self.exceeds([*prompt, Message("assistant", a)], limit)]
        found = self.answers(prompt, [answers[i] for i in short], [complete[i] for i in short]) if short else []
        rows = dict(zip(short, found, strict=True))
        return [
            long if i not in rows or len(rows[i] or ()) > limit else rows[i] or NOT_A_PREFIX
            for i in range(len(answers))
        ]

    def conversation(self, messages: Sequence[Message]) -> Tokens | None:
        """A conversation with a span for every assistant turn; None when a turn's prompt is no prefix of it (some
        templates rewrite earlier turns)."""
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
        """What every prompt ends with, from its last special token on, given the probe's ids: text and ids."""
        rendered = self._render(PROBE[:1], True)
        at = max((i for i, token in enumerate(prompt) if token in self.special), default=0)
        text = rendered[max(0, rendered.rfind(self.tokenizer.convert_ids_to_tokens(prompt[at]))) :]
        return (text, prompt[at:]) if self._ids([text])[0] == prompt[at:] else (rendered, prompt)

    def _after_answer(self) -> str:
        """What the template writes after the probe's answer."""
        whole, start = self._render(PROBE, False), len(self._render(PROBE[:1], True))
        if PROBE[1].content not in whole[start:]:
            raise UserError(f"{self._name} leaves out the assistant's answer; give another with --chat_template FILE")
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
        with self._limited():
            text = apply(plain, tokenize=False, add_generation_prompt=generation_prompt)
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"{self._name} makes text that is no Unicode (a lone surrogate)") from None
        return text

    @contextmanager
    def _limited(self) -> Iterator[None]:
        """What the template does is bounded, and what it raises becomes a UserError."""
        from jinja2 import TemplateError

        try:
            with limited(self._name):
                yield
        except (TemplateError, *WRONG) as error:
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
        return shown(self.tokenizer, tokens)


class Plain:
    """A tokenizer for text as it stands, no chat template: a context and continuations of it, for models that complete.

    Ids are those of lm-evaluation-harness (`TemplateLM._encode_pair` of 0.4.13, and its rule for BOS), so that scores
    equal its own:
    - whitespace that ends the context goes in front of the continuation;
    - the context keeps the ids that it has alone, and the continuation has those that follow so many of the whole text;
    - special tokens as the tokenizer adds them by itself, none where the text opens with BOS already. A context that
      has no ids gets BOS (where there is none, EOS).
    Raises UserError for a tokenizer that ends a text with a special token.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        bare, own = (tokenizer("a b", add_special_tokens=add)["input_ids"] for add in (False, True))
        if own[len(own) - len(bare) :] != bare:
            raise UserError(
                f"{tokenizer.name_or_path}: its tokenizer ends a text with {tokenizer.convert_ids_to_tokens(own[-1])!r}"
                ", which cannot be continued; switch that off in tokenizer_config.json (add_eos_token)"
            )
        bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        self._bos, self._bos_text = bos, None if bos is None else tokenizer.decode([bos])

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the text alone, without the whitespace that ends it."""
        return self._ids(["".join(message.content for message in messages).rstrip()])[0]

    def answers(self, prompt: Sequence[Message], answers: Sequence[str], complete: Sequence[bool]) -> list[Tokens]:
        """Each answer as a continuation of the prompt's text, its turns put together. `complete` decides nothing: no
        token says that a continuation ends."""
        text = "".join(message.content for message in prompt)
        context = text.rstrip()
        alone, *wholes = self._ids([context, *(text + answer for answer in answers)])
        if not alone and self._bos is not None:
            alone, wholes = [self._bos], [ids if ids[:1] == [self._bos] else [self._bos, *ids] for ids in wholes]
        return [Tokens(alone + ids[len(alone) :], [(len(alone), max(len(alone), len(ids)))]) for ids in wholes]

    def fitting(
        self, prompt: Sequence[Message], answers: Sequence[str], complete: Sequence[bool], limit: int
    ) -> list[Tokens | str]:
        """As `answers`, with the reason in place of those that have more than `limit` tokens."""
        rows = self.answers(prompt, answers, complete)
        return [longer(limit) if len(row) > limit else row for row in rows]

    def show(self, tokens: Tokens) -> str:
        """The tokens as text, the scored ones between ⟦ and ⟧."""
        return shown(self.tokenizer, tokens)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        opens = self._bos_text is not None and texts[0].startswith(self._bos_text)
        return self.tokenizer(texts, add_special_tokens=not opens, verbose=False)["input_ids"]


def shown(tokenizer, tokens: Tokens) -> str:
    """The tokens as text, the scored ones between ⟦ and ⟧."""
    parts, at = [], 0
    for start, end in tokens.spans:
        scored = tokenizer.decode(tokens.ids[start:end])
        parts += [tokenizer.decode(tokens.ids[at:start]), "⟦", scored, "⟧"]
        at = end
    return "".join(parts) + f"\n({len(tokens)} tokens, {tokens.num_answer_tokens} of them scored)"
