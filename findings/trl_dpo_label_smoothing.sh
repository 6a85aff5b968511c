#!/usr/bin/env bash
# trl 1.16.0: DPOConfig(label_smoothing=…) does nothing for loss_type "sigmoid", the default loss, and nothing says so.
# Conservative DPO, which that setting was, is to be had by another loss ("robust" uses the value, unbiased; "aot" too).
#
# Seen, one batch of a small random model: sigmoid 3.047 with smoothing 0 and with 0.3; robust with 0.3: 5.296.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
packages torch==2.13.0 transformers==5.19.0 trl==1.16.0 accelerate==1.15.0 datasets==5.2.0 numpy==2.3.5
"$python" - 2>/dev/null <<'PYTHON'
import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = {word: i for i, word in enumerate(["<pad>", "<eos>", "a", "b", "c", "d"])}
plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
plain.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>")
pairs = Dataset.from_list([{"prompt": "a b", "chosen": " c", "rejected": " d"}] * 2)
config = LlamaConfig(vocab_size=6, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                     initializer_range=1.0)


def model(seed):
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def loss(name, smoothing):
    settings = trl.DPOConfig(output_dir="run", per_device_train_batch_size=2, report_to=[], use_cpu=True, bf16=False,
                             beta=1.0, disable_dropout=True, loss_type=[name], label_smoothing=smoothing)
    trainer = trl.DPOTrainer(model=model(0), ref_model=model(1), args=settings, train_dataset=pairs,
                             processing_class=tokenizer)
    return trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader()))).item()


without, smoothed, robust = loss("sigmoid", 0.0), loss("sigmoid", 0.3), loss("robust", 0.3)
print(f"trl {trl.__version__}: sigmoid {without:.4f}, sigmoid with smoothing 0.3 {smoothed:.4f}, robust {robust:.4f}")
assert robust != without, "the value reaches no loss at all"
assert smoothed == without, "label_smoothing is used by the sigmoid loss now"
PYTHON
