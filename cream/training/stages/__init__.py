"""Training stages by name: the methods that train.py can train by. A new one is a file here and a line in STAGES.

A stage is a module (dpo.py is the example) that holds

    Options    a dataclass of its own flags; its docstring is their title in train.py --help
    RECORDS    the record types that it trains on; data of the first imply this stage, if no earlier one has it first
    Stage(options, about)    `about`: the sidecar of the data, {} without one. Raises UserError where options contradict
               each other or the data. It is pickled to every process that trains, and offers

    model      what the loss calls: "logprobs" (a language model: batch -> log π of the scored tokens, (K,)) or "heads"
               (a reward model: batch -> its head's outputs, (K, outputs); batch.owner says of which response each is)
    head       with "heads": {"outputs": 1, "reads": "last_token" or "step_token"}. Training starts from a policy, on
               which a new head is put, or from a reward model with such a head; what is saved is a reward model
    labels     optional: the names of its outputs, in config.json
    reference  the attribute of an example, a sequence of floats, that is to hold the log-probabilities of its group
               under the policy that training starts from (nats; NaN: to be computed); None: no reference ("heads")
    per_token  optional: True where log-probabilities under other policies are lists, of a response's tokens
    first_step_free   optional: whether a run of a single step computes no reference: the loss takes NaN for the value
               of the policy itself, which has not moved
    models     optional: {attribute of an example: a checkpoint as --checkpoint names it, None: M0}: other policies, of
               which the attribute is to hold the log-probabilities, too; the attribute's name is also the flag's
    made_for_policy   whether the data are pairs made for the very policy that training starts from
    unit       what a step's mean is over, in metric names: "pairs"
    settings   {flag: value} that decide the result, beside the flags that all stages share
    about      optional: what the sidecar of a checkpoint says besides, such as the form of its text
    label, summary    for the run folder's name (None: nothing), and for the log ("": nothing)

    held_out   optional: a heldout.HeldOutOptions, of flags by which records are held out, and prepared after those that
               are trained on; what its loss returns as metrics is then logged of these too, an accuracy with its
               interval
    cap        optional: the mean `margin` at which the loss is least, for an alarm (cream/alarms.py); or None

    prepare(records, chat, limit, dropped) -> [(uuid, example)]    skipped records are counted in `dropped`, by reason
    facts(examples) -> {name: value}       for the run's sidecar; logs what is worth knowing
    settle(examples)                       optional: called when all log-probabilities under other policies are known
    group(example) -> [Tokens]             its responses, each a whole conversation with its loss mask (spans); they
                                           share their prompt
    weight(example) -> int                 its share in the step's mean
    loss(model, batch, examples) -> (sum over the examples, {metric: sum})    scalars; `batch` holds their groups
    of_all(outputs, examples) -> (term, {metric: value})    optional: a term of the step's loss that is no mean over
               examples (a correlation, say), of the head's outputs for all responses of the global batch, (examples,
               responses, outputs); the step costs a forward pass more. loss() then takes `slopes` as well, of the
               same shape for its examples, and adds sum(slopes x outputs) to what it returns, or none for held-out ones
    check_first(metrics, tolerance)        raises UserError where the first step's metrics show a fault; `tolerance`:
                                           nats that rounding explains in a response's log-probability

A stage may bring its own trainer, as online_rloo.py does, where training is not a loss over examples that are there
from the start. It has model, unit, made_for_policy, settings, label and summary, and in place of the rest

    run(job) -> {"counts": …, "last": metrics, "refused": {uuid: why}}    trains in each process, with signals,
               log.jsonl and state/ as the loop has them; begins by open_folder(job), saves by save_checkpoint(job, …),
               both of cream/training/run.py, which then writes the sidecar

Any stage may have add_inputs(config, data, start, provenance): adds what decides the run beside data and starting
model, and refuses what does not suit, before anything is loaded. What it keeps is pickled to every process.

Import torch inside functions only: --help shows the flags of all stages.
"""

from cream.files.provenance import POLICY
from cream.training.stages import bradley_terry, dpo, grpo, odin, online_rloo, orm, prm, rloo, sft

STAGES = {"sft": sft, "dpo": dpo, "bradley_terry": bradley_terry, "odin": odin, "prm": prm, "orm": orm}
STAGES |= {"rloo": rloo, "grpo": grpo, "online_rloo": online_rloo}
STARTS = {"logprobs": POLICY, "heads": None}  # a stage's `model` -> the kind of model it starts from; None: any


def implied_by(record: type) -> str | None:
    """The stage that trains on such records unless --train_stage names another; None where no stage does."""
    return next((name for name, stage in STAGES.items() if stage.RECORDS[0] is record), None)
