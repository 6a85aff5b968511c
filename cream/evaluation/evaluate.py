"""An evaluation, from its questions to its summary, by one of SCORINGS: a module with

NEEDS_OPTIONS                             whether only multiple choice can be evaluated
requests(questions, flags, sysprompt)     what the model is given of each question, by uuid: prompts, or groups
suffix(plan)                              how the output's name says so
unused_flags(plan)                        flags that decide nothing of the output
size(plan)                                bytes that it and its journal take, about
evaluate(plan, output, model, **how)      records that the journal does not hold yet
complete(plan, rows, output)              the records of all questions, in their order
summarise(plan, records)                  what the summary says, and the same as text
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from msgspec import structs

from cream import alarms
from cream.cli import preflight
from cream.engines import Sampling
from cream.engines.options import SamplingFlags
from cream.errors import UserError
from cream.evaluation import choices, generation
from cream.evaluation.grade import DEFAULT, Rules
from cream.evaluation.questions import Questions
from cream.files import store
from cream.files.fingerprints import fingerprint_text
from cream.files.journal import Output
from cream.records import Answer, Prompt
from cream.scoring.completions import render
from cream.scoring.driver import Model
from cream.scoring.logprobs import Group
from cream.text import prompts
from cream.text.chat import Chat
from cream.text.plain import Plain
from cream.text.prompts import Sysprompt

if TYPE_CHECKING:
    from cream.evaluation.options import EvaluationFlags

log = logging.getLogger("cream")

SCORINGS: dict[str, ModuleType] = {"generate": generation, "loglikelihood": choices}


@dataclass(frozen=True)
class Plan:
    """What the model is given, and how its output is graded; nothing is sampled where options are compared."""

    questions: Questions
    flags: EvaluationFlags
    requests: dict[str, Prompt] | dict[str, Group]
    rules: Rules = DEFAULT
    sampling: Sampling | None = None
    engine: dict | None = None  # its name, and arguments of engines.load

    @property
    def scoring(self) -> ModuleType:
        """One of SCORINGS."""
        return SCORINGS[self.flags.scoring]

    def unused_flags(self) -> list[str]:
        """Flags that decide nothing of the output."""
        return self.scoring.unused_flags(self)

    def folder(self, policy: str, data: str) -> str:
        """The output's folder below outputs/evaluation."""
        shots = f"-{self.flags.few_shot}shot" if self.flags.few_shot else ""
        return f"{policy}-{data}{shots}{self.scoring.suffix(self)}"

    def load_format(self, policy: Path, text: dict, group: int) -> Chat | Plain:
        """How a prompt becomes tokens for the policy in this folder; `text`: as `load_chat` takes it. Raises UserError
        where options are compared, and `group` devices cannot hold the policy together."""
        from cream.model.load import check_tp_size, load_chat, load_tokenizer

        if self.scoring.NEEDS_OPTIONS:
            if group > 1:
                check_tp_size(policy, group)
            if self.flags.prompt_format == "plain":
                return Plain(load_tokenizer(policy))
        return load_chat(policy, **text)


def plan_evaluation(
    questions: Questions, flags: EvaluationFlags, rules: Rules, sampling: SamplingFlags, engine: dict, seed: int
) -> Plan:
    """Raises UserError for an example without options where options are compared; says which flags do not apply."""
    sysprompt = prompts.load(sampling.sysprompt)
    requests = SCORINGS[flags.scoring].requests(questions, flags, sysprompt.name)
    if sysprompt.system:
        if flags.scoring == "loglikelihood" and flags.prompt_format == "plain":
            raise UserError(f"--sysprompt {sampling.sysprompt}: --prompt_format plain has no system message; take chat")
        requests = {uuid: _with_system(request, sysprompt) for uuid, request in requests.items()}
    if SCORINGS[flags.scoring].NEEDS_OPTIONS:
        log.info(
            "options are compared, nothing is generated: flags of sampling, engine, extraction and grader do not apply"
        )
        return Plan(questions, flags, requests)
    return Plan(questions, flags, requests, rules, sampling.plan("evaluation", seed), engine)


def _with_system(request: Prompt | Group, sysprompt: Sysprompt) -> Prompt | Group:
    if isinstance(request, Group):
        return replace(request, prompt=sysprompt.add_system(request.prompt))
    return structs.replace(request, messages=sysprompt.add_system(request.messages))


def evaluate(plan: Plan, output: Output, model: Model, limits: alarms.Limits = alarms.LIMITS, **how) -> None:
    """Write the records of all questions. `limits`: of alarms; `how`: limits, as scorings take them. Raises UserError
    for a question that the chat template refuses."""
    for uuid, request in plan.requests.items() if isinstance(model.chat, Chat) else ():
        if why := model.chat.refusal(request.prompt if isinstance(request, Group) else request.messages):
            raise UserError(f"record {uuid!r}: {why}")
    preflight.check_disk(output.path, plan.scoring.size(plan), "evaluation")
    with output:
        for record in plan.scoring.evaluate(plan, output, model, **how):
            output.append(record)
        output.reject(plan.questions.rejected)
        if plan.questions.skipped:
            output.drop(choices.WITHOUT, plan.questions.skipped)
        drawn = {task: [example.uuid for example in examples] for task, examples in plan.questions.examples.items()}
        rows = _watch(plan.scoring.complete(plan, output.rows(plan.questions.items), output), output, limits)
        output.finish(rows, **({"few_shot": drawn} if drawn else {}))


def _watch(rows: Iterable[dict], output: Output, limits: alarms.Limits) -> Iterator[dict]:
    """The records; once they are through, the sidecar has the alarms that they set off."""
    counts = Counter()
    for row in rows:
        ends = row.get("all_finish_reasons") or [row.get("finish_reason")]
        counts += {"questions": 1, "none": row["final_prediction"] == "none"}
        counts += {"responses": len(ends), "length": ends.count("length")}
        yield row
    facts = {"unanswered": alarms.share(counts["none"], counts["questions"])}
    facts |= {"truncated": alarms.share(counts["length"], counts["responses"])}
    output.facts["alarms"] = alarms.sound(facts, limits)


def summarise(plan: Plan, output: Output, path: Path, chat: Chat | Plain) -> str:
    """Write the summary of the records to `path`, unless it is there and the same; returns it as text. It says how
    questions are put: the first prompt as the model sees it, the chat template's hash (None without one)."""
    facts, text = plan.scoring.summarise(plan, list(store.read(output.path, Answer)))
    first = next(iter(plan.requests.values()))
    facts |= {
        "first_prompt": render(chat, first.prompt if isinstance(first, Group) else first.messages),
        "chat_template": fingerprint_text(chat.template) if isinstance(chat, Chat) else None,
        "few_shot": plan.flags.few_shot,
    }
    store.update_json(path, facts)
    wrong = [
        f"{count} of {len(plan.questions.items)} questions count as wrong: {reason}"
        for reason, count in output.dropped.items()
        if reason not in (store.MALFORMED, choices.WITHOUT)  # which are not in the output
    ]
    return "\n".join([*wrong, text, f"results: {output.path}", f"summary: {path}"])


def summary_path(results: Path, named: bool = True) -> Path:
    """The file of the summary of an evaluation's results: X.summary.json beside a file X.json that was `named` by a
    flag, summary.json in a folder."""
    return results.with_name(f"{results.name.removesuffix('.json')}.summary.json" if named else "summary.json")
