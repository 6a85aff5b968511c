"""An evaluation's summary: its table of accuracies, and what else stands in `summary.json`."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from cream.evaluation import choices, grading
from cream.evaluation.statistics import format_table
from cream.files.fingerprints import fingerprint_text
from cream.records import Answer, Message
from cream.scoring.completions import shown
from cream.text.chat import Chat, Plain


def path_of(results: Path) -> Path:
    """The file of the summary of an evaluation's results."""
    stem = results.name.removesuffix(".json")
    return results.with_name("summary.json" if stem == "results" else f"{stem}.summary.json")


def asked(chat: Chat | Plain, first: Iterable[Message]) -> dict:
    """How questions are put: the first prompt as the model sees it, the chat template's hash (None without one)."""
    template = chat.tokenizer.chat_template if isinstance(chat, Chat) else None
    return {"first_prompt": shown(chat, first), "chat_template": template and fingerprint_text(template)}


def generated(answers: Sequence[Answer], n: int) -> tuple[dict, str]:
    """(What the summary of graded answers says, the same to be read); `n` answers a question."""
    rows, strict = grading.table_rows(answers), grading.strict_accuracies(answers)
    table = format_table(rows)
    if n > 1:
        table += f"\naccuracy: of the majority vote of {n} answers; pass@j: one of j answers is right, ± standard error"
    released = f"accuracy % by the method's released extraction rules: {_percent(strict)}"
    return {"tasks": rows, "strict": strict, "greedy": n == 1, "gen_n": n}, f"{table}\n{released}"


def compared(answers: Sequence[Answer]) -> tuple[dict, str]:
    """(What the summary of compared options says, the same to be read)."""
    rows, by_norm = grading.table_rows(answers), choices.accuracies(answers)
    lines = [format_table(rows), "accuracy % by what the log-likelihood is divided by:"]
    lines += [f"  {norm:<6}  {_percent(accuracies)}" for norm, accuracies in by_norm.items()]
    return {"tasks": rows, "by_length_norm": by_norm}, "\n".join(lines)


def _percent(accuracies: dict[str, float]) -> str:
    return ", ".join(f"{task} {100 * accuracy:.1f}" for task, accuracy in accuracies.items())
