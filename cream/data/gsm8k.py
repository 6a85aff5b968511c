"""GSM8K: grade-school mathematics with worked solutions, whose last line has the answer after ####."""

from cream.data import Split
from cream.data.tasks import task

DECLARED = (
    task(
        "gsm8k",
        columns={"uuid": "id", "question": "question", "answer": "answer"},
        gives="grade-school mathematics, the answer a number, with worked solutions",
        hub="openai/gsm8k",
        subset="main",
        names=("gsm8k",),
        splits={"train": Split("train", 7473), "test": Split("test", 1319)},
        licence="MIT",
    ),
)
