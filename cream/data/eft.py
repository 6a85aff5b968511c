"""Judge-training data (evaluation fine-tuning, EFT) from responses that people ranked, and a judge's own words on them.

Self-Rewarding Language Models (arXiv 2401.10020, §3.1.2): the SFT model judges each response; where its ranking agrees
with people's, the request and its judgement, reasons included, are training data; scores that are too frequent are
thinned. Departures from the later code (AutoAlign): the whole ranking has to agree, unless told otherwise; the target
is the judgement, not people's number; a prompt is either in the training or in the held-out part; held-out prompts are
drawn before anybody asks whether the judge agrees, so that a judge can be measured on them.
"""

import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import floor
from pathlib import Path

from cream.cli.console import command
from cream.cli.flags import fields_of, flag
from cream.cli.screen import say_result
from cream.data.build import shuffled
from cream.data.judgements import OTHERWISE, agreeing, balanced, prompts_of, targets
from cream.errors import UserError
from cream.files import journal, store
from cream.files.fingerprints import fingerprint_text
from cream.files.provenance import Provenance, place_of
from cream.records import Conversation, Record, Rewards, Samples, encode
from cream.rewards import judge
from cream.text.judge_prompts import JUDGE_PROMPTS
from cream.text.overlap import prompt_text, whole

log = logging.getLogger("cream")
Number = float | None

QUARTER = 0.25  # of the prompts is held out
SEED = "its prompt is in --seed_data"
REPEATED = "equals another response to its prompt"
TOO_MANY = "its score is too frequent"


@dataclass
class EftFlags:
    """Judge training (eft)"""

    ranks: str | None = flag(
        None,
        "eft: a file of records with a uuid and `ranks`, a number per response, the lowest is best; none: the `ranks` "
        "that the judged records have",
    )
    seed_data: str | None = flag(
        "oasst_sft", "eft: SFT data whose prompts are kept out, a name or a file; none: there is none"
    )
    agree: str = flag(
        "ranking",
        "eft: ranking, responses count where the judge ranks all to a prompt as people do; position, each that is at "
        "people's position in the judge's ranking",
        choices=("ranking", "position"),
    )
    eft_size: int | None = flag(
        None,
        "eft: at most this many records, held-out ones included (the paper: 2171), the same number of each score where "
        "there are as many; none: the most frequent score is thinned to the number of the next one",
        low=1,
    )
    with_seed: bool = flag(
        False, "eft: put the conversations of --seed_data into the training file as well, as the paper trains on both"
    )


@dataclass
class Part:
    """The training or the held-out part: its prompts' records; what it keeps of them, and why it does not keep others,
    in responses; and how many of each score agree with people."""

    records: list[Rewards]
    kept: list[Conversation] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    agreed: Counter[int] = field(default_factory=Counter)

    def scores(self) -> Counter[int]:
        """How many of each score it keeps."""
        return Counter(floor(conversation.extra["score"]) for conversation in self.kept)


def make(path: Path, flags, seed_data: Path | None, output: Path, seed: int, run) -> None:
    """Write the training file `output`, and beside it the held-out part in the same form, and as ranked responses.

    path: what rewarding.py --reward judge wrote of responses that people ranked. Raises UserError where it is anything
    else, has no ranks, or leaves nothing to train on.
    """
    flags = replace(flags, held_out=QUARTER if flags.held_out is None else flags.held_out)
    if flags.held_out >= 1:
        raise UserError(f"--held_out {flags.held_out:g}: eft holds out a share of the prompts, below 1")
    store.refuse_other_kind("eft:", path, Rewards, "which rewarding.py --reward judge writes")
    provenance = run.provenance()
    options = _judge_of(path, provenance)
    records = list(store.read(path, Rewards, skip=run.skip))
    for record in records:
        _check_words(path, record, options)
    gold = _gold(path, records, flags.ranks, provenance, run.skip)
    seeds = _seeds(seed_data, flags, provenance, run.skip)
    whats = {"agree": flags.agree, "eft_size": flags.eft_size, "held_out": flags.held_out, "seed": seed}
    settings = whats | {"with_seed": flags.with_seed, "on_bad_record": run.on_bad_record}
    places = {
        "train": output,
        "held_out": _beside(output, "held_out.sft"),
        "ranked": _beside(output, "held_out.ranked"),
    }
    how = {"overwrite": run.overwrite}
    outputs = {p: journal.Output(place, settings | {"part": p}, provenance, **how) for p, place in places.items()}
    if run.dry_run:
        log.info("dry run: would write %s; nothing was written", ", ".join(map(str, places.values())))
        return
    if all(each.up_to_date for each in outputs.values()):
        say_result("%s is up to date (same settings and inputs); skipping", output)
        return
    train, held = _parts(records, gold, prompts_of(seeds), options, flags, seed)
    _describe(train, held)
    if not train.kept:
        raise UserError(f"{path}: no judgement is left to train on ({_reasons(train.dropped)}){_advice(train)}")
    if run.skip:
        outputs["train"].reject(store.rejected(path, Rewards))
    _write(outputs, train, held, seeds if flags.with_seed else [], gold, judge.describe_form(options.form))
    log.info("next, train the SFT model on it, the checkpoint SFT that judged:")
    log.info("  python train.py --train_stage sft --checkpoint SFT --name %s", output)
    if flags.held_out:
        asked = {"judge_prompt": options.judge_prompt, "input_file": outputs["ranked"].path, "output": "JUDGED.json"}
        log.info("then let the trained checkpoint TRAINED judge the held-out responses, and see how good it is:")
        log.info("  %s", command("rewarding.py", reward="judge", checkpoint="TRAINED", **asked))
        log.info("  python report.py judge JUDGED.json --ranks JUDGED.json")


def _write(
    outputs: Mapping[str, journal.Output],
    train: Part,
    held: Part,
    seeds: Sequence[Conversation],
    gold: Mapping[str, list],
    form: dict,
) -> None:
    """Write those of the three files that are not up to date; `form`: the judge's, for checkpoints trained on them."""
    scores = {name: _spelled(part.scores()) for name, part in (("train", train), ("held_out", held))}
    facts = {"judge": form, "scores": scores | {"agreed": _spelled(train.agreed + held.agreed)}}
    files = {
        "train": ([*seeds, *train.kept], train.dropped, facts),
        "held_out": (held.kept, held.dropped, facts),
        "ranked": ([_ranked(record, gold[record.uuid]) for record in held.records], Counter(), {}),
    }
    for name, (kept, dropped, about) in files.items():
        output = outputs[name]
        if not output.up_to_date:
            with output:
                output.dropped += dropped
                output.finish(map(encode, kept), **about)
        say_result("%s: %d records", output.path, len(kept))


def _judge_of(path: Path, provenance: Provenance) -> judge.Options:
    """The flags of the judge whose rewards a file has, by its sidecar. Raises UserError where it was not asked for
    scores in words, or where its form is not what it was."""
    about = provenance.output("judged", path)
    settings, inputs = about.get("settings", {}), about.get("inputs", {})
    if settings.get("reward") != "judge":
        made = "it has no sidecar" if not about else f"its rewards are by {settings.get('reward')}"
        raise UserError(f"{path}: eft needs a judge's words, which rewarding.py --reward judge writes; {made}")
    own = {each.name for each in fields_of(judge.Options)}
    flags = {name: value for name, value in settings.items() if name in own}
    options = judge.Options(**flags, judge_prompt=_judge_prompt(path, about))
    if options.expected:
        raise UserError(
            f"{path}: --judge_mode expected wrote no judgements to train on; judge with --judge_mode sampled"
        )
    judge.check(options)
    if options.form.pairwise:
        raise UserError(f"{path}: a pairwise judge gives no scores; judge with another --judge_prompt")
    now = {name: fingerprint_text(text) for name, text in judge.contents(options).items()}
    for name, (file, _) in judge.files(options).items():
        provenance.file(name, file)
        now[name] = provenance.inputs[name]
    if changed := [name for name, digest in now.items() if inputs.get(name) != digest]:
        value = getattr(options, changed[0])
        raise UserError(f"{path}: --{changed[0]} {value} has other words now than when it judged these")
    return options


def _check_words(path: Path, record: Rewards, options: judge.Options) -> None:
    """Raises UserError where a record lacks what its sidecar promises: it was changed, and --force was given."""
    names = {f"judge_{k + 1}" for k in range(options.judge_samples)}
    scores, texts = record.parts.get("scores", [0]), record.texts
    lists = all(each is None or isinstance(each, list) and len(each) == len(names) for each in scores)
    if not lists or not names <= texts.keys():
        raise UserError(
            f"{path}: record {record.uuid!r} lacks what the judge said of its responses: `parts.scores`, and `texts` "
            f"of {len(names)} judgements"
        )


def _judge_prompt(path: Path, about: dict) -> str:
    """The --judge_prompt of a judged file: its file, or the named one whose words were recorded; as its words decide,
    settings have no name of it."""
    if place := about.get("sources", {}).get("judge_prompt"):
        return os.path.relpath(place_of(path.parent, place))
    for name in JUDGE_PROMPTS:
        words = judge.contents(judge.Options(judge_prompt=name))["judge_prompt"]
        if fingerprint_text(words) == about.get("inputs", {}).get("judge_prompt"):
            return name
    raise UserError(f"{path}: its named --judge_prompt has other words in this version; judge again")


def _gold(path: Path, records: list[Rewards], ranks: str | None, provenance: Provenance, skip: bool) -> dict[str, list]:
    """uuid -> people's values of a prompt's responses, the higher the better, all None for a prompt without."""
    from cream.evaluation.judges import collect, gold_ranks

    ranked: Iterable[Record] = records
    if ranks is not None:
        provenance.file("ranks", ranks)
        ranked = store.read(Path(ranks), Record, skip=skip)
    judged = collect(records)
    gold = dict(zip(judged.uuids, gold_ranks(judged, ranked), strict=True))
    if not any(value is not None for row in gold.values() for value in row):
        raise UserError(
            f"{ranks or path}: no record has `ranks`, by which people ranked its responses; docs/judges.md says how to "
            "make such a file" + ("" if ranks else ", or give one with --ranks")
        )
    return gold


def _seeds(path: Path | None, flags: EftFlags, provenance: Provenance, skip: bool) -> list[Conversation]:
    if path is None:
        if flags.with_seed:
            raise UserError("--with_seed: there is no --seed_data")
        return []
    if not path.exists():
        raise UserError(f"--seed_data {flags.seed_data}: {path} does not exist; give the SFT data, or none")
    provenance.file("seed_data", path)
    store.refuse_other_kind("--seed_data", path, Conversation, "which SFT trains on")
    return list(store.read(path, Conversation, skip=skip))


def _parts(
    records: list[Rewards],
    gold: Mapping[str, list],
    seeds: set[int],
    options: judge.Options,
    flags: EftFlags,
    seed: int,
) -> tuple[Part, Part]:
    """The training and the held-out part."""
    fresh = [record for record in records if whole(prompt_text(record)) not in seeds]
    uuids = shuffled((record.uuid for record in fresh), seed)
    held_uuids = {*uuids[: round(flags.held_out * len(uuids))]}
    train, held = (Part([r for r in fresh if (r.uuid in held_uuids) == where]) for where in (False, True))
    train.dropped[SEED] = sum(len(record.response) for record in records) - sum(len(r.response) for r in fresh)
    sizes = [None, None]
    if flags.eft_size is not None:
        sizes = [flags.eft_size - round(flags.held_out * flags.eft_size), round(flags.held_out * flags.eft_size)]
    for part, size in zip((train, held), sizes, strict=True):
        for record in part.records:
            kept, lost = agreeing(record.reward, gold[record.uuid], flags.agree)
            texts = record.responses()
            first = [i for i in kept if texts.index(texts[i]) == i]
            part.dropped += lost + Counter({REPEATED: len(kept) - len(first)})
            part.kept += targets(record, first, options)
        part.agreed = part.scores()
        agreed, part.kept = len(part.kept), balanced(part.kept, size, seed)
        part.dropped[TOO_MANY] = agreed - len(part.kept)
        part.dropped = +part.dropped
    return train, held


def _ranked(record: Rewards, gold: Sequence[Number]) -> Samples:
    """The responses of a record with their ranks, to be judged again."""
    ranks = [None if value is None else -value for value in gold]
    return Samples(uuid=record.uuid, prompt=record.prompt, responses=record.responses(), extra={"ranks": ranks})


def _beside(output: Path, part: str) -> Path:
    """eft.sft.json -> eft.held_out.sft.json."""
    head, dot, ending = output.name.rpartition(".json")
    return output.with_name(f"{head.removesuffix('.sft')}.{part}{dot}{ending}")


def _describe(train: Part, held: Part) -> None:
    """Log why responses are dropped, and the counts per score."""
    log.info("%d prompts to train on, %d held out", len(train.records), len(held.records))
    for reason, count in (train.dropped + held.dropped).items():
        log.info("  %d responses dropped: %s", count, reason)
    agreed, left = train.agreed + held.agreed, train.scores()
    log.info("score: agreed -> training + held out")
    for score in sorted(agreed):
        log.info("  %d: %d -> %d + %d", score, agreed[score], left[score], held.scores()[score])
    log.info("  all: %d -> %d + %d", agreed.total(), left.total(), held.scores().total())


def _spelled(counts: Counter[int]) -> dict[str, int]:
    return {str(score): count for score, count in sorted(counts.items())}


def _reasons(dropped: Mapping[str, int]) -> str:
    return "; ".join(f"{count} responses: {reason}" for reason, count in dropped.items())


def _advice(train: Part) -> str:
    if train.dropped and max(train.dropped, key=train.dropped.__getitem__) == SEED:
        return ". Build a smaller seed set (--sft_limit), or give --seed_data none"
    return ". --agree position keeps more" if OTHERWISE in train.dropped else ""
