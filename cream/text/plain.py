"""Plain text -> token ids and response spans, for models that complete a text: no chat template."""

from collections.abc import Sequence

from cream.errors import UserError
from cream.records import Message
from cream.text.tokens import Tokens, describe_length, show_spans


class Plain:
    """A tokenizer without a chat template: a context and continuations of it, for models that complete text.

    Ids are those of lm-evaluation-harness (`TemplateLM._encode_pair` of 0.4.13, and its rule for BOS), so that scores
    are equal:
    - whitespace at the end of the context is moved to the start of the continuation;
    - with n ids for the context alone, the continuation has the ids of the whole text after the first n: a token that
      merges both is not scored;
    - special tokens are those that the tokenizer adds by default, none if the text starts with BOS already. A context
      without ids gets BOS (or EOS, if there is no BOS).
    generation_eos: tokens that end a text that the model writes, beside the tokenizer's EOS.

    Raises UserError for a tokenizer that ends a text with a special token.
    """

    opened = False  # no template begins a thought

    def __init__(self, tokenizer, generation_eos: Sequence[int] = ()):
        self.tokenizer = tokenizer
        eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.stop_ids = tuple(sorted({*eos, *generation_eos}))
        self.special = {*tokenizer.all_special_ids}
        bare, own = (tokenizer("a b", add_special_tokens=add)["input_ids"] for add in (False, True))
        if own[len(own) - len(bare) :] != bare:
            raise UserError(
                f"{tokenizer.name_or_path}: its tokenizer ends a text with {tokenizer.convert_ids_to_tokens(own[-1])!r}"
                ", which cannot be continued; switch that off in tokenizer_config.json (add_eos_token)"
            )
        bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        self._bos, self._bos_text = bos, None if bos is None else tokenizer.decode([bos])

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the text without whitespace at its end."""
        return self._ids(["".join(message.content for message in messages).rstrip()])[0]

    def encode_responses(
        self, prompt: Sequence[Message], responses: Sequence[str], complete: Sequence[bool]
    ) -> list[Tokens]:
        """Each response as a continuation of the prompt's concatenated turns. `complete` has no effect, since no token
        ends a continuation."""
        text = "".join(message.content for message in prompt)
        context = text.rstrip()
        alone, *wholes = self._ids([context, *(text + response for response in responses)])
        if not alone and self._bos is not None:
            alone, wholes = [self._bos], [ids if ids[:1] == [self._bos] else [self._bos, *ids] for ids in wholes]
        return [Tokens(alone + ids[len(alone) :], [(len(alone), max(len(alone), len(ids)))]) for ids in wholes]

    def encode_within_limit(
        self,
        prompt: Sequence[Message],
        responses: Sequence[str],
        complete: Sequence[bool],
        limit: int,
        *,
        sampled: bool = True,
    ) -> list[Tokens | str]:
        """As `encode_responses`, with the reason instead of a row that has more than `limit` tokens. `sampled` has no
        effect, since no template writes a continuation."""
        rows = self.encode_responses(prompt, responses, complete)
        return [describe_length(limit) if len(row) > limit else row for row in rows]

    def exceeds(self, messages: Sequence[Message], limit: int) -> bool:
        """As `Chat.exceeds`; contexts are never huge."""
        return False

    def thought_marks(self) -> set[int]:
        """As `Chat.thought_marks`: plain text has none."""
        return set()

    def show(self, tokens: Tokens) -> str:
        """The tokens as text, the scored ones between ⟦ and ⟧."""
        return show_spans(self.tokenizer, tokens)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        opens = self._bos_text is not None and texts[0].startswith(self._bos_text)
        return self.tokenizer(texts, add_special_tokens=not opens, verbose=False)["input_ids"]
