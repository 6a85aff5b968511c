"""The course of a loop: which command runs next, by what the last ones made.

A round's model is judged when the round has ended; a threshold of `stop_if` is looked at when its step has. What is
decided follows from outputs alone, so that a loop that runs again, or resumes after a kill, decides the same.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from cream.errors import UserError
from cream.files.fingerprints import fingerprint_file
from cream.loops import facts
from cream.loops.decisions import Best, DecisionFile, Decisions, Metric, Round, Said, Stopped, link
from cream.loops.facts import Fact
from cream.loops.loop import Loop, Steering
from cream.loops.plan import TRAIN, Command, Place
from cream.loops.results import is_evaluation, results
from cream.loops.trials import Stop, Trial, against, broken, called, find, model_of

log = logging.getLogger("cream")
RESULT = "result: "  # how the sentence on it begins
Replan = Callable[[Loop, Mapping[int, int]], tuple[list[Command], list[str]]]


class Course:
    """Going through it gives the commands to run, in order, each when what it depends on has been decided.

    `replan`: a loop's commands, and what is wrong with them, given which rounds start from another than the one before
    (`plan`'s `parents`). Commands before `first` and after `last` are not run. In a `dry` one nothing runs, and what is
    not there yet decides nothing. `publish` gets the best model, as a command names it, and returns its folder; `free`,
    called when a round has ended, with the commands that may still run, frees disk space. `wait`: called before what a
    command has made is looked at, returns when it has run; others may still be running when the next one is given.
    Afterwards `ran` has the commands whose outputs are there, or will be, `done` whether these are all.
    """

    def __init__(self, loop: Loop, replan: Replan, publish: Callable[[str], Path] = Path):
        self.loop, self.replan, self.publish = loop, replan, publish
        self.planned, self.problems = replan(loop, {})
        self.first, self.last, self.dry, self.quiet = Place(0, 0, 0), Place(3, 0, 0), False, False
        self.free: Callable[[Course, Sequence[Command]], None] = lambda *_: None
        self.wait: Callable[[Command], None] = lambda _: None
        self._forget()

    def _forget(self) -> None:
        self.parents: dict[int, int] = {}
        self.ran: list[Command] = []
        self.trials: list[Trial] = []
        self.said: list[tuple[int, str]] = []
        self.stop: Stop | None = None
        self.round, self.done = 0, False  # `round`: the last one that has ended
        self.file: DecisionFile | None = None

    @property
    def best(self) -> Trial | None:
        """The first of those with the best metric."""
        sign = -1 if self.loop.keep and self.loop.keep.mode == "min" else 1
        return max(self.trials, key=lambda trial: sign * trial.fact.value, default=None)

    def __iter__(self) -> Iterator[Command]:
        self._forget()
        self.file = DecisionFile(Path(self.loop.output_dir))
        if not (yield from self._run([each for each in self.planned if each.place.part == 0])):
            return
        self._judge(0)
        while not self.stop and self.round < self.loop.rounds:
            t = self.round + 1
            if not (yield from self._run([each for each in self._plan() if each.place[:2] == (1, t)])):
                return
            if not (self.stop and self.stop.at_once):
                self.round = t
                self._judge(t)
                self._free(self.ahead())
        rest, problems = self._rest()  # first of all evaluations of the round that has become the last one
        if not (yield from self._run([each for each in rest if each.place.part == 1])):
            return
        self._judge(self.round)
        self._finish()
        left_out = {problem.partition(":")[0] for problem in problems}
        for command in (each for each in rest if each.place.part == 2):
            lacks_best = self.best is None and str(self.loop.best) in command.flags.values()
            if command.step in left_out or lacks_best:
                self._log(f"{command.title} is not run: no round has made what it reads")
            elif not (yield from self._run([command])):
                return
        self.done = True
        self._free([])

    def expected(self) -> list[Command]:
        """The commands that are there by now, and those that will run unless something else is decided."""
        before, self.dry, self.quiet = self.dry, True, True
        try:
            for _ in self:
                pass
            return self.ran
        finally:
            self.dry, self.quiet = before, False

    def whole(self) -> list[Command]:
        """The same of the whole loop, whatever part of it was to run."""
        self.first, self.last = Place(0, 0, 0), Place(3, 0, 0)
        return self.expected()

    def _run(self, commands: Sequence[Command]) -> Iterator[Command]:
        """Those of the commands that are to run; returns False where `last` has run."""
        for command in commands:
            if command.place > self.last:
                return False
            if gone := self.file.deleted_for(command):
                self._log(f"{command.title} was done; not looked at again, for the checkpoints of {gone} are deleted")
            elif command.place >= self.first:
                yield command
            self.ran.append(command)
            self._look(command)
            if self.stop and self.stop.at_once:
                break
        return True

    def _plan(self, parents: Mapping[int, int] = {}) -> list[Command]:
        """All commands, by what has been decided, and where it would be decided that `parents`."""
        if not self.parents and not parents:
            return self.planned
        return self.replan(self.loop, {**self.parents, **parents})[0]

    def _rest(self) -> tuple[list[Command], list[str]]:
        """What is left of a loop that ends with this round, and what is wrong with that."""
        commands, problems = self.replan(msgspec.structs.replace(self.loop, rounds=self.round), self.parents)
        known = {command.output for command in self.ran}
        return [each for each in commands if each.output not in known], problems

    def ahead(self) -> list[Command]:
        """All commands that may still run; with `roll_back` also those after another round without a new best."""
        if self.stop:
            return self._rest()[0]
        plans, t = [self._plan()], self.round
        if self.loop.keep and self.loop.keep.roll_back and self.best:
            plans.append(self._plan({t + 2: self.best.round}))
        return [each for plan in plans for each in plan if each.place >= (1, t + 1, 0)]

    @property
    def tested(self) -> Command | None:
        """The evaluation of the best model after the rounds, on other data than those that chose it; None without."""
        if not self.best or not is_evaluation(self.best.command):
            return None
        chosen_by, link = self.best.command.flags.get("name"), str(self.loop.best)
        after = (each for each in self.ran if each.place.part == 2 and is_evaluation(each))
        found = (each for each in after if each.flags.get("checkpoint") == link)
        return next((each for each in found if each.flags.get("name") != chosen_by), None)

    def is_measured(self, t: int) -> bool:
        """Whether it is known how good the model of a round is, or nothing depends on it."""
        return self.loop.keep is None or t in {trial.round for trial in self.trials}

    def results(self) -> list[dict]:
        """The rows of the table, as `results` has them."""
        best = self.best.model if self.done and self.best else None
        validation = self.best.command.flags.get("name") if self.tested else None
        return results(self.ran, best, str(self.loop.best), validation)

    def notes(self) -> list[str]:
        """Why the loop ended, and what is its result: lines below the table."""
        stopped = [f"ended in round {self.stop.round} of {self.loop.rounds}: {self.stop.why}"] if self.stop else []
        return stopped + [text for _, text in self.said if text.startswith(RESULT)]

    # What is decided --------------------------------------------------------------------------------------------------

    def _look(self, command: Command) -> None:
        """Whether a threshold ends the loop, now that a command has run."""
        t = command.place.round
        for name, bound in self.loop.stop_if.items() if t and not self.stop else ():
            step, path = facts.split(name, [each.id for each in self.loop.steps()])
            if step != command.step or (fact := self._fact(command, path)) is None:
                continue
            first = next(each for each in self.ran if each.step == step and each.place.part == 1)
            why = broken(bound, fact, (bound.drift and self._fact(first, path)) or fact)
            if why is not None:
                at_once = command.place.index < self._last_training()
                self.stop = Stop(t, f"{name} {why}", at_once)
                self._say(f"round {t}: {self.stop.why}: the loop stops{', before it trains on this' * at_once}", t)

    def _last_training(self) -> int:
        """The index of the step of `repeat` that trains last."""
        return max((i for i, step in enumerate(self.loop.repeat) if step.script == TRAIN), default=-1)

    def _fact(self, command: Command, path: str) -> Fact | None:
        """A fact of a command that has run; None in a dry run where there is none yet."""
        if not self.dry:
            self.wait(command)
            return facts.read(command, path)
        with suppress(UserError, OSError):
            return facts.read(command, path)
        return None

    def _judge(self, t: int) -> None:
        """Measure the model of a round that has ended, and decide what follows."""
        keep = self.loop.keep
        if keep is None or (t == 0 and keep.start is None) or t in {trial.round for trial in self.trials}:
            return
        command, path = find(keep.metric if t else keep.start, self.loop, self.ran, t)
        if command is None or (fact := self._fact(command, path)) is None:
            return
        best, parent = self.best, self.parents.get(t, t - 1) if t else None
        self.trials.append(Trial(t, parent, command, model_of(command, self.ran) or "none", fact))
        waited = sum(trial.round > self.best.round for trial in self.trials)
        text = f"{f'round {t}' if t else 'before round 1'}: {keep.metric if t else keep.start} {fact}"
        text += f", {self._compare(best, path)}" if best else ""
        if not self.stop and keep.patience and waited >= keep.patience:
            self.stop = Stop(t, f"{waited} evaluated round{'s' * (waited > 1)} without a new best (patience)")
            text += f"; {self.stop.why}: the loop stops"
        elif not self.stop and keep.roll_back and waited and t < self.loop.rounds:
            self.parents[t + 1] = self.best.round
            text += f"; round {t + 1} starts from {called(self.best.round)} again"
        self._say(text, t)

    def _compare(self, best: Trial, path: str) -> str:
        """The last trial beside the best one before it, in words."""
        now = self.trials[-1]
        if now.fact.value == best.fact.value:
            return f"a tie with {called(best.round)}, which stays the best"
        found = "a new best" if self.best is now else "no new best"
        return f"{found}: {against(best, now, path)}"

    def _say(self, text: str, t: int, *, ended: bool = False) -> None:
        self.said.append((t, text))
        self._log(text)
        self._save(ended)

    def _log(self, text: str) -> None:
        if not self.quiet:
            log.info("\n[%s] %s", self.loop.title, text)

    def _free(self, ahead: Sequence[Command]) -> None:
        if not self.quiet:
            self.free(self, ahead)

    def _finish(self) -> None:
        """Say which model is the result, and link it."""
        if self.loop.keep is None or (best := self.best) is None:
            return self._save(ended=True)
        if self.dry and not (self.stop or self.trials[-1].round == self.round):
            return None  # what is still to be measured may be better
        text = f"{RESULT}the model of {called(best.round)}, {self.loop.keep.metric} {best.fact}"
        last = self.trials[-1]
        if last is not best and last.fact.value != best.fact.value:
            text += f", {against(last, best, self._path())}"
        self._say(f"{text}; it is {self.loop.best}", self.round, ended=True)
        if not self.dry:
            link(self.loop.best, self.publish(best.model))

    def _path(self) -> str:
        return facts.split(self.loop.keep.metric, [step.id for step in self.loop.repeat])[1]

    def _save(self, ended: bool = False) -> None:
        if self.dry or not self.loop.steered:
            return
        place, best, keep = self.file.relative, self.best, self.loop.keep
        rounds = []
        for trial in self.trials:
            source, model = facts.source(trial.command), place(trial.model)
            about = (Metric(*trial.fact), place(str(source)), fingerprint_file(source))
            rounds.append(Round(trial.round, trial.starts_from, model, *about))
        said = [Said(t, text) for t, text in self.said]
        stopped = self.stop and Stopped(self.stop.round, self.stop.why)
        result = best and Best(best.round, place(best.model), keep and keep.register)
        keys = {name: getattr(self.loop, name) for name in Steering.__annotations__}
        self.file.write(Decisions(loop=keys, rounds=rounds, said=said, stopped=stopped, best=result), ended)
