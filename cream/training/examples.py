"""A run's data: the records that are trained on and those that are held out, as examples with their references."""

import logging
from collections import Counter
from collections.abc import Sequence

from cream.errors import UserError
from cream.files import store
from cream.files.provenance import read_meta
from cream.files.store import MALFORMED
from cream.model.checkpoint import length_limit
from cream.model.hardware import Budget
from cream.model.load import load_policy
from cream.model.logprobs import LogProbs
from cream.model.precision import Precision
from cream.records import Pair, nouns
from cream.rewards.pairwise import check_labels
from cream.scoring.cache import Source
from cream.text.refusals import find_refusals
from cream.training import parallel, reference
from cream.training.heldout import HeldOut, split, without_trained
from cream.training.job import Job
from cream.training.stages import STAGES

log = logging.getLogger("cream")


def read_examples(
    job: Job, chat, dropped: Counter[str]
) -> tuple[list[tuple[str, object]], dict[str, str], dict, HeldOut | None]:
    """The stage's (uuid, example) rows; the records that the chat template refuses, and why; what the sidecar says of
    the rows; and the held-out examples, if there are any."""
    skip = job.config.run.skip
    kind = store.detect(job.data, skip=skip)
    if form := (read_meta(job.data) or {}).get("pairwise"):
        check_labels(chat, form["labels"], str(job.start))  # which could not be asked for them later
    records = list(store.read(job.data, kind, job.limit_size, skip=skip))
    refused = find_refusals(job.data, records, chat, skip)
    records = [record for record in records if record.uuid not in refused]
    records, held = _hold_out(job, records, chat)
    rows = job.stage.prepare(records, chat, length_limit(job.config.data.max_length, job.start), dropped)
    for reason, count in dropped.items():
        log.info("dropped %d of %d records: %s", count, len(records), reason)
    if skip and (bad := sum(1 for _ in store.rejected(job.data, kind, job.limit_size, refused))):
        dropped[MALFORMED] = bad
    if not rows:
        raise UserError(f"{job.data}: no record is left to train on (dropped: {dict(dropped)})")
    examples = [example for _, example in rows]
    facts = {"records": len(records)} | job.stage.facts(examples) | response_facts(job.stage, examples, records)
    held_out, more = _prepare_held_out(job, held, records, chat) if held is not None else (None, {})
    return rows, refused, facts | more, held_out


def response_facts(stage, examples: Sequence, records: Sequence) -> dict[str, float]:
    """What training is like by its data: the mean number of scored tokens per response; of pairs the share of truncated
    responses."""
    tokens = [row.num_response_tokens for example in examples for row in stage.group(example)]
    cut = [end for record in records if isinstance(record, Pair) for end in _ends(record)]
    return {"response_tokens": sum(tokens) / len(tokens)} | ({"truncated": sum(cut) / len(cut)} if cut else {})


def _ends(pair: Pair) -> tuple[bool, bool]:
    return bool(pair.selected_truncated), bool(pair.rejected_truncated)


def _hold_out(job: Job, records: list, chat) -> tuple[list, list | None]:
    """(The records that are trained on, and the held-out ones, None where none are asked for)."""
    options, skip = getattr(job.stage, "held_out", None), job.config.run.skip
    if options is None or not options.any:
        return records, None
    if job.held_out is None:
        return split(records, options.eval_share, job.config.run.seed)
    kind = store.detect(job.held_out, skip=skip)
    if kind not in STAGES[job.name].RECORDS:
        raise UserError(f"--eval_name {job.held_out} holds {nouns(kind)}, on which {job.name} does not train")
    held = list(store.read(job.held_out, kind, skip=skip))
    refused = find_refusals(job.held_out, held, chat, skip)
    return records, [record for record in held if record.uuid not in refused]


def _prepare_held_out(job: Job, held: list, records: list, chat) -> tuple[HeldOut, dict]:
    """The held-out examples, and what the sidecar says of them."""
    options, dropped = job.stage.held_out, Counter()
    where = f"--eval_share {options.eval_share:g} of {job.data}"
    if job.held_out is not None:
        where, held = str(job.held_out), without_trained(held, records, dropped)
    rows = job.stage.prepare(held, chat, length_limit(job.config.data.max_length, job.start), dropped)
    if not rows or not records:
        left = "trained on" if rows else "held out"
        raise UserError(f"{where}: no record is {left} (dropped: {dict(dropped)}); give another file or share")
    log.info("held out: %d records (%s); dropped %s", len(rows), where, dict(dropped) or "none")
    return HeldOut(job.stage, rows, options.eval_every), {"held_out": {"records": len(rows), "dropped": dict(dropped)}}


def fill_references(
    job: Job, accelerator, model, rows: list, held_out: HeldOut | None, precision: Precision, tokens: Budget
) -> dict[str, dict[str, int]]:
    """The log-probabilities that the stage's examples are to hold, under the starting policy and under others; returns
    by model and source how many examples got theirs from it."""
    reuse: dict[str, dict[str, int]] = {}
    stage, examples, inputs = job.stage, [example for _, example in rows], job.header["inputs"]
    single = job.config.optimisation.epoch == 1 and len(rows) <= job.config.optimisation.global_batch(
        accelerator.num_processes
    )
    if stage.reference and not (single and getattr(stage, "first_step_free", False)):
        source = Source(inputs["start"], precision.name, accelerator.device.type)
        reference.check_recorded(stage, examples, job.data, job.header, source)
        reuse["reference"] = reference.fill(accelerator, model, stage, rows, job.data, source, tokens)
        if held_out:
            data, about = job.held_out or job.data, {"data": inputs.get("held_out", inputs["data"])}
            reference.check_recorded(stage, held_out.examples, data, job.header | {"inputs": inputs | about}, source)
            reuse["held out"] = reference.fill(accelerator, model, stage, held_out.rows, data, source, tokens)
    for name, folder in job.models.items():
        source = Source(inputs[name], precision.name, accelerator.device.type)
        with parallel.whole_models(accelerator):
            other = LogProbs(load_policy(folder, precision.dtype, accelerator.device))
        reference.check_vocabulary(other.plain.config.get_text_config().vocab_size, stage, examples, folder)
        reuse[name] = reference.fill(accelerator, other, stage, rows, job.data, source, tokens, name)
    if hasattr(stage, "settle"):
        stage.settle(examples)
    return reuse
