"""ARC-Challenge: grade-school science that retrieval gets wrong, 3 to 5 options (P. Clark et al., arXiv 1803.05457)."""

from cream.evaluation.grade import grade_choice

TEST = "localdata/arc-challenge/test.json"
TRAIN = "localdata/arc-challenge/train.json"
IN_ALL_TEST = True
SYSPROMPT = "task"
CONTEXT = "Question: {}\nAnswer:"  # lm-evaluation-harness 0.4.13, which includes arc_easy's
grade = grade_choice
