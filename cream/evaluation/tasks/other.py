"""Any data set that is not one of TASKS: an item itself says whether it is multiple choice."""

from cream.evaluation.grade import grade_item

SYSPROMPT = "task"
CONTEXT = "Question: {}\nAnswer:"
grade = grade_item
