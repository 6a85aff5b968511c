"""Chat templates -> ids and spans: what is scored, where it ends, and which templates are refused."""

import copy
import re
import struct
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cream.errors import UserError
from cream.records import Message
from cream.text import recent, rendering
from cream.text.chat import REWRITTEN, Chat
from cream.text.recent import Recent
from cream.text.rendering import PROBE
from cream.text.tokens import Tokens

TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
HEADER = "{% if add_generation_prompt %}<assistant>{% endif %}"
# A model's own template may open with BOS or not, and put whitespace after the end of a turn.
GOOD = {
    "bos": "{{ bos_token }}" + TURNS + HEADER,
    "no bos": TURNS + HEADER,
    "newline": "{{ bos_token }}" + TURNS.replace("<end>", "<end>\n\n") + HEADER,
    "closed": "{{ bos_token }}" + TURNS + "{% if not add_generation_prompt %}<pad>{% endif %}" + HEADER,
    "trimmed": TURNS.replace("m.content", "m.content | trim") + HEADER,
    "no header": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<user>{{ m.content }}<assistant>"
    "{% else %}{{ m.content }}<end>{% endif %}{% endfor %}",
    "one header": "{% for m in messages %}<user>{{ m.role }}\n{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<user>assistant\n{% endif %}",
    "refuses to follow a response": TURNS + "{% if add_generation_prompt and messages[-1].role == 'assistant' %}"
    "{{ raise_exception('no question') }}{% endif %}" + HEADER,
    "plain prompt": "{% for m in messages %}{{ m.role }}\n{{ m.content }}{{ '<end>' if m.role == 'assistant' }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant\n{% endif %}",
}
QUESTION = [Message("user", "Tom has 28 books. How many?")]


def with_template(tokenizer, template, **changed):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    for name, value in changed.items():
        setattr(tokenizer, name, value)
    return tokenizer


@pytest.fixture(params=GOOD)
def chat(request, tiny_tokenizer):
    return Chat(with_template(tiny_tokenizer, GOOD[request.param]))


def test_the_span_is_the_answer_and_its_end_of_turn(chat):
    (tokens,) = chat.encode_responses(QUESTION, ["He has 28."], [True])
    ((start, end),) = tokens.spans
    decode = chat.tokenizer.decode
    assert tokens.ids[:start] == chat.encode_prompt(QUESTION)
    assert decode(tokens.ids[:start]).endswith(("<assistant>", "assistant\n"))
    assert decode(tokens.ids[start:end]) == "He has 28.<end>"
    assert end == len(tokens) and tokens.ids[-1] == chat.end_of_turn == chat.tokenizer.eos_token_id
    assert tokens.num_response_tokens == end - start


def test_a_truncated_answer_gets_no_end_of_turn(chat):
    whole, cut = chat.encode_responses(QUESTION, ["He has 28."] * 2, [True, False])
    assert cut.ids == whole.ids[:-1]
    (nothing,) = chat.encode_responses(QUESTION, [""], [False])
    assert nothing.num_response_tokens == 0


@pytest.mark.parametrize("question", [QUESTION, PROBE[:1]])
def test_a_response_after_its_prompt_is_the_conversation(chat, question):
    """The prompt is tokenised apart from its responses where that cannot change them."""
    texts, prompt = ["He has 28.", "", "5"], chat.encode_prompt(question)
    whole = [chat.encode_conversation([*question, Message("assistant", text)])[0] for text in texts]
    for prompt_ids in (None, prompt):
        assert chat.encode_responses(question, texts, [True] * 3, prompt_ids) == whole


def test_a_prompt_is_tokenised_once_for_all_its_responses(chat, monkeypatch):
    """Unless nothing special ends it."""
    seen, ids = [], chat._ids
    monkeypatch.setattr(chat, "_ids", lambda texts: seen.extend(texts) or ids(texts))
    chat.encode_responses([Message("user", "2" * 1000)], ["5"] * 7, [True] * 7)
    assert (sum(map(len, seen)) < 2000) == (chat.tokenizer.chat_template != GOOD["plain prompt"])


def test_every_assistant_turn_has_its_span(chat):
    turns = [*QUESTION, Message("assistant", "28."), Message("user", "And now?"), Message("assistant", "Still 28.")]
    (tokens,) = chat.encode_conversation(turns)
    assert [chat.tokenizer.decode(tokens.ids[a:b]) for a, b in tokens.spans] == ["28.<end>", "Still 28.<end>"]
    assert tokens.ids[-1] == chat.end_of_turn
    assert chat.encode_conversation(turns[:2]) == chat.encode_responses(QUESTION, ["28."], [True])


def test_bos_stands_only_where_the_template_puts_it(tiny_tokenizer):
    """Also with a tokenizer that adds one of its own to every text."""
    backend = copy.deepcopy(tiny_tokenizer.backend_tokenizer)
    bos = tiny_tokenizer.bos_token_id
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    eager = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<end>", pad_token="<pad>")
    assert eager("2")["input_ids"][0] == bos
    for template, count in (("bos", 1), ("no bos", 0)):
        eager.chat_template = GOOD[template]
        (tokens,) = Chat(eager).encode_responses(QUESTION, ["5"], [True])
        assert tokens.ids.count(bos) == count


@pytest.mark.parametrize("pad", ["<end>", None])
def test_pad_decides_nothing(tiny_tokenizer, pad):
    usual, other = (Chat(with_template(tiny_tokenizer, GOOD["bos"], **change)) for change in ({}, {"pad_token": pad}))
    assert other.encode_responses(QUESTION, ["5"], [True]) == usual.encode_responses(QUESTION, ["5"], [True])
    assert other.end_of_turn in other.stop_ids


def test_it_stops_at_every_end_the_model_knows(tiny_tokenizer):
    special = tiny_tokenizer.convert_tokens_to_ids
    chat = Chat(with_template(tiny_tokenizer, GOOD["bos"], eos_token="<pad>"), generation_eos=[special("<user>")])
    assert chat.end_of_turn == special("<end>")
    assert set(chat.stop_ids) == {special("<end>"), special("<pad>"), special("<user>")}
    assert Chat(with_template(tiny_tokenizer, GOOD["bos"], eos_token=None)).stop_ids == (special("<end>"),)


def test_what_will_be_rendered_is_probed_first(tiny_tokenizer, monkeypatch):
    """A template that the process has seen, with the same variables, is not probed again."""
    probed = []
    monkeypatch.setattr(rendering, "PROBED", set())
    monkeypatch.setattr(rendering, "probe_in_subprocess", lambda work, what: probed.append((work(), what)))
    for _ in range(2):
        Chat(with_template(tiny_tokenizer, GOOD["no bos"], name_or_path="my/model"))
    prompt = "<user>What is 2 + 3?<end>"
    assert probed == [([f"{prompt}<assistant>", f"{prompt}<assistant>5<end>"], "my/model: its chat template")]
    Chat(with_template(tiny_tokenizer, "{% if x %}{% endif %}" + GOOD["no bos"]), variables={"x": "1"})
    Chat(with_template(tiny_tokenizer, "{% if x %}{% endif %}" + GOOD["no bos"]), variables={"x": "2"})
    assert len(probed) == 3


@pytest.mark.parametrize(
    "template, complaint",
    [
        (None, "--chat_template"),
        ("{{ bos_token }}" + GOOD["bos"], "two BOS"),
        (TURNS.replace("<end>", "\n") + HEADER, ": its chat template does not end a response with a special token"),
        (
            TURNS.replace("<end>", "<end>abc") + "{% if add_generation_prompt %}<assistant>Think:{% endif %}",
            "'s prompt is not a prefix of its conversation: after 18 equal tokens the prompt has ['T', 'h', 'i', 'n'], "
            "the conversation ['5', '<end>', 'a', 'b']; give another with --chat_template FILE",
        ),
        (
            "{% for m in messages if m.role == 'user' %}{{ m.content }}<end>{% endfor %}" + HEADER,
            "after 13 equal tokens the prompt has ['<assistant>'], the conversation []; give another",
        ),
        ("{{ raise_exception('only Latin') }}", "only Latin"),
        ("{% set n = 3 %}{{ 7 % n }}", ": its chat template computes with numbers that may be huge"),
    ],
)
def test_templates_that_would_train_the_wrong_thing_are_refused(tiny_tokenizer, template, complaint):
    tokenizer = with_template(tiny_tokenizer, template, name_or_path="my/model")
    with pytest.raises(UserError, match=f"(?s)my/model.*{re.escape(complaint)}"):
        Chat(tokenizer)


def test_the_end_of_a_turn_is_behind_all_of_the_response(tiny_tokenizer):
    twice = TURNS.replace("{{ m.content }}", "{{ m.content }}{{ '<pad>' ~ m.content if m.role == 'assistant' }}")
    assert Chat(with_template(tiny_tokenizer, twice + HEADER)).end_of_turn == tiny_tokenizer.eos_token_id


def test_a_template_of_ones_own_is_named(tiny_tokenizer):
    with pytest.raises(UserError, match="^mine.jinja: the chat template does not end a response with a special token"):
        Chat(with_template(tiny_tokenizer, TURNS.replace("<end>", "\n") + HEADER), template=Path("mine.jinja"))


def test_a_tokenizer_that_takes_no_text_is_refused(tiny_tokenizer):
    tokenizer = with_template(tiny_tokenizer, GOOD["bos"], name_or_path="my/model", model_max_length={})
    with pytest.raises(UserError, match="my/model: its tokenizer cannot encode text"):
        Chat(tokenizer)


def test_a_refused_conversation_is_a_users_error(tiny_chat):
    with pytest.raises(UserError, match="system message must be the first"):
        tiny_chat.encode_prompt([*QUESTION, Message("system", "Be brief.")])


def test_a_response_that_would_merge_with_the_prompt_follows_it():
    """Byte pairs may join the header's last character with the response's first; a model that is given the prompt's
    tokens cannot write that."""
    letters = "Atmw?+h. is:234578"
    vocabulary = {piece: i for i, piece in enumerate([*dict.fromkeys(letters), "W", "a", ":7", "<end>"])}
    backend = Tokenizer(models.BPE(vocabulary, merges=[(":", "7")]))
    backend.add_special_tokens([AddedToken("<end>", special=True)])
    template = "{% for m in messages %}{{ 'A:' if m.role == 'assistant' }}{{ m.content }}<end>{% endfor %}"
    template += "{% if add_generation_prompt %}A:{% endif %}"
    chat = Chat(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", chat_template=template))
    prompt, (seven, end) = chat.encode_prompt(QUESTION), chat.tokenizer.convert_tokens_to_ids(["7", "<end>"])
    for sampled in (True, False):
        eight, tokens = chat.encode_responses(QUESTION, ["8", "7"], [True, True], sampled=sampled)
        assert eight.num_response_tokens == 2 and tokens == Tokens([*prompt, seven, end], [(len(prompt), len(tokens))])
    assert chat.encode_conversation([*QUESTION, Message("assistant", "7")]) == [tokens]


def small_tokenizer(template, header, normalizer):
    """Every letter is a token; the end of a turn and this header are special ones."""
    letters = "abcdefghijklmnopqrstuvwxyzWA0123456789 .,?+<>"
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, merges=[]))
    backend.normalizer = normalizer
    backend.add_special_tokens([AddedToken("<end>", special=True), header])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", chat_template=template)


@pytest.mark.parametrize("question", [QUESTION, PROBE[:1]])
def test_a_header_that_the_tokenizer_writes_otherwise(question):
    """So that it is not found in the rendered prompt."""
    header = AddedToken("<a>", special=True, normalized=True)
    template = "{% for m in messages %}{{ '<A>' if m.role == 'assistant' }}{{ m.content }}<end>{% endfor %}"
    template += "{% if add_generation_prompt %}<A>{% endif %}"
    chat = Chat(small_tokenizer(template, header, normalizers.Lowercase()))
    (tokens,) = chat.encode_responses(question, ["28"], [True])
    assert [tokens] == chat.encode_conversation([*question, Message("assistant", "28")])
    assert tokens.num_response_tokens == 3


def test_a_template_that_rewrites_the_prompt_once_it_is_answered(tiny_tokenizer):
    """A sampled response follows the prompt that it was sampled for; one from elsewhere has none."""
    rewritten = "{{ m.content.replace('28', '82') if add_generation_prompt else m.content }}"
    chat = Chat(with_template(tiny_tokenizer, TURNS.replace("{{ m.content }}", rewritten) + HEADER))
    assert chat.encode_responses(QUESTION, ["5"], [True], sampled=False) == [REWRITTEN]
    assert chat.encode_conversation([*QUESTION, Message("assistant", "5")]) == REWRITTEN
    (tokens,) = chat.encode_responses(QUESTION, ["5"], [True])
    assert chat.tokenizer.decode(tokens.ids) == "<user>Tom has 28 books. How many?<end><assistant>5<end>".replace(
        "28", "82"
    )


def test_a_template_that_rewrites_earlier_turns_has_a_row_for_each(tiny_tokenizer):
    """Some templates drop earlier reasoning, so that no single sequence has every turn as it was answered."""
    shortened = "{{ m.content if loop.last or m.role == 'user' else '...' }}"
    chat = Chat(with_template(tiny_tokenizer, TURNS.replace("{{ m.content }}", shortened) + HEADER))
    turns = [*QUESTION, Message("assistant", "28."), Message("user", "And now?"), Message("assistant", "28.")]
    rows = chat.encode_conversation(turns)
    assert [chat.tokenizer.decode(row.ids).split("<user>")[-1] for row in rows] == [
        "Tom has 28 books. How many?<end><assistant>28.<end>",
        "And now?<end><assistant>28.<end>",
    ]
    assert chat.tokenizer.decode(rows[1].ids).startswith("<user>Tom has 28 books. How many?<end><assistant>...<end>")
    assert [len(row.spans) for row in rows] == [1, 1] and chat.encode_conversation(turns[:2]) == rows[:1]


@given(st.text(), st.text(min_size=1).filter(str.strip))
def test_any_answer_comes_back_from_its_span(tiny_chat, answer, question):
    (tokens,) = tiny_chat.encode_responses([Message("user", question)], [answer], [True])
    ((start, end),) = tokens.spans
    assert tiny_chat.tokenizer.decode(tokens.ids[start:end]) == answer + "<end>"


def test_a_huge_conversation_is_measured_by_its_beginning(tiny_chat, monkeypatch):
    """A character is a token here."""
    monkeypatch.setattr(rendering, "HUGE", 20)

    def exceeds(limit, *texts):
        return tiny_chat.exceeds([Message("user", text) for text in texts], limit)

    assert not exceeds(0, "a" * 20)  # not huge: its tokens are to be counted
    assert exceeds(18, "a" * 21) and not exceeds(19, "a" * 21)  # the last of 20 may be part of a longer one
    assert exceeds(18, "a" * 10, "b" * 11)
    blanks = " " * 30  # a template may strip them
    assert exceeds(8, f"aaaaa{blanks}", f"{blanks}bbbb") and not exceeds(9, f"aaaaa{blanks}", f"{blanks}bbbb")


@pytest.mark.parametrize("huge", [rendering.HUGE, 0])
def test_a_row_beyond_the_limit_has_a_reason_in_its_place(tiny_chat, monkeypatch, huge):
    texts, complete = ["5", "5" * 30, "28", "28"], [True, True, True, False]
    rows = tiny_chat.encode_responses(QUESTION, texts, complete)
    monkeypatch.setattr(rendering, "HUGE", huge)
    for limit in range(len(rows[1]) + 1):
        found = tiny_chat.encode_within_limit(QUESTION, texts, complete, limit)
        assert found == [row if len(row) <= limit else f"longer than {limit} tokens" for row in rows]


def test_show_marks_what_is_scored(tiny_chat):
    turns = [("user", "2 + 3?"), ("assistant", "5"), ("user", "And 1?"), ("assistant", "6")]
    shown = tiny_chat.show(*tiny_chat.encode_conversation([Message(*turn) for turn in turns]))
    said = "<bos><user>2 + 3?<end><assistant>⟦5<end>⟧<user>And 1?<end><assistant>⟦6<end>⟧"
    assert shown == said + "\n(21 tokens, 4 of them scored)"


def test_a_digest_is_of_signed_numbers_that_keep_ids_and_spans_apart():
    """The caches of scores on disk are read by it."""
    flat = struct.pack("=7q", 5, 7, 8, 9, -1, 1, 3)
    assert Tokens([5, 7, 8, 9], [(1, 3)]).digest() == xxhash.xxh3_64(flat).hexdigest()
    one, other = Tokens([5, 6, 7, 8], [(0, 1), (3, 4)]), Tokens([5, 6, 7, 8, 1, 0], [(3, 4)])
    assert one.digest() != other.digest()  # they were equal if 1 stood between ids and spans


@pytest.mark.parametrize("folder, end", [("tokenizers/mistral", "</s>"), ("models/stories260K", "</s>")])
def test_real_tokenizers(shared, folder, end):
    tokenizer = AutoTokenizer.from_pretrained(shared / "data" / folder)
    chat = Chat(tokenizer)
    (tokens,) = chat.encode_responses(QUESTION, ["It is 28."], [True])
    ((start, stop),) = tokens.spans
    assert tokenizer.convert_ids_to_tokens(tokens.ids[stop - 1]) == end
    assert tokenizer.decode(tokens.ids[start:stop]).strip() == f"It is 28.{end}"
    assert tokens.ids.count(tokenizer.bos_token_id) == (1 if "bos_token" in tokenizer.chat_template else 0)


def test_a_real_tokenizer_without_template_is_refused(shared):
    with pytest.raises(UserError, match="gpt2.*--chat_template"):
        Chat(AutoTokenizer.from_pretrained(shared / "data" / "tokenizers" / "gpt2"))


def test_equal_templates_render_and_tokenise_a_conversation_once(tiny_tokenizer, monkeypatch):
    """As the stages of a loop do; what else a conversation, a template or a tokenizer may have is another one."""
    monkeypatch.setattr(rendering, "RECENT", Recent())
    chats = [Chat(with_template(tiny_tokenizer, GOOD["bos"], name_or_path=name)) for name in ("m0", "m1")]
    ids = chats[0].encode_prompt(QUESTION)
    assert ids == chats[0].tokenizer(chats[0]._render(QUESTION, True), add_special_tokens=False)["input_ids"]
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerFast, "apply_chat_template", None)
        patch.setattr(PreTrainedTokenizerFast, "__call__", None)
        assert chats[1].refusal(QUESTION) is None
        chats[1].encode_prompt(QUESTION).append(0)  # a list of the caller's own
        assert chats[1].encode_prompt(QUESTION) == ids
        with pytest.raises(UserError, match="^m1: its chat template"):
            chats[1].encode_prompt([Message("system", "Be brief."), *QUESTION])
    other = Chat(with_template(tiny_tokenizer, GOOD["no bos"]))
    assert other.encode_prompt(QUESTION) == ids[1:]
    tokenizer = with_template(tiny_tokenizer, GOOD["bos"])
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert Chat(tokenizer).encode_prompt(QUESTION) != ids
    written = [Message("user", "What is <end>?")]
    literal = Chat(with_template(tiny_tokenizer, GOOD["bos"]), literal=True)
    assert literal.encode_prompt(written) != chats[0].encode_prompt(written)


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(recent, "MOST", 10)
    held = Recent()
    for key, size in (("a", 4), ("b", 4), ("c", 4), ("d", 11), ("e", 1)):
        held.add(key, key.upper(), size)
        assert held.get(key) == (None if key == "d" else key.upper())
        if key == "c":
            assert (held.get("a"), held.get("b")) == (None, "B")
    assert [held.get(key) for key in "abcde"] == [None, None, None, None, "E"]
