"""Files of rewards -> a file of pairs: what cal_consistency.py and make_pairs.py have in common."""

import logging
import os
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cream.cli import advice, console, names, preflight
from cream.cli.flags import flag
from cream.consistency import shuffled
from cream.errors import UserError
from cream.evaluation.tasks import questions_in
from cream.files import journal, store
from cream.files.provenance import place_of, read_meta
from cream.pairs.build import Rules, build, consistencies
from cream.pairs.match import MISSING, OTHER
from cream.pairs.report import PairSet
from cream.records import RANKS, Record, Rewards, encode
from cream.text.options import GIVEN
from cream.text.templates import parse_variables

log = logging.getLogger("cream")
DEFAULT = {"lr": 1e-6, "beta": 0.1}  # of train.py, for advice


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
        "output file; none: next to the rewards, with their name and .<rank>.dpo.json (make_pairs.py: "
        ".<strategy>.dpo.json)",
        aliases=("output_dir",),
        decides=False,
    )
    register: str | None = flag(None, "name to register the pairs under, in configs/dataset.json", decides=False)

    def path(self, rewards: Path, suffix: str) -> Path:
        """The output's file."""
        return Path(self.output or rewards.with_name(f"{rewards.name.partition('.json')[0]}.{suffix}.dpo.json"))


def _kind(role: str, path: Path) -> type[Record]:
    return questions_in(path) if role == "labels" else Rewards


class Inputs:
    """The files that pairs are made of: `paths` by role (rewards, previous, labels; those that are given), `flags` how
    the script calls them, `about` the sidecar of the rewards ({} without one).

    `run` is the script's group of that name. Raises UserError where a file is not what its sidecar describes, or
    current and previous rewards are the same.
    """

    def __init__(self, run, flags: Mapping[str, str], files: Mapping[str, str | None]):
        self.run, self.flags = run, flags
        self.paths = {role: Path(files[role]) for role in flags if files[role] is not None}
        self.provenance = run.provenance()
        for role, path in self.paths.items():
            add = self.provenance.file if role == "labels" else self.provenance.output
            about = add(flags[role], path)
            if role != "labels":
                store.refuse_other_kind(f"--{flags[role]}", path, Rewards, "which rewarding.py writes")
            if role == "rewards":
                self.about = about
        hashes = self.provenance.inputs
        if "previous" in self.paths and hashes[flags["previous"]] == hashes[flags["rewards"]]:
            first, second = flags["rewards"], flags["previous"]
            raise UserError(f"--{second} is --{first}: every C would be 1; give no --{second} for plain self-rewarding")
        if "previous" in self.paths:
            self._check_text()
        self._check_rankings()

    def _check_text(self) -> None:
        """Objects if the two rankings are of other tokens of the same responses, by what their sidecars say; one that
        does not say what scored it is no objection."""
        paths = [self.paths[role] for role in ("rewards", "previous")]
        both = [self.about, read_meta(paths[1]) or {}]
        if not all(about.get("scored") for about in both):
            return
        now, before = (_text_of(about["scored"]) for about in both)
        names = [name for name in now if now[name] != before[name]]
        if None in (now["chat_template"], before["chat_template"]):  # it may be in the model's folder
            names = [name for name in names if name != "chat_template"]
        other = [f"{name}: {now[name] or 'none'} and {before[name] or 'none'}" for name in names]
        old = [each for each in zip(paths, both, strict=True) if "text" not in each[1]["scored"]]
        if len(old) == 1 and _may_rewrite(*old[0]):
            other.append(f"an earlier version scored {old[0][0]} as the chat template rewrites responses")
        if other:
            first, second = (f"--{self.flags[role]}" for role in ("rewards", "previous"))
            self.provenance.object(
                f"{first} and {second} rank other texts of the same responses ({'; '.join(other)}); score both alike"
            )

    def _check_rankings(self) -> None:
        """Objects if the previous ranking is by the model that sampled and the current one is not; says so if neither
        is: training starts from the model of the current ranking."""
        sampler, ranks = (about.get("inputs", {}).get("policy") for about in (self._samples()[1], self.about))
        if None in (sampler, ranks) or ranks == sampler:
            return
        first, second = (f"--{self.flags[role]}" for role in ("rewards", "previous"))
        previous = read_meta(self.paths["previous"]) if "previous" in self.paths else None
        if previous and previous.get("inputs", {}).get("policy") == sampler:
            self.provenance.object(
                f"{first} ranks by a model that did not sample these responses, {second} by the one that did: they "
                "seem to be swapped"
            )
        log.info("note: the model that ranks in %s is not the one that sampled; training starts from it", first)

    def _samples(self) -> tuple[Path, dict]:
        """The samples' file and its sidecar, {} where it is not there any more."""
        path = place_of(self.paths["rewards"].parent, self.about.get("sources", {}).get("input_file", ""))
        with suppress(UserError, OSError):
            return path, read_meta(path) or {}
        return path, {}

    @property
    def summed(self) -> bool:
        """Whether `score` holds log-probabilities, summed over a response: only these may become DPO's reference."""
        return bool(self.about.get("scored")) and self.about["settings"].get("normalize") == "sum"

    def training(self, beta: float | None) -> dict[str, object]:
        """The flags of the training to come: as the policy was trained in the round before, else as its recipe says."""
        policy = self.about.get("policy")
        if policy is None:
            return {"checkpoint": "CHECKPOINT", "lr": DEFAULT["lr"], "beta": beta or DEFAULT["beta"]}
        place = self.about["sources"].get("policy")
        before = advice.round_before(place_of(self.paths["rewards"].parent, place)) if place else {}
        flags = before["train"][1] if before else {**DEFAULT, **advice.recipe(policy["model"]).get("dpo", {})}
        usual = {**self._computation(), **flags}
        now = {"device": usual.get("device"), "model": policy["model"], "checkpoint": policy["checkpoint"]}
        now |= self._text()
        return {**now, **usual, **now, "beta": beta or advice.number(flags.get("beta"), DEFAULT["beta"])}

    def _computation(self) -> dict[str, object]:
        """The flags of the rewards' command that say where and how training computes, where nothing else does."""
        given = advice.as_given(self.about.get("command", ["rewarding.py"])[1:])
        device, bf16 = given.get("device"), self.about["settings"].get("bf16")
        return {
            "device": None if device == "cuda" else device,  # which names a cluster's, to rewarding.py only
            "bf16": bf16 if isinstance(bf16, bool) else given.get("bf16"),
            "max_length": given.get("max_length"),
        }

    def _text(self) -> dict[str, str | None]:
        """The flags that decide how a response becomes tokens: as it was scored, else as it was sampled."""
        path, about = (self.paths["rewards"], self.about) if self.about.get("scored") else self._samples()
        scored = about.get("scored") or about.get("settings", {})
        return {"chat_template": _template(path, about), **{name: scored.get(name) for name in GIVEN}}

    def read(self, role: str, **how) -> Iterator | None:
        """The records of a role's file; None where there is none."""
        path = self.paths.get(role)
        return path and store.read(path, _kind(role, path), skip=self.run.skip, **how)

    def rejected(self) -> Iterator[dict]:
        """The malformed records of all files."""
        return (bad for role, path in self.paths.items() for bad in store.rejected(path, _kind(role, path)))

    def pairs(self, rules: Rules, shuffle: int | None) -> PairSet:
        """The pairs of these files; with the seed `shuffle` their c's are reassigned among the prompts."""

        def check():
            if not self.run.skip:  # duplicates are skipped otherwise
                store.check_unique(self.paths["previous"])

        def files():
            return self.read("rewards"), self.read("previous", unique=False)

        allow = (MISSING, OTHER) if self.run.force else (MISSING,) if self.run.skip else ()
        match = {"allow": allow, "check": check}
        if "previous" in self.paths:
            match["name"] = f"--{self.flags['previous']} {self.paths['previous']}"
        reassigned = None
        if shuffle is not None:  # a pass of its own: every c must be known before the first is reassigned
            reassigned = shuffled(consistencies(*files(), rules, **match), shuffle)
        labels = {item.uuid: item for item in self.read("labels")} if "labels" in self.paths else None
        how = {"labels": labels, "reassigned": reassigned, "summed": self.summed}
        return build(*files(), rules, **how, **match)


def _template(path: Path, about: Mapping) -> str | None:
    """--chat_template of the command that made this file with the sidecar `about`: its file, or a template's name."""
    if place := about.get("sources", {}).get("chat_template"):
        return os.path.relpath(place_of(path.parent, place)) if place.isprintable() else None
    named = "chat_template" in about.get("inputs", {})
    return advice.as_given(about.get("command", [""])[1:]).get("chat_template") if named else None


def _text_of(scored: Mapping) -> dict[str, object]:
    """The flags that decided the tokens that were scored, and the hash of the template, if a flag gave it."""
    variables = parse_variables(scored.get("chat_template_kwargs"))
    given = {name: scored.get(name) for name in (*GIVEN, "chat_template")}
    return given | {"thoughts": given["thoughts"] or "score", "chat_template_kwargs": variables}


def _may_rewrite(path: Path, about: Mapping) -> bool:
    """Whether the template by which a file was scored writes some response otherwise than it was sampled; yes where the
    policy or the template is not there any more."""
    from cream.model.load import load_chat

    folder, template = place_of(path.parent, about["sources"].get("policy", "")), _template(path, about)
    variables = parse_variables(about["scored"].get("chat_template_kwargs"))
    with suppress(UserError, OSError):
        return load_chat(folder, template and Path(template), variables=variables).rewrites
    return True


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
    **facts,
) -> None:
    """Make the pairs, report on them, register them, and say how to train on them.

    `settings` are those of the output, `registry` its file and the built-in names beside it. `method`: which C training
    is to use; None: the strategy's own confidences, else the mean of the c's, 1 without a previous ranking. `facts`
    join the sidecar. Raises UserError where there is not one pair.
    """
    run, policy = inputs.run, inputs.about.get("policy")
    output = journal.Output(target, settings, inputs.provenance, overwrite=run.overwrite)
    if flags.register:
        names.check_free(registry[0], flags.register, target, overwrite=run.overwrite, known=registry[1])
    training = inputs.training(flags.beta)
    rows = _rows(inputs, rules, shuffle, output, training["beta"], method)
    if run.dry_run:
        deque(rows, maxlen=0)
        read = ", ".join(map(str, inputs.paths.values()))
        log.info("dry run: would read %s and write %s; nothing was written", read, target)
        return
    if output.up_to_date:
        log.info("%s is up to date (same settings and inputs); skipping", target)
    else:
        preflight.check_disk(target, 0.2 * inputs.paths["rewards"].stat().st_size, "the pairs")
        with output:
            output.finish(rows, policy=policy, scored=inputs.about.get("scored"), **facts)
    if flags.register:
        names.register(registry[0], flags.register, target, overwrite=run.overwrite)
        log.info("registered as %s in %s", flags.register, registry[0].name)
    log.info("pairs: %s\nnext, train the model that sampled on them:", target)
    data = {"name": flags.register or target, "method": method}
    log.info("  %s", console.command("train.py", **{**training, **data}))


def _rows(
    inputs: Inputs, rules: Rules, shuffle: int | None, output: journal.Output, beta: float, method: str | None
) -> Iterator[dict]:
    """The pairs as they are made; then the report on them, and their part of the sidecar."""
    pair_set = inputs.pairs(rules, shuffle)
    yield from map(encode, pair_set.pairs)
    by_default = "consistency_avg" if "previous" in inputs.paths else "original"
    if pair_set.own and pair_set.c.n:
        by_default = "consistency_dyn"
    method = method or by_default
    pair_set.report(None if method == "original" else beta)
    if not pair_set.count:
        rewards = inputs.paths["rewards"]
        raise UserError(f"{rewards}: no pair can be made of it, for the reasons above; nothing was written")
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
    }
