#!/usr/bin/env bash
# trl 1.16.0: a run of RLOOTrainer (GRPOTrainer has the same sampler) that resumes in its second epoch or later takes the
# prompts in the order of the first epoch, not of the epoch that it is in. Weights, optimiser and random state are those
# that were saved, so that nothing looks wrong: but some prompts are trained on twice in that epoch, others not at all.
# - The sampler's generator is seeded when the trainer is built, and gives each epoch the next permutation. A new trainer
#   begins again with the first one; transformers skips steps within an epoch, not the permutations before it.
# What keeps the order: one epoch over a list that has all epochs' prompts, with shuffle_dataset=False.
#
# Seen, 6 prompts, one a step, 2 epochs; stopped and resumed after step 9: the second epoch's last three prompts are the
# first epoch's last three. With the list of all epochs they are those of the undisturbed run.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
packages torch==2.13.0 transformers==5.19.0 trl==1.16.0 accelerate==1.15.0 datasets==5.2.0 numpy==2.3.5
"$python" - 2>/dev/null <<'PYTHON' | sed -n 's/^seen //p'
import random

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

PROMPTS, EPOCHS, STOP = list("abcdef"), 2, 9
words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "<eos>", *PROMPTS])}, unk_token="<pad>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
config = LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
torch.manual_seed(0)
LlamaForCausalLM(config).save_pretrained("model")


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        control.should_save = control.should_training_stop = state.global_step == STOP


def run(folder, rows, resume, callbacks, **how):
    """The prompt of each step."""
    seen = []

    def reward(prompts, **_):
        seen.append(prompts[0])
        return [random.random() for _ in prompts]

    settings = trl.RLOOConfig(folder, per_device_train_batch_size=2, num_generations=2, max_completion_length=2, beta=0.0,
                              report_to=[], use_cpu=True, bf16=False, save_strategy="no", gradient_checkpointing=False, **how)
    trainer = trl.RLOOTrainer(LlamaForCausalLM.from_pretrained("model"), reward, settings, Dataset.from_list(rows),
                              processing_class=tokenizer, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return seen


def both(name, rows, **how):
    """An undisturbed run, and one that was stopped and resumed."""
    whole = run(f"{name}-whole", rows, None, [], **how)
    first = run(f"{name}-cut", rows, None, [Stop()], **how)
    return whole, first + run(f"{name}-cut", rows, True, [], **how)


def epochs(seen):
    return "".join(seen[:6]), "".join(seen[6:])


whole, cut = both("usual", [{"prompt": prompt} for prompt in PROMPTS], num_train_epochs=EPOCHS)
order = [prompt for epoch in range(EPOCHS) for prompt in random.Random(epoch).sample(PROMPTS, len(PROMPTS))]
listed = both("listed", [{"prompt": prompt} for prompt in order], num_train_epochs=1, shuffle_dataset=False)
print(f"seen trl {trl.__version__}, transformers {transformers.__version__}: epochs of the undisturbed run {epochs(whole)}, "
      f"of the run that resumed after step {STOP} {epochs(cut)}; with a list of all epochs {[*map(epochs, listed)]}")
assert cut[:STOP] == whole[:STOP] and cut[STOP:] != whole[STOP:], "a resumed run keeps the epoch's order now"
assert cut[STOP:] == whole[STOP - 6 : 6], "it has another order than the first epoch's"
assert len({*cut[6:]}) < 6 == len({*whole[6:]})
assert listed[0] == listed[1] == order
PYTHON
[[ ${PIPESTATUS[0]} == 0 ]]
