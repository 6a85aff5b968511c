#!/usr/bin/env bash
# trl 1.16.0, SFTTrainer: which tokens are trained on, in two cases where one would guess otherwise.
# - Rows of token ids that bring a completion_mask: the column is dropped without a word, and prompts are trained on,
#   unless completion_only_loss=True is given. (Without the setting, rows of prompt and completion train on completions
#   alone.)
# - Rows of plain text where a token merges the end of the prompt with the start of the completion: the merged token, with
#   the prompt's characters in it, is trained on, after a context that ends before it. A mask of len(tokenize(prompt))
#   zeros, as earlier versions had it, would not train it. A warning is logged once, whatever the number of such rows.
#
# Seen: labels of a row whose mask is 0 0 0 1 1: all five by default, the last two with the setting. Prompt "ca",
# completion "bc", a tokenizer that merges "ab": c is masked, "ab" and "c" are trained on.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
packages torch==2.13.0 transformers==5.19.0 trl==1.16.0 accelerate==1.15.0 datasets==5.2.0 numpy==2.3.5
"$python" - 2>/dev/null <<'PYTHON'
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = {word: i for i, word in enumerate(["<pad>", "<eos>", "a", "b", "c", "ab"])}
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.BPE(words, [("a", "b")])), pad_token="<pad>", eos_token="<eos>"
)
config = LlamaConfig(vocab_size=6, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)


def trained(row, **settings):
    """The tokens of a row that contribute to the loss."""
    args = trl.SFTConfig(output_dir="run", report_to=[], use_cpu=True, bf16=False, **settings)
    trainer = trl.SFTTrainer(model=LlamaForCausalLM(config), args=args, train_dataset=Dataset.from_list([row]),
                             processing_class=tokenizer)
    return tokenizer.convert_ids_to_tokens([label for label in trainer.train_dataset[0]["labels"] if label != -100])


ids = {"input_ids": tokenizer("aabcb").input_ids + [1], "completion_mask": [0, 0, 0, 1, 1]}
default, asked = trained(ids), trained(ids, completion_only_loss=True)
merged = trained({"prompt": "ca", "completion": "bc"})
print(f"trl {trl.__version__}: mask 0 0 0 1 1: by default {default}, asked for {asked}; across the boundary {merged}")
assert default == ["a", "ab", "c", "b", "<eos>"], "the mask is used by default"
assert asked == ["b", "<eos>"]
assert merged == ["ab", "c", "<eos>"], "the merged token is not trained on"
PYTHON
