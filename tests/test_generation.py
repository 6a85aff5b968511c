"""From prompts to records of samples: what is asked, what is kept, and when a log-probability is that of the text."""

import itertools
from collections import Counter

import pytest
from msgspec import structs
from transformers import AutoTokenizer

from cream import engines
from cream.engines import Completion, Sampling
from cream.records import Message, Prompt, encode
from cream.rewards.passes import group
from cream.scoring import logprobs
from cream.scoring.completions import Responder
from cream.scoring.sampling import build_prompts, record_samples
from cream.text.chat import NOT_A_PREFIX, Chat
from cream.text.prompts import Sysprompt

LENGTHS = (3, 40, 7, 90, 12)  # words of the prompts


@pytest.fixture(scope="module")
def engine(tiny_folder, tiny_tokenizer):
    engine = engines.load("hf", tiny_folder, tiny_tokenizer, device="cpu", dtype="float32", max_model_len=128)
    yield engine
    engine.close()


@pytest.fixture
def prompts():
    words = [" ".join(["Tom has 28 books."] * 30)[: 4 * length].strip() for length in LENGTHS]
    return [Prompt(uuid=f"p{i}", messages=[Message("user", text)], extra={"i": i}) for i, text in enumerate(words)]


def answered(engine, chat, prompts, max_prompt=60):
    sampling = Sampling(n=8, temperature=1.0, top_p=1.0, max_tokens=3, stop_token_ids=chat.stop_ids)
    return dict(Responder(engine, chat, sampling, max_prompt)(iter(prompts)))


def as_sampled(chat, messages, text):
    """Ids of a rendered prompt and a response, tokenised in one piece."""
    plain = [{"role": m.role, "content": m.content} for m in messages]
    rendered = chat.tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    return chat.tokenizer(rendered + chat._lead + text, add_special_tokens=False)["input_ids"]


def test_every_prompt_comes_back_with_its_ids_and_answered_if_it_fits(engine, tiny_chat, prompts):
    found = answered(engine, tiny_chat, prompts)
    fitting = [p for p in prompts if len(tiny_chat.encode_prompt(p.messages)) <= 60]
    assert 0 < len(fitting) < len(prompts)
    assert sorted(found) == [p.uuid for p in prompts]
    for prompt in prompts:
        same, ids, answers = found[prompt.uuid]
        assert same is prompt and ids == tiny_chat.encode_prompt(prompt.messages)
        assert len(answers) == (8 if prompt in fitting else 0)


def test_prompts_are_taken_as_the_engine_needs_them(engine, tiny_chat, prompts):
    taken = itertools.count()
    endless = (structs.replace(prompts[0], uuid=f"e{next(taken)}") for _ in itertools.repeat(None))
    sampling = Sampling(n=1, max_tokens=2, stop_token_ids=tiny_chat.stop_ids)
    stream = Responder(engine, tiny_chat, sampling, 60)(endless)
    assert len(list(itertools.islice(stream, 5))) == 5
    stream.close()
    assert next(taken) < 5000


def test_a_log_probability_is_kept_where_the_text_is_what_was_sampled(engine, tiny_chat, prompts):
    kinds = Counter()
    for prompt, ids, completions in answered(engine, tiny_chat, prompts).values():
        record = record_samples(tiny_chat, prompt, ids, completions)
        assert (record.uuid, record.prompt, record.extra) == (prompt.uuid, prompt.messages, prompt.extra)
        assert record.responses == [c.text for c in completions]
        assert record.num_tokens == [len(c.token_ids) for c in completions]
        for completion, logprob in zip(completions, record.logprob, strict=True):
            again = as_sampled(tiny_chat, prompt.messages, completion.text)
            if completion.finish_reason == "stop":
                again.append(tiny_chat.end_of_turn)
            same = again == ids + completion.token_ids
            assert logprob == (completion.logprob if same else None)
            kinds[same] += 1
    assert len(kinds) == 2, kinds


def test_a_stop_string_gets_no_end_of_turn(engine, tiny_chat, prompts):
    """What is scored is what was sampled: the tokens up to the one that completes it, and no other."""
    how = {"max_tokens": 12, "stop_token_ids": tiny_chat.stop_ids, "stop": ("e", "1")}
    sampling, kept = Sampling(n=20, temperature=1.0, top_p=1.0, **how), Counter()
    prompt, ids, completions = dict(Responder(engine, tiny_chat, sampling, 60)(iter(prompts[:1])))["p0"]
    record = record_samples(tiny_chat, prompt, ids, completions)
    scored, _ = logprobs.encode(group(record), tiny_chat, 128)
    for tokens, sampled, text, logprob in zip(scored, completions, record.responses, record.logprob, strict=True):
        assert (sampled.finish_reason == "stop_string") == ("e" in text or "1" in text)
        assert (tokens.ids[-1] == tiny_chat.end_of_turn) == (sampled.finish_reason == "stop")
        assert (tokens.ids == ids + sampled.token_ids) == (logprob is not None)
        kept[sampled.finish_reason, logprob is not None] += 1
    assert kept["stop_string", True] > 3, kept


def test_the_prompt_before_sysprompt_is_kept_beside_it(tiny_chat, prompts):
    """Only where it is another; and so it reaches the file."""
    completions = [Completion("28", tiny_chat.tokenizer("28")["input_ids"], "length", -1.0)]
    for name, changed in (("task", True), ("none", False)):
        for prompt, put in zip(prompts, build_prompts(lambda: prompts, Sysprompt(name)), strict=True):
            record = record_samples(tiny_chat, put, tiny_chat.encode_prompt(put.messages), completions)
            assert (record.prompt != prompt.messages) == changed and record.extra == prompt.extra
            assert record.source_prompt == (prompt.messages if changed else None)
            assert ("source_prompt" in encode(record)) == changed


TEMPLATES = {
    "header": "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}",
    "trimmed": "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}",
    "no special token": "{{ bos_token }}{% for m in messages %}{{ 'Q:' if m.role == 'user' }}{{ m.content }}"
    "{{ ' A:' if m.role == 'user' else '<end>' }}{% endfor %}",
}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ANSWERS = ["28.", " 28 ", "", "\n\n28", "<end> 28", "<assistant>28", "2\u03018", "28<|im_end|>", "\u200b🙂"]
DIALOGUE = [Message("user", "How many?<end>"), Message("assistant", "28."), Message("user", "Sure? <assistant> ")]


def check_in_one_piece(chat):
    """Spans equal those of conversations tokenised whole, with the prompt's ids given or not; also of responses that
    the template would trim, and where the whole would merge a response with its prompt."""
    for prompt in (DIALOGUE[:1], DIALOGUE):
        ids = chat.encode_prompt(prompt)
        for complete in (True, False):
            found = chat.encode_responses(prompt, ANSWERS, [complete] * len(ANSWERS))
            assert found == chat.encode_responses(prompt, ANSWERS, [complete] * len(ANSWERS), ids)
            for text, tokens in zip(ANSWERS, found, strict=True):
                row = as_sampled(chat, prompt, text)
                if row[: len(ids)] != ids:
                    row = ids + chat.tokenizer(text, add_special_tokens=False)["input_ids"]
                    if isinstance(tokens, str):  # not with a tokenizer that puts a space before a text
                        assert not chat._separable and tokens == NOT_A_PREFIX
                        continue
                row += [chat.end_of_turn] if complete else []
                assert (tokens.ids, tokens.spans) == (row, [(len(ids), len(row))])
    assert chat.encode_responses(DIALOGUE, [], []) == []


@pytest.mark.parametrize("template", TEMPLATES)
def test_answers_are_tokenised_as_in_one_piece(tiny_folder, template):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = TEMPLATES[template]
    check_in_one_piece(Chat(tokenizer))


@pytest.mark.parametrize("folder", ["tokenizers/gpt2", "tokenizers/mistral", "models/stories260K"])
@pytest.mark.parametrize("template", [None, CHATML])
def test_real_tokenizers_too(shared, folder, template):
    tokenizer = AutoTokenizer.from_pretrained(shared / "data" / folder)
    if template:
        tokenizer.add_special_tokens({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})
        tokenizer.chat_template = template
    if tokenizer.chat_template:
        check_in_one_piece(Chat(tokenizer))


def test_an_answer_that_spells_a_word_otherwise_has_no_log_probability(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "data/tokenizers/gpt2")
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})
    tokenizer.chat_template = CHATML
    chat = Chat(tokenizer)
    prompt = Prompt(uuid="p", messages=DIALOGUE[:1])
    usual, otherwise = tokenizer("Hello")["input_ids"], tokenizer.convert_tokens_to_ids(["Hel", "lo"])
    completions = [Completion("Hello", [*ids, chat.end_of_turn], "stop", -1.0) for ids in (usual, otherwise)]
    assert record_samples(chat, prompt, chat.encode_prompt(prompt.messages), completions).logprob == [-1.0, None]
