"""Training: one loop on accelerate (loop.py), one file per stage that says which records it eats and what its loss is.

A stage offers
    examples(records, …)               records -> examples, each drop with its reason
    Stage.weight(example)              the example's share in the step's mean: answer tokens (SFT), 1 a pair (DPO)
    Stage.group(example)               its answers, each a whole conversation; they share their prompt
    Stage.loss(model, batch, examples) (summed loss, {metric: summed value})
"""

from cream.records import Conversation, Pair

STAGES = {"sft": "cream.training.sft", "dpo": "cream.training.dpo"}
RECORDS = {"sft": (Conversation, Pair), "dpo": (Pair,)}  # what each eats (of a pair SFT takes the chosen answer)
BY_RECORD = {Conversation: "sft", Pair: "dpo"}  # the stage that data imply
