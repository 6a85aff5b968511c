#!/usr/bin/env bash
# trl 1.16.0, RewardTrainer: the metrics of an evaluation, all but eval_loss, are means over batches, each batch with the
# same weight. Hence they depend on per_device_eval_batch_size, on the order of the pairs, and, where the last batch is
# smaller, on chance: a pair that is alone in it counts as much as a whole batch of others.
# - eval_accuracy is not the share of pairs ranked right, and eval_margin, which can even change its sign, is not their
#   mean difference. eval_loss is weighted by pairs: the two disagree on one evaluation.
# - eval_min_reward and eval_max_reward are no extremes, but the mean of the batches' extremes.
# With a batch that holds all pairs, or of one pair, accuracy and margin are those of the pairs.
#
# Seen, five pairs of which the last is ranked wrong, the same scores each time: with batches of 1, 2, 4 and 5 the accuracy
# is 0.8, 0.667, 0.5 and 0.8, the margin 5.1, 1.3, -3.3 and 5.1, the least reward -5.5, -6.2, -7.5 and -7.5, the loss equal.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
packages torch==2.13.0 transformers==5.19.0 trl==1.16.0 accelerate==1.15.0 datasets==5.2.0 numpy==2.3.5
"$python" - 2>/dev/null <<'PYTHON'
import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

words = {word: i for i, word in enumerate(["<pad>", "<eos>", *"abcdefgh"])}
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")),
                                    pad_token="<pad>", eos_token="<eos>")
config = LlamaConfig(vocab_size=10, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                     num_labels=1, pad_token_id=0, initializer_range=1.0)
torch.manual_seed(0)
model = LlamaForSequenceClassification(config).eval()
with torch.no_grad():
    score = {token: model(torch.tensor([[token]])).logits.item() for token in range(2, 10)}
ranked = sorted(score, key=score.get)
right = [{"chosen_ids": [better], "rejected_ids": [worse]} for worse, better in zip(ranked[:4], ranked[4:], strict=True)]
pairs = Dataset.from_list([*right, {"chosen_ids": [ranked[0]], "rejected_ids": [ranked[-1]]}])
least = score[ranked[0]]


def evaluation(size):
    settings = trl.RewardConfig(output_dir="run", per_device_eval_batch_size=size, report_to=[], use_cpu=True, bf16=False)
    trainer = trl.RewardTrainer(model=model, args=settings, train_dataset=pairs, eval_dataset=pairs,
                                processing_class=tokenizer)
    metrics = trainer.evaluate()
    return {name: round(metrics[f"eval_{name}"], 3) for name in ("accuracy", "margin", "min_reward", "loss")}


seen = {size: evaluation(size) for size in (1, 2, 4, 5)}
print(f"trl {trl.__version__}, four of five pairs ranked right, least reward {least:.3f}; by size of the batch:")
for size, metrics in seen.items():
    print(size, metrics)
assert [seen[size]["accuracy"] for size in seen] == [0.8, 0.667, 0.5, 0.8], "the accuracy is weighted by pairs now"
assert seen[4]["margin"] < 0 < seen[5]["margin"], "the margin is weighted by pairs now"
assert seen[1]["min_reward"] > seen[5]["min_reward"] + 1, "the least reward is the least one now"
assert len({metrics["loss"] for metrics in seen.values()}) == 1, "the loss depends on the batches too"
PYTHON
