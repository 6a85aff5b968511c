"""`prepare_data.py validate`: check files as stages do, and say what is in them."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cream.cli.flags import flag
from cream.cli.screen import say_result
from cream.errors import UserError, user_error

log = logging.getLogger("cream")
WORDS = "FILE …"
ABOUT = "check files as stages do, and print their records, duplicates, lengths and all problems"
TAKES = ("model",)


@dataclass
class Options:
    """Validate"""

    max_length: int = flag(2048, "count responses with more than this many tokens, the prompt included", low=2)


def run(words: Sequence[str], flags: Options, config) -> None:
    model = config.model
    folder = model.folder(model.checkpoint) if model.model or model.checkpoint else None
    validate([config.file(word) for word in words], folder, model.text(), flags.max_length)


def validate(words: Sequence[str], model: Path | None, text: dict, max_length: int) -> None:
    """Print a summary of each file; raises UserError if one has bad records. Lengths are in tokens of the model in the
    folder `model` (with its chat template, as `text` says), without a model in characters."""
    from cream.data import validation

    chat, bad = None, []
    paths = [Path(word) for word in words if not word.endswith(".meta.json")]
    if len(paths) < len(words):
        log.info("%d sidecars skipped: they hold no records", len(words) - len(paths))
    if model is not None:
        from cream.files.folders import check_folder
        from cream.model.load import load_chat

        check_folder(model)
        chat = load_chat(model, **text)
    for path in paths:
        try:
            summary = validation.validate(path, chat, max_length)
        except (UserError, OSError) as error:
            if (message := user_error(error)) is None:
                raise
            bad.append(path)
            log.info("%s", message)
            continue
        if summary.bad_count:
            bad.append(path)
        say_result("%s", "\n".join(validation.report(path, summary, "tokens" if chat else "characters")))
    if bad:
        raise UserError(
            f"{len(bad)} of {len(paths)} files cannot be read or have bad records: {', '.join(map(str, bad))}"
        )
