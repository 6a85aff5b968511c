"""Social IQa: social situations, 3 options; tested on the public validation split (M. Sap et al., arXiv 1904.09728)."""

from cream.evaluation.grade import grade_choice

TEST = "localdata/siqa/test.json"
TRAIN = "localdata/siqa/train.json"
IN_ALL_TEST = True
SYSPROMPT = "task"
CONTEXT = "Q: {}\nA:"  # lm-evaluation-harness 0.4.13, social_iqa
grade = grade_choice
