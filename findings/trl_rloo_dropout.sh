#!/usr/bin/env bash
# trl 1.16.0: RLOOTrainer leaves the model in training mode for everything: dropout is on while it samples, in the
# log-probabilities of the samples (with other masks), and in those that are trained (with others again). disable_dropout
# is False by default. So the ratio of a response, which is 1 before the first update, is anything: at GPT-2's own dropout
# of 0.1 half of the responses are beyond the clip of 0.2 in the first step, at a learning rate of 1e-9, and the loss is
# noise. Models without dropout (Llama, Qwen) do not show it, adapters with lora_dropout do.
# What helps: disable_dropout=True.
#
# Seen, a small GPT-2, first step: clip_ratio/region_mean 0.5 and a loss far from 0; with disable_dropout=True 0 and 0.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
packages torch==2.13.0 transformers==5.19.0 trl==1.16.0 accelerate==1.15.0 datasets==5.2.0 numpy==2.3.5
"$python" - 2>/dev/null <<'PYTHON' | sed -n 's/^seen //p'
import random

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2, "b": 3, "c": 4}, unk_token="<pad>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
config = GPT2Config(vocab_size=5, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3, eos_token_id=1,
                    bos_token_id=1)


def first_step(disable_dropout):
    """The modes that the model was called in, and the metrics of the first step."""
    random.seed(0)
    torch.manual_seed(0)
    model, modes = GPT2LMHeadModel(config), set()
    model.register_forward_pre_hook(lambda model, _: modes.add(model.training))
    settings = trl.RLOOConfig("run", per_device_train_batch_size=8, num_generations=8, max_completion_length=20, beta=0.0,
                              learning_rate=1e-9, max_steps=1, logging_steps=1, disable_dropout=disable_dropout,
                              report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no")
    trainer = trl.RLOOTrainer(model, lambda prompts, **_: [random.random() for _ in prompts], settings,
                              Dataset.from_list([{"prompt": "a b"}] * 4), processing_class=tokenizer)
    trainer.train()
    return modes, trainer.state.log_history[0]


print(f"seen trl {trl.__version__}, transformers {transformers.__version__}, dropout {config.resid_pdrop}")
found = {off: first_step(off) for off in (False, True)}
for off, (modes, step) in found.items():
    print(f"seen disable_dropout={off}: in training mode {modes}, share of ratios beyond the clip "
          f"{step['clip_ratio/region_mean']:.3f}, loss {step['loss']:.3g}")
(modes, usual), (_, without) = found[False], found[True]
assert modes == {True}, "it samples in evaluation mode now"
assert usual["clip_ratio/region_mean"] > 0.2 and abs(usual["loss"]) > 0.01, "the first ratio is 1 now"
assert without["clip_ratio/region_mean"] == 0 and abs(without["loss"]) < 1e-6
PYTHON
[[ ${PIPESTATUS[0]} == 0 ]]
