"""The tiny world's base model: a tokenizer, a randomly initialised Llama, and its noisy training set."""

import random
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cream.records import Conversation
from cream.tiny.problems import base_problems, conversation, noisy_solution

CONTEXT = 2048
PAD, BOS, END, USER, ASSISTANT = SPECIALS = ("<pad>", "<bos>", "<end>", "<user>", "<assistant>")

# A word or a sign takes the space before it, and the space after it when a digit follows: so a digit is the same token
# everywhere.
PIECE = r" ?[A-Za-z]+(?: (?=[0-9]))?| ?[^A-Za-z0-9\s]+(?: (?=[0-9]))?|[0-9]|\s"

# <bos><user>question<end><assistant>answer<end>; a system message opens the first user turn.
CHAT_TEMPLATE = """\
{%- set system = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' -%}
{%- set turns = messages[1:] if system else messages -%}
{{- bos_token -}}
{%- for message in turns -%}
{%- if message.role not in ('user', 'assistant') -%}
{{- raise_exception('the ' ~ message.role ~ ' message must be the first one') -}}
{%- endif -%}
{{- '<' + message.role + '>' + (system if loop.first else '') + message.content + eos_token -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<assistant>' -}}{%- endif -%}
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny world's words and signs are single tokens, all other text UTF-8 bytes; decoding is exact.

    Vocabulary: the special tokens (`<end>` ends each turn and is EOS; pad is not used otherwise), 256 bytes (with the
    digits), about 70 words. Only the chat template adds special tokens.
    """
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECE), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    texts = (message.content for record in noisy_set(seed=0, count=6000) for message in record.messages)
    words = {piece for text in texts for piece, _ in splitter.pre_tokenize_str(text)}
    pieces = [*SPECIALS, *alphabet, *sorted(words - set(alphabet))]
    # Without merges, a piece that is not in the vocabulary is encoded as bytes.
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
        model_input_names=["input_ids", "attention_mask"],
    )


def write_init(folder: Path, seed: int) -> None:
    """A Hugging Face folder with the tokenizer and a randomly initialised float32 Llama of 0.6 M parameters.

    Heads of size 32, the smallest that vLLM's attention on CPU takes.
    """
    tokenizer = build_tokenizer()
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=320,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        dtype="float32",
        **ids,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def noisy_set(seed: int, count: int = 44_000) -> Iterator[Conversation]:
    """The base model's training set: problems with noisy solutions, disjoint from every world's questions."""
    rng = random.Random(f"noise-{seed}")
    for index, problem in enumerate(base_problems(seed, count)):
        yield conversation(problem, noisy_solution(problem, rng), "base", index)
