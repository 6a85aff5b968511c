"""Named texts for `--sysprompt`. Despite CREAM's name of the flag, they are appended to the user's question."""

from cream.errors import UserError, nearest

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
