"""OpenBookQA: elementary science, 4 options (T. Mihaylov et al., arXiv 1809.02789)."""

from cream.evaluation.grade import grade_choice

TEST = "localdata/openbookqa/test.json"
TRAIN = "localdata/openbookqa/train.json"
IN_ALL_TEST = True
SYSPROMPT = "task"
CONTEXT = "{}"  # lm-evaluation-harness 0.4.13, openbookqa
grade = grade_choice
