"""Reasoning models: what is sampled is what is scored and trained on, thoughts, templates that rewrite turns."""

import copy
import importlib.util
import re
import string
import sys
from collections import Counter
from pathlib import Path

import pytest
from msgspec import structs
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from cream.engines import Completion, Sampling
from cream.errors import UserError
from cream.evaluation.tasks import grade
from cream.files.store import read
from cream.records import Answer, Conversation, Message, Pair, Prompt, Samples
from cream.scoring.sampling import describe_tokens, record_samples
from cream.text.chat import CLOSED, REWRITTEN, UNFINISHED, Chat
from cream.text.templates import is_template_name, parse_variables
from cream.text.thoughts import split_thought
from cream.training.stages import sft

USER, MORE = Message("user", "How many?"), Message("user", "And now?")
HEADER = "{% if add_generation_prompt %}<assistant>{% endif %}"
# Qwen3's way: an empty thought in the last turn only, those of earlier turns removed; it can be closed beforehand.
THINKING = (
    "{% for m in messages %}{% set text = m.content.split('</think>')[-1] %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1] if '</think>' in m.content else '' %}"
    "<{{ m.role }}>{% if m.role == 'assistant' and loop.last %}<think>{{ thought }}</think>{% endif %}{{ text }}<end>"
    "{% endfor %}" + HEADER + "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
    "<think></think>{% endif %}"
)
# DeepSeek-R1's way: the generation prompt opens a thought, and every turn is written without one.
OPENED = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}"
    "<end>{% endfor %}" + HEADER.replace("<assistant>", "<assistant><think>\n")
)
CLOSING = (  # Phi-3's way: one more end behind a conversation
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{{ '' if add_generation_prompt else '<end>' }}" + HEADER
)
TRIMMED = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}<end>{% endfor %}" + HEADER  # Llama-3's way
CHANNELS = (  # gpt-oss's way: channels, and another end of the last turn
    "{% for m in messages %}<{{ m.role }}>{{ 'final: ' if m.role == 'assistant' }}{{ m.content }}"
    "{{ '<pad>' if loop.last and not add_generation_prompt else '<end>' }}{% endfor %}" + HEADER
)
WAYS = {"thinking": THINKING, "opened": OPENED, "closing": CLOSING, "trimmed": TRIMMED, "channels": CHANNELS}


@pytest.fixture(scope="module")
def chat_of(tiny_tokenizer):
    """A Chat with a template, and the tags of thoughts as tokens: special ones, or like others."""

    def make(template, *, special=False, **how):
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.add_tokens([AddedToken(tag, special=special) for tag in ("<think>", "</think>")])
        tokenizer.chat_template = template
        return Chat(tokenizer, **how)

    return make


def scored(chat, rows):
    """Per row what is before the first span, and each span, as text."""
    return [
        (chat.decode(row.ids[: row.spans[0][0]]), *(chat.decode(row.ids[a:b]) for a, b in row.spans)) for row in rows
    ]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("text", ["7", " 7 \n", "a</think>7", "<think>a</think>\n\n7", "<think>a", "", "\n7"])
def test_a_sampled_response_is_scored_as_it_was_sampled(chat_of, way, text):
    chat = chat_of(WAYS[way])
    ids = chat.encode_prompt([USER])
    whole, cut = chat.encode_responses([USER], [text] * 2, [True, False])
    assert whole.ids[: len(ids)] == cut.ids[: len(ids)] == ids
    assert chat.decode(whole.ids[len(ids) :]) == text + chat.decode([chat.end_of_turn])
    assert cut.ids == whole.ids[:-1] and cut.spans == [(len(ids), len(cut))]


TURNS = [USER, Message("assistant", "<think>a</think>7"), MORE, Message("assistant", "8")]


@pytest.mark.parametrize(
    ("way", "spans"),
    [
        ("thinking", [["<think>a</think>7<end>"], ["<think></think>8<end>"]]),
        ("opened", [["a</think>7<end>"], ["\n</think>\n\n8<end>"]]),
        ("closing", [["<think>a</think>7<end>", "8<end>"]]),
        ("trimmed", [["<think>a</think>7<end>", "8<end>"]]),
        ("channels", [["final: <think>a</think>7<pad>"], ["final: 8<pad>"]]),
    ],
)
def test_each_turn_follows_the_prompt_that_it_is_sampled_for(chat_of, way, spans):
    """In one row, or, where the template rewrites a turn once another follows, in a row of its own."""
    chat = chat_of(WAYS[way])
    rows = chat.encode_conversation(TURNS)
    assert [texts for _, *texts in scored(chat, rows)] == spans
    prompts = [row.ids[:start] for row in rows for start, _ in row.spans]
    assert prompts == [chat.encode_prompt(TURNS[:i]) for i in (1, 3)]


def test_sft_trains_such_conversations_turn_by_turn_and_says_so(chat_of, caplog):
    records = [Conversation(uuid="a", messages=TURNS), Conversation(uuid="b", messages=TURNS[:2])]
    stage, dropped = sft.Stage(sft.Options(), {}), Counter()
    with caplog.at_level("INFO", "cream"):
        examples = [rows for _, rows in stage.prepare(records, chat_of(THINKING), 100, dropped)]
        assert stage.facts(examples) == {"turn_by_turn": 1}
    assert not dropped and [len(stage.group(rows)) for rows in examples] == [2, 1]
    assert "1 of 2 conversations are trained on turn by turn, as 2 rows" in caplog.text
    assert stage.weight(examples[0]) == sum(row.num_response_tokens for row in examples[0])
    assert stage.facts([stage.prepare(records, chat_of(TRIMMED), 100, dropped)[0][1]]) == {}


@pytest.mark.parametrize("way", WAYS)
def test_no_end_of_turn_is_trained_after_a_truncated_response(chat_of, way):
    """Of a pair too, sampled or imported, and where SFT takes its chosen response."""
    chat = chat_of(WAYS[way])
    for sampled in (True, False):
        (tokens,) = chat.encode_responses([USER], ["7"], [False], sampled=sampled)
        assert chat.decode(tokens.ids[tokens.spans[0][0] :]).endswith("7")
    pair = Pair(
        uuid="p", prompt=[USER], selected=[USER, Message("assistant", "7")], rejected=[USER, Message("assistant", "8")]
    )
    for index in (0, None):
        cut = structs.replace(pair, selected_truncated=True, selected_index=index)
        ((_, (row,)),) = sft.Stage(sft.Options(), {}).prepare([cut], chat, 100, Counter())
        assert chat.decode(row.ids).endswith("7")


@pytest.mark.parametrize(
    ("way", "text", "mask", "drop"),
    [
        ("thinking", "<think>a</think>7", "7<end>", "<think></think>7<end>"),
        ("thinking", "7", "7<end>", "7<end>"),
        ("thinking", "<think>a", None, None),
        ("thinking", "<think>a</think>7<think>b</think>8", "8<end>", "<think></think>78<end>"),
        ("opened", "a</think>7", "7<end>", "\n</think>\n\n7<end>"),
        ("opened", "a", None, None),
        ("trimmed", "<think>a</think>\n\n7", "\n\n7<end>", "7<end>"),
        ("trimmed", "7</think>", "<end>", "<end>"),
    ],
)
def test_a_thought_is_scored_masked_or_dropped(chat_of, way, text, mask, drop):
    for thoughts, wanted in (("score", f"{text}<end>"), ("mask", mask), ("drop", drop)):
        chat = chat_of(WAYS[way], thoughts=thoughts)
        (tokens,) = chat.encode_responses([USER], [text], [True])
        if wanted is None:
            assert tokens == UNFINISHED
            continue
        ((start, end),) = tokens.spans
        assert chat.decode(tokens.ids[start:end]) == wanted
        assert (text in chat.decode(tokens.ids)) == (thoughts != "drop" or text == "7")


def test_dropped_thoughts_are_in_no_turn_before(chat_of):
    chat = chat_of(TRIMMED, thoughts="drop")
    (row,) = chat.encode_conversation(TURNS)
    assert [texts for _, *texts in scored(chat, [row])] == [["7<end>", "8<end>"]]
    assert "think" not in chat.decode(row.ids)


def test_a_response_from_elsewhere_is_written_by_the_template(chat_of):
    chat, closed = chat_of(THINKING), chat_of(THINKING, variables={"enable_thinking": False})
    for text, thinking, without in (
        ("7", "<think></think>7<end>", "7<end>"),
        ("<think>a</think>7", "<think>a</think>7<end>", None),
    ):
        (tokens,) = chat.encode_responses([USER], [text], [True], sampled=False)
        assert scored(chat, [tokens]) == [("<user>How many?<end><assistant>", thinking)]
        (tokens,) = closed.encode_responses([USER], [text], [True], sampled=False)
        prompt = "<user>How many?<end><assistant><think></think>"
        assert tokens == CLOSED if without is None else scored(closed, [tokens]) == [(prompt, without)]
    rewriting = chat_of(
        TRIMMED.replace("m.content", "m.content.replace('How', '' if add_generation_prompt else 'Who')")
    )
    assert rewriting.encode_responses([USER], ["7"], [True], sampled=False) == [REWRITTEN]


def test_a_header_ends_a_response_where_the_model_stops_at_it(chat_of):
    """GLM-4's way: no end of a turn."""
    template = TRIMMED.replace("<end>", "")
    with pytest.raises(UserError, match="does not end a response with a special token"):
        chat_of(template)
    user = chat_of(TRIMMED).tokenizer.convert_tokens_to_ids("<user>")
    chat = chat_of(template, generation_eos=[user])
    assert chat.end_of_turn == user and user in chat.stop_ids
    (row,) = chat.encode_conversation(TURNS)
    assert scored(chat, [row]) == [("<user>How many?<assistant>", "<think>a</think>7<user>", "8<user>")]
    (cut,) = chat.encode_responses([USER], ["7"], [False], sampled=False)
    assert chat.decode(cut.ids).endswith("7")


# Special tokens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "marks", "text"),
    [(True, True, "7<user><think>8</think>9"), (False, True, "7<think>8</think>9"), (False, False, "789")],
)
def test_special_tokens_within_a_response(chat_of, keep, marks, text):
    """Kept, or dropped but for the tags of thoughts."""
    chat = chat_of(TRIMMED, special=True)
    ids = chat.tokenizer("7<user><think>8</think>9<end>", add_special_tokens=False)["input_ids"]
    special = frozenset(chat.special)
    dropped = frozenset() if keep else special - (chat.thought_marks() if marks else set())
    sampling = Sampling(stop_token_ids=chat.stop_ids, special=special, dropped=dropped)
    found = Completion.of(ids, -1.0, sampling, chat.tokenizer)
    assert (found.text, found.finish_reason, found.special) == (text, "stop", 3)
    record = record_samples(chat, Prompt(uuid="p", messages=[USER]), chat.encode_prompt([USER]), [found])
    assert record.logprob == ([-1.0] if keep else [None])
    assert record.special_tokens == [3] and record.thought_tokens == [5]


def test_what_sampling_says_of_special_tokens_and_thoughts():
    counts = Counter(responses=9, special=4, respelled=3, thoughts=2, thought_tokens=9, final_tokens=4, unfinished=1)
    kept, respelled, thoughts = describe_tokens(counts, True)
    assert kept == "4 of 9 responses have special tokens within, which are kept in their text"
    assert respelled.startswith("3 of 9 responses do not tokenise back")
    assert thoughts == (
        "2 of 9 responses have a thought: 4.5 tokens on average, and 2.0 after it; 1 are truncated within it"
    )
    assert "which their text lacks" in next(describe_tokens(counts, False))
    assert list(describe_tokens(Counter(responses=9), True)) == []


# Variables, dates, names ----------------------------------------------------------------------------------------------


def test_variables_of_a_template(chat_of):
    assert parse_variables("a=no, b=2,c=low,d=True") == {"a": False, "b": 2, "c": "low", "d": True}
    assert parse_variables('{"a": [1]}') == {"a": [1]} and parse_variables(None) == {}
    for bad in ("a", "a=1,a=2", "=1", "{a", ""):
        with pytest.raises(UserError, match="--chat_template_kwargs"):
            parse_variables(bad)
    with pytest.raises(UserError, match="enable_thought: .*did you mean enable_thinking.*it reads enable_thinking"):
        chat_of(THINKING, variables={"enable_thought": False})
    for name in ("messages", "tools", "bos_token", "strftime_now"):  # of these no flag decides
        with pytest.raises(UserError, match="has no such variable; it reads none"):
            chat_of(TRIMMED, variables={name: "x"})


def test_a_template_is_a_file_or_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rag").write_text("x")
    names = ("tool_use", "tool-use", "rag", "tool.jinja", "a/tool")
    assert list(map(is_template_name, names)) == [True, True, False, False, False]


def test_a_template_that_writes_the_date_writes_the_same_on_every_day(chat_of):
    chat = chat_of("{{ strftime_now('%d %b %Y') }}" + TRIMMED)
    assert chat.dated and chat.decode(chat.encode_prompt([USER])).startswith("26 Jul 2024<user>")
    assert not chat_of(TRIMMED).dated


# The installed templates ----------------------------------------------------------------------------------------------

VISION = "refused: does not render the assistant's response; give another with --chat_template FILE"
EXCEPTIONS = {  # of trl 1.16: {template: {column: the beginning of its outcome}}; "": all columns
    "gemma": {"system": "refused: System role not supported"},
    "idefics3": {"": VISION},
    "smolvlm": {"": VISION},
    "llava_next": {"": "refused: 'str object' has no attribute 'text'"},
    "qwen3_5_nothink": {"thought": f"dropped: {CLOSED}"},
}


@pytest.mark.slow
def test_the_installed_templates_work_or_are_refused_with_their_reason(repo):
    pytest.importorskip("trl")
    spec = importlib.util.spec_from_file_location("templates_benchmark", repo / "benchmarks/templates.py")
    battery = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(battery)
    outcomes = dict(battery.try_all(["trl/"]))
    assert len(outcomes) > 35
    for name, columns in outcomes.items():
        known = EXCEPTIONS.get(name.removeprefix("trl/"), {})
        for column, outcome in columns.items():
            assert outcome.startswith(known.get(column) or known.get("") or "works"), (name, column)
    assert outcomes["trl/qwen3"]["several turns"] == outcomes["trl/gptoss"]["several turns"] == "works: turn by turn"


# Command lines --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def qwen3(workspace):
    """A small random Qwen3 with its real template, and data; each character is a token, so that what it samples
    tokenises back."""
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    path = Path(pytest.importorskip("trl").__file__).parent / "chat_templates/qwen3.jinja"
    vocabulary = {letter: i for i, letter in enumerate(f"\n{string.ascii_letters}{string.digits} .,?+<>/")}
    backend = Tokenizer(models.BPE(vocabulary, merges=[]))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(mark, special=True) for mark in ("<|im_start|>", "<|im_end|>", "<|pad|>")])
    backend.add_tokens([AddedToken(tag, special=False) for tag in ("<think>", "</think>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|pad|>")
    tokenizer.chat_template, folder = path.read_text(), workspace.folder / "assets/qwen3"
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Qwen3Config(vocab_size=len(tokenizer), tie_word_embeddings=False, initializer_range=0.02, **sizes)
        model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    workspace.write("localdata/q.json", {f"q{i}": [{"role": "user", "content": f"What is {i} + 3?"}] for i in range(6)})
    texts = [f"<think>{i} and 3</think>{i + 3}" if i % 2 else f"{i + 3}" for i in range(6)]
    turns = [[("user", f"What is {i} + 3?"), ("assistant", text)] for i, text in enumerate(texts)]
    turns = [(*turn, ("user", "And 1?"), ("assistant", f"{i + 4}")) for i, turn in enumerate(turns)]
    workspace.write(
        "localdata/turns.json",
        {f"t{i}": [{"role": role, "content": text} for role, text in turn] for i, turn in enumerate(turns)},
    )
    short = {f"q{i}": [{"role": "user", "content": "Go."}, {"role": "assistant", "content": f"{i}"}] for i in range(2)}
    workspace.write("localdata/q.sft.json", short)
    return "--device cpu --model assets/qwen3"


def check_round(world, on, folder, sampler=""):
    """Sampling to DPO and evaluation; what is scored is what was sampled, and the final text is graded."""
    from cream.model.load import load_chat

    out = world.run(
        f"infer.py {on} {sampler} --name localdata/q.json --gen_n 6 --gen_temperature 1 --top_p 1 --gen_max_tokens 40 "
        f"--output_dir {folder}/s.json"
    ).out
    assert "responses have a thought" in out
    scoring = f"rewarding.py {on} --input_file {folder}/s.json"
    shown = world.run(f"{scoring} --ref_model_ckpt none --output {folder}/r.json").out
    before = scoring.replace(f"--checkpoint {folder}/m1/checkpoint-last", "--checkpoint none")
    world.run(f"{before} --reward likelihood --output {folder}/p.json")
    pairing = f"cal_consistency.py --file1 {folder}/r.json --file2 {folder}/p.json --keep_truncated yes"
    world.run(f"{pairing} --output {folder}/pairs.json")
    training = f"train.py {on} --name {folder}/pairs.json --train_bsz 2 --allow_reversed"  # a random model's C
    trained = world.run(f"{training} --output_dir {folder}/dpo").out
    assert " from the data, 0 cached, 0 computed" in trained
    kwargs = on.partition("--chat_template_kwargs ")[2] or None
    chat = load_chat(world.folder / "assets/qwen3", variables=parse_variables(kwargs))
    for sample in read(world.folder / f"{folder}/s.json", Samples):
        ids = chat.encode_prompt(sample.prompt)
        complete = [reason == "stop" for reason in sample.finish_reason]
        rows = chat.encode_responses(sample.prompt, sample.responses, complete)
        for row, text, count, logprob in zip(rows, sample.responses, sample.num_tokens, sample.logprob, strict=True):
            assert logprob is not None and row.num_response_tokens == count
            assert chat.decode(row.ids[len(ids) :]).removesuffix("<|im_end|>") == text
    first = next(read(world.folder / f"{folder}/s.json", Samples))
    assert f"⟦{first.responses[0]}" in shown
    for pair in read(world.folder / f"{folder}/pairs.json", Pair):
        assert pair.sampled == (True, True)
    trained = re.sub(r"--checkpoint \S+", f"--checkpoint {folder}/dpo/checkpoint-last", on)
    asked = f"{trained} {sampler} --mode evaluation --name tiny_test --limit_size 4 --gen_max_tokens 24"
    world.run(f"infer.py {asked} --output_dir {folder}/answers.json")
    for answer in read(world.folder / f"{folder}/answers.json", Answer):
        final = split_thought(answer.responses, opened=answer.thought_opened).final
        assert (answer.final_prediction, answer.correct) == grade(answer.question, answer.label, final)


@pytest.mark.slow
@pytest.mark.parametrize("thinking", ["yes", "no"])
def test_the_loop_with_a_qwen3(workspace, qwen3, thinking):
    on, folder = f"{qwen3} --chat_template_kwargs enable_thinking={thinking}", f"outputs/{thinking}"
    data = "--name localdata/turns.json --train_bsz 2 --lr 1e-3"
    out = workspace.run(f"train.py {on} {data} --output_dir {folder}/m1").out
    if thinking == "yes":
        assert "6 of 6 conversations are trained on turn by turn, as 12 rows" in out
    else:
        assert f"dropped 3 of 6 records: {CLOSED}" in out
    check_round(workspace, f"--checkpoint {folder}/m1/checkpoint-last {on}", folder)
    other = "yes" if thinking == "no" else "no"
    command = f"{qwen3} --chat_template_kwargs enable_thinking={other} --input_file {folder}/s.json"
    refused = workspace.refused(f"rewarding.py {command} --reward likelihood --checkpoint none --output outputs/x.json")
    assert f"was made with --chat_template_kwargs enable_thinking={thinking}" in refused
    refused = workspace.refused(f"train.py {qwen3} --name {folder}/pairs.json --output_dir outputs/x --checkpoint none")
    assert f"was made with --chat_template_kwargs enable_thinking={thinking}, and here it is none" in refused


@pytest.mark.slow
@pytest.mark.xdist_group("vllm")
@pytest.mark.parametrize("thinking", ["yes", "no"])
def test_the_loop_with_a_qwen3_by_vllm(workspace, qwen3, with_vllm, thinking):
    world, folder = copy.copy(workspace), f"outputs/vllm-{thinking}"
    world.stages = with_vllm
    on = f"{qwen3} --chat_template_kwargs enable_thinking={thinking}"
    tune = f"train.py {on} --name localdata/q.sft.json --train_bsz 2 --lr 1e-5 --output_dir {folder}/m1"
    workspace.run(tune)
    check_round(world, f"--checkpoint {folder}/m1/checkpoint-last {on}", folder, "--engine vllm")
