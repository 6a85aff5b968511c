"""Generate answers: samples for training (--mode sampling), graded greedy ones (evaluation), or grade again (rescore).

Multiple choice can do without an answer: evaluation with --scoring loglikelihood compares what the options score.

Departures from the released code: engines get token ids (one BOS), prompts are dropped rather than cut, evaluation is
always greedy, --output_dir is honoured, and every answer keeps why it ended.
"""

from collections import Counter
from functools import partial
from pathlib import Path

from config import DATASET_FILES, DATASETS, InferConfig, settings
from cream import console, journal, names, preflight, store
from cream.console import log
from cream.engines import Sampling
from cream.errors import UserError
from cream.evaluation import choices, grading
from cream.evaluation.items import item_files, prompt_of, read_items
from cream.evaluation.statistics import format_table
from cream.evaluation.tasks import TASKS
from cream.flags import as_dict, parse
from cream.folders import check_folder
from cream.generation import answered, asked, counted, samples, shown
from cream.provenance import fingerprint_text
from cream.records import Answer, Item, Prompt, encode

EXAMPLE = """\
  one CPU   python infer.py --model tiny --checkpoint tiny_m1 --name tiny_prompt_1 --output_dir outputs/sampling.json
  one GPU   python infer.py --model llama3 --checkpoint llama3_sft --name prompt_1 --engine vllm
  accuracy  python infer.py --mode evaluation --model tiny --checkpoint tiny_m1 --name tiny_test
  options   python infer.py --mode evaluation --model tiny --name all_test --scoring loglikelihood
  again     python infer.py --mode rescore --input_file outputs/evaluation/tiny_m1-tiny_test/results.json"""


# flags that do not decide which option is likeliest
WITHOUT_SAMPLING = ("gen_n", "gen_temperature", "gen_max_tokens", "top_p", "do_sample", "seed", "engine", "extraction")


@console.stage
def main(argv=None):
    config = parse(InferConfig, argv, description=__doc__, example=EXAMPLE)
    {"sampling": sample, "evaluation": evaluate, "rescore": rescore}[config.generation.mode](config)


def sample(config: InferConfig) -> None:
    """Samples of every prompt, in the order of the prompts; a `.jsonl` file is never in memory as a whole."""
    g = config.generation
    data = _dataset(config, Prompt, "sampling takes unlabelled prompts: test questions must not enter training")
    read = partial(store.read, data.absolute(), Prompt, _limit(config), skip=config.run.skip)
    total = sum(1 for _ in store.read(data, Prompt, skip=config.run.skip))  # a bad record shows up here
    total = sum(1 for _ in read()) if _limit(config) else total
    sysprompt = "none" if g.sysprompt == "auto" else g.sysprompt
    greedy = not g.do_sample or g.gen_temperature < 0.001
    n, temperature = (1, 0.0) if greedy else (g.gen_n, g.gen_temperature)
    if greedy and g.gen_n > 1:
        log.info("greedy: one answer a prompt, --gen_n %d does not apply", g.gen_n)
    sampling = Sampling(n=n, temperature=temperature, top_p=g.top_p, max_tokens=g.gen_max_tokens, seed=config.run.seed)
    folder = (
        f"{_short(g.name)}-{_short(config.model.name())}-ckpt_{names.label(config.model.checkpoint)}-"
        f"{'Greedy' if greedy else 'Sample'}_n-{n}_temp-{temperature:g}_GenMaxT-{g.gen_max_tokens}-sys_{sysprompt}"
    )
    target = _target(config, config.run.outputs() / "sampling" / folder / "results.json")
    output, chat = _begin(config, [data], target)
    if config.run.dry_run:
        return
    if not output.stands:
        need = preflight.answers(total, data.stat().st_size if not _limit(config) else 0, n, g.gen_max_tokens)
        preflight.room(target, need, "sampling")
        prompts = partial(asked, read, sysprompt)
        counts = Counter()
        with output:
            for prompt, ids, completions in _answers(config, output, chat, prompts, total, sampling):
                output.append(samples(chat, prompt, ids, completions))
            if output.dropped.total() == total:
                raise UserError(f"{data}: no prompt is left to answer (dropped: {dict(output.dropped)})")
            if config.run.skip:
                output.reject(store.rejected(data, Prompt, _limit(config)))
            output.finish(counted(output.rows(record.uuid for record in read()), counts))
        log.info(
            "%(prompts)d prompts, %(answers)d answers: %(distinct)d distinct, %(cut)d cut at the length limit", counts
        )
        for reason, count in output.dropped.items():
            if reason == store.MALFORMED:  # no prompt; told when they were written
                continue
            log.info("  %d of %d prompts dropped: %s", count, total, reason)
    log.info("samples: %s\nnext, their rewards by the current model:", output.path)
    flags = config.cluster.flags(config.device) | {"model": config.model.name(), "input_file": output.path}
    flags["chat_template"] = config.model.chat_template
    if config.model.checkpoint:
        rewards = {"reward": "dpo", "checkpoint": config.model.checkpoint, "ref_model_ckpt": "none"}
    else:
        rewards = {"reward": "likelihood", "checkpoint": "none"}  # M0 against itself: every DPO reward is 0
    log.info("  %s", console.command("rewarding.py", **flags, **rewards))


def evaluate(config: InferConfig) -> None:
    """Greedy answers to every item, graded; a table of accuracies."""
    g = config.generation
    data = _dataset(config, Item, "evaluation takes questions with labels")
    files = {task: names.in_root(DATASET_FILES[f"{task}_test"]) for task in TASKS}
    found, missing = read_items(_known(g.name), data, files, skip=config.run.skip)
    for task in missing:
        log.info("task %s is not evaluated: %s does not exist", task, files[task])
    items = {item.uuid: item for item in found[: _limit(config)]}
    if g.scoring == "loglikelihood":
        return _weigh(config, item_files(_known(g.name), data, files), items)
    prompts = {u: Prompt(uuid=u, messages=prompt_of(item, g.sysprompt)) for u, item in items.items()}
    log.info(
        "evaluation is greedy, one answer a question: --gen_n, --gen_temperature, --top_p, --do_sample do not apply"
    )
    sources = item_files(_known(g.name), data, files)
    target = _target(config, config.run.outputs() / "evaluation", f"{_model_and_data(config)}/results.json")
    output, chat = _begin(
        config,
        sources,
        target,
        "prompt_format",
        "length_norm",
        "gen_n",
        "gen_temperature",
        "top_p",
        "do_sample",
        "seed",
    )
    if config.run.dry_run:
        return
    strict = g.extraction == "strict"
    if not output.stands:
        preflight.room(target, preflight.answers(len(prompts), 0, 1, g.gen_max_tokens), "evaluation")
        questions = partial(list, list(prompts.values()))
        sampling = Sampling(n=1, temperature=0.0, max_tokens=g.gen_max_tokens, seed=config.run.seed)
        with output:
            for prompt, _, answers in _answers(config, output, chat, questions, len(prompts), sampling):
                output.append(grading.graded(items[prompt.uuid], prompt, answers[0], strict))
            if config.run.skip:
                output.reject(bad for source in sources for bad in store.rejected(source, Item))
            output.finish(grading.whole(output.rows(prompts), prompts, items, strict))
        for reason, count in output.dropped.items():
            if reason == store.MALFORMED:  # no question; told when they were written
                continue
            log.info("%d of %d questions count as wrong: %s", count, len(prompts), reason)
    log.info("%s\nanswers: %s\nsummary: %s", *_summary(config, output, chat, prompts))


def _weigh(config: InferConfig, sources: list[Path], items: dict[str, Item]) -> None:
    """Which option of every question the model finds likeliest; a table of accuracies, and those by other lengths."""
    g, few = config.generation, config.cluster.tensor_parallel_size
    asked_of = [item for item in items.values() if choices.is_choice(item)]
    if not asked_of:
        raise UserError(
            f"--scoring loglikelihood compares options, and no question of {', '.join(map(str, sources))} has any; "
            "leave it out, and answers are generated"
        )
    target = _target(
        config, config.run.outputs() / "evaluation", f"{_model_and_data(config)}-{g.prompt_format}/results.json"
    )
    output, chat = _begin(config, sources, target, *WITHOUT_SAMPLING)
    folder = config.model.folder(config.model.checkpoint).absolute()  # a replica works in a folder of its own
    if len(asked_of) < len(items):
        log.info("%d of %d questions are passed over: %s", len(items) - len(asked_of), len(items), choices.WITHOUT)
    if config.run.dry_run:
        return
    if g.prompt_format == "plain":
        groups = [choices.plain_group(item) for item in asked_of]
    else:
        groups = [choices.chat_group(item, "none" if g.sysprompt == "auto" else g.sysprompt) for item in asked_of]
    if not output.stands:
        from cream import models
        from cream.evaluation.loglikelihood import unanswered, weighed

        if few > 1:
            models.check_slices(folder, few)
        preflight.room(target, preflight.answers(len(groups), 0, 1, g.gen_max_tokens), "evaluation")
        how = {"pool": config.cluster.pool(config.device), "policy": folder, "max_length": g.max_length}
        how |= {"bf16": config.device.bf16, "show": config.output.show_example}
        with output:
            for uuid, scored in weighed(output, chat, groups, **how):
                output.append(choices.picked(items[uuid], scored, g.length_norm))
            if config.run.skip:
                output.reject(bad for source in sources for bad in store.rejected(source, Item))
            if passed_over := len(items) - len(asked_of):
                output.drop(choices.WITHOUT, passed_over)
            output.finish(unanswered(output.rows([group.uuid for group in groups]), output))
        for reason, count in output.dropped.items():
            if reason not in (store.MALFORMED, choices.WITHOUT):  # which were told, and are no wrong answers
                log.info("%d of %d questions count as wrong: %s", count, len(groups), reason)
    log.info("%s\nanswers: %s\nsummary: %s", *_weighed_summary(config, output, chat, groups[0]))


def _weighed_summary(config: InferConfig, output: journal.Output, chat, first) -> tuple[str, Path, Path]:
    """As _summary, of options that were compared; `first` is the first question's group."""
    answers = list(store.read(output.path, Answer))
    rows, by_norm = grading.table_rows(answers), choices.accuracies(answers)
    facts = {
        "tasks": rows,
        "by_length_norm": by_norm,
        "scoring": "loglikelihood",
        "prompt_format": config.generation.prompt_format,
        "length_norm": config.generation.length_norm,
        "first_prompt": chat.tokenizer.decode(chat.prompt(first.prompt)),
        "chat_template": None
        if config.generation.prompt_format == "plain"
        else fingerprint_text(chat.tokenizer.chat_template),
    }
    others = (
        f"{norm}: " + ", ".join(f"{task} {100 * accuracy:.1f}" for task, accuracy in found.items())
        for norm, found in by_norm.items()
    )
    table = "\n".join([format_table(rows), "accuracy % by what log-likelihoods are divided by:", *others])
    return table, output.path, _write_summary(output, facts)


def _summary(config: InferConfig, output: journal.Output, chat, prompts) -> tuple[str, Path, Path]:
    """The table, the answers' file, and the summary's, which is written unless it stands."""
    answers = list(store.read(output.path, Answer))
    rows, strict = grading.table_rows(answers), grading.strict_accuracies(answers)
    facts = {
        "tasks": rows,
        "strict": strict,
        "extraction": config.generation.extraction,
        "greedy": True,
        "first_prompt": shown(chat, next(iter(prompts.values()))),
        "chat_template": fingerprint_text(chat.tokenizer.chat_template),
    }
    released = ", ".join(f"{task} {100 * accuracy:.1f}" for task, accuracy in strict.items())
    table = f"{format_table(rows)}\naccuracy % by the method's released extraction rules: {released}"
    return table, output.path, _write_summary(output, facts)


def _write_summary(output: journal.Output, facts: dict) -> Path:
    """The file of a summary, written unless it stands."""
    stem = output.path.name.partition(".json")[0]
    summary = output.path.with_name("summary.json" if stem == "results" else f"{stem}.summary.json")
    if not (output.stands and summary.exists()):
        store.write_json(summary, facts)
    return summary


def rescore(config: InferConfig) -> None:
    """Extract and grade the answers of an evaluation file again; old and new accuracies."""
    g = config.generation
    if g.input_file is None:
        raise UserError("--mode rescore needs --input_file, the results of an evaluation")
    source = Path(g.input_file)
    answers = list(store.read(source, Answer, skip=config.run.skip))
    if not answers:
        raise UserError(f"{source}: the file holds no records")
    target = _target(config, source.with_name(f"{source.name.partition('.')[0]}.rescored-{g.extraction}.json"))
    provenance = config.run.provenance()
    provenance.output("input_file", source)
    decides = {"extraction": g.extraction, "on_bad_record": config.run.on_bad_record}
    output = journal.Output(target, decides, provenance, overwrite=config.run.overwrite)
    again = [grading.regraded(answer, g.extraction == "strict") for answer in answers]
    for title, some in (("before", answers), (f"now, extraction {g.extraction}", again)):
        log.info("%s\n%s", title, format_table(grading.table_rows(some, task=_short(g.input_file))))
    changed = grading.changes(answers, again)
    lines = [f"{len(changed)} of {len(answers)} predictions changed", *(f"  {line}" for line in changed[:20])]
    log.info("\n".join(lines))
    if not config.run.dry_run and not output.stands:
        with output:
            if config.run.skip:
                output.reject(store.rejected(source, Answer))
            output.finish(encode(answer) for answer in again)
    log.info("answers: %s", target)


def _dataset(config: InferConfig, kind: type, why: str) -> Path:
    """The data set's file, checked to hold records of this kind."""
    name, mode = config.generation.name, config.generation.mode
    if name is None:
        raise UserError(f"--mode {mode} needs --name, a data set's name or file")
    path = names.dataset(name, DATASET_FILES, DATASETS)
    if not path.exists():
        if _known(name) == "all_test":
            return path  # the per-task files stand for it
        raise UserError(f"--name {name}: {path} does not exist; put the data there, or give a file")
    if (found := store.detect(path, skip=config.run.skip)) is not kind:
        raise UserError(f"--mode {mode} --name {name}: {path} holds {found.__name__} records; {why}")
    return path


def _limit(config: InferConfig) -> int | None:
    return config.generation.limit_size or (97 if config.run.debug else None)


def _short(name: str | None) -> str:
    """What stands for a name or path in an output's name."""
    if not name:
        return "none"
    stem = Path(name).name.partition(".")[0]
    return Path(name).parent.name if stem in ("test", "results") and Path(name).parent.name else stem


def _model_and_data(config: InferConfig) -> str:
    """What an evaluation's folder is called."""
    checkpoint = config.model.checkpoint
    policy = names.label(checkpoint) if checkpoint else _short(config.model.name())
    return f"{policy}-{_short(config.generation.name)}"


def _known(name: str) -> str:
    """A built-in data set's name as it is spelled there, whatever the case; of a file what stands for it."""
    return {known.lower(): known for known in DATASET_FILES}.get(name.lower(), _short(name))


def _target(config: InferConfig, default: Path, below: str = "results.json") -> Path:
    """--output_dir when it names a file; `below` it when it is a folder; the default without it."""
    given = config.output.output_dir
    if given is None:
        return default if store.is_record_file(default) else default / below
    return Path(given) if store.is_record_file(Path(given)) else Path(given) / below


def _begin(config: InferConfig, data: list[Path], target: Path, *unused: str):
    """The output and the policy's chat format; says what will be done. `unused` flags do not decide this output."""
    folder = config.model.folder(config.model.checkpoint)
    check_folder(folder)
    named = ("name", "input_file", "model", "checkpoint")  # the hashes below stand for them
    batching = ("max_tokens_per_batch", "gpu_memory_utilization")
    provenance = config.run.provenance()
    for number, path in enumerate(data):
        provenance.file(f"data.{number}" if number else "data", path)
    provenance.model("policy", folder)
    config.model.add_template(provenance)
    flat = settings(as_dict(config), *named, "chat_template", *batching, *unused)
    output = journal.Output(target, flat, provenance, overwrite=config.run.overwrite)
    log.info("%s of %s by %s -> %s", config.generation.mode, ", ".join(map(str, data)), folder, target)
    if output.stands:
        log.info("%s stands already, made by the same settings from the same inputs", target)
    if config.run.dry_run:
        log.info("dry run: nothing was written")
    from cream import models

    if config.generation.scoring == "loglikelihood" and config.generation.prompt_format == "plain":
        return output, models.load_plain(folder)
    return output, models.load_chat(folder, config.model.template())


def _answers(config: InferConfig, output: journal.Output, chat, prompts, total: int, sampling: Sampling):
    """The prompts without an answer yet, with their answers by the engine that the flags name, as they are finished."""
    engine = {
        "name": config.engine.engine,
        "batch_tokens": config.engine.max_tokens_per_batch,
        "gpu_memory_utilization": config.engine.gpu_memory_utilization,
        "tensor_parallel_size": config.cluster.tensor_parallel_size,
    }
    return answered(
        output,
        chat,
        prompts,
        total,
        sampling,
        pool=config.cluster.pool(config.device),
        policy=config.model.folder(config.model.checkpoint).absolute(),  # a replica works in a folder of its own
        engine=engine,
        max_length=config.generation.max_length,
        bf16=config.device.bf16,
        show=config.output.show_example,
    )


if __name__ == "__main__":
    main()
