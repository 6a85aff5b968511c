"""DPO: one epoch of our training loop against trl's DPOTrainer, at its defaults and at its best settings.

All train the same pairs from the same weights in the same batches under bfloat16 autocast (trl's default; --bf16 no:
float32 on all sides). The reference is known beforehand to us and to trl's best settings; trl's defaults compute it.

    python benchmarks/dpo_step.py                          # prompt 120 / answer 150, and 300/150
    python benchmarks/dpo_step.py --work 120/150 --sizes 8,16,32
"""

import tempfile
import time
from pathlib import Path

import torch
from measure import autocast, interleaved, machine, ratio, side, trees, used_memory
from peers import DPO_BEST, LR, TRL, preference_rows
from workload import SHAPES, flags, groups, lengths, parse, run, save_model

from cream.model.hardware import matrix_rate
from cream.model.load import load_policy, load_with_head
from cream.model.logprobs import LogProbs
from cream.model.reward_head import Heads
from cream.training.loop import common_budget, train
from cream.training.options import Optimisation
from cream.training.parallel import Replicas
from cream.training.stages import dpo

BATCH = 8  # pairs a step, trl's default


class Ours:
    """An epoch by cream.training.loop; calling it returns the seconds from the first step to the last.

    `loaded` is the bytes in use when it began.
    """

    def __init__(
        self,
        folder: Path,
        stage,
        examples,
        batch: int,
        bf16: bool,
        device: str,
        max_tokens: int | None,
        optim: str = "adamw",
    ):
        where = torch.float32, torch.device(device)
        if stage.model == "heads":
            self.model = Heads(load_with_head(folder, stage.head, *where))
        else:
            self.model = LogProbs(load_policy(folder, *where))
        self.stage, self.examples, self.bf16, self.device = stage, examples, bf16, device
        how = {"train_bsz": batch, "max_tokens_per_batch": max_tokens, "optim": optim}
        self.flags = Optimisation(**how, lr=LR, log_every=1000)
        self.loaded = 0

    def __call__(self) -> float:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)  # it keeps one precision for the whole process
        accelerator = Accelerator(cpu=self.device == "cpu", mixed_precision="bf16" if self.bf16 else "no")
        ended = []
        self.loaded = used_memory(self.device)
        with tempfile.TemporaryDirectory() as run_folder:
            start = time.perf_counter()
            weights = Replicas(accelerator, self.model, LR, self.flags.weight_decay, self.flags.optim)
            tokens = common_budget(accelerator, weights, self.flags.max_tokens_per_batch, self.flags.moment_bytes)
            save = lambda step: ended.append(time.perf_counter())  # noqa: E731
            train(accelerator, weights, self.stage, self.examples, self.flags, 0, tokens, Path(run_folder), save)
        return ended[0] - start


def training_flags(doc: str, work: str, size: int):
    """The flags of a benchmark of training; `work` and `size` are its defaults."""
    parser = flags(doc, work, size)
    parser.add("--bf16", "auto", "autocast of all sides; auto: where the device has it", choices=("auto", "yes", "no"))
    parser.add("--max_tokens_per_batch", None, "of ours, where given; otherwise as train.py's", type=int)
    return parser


def main() -> None:
    args = parse(training_flags(__doc__, "120/150,300/150", 16))
    shape, device = SHAPES[args.shape], torch.device(args.device)
    bf16 = autocast(args.bf16, device)
    rate = matrix_rate(device, torch.bfloat16 if bf16 else torch.float32, 2048)
    print(machine())
    lines = []
    with tempfile.TemporaryDirectory() as name:
        folder = save_model(Path(name), shape, args.words, args.seed)
        for work in args.work:
            for size in args.sizes:
                made = groups(lengths(work, size, 2, args.spread, args.seed), args.words, args.seed)
                pairs = [(chosen, rejected) for chosen, rejected in made]
                examples = [dpo.Example(chosen, rejected, 1.0, (0.0, 0.0)) for chosen, rejected in pairs]
                stage = dpo.Stage(dpo.Options(), {})  # the reference is not a model's: its values cost nothing
                rows, common = preference_rows(pairs), {"max_length": 4096, "bf16": bf16}
                sides = {
                    "trl, defaults": TRL(folder, args.words, args.device, rows, "DPO", **common),
                    "trl, best settings": TRL(folder, args.words, args.device, rows, "DPO", **DPO_BEST | common),
                    "ours": Ours(folder, stage, examples, BATCH, bf16, args.device, args.max_tokens_per_batch),
                }
                print(f"\n{work}: {size} pairs, steps of {BATCH}, {'bfloat16 autocast' if bf16 else 'float32'}")
                seconds = interleaved(sides, args.rounds)
                counted = {
                    # forward, backward, recomputed forward (trl's head always does), reference forward
                    "trl, defaults": sides["trl, defaults"].layout.operations(shape, args.words, 5),
                    "trl, best settings": sides["trl, best settings"].layout.operations(shape, args.words, 3, head=4),
                    "ours": trees(made).operations(shape, args.words, 3),
                }
                for which in sides:
                    side(which, seconds[which], counted[which], rate)
                suffix = "" if work == "120/150" else "_" + work.replace("/", "_")
                for peer, short in (("trl, defaults", "default"), ("trl, best settings", "best")):
                    ceiling = counted[peer] / counted["ours"]
                    lines += ratio(f"dpo{suffix}_vs_trl_{short}", seconds[peer], seconds["ours"], ceiling)
    print("", *lines, sep="\n")


if __name__ == "__main__":
    run(main)
