#!/usr/bin/env bash
# trl 1.16.0: what DPOTrainer does with a pair that is longer than max_length (1024 by default). It says nothing of it.
# - A pair whose prompt alone has max_length tokens or more is dropped while the trainer is built. No number is printed:
#   len(trainer.train_dataset) is the only sign.
# - A response that does not fit is cut at its end, so that its end token is lost, and is trained on as if it were whole.
#   Prompts are never shortened, as max_prompt_length once did, and no response is dropped.
#
# Seen, max_length 8, three pairs: two are left; the chosen response of six tokens and <eos> keeps its first four.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
packages torch==2.13.0 transformers==5.19.0 trl==1.16.0 accelerate==1.15.0 datasets==5.2.0 numpy==2.3.5
"$python" - 2>/dev/null <<'PYTHON'
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = {word: i for i, word in enumerate(["<pad>", "<eos>", *"abcdefgh"])}
plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>")
config = LlamaConfig(vocab_size=10, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
pairs = Dataset.from_list(
    [
        {"prompt": "a b", "chosen": " c d", "rejected": " e"},
        {"prompt": "a b c d", "chosen": " e f g h a b", "rejected": " h"},
        {"prompt": "a b c d e f g h", "chosen": " a", "rejected": " b"},
    ]
)
settings = trl.DPOConfig(output_dir="run", per_device_train_batch_size=3, report_to=[], use_cpu=True, bf16=False,
                         max_length=8)
trainer = trl.DPOTrainer(model=LlamaForCausalLM(config), ref_model=LlamaForCausalLM(config), args=settings,
                         train_dataset=pairs, processing_class=tokenizer)
kept = len(trainer.train_dataset)
batch = trainer.data_collator([trainer.train_dataset[i] for i in range(kept)])
responses = [
    tokenizer.convert_ids_to_tokens(ids[mask.bool()].tolist())
    for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)
]
print(f"trl {trl.__version__}: {kept} of {len(pairs)} pairs are left; their chosen responses {responses[:kept]}")
assert kept == 2, "the pair with the long prompt is no longer dropped"
assert responses[:2] == [["c", "d", "<eos>"], ["e", "f", "g", "h"]]
PYTHON
