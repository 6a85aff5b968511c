"""Named prompts: text that is appended to a user's question before a model sees it (`--sysprompt`).

Despite the flag's name, which is CREAM's, the text goes below the question and not into a system message.
"""

from cream.errors import UserError, nearest

SYSPROMPTS = {
    "none": "",
    "task": "Think step by step, then finish with one line that starts with the word `Answer:` and holds only your "
    "final answer.",
}


def apply(name: str, user_text: str) -> str:
    """`user_text` with the named prompt below it, a blank line between. Raises UserError for an unknown name."""
    if name not in SYSPROMPTS:
        raise UserError(f"--sysprompt {name}: not one of {', '.join(SYSPROMPTS)}{nearest(name, SYSPROMPTS)}")
    return f"{user_text}\n\n{SYSPROMPTS[name]}" if SYSPROMPTS[name] else user_text
