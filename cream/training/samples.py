"""Responses to fixed prompts while training, at every saved checkpoint: what the policy says, beside what it loses.

They are sampled by the weights in memory, with noise that is hashed from (seed, uuid, index), so that training draws
the same random numbers with and without them.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from cream.cli.flags import flag
from cream.errors import UserError
from cream.files.raw import with_filename
from cream.records import Conversation, Prompt, nouns
from cream.text.chat import Chat

log = logging.getLogger("cream")
FILE = "samples.jsonl"  # in the run's folder
BATCH_TOKENS = 16_384  # rows x tokens of the key-value cache


@dataclass
class SampleFlags:
    """Samples while training"""

    sample_prompts: str | None = flag(
        None,
        "prompts, as --name has the data: responses to the first --sample_limit of them, at every saved checkpoint, go "
        "to samples.jsonl in the run's folder, and to --report_to; of policies only",
        decides=False,
    )
    sample_n: int = flag(1, "responses per prompt (temperature 0.8, top-p 0.95)", low=1, decides=False)
    sample_limit: int = flag(8, "number of prompts", low=1, decides=False)
    sample_max_tokens: int = flag(256, "limit on tokens per response", low=1, decides=False)

    def check(self, model: str, zero_stage: int) -> None:
        """Raises UserError where no samples can be had: of a reward model, or of weights in shards (ZeRO-3)."""
        given = [
            name
            for name in ("sample_n", "sample_limit", "sample_max_tokens")
            if getattr(self, name) != getattr(type(self), name)
        ]
        if self.sample_prompts is None:
            if given:
                raise UserError(f"--{given[0]} needs --sample_prompts")
        elif model != "logprobs":
            raise UserError("--sample_prompts: a reward model writes no responses; omit it")
        elif zero_stage == 3:
            raise UserError("--sample_prompts: no process has the whole weights with ZeRO-3; take ZeRO-2, or omit it")


def read_sample_prompts(path: Path, limit: int) -> list[Prompt]:
    """The first prompts of a file; of conversations what comes before their last response. Raises UserError where
    there is none."""
    from cream.files import store
    from cream.scoring.sampling import read_prompts

    kind = store.detect(path)
    if kind not in (Prompt, Conversation):
        raise UserError(f"--sample_prompts {path} holds {nouns(kind)}; expected prompts or conversations")
    if not (prompts := [*islice(read_prompts(path, kind, limit), limit)]):
        raise UserError(f"--sample_prompts {path}: there is no prompt")
    return prompts


class Samples:
    """The responses of a run; `write` adds those of a checkpoint."""

    def __init__(
        self, flags: SampleFlags, prompts: Sequence[Prompt], chat: Chat, run: Path, seed: int, max_length: int
    ):
        from cream.engines import Sampling

        self.chat, self.prompts, self.path, self.max_length = chat, prompts, run / FILE, max_length
        self.sampling = Sampling(
            *(flags.sample_n, 0.8, 0.95, flags.sample_max_tokens, seed, chat.stop_ids),
            special=frozenset(chat.special),
            logprobs=False,
        )

    def keep_until(self, step: int) -> None:
        """Forget what was sampled after this step, from which training resumes."""
        from cream.files.raw import atomic
        from cream.training.log import lines_until

        if self.path.exists():
            kept = lines_until(step, self.path.read_bytes())
            with atomic(self.path) as file:
                file.write(kept)

    def write(self, accelerator, model, step: int) -> None:
        """Sample by `model`, transformers' own; called by the first process alone."""
        rows = [{"step": step, **row} for row in self._sample(accelerator, model)]
        with with_filename(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        texts = {f"samples/{row['uuid']}": "\n\n---\n\n".join(row["responses"]) for row in rows}
        for tracker in accelerator.trackers:
            tracker.log(texts, step=step)
        log.info("sampled %d responses of %d prompts: %s", len(rows) * self.sampling.n, len(rows), self.path)

    def _sample(self, accelerator, model) -> list[dict]:
        import torch

        from cream.engines.hf import HfEngine
        from cream.scoring.completions import Responder

        training = model.training
        engine = HfEngine(model.eval(), self.chat.tokenizer, self.max_length, BATCH_TOKENS)
        respond, found = Responder(engine, self.chat, self.sampling, self.max_length - 1, skip_refused=True), {}
        try:
            with torch.random.fork_rng(), torch.compiler.set_stance("force_eager"), accelerator.autocast():
                for uuid, (_, _, completions) in respond(self.prompts):
                    found[uuid] = completions
        finally:
            respond.close()
            model.train(training)
        return [
            {
                "uuid": prompt.uuid,
                "prompt": [{"role": message.role, "content": message.content} for message in prompt.messages],
                "responses": [completion.text for completion in found[prompt.uuid]],
                "finish_reason": [completion.finish_reason for completion in found[prompt.uuid]],
                "num_tokens": [len(completion.token_ids) for completion in found[prompt.uuid]],
            }
            for prompt in self.prompts
            if found.get(prompt.uuid)
        ]
