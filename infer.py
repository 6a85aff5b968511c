"""Generate answers: samples for training (--mode sampling), graded greedy ones (evaluation), or grade again (rescore).

Departures from the released code: engines get token ids (one BOS), prompts are dropped rather than cut, evaluation is
always greedy, --output_dir is honoured, and every answer keeps why it ended.
"""

from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

from msgspec import structs

from config import DATASET_FILES, DATASETS, InferConfig, settings
from cream import console, journal, names, preflight, store
from cream.console import log
from cream.engines import Completion, Sampling
from cream.errors import UserError
from cream.evaluation.items import graded, item_files, prompt_of, read_items
from cream.evaluation.statistics import format_table, summarise
from cream.evaluation.tasks import TASKS, grade
from cream.flags import as_dict, parse
from cream.folders import check_folder
from cream.prompts import apply
from cream.provenance import fingerprint_text
from cream.records import Answer, Item, Message, Prompt, encode

EXAMPLE = """\
  one CPU   python infer.py --model tiny --checkpoint tiny_m1 --name tiny_prompt_1 --output_dir outputs/sampling.json
  one GPU   python infer.py --model llama3 --checkpoint llama3_sft --name prompt_1 --engine vllm
  accuracy  python infer.py --mode evaluation --model tiny --checkpoint tiny_m1 --name tiny_test
  again     python infer.py --mode rescore --input_file outputs/evaluation/tiny_m1-tiny_test/results.json"""


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
        from cream.generation import samples

        need = preflight.answers(total, data.stat().st_size if not _limit(config) else 0, n, g.gen_max_tokens)
        preflight.room(target, need, "sampling")
        prompts = partial(_asked, read, sysprompt)
        counts = Counter()
        with output:
            for prompt, ids, completions in _answers(config, output, chat, prompts, total, sampling):
                output.append(samples(chat, prompt, ids, completions))
            if output.dropped.total() == total:
                raise UserError(f"{data}: no prompt is left to answer (dropped: {dict(output.dropped)})")
            if config.run.skip:
                output.reject(store.rejected(data, Prompt, _limit(config)))
            output.finish(_counted(output.rows(record.uuid for record in read()), counts))
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
    prompts = {u: Prompt(uuid=u, messages=prompt_of(item, g.sysprompt)) for u, item in items.items()}
    log.info(
        "evaluation is greedy, one answer a question: --gen_n, --gen_temperature, --top_p, --do_sample do not apply"
    )
    sources = item_files(_known(g.name), data, files)
    checkpoint = config.model.checkpoint
    folder = f"{names.label(checkpoint) if checkpoint else _short(config.model.name())}-{_short(g.name)}"
    target = _target(config, config.run.outputs() / "evaluation", f"{folder}/results.json")
    output, chat = _begin(config, sources, target, "gen_n", "gen_temperature", "top_p", "do_sample", "seed")
    if config.run.dry_run:
        return
    strict = g.extraction == "strict"
    if not output.stands:
        preflight.room(target, preflight.answers(len(prompts), 0, 1, g.gen_max_tokens), "evaluation")
        asked = partial(list, list(prompts.values()))
        sampling = Sampling(n=1, temperature=0.0, max_tokens=g.gen_max_tokens, seed=config.run.seed)
        with output:
            for prompt, _, answers in _answers(config, output, chat, asked, len(prompts), sampling):
                output.append(graded(items[prompt.uuid], prompt.messages, answers[0], strict))
            if config.run.skip:
                output.reject(bad for source in sources for bad in store.rejected(source, Item))
            output.finish(_whole(output.rows(prompts), prompts, items, strict))
        for reason, count in output.dropped.items():
            if reason == store.MALFORMED:  # no question; told when they were written
                continue
            log.info("%d of %d questions count as wrong: %s", count, len(prompts), reason)
    log.info("%s\nanswers: %s\nsummary: %s", *_summary(config, output, chat, prompts))


def _whole(rows: Iterator[dict], prompts: dict[str, Prompt], items: dict[str, Item], strict: bool) -> Iterator[dict]:
    """The graded answers, in the order of the prompts; one without an answer gets none, which is wrong."""
    row = next(rows, None)
    for uuid, prompt in prompts.items():
        if row is not None and row["uuid"] == uuid:
            yield row
            row = next(rows, None)
        else:
            yield encode(graded(items[uuid], prompt.messages, None, strict))


def _summary(config: InferConfig, output: journal.Output, chat, prompts) -> tuple[str, Path, Path]:
    """The table, the answers' file, and the summary's, which is written unless it stands."""
    answers = list(store.read(output.path, Answer))
    rows = summarise(map(encode, answers))
    strict = [structs.replace(a, correct=grade(a.question, a.label, a.responses, strict=True)[1]) for a in answers]
    facts = {
        "tasks": rows,
        "strict": {row["task"]: row["accuracy"] for row in summarise(map(encode, strict))},
        "extraction": config.generation.extraction,
        "greedy": True,
        "first_prompt": _shown(chat, next(iter(prompts.values()))),
        "chat_template": fingerprint_text(chat.tokenizer.chat_template),
    }
    stem = output.path.name.partition(".json")[0]
    summary = output.path.with_name("summary.json" if stem == "results" else f"{stem}.summary.json")
    if not (output.stands and summary.exists()):
        store.write_json(summary, facts)
    released = ", ".join(f"{task} {100 * accuracy:.1f}" for task, accuracy in facts["strict"].items())
    return (
        f"{format_table(rows)}\naccuracy % by the method's released extraction rules: {released}",
        output.path,
        summary,
    )


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
    changed, again = [], []
    for answer in answers:
        prediction, correct = grade(answer.question, answer.label, answer.responses, strict=g.extraction == "strict")
        again.append(structs.replace(answer, final_prediction=prediction, correct=correct))
        if (prediction, correct) != (answer.final_prediction, answer.correct):
            changed.append(f"  {answer.uuid}: {answer.final_prediction} -> {prediction} (label {answer.label})")
    for title, graded_answers in (("before", answers), (f"now, extraction {g.extraction}", again)):
        rows = ({"task": _short(g.input_file), **encode(a)} for a in graded_answers)  # the method's files have no task
        log.info("%s\n%s", title, format_table(summarise(rows)))
    log.info("\n".join([f"{len(changed)} of {len(answers)} predictions changed", *changed[:20]]))
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


def _known(name: str) -> str:
    """A built-in data set's name as it is spelled there, whatever the case; of a file what stands for it."""
    return {known.lower(): known for known in DATASET_FILES}.get(name.lower(), _short(name))


def _asked(read: Callable[[], Iterable[Prompt]], sysprompt: str) -> Iterator[Prompt]:
    """The prompts of a file, as they are put to the policy."""
    for prompt in read():
        *before, last = prompt.messages
        yield structs.replace(prompt, messages=[*before, Message("user", apply(sysprompt, last.content))])


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

    return output, models.load_chat(folder, config.model.template())


def _answers(
    config: InferConfig, output: journal.Output, chat, prompts: Callable[[], Iterable[Prompt]], total: int, sampling
) -> Iterator[tuple[Prompt, list[int], list[Completion]]]:
    """The prompts that the journal does not hold yet, each with its ids and its answers, as they are finished. One that
    does not fit is counted as dropped. `prompts` gives them all."""
    import torch

    from cream import engines, models
    from cream.fingerprints import verified
    from cream.generation import KEPT, answerer

    done = output.resume()
    if done:
        log.info("going on: %d of %d prompts are answered already", len(done), total)
    first = next(iter(prompts()))
    if all(prompt.uuid in done for prompt in prompts()):
        return
    pool = config.cluster.pool(config.device)
    todo = prompts if pool.alone else partial(_unfinished, prompts, done, pool.batch(total))
    folder = config.model.folder(config.model.checkpoint).absolute()  # a replica works in a folder of its own
    engine, why = engines.choose(config.engine.engine, folder, pool.kind)
    precision = models.precision(config.device.bf16, torch.device(pool.kind), training=False)
    limit = models.length_limit(config.generation.max_length + sampling.max_tokens, folder)
    stops = chat.tokenizer.convert_ids_to_tokens(list(chat.stop_ids))
    log.info("engine %s (%s); %s", engine, why, precision.reason)
    log.info("at most %d tokens of prompt and answer together; an answer stops at %s", limit, " or ".join(stops))
    if config.output.show_example:
        log.info("first prompt as the model sees it:\n%s", _shown(chat, first))
    options = {
        "name": engine,
        "model_folder": folder,
        "dtype": str(precision.dtype).removeprefix("torch."),
        "max_model_len": limit,
        "batch_tokens": config.engine.max_tokens_per_batch,
        "gpu_memory_utilization": config.engine.gpu_memory_utilization,
        "tensor_parallel_size": config.cluster.tensor_parallel_size,
    }
    max_prompt = min(config.generation.max_length, limit - 1)
    make = partial(answerer, chat, replace(sampling, stop_token_ids=chat.stop_ids), max_prompt, options, done)
    make = partial(verified, folder, output.header["inputs"]["policy"], make)
    with console.bar(total - len(done), "answering", "prompts") as bar:
        for _, answered in pool.run(todo, make, total):
            if answered is KEPT:
                continue
            prompt, ids, completions = answered
            if completions:
                yield prompt, ids, completions
            else:
                output.drop(f"prompt longer than {max_prompt} tokens")
            bar.update()


def _unfinished(prompts: Callable[[], Iterable[Prompt]], done: Container[str], batch: int) -> Iterator[Prompt]:
    """The prompts, but for a replica's batches of which every prompt is in `done`."""
    rest = iter(prompts())
    while some := list(islice(rest, batch)):
        if any(prompt.uuid not in done for prompt in some):
            yield from some


def _shown(chat, prompt: Prompt) -> str:
    return chat.tokenizer.decode(chat.prompt(prompt.messages))


def _counted(rows: Iterable[dict], counts: Counter[str]) -> Iterator[dict]:
    """The same rows; once they are through, `counts` says what was in them."""
    for row in rows:
        counts["prompts"] += 1
        counts["answers"] += len(row["responses"])
        counts["distinct"] += len(set(row["responses"]))
        counts["cut"] += row["finish_reason"].count("length")
        yield row


if __name__ == "__main__":
    main()
