"""Chat templates are programs: what they may not do, and how long they may take."""

import re
import resource
import signal
import time
from pathlib import Path

import pytest

from cream.errors import UserError
from cream.records import Message
from cream.text import templates
from cream.text.chat import Chat

SPIN = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = "{% set n = namespace(s='x') %}{% for i in range(40) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s|length }}"
WHOLE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.fixture
def tokenizer(tiny_folder):
    from cream.model.load import load_tokenizer

    return load_tokenizer(tiny_folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "template, said",
    [
        (SPIN, "takes more than 2 s"),
        ("{{ 9 ** (9 ** 9) }}", "takes more than 2 s"),  # one step, which no signal of Python's interrupts
        ("{{ 'x' * (10 ** 11) }}", "too much memory"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses a conversation"),
        ("{{ messages.__init__.__globals__ }}", "refuses a conversation"),
        ("{{ messages.append(1) }}", "refuses a conversation"),
        ("{% include '/etc/passwd' %}", "refuses a conversation"),
        ("{{ 1 // 0 }}", "refuses a conversation"),
        ("{{ messages[7].content.x.y }}", "refuses a conversation"),
        ("{% for %}", "refuses a conversation"),
        ("\ud800", "not valid Unicode"),
        ("the same whatever is asked", "does not render the assistant's response"),
    ],
)
def test_a_hostile_template_is_one_message(tokenizer, template, said):
    tokenizer.chat_template = template
    began = time.monotonic()
    with pytest.raises(UserError, match=f"^{re.escape(tokenizer.name_or_path)}.*{said}"):
        Chat(tokenizer)
    assert time.monotonic() - began < 60  # it ends, on a busy machine too


@pytest.mark.slow
def test_one_that_waits_for_a_certain_conversation_is_ended_in_time(tokenizer):
    tokenizer.chat_template = "{% if messages[0].content == 'now' %}" + SPIN + "{% endif %}" + tokenizer.chat_template
    chat = Chat(tokenizer)
    with pytest.raises(UserError, match="takes more than 2 s"):
        chat.encode_prompt([Message("user", "now")])
    assert chat.encode_prompt([Message("user", "later")])


def test_one_that_waits_for_a_certain_conversation_cannot_fill_the_memory(tokenizer, monkeypatch):
    monkeypatch.setattr(templates, "ROOM", 64 << 20)
    bombs = {"once": "{{ 'x' * 300000000 }}", "again": DOUBLING, "wide": "{{ '%300000000d' % 7 }}"}
    tests = "".join(
        "{% if messages[0].content == '" + f"{word}' %}}{bomb}{{% endif %}}" for word, bomb in bombs.items()
    )
    tokenizer.chat_template = tests + tokenizer.chat_template
    limits = resource.getrlimit(resource.RLIMIT_AS)
    chat = Chat(tokenizer)
    for word in bombs:
        with pytest.raises(UserError, match="takes too much memory"):
            chat.encode_prompt([Message("user", word)])
    assert chat.encode_prompt([Message("user", "later")])
    assert resource.getrlimit(resource.RLIMIT_AS) == limits


@pytest.mark.parametrize(
    "text, sign",
    [
        ("{{ (7 ** (messages|length * 30000000))|string|length }}", "**"),
        ("{% set n = messages|length %}{% set n = n * n %}", "*"),
        ("{{ messages|length % messages|length }}", "%"),
        ("{{ 2 // messages|length }}", "//"),
        ("{{ 2 / messages|length }}", "/"),
        ("{{ 1001 * messages|length }}", "*"),
        ("{{ messages|length|round(999999999, 'ceil') }}", "round"),
        ("{{ 1|round(method='floor', precision=messages|length) }}", "round"),
    ],
)
def test_numbers_that_may_be_huge_are_refused(tokenizer, text, sign):
    tokenizer.chat_template = "\n{% if messages[0].content == 'now' %}" + text + "{% endif %}" + tokenizer.chat_template
    with pytest.raises(UserError, match=rf"numbers that may be huge: `{re.escape(sign)}` on its line 2"):
        Chat(tokenizer)


def test_small_numbers_and_repeated_texts_are_fine():
    good = "{{ '-' * 10 }}{{ ' ' * n }}{{ n * 2 }}{{ n * -1 }}{{ n % 2 }}{{ '%d' % n }}{{ n / 2 // 3 }}{{ 10 ** 3 }}"
    good += "{{ n|round }}{{ n|round(2, 'ceil') }}"
    templates.check_numbers(good + "{% generation %}{{ n % 7 }}{% endgeneration %}", "it")


@pytest.mark.slow
def test_templates_that_are_in_use_are_fine():
    """Those that trl ships, of Llama, Qwen, Gemma, DeepSeek, Phi and others."""
    shipped = sorted((Path(pytest.importorskip("trl").__file__).parent / "chat_templates").glob("*.jinja"))
    assert len(shipped) > 20
    for path in shipped:
        templates.check_numbers(path.read_text(), path.name)


def test_time_that_others_took_does_not_count(monkeypatch):
    monkeypatch.setattr(templates, "LIMIT", 0.05)
    with templates.limit_rendering("it"):
        time.sleep(0.2)
    with pytest.raises(UserError, match="it takes more"), templates.limit_rendering("it"):
        while True:
            pass


def test_a_copy_that_only_waits_is_ended(monkeypatch):
    monkeypatch.setattr(templates, "PATIENCE", 0.3)
    with pytest.raises(UserError, match="it did not render a test conversation within 0.3 s"):
        templates.probe_in_subprocess(signal.pause, "it")
