"""Multiple choice: ARC, OpenBookQA and SIQA. The options stand as lettered lines below the question."""

from functools import partial

from cream.data import Split
from cream.data.tasks import task

_arc = partial(
    task,
    columns={"uuid": "id", "question": "question", "choices": "choices", "answer": "answerKey"},
    gives="grade-school science, 3 to 5 options",
    hub="allenai/ai2_arc",
    licence="CC BY-SA 4.0",
)
DECLARED = (
    _arc(
        "arc_easy",
        subset="ARC-Easy",
        names=("arc_easy", "ARC-E"),
        splits={"train": Split("train", 2251), "test": Split("test", 2376)},
    ),
    _arc(
        "arc_challenge",
        subset="ARC-Challenge",
        names=("arc_challenge", "ARC-C"),
        splits={"train": Split("train", 1119), "test": Split("test", 1172)},
    ),
    task(
        "openbookqa",
        columns={"uuid": "id", "question": "question_stem", "choices": "choices", "answer": "answerKey"},
        gives="elementary science, 4 options",
        hub="allenai/openbookqa",
        subset="main",
        names=("openbookqa", "obqa"),
        splits={"train": Split("train", 4957), "test": Split("test", 500)},
        licence="Apache-2.0 (its repository; the hub states none)",
    ),
    task(
        "siqa",
        columns={
            "uuid": "id",
            "question": "context+question",
            "choices": "answerA+answerB+answerC",
            "answer": "label",
        },
        first=1,
        gives="social situations, 3 options; the test is the public validation split",
        hub="lighteval/siqa",  # allenai/social_i_qa row for row, without its loading script
        names=("siqa", "social_i_qa", "social_iqa"),
        splits={"train": Split("train", 33410), "test": Split("validation", 1954, ("validation", "dev", "test"))},
        licence="none stated (Allen Institute for AI)",
    ),
)
