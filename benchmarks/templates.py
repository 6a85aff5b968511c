"""The chat templates in the installed trl, transformers and vLLM, each tried on what the stages do with one.

    python benchmarks/templates.py [WORD ...]     prints a table; with words, of the templates whose name has one

A template is tried with a byte-level tokenizer that has its marks as special tokens. `works` means that the tokens are
checked: a sampled response is scored as it was sampled, every turn of a conversation follows the very prompt that
sampling it would have, no end of turn is scored after a truncated response, and a masked thought is not scored. Every
other entry is the reason for which records are refused or dropped.
"""

import argparse
import ast
import re
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cream.errors import UserError
from cream.records import Message
from cream.text.chat import Chat
from cream.text.rendering import Refused
from cream.text.thoughts import USUAL

MARK = re.compile(r"<\|[^|<>\s'\"]+\|>|<｜[^｜<>\s'\"]+｜>|</?[a-z_]+>|<\|[a-z_]+>|<[a-z_]+\|>|\[/?[A-Z_]+\]")
ENDS = ("<|im_end|>", "<|eot_id|>", "<|eot|>", "<end_of_turn>", "<turn|>", "<|END_OF_TURN_TOKEN|>", "<|return|>")
ENDS += ("<｜end▁of▁sentence｜>", "<|end|>", "<end_of_utterance>", "<|endoftext|>", "<|user|>")
SYSTEM, USER, MORE = Message("system", "Be brief."), Message("user", "How many?"), Message("user", "And now?")
ANSWER, OTHER = Message("assistant", "Seven."), Message("assistant", "Eight.")
COLUMNS = ("single turn", "several turns", "system", "thought", "truncated")


def main(words: list[str]) -> None:
    counts = {column: Counter() for column in COLUMNS}
    print("| template |", " | ".join(COLUMNS), "|\n|---|" + "---|" * len(COLUMNS))
    for name, outcomes in try_all(words):
        print(f"| {name} |", " | ".join(outcomes[column] for column in COLUMNS), "|", flush=True)
        for column, outcome in outcomes.items():
            counts[column][outcome.partition(":")[0]] += 1
    print("\n" + "\n".join(f"{column}: {dict(found)}" for column, found in counts.items()))


def try_all(words: list[str] = ()):
    """(name, {column: outcome}) of each template."""
    for name, text in [*from_files(), *from_sources()]:
        if not words or any(word in name for word in words):
            yield name, try_template(text)


def from_files():
    """The templates that are files: trl's, but for those that it made for training, and vLLM's."""
    for package, folder in (("trl", "chat_templates"), ("vllm", "transformers_utils/chat_templates")):
        if spec := find_spec(package):
            for path in sorted((Path(spec.origin).parent / folder).glob("*.jinja")):
                if not path.stem.endswith("_training"):
                    yield f"{package}/{path.stem}", path.read_text()


def from_sources():
    """The templates that are texts in the source of transformers' models."""
    root = Path(find_spec("transformers").origin).parent / "models"
    for path in sorted(root.glob("*/*.py")):
        source = path.read_text()
        if not re.search(r"chat_template\s*=|CHAT_TEMPLATE\s*=", source):
            continue
        for node in ast.walk(ast.parse(source)):
            names = [t.id for t in getattr(node, "targets", ()) if isinstance(t, ast.Name)]
            if isinstance(node, ast.Assign) and any("chat_template" in name.lower() for name in names):
                try:
                    text = ast.literal_eval(node.value)
                except ValueError:
                    continue
                if isinstance(text, str) and "{%" in text:
                    yield f"transformers/{path.stem}", text


def tokenizer_for(template: str) -> PreTrainedTokenizerFast:
    """Bytes, two line breaks merged into one token, and the template's marks: those of thoughts are tokens like others,
    as in Qwen3, the rest are special."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*letters, "ĊĊ"])}
    backend = Tokenizer(models.BPE(vocabulary, merges=[("Ċ", "Ċ")]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(False, use_regex=False), decoders.ByteLevel()
    tags = {tag for pair in USUAL for tag in pair}
    found = sorted({*MARK.findall(template)} - tags)
    eos = next((end for end in ENDS if end in found), "</s>")
    bos = next((mark for mark in found if "begin" in mark or mark in ("<bos>", "<BOS_TOKEN>")), "<s>")
    backend.add_special_tokens([AddedToken(mark, special=True) for mark in [*found, eos, bos]])
    backend.add_tokens([AddedToken(tag, special=False) for tag in ("<think>", "</think>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, chat_template=template)


def try_template(template: str) -> dict[str, str]:
    """The outcome for each column."""
    tokenizer = tokenizer_for(template)
    try:
        chat, masked = Chat(tokenizer), Chat(tokenizer, thoughts="mask")
    except UserError as error:
        return dict.fromkeys(COLUMNS, f"refused: {_reason(error)}")
    trials = {
        "single turn": lambda: _single(chat, [USER]),
        "several turns": lambda: _several(chat),
        "system": lambda: _single(chat, [SYSTEM, USER]),
        "thought": lambda: _thought(chat, masked),
        "truncated": lambda: _truncated(chat),
    }
    outcomes = {}
    for column, trial in trials.items():
        try:
            outcomes[column] = trial()
        except Refused as error:
            outcomes[column] = f"refused: {_reason(error)}"
    return outcomes


def _reason(error: UserError) -> str:
    return str(error).partition("its chat template")[2].removeprefix(" refuses a conversation: ").strip()


def _single(chat: Chat, prompt: list[Message]) -> str:
    """A sampled response, and one from elsewhere."""
    ids = chat.encode_prompt(prompt)
    (sampled,) = chat.encode_responses(prompt, [ANSWER.content], [True])
    (written,) = chat.encode_responses(prompt, [ANSWER.content], [True], sampled=False)
    for tokens in (sampled, written):
        if isinstance(tokens, str):
            return f"dropped: {tokens}"
        assert tokens.ids[: len(ids)] == ids and tokens.ids[-1] == chat.end_of_turn
        assert prompt[0].content in chat.decode(ids)
    assert chat.decode(sampled.ids[len(ids) : -1]) == chat._lead + ANSWER.content
    assert chat.decode(written.ids[len(ids) :]).partition(chat.decode([chat.end_of_turn]))[0].endswith(ANSWER.content)
    return "works"


def _several(chat: Chat) -> str:
    """Two turns; each follows the prompt that it would be sampled for."""
    messages = [USER, ANSWER, MORE, OTHER]
    rows = chat.encode_conversation(messages)
    if isinstance(rows, str):
        return f"dropped: {rows}"
    spans = [(row.ids[:start], chat.decode(row.ids[start:end])) for row in rows for start, end in row.spans]
    assert len(spans) == 2
    for turn, (before, text) in zip((1, 3), spans, strict=True):
        assert before == chat.encode_prompt(messages[:turn]) and messages[turn].content in text
        assert text.endswith(chat.decode([chat.end_of_turn]))
    return "works" if len(rows) == 1 else "works: turn by turn"


def _thought(chat: Chat, masked: Chat) -> str:
    """A sampled thought, scored as it is, and masked; in a response from elsewhere too."""
    thought = "It is odd.\n</think>\n\n" if chat.opened else "<think>\nIt is odd.\n</think>\n\n"
    (scored,) = chat.encode_responses([USER], [thought + ANSWER.content], [True])
    (final,) = masked.encode_responses([USER], [thought + ANSWER.content], [True])
    ((start, end),), ((later, _),) = scored.spans, final.spans
    assert chat.decode(scored.ids[start : end - 1]) == chat._lead + thought + ANSWER.content
    assert final.ids == scored.ids and chat.decode(final.ids[later : end - 1]).strip() == ANSWER.content
    assert chat.thought_tokens(scored.ids[start : end - 1]) == later - start
    (unfinished,) = masked.encode_responses([USER], [thought.partition("</think>")[0]], [False])
    assert isinstance(unfinished, str)
    (written,) = chat.encode_responses([USER], [thought + ANSWER.content], [True], sampled=False)
    if isinstance(written, str):
        return f"dropped: {written}"
    text = chat.decode(written.ids[start:])
    assert ANSWER.content in text
    return "works" if "It is odd." in text else "works: in SFT data the template removes it"


def _truncated(chat: Chat) -> str:
    """No end of turn is scored, whoever wrote the response."""
    for sampled in (True, False):
        (tokens,) = chat.encode_responses([USER], [ANSWER.content], [False], sampled=sampled)
        if isinstance(tokens, str):
            return f"dropped: {tokens}"
        ((start, end),) = tokens.spans
        assert chat.end_of_turn not in tokens.ids[start:] and len(tokens.ids) == end
        assert ANSWER.content in chat.decode(tokens.ids[start:])
    return "works"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="WORD", help="parts of names of templates; none: all")
    main(parser.parse_args().words)
