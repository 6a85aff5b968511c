"""Generate responses for training (--mode sampling), generate and grade them (evaluation), grade again (rescore), or
write new prompts after the example of others (instructions).

Multiple choice needs no generation: --scoring loglikelihood compares the options' log-likelihoods.

Departures from the released code: engines get token ids (with one BOS), prompts that are too long are dropped and not
truncated, evaluation with one response per question is always greedy, --output_dir has an effect, and each response
records why it ended.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from config import DATASET_FILES, DATASETS, Cluster, Device, Model, RandomRun, for_next_stage, group, settings
from cream.alarms import AlarmFlags
from cream.cli import advice, console, names
from cream.cli.console import log
from cream.cli.flags import parse
from cream.data import synthesis
from cream.data.synthesis import SynthesisFlags
from cream.engines.options import EngineFlags, SamplingFlags
from cream.errors import UserError
from cream.evaluation import evaluate as evaluation
from cream.evaluation.options import EvaluationFlags, InferOutput, Task
from cream.evaluation.questions import read_questions
from cream.evaluation.rescore import rescore
from cream.files import journal, store
from cream.files.folders import check_folder
from cream.records import Conversation
from cream.scoring import driver, sampling
from cream.text import prompts as texts
from cream.text.thoughts import ThoughtFlags

EXAMPLE = """\
  one CPU   python infer.py --model tiny --checkpoint tiny_m1 --name tiny_prompt_1 --output_dir outputs/sampling.json
  one GPU   python infer.py --model llama3 --checkpoint llama3_sft --name prompt_1 --engine vllm
  accuracy  python infer.py --mode evaluation --model tiny --checkpoint tiny_m1 --name tiny_test
  voting    python infer.py --mode evaluation --model tiny --checkpoint tiny_m1 --name tiny_test --gen_n 8
  options   python infer.py --mode evaluation --model tiny --name all_test --scoring loglikelihood
  prompts   python infer.py --mode instructions --model llama3 --name oasst_sft --num_prompts 5000 --exclude all_test
  again     python infer.py --mode rescore --input_file outputs/evaluation/tiny_m1-tiny_test/results.json"""


@dataclass
class InferConfig:
    """infer.py"""

    device: Device = group(Device)
    cluster: Cluster = group(Cluster)
    model: Model = group(Model)
    task: Task = group(Task)
    sampling: SamplingFlags = group(SamplingFlags)
    evaluation: EvaluationFlags = group(EvaluationFlags)
    instructions: SynthesisFlags = group(SynthesisFlags)
    thoughts: ThoughtFlags = group(ThoughtFlags)
    engine: EngineFlags = group(EngineFlags)
    output: InferOutput = group(InferOutput)
    alarms: AlarmFlags = group(AlarmFlags)
    run: RandomRun = group(RandomRun)


@console.stage
def main(argv=None):
    config = parse(InferConfig, argv, description=__doc__, example=EXAMPLE)
    check(config)
    mode = config.task.mode
    if mode == "rescore":
        return rescore(config.task.input_file, config.evaluation, config.thoughts, config.output.output_dir, config.run)
    return {"sampling": sample, "evaluation": evaluate, "instructions": write_prompts}[mode](config)


def check(config: InferConfig, about: dict | None = None) -> None:
    """Fill in the mode's defaults. Raises UserError where flags contradict each other."""
    config.evaluation.check(config.task.mode)
    config.sampling.fill(config.task.mode)
    texts.load(config.sampling.sysprompt)
    mode, given = config.task.mode, config.instructions.given()
    if mode != "instructions" and given:
        raise UserError(f"--mode {mode} writes no prompts: {', '.join(given)} does not apply")
    if mode == "instructions" and config.sampling.sysprompt != "auto":
        raise UserError("--mode instructions: --sysprompt is for questions; it does not apply")


def sample(config: InferConfig) -> None:
    """Responses to every prompt, for training."""
    from cream.model.load import load_chat

    model, run, task, flags = config.model, config.run, config.task, config.sampling
    path = task.dataset(DATASET_FILES, DATASETS, skip=run.skip)
    prompts = sampling.open_prompts(path, task.limit(run.debug), skip=run.skip, part=task.part)
    plan, sysprompt = flags.plan("sampling", run.seed), texts.load(flags.sysprompt)
    of = names.short(task.name), names.short(model.name()), names.label(model.checkpoint)
    added = "none" if flags.sysprompt == texts.AUTO else names.short(flags.sysprompt)
    default = run.outputs() / "sampling" / sampling.output_folder(plan, added, *of) / "results.json"
    target = names.choose_output(config.output.output_dir, default)
    usual = config.thoughts == ThoughtFlags()  # other tags count other thoughts
    unused = [name for name in sampling.UNUSED if usual or name != "thinking_tags"] + plan.idle_flags
    output, folder = _begin(config, {"data": path}, target, unused)
    chat = load_chat(folder, **model.text(), tags=config.thoughts.tags)
    sysprompt.check(chat, flags.sysprompt)
    if not (run.dry_run or output.up_to_date):
        how = {"engine": config.engine.options(), "max_length": flags.max_length, "show": config.output.show_example}
        loaded, named = _policy(config, output, folder, chat), {"model": model.name(), "checkpoint": model.checkpoint}
        how |= {"policy": named | {"fingerprint": loaded.fingerprint}, "limits": config.alarms.limits()}
        sampling.sample(output, loaded, prompts, sysprompt, plan, **how)
    if not run.dry_run:
        console.say_result("samples: %s", output.path)
        advice.say(sampling.next_step(output.path, folder, model.checkpoint, for_next_stage(config)))
        if prompts.kind is Conversation:
            advice.say("or, for SPIN:\n  %s", sampling.spin(output.path, path))
        if not texts.is_named(flags.sysprompt):
            advice.say("or, for RLCD, with samples to the contrary --sysprompt:\n  %s", sampling.contrast(output.path))


def evaluate(config: InferConfig) -> None:
    """Every question answered and graded; a table of accuracies."""
    model, run, task = config.model, config.run, config.task
    path = task.dataset(DATASET_FILES, DATASETS, skip=run.skip)
    limits = {"limit": task.limit(run.debug), "limit_per_task": task.limit_per_task}
    which = limits | {"seed": run.seed, "skip": run.skip}
    questions = read_questions(names.canonical(task.name, DATASET_FILES), path, config.evaluation, **which)
    rules, engine = config.evaluation.rules(config.thoughts.tags), config.engine.options()
    plan = evaluation.plan_evaluation(questions, config.evaluation, rules, config.sampling, engine, run.seed)
    policy = names.label(model.checkpoint) if model.checkpoint else names.short(model.name())
    name = f"{plan.folder(policy, names.short(task.name))}/results.json"
    target = names.choose_output(config.output.output_dir, run.outputs() / "evaluation" / name, name)
    summary = evaluation.summary_path(target, named=target == Path(config.output.output_dir or ""))
    output, folder = _begin(config, questions.inputs, target, plan.unused_flags(), summary)
    text = model.text() | {"tags": config.thoughts.tags}
    chat = plan.load_format(folder, text, config.cluster.tensor_parallel_size)
    texts.load(config.sampling.sysprompt).check(chat, config.sampling.sysprompt)
    if not (run.dry_run or output.up_to_date):
        how = {"max_length": config.sampling.max_length, "show": config.output.show_example}
        limits = config.alarms.limits()
        evaluation.evaluate(plan, output, _policy(config, output, folder, chat), limits, **how)
    if not run.dry_run:
        console.say_result("%s", evaluation.summarise(plan, output, summary, chat))


def write_prompts(config: InferConfig) -> None:
    """New prompts, after the example of those in the data set and of those written so far."""
    from cream.model.load import load_chat, load_plain

    model, run, task, flags, own = config.model, config.run, config.task, config.sampling, config.instructions
    path = task.dataset(DATASET_FILES, DATASETS, skip=run.skip)
    excluded = [_test_set(name.strip()) for name in (own.exclude or "").split(",") if name.strip()]
    seeds = synthesis.read_seeds(path, task.limit(run.debug), skip=run.skip)
    inputs = {"data": path} | {f"exclude_{i}": each for i, each in enumerate(excluded, 1)}
    of = names.short(task.name), names.short(model.name()), names.label(model.checkpoint)
    default = run.outputs() / "instructions" / "{}-{}-ckpt_{}".format(*of) / "prompts.json"
    target = names.choose_output(config.output.output_dir, default, default.name)
    output, folder = _begin(config, inputs, target, synthesis.IDLE)
    if not (run.dry_run or output.up_to_date):
        if run.skip:
            output.reject(store.rejected(path, store.detect(path, skip=True), task.limit(run.debug)))
        plain, tags = config.evaluation.prompt_format == "plain", config.thoughts.tags
        chat = load_plain(folder) if plain else load_chat(folder, **model.text(), tags=tags)
        kept = synthesis.Kept(seeds, synthesis.read_excluded(excluded, skip=run.skip), own.max_rouge, own.num_prompts)
        how = {"engine": config.engine.options(), "max_length": flags.max_length, "show": config.output.show_example}
        plan = flags.plan("instructions", run.seed)
        synthesis.synthesise(output, _policy(config, output, folder, chat), own, kept, plan, tags, **how)
    if not run.dry_run:
        next_ = console.command("infer.py", **for_next_stage(config) | {"checkpoint": model.checkpoint, "name": target})
        console.say_result("prompts: %s", target)
        advice.say("next, respond to them:\n  %s", next_)


def _test_set(name: str) -> Path:
    """The file of a data set that --exclude names."""
    try:
        path = names.dataset(name, DATASET_FILES, DATASETS)
        if not path.exists():
            raise names.missing_data(name, path)
    except UserError as error:
        raise UserError(str(error).replace("--name", "--exclude", 1)) from None
    return path


def _begin(config: InferConfig, inputs: dict[str, Path], target: Path, unused: Iterable[str], *beside: Path):
    """The output, and the policy's folder; says what will be done."""
    model, run = config.model, config.run
    check_folder(folder := model.folder(model.checkpoint))
    provenance, sysprompt = run.provenance(), config.sampling.sysprompt
    if not texts.is_named(sysprompt):  # its content decides, not its name
        inputs, unused = inputs | {"sysprompt": Path(sysprompt)}, [*unused, "sysprompt"]
    for name, path in inputs.items():
        provenance.file(name, path)
    provenance.model("policy", folder)
    model.add_template(provenance)
    if config.task.mode != "instructions":
        unused = [*unused, *vars(config.instructions)]
    output = journal.Output(target, settings(config, *unused), provenance, overwrite=run.overwrite, beside=beside)
    data = ", ".join(str(path) for name, path in inputs.items() if name.startswith("data"))
    log.info("%s of %s by %s -> %s", config.task.mode, data, folder, target)
    if output.up_to_date:
        console.say_result("%s is up to date (same settings and inputs); skipping", target)
    if run.dry_run:
        config.cluster.flags(config.device)  # raises UserError where a device is not there
        log.info("dry run: nothing was written")
    return output, folder


def _policy(config: InferConfig, output: journal.Output, folder: Path, chat) -> driver.Model:
    """The policy, where it works."""
    fingerprint, pool = output.header["inputs"]["policy"], config.cluster.pool(config.device)
    return driver.Model(folder.absolute(), fingerprint, chat, pool, config.device.bf16)  # replicas work elsewhere


if __name__ == "__main__":
    main()
