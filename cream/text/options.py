"""What scoring and training do with a response's thought: the flags of rewarding.py and train.py."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cream.cli.flags import flag
from cream.text.templates import parse_variables
from cream.text.thoughts import ThoughtFlags

GIVEN = ("chat_template_kwargs", "thoughts", "thinking_tags")  # flags that decide how a response becomes tokens
THOUGHTS = ("score", "mask", "drop")
AS_SAMPLED = {"text": "as sampled"}  # in sidecars; earlier versions scored and trained on what the template writes


@dataclass
class ThoughtUse(ThoughtFlags):
    """Thoughts of reasoning models"""

    thoughts: str = flag(
        "score",
        "the thought in a response: score, it is scored and trained on with the rest, as it was sampled; mask, the "
        "model sees it, and only the final text is scored and trained on; drop, it is removed",
        choices=THOUGHTS,
    )

    def text(self) -> dict[str, object]:
        """How text becomes tokens, as `load_chat` takes it."""
        return {"thoughts": self.thoughts, "tags": self.tags}

    def settings(self) -> dict[str, object]:
        """{flag: value} that decide an output: none by default, which is what a model samples."""
        return {} if self.thoughts == "score" else {"thoughts": self.thoughts, "thinking_tags": self.thinking_tags}


def describe_text(settings: Mapping[str, object]) -> dict[str, str]:
    """How responses became the tokens that were scored, for the sidecar: by the flags in `settings`."""
    return AS_SAMPLED | {name: str(settings[name]) for name in GIVEN if settings.get(name) is not None}


def check_kwargs(theirs: Mapping[str, object], given: str | None, path: Path, provenance) -> None:
    """Object where a file was made with other --chat_template_kwargs (`theirs` has them) than are `given` now: the
    model would see other prompts."""
    before = theirs.get("chat_template_kwargs")
    if parse_variables(before) != parse_variables(given):
        provenance.object(
            f"{path} was made with --chat_template_kwargs {before or 'none'}, and here it is {given or 'none'}: the "
            "model would see other prompts; give the same"
        )
