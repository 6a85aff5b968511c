"""GSM8K: grade-school mathematics, the answer a number (K. Cobbe et al., arXiv 2110.14168)."""

from cream.evaluation.grade import grade_number

TEST = "localdata/gsm8k/test.json"
TRAIN = "localdata/gsm8k/train.json"
IN_ALL_TEST = True
SYSPROMPT = "task"
CONTEXT = "Question: {}\nAnswer:"  # lm-evaluation-harness 0.4.13, gsm8k; without options it is not compared
grade = grade_number
