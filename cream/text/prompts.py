"""What --sysprompt adds to a prompt: a named text at the end of the user turn, as CREAM has it (despite the flag's
name), or the text of a file as system message, as RLCD's two samplings have it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cream.errors import UserError, nearest
from cream.records import Message
from cream.text.chat import Chat

AUTO = "auto"
SYSPROMPTS = {
    "none": "",
    "task": "Think step by step, then finish with one line that starts with the word `Answer:` and holds only your "
    "final answer.",
}


def apply(name: str, user_text: str) -> str:
    """`user_text`, an empty line, and the named text. Raises UserError for an unknown name."""
    if name not in SYSPROMPTS:
        raise UserError(f"--sysprompt {name}: not one of {', '.join(SYSPROMPTS)}{nearest(name, SYSPROMPTS)}")
    return f"{user_text}\n\n{SYSPROMPTS[name]}" if SYSPROMPTS[name] else user_text


def is_named(sysprompt: str) -> bool:
    """Whether --sysprompt is a name, and no file."""
    return sysprompt in (AUTO, *SYSPROMPTS)


@dataclass(frozen=True)
class Sysprompt:
    """What --sysprompt adds: the text called `name` to the user's turn, and `system` to the system message."""

    name: str = AUTO
    system: str = ""

    def apply(self, prompt: Sequence[Message]) -> list[Message]:
        """The prompt with it; `auto` adds nothing."""
        *before, last = prompt
        text = last.content if self.name == AUTO else apply(self.name, last.content)
        return self.add_system([*before, Message(last.role, text)])

    def add_system(self, messages: Sequence[Message]) -> list[Message]:
        """The messages with the text as system message; one that is there already stays in front of it."""
        if not self.system:
            return list(messages)
        before = [m.content for m in messages[:1] if m.role == "system"]
        return [Message("system", "\n\n".join([*before, self.system])), *messages[len(before) :]]

    def check(self, chat: Chat, source: str) -> None:
        """Raises UserError where the chat template has no system message; `source`: what --sysprompt is."""
        if not self.system:
            return
        question = [Message("user", "?")]
        asked = self.add_system(question)
        if why := chat.refusal(asked):
            raise UserError(f"--sysprompt {source}: {why}")
        if chat.encode_prompt(asked) == chat.encode_prompt(question):
            raise UserError(
                f"--sysprompt {source}: the chat template leaves the system message out, so that it would have no "
                "effect; give another with --chat_template FILE"
            )


def load(sysprompt: str) -> Sysprompt:
    """What --sysprompt means, which is a name or a file. Raises UserError unless the file is there and holds text."""
    if is_named(sysprompt):
        return Sysprompt(sysprompt)
    path = Path(sysprompt)
    if not path.is_file():
        known = (AUTO, *SYSPROMPTS)
        raise UserError(
            f"--sysprompt {sysprompt}: neither a file nor one of {', '.join(known)}{nearest(sysprompt, known)}"
        )
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"--sysprompt {sysprompt}: cannot be read as text: {error}") from None
    if not text:
        raise UserError(f"--sysprompt {sysprompt}: the file holds no text; --sysprompt none adds none")
    return Sysprompt(system=text)
