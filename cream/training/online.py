"""Online training of a policy by trl's RLOOTrainer: prompts in our text format, rewards by our sources, checkpoints and
run folders as of every stage.

trl saves what it resumes from under state/, where the other stages have theirs, and here as there it is loaded only as
it was saved. All epochs' prompts are one list, in the order in which the other stages draw them: trl's own sampler
would begin again with the first epoch's order in a run that resumes in a later one, and drop an epoch's last prompts.
"""

from __future__ import annotations

import copy
import logging
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import patch_environment

from cream import alarms
from cream.cli import interrupts
from cream.engines import Completion, Sampling
from cream.errors import UserError
from cream.files import store
from cream.files.folders import remote_code
from cream.files.store import MALFORMED
from cream.model.checkpoint import check_saving, length_limit
from cream.model.hardware import MOST
from cream.model.load import load_chat, load_policy
from cream.model.lora import lora_config
from cream.records import Prompt
from cream.scoring.sampling import record_samples
from cream.text.refusals import find_refusals
from cream.text.tokens import describe_length
from cream.training import state
from cream.training.job import Job
from cream.training.launch import given_world, is_first_process
from cream.training.online_saving import Keep, check_state
from cream.training.parallel import quiet_deepspeed
from cream.training.report import Report
from cream.training.run import open_folder, resume_lines, set_up_process
from cream.training.stages.online_rloo import read_prompts
from cream.training.weights import check_memory

log = logging.getLogger("cream")
FIRST = 64  # responses of a process after which a reward that none of them has ends the stage


class Plan(NamedTuple):
    """What a run takes: `order`, the index of each prompt in turn; `steps` of `prompts` each, of all processes; of one
    process `rows` responses in a forward and backward pass, and `passes` of these a step."""

    order: list[int]
    steps: int
    prompts: int
    rows: int
    passes: int


def train(job: Job) -> dict:
    """Sample, reward and train, step by step; returns the counts and last metrics for the run's sidecar."""
    device, precision = set_up_process(job)
    chat = load_chat(job.start, **job.config.model.text(), **job.config.thoughts.text())
    prompts, refused, dropped = _prompts(job, chat)
    plan = make_plan(job, prompts, chat, device)
    saved = None if job.clear else state.last(job.run)
    folder = check_state(job, saved)
    text = job.config.model.text() | job.config.thoughts.text()
    sources = [each for each in (job.stage.live, job.stage.gold) if each]
    for each in sources:
        each.prepare(prompts, job.config.run.skip)
    loaded = [each.load(device.type, job.config.device.bf16, text) for each in sources]
    reward = reward_function(job.stage.options, chat, prompts, *loaded)
    check_memory(job, precision.dtype, device)
    model = load_policy(job.start, precision.dtype, device)
    check_saving(model, chat.tokenizer)
    job.provenance.check_unchanged()
    if is_first_process():
        open_folder(job)
    with _trl(job.stage.options.online_engine != "transformers"):
        from cream.training.rloo_trainer import Watch
    heard, start = alarms.Watch(job.config.alarms.limits()), saved.step if saved else 0
    watch = Watch(
        job, plan, start, partial(state.fits, job.run, model, job.config.optimisation.moment_bytes), Report(), heard
    )
    settings = partial(_settings, job, plan, device, precision.autocast, chat)
    with patch_environment(**job.config.output.tracker_variables(job.run)):
        watch.trainer = trainer = _trainer(job, plan, chat, model, watch, settings, reward, _rows(plan, prompts))
        with job.config.output.starting_trackers():
            for callback in trainer.callback_handler.callbacks:
                if hasattr(callback, "setup"):  # wandb's and trackio's, which else start within the loop
                    callback.setup(trainer.args, trainer.state, model)
        if is_first_process():
            watch.open()
            resume_lines(job.run, heard, None)
        _run(trainer, folder)
    if trainer.state.global_step < plan.steps:
        interrupts.raise_interrupted(agreed=True)
    trainer.model_wrapped = None  # DDP must not outlive the process group
    trainer.accelerator.free_memory()
    trainer.accelerator.end_training()
    counts = {"records": len(prompts) + sum(n for why, n in dropped.items() if why != MALFORMED)}
    counts |= {"trained_on": len(prompts), "dropped": dict(dropped)}
    counts |= {"steps": plan.steps, "responses": plan.steps * plan.prompts * job.stage.options.gen_n}
    return {"counts": counts, "last": watch.last, "alarms": heard.fired, "refused": refused}


# Prompts --------------------------------------------------------------------------------------------------------------


def _prompts(job: Job, chat) -> tuple[list[Prompt], dict[str, str], Counter[str]]:
    """The prompts that leave room for a response; the records that the chat template refuses, and why; how many were
    dropped and why."""
    config, skip, dropped = job.config, job.config.run.skip, Counter()
    prompts = read_prompts(config, job.data)
    refused = find_refusals(job.data, prompts, chat, skip)
    limit = length_limit(config.data.max_length, job.start)
    most = limit - job.stage.options.gen_max_tokens
    if most < 1:
        raise UserError(
            f"--gen_max_tokens {job.stage.options.gen_max_tokens} leaves no room for a prompt in {limit} tokens "
            "(--max_length, or the model's context); give fewer"
        )
    kept = []
    for prompt in prompts:
        if prompt.uuid in refused:
            continue
        if chat.exceeds(prompt.messages, most) or len(chat.encode_prompt(prompt.messages)) > most:
            dropped[f"prompt {describe_length(most)}"] += 1
        else:
            kept.append(prompt)
    for reason, count in dropped.items():
        log.info("dropped %d of %d prompts: %s", count, len(prompts), reason)
    kind = store.detect(job.data, skip=skip)
    if skip and (bad := sum(1 for _ in store.rejected(job.data, kind, job.limit_size, refused))):
        dropped[MALFORMED] = bad
    if not kept:
        raise UserError(f"{job.data}: no prompt is left to respond to (dropped: {dict(dropped)})")
    if config.output.show_example:
        log.info("first prompt as the model sees it:\n%s", chat.decode(chat.encode_prompt(kept[0].messages)))
    return kept, refused, dropped


def make_plan(job: Job, prompts: Sequence[Prompt], chat, device: torch.device) -> Plan:
    """Raises UserError where there are fewer prompts than one step takes."""
    o, own = job.config.optimisation, job.stage.options
    size = job.header["settings"]["global_batch"]
    steps = len(prompts) * o.epoch // size
    if not steps:
        raise UserError(
            f"{job.data}: {len(prompts)} prompts in {o.epoch} epochs are fewer than a step takes, {size}: give a "
            "smaller --train_bsz, or more prompts"
        )
    if rest := len(prompts) * o.epoch % size:
        log.info("the last %d prompts of all epochs are not used: a step takes %d", rest, size)
    epochs = (np.random.default_rng([job.config.run.seed, epoch]).permutation(len(prompts)) for epoch in range(o.epoch))
    order = np.concatenate([*epochs])[: steps * size].tolist()
    here = o.train_bsz * o.grad_accum * own.gen_n
    longest = max(len(chat.encode_prompt(prompt.messages)) for prompt in prompts) + own.gen_max_tokens
    tokens = o.max_tokens_per_batch or MOST[device.type][True]
    rows = max(n for n in range(1, here + 1) if here % n == 0 and (n == 1 or n * longest <= tokens))
    how = steps, size, own.gen_n, rows
    log.info("%d steps of %d prompts x %d responses; %d responses in a forward and backward pass", *how)
    return Plan(order, steps, size, rows, here // rows)


def _rows(plan: Plan, prompts: Sequence[Prompt]):
    """The prompts in the order of training, as trl takes them."""
    from datasets import Dataset

    plain = [[{"role": m.role, "content": m.content} for m in prompt.messages] for prompt in prompts]
    return Dataset.from_list([{"prompt": plain[i], "uuid": prompts[i].uuid} for i in plan.order])


def _encoder(chat) -> Callable:
    """messages -> ids, computed once for all responses to a prompt."""
    encode = lru_cache(maxsize=4096)(lambda messages: chat.encode_prompt(messages))
    return lambda messages: encode(tuple(messages))


# Rewards --------------------------------------------------------------------------------------------------------------


def reward_function(own, chat, prompts: Sequence[Prompt], live: Callable, gold: Callable | None = None) -> Callable:
    """trl's reward function: groups of sampled ids, as infer.py would record them, rewarded as by rewarding.py.
    `own`: the stage's flags; `gold`, which nothing is trained on, says which responses are right."""
    by_uuid = {prompt.uuid: prompt for prompt in prompts}
    special, n = frozenset(chat.special), own.gen_n
    how = Sampling(n, own.gen_temperature, 1.0, own.gen_max_tokens, stop_token_ids=chat.stop_ids, special=special)
    encode, seen = _encoder(chat), Counter()

    def reward(completion_ids: list[list[int]], uuid: list[str], log_metric: Callable, **_) -> list[float | None]:
        samples = []
        for start in range(0, len(uuid), n):
            prompt = by_uuid[uuid[start]]
            completions = [Completion.of(ids, None, how, chat.tokenizer) for ids in completion_ids[start : start + n]]
            samples.append(record_samples(chat, prompt, encode(prompt.messages), completions))
        records = live(samples)
        rewards = [value for record in records for value in record.reward]
        log_metric("unrewarded", rewards.count(None) / len(rewards))
        if gold:  # a response without an answer is wrong
            log_metric("gold", sum(record.reward.count(1.0) for record in gold(samples)) / len(rewards))
        if seen[None] == 0:  # no response has had a reward yet
            seen.update(why for record in records for why in record.reason or [None] * n)
            if seen[None] == 0 and seen.total() >= FIRST:
                raise UserError(
                    f"none of the first {seen.total()} responses has a reward ({seen.most_common(1)[0][0]}): nothing "
                    "would be trained; give another --reward, or correct its flags"
                )
        return [own.missing_reward if value is None else value for value in rewards]

    reward.__name__ = own.reward
    return reward


# trl ------------------------------------------------------------------------------------------------------------------


@contextmanager
def _trl(with_vllm: bool):
    """Within it trl is imported: without vLLM, which it would import for seconds wherever it is installed."""
    if not with_vllm and "vllm" not in sys.modules:
        sys.modules["vllm"] = None
    try:
        yield
    finally:
        if sys.modules.get("vllm", 0) is None:
            del sys.modules["vllm"]


def _trainer(job: Job, plan: Plan, chat, model, watch, settings: Callable, reward: Callable, rows):
    """trl's trainer with all that is ours. Raises UserError where a vLLM server does not answer."""
    from transformers import PrinterCallback

    from cream.training.rloo_trainer import OnlineTrainer

    keep = Keep(job, chat, model, watch, plan.steps)
    warmup, own = math.ceil(job.config.optimisation.warmup_step_ratio * plan.steps), job.stage.options
    logging.getLogger("trl").setLevel(logging.ERROR)  # it warns of responses without a reward, which are counted
    try:
        trainer = OnlineTrainer(
            encode=_encoder(chat),
            keep=keep,
            warmup=warmup,
            steps=plan.steps,
            optim=job.config.optimisation.optim,
            model=keep.for_sampling(),
            reward_funcs=reward,
            args=settings(),
            train_dataset=rows,
            processing_class=copy.deepcopy(chat.tokenizer),  # trl gives it a padding token
            callbacks=[watch],
            peft_config=_lora(job, model),
        )
    except ConnectionError as error:
        raise UserError(f"--vllm_url {own.vllm_url}: {error}") from None
    trainer.remove_callback(PrinterCallback)
    if trainer.accelerator.num_processes != (given_world() or 1):
        raise RuntimeError(f"accelerate sees {trainer.accelerator.num_processes} processes of {given_world() or 1}")
    if own.online_engine != "transformers":
        interrupts.listen()  # vLLM installs handlers of its own
    return trainer


def _run(trainer, resume: Path | None) -> None:
    """Train until the last step, or a signal. Raises UserError where nothing can be sampled any more."""
    try:
        with interrupts.deferred():
            trainer.train(resume_from_checkpoint=resume and str(resume))
    except RuntimeError as error:
        if "probability tensor contains" not in str(error):
            raise
        raise UserError("the policy's probabilities are not finite any more; a lower --lr may help") from None


def _settings(job: Job, plan: Plan, device: torch.device, autocast: bool, chat):
    """trl's settings, of our flags."""
    from trl import RLOOConfig

    config, o, own = job.config, job.config.optimisation, job.stage.options
    engine = {"use_vllm": own.online_engine != "transformers"}
    if engine["use_vllm"]:
        limit = length_limit(config.data.max_length, job.start)
        engine |= {"vllm_mode": own.online_engine.removeprefix("vllm_"), "vllm_server_base_url": own.vllm_url}
        engine |= {"vllm_gpu_memory_utilization": own.vllm_memory, "vllm_max_model_length": limit}
        engine |= {"generation_kwargs": {"stop_token_ids": list(chat.stop_ids)}}
    sharded_on_cpu = job.deepspeed is not None and device.type == "cpu"
    if job.deepspeed is not None:
        quiet_deepspeed()
    if sharded_on_cpu:  # where transformers takes DeepSpeed for one process
        with patch_environment(ACCELERATE_USE_DEEPSPEED="true"):
            PartialState(backend="gloo")
    return RLOOConfig(
        accelerator_config={"use_configured_state": sharded_on_cpu},
        ddp_find_unused_parameters=False,
        output_dir=str(job.run / "state"),
        per_device_train_batch_size=plan.rows,
        gradient_accumulation_steps=plan.passes,
        num_train_epochs=1,  # of a list that has all epochs
        shuffle_dataset=False,
        num_generations=own.gen_n,
        max_completion_length=own.gen_max_tokens,
        temperature=own.gen_temperature,
        beta=job.stage.kl_coef,
        epsilon=own.clip_low,
        epsilon_high=own.clip_high,
        learning_rate=o.lr,
        weight_decay=o.weight_decay,
        max_grad_norm=o.max_grad_norm,
        gradient_checkpointing=o.grad_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        disable_dropout=True,  # else it is on while trl samples, and in both sides of the ratio
        bf16=autocast or job.deepspeed is not None and device.type == "cuda",
        deepspeed=_deepspeed(job),
        use_cpu=device.type == "cpu" and job.deepspeed is None,
        seed=config.run.seed,
        save_strategy="no",  # Watch decides
        logging_strategy="no",
        logging_nan_inf_filter=False,
        report_to=config.output.trackers(),
        project=config.output.wandb_project_name,
        run_name=config.output.run_name or job.run.name,
        disable_tqdm=True,
        dataloader_pin_memory=device.type == "cuda",
        trust_remote_code=remote_code(),
        **engine,
    )


def _deepspeed(job: Job) -> dict | None:
    """DeepSpeed's settings, with what trl's fill in."""
    if job.deepspeed is None:
        return None
    auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "train_batch_size")
    return job.deepspeed | dict.fromkeys(auto, "auto") | {"bf16": {"enabled": "auto"}}


def _lora(job: Job, model):
    flags = job.config.lora
    if not flags.lora:
        return None
    if flags.lora_dropout:
        log.info("--lora_dropout does not apply: what samples and what is trained are to be the same policy")
    return lora_config(model, flags.lora_r, flags.lora_alpha, 0.0)
