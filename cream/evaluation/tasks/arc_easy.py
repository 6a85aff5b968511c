"""ARC-Easy: grade-school science, 3 to 5 options (P. Clark et al., arXiv 1803.05457)."""

from cream.evaluation.grade import grade_choice

TEST = "localdata/arc-easy/test.json"
TRAIN = "localdata/arc-easy/train.json"
IN_ALL_TEST = True
SYSPROMPT = "task"
CONTEXT = "Question: {}\nAnswer:"  # lm-evaluation-harness 0.4.13, arc_easy
grade = grade_choice
