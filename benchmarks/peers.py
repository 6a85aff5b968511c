"""The peers, on token rows: CREAM's released procedure, rewritten, trl's trainers, and transformers' reward models.

The released procedure (Raibows/CREAM at de1d04b) scores answers one by one, sorted by their length, in left-padded
batches of 6 with a two-dimensional mask, takes logits over the whole vocabulary at every position and gathers from
their log-softmax; DPO runs in the same way on 4 pairs at a time, after a reference pass. Omitted here, to
its advantage: the labels that it passes to the model (which computes a loss nobody uses) and the key-value cache.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import Layout, documents, rectangle, used_memory

from cream.errors import UserError
from cream.text.chat import Tokens

SCORED, TRAINED = 6, 4  # rows, and pairs, of a batch
PAD = 0
SPECIAL = {PAD: "<pad>", 2: "<eos>"}
LR = 0.0  # the optimiser does all its work and the weights stay, so that every round does the same

Pairs = Sequence[tuple[Tokens, Tokens]]  # chosen, rejected


# The released procedure -----------------------------------------------------------------------------------------------


def released_batches(groups: Sequence[Sequence[Tokens]]) -> list[list[Tokens]]:
    """All answers, sorted by length of the answer alone (as characters there), six at a time."""
    rows = sorted((row for group in groups for row in group), key=lambda row: row.num_response_tokens)
    return [rows[start : start + SCORED] for start in range(0, len(rows), SCORED)]


def released_layout(batches: Sequence[Sequence[Tokens]]) -> Layout:
    """What the batches lay out: their rectangles."""
    return sum((rectangle(len(rows), max(map(len, rows))) for rows in batches), Layout())


def released_logprobs(model, rows: Sequence[Tokens], autocast: bool = False) -> torch.Tensor:
    """Summed log π of each row's answer, (B,) float32."""
    width = max(map(len, rows))
    ids, mask, answer = torch.zeros(3, len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row.ids)
        mask[i, width - len(row) :] = 1
        answer[i, width - row.num_response_tokens :] = 1
    ids, mask, answer = (x.to(model.device) for x in (ids, mask, answer))
    with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    found = logits[:, :-1].float().log_softmax(2).gather(2, ids[:, 1:, None]).squeeze(2)
    return (found * answer[:, 1:]).sum(1)


@torch.no_grad()
def released_score(model, batches: Sequence[Sequence[Tokens]]) -> torch.Tensor:
    """One pass of one model over all answers."""
    return torch.cat([released_logprobs(model, rows) for rows in batches])


def released_dpo(model, reference, pairs: Pairs, batch: int, beta: float = 0.1) -> None:
    """The reference pass over all pairs, then one epoch in steps of `batch` pairs, accumulated over 4 at a time."""
    autocast = model.device.type == "cuda"
    chunks = [pairs[start : start + TRAINED] for start in range(0, len(pairs), TRAINED)]
    rows = [[*(c for c, _ in chunk), *(r for _, r in chunk)] for chunk in chunks]
    with torch.no_grad():
        known = [released_logprobs(reference, row, autocast) for row in rows]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01)
    for number, (row, ref) in enumerate(zip(rows, known, strict=True), 1):
        chosen, rejected = (released_logprobs(model, row, autocast) - ref).chunk(2)
        (-F.logsigmoid(beta * (chosen - rejected)).sum() / min(batch, len(pairs))).backward()
        if number * TRAINED % batch == 0 or number == len(rows):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


# trl ------------------------------------------------------------------------------------------------------------------

# The fastest of those tried: one pair at a time has no padding; 8 of them are a step, as by default.
DPO_BEST = {
    "precompute_ref_log_probs": True,
    "gradient_checkpointing": False,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
}
# Of the two that were fastest the benchmarks take the faster. A batch of one has no padding and needs no mask; packed
# rows need a dense one, which keeps their conversations apart (transformers makes it of the positions). Without
# completion_only_loss trl takes no notice of the rows' completion_mask.
REWARD_BEST = {"gradient_checkpointing": False, "max_length": 4096}
SFT_BEST = {"gradient_checkpointing": False, "per_device_train_batch_size": 1, "completion_only_loss": True}


class TRL:
    """One epoch of a trl trainer on the model in `folder`; calling it trains from scratch and returns the seconds.

    From its start of training to its end: its data preparation and, where its settings have one, its precomputed
    reference pass are not counted. `layout` is what its last run laid out, by the shapes of its batches; `loaded` the
    bytes in use when it began. Raises UserError where it did not train on every response token: what exceeds its
    `max_length` it drops or cuts (a pair whose prompt does, a response's end), without a count.
    """

    def __init__(self, folder: Path, words: int, device: str, rows: list[dict], kind: str, **settings):
        self.folder, self.words, self.device, self.rows, self.kind = folder, words, device, rows, kind
        self.settings = settings
        self.layout, self.loaded = Layout(), 0
        self.trained = torch.zeros((), dtype=torch.int64)  # response tokens of the last run's batches

    def __call__(self) -> float:
        import datasets
        import trl
        from accelerate.state import AcceleratorState
        from transformers import PrinterCallback, TrainerCallback

        datasets.disable_progress_bars()
        AcceleratorState._reset_state(reset_partial_state=True)  # it keeps one precision for the whole process
        clock = []

        class Clock(TrainerCallback):
            def on_train_begin(_, *args, **more):
                self.layout, self.loaded = Layout(), used_memory(self.device)
                self.trained.zero_()
                clock.append(time.perf_counter())

            def on_train_end(_, *args, **more):
                if self.device == "cuda":
                    torch.cuda.synchronize()
                clock.append(time.perf_counter())

        config, trainer = getattr(trl, f"{self.kind}Config"), getattr(trl, f"{self.kind}Trainer")
        with tempfile.TemporaryDirectory() as run:
            fixed = {"output_dir": run, "use_cpu": self.device == "cpu", "num_train_epochs": 1, "learning_rate": LR}
            quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1000}
            made = self._trainer(trainer)(
                self._model(),
                args=config(**fixed | quiet | self.settings),
                train_dataset=datasets.Dataset.from_list(self.rows),
                processing_class=number_tokenizer(self.words),
                callbacks=[Clock()],
            )
            made.remove_callback(PrinterCallback)
            made.data_collator = self._watched(made.data_collator)
            made.train()
        if int(self.trained) != (wanted := self._wanted()):
            raise UserError(
                f"trl trained on {int(self.trained)} of {wanted} response tokens: it drops and cuts what is longer "
                f"than max_length, here {made.args.max_length}, so that the sides do not do the same; take shorter rows"
            )
        return clock[1] - clock[0]

    def _trainer(self, kind: type) -> Callable:
        return kind

    def _wanted(self) -> int:
        """How many response tokens are to be trained on."""
        return sum(map(response_tokens, self.rows))

    def _model(self):
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        if self.kind == "Reward":
            made = AutoModelForSequenceClassification.from_pretrained(self.folder, num_labels=1, dtype=torch.float32)
            made.config.pad_token_id = PAD
            return made
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)

    def _watched(self, collate: Callable) -> Callable:
        def watched(rows):
            batch = collate(rows)
            if self.kind == "Reward":  # every token counts, and the head is read once a row
                self.trained += batch["attention_mask"].sum()
                self.layout += rectangle(*batch["input_ids"].shape, len(batch["input_ids"]))
                return batch
            trained = (batch["completion_mask"] if "completion_mask" in batch else batch["labels"] != -100).sum()
            self.trained += trained
            head = int(trained) if self.device == "cuda" else None  # of trl's fused head; on a CPU every position
            if "position_ids" in batch:
                self.layout += documents(batch["position_ids"], head)
            else:
                self.layout += rectangle(*batch["input_ids"].shape, head)
            return batch

        return watched


class TRLGroups(TRL):
    """RLOOTrainer on given groups of responses, with given advantages and log-probabilities of the behaviour policy, a
    list of each per group: its update alone. Sampling, scoring and the pass for those log-probabilities are replaced by
    a look-up. The responses of `per_device_train_batch_size` x `steps_per_generation` are padded together."""

    def __init__(self, folder, words, device, groups, advantages, known, **settings):
        rows = [{"prompt": _text(group[0].ids[: group[0].spans[0][0]]), "number": i} for i, group in enumerate(groups)]
        super().__init__(folder, words, device, rows, "RLOO", **settings)
        self.groups, self.values = groups, [*zip(advantages, known, strict=True)]

    def _trainer(self, kind: type) -> Callable:
        class Given(kind):
            def _generate_and_score_completions(_, rows):
                return self._batch([row["number"] for row in rows])

        return lambda *args, **more: Given(*args, reward_funcs=lambda **_: [], **more)

    def _wanted(self) -> int:
        return sum(row.num_response_tokens for group in self.groups for row in group)

    def _watched(self, collate: Callable) -> Callable:
        return collate

    def _batch(self, numbers: list[int]) -> dict[str, torch.Tensor]:
        """Prompts padded on the left, responses on the right; a group's number comes once for each of its responses."""
        rows, values = [], []
        for number in dict.fromkeys(numbers):
            rows += self.groups[number]
            values += zip(*self.values[number], strict=True)
        prompts = [row.ids[: row.spans[0][0]] for row in rows]
        answers = [row.ids[row.spans[0][0] :] for row in rows]
        left, right = max(map(len, prompts)), max(map(len, answers))
        trained = sum(map(len, answers))
        self.trained += trained
        self.layout += rectangle(
            len(rows), left + right, trained if self.device == "cuda" else None
        )  # as in `_watched`
        advantages, known = zip(*values, strict=True)
        batch = {
            "prompt_ids": [[PAD] * (left - len(ids)) + ids for ids in prompts],
            "prompt_mask": [[0] * (left - len(ids)) + [1] * len(ids) for ids in prompts],
            "completion_ids": [ids + [PAD] * (right - len(ids)) for ids in answers],
            "completion_mask": [[1] * len(ids) + [0] * (right - len(ids)) for ids in answers],
            "advantages": advantages,
            "old_logps": known,
        }
        return {name: torch.tensor(value, device=self.device) for name, value in batch.items()}


def preference_rows(pairs: Pairs) -> list[dict]:
    """As trl reads them: text, which the tokenizer below turns into the very same ids."""
    return [
        {
            "prompt": _text(c.ids[: c.spans[0][0]]),
            "chosen": _text(c.ids[c.spans[0][0] :]),
            "rejected": _text(r.ids[r.spans[0][0] :]),
        }
        for c, r in pairs
    ]


def reward_rows(pairs: Pairs) -> list[dict]:
    """As trl's RewardTrainer reads them: token ids."""
    return [{"chosen_ids": chosen.ids, "rejected_ids": rejected.ids} for chosen, rejected in pairs]


def response_tokens(row: dict) -> int:
    """Of a row as trl reads it: how many tokens it is to be trained on."""
    if "chosen_ids" in row:
        return len(row["chosen_ids"]) + len(row["rejected_ids"])
    return sum(row["completion_mask"]) if "completion_mask" in row else len((row["chosen"] + row["rejected"]).split())


def _text(ids: Sequence[int]) -> str:
    return "".join(f" {SPECIAL.get(i, i)}" for i in ids)


def conversation_rows(conversations: Sequence[Tokens]) -> list[dict]:
    """Token ids, and which of them are trained on."""
    rows = []
    for row in conversations:
        mask = [0] * len(row)
        for t in row.predicted():
            mask[t] = 1
        rows.append({"input_ids": row.ids, "completion_mask": mask})
    return rows


def number_tokenizer(words: int):
    """A tokenizer whose words are the numbers below `words`, two of them under other names: special tokens are looked
    for inside words, too."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({str(SPECIAL.get(i, i)): i for i in range(words)}, unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[2], pad_token=SPECIAL[0])


# Reward models of transformers ----------------------------------------------------------------------------------------


def sorted_batches(groups: Sequence[Sequence[Tokens]], size: int) -> list[list[Tokens]]:
    """All rows, sorted by length, `size` at a time."""
    rows = sorted((row for group in groups for row in group), key=len)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


@torch.no_grad()
def padded_rewards(model, batches: Sequence[Sequence[Tokens]]) -> dict[int, float]:
    """id of a row -> its reward by transformers' sequence classification in right-padded batches."""
    rewards = {}
    for rows in batches:
        width = max(map(len, rows))
        ids = torch.tensor([row.ids + [PAD] * (width - len(row)) for row in rows]).to(model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]).to(model.device)
        values = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 0].float().tolist()
        rewards |= {id(row): value for row, value in zip(rows, values, strict=True)}
    return rewards
