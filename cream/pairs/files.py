"""The files that pairs are made of: what is wrong with them, what they say of the training to come, and the pairs."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from cream.cli import advice
from cream.consistency import shuffled
from cream.errors import UserError
from cream.evaluation.tasks import questions_in
from cream.files import store
from cream.files.provenance import place_of, read_meta
from cream.pairs.build import Rules, build, consistencies, survey
from cream.pairs.candidates import build_candidates
from cream.pairs.inputs import Input
from cream.pairs.match import MISSING, OTHER
from cream.pairs.report import PairSet
from cream.records import Item, Record, Samples
from cream.text.options import GIVEN
from cream.text.templates import parse_variables

log = logging.getLogger("cream")
DEFAULT = {"lr": 1e-6, "beta": 0.1}  # of train.py, for advice


class Inputs:
    """The files that pairs are made of.

    `kinds` are the INPUTS of the strategy, by role: a role's flag has its name, unless `flags` says another. `paths`
    are those of `files` that are given, by role; of several in one flag, `role` is the last one, `role@-1` the one
    before. `source` is the first of these: its sidecar, `about` ({} without one), says for which policy the pairs are.
    `run` is the script's group of that name. Raises UserError where a file is not what its sidecar describes or its
    role needs, or two are the same.
    """

    def __init__(
        self, run, kinds: Mapping[str, Input], files: Mapping[str, str | None], flags: Mapping[str, str] | None = None
    ):
        self.run, self.flags, self.kinds, self.paths = run, {}, {}, {}
        for role, kind in kinds.items():
            name = (flags or {}).get(role, role)
            for number, path in enumerate(_split(name, kind, files[role])):
                end = f"@-{number}" if number else ""
                self.paths[role + end], self.kinds[role + end], self.flags[role + end] = path, kind, name + end
        self.provenance, abouts = run.provenance(), {}
        for role, path in self.paths.items():
            kind, name = self.kinds[role], self.flags[role]
            abouts[role] = (self.provenance.output if kind.made_by else self.provenance.file)(name, path) or {}
            if kind.kind is not Item:
                made_by = f"which {kind.made_by} writes" if kind.made_by else kind.help.partition(";")[0]
                store.refuse_other_kind(f"--{name.partition('@')[0]}", path, kind.kind, made_by)
        self.source = next(iter(self.paths.values()))
        self.about = next(iter(abouts.values()))
        self._check_distinct()
        if "previous" in self.paths:
            self._check_text()
        if "rewards" in self.paths:
            self._check_rankings()
        self._check_samplers(abouts)

    def _check_distinct(self) -> None:
        """Raises UserError where two files of one layout have the same content."""
        roles = {}
        for role in self.paths:
            first = roles.setdefault((self.kinds[role].kind, self.provenance.inputs[self.flags[role]]), role)
            one, other = (f"--{self.flags[each].partition('@')[0]}" for each in (first, role))
            if first != role and role == "previous":
                raise UserError(f"{other} is {one}: every C would be 1; give no {other} for plain self-rewarding")
            if first != role:
                raise UserError(f"{one} {self.paths[first]} and {other} {self.paths[role]} are the same file")

    def _check_samplers(self, abouts: Mapping[str, dict]) -> None:
        """Objects if samples of one round were drawn from different models: the pairs are for the first one's."""
        fingerprints = {
            role: about["policy"]["fingerprint"]
            for role, about in abouts.items()
            if self.kinds[role].kind is Samples and "@" not in role and about.get("policy")
        }
        if len({*fingerprints.values()}) > 1:
            names = " and ".join(f"--{self.flags[role]}" for role in fingerprints)
            self.provenance.object(f"{names} were sampled from different models; training starts from the first one's")

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
        first = f"--{self.flags['rewards']}"
        previous = read_meta(self.paths["previous"]) if "previous" in self.paths else None
        if previous and previous.get("inputs", {}).get("policy") == sampler:
            self.provenance.object(
                f"{first} ranks by a model that did not sample these responses, --{self.flags['previous']} by the one "
                "that did: they seem to be swapped"
            )
        log.info("note: the model that ranks in %s is not the one that sampled; training starts from it", first)

    def _samples(self) -> tuple[Path, dict]:
        """The samples' file and its sidecar, {} where it is not there any more."""
        if self.kinds[next(iter(self.paths))].kind is Samples:
            return self.source, self.about
        path = place_of(self.source.parent, self.about.get("sources", {}).get("input_file", ""))
        with suppress(UserError, OSError):
            return path, read_meta(path) or {}
        return path, {}

    @property
    def of_pool(self) -> bool:
        """Whether the responses are those of unlabelled pairs (prepare_data.py split), which no policy sampled."""
        return self._samples()[1].get("part") == "pool"

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
        before = advice.round_before(place_of(self.source.parent, place)) if place else {}
        flags = before["train"][1] if before else {**DEFAULT, **advice.recipe(policy["model"]).get("dpo", {})}
        usual = {**self._computation(), **flags}
        now = {"device": usual.get("device"), "model": policy["model"], "checkpoint": policy["checkpoint"]}
        now |= self._text()
        return {**now, **usual, **now, "beta": beta or advice.number(flags.get("beta"), DEFAULT["beta"])}

    def _computation(self) -> dict[str, object]:
        """The flags of the source's command that say where and how training computes, where nothing else does."""
        script, *words = self.about.get("command", ["rewarding.py"])
        given = advice.as_given(words)
        device, bf16 = given.get("device"), self.about["settings"].get("bf16")
        return {
            "device": None if device == "cuda" else device,  # which names a cluster's, in these stages only
            "bf16": bf16 if isinstance(bf16, bool) else given.get("bf16"),
            "max_length": None if script == "infer.py" else given.get("max_length"),  # that of prompts there
        }

    def _text(self) -> dict[str, str | None]:
        """The flags that decide how a response becomes tokens: as it was scored, else as it was sampled."""
        path, about = (self.source, self.about) if self.about.get("scored") else self._samples()
        scored = about.get("scored") or about.get("settings", {})
        return {"chat_template": _template(path, about), **{name: scored.get(name) for name in GIVEN}}

    def read(self, role: str, **how) -> Iterator | None:
        """The records of a role's file; None where there is none."""
        path = self.paths.get(role)
        return path and store.read(path, self._kind(role), skip=self.run.skip, **how)

    def rejected(self) -> Iterator[dict]:
        """The malformed records of all files."""
        return (bad for role, path in self.paths.items() for bad in store.rejected(path, self._kind(role)))

    def _kind(self, role: str) -> type[Record]:
        kind = self.kinds[role].kind
        return questions_in(self.paths[role]) if kind is Item else kind

    def pairs(self, rules: Rules, shuffle: int | None) -> PairSet:
        """The pairs of these files; with the seed `shuffle` their c's are reassigned among the prompts."""
        if not rules.rewarded:
            candidates = rules.strategy.candidates({role: self.read(role) for role in self.paths}, rules.options)
            return build_candidates(candidates, rules.keep_truncated, rules.most)

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
        survey(*files(), rules, **match)
        labels = {item.uuid: item for item in self.read("labels")} if "labels" in self.paths else None
        how = {"labels": labels, "reassigned": reassigned, "summed": self.summed}
        return build(*files(), rules, **how, **match)


def _split(flag_name: str, kind: Input, text: str | None) -> list[Path]:
    """The files that a flag names, the last one first. Raises UserError where one has no name."""
    if text is None:
        return []
    parts = [part.strip() for part in text.split(",")] if kind.several else [text]
    if not all(parts):
        raise UserError(f"--{flag_name} {text}: expected FILE or FILE,FILE")
    return [Path(part) for part in reversed(parts)]


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
