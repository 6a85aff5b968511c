"""Chat templates are programs: what they may not do, and how long they may take."""

import signal
import time

import pytest

from cream import templates
from cream.chat import Chat
from cream.errors import UserError
from cream.records import Message

SPIN = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
WHOLE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.fixture
def tokenizer(tiny_folder):
    from cream.models import load_tokenizer

    return load_tokenizer(tiny_folder)


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
        ("\ud800", "no Unicode"),
        ("the same whatever is asked", "leaves out the assistant's answer"),
    ],
)
def test_a_hostile_template_is_one_message(tokenizer, template, said):
    tokenizer.chat_template = template
    began = time.monotonic()
    with pytest.raises(UserError, match=said):
        Chat(tokenizer)
    assert time.monotonic() - began < 60  # it ends, on a busy machine too


def test_one_that_waits_for_its_victim_is_ended_in_time(tokenizer):
    tokenizer.chat_template = "{% if messages[0].content == 'now' %}" + SPIN + "{% endif %}" + tokenizer.chat_template
    chat = Chat(tokenizer)
    with pytest.raises(UserError, match="takes more than 2 s"):
        chat.prompt([Message("user", "now")])
    assert chat.prompt([Message("user", "later")])


def test_time_that_others_took_does_not_count(monkeypatch):
    monkeypatch.setattr(templates, "LIMIT", 0.05)
    with templates.limited("it"):
        time.sleep(0.2)
    with pytest.raises(UserError, match="it takes more"), templates.limited("it"):
        while True:
            pass


def test_a_copy_that_only_waits_is_ended(monkeypatch):
    monkeypatch.setattr(templates, "PATIENCE", 0.3)
    with pytest.raises(UserError, match="it was not tried within 0.3 s"):
        templates.tried(signal.pause, "it")
