#!/usr/bin/env bash
# trl 1.16.0: RewardTrainer trains a reward model on other texts than GRPOTrainer and RLOOTrainer then ask it about.
# - Plain text: RewardTrainer appends the end token to both responses (and the tokenizer its start token), so that the
#   score is read at the end token. The two policy trainers decode the response without special tokens and encode prompt
#   and response without any: the score is read at the last word, where the head was never trained.
# - Conversations: the chat template writes its end of turn behind every response, the truncated ones included.
# In neither case does the reward model see whether a response ended. The trainers warn of neither.
#
# Seen, small random models, eight responses of which some end by themselves and some are truncated: trained on texts with
# <bos> and <eos>; of the plain texts to be scored none has either; of the conversations all end in <eos>.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
packages torch==2.13.0 transformers==5.19.0 trl==1.16.0 accelerate==1.15.0 datasets==5.2.0 numpy==2.3.5
"$python" - 2>/dev/null <<'PYTHON' | sed -n 's/^seen //p'
import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

words = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", *"abcd"])}
plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
plain.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
tokenizer.chat_template = "{% for each in messages %}{{ each.content }} {{ eos_token }} {% endfor %}"
sizes = {"vocab_size": 7, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
settings = {"output_dir": "run", "report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no", "max_steps": 1,
            "per_device_train_batch_size": 8, "gradient_checkpointing": False, "disable_tqdm": True}
torch.manual_seed(0)
reward = LlamaForSequenceClassification(LlamaConfig(**sizes, num_labels=1, name_or_path="reward"))
policy = LlamaForCausalLM(LlamaConfig(**sizes, name_or_path="policy"))
texts, responses = [], []  # what the reward model reads, and what the policy wrote, as tokens


def read(model, args, inputs):
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        texts.append(tokenizer.convert_ids_to_tokens(ids[mask.bool()].tolist()))


def note(completion_ids, **_):
    responses.extend(tokenizer.convert_ids_to_tokens(ids) for ids in completion_ids)
    return [0.0] * len(completion_ids)


def score(method, prompt):
    """The texts that the reward model reads in one step of a trainer, and what the policy wrote for them."""
    texts.clear(), responses.clear()
    args = getattr(trl, f"{method}Config")(
        **settings, num_generations=8, max_completion_length=4, beta=0.0, seed=0,
        generation_kwargs={"suppress_tokens": [0, 1]},
    )
    trainer = getattr(trl, f"{method}Trainer")
    trainer(model=policy, reward_funcs=[reward, note], args=args, train_dataset=Dataset.from_list([{"prompt": prompt}]),
            processing_class=tokenizer, reward_processing_classes=[tokenizer, None]).train()
    return texts[:], responses[:]


reward.register_forward_pre_hook(read, with_kwargs=True)
pairs = Dataset.from_list([{"prompt": "a b ", "chosen": "c d", "rejected": "d"}])
trl.RewardTrainer(model=reward, args=trl.RewardConfig(**settings), train_dataset=pairs, processing_class=tokenizer).train()
print(f"seen trl {trl.__version__}: RewardTrainer trains on {texts}")
assert all(text[0] == "<bos>" and text[-1] == "<eos>" for text in texts)
for method in ("GRPO", "RLOO"):
    for kind, prompt in (("plain", "a b "), ("chat", [{"role": "user", "content": "a b"}])):
        scored, written = score(method, prompt)
        ends = [response[-1] == "<eos>" for response in written]
        ended, truncated = ends.index(True), ends.index(False)  # one of each
        print(f"seen {method}, {kind}: {written[ended]} is scored as {scored[ended]},")
        print(f"seen   and the truncated {written[truncated]} as {scored[truncated]}")
        assert len(written) == len(scored) == 8
        if kind == "plain":
            assert not any({"<bos>", "<eos>"} & set(text) for text in scored), "special tokens reach the reward model"
        else:
            assert all(text[-1] == "<eos>" for text in scored), "truncated responses are shown as such"
PYTHON
