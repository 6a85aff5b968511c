"""Training stages by name: the methods that train.py can train by. A new one is a file here and a line in STAGES.

A stage is a module that holds
    Options   a dataclass of its own flags, which train.py shows and takes; without a field where it has none
    RECORDS   the record types that it trains on; data of the first one imply this stage, if no earlier one has it
    Stage     Stage(options, about): the options, read beside the sidecar of the data (`about`, {} where they have
              none). UserError where they contradict each other
and a Stage, which is pickled to every process that trains, offers
    model                              what wraps the weights: a name in run.MODELS
    unit                               what a step's mean is over, for the log: "pairs"
    made_for_policy                    whether the data are an earlier stage's output, made for the policy started from
    references                         attributes of an example that must hold its group's log-probabilities under the
                                       policy that training starts from, as a sequence of floats, NaN where unknown
    settings                           {flag: value} that decide the result, beside the flags that all stages share
    label, summary                     for the run folder's name (None: nothing), and for the log ("": nothing)
    prepare(records, chat, limit, dropped) -> [(uuid, example)]; what is skipped is counted in `dropped` by reason
    facts(examples) -> {name: value}   for the run's sidecar; says in a line of the log what is worth knowing
    group(example) -> [Tokens]         its responses, each a whole conversation; they share their prompt
    weight(example)                    its share in the step's mean
    loss(model, batch, examples)       (loss summed over the examples, {metric: summed value})
    check_first(metrics, tolerance)    UserError where the first step's metrics show that something is wrong;
                                       `tolerance`: nats that rounding explains in a response's log-probability
Nothing here imports torch at module level: the flags of all stages are shown by --help.
"""

from cream.training.stages import dpo, sft

STAGES = {"sft": sft, "dpo": dpo}


def implied_by(record: type) -> str | None:
    """The stage that trains on such records unless --train_stage names another; None where no stage does."""
    return next((name for name, stage in STAGES.items() if stage.RECORDS[0] is record), None)
