"""Generate answers: samples for training (--mode sampling), graded ones (evaluation), or grade again (rescore).

Multiple choice can do without a text to read: with --scoring loglikelihood the options are scored, and the best wins.

Departures from the released code: engines get token ids (one BOS), prompts are dropped rather than cut, evaluation with
one answer a question is always greedy, --output_dir is honoured, and every answer keeps why it ended.
"""

from collections import Counter
from collections.abc import Iterable
from functools import partial
from itertools import chain
from pathlib import Path

from config import DATASET_FILES, DATASETS, Generation, InferConfig, settings
from cream.cli import console, names, preflight
from cream.cli.console import log
from cream.cli.flags import parse
from cream.engines import Sampling
from cream.errors import UserError
from cream.evaluation import choices, grading, summary
from cream.evaluation.questions import Questions, read_questions
from cream.evaluation.statistics import format_table
from cream.evaluation.tasks import TASKS
from cream.files import journal, store
from cream.files.folders import check_folder
from cream.records import Answer, Item, Prompt, encode
from cream.scoring.completions import answered, asked, counted, samples
from cream.text.chat import Plain

EXAMPLE = """\
  one CPU   python infer.py --model tiny --checkpoint tiny_m1 --name tiny_prompt_1 --output_dir outputs/sampling.json
  one GPU   python infer.py --model llama3 --checkpoint llama3_sft --name prompt_1 --engine vllm
  accuracy  python infer.py --mode evaluation --model tiny --checkpoint tiny_m1 --name tiny_test
  voting    python infer.py --mode evaluation --model tiny --checkpoint tiny_m1 --name tiny_test --gen_n 8
  options   python infer.py --mode evaluation --model tiny --name all_test --scoring loglikelihood
  again     python infer.py --mode rescore --input_file outputs/evaluation/tiny_m1-tiny_test/results.json"""

RECORD = 256  # tokens of text that a record of compared options takes, besides its question, at most


@console.stage
def main(argv=None):
    config = parse(InferConfig, argv, description=__doc__, example=EXAMPLE)
    g = config.generation
    if g.mode == "rescore" and (g.gen_n or g.limit_size):
        raise UserError("--mode rescore grades every answer of the file: --gen_n and --limit_size do not apply")
    g.gen_n = g.answers()
    if g.scoring != "generate" and g.mode != "evaluation":
        raise UserError(f"--scoring {g.scoring}: options are those of questions, in --mode evaluation")
    if g.few_shot and g.mode != "evaluation":
        raise UserError(f"--few_shot {g.few_shot}: examples go in front of questions, in --mode evaluation")
    if g.few_shot_file and not g.few_shot:
        raise UserError(f"--few_shot_file {g.few_shot_file}: --few_shot K says how many of its examples are shown")
    {"sampling": sample, "evaluation": evaluate, "rescore": rescore}[g.mode](config)


def sample(config: InferConfig) -> None:
    """Samples of every prompt, in the order of the prompts; a `.jsonl` file is never in memory as a whole."""
    g = config.generation
    data = _dataset(config, Prompt, "sampling takes unlabelled prompts: test questions must not enter training")
    total = sum(1 for _ in store.read(data, Prompt, skip=config.run.skip))  # a bad record or a duplicate shows up here
    read = partial(store.read, data.absolute(), Prompt, _limit(config), skip=config.run.skip, unique=False)
    total = sum(1 for _ in read()) if _limit(config) else total
    if not total:  # all of them are bad, or there would be no layout
        raise store.nothing_left(data, Prompt, "prompt is left to answer", _limit(config))
    sysprompt = "none" if g.sysprompt == "auto" else g.sysprompt
    sampling = _sampling(config)
    folder = (
        f"{_short(g.name)}-{_short(config.model.name())}-ckpt_{names.label(config.model.checkpoint)}-"
        f"{'Greedy' if sampling.greedy else 'Sample'}_n-{sampling.n}_temp-{sampling.temperature:g}"
        f"_GenMaxT-{g.gen_max_tokens}-sys_{sysprompt}"
    )
    target = _target(config, config.run.outputs() / "sampling" / folder / "results.json")
    output, chat = _begin(config, [data], target, *_idle(config, sampling))
    if config.run.dry_run:
        return
    if not output.stands:
        need = preflight.answers(total, data.stat().st_size if not _limit(config) else 0, sampling.n, g.gen_max_tokens)
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
        for reason, count in _left_out(output):
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
    """Every item answered, once or by a vote, or its options compared, and graded; a table of accuracies."""
    g = config.generation
    data = _dataset(config, Item, "evaluation takes questions with labels")
    files = {task: names.in_root(DATASET_FILES[f"{task}_test"]) for task in TASKS} if _is_all(data) else {}
    compare, examples = g.scoring == "loglikelihood", {"shots": g.few_shot, "shots_file": g.few_shot_file}
    which = {"options": compare, "limit": _limit(config), "seed": config.run.seed, "skip": config.run.skip}
    questions = read_questions(_known(g.name), data, files, **examples, **which)
    return _compare(config, questions) if compare else _answer(config, questions)


def _answer(config: InferConfig, questions: Questions) -> None:
    """Every question answered, greedily once or several times for a vote, and graded."""
    g, sampling, prompts = config.generation, _sampling(config), questions.prompts(config.generation.sysprompt)
    target = _evaluation_target(config, "" if sampling.greedy else f"-n{sampling.n}")
    output, chat = _begin(config, questions.files, target, *_idle(config, sampling), examples=questions.example_files)
    if config.run.dry_run:
        return
    if not output.stands:
        preflight.room(target, preflight.answers(len(prompts), 0, sampling.n, g.gen_max_tokens), "evaluation")
        every, strict = partial(list, list(prompts.values())), g.extraction == "strict"
        with output:
            for prompt, _, answers in _answers(config, output, chat, every, len(prompts), sampling):
                output.append(grading.graded(questions.items[prompt.uuid], prompt, answers, strict))
            output.reject(questions.rejected)
            rows = grading.whole(output.rows(prompts), prompts, questions.items, strict)
            output.finish(rows, **questions.facts())
    facts, text = summary.generated(list(store.read(output.path, Answer)), sampling.n)
    first = next(iter(prompts.values())).messages
    _conclude(output, questions, facts | {"extraction": g.extraction} | summary.asked(chat, first), text)


def _compare(config: InferConfig, questions: Questions) -> None:
    """The likeliest option of every question; accuracies also by the other lengths."""
    g, groups = config.generation, questions.groups(config.generation.prompt_format, config.generation.sysprompt)
    log.info("options are compared, nothing is generated: flags of sampling, engine and extraction do not apply")
    target = _evaluation_target(config, f"-loglikelihood-{g.prompt_format}")
    output, chat = _begin(config, questions.files, target, *_idle(config, None), examples=questions.example_files)
    if config.run.dry_run:
        return
    if not output.stands:
        from cream.evaluation.loglikelihood import compared, unanswered

        size = sum(len(item.question) for item in questions.items.values())
        preflight.room(target, preflight.answers(len(groups), size, 1, RECORD), "evaluation")
        pool, policy = config.cluster.pool(config.device), config.model.folder(config.model.checkpoint).absolute()
        how = {"max_length": g.max_length, "bf16": config.device.bf16, "show": config.output.show_example}
        with output:
            for uuid, scored in compared(output, chat, groups, pool=pool, policy=policy, **how):
                output.append(choices.picked(questions.items[uuid], scored, g.length_norm))
            output.reject(questions.rejected)
            if questions.passed_over:
                output.drop(choices.WITHOUT, questions.passed_over)
            output.finish(unanswered(output.rows(questions.items), output), **questions.facts())
    facts, text = summary.compared(list(store.read(output.path, Answer)))
    facts |= {"scoring": g.scoring, "prompt_format": g.prompt_format, "length_norm": g.length_norm}
    _conclude(output, questions, facts | summary.asked(chat, groups[0].prompt), text)


def _conclude(output: journal.Output, questions: Questions, facts: dict, text: str) -> None:
    """Say how the evaluation went; its summary is written unless it stands so."""
    path = summary.path_of(output.path)
    store.renew_json(path, facts | {"few_shot": questions.shots})
    for reason, count in _left_out(output):
        log.info("%d of %d questions count as wrong: %s", count, len(questions.items), reason)
    log.info("%s\nanswers: %s\nsummary: %s", text, output.path, path)


def _left_out(output: journal.Output) -> list[tuple[str, int]]:
    """Why what was asked has no answer, and how often; what was never asked is told where it is found."""
    return [each for each in output.dropped.items() if each[0] not in (store.MALFORMED, choices.WITHOUT)]


def rescore(config: InferConfig) -> None:
    """Extract and grade the answers of an evaluation file again; old and new accuracies."""
    g = config.generation
    if g.input_file is None:
        raise UserError("--mode rescore needs --input_file, the results of an evaluation")
    source = Path(g.input_file)
    answers = list(store.read(source, Answer, skip=config.run.skip))
    if not answers:
        raise store.nothing_left(source, Answer, "answer is left to grade")
    compared = any(answer.option_logprob for answer in answers)  # nothing is to be extracted, but to be chosen again
    unused = "extraction" if compared else "length_norm"
    if getattr(g, unused) != getattr(Generation, unused):
        how = "compared options" if compared else "generated answers"
        raise UserError(f"--{unused} {getattr(g, unused)}: {source} has {how}, to which it does not apply")
    by = {"length_norm": g.length_norm} if compared else {"extraction": g.extraction}
    (rule,) = by.values()
    target = _target(config, source.with_name(f"{source.name.partition('.json')[0]}.rescored-{rule}.json"))
    provenance = config.run.provenance()
    provenance.output("input_file", source)
    decides = {**by, "on_bad_record": config.run.on_bad_record}
    output = journal.Output(target, decides, provenance, overwrite=config.run.overwrite)
    if compared:
        grade = partial(choices.chosen, norm=g.length_norm)
    else:
        grade = partial(grading.regraded, strict=g.extraction == "strict")
    answers, again, bad = grading.again(answers, grade, source, skip=config.run.skip)
    for title, some in (("before", answers), (f"now, {' '.join(next(iter(by.items())))}", again)):
        log.info("%s\n%s", title, format_table(grading.table_rows(some, task=_short(g.input_file))))
    changed = grading.changes(answers, again)
    lines = [f"{len(changed)} of {len(answers)} predictions changed", *(f"  {line}" for line in changed[:20])]
    log.info("\n".join(lines))
    if not config.run.dry_run and not output.stands:
        with output:
            if config.run.skip:
                output.reject(chain(store.rejected(source, Answer), bad))
            output.finish(encode(answer) for answer in again)
    log.info("answers: %s", target)


def _dataset(config: InferConfig, kind: type, why: str) -> Path:
    """The data set's file, checked to hold records of this kind."""
    name, mode = config.generation.name, config.generation.mode
    if name is None:
        raise UserError(f"--mode {mode} needs --name, a data set's name or file")
    path = names.dataset(name, DATASET_FILES, DATASETS)
    if not path.exists():
        if _is_all(path):
            return path  # the per-task files stand for it
        raise UserError(f"--name {name}: {path} does not exist; put the data there, or give a file")
    if (found := store.detect(path, skip=config.run.skip)) is not kind:
        raise UserError(f"--mode {mode} --name {name}: {path} holds {found.__name__} records; {why}")
    return path


def _is_all(data: Path) -> bool:
    """Whether this is the set of all tasks, whose files beside it count as well, and not a file of the same name."""
    return data.resolve() == names.in_root(DATASET_FILES["all_test"]).resolve()


def _limit(config: InferConfig) -> int | None:
    return config.generation.limit_size or (97 if config.run.debug else None)


def _short(name: str | None) -> str:
    """What stands for a name or path in an output's name."""
    if not name:
        return "none"
    stem = Path(name).name.partition(".")[0]
    return Path(name).parent.name if stem in ("test", "results") and Path(name).parent.name else stem


def _known(name: str) -> str:
    """A built-in data set's name as it is spelled there, whatever the case; of a file what stands for it."""
    return {known.lower(): known for known in DATASET_FILES}.get(name.lower(), _short(name))


def _target(config: InferConfig, default: Path, below: str = "results.json") -> Path:
    """--output_dir when it names a file; `below` it when it is a folder; the default without it."""
    given = config.output.output_dir
    if given is None:
        return default if store.is_record_file(default) else default / below
    return Path(given) if store.is_record_file(Path(given)) else Path(given) / below


def _evaluation_target(config: InferConfig, how: str) -> Path:
    """The file of an evaluation: named by model, data, examples, and `how` it is done."""
    checkpoint, few = config.model.checkpoint, config.generation.few_shot
    policy = names.label(checkpoint) if checkpoint else _short(config.model.name())
    folder = f"{policy}-{_short(config.generation.name)}{f'-{few}shot' if few else ''}{how}"
    return _target(config, config.run.outputs() / "evaluation", f"{folder}/results.json")


def _sampling(config: InferConfig) -> Sampling:
    """How to answer: greedy is one answer a prompt, and an evaluation's only answer. Says which flags do not apply."""
    g = config.generation
    greedy = not g.do_sample or g.gen_temperature < 0.001
    if g.mode == "evaluation" and g.gen_n == 1:
        greedy = True
        log.info("one answer a question, greedy: --gen_temperature, --top_p, --do_sample do not apply")
    elif greedy and g.gen_n > 1:
        log.info("greedy: one answer a prompt, --gen_n %d does not apply", g.gen_n)
    n, temperature = (1, 0.0) if greedy else (g.gen_n, g.gen_temperature)
    how = {"max_tokens": g.gen_max_tokens, "seed": config.run.seed, "logprobs": g.mode == "sampling"}
    return Sampling(n=n, temperature=temperature, top_p=g.top_p, **how)


def _idle(config: InferConfig, sampling: Sampling | None) -> list[str]:
    """The flags that do not decide what this run gives; `sampling` is None where options are compared."""
    g = config.generation
    idle = ["few_shot_file", *([] if g.few_shot else ["few_shot"])]  # the hash of the file stands for it
    if sampling is None:
        idle += ["gen_n", "gen_temperature", "top_p", "do_sample", "gen_max_tokens", "extraction", "engine"]
        return idle + ([] if g.few_shot else ["seed"]) + (["sysprompt"] if g.prompt_format == "plain" else [])
    idle += ["scoring", "prompt_format", "length_norm"]
    if g.mode == "evaluation" and sampling.greedy:
        idle += ["gen_n", "gen_temperature", "top_p", "do_sample", *([] if g.few_shot else ["seed"])]
    return idle


def _begin(config: InferConfig, data: list[Path], target: Path, *idle: str, examples: Iterable[Path] = ()):
    """The output and the policy's chat format; says what will be done. `idle` flags do not decide this output."""
    folder = config.model.folder(config.model.checkpoint)
    check_folder(folder)
    provenance = config.run.provenance()
    for number, path in enumerate(data):
        provenance.file(f"data.{number}" if number else "data", path)
    for number, path in enumerate(dict.fromkeys(examples)):
        provenance.file(f"examples.{number}" if number else "examples", path)
    provenance.model("policy", folder)
    config.model.add_template(provenance)
    flat = settings(config, *idle)
    beside = [summary.path_of(target)] if config.generation.mode == "evaluation" else []
    output = journal.Output(target, flat, provenance, overwrite=config.run.overwrite, beside=beside)
    log.info("%s of %s by %s -> %s", config.generation.mode, ", ".join(map(str, data)), folder, target)
    if output.stands:
        log.info("%s stands already, made by the same settings from the same inputs", target)
    if config.run.dry_run:
        log.info("dry run: nothing was written")
    from cream.model.load import check_tp_size, load_chat, load_tokenizer

    g = config.generation
    if g.scoring == "loglikelihood":
        if (tp_size := config.cluster.tensor_parallel_size) > 1:
            check_tp_size(folder, tp_size)
        if g.prompt_format == "plain":
            return output, Plain(load_tokenizer(folder))
    return output, load_chat(folder, config.model.template())


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
