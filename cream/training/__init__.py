"""Training: one loop on accelerate (loop.py), one file per stage that says which records it eats and what its loss is.

A stage offers
    Stage.records                      the record types it trains on
    Stage.examples(records, …)         records -> examples, each drop with its reason
    Stage.weight(example)              the example's share in the step's mean: answer tokens (SFT), 1 a pair (DPO)
    Stage.collate(examples)            a Batch
    Stage.loss(model, batch, examples) (summed loss, {metric: summed value})
"""

STAGES = {"sft": "cream.training.sft", "dpo": "cream.training.dpo"}
