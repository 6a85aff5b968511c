"""Two rankings of the same answers -> consistency per prompt, and the preference pairs that DPO trains on.

c = (τ + 1) / 2 with Kendall's τ between the current model's rewards (--file1, which also gives the pairs: best against
worst) and the previous model's (--file2). Departures from the released code: values are stored by uuid, ties are ties
(τ-b), equal answers count once, answers without a reward or cut at the length limit stay out.
"""

from collections import deque
from collections.abc import Iterator
from pathlib import Path

from config import DATASET_FILES, DATASETS, METHODS, ConsistencyConfig, settings
from cream.cli import console, names, preflight
from cream.cli.console import log
from cream.cli.flags import parse
from cream.consistency import margin_cap, shuffled
from cream.errors import UserError
from cream.evaluation.tasks import Question
from cream.files import journal, store
from cream.pairs.build import MISSING, OTHER, PairSet, build, consistencies
from cream.records import Rewards, encode

EXAMPLE = """\
  CREAM        python cal_consistency.py --file1 CURRENT.json --file2 PREVIOUS.json --method consistency_avg
  self-reward  python cal_consistency.py --file1 CURRENT.json --register dpo_t1
  Oracle       python cal_consistency.py --file1 CURRENT.json --labels localdata/tiny/labels.json"""


@console.stage
def main(argv=None):
    config = parse(ConsistencyConfig, argv, description=__doc__, example=EXAMPLE)
    c = config.consistency
    if c.file1 is None:
        raise UserError("--file1 is missing: the current model's rewards, as rewarding.py writes them")
    method, rank = _method_and_rank(c)
    first = Path(c.file1)
    target = Path(c.output) if c.output else first.with_name(f"{first.name.partition('.json')[0]}.{rank}.dpo.json")
    sources = {name: path for name in ("file1", "file2", "labels") if (path := getattr(c, name))}
    provenance = config.run.provenance()
    about = provenance.output("file1", first)
    if c.file2:
        provenance.output("file2", Path(c.file2))
    if c.labels:
        provenance.file("labels", c.labels)
    if provenance.inputs.get("file2") == provenance.inputs["file1"]:
        raise UserError("--file2 is --file1: every C would be 1; leave --file2 out for plain self-rewarding")
    policy = about.get("policy")
    if c.file2 and about.get("reward") == "likelihood":
        log.info("note: --file1 was rewarded by likelihood; CREAM's current ranking is a DPO reward. Swapped?")
    flat = settings(config) | {"rank": rank, "method": method}
    output = journal.Output(target, flat, provenance, overwrite=config.run.overwrite)
    if c.register:
        names.check_free(DATASETS, c.register, target, overwrite=config.run.overwrite, known=DATASET_FILES)
    facts = {"method": method, "rank": rank, "policy": policy, "scored": about.get("scored")}
    rows = _rows(config, rank, output, about.get("settings", {}).get("normalize") == "sum")
    if config.run.dry_run:
        deque(rows, maxlen=0)
        log.info("dry run: would read %s and write %s; nothing was written", ", ".join(sources.values()), target)
        return
    if output.stands:
        log.info("%s stands already, made by the same settings from the same inputs", target)
    else:
        preflight.room(target, 0.2 * first.stat().st_size, "the pairs")
        with output:
            output.finish(rows, **facts)
    if c.register:
        names.register(DATASETS, c.register, target, overwrite=config.run.overwrite)
        log.info("registered as %s in %s", c.register, DATASETS.name)
    log.info("pairs: %s\nnext, training on them, from the policy that --file1 was rewarded by:", target)
    start = {"model": policy["model"], "checkpoint": policy["checkpoint"]} if policy else {"checkpoint": "CHECKPOINT"}
    log.info("  %s", console.command("train.py", **start, name=c.register or target, method=method))


def _method_and_rank(c) -> tuple[str, str]:
    """--method says which C training uses; a rank's name there is the released scripts' spelling of --rank."""
    default = "consistency_avg" if c.file2 else "original"
    if c.method not in (None, *METHODS):
        if c.rank not in (None, c.method):
            raise UserError(f"--method {c.method} contradicts --rank {c.rank}")
        return default, c.method
    if c.method not in (None, "original") and not c.file2:
        raise UserError(
            f"--method {c.method} needs --file2, the previous model's rewards; without it C is 1 everywhere"
        )
    return c.method or default, c.rank or "kendall"


def _rows(config: ConsistencyConfig, rank: str, output: journal.Output, summed: bool) -> Iterator[dict]:
    """The pairs as they are made; what is known after the last only is then reported, and given to the sidecar."""
    c, made = config.consistency, _build(config, rank, summed)
    yield from map(encode, made.pairs)
    _report(made, c.beta)
    if not made.count:
        raise UserError(f"{c.file1}: no pair can be made of it, for the reasons above; nothing was written")
    if config.run.skip:
        kinds = ((c.file1, Rewards), (c.file2, Rewards), (c.labels, Question))
        output.reject(bad for path, kind in kinds if path for bad in store.rejected(Path(path), kind))
    output.dropped += made.dropped + made.unmatched
    if made.unmatched and config.run.force:
        output.provenance.object(f"{made.unmatched.total()} records of --file1 and --file2 do not match")
    output.facts = {"mean_consistency": made.consistency.mean, "without_consistency": made.without_c}


def _build(config: ConsistencyConfig, rank: str, summed: bool) -> PairSet:
    c = config.consistency
    allow = (MISSING, OTHER) if config.run.force else (MISSING,) if config.run.skip else ()
    skip = config.run.skip

    def check():
        if not skip:  # what stands there twice is passed over otherwise
            store.check_unique(Path(c.file2))

    ranking = {"rank": rank, "keep_truncated": c.keep_truncated, "allow": allow, "check": check}

    def files():
        first = store.read(Path(c.file1), Rewards, skip=skip)
        return first, store.read(Path(c.file2), Rewards, skip=skip, unique=False) if c.file2 else None

    dealt = None
    if c.shuffle_consistency is not None:  # a pass of its own: every c must be known before the first is dealt out
        dealt = shuffled(consistencies(*files(), **ranking), c.shuffle_consistency)
    labels = {item.uuid: item for item in store.read(Path(c.labels), Question, skip=skip)} if c.labels else None
    return build(*files(), **ranking, labels=labels, dealt=dealt, summed=summed)


def _report(made: PairSet, beta: float) -> None:
    log.info("%s", ", ".join(f"{count} {what}" for what, count in made.answers.items()))
    log.info("%d pairs", made.count)
    for reason, count in (made.dropped + made.unmatched).items():
        log.info("  no pair from %d prompts: %s", count, reason)
    if made.without_c:
        log.info("  %d prompts without c (the previous ranking is constant): training takes the mean", made.without_c)
    if (longer_by := made.lengths.longer_by) is not None:
        bias = "undefined" if made.lengths.bias is None else f"{made.lengths.bias:+.2f}"
        log.info("chosen answers are %+.1f tokens longer; reward and length correlate by %s", longer_by, bias)
    d = made.consistency
    if d.mean is None:
        log.info("no prompt has a consistency")
        return
    spread = "undefined" if d.std is None else f"{d.std:.3f}"
    below = 100 * d.below_half
    log.info("C of %d prompts: mean %.3f, standard deviation %s, below 1/2: %.1f %%", d.n, d.mean, spread, below)
    for i, count in enumerate(d.histogram):
        log.info("  %.1f  %6d  %s", i / 10, count, "#" * round(40 * count / max(d.histogram)))
    cap = float(margin_cap(d.mean, beta))
    log.info("with beta %g the mean C lets a pair's log-ratio margin grow to logit(C) / beta = %.3g nats", beta, cap)


if __name__ == "__main__":
    main()
