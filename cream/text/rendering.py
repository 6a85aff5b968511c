"""A tokenizer's chat template: messages -> text, within limits, and its refusals as errors for the user."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path

from cream.errors import UserError
from cream.files.fingerprints import fingerprint_text
from cream.records import Message
from cream.text.recent import Recent
from cream.text.templates import check_numbers, check_variables, limit_rendering, probe_in_subprocess

TEMPLATE_ERRORS = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)
PROBE = [Message("user", "What is 2 + 3?"), Message("assistant", "5")]
HUGE = 1 << 20  # characters; for a longer text the number of tokens in its beginning may suffice
PROBED: set[tuple[str, str]] = set()  # templates, with their variables, that rendered PROBE within the limits
RECENT = Recent()  # texts and ids of conversations, of all templates
TODAY = date(2024, 7, 26)  # for templates that write today's date: the one that Llama-3's writes if it knows none


def _strftime(form: str) -> str:
    return TODAY.strftime(form)


class Refused(UserError):
    """A template refuses one conversation; others may be fine."""


@contextmanager
def naming(uuid: str) -> Iterator[None]:
    """A template's refusal within it names the record."""
    try:
        yield
    except Refused as error:
        raise Refused(f"record {uuid!r}: {error}") from None


class Template:
    """A tokenizer with its chat template, probed once.

    variables: further ones for the template (enable_thinking). literal: a special token that is written out in a
    message is text, broken up by a backslash; else it is that token.

    Raises UserError if there is no template, or it fails on the probe or may take very long.
    """

    def __init__(
        self, tokenizer, template: Path | None, variables: Mapping[str, object] | None = None, literal: bool = False
    ):
        self.tokenizer, self.literal = tokenizer, literal
        self._name = f"{template or tokenizer.name_or_path}: {'the' if template else 'its'} chat template"
        if not tokenizer.chat_template:
            raise UserError(
                f"{tokenizer.name_or_path}: the tokenizer has no chat template; give the one this model was trained "
                "with: --chat_template FILE (Jinja)"
            )
        if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
            raise UserError(
                f"{tokenizer.name_or_path}: the tokenizer has several chat templates and no default; choose one: "
                f"--chat_template {' or '.join(tokenizer.chat_template)}"
            )
        self.template: str = tokenizer.get_chat_template()
        self._variables = {**(variables or {}), "strftime_now": _strftime}
        self.special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special} | {
            *tokenizer.all_special_ids
        }
        marks = sorted(tokenizer.convert_ids_to_tokens(sorted(self.special)), key=len, reverse=True)
        self._marks = re.compile("|".join(map(re.escape, marks)) or "(?!)")
        self._content = self._identify()
        self._probe_once()
        with self._explain_errors():
            check_numbers(self.template, self._name)
            check_variables(self.template, self.tokenizer.special_tokens_map, variables or {}, self._name)

    def _identify(self) -> object:
        """Equal for templates that give equal texts and ids: those of another checkpoint, say."""
        tokenizer = self.tokenizer
        if not tokenizer.is_fast:
            return object()
        settings = type(tokenizer), tokenizer.special_tokens_map, tokenizer.split_special_tokens
        settings += (tokenizer.model_max_length,)  # which some tokenizers compare with their ids
        decide = self.template, self._variables, self.literal, settings, tokenizer.backend_tokenizer.to_str()
        return fingerprint_text(repr(decide))

    def _probe_once(self) -> None:
        """Render the probe in a fork of this process, which need not see a template twice."""
        key = self.template, repr(self._variables)
        if key not in PROBED:
            probe_in_subprocess(lambda: [self._render(PROBE[:1], True), self._render(PROBE, False)], self._name)
            PROBED.add(key)

    @property
    def dated(self) -> bool:
        """Whether the template writes today's date, which is TODAY in every stage."""
        return "strftime_now" in self.template

    def exceeds(self, messages: Sequence[Message], limit: int) -> bool:
        """Whether a huge conversation certainly has more than `limit` tokens. Tokenising all of it would take 100 times
        its size in memory. False for all others: count their tokens."""
        if sum(len(message.content) for message in messages) <= HUGE:
            return False
        text = "\n".join(message.content.strip() for message in messages)  # templates may strip them, too
        return len(self._ids([text[:HUGE]])[0]) > limit + 1  # the last one may be incomplete

    def refusal(self, messages: Sequence[Message]) -> str | None:
        """Why the template refuses these messages, a prompt or a conversation; None if not, or if they are huge."""
        if sum(len(message.content) for message in messages) > HUGE:
            return None
        try:
            self._render(messages, messages[-1].role == "user")
        except Refused as error:
            return str(error)
        return None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, of special ones too."""
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def find_mark(self, texts: Sequence[str]) -> str | None:
        """The first special token that is written in a text, as which the tokenizer will read it; None if there is
        none."""
        found = (self._marks.search(text) for text in texts)
        return next((match[0] for match in found if match), None)

    def _break_marks(self, text: str) -> str:
        """A text without special tokens: each that is written in it has a backslash after its first character."""
        return self._marks.sub(lambda mark: f"{mark[0][0]}\\{mark[0][1:]}", text)

    def _render(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        key = self._content, tuple(messages), generation_prompt
        if (text := RECENT.get(key)) is None:
            text = self._render_now(messages, generation_prompt)
            RECENT.add(key, text, len(text) + sum(len(message.content) for message in messages))
        return text

    def _render_now(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        write = self._break_marks if self.literal else str
        plain = [{"role": m.role, "content": write(m.content)} for m in messages]
        apply = self.tokenizer.apply_chat_template
        with self._explain_errors():
            text = apply(plain, tokenize=False, add_generation_prompt=generation_prompt, **self._variables)
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Refused(f"{self._name} renders text that is not valid Unicode (a lone surrogate)") from None
        return text

    @contextmanager
    def _explain_errors(self) -> Iterator[None]:
        """Within it a template has limits on time and memory, and its errors become UserErrors."""
        from jinja2 import TemplateError

        try:
            with limit_rendering(self._name):
                yield
        except (TemplateError, *TEMPLATE_ERRORS) as error:
            raise Refused(f"{self._name} refuses a conversation: {error}") from None

    def _ids(self, texts: Iterable[str]) -> list[list[int]]:
        rows = [self._bare_ids(text) for text in texts]
        bos = self.tokenizer.bos_token_id
        if bos is not None and bos != self.tokenizer.eos_token_id and any(ids[:2] == [bos, bos] for ids in rows):
            raise UserError(f"{self._name} renders two BOS tokens; a model expects one")
        return rows

    def _special_in(self, text: str) -> list[int]:
        return [token for token in self._ids([text])[0] if token in self.special]

    def _bare_ids(self, text: str) -> list[int]:
        key = self._content, text
        if (ids := RECENT.get(key)) is None:
            ids = tuple(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            RECENT.add(key, ids, len(text) + len(ids))
        return list(ids)
