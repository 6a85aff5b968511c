"""The model card of a checkpoint: README.md as the Hugging Face hub reads it, metadata in YAML and Markdown below.

Its numbers are those of the report's sections. All texts of users, such as names and settings, are shown as text.
"""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from cream import alarms
from cream.data import SOURCES, source
from cream.errors import UserError
from cream.files import store
from cream.files.fingerprints import fingerprint_text
from cream.files.provenance import LAST, POLICY, RUN, read_kind
from cream.model.checkpoint import context_length
from cream.reporting import markdown
from cream.reporting.checkpoints import Model, stated_license
from cream.reporting.markdown import interval, one_line, plain, table
from cream.reporting.outputs import TRAINING, Output, Run, read_labels
from cream.reporting.sections import accuracy, consistency, lineage, training
from cream.training.stages import STAGES

MARK = "# made by report.py card, "  # a comment of the metadata, before the hash of all that follows
CLASSES = {POLICY: ("text-generation", "AutoModelForCausalLM")}
HEADS = {
    "last_token": ("text-classification", "AutoModelForSequenceClassification"),
    "step_token": ("token-classification", "AutoModelForTokenClassification"),
}
PROJECT = "CREAM"
PAPER = "https://arxiv.org/abs/2410.12735"
FILES = re.compile(r" \((cream/)?\w+\.py\)")  # in the docstring of a stage
OWN_REWARDS = ("dpo", "likelihood", "judge")
METHODS = {
    "consistency_avg": "CREAM: each pair is trusted by the mean consistency C of the model's rankings on all prompts",
    "consistency_dyn": "CREAM: each pair is trusted by the consistency C of the model's rankings on its prompt",
    "original": "every pair is trusted fully (C = 1)",
}


def build(model: Model, *, license: str | None = None, repo: str | None = None, seed: int = 0) -> str:
    """The whole card. `license`: as the hub names it; None: that of the base model's card, if it is on disk. `repo`:
    the hub id under which it will be loaded; `seed`: of the bootstrap intervals."""
    name, license = (repo or model.name).rpartition("/")[2], license or stated_license(model.base)
    number = accuracy.collect(_asked_alike(model), seed)
    made = replace(model.run, outputs=[output for output in model.run.outputs if output.kind != "evaluation"])
    run = {
        "accuracy": _of_this(model, number),
        "consistency": {"pairs": _pairs(made)},
        "training": {"curves": training.collect(made)["curves"]},
        "lineage": lineage.collect(made),
    }
    parts = [f"# {plain(name)}", _summary(model), table(("", ""), _facts(model))]
    for heading, found in (
        ("Evaluation", markdown.accuracy(run) if model.evaluations else ("This model has not been evaluated.",)),
        ("Limits", _limits(model, license)),
        ("Use", _use(model, repo)),
        ("Training", (*markdown.training(run), *_settings(model))),
        ("Preference pairs", markdown.pairs(run)),
        ("Data and lineage", (*_data(model), *markdown.origin(run), *markdown.software(run))),
    ):
        if found := [*found]:
            parts += [f"## {heading}", *found]
    text = f"{_metadata(model, name, license, run)}\n---\n\n" + "\n\n".join(parts) + "\n"
    return f"---\n{MARK}{fingerprint_text(text)}\n{text}"


def is_unedited(text: str) -> bool:
    """Whether a card is as `build` made it."""
    first, mark, rest = (*text.split("\n", 2), "", "")[:3]
    return first == "---" and mark == f"{MARK}{fingerprint_text(rest)}"


def check_free(path: Path, *, overwrite: bool) -> None:
    """Raises UserError where a file is there that is not a card as it was made; not with `overwrite`."""
    if path.is_dir() or path.suffix != ".md":
        raise UserError(f"{path}: the card is a file whose name ends in .md")
    if path.exists() and not overwrite and not is_unedited(path.read_text(errors="replace")):
        raise UserError(f"{path} exists, and is not a card as report.py made it; give another --output, or --overwrite")


def write(path: Path, text: str) -> None:
    """Write a card."""
    with store.atomic(path) as file:
        file.write(text.encode())


# Metadata -------------------------------------------------------------------------------------------------------------


def _metadata(model: Model, name: str, license: str | None, run: dict) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=source(row["task"]).hub if row["task"] in SOURCES else one_line(row["task"]),
            dataset_name=one_line(row["task"]),
            dataset_config=one_line(row["task"]),
            metric_type="accuracy",
            metric_value=round(row["accuracy"], 4),
            metric_name=one_line(f"accuracy of {row['n']} questions, 95 % {interval(row, 100)} ({each['name']})"),
        )
        for each in run["accuracy"]["evaluations"]
        if each["this"]
        for row in each["tasks"]
        if row["task"] != accuracy.MACRO
    ]
    stage = model.own.stage
    return ModelCardData(
        base_model=model.base_id,
        datasets=list(model.datasets) or None,
        license=license,
        library_name="transformers",
        pipeline_tag=_classes(model)[0],
        tags=[one_line(tag) for tag in ("cream", "self-rewarding", stage) if tag],
        model_name=one_line(name),
        eval_results=results or None,
    ).to_yaml()


def _classes(model: Model) -> tuple[str, str]:
    """(the hub's name of what it does, the class of transformers that loads it)."""
    reads = model.about.get("head", {}).get("reads")
    return HEADS.get(reads, CLASSES[POLICY])


# Text -----------------------------------------------------------------------------------------------------------------


def _summary(model: Model) -> str:
    kind = "language model" if model.about.get("kind", POLICY) == POLICY else "reward model"
    base = model.base_id or (model.base.name if model.base else "an unknown base model")
    return (
        f"A {kind}, trained from {plain(base)} in {_rounds(model)} by the toolkit of [{PROJECT}]({PAPER}), with which "
        "language models improve themselves without human preference labels."
    )


def _rounds(model: Model) -> str:
    count = len(model.run.of(TRAINING))
    return f"{count} training runs" if count > 1 else "one training run"


def _facts(model: Model) -> Iterator[tuple[str, object]]:
    own, counts = model.own, model.own.about.get("counts", {})
    stage = own.stage
    about = STAGES[stage].__doc__.partition("\n\n")[0] if stage in STAGES else ""
    yield "stage", f"{stage}: {FILES.sub('', about)}"
    if (method := own.settings.get("method")) in METHODS:
        yield "method", METHODS[method]
    yield "base model", model.base_id or (model.base and model.base.name)
    start = own.source("start")
    yield "trained from", start and (start.resolve().parent.name if read_kind(start) else start.name)
    data = own.source("data")
    yield "trained on", f"{counts.get('trained_on', '?')} records of {data.name if data else '?'}"
    yield "step", model.about.get("step")
    yield "hash of its files (xxh3-128)", model.about.get("fingerprint")


def _limits(model: Model, license: str | None) -> Iterator[str]:
    yield "\n".join(f"- {text}" for text in _each_limit(model, license))


def _each_limit(model: Model, license: str | None) -> Iterator[str]:
    seed = model.own.settings.get("seed")
    yield (
        f"One run (seed {plain(seed)}) proves little: another seed or other prompts give other numbers. The intervals "
        "are over questions, not over runs."
    )
    tasks = dict.fromkeys(plain(each.task or "all") for output in model.evaluations for each in output.answers)
    measured = f"the accuracy on {', '.join(tasks)} alone" if tasks else "nothing"
    yield (
        f"Measured is {measured}. Not measured: other tasks and languages, truthfulness, bias, safety, long "
        "conversations, and whether test questions were in the base model's training data."
    )
    if model.about.get("kind", POLICY) != POLICY:
        yield "How well its rewards agree with people is not in this card; evaluate_reward.py measures it."
    if any(output.settings.get("reward") in OWN_REWARDS for output in model.run.of("rewards")):
        yield (
            "It learned from preferences of models, not of people: a mistake that the models which ranked the "
            "responses share is not seen, neither by them nor in C, their agreement."
        )
    if license is None:
        yield "Its licence is not stated here; those of the base model and of the data apply."
    if not (model.own.path / RUN).exists():
        yield "Its training has not finished: this is an intermediate checkpoint."
    elif (model.own.path / LAST).resolve() != model.folder.resolve():
        yield "This is an earlier checkpoint of its training, not the last one."
    for output in model.run.outputs:
        for fired in output.about.get("alarms", ()):
            yield f"Alarm of {plain(output.name)}: {plain(alarms.describe(fired))}."
    notes = [("used unverified", "unverified"), ("--force overrode", "forced")]
    abouts = [model.about, *(output.about for output in model.run.outputs)]
    for what, key in notes:
        yield from dict.fromkeys(f"{what}: {plain(text)}" for about in abouts for text in about.get(key, ()))


def _use(model: Model, repo: str | None) -> Iterator[str]:
    task, loader = _classes(model)
    place = repo or "FOLDER"
    where = "" if repo else " FOLDER is the folder of this file."
    if task == CLASSES[POLICY][0]:
        turn = '[{"role": "user", "content": "…"}]'
        yield (
            f"```python\nfrom transformers import AutoTokenizer, {loader}\n\n"
            f'tokenizer = AutoTokenizer.from_pretrained("{place}")\nmodel = {loader}.from_pretrained("{place}")\n'
            f"inputs = tokenizer.apply_chat_template({turn}, add_generation_prompt=True, return_dict=True, "
            'return_tensors="pt")\noutput = model.generate(**inputs, max_new_tokens=256)\n'
            'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))\n```'
        )
        yield f"In vLLM: `vllm serve {place}`. In {PROJECT}'s stages: `--model {place}`.{where}"
    else:
        yield (
            f"```python\nfrom transformers import AutoTokenizer, {loader}\n\n"
            f'tokenizer = AutoTokenizer.from_pretrained("{place}")\nmodel = {loader}.from_pretrained("{place}")\n```'
        )
        yield f"In {PROJECT}'s rewarding.py: `--reward_model {place}`.{where}"


def _settings(model: Model) -> Iterator[str]:
    """The flags of the outputs that the checkpoint was trained on in its last run, and of that."""
    rows = [
        (output.name, output.script, f"--{flag}", _shown(flag, value, output))
        for output in _last_round(model)
        for flag, value in output.settings.items()
        if value is not None
    ]
    if rows:
        yield "<details><summary>All settings of the last round</summary>"
        yield table(("output", "made by", "flag", "value"), rows)
        yield "</details>"


def _last_round(model: Model) -> Iterable[Output]:
    """Its run, and the outputs that its data were made from, as far as those are not models."""
    known = {output.path.resolve(): output for output in model.run.outputs}
    found, ahead = {}, [model.own]
    while ahead:
        output = ahead.pop(0)
        found[output.path] = output
        inputs = (output.source(name) for name in output.about.get("sources", {}))
        ahead += [known[path.resolve()] for path in inputs if path and path.is_file() and path.resolve() in known]
    return found.values()


def _shown(flag: str, value: object, output: Output) -> object:
    """A setting; of a path on this machine its last part alone, with a limit of tokens that of the model."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if flag == "max_length" and isinstance(value, int):
        folder = output.source("policy", "start")
        context = context_length(folder) if folder and folder.is_dir() else None
        return f"{value} (the model's context: {context})" if context and context < value else value
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value


def _data(model: Model) -> Iterator[str]:
    if model.datasets:
        rows = [(each.hub, each.licence) for each in map(source, SOURCES) if each.hub in model.datasets]
        yield table(("data set on the hub", "its licence"), rows)
    yield (
        "Each file with the beginning of its hash, below all that it was made from; a file without a maker is raw "
        "data or a base model."
    )


# Numbers --------------------------------------------------------------------------------------------------------------


def _pairs(run: Run) -> list[dict]:
    labels = read_labels([run])
    return [consistency.of_pairs(output, run, labels) for output in run.of("pairs")]


def _asked_alike(model: Model) -> Run:
    """The evaluations of the model, and those of earlier models that were asked the same."""
    asked = {accuracy.question(output) for output in model.evaluations}
    return replace(model.run, outputs=[each for each in model.run.of("evaluation") if accuracy.question(each) in asked])


def _of_this(model: Model, numbers: dict) -> dict:
    """The numbers of evaluations; each says whether it is of this model, and only differences to it are left."""
    own = {str(output.path) for output in model.evaluations}
    rows = [{**each, "this": each["file"] in own} for each in numbers["evaluations"]]
    return {
        "evaluations": rows,
        "differences": [each for each in numbers["differences"] if each["files"][1] in own],
    }
