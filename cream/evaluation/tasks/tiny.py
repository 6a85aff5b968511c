"""The tiny world (cream/tiny): sums, differences, comparisons. Its model has never seen a suffix: there is none."""

from cream.evaluation.grade import grade_item

TEST = "localdata/tiny/test.json"
TRAIN = None
IN_ALL_TEST = False
SYSPROMPT = "none"
CONTEXT = "Question: {}\nAnswer:"
grade = grade_item
