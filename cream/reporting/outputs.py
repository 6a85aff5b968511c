"""Runs to report on: the outputs of a loop, of a folder, or of any files, each with its sidecar."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

from cream.alarms import LIMITS, Limits
from cream.errors import UserError
from cream.evaluation.evaluate import summary_path
from cream.evaluation.find import evaluations_by, without_copies
from cream.files import lineage, store
from cream.files.fingerprints import fingerprint_folder
from cream.files.provenance import ARGS, KIND, LAST, RUN, place_of, read_meta, read_sidecar
from cream.loops.course import Course
from cream.loops.decisions import NAME as DECISIONS
from cream.loops.made import main_file
from cream.pairs.choice import NUMBERED
from cream.records import Answer, Item, Pair, R, Record, Rewards, Samples
from cream.reporting.naming import SAME, call
from cream.training.options import EVERY_RUN
from cream.training.stages import STAGES

KINDS = {Answer: "evaluation", Rewards: "rewards", Pair: "pairs", Samples: "samples"}
TRAINING, MEASURED = "training", "measured"  # a run's folder; the rows of evaluate_reward.py


@dataclass(frozen=True, eq=False)
class Output:
    """A record file or a training run's folder, and its sidecar: {} without one; of a run that still trains, its
    args.json. `called`: a better name than that of its file."""

    path: Path
    about: dict
    called: str | None = None

    @cached_property
    def kind(self) -> str | None:
        """ "training", "evaluation", "rewards", "pairs", "samples", "measured", or None for any other output."""
        if self.path.is_dir():
            return TRAINING
        if self.path.name.partition(".json")[0].endswith(".rows"):
            return MEASURED
        with suppress(UserError):  # of no known layout: it is in the lineage only
            return KINDS.get(store.detect(self.path, skip=True))
        return None

    @property
    def name(self) -> str:
        """How figures call it: a file's name without its ending; a run's folder."""
        if self.called:
            return self.called
        if self.path.name in SAME:
            return self.path.parent.name
        stem = self.path.name.partition(".json")[0].removesuffix(".evaluation")
        return (
            stem.partition(".rewarding.")[2].replace(f"-{LAST}", "") or stem
        )  # its default name begins with its input

    @property
    def finished(self) -> bool:
        """Whether its stage has ended: a training run is there from its first step on."""
        return self.kind != TRAINING or (self.path / RUN).exists()

    @property
    def script(self) -> str | None:
        """The command that made it, as its sidecar says."""
        words = self.about.get("command") or [None]
        return words[0] and Path(words[0]).name

    @property
    def stage(self) -> str | None:
        """Its stage of training; None of other outputs."""
        stage = self.about.get("settings", {}).get("train_stage")
        return stage if isinstance(stage, str) else None

    @property
    def settings(self) -> dict:
        """The flags that decide it, without those that only other training stages take."""
        settings = self.about.get("settings", {})
        if (stage := STAGES.get(self.stage)) is None:
            return settings
        foreign = EVERY_RUN.keys() - {each.name for each in fields(stage.Options)}
        return {name: value for name, value in settings.items() if name not in foreign}

    def source(self, *names: str) -> Path | None:
        """The path of its input of one of these names."""
        home = self.path if self.path.is_dir() else self.path.parent
        places = self.about.get("sources", {})
        return next((place_of(home, places[name]) for name in names if name in places), None)

    def input(self, *names: str) -> str | None:
        """The hash of its input of one of these names."""
        return next((self.about["inputs"][name] for name in names if name in self.about.get("inputs", {})), None)

    def read(self, kind: type[R]) -> Iterator[R]:
        """Its records. Raises UserError where one is malformed."""
        return store.read(self.path, kind)

    @cached_property
    def answers(self) -> list[Answer]:
        """The items of an evaluation and whether they are right, without the responses."""
        return [
            Answer(uuid=a.uuid, question=a.question, label=a.label, task=a.task, responses="",
                   final_prediction=a.final_prediction, correct=a.correct)
            for a in self.read(Answer)
        ]  # fmt: skip

    def summary(self) -> dict | None:
        """The summary next to an evaluation or to measured rewards; None if there is none."""
        stem = self.path.name.partition(".json")[0].removesuffix(".rows")
        places = [self.path.with_name(f"{stem}.summary.json"), summary_path(self.path, named=False)]
        found = next((place for place in places if place.exists()), None)
        value = None if found is None else store.read_json(found)
        return value if isinstance(value, dict) else None


@dataclass(frozen=True)
class Run:
    """Outputs that belong together, each before those made from it. `planned`: (title, path) of a loop's stages, done
    or not. `gold`: files of questions with labels. `decisions`: what its steered loops decided. `course`: of a loop,
    gone through as far as it is on disk; `limits`: thresholds of its alarms."""

    title: str
    outputs: list[Output]
    planned: list[tuple[str, Path]] = field(default_factory=list)
    gold: Sequence[Path] = ()
    decisions: Sequence[Path] = ()
    course: Course | None = None
    limits: Limits = field(default_factory=lambda: LIMITS)

    @property
    def left(self) -> list[str]:
        """Titles of a loop's stages that have no finished output."""
        done = {output.path for output in self.outputs if output.finished}
        return [title for title, path in self.planned if path not in done]

    def of(self, kind: str) -> list[Output]:
        """Its outputs of a kind."""
        return [output for output in self.outputs if output.kind == kind]

    @cached_property
    def models(self) -> dict[str, str]:
        """Fingerprint -> name of each model: that of the folder in which it was trained, else of its evaluation, else
        M0 for the only one that nothing here trained."""
        trained = {run.about["output"]: run.name for run in self.of(TRAINING) if "output" in run.about}
        others = [digest for output in self.outputs if (digest := output.input("policy", "start", "reference"))]
        raw = [digest for digest in dict.fromkeys(others) if digest not in trained]
        names = {raw[0]: "M0"} if len(raw) == 1 else {}
        tested = {each.input("policy"): each.name for each in self.of("evaluation") if each.input("policy") in raw}
        return names | tested | trained


def of_loop(course: Course, gold: Sequence[Path] = (), limits: Limits = LIMITS) -> Run:
    """The run of a loop: those of its outputs that exist, whatever part of it ran last."""
    loop, commands = course.loop, course.whole()
    planned = [(command.title, main_file(command)) for command in commands]
    found = [output for _, path in planned if (output := _output(path)) is not None]
    decisions = _decisions([Path(loop.output_dir)] if loop.steered else [])
    return Run(loop.title, found, planned, gold, decisions, course, limits)


def _decisions(folders: Iterable[Path]) -> list[Path]:
    return [path for folder in sorted({*folders}) if (path := folder / DECISIONS).exists()]


def of_places(title: str, places: Iterable[Path], gold: Sequence[Path] = ()) -> Run:
    """The outputs in these folders and files, all that they were made from, and the evaluations next to these.

    Raises UserError where a place does not exist, or holds no output.
    """
    found = _around(places)
    decisions = _decisions(output.path.parent for output in found.values())
    return Run(title, call(_ordered(found.values())), gold=gold, decisions=decisions)


def _around(places: Iterable[Path]) -> dict[Path, Output]:
    """Resolved path -> output, as `of_places` has them."""
    found: dict[Path, Output] = {}
    for place in places:
        here = list(_inside(place))
        if not here:
            raise UserError(
                f"{place}: not an output of a stage, nor a folder with outputs; docs/reports.md says what is"
            )
        for output in here:
            _add(found, output)
    for path in [*found]:
        for step in lineage.chain(path):
            if step.about and step.path.exists() and (made := _output(_home(step.path))) is not None:
                _add(found, made)
    models = {output.about.get("output") for output in found.values()}
    models |= {digest for output in found.values() for digest in output.about.get("inputs", {}).values()}
    for folder in {output.path.parent for output in found.values()}:
        for meta in sorted(folder.glob("*.meta.json")):
            about = read_sidecar(meta)
            if about["inputs"].get("policy") in models and about["settings"].get("mode") == "evaluation":
                _add(found, _output(meta.with_name(meta.name.removesuffix(".meta.json"))))
    return found


def of_checkpoint(title: str, folder: Path) -> Run:
    """All that a checkpoint was made from, and the evaluations of it and of the models before it, wherever `report.py
    compare` finds them. Raises UserError where no training run of this project is around it."""
    if not (_home(folder) / ARGS).exists():
        raise UserError(f"{folder}: not a checkpoint in the folder of a training run, as train.py writes them")
    found = _around([folder])
    decisions = _decisions(output.path.parent for output in found.values())
    models = {fingerprint_folder(folder)}
    for output in found.values():
        inputs = output.about.get("inputs", {})
        models |= {inputs[name] for name in ("policy", "start", "reference") if name in inputs}
    known = [output.path for output in found.values() if output.kind == "evaluation"]
    for path in without_copies([*known, *evaluations_by(models.__contains__, folder.resolve().parent.parent)]):
        _add(found, _output(path))
    return Run(title, call(_ordered(found.values())), decisions=decisions)


def read_labels(runs: Iterable[Run]) -> dict[str, Item]:
    """Questions with labels by uuid: those of the runs' `gold`, and of labels.json next to the prompts of samples."""
    places: dict[Path, None] = {}
    for run in runs:
        sources = [path for output in run.of("samples") if (path := output.source("data"))]
        places |= dict.fromkeys([*run.gold, *(path.with_name("labels.json") for path in sources)])
    found = [path for path in places if path.exists() or path in run.gold]
    return {item.uuid: item for path in found for item in store.read(path, Item)}


def share_outputs(runs: Sequence[Run]) -> list[Run]:
    """The runs with one object for each file that several have, so that it is read once."""
    known: dict[Path, Output] = {}
    return [replace(run, outputs=[known.setdefault(each.path.resolve(), each) for each in run.outputs]) for run in runs]


def task_of(record: Record, labels: Mapping[str, Item] = MappingProxyType({})) -> str:
    """The task of a prompt: its label's or its own; else its uuid without the number at the end."""
    uuid = NUMBERED.sub("", record.uuid)
    task = (labels[uuid].task if uuid in labels else None) or record.extra.get("task")
    return task if isinstance(task, str) else re.sub(r"[-_:/.]?\d+$", "", uuid) or "all"


def _add(found: dict[Path, Output], output: Output | None) -> None:
    if output is not None:
        found.setdefault(output.path.resolve(), output)


def _inside(place: Path) -> Iterator[Output]:
    """The outputs that a path means: itself, or all in a folder."""
    if not place.exists():
        raise UserError(f"{place}: no such file or folder, nor a registered name")
    if place.is_file() or (_home(place) / ARGS).exists():
        output = _output(_home(place))
        if output is not None and output.kind is not None:
            yield output
        return
    for home, folders, files in os.walk(place):
        folders.sort()
        if ARGS in files:
            folders.clear()  # a run's checkpoints are its own
            yield from filter(None, [_output(Path(home))])
            continue
        for name in sorted(files):
            if name.endswith(".meta.json"):
                yield from filter(None, [_output(Path(home, name.removesuffix(".meta.json")))])


def _home(path: Path) -> Path:
    """The run of a checkpoint's folder; any other path is itself."""
    if path.is_dir() and ((path / KIND).exists() or path.name == LAST):
        return Path(os.path.relpath(path.resolve().parent))
    return path


def _output(path: Path) -> Output | None:
    """An output that exists, finished or, of a training run, begun."""
    if path.is_dir():
        if (path / RUN).exists():
            return Output(path, read_sidecar(path / RUN))
        return Output(path, read_sidecar(path / ARGS)) if (path / ARGS).exists() else None
    return Output(path, read_meta(path) or {}) if path.is_file() else None


def _ordered(outputs: Iterable[Output]) -> list[Output]:
    """Inputs before the outputs made from them, otherwise by name."""
    outputs = sorted(outputs, key=lambda output: str(output.path))
    makers = {output.about["output"]: output for output in outputs if "output" in output.about}
    depths: dict[int, int] = {}

    def depth(output: Output) -> int:
        if id(output) not in depths:
            depths[id(output)] = 0  # also ends a cycle, which only damaged sidecars have
            above = [makers[digest] for digest in output.about.get("inputs", {}).values() if digest in makers]
            depths[id(output)] = max((1 + depth(each) for each in above), default=0)
        return depths[id(output)]

    return sorted(outputs, key=depth)
