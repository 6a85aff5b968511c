"""Files of rewards or samples -> a file of pairs: what cal_consistency.py and make_pairs.py have in common."""

import logging
import shlex
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cream import alarms
from cream.cli import advice, console, names, preflight
from cream.cli.flags import flag
from cream.errors import UserError
from cream.files import journal
from cream.pairs.build import Rules
from cream.pairs.files import Inputs
from cream.records import RANKS, encode

log = logging.getLogger("cream")


@dataclass
class PairOutput:
    """Pairs"""

    rank: str | None = flag(None, "measure of the agreement of two rankings; none: kendall", choices=RANKS)
    keep_truncated: bool = flag(False, "allow truncated responses in pairs")
    beta: float | None = flag(
        None,
        "beta of the training to come: for the largest margin that C allows, logit(C) / beta, and the next command; "
        "none: as in the round before, else as in the model's recipe, else 0.1",
        above=0,
        decides=False,
    )
    output: str | None = flag(
        None,
        "output file; none: next to the rewards or samples, with their name and .<rank>.dpo.json (make_pairs.py: "
        ".<strategy>.dpo.json)",
        aliases=("output_dir",),
        decides=False,
    )
    allow_empty: bool = flag(
        False,
        "where no pair can be made, write an empty file: in a loop, the next step joins it with other pairs",
        decides=False,
    )
    register: str | None = flag(None, "name to register the pairs under, in configs/dataset.json", decides=False)

    def path(self, source: Path, suffix: str) -> Path:
        """The output's file; `source`: the rewards or samples."""
        return Path(self.output or source.with_name(f"{source.name.partition('.json')[0]}.{suffix}.dpo.json"))


def write(
    inputs: Inputs,
    rules: Rules,
    target: Path,
    settings: dict,
    flags: PairOutput,
    registry: tuple[Path, Mapping[str, str]],
    *,
    method: str | None,
    shuffle: int | None = None,
    limits: alarms.Limits = alarms.LIMITS,
    **facts,
) -> None:
    """Make the pairs, report on them, register them, and say how to train on them.

    `settings` are those of the output, `registry` its file and the built-in names beside it. `method`: which C training
    is to use; None: the strategy's own confidences, else the mean of the c's, 1 without a previous ranking. `limits`:
    of alarms; `facts` join the sidecar. Raises UserError where there is not one pair.
    """
    run, policy = inputs.run, inputs.about.get("policy")
    output = journal.Output(target, settings, inputs.provenance, overwrite=run.overwrite)
    if flags.register:
        names.check_free(registry[0], flags.register, target, overwrite=run.overwrite, known=registry[1])
    training = inputs.training(flags.beta)
    rows = _rows(inputs, rules, shuffle, output, training["beta"], method, limits, flags.allow_empty)
    if run.dry_run:
        deque(rows, maxlen=0)
        read = ", ".join(map(str, inputs.paths.values()))
        log.info("dry run: would read %s and write %s; nothing was written", read, target)
        return
    if output.up_to_date:
        console.say_result("%s is up to date (same settings and inputs); skipping", target)
    else:
        preflight.check_disk(target, 0.2 * inputs.source.stat().st_size, "the pairs")
        with output:
            output.finish(rows, policy=policy, scored=inputs.about.get("scored"), **facts)
    if flags.register:
        names.register(registry[0], flags.register, target, overwrite=run.overwrite)
        log.info("registered as %s in %s", flags.register, registry[0].name)
    console.say_result("pairs: %s", target)
    if inputs.of_pool:
        advice.say("next, join them with the labelled pairs:")
        advice.say("  python prepare_data.py join SEED.json %s --output TRAIN.json", shlex.quote(str(target)))
        return
    advice.say("next, train the model that sampled on them:")
    data = {"name": flags.register or target, "method": method}
    advice.say("  %s", console.command("train.py", **{**training, **data}))


def _rows(
    inputs: Inputs,
    rules: Rules,
    shuffle: int | None,
    output: journal.Output,
    beta: float,
    method: str | None,
    limits: alarms.Limits,
    allow_empty: bool,
) -> Iterator[dict]:
    """The pairs as they are made; then the report on them, and their part of the sidecar."""
    pair_set = inputs.pairs(rules, shuffle)
    yield from map(encode, pair_set.pairs)
    by_default = "consistency_avg" if "previous" in inputs.paths else "original"
    if pair_set.own and pair_set.c.n:
        by_default = "consistency_dyn"
    method = method or by_default
    pair_set.report(None if method == "original" else beta)
    if not pair_set.count and not allow_empty:
        raise UserError(
            f"{inputs.source}: no pair can be made of it, for the reasons above; nothing was written. In a loop that "
            "trains on other pairs as well, --allow_empty yes writes an empty file"
        )
    if not pair_set.count:
        log.warning("warning: no pair can be made of %s, for the reasons above; the file is empty", inputs.source)
    if inputs.run.skip:
        output.reject(inputs.rejected())
    output.dropped += pair_set.dropped + pair_set.unmatched
    if pair_set.unmatched and inputs.run.force:
        files = " and ".join(f"--{inputs.flags[role]}" for role in ("rewards", "previous"))
        output.provenance.object(f"{pair_set.unmatched.total()} records of {files} do not match")
    output.facts = {
        "method": method,
        "mean_consistency": pair_set.c.mean,
        "without_consistency": pair_set.without_c,
        "alarms": alarms.sound(pair_set.alarm_facts(used=method != "original"), limits),
        **pair_set.facts(),
    }
