"""Multiple choice by log-likelihood: what is scored, what is chosen, and the command that does it."""

import copy
import json
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from cream.errors import UserError
from cream.evaluation import choices
from cream.evaluation.grade import Rules, options_of, split_question
from cream.files.append_log import add_checksum
from cream.files.journal import FORMAT, Output
from cream.files.provenance import Provenance
from cream.files.store import read
from cream.model.load import load_policy, load_tokenizer
from cream.records import Answer, Item, Message
from cream.scoring import logprobs
from cream.scoring.driver import Model
from cream.scoring.logprobs import Scored, Scorer
from cream.scoring.pool import Pool
from cream.text.plain import Plain

GAS = "Which gas do plants take in?\nA. oxygen\nB. neon\nC. carbon dioxide"
TEXTS = {"A": "oxygen", "B": "neon", "C": "carbon dioxide"}


def item(question=GAS, label="C", task=None, uuid="q"):
    return Item(uuid=uuid, question=question, label=label, task=task)


# What is asked --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "stem"),
    [
        (GAS, "Which gas do plants take in?"),
        ("Who has more? (A) Tom (B) Mary", "Who has more?"),
        ("Who has more? A) Tom B) Mary", "Who has more?"),
        ("Steps:\n1. heat\n2. cool\nWhich is first?\nA. heat\nB. cool", "Steps:\n1. heat\n2. cool\nWhich is first?"),
        ("Ends so: \n  A. one\n  B. two", "Ends so: "),
        ("A. one\nB. two", ""),
        ("How many?", "How many?"),
    ],
)
def test_what_stands_before_the_options(question, stem):
    assert split_question(question) == (stem, options_of(question))


def test_the_plain_context_is_the_harness_s_for_each_task():
    asked = "Which gas do plants take in?"
    wanted = {"arc_easy": f"Question: {asked}\nAnswer:", "openbookqa": asked, "siqa": f"Q: {asked}\nA:"}
    for task, context in wanted.items():
        group = choices.group(item(task=task), "plain")
        assert group.prompt == [Message("user", context)]
        assert group.responses == [" oxygen", " neon", " carbon dioxide"]
    assert choices.context_of(item()) == choices.context_of(item(task="mine")) == wanted["arc_easy"]
    assert choices.group(item("A. x\nB. y", task="openbookqa"), "plain").prompt == []
    assert choices.context_of(item("{} {0}?\nA. {x}\nB. y")) == "Question: {} {0}?\nAnswer:"


def test_examples_stand_before_in_the_same_form():
    shot = item("Hot?\nA. fire\nB. ice", "A", "siqa")
    plain = choices.group(item(task="siqa"), "plain", shots=[shot])
    assert plain.prompt[0].content == "Q: Hot?\nA: fire\n\nQ: Which gas do plants take in?\nA:"
    unnamed = item("Hot?\nA. fire\nB. ice", "A")  # as a training file's that does not name its task
    assert choices.group(item(task="siqa"), "plain", shots=[unnamed]) == plain
    chat = choices.group(item(), "chat", shots=[shot])
    turns = [("user", shot.question), ("assistant", "fire"), ("user", GAS)]
    assert [(message.role, message.content) for message in chat.prompt] == turns
    assert chat.responses == ["oxygen", "neon", "carbon dioxide"]
    with pytest.raises(UserError, match="bad"):
        choices.group(item(), "plain", shots=[item("How many?", "3", uuid="bad")])


def test_items_without_options_are_skipped_and_wrong_labels_are_not(tmp_path):
    items = {"a": item(), "b": item("How many?", "12"), "c": item("Which?\n1. x\n2. y", 2)}
    assert choices.with_options(items, tmp_path) == ({"a": items["a"], "c": items["c"]}, 1)
    formula = items | {"f": item("Which root?", r"\sqrt{2}")}
    assert choices.with_options(formula, tmp_path, Rules(grader="math"))[1] == 2
    with pytest.raises(UserError, match="'Which root.*--grader math"):
        choices.with_options(formula, tmp_path)
    with pytest.raises(UserError, match="no question of .* has any"):
        choices.with_options({"b": items["b"]}, tmp_path)
    with pytest.raises(UserError, match="label 'E' is none of its options"):
        choices.with_options({"a": items["a"], "e": item(label="E")}, tmp_path)


# Plain text as tokens -------------------------------------------------------------------------------------------------


def with_bos(tokenizer, template="<bos> $A"):
    """The tokenizer, made to add BOS by itself as Llama's does."""
    tokenizer = copy.deepcopy(tokenizer)
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<bos>", "<end>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=special)
    return tokenizer


def scored(tokenizer, context, *answers):
    prompt = [Message("user", context)] if context else []
    rows = Plain(tokenizer).encode_responses(prompt, answers, [True] * len(answers))
    decode = tokenizer.decode
    return [(decode(row.ids[: row.spans[0][0]]), decode(row.ids[row.spans[0][0] :])) for row in rows]


def test_a_continuation_is_what_is_scored(tiny_tokenizer):
    assert scored(tiny_tokenizer, "A:", " b", " cd") == [("A:", " b"), ("A:", " cd")]
    assert scored(tiny_tokenizer, "A: \n", "b") == [("A:", " \nb")]  # whitespace goes over
    assert scored(with_bos(tiny_tokenizer), "A:", " b") == [("<bos>A:", " b")]
    assert scored(with_bos(tiny_tokenizer), "<bos>A:", " b") == [("<bos>A:", " b")]  # not twice
    assert scored(tiny_tokenizer, "", "b") == scored(with_bos(tiny_tokenizer), "", "b") == [("<bos>", "b")]


def test_a_token_that_merges_context_and_option_is_not_scored(tiny_tokenizer):
    """As in the harness, which has no score for an option of which nothing is left; nor is it the likeliest here."""
    words = {word: i for i, word in enumerate(["<pad>", "a", "b", "c", "ab", "abc"])}
    merging = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(words, [("a", "b"), ("ab", "c")])))
    assert scored(merging, "ca", "bb", "c", "bcc") == [("c a", "b"), ("c a", "c"), ("c a", "c")]
    options = logprobs.Group("q", [Message("user", "ca")], ["b", "bc", "c"], [True] * 3)
    rows, reasons = logprobs.encode(options, Plain(merging), 100)
    assert reasons == ["no token to score", "the same tokens as another response", None] and rows[:2] == [None, None]


def test_a_tokenizer_that_ends_texts_is_refused(tiny_tokenizer):
    with pytest.raises(UserError, match="'<end>'"):
        Plain(with_bos(tiny_tokenizer, "<bos> $A <end>"))


@given(context=st.text(min_size=1, max_size=30).filter(str.strip), answer=st.text(min_size=1, max_size=20))
def test_tokens_are_the_harness_s(shared, context, answer):
    """On a byte-level and on a SentencePiece vocabulary, for whatever text."""
    from lm_eval.api.model import TemplateLM

    for tokenizer in tokenizers_of(shared):

        class Peer:
            backend = "causal"

            def tok_encode(self, text, tokenizer=tokenizer, **_):
                prefix = tokenizer.bos_token or tokenizer.eos_token
                return tokenizer.encode(text, **({"add_special_tokens": False} if text.startswith(prefix) else {}))

        before, after = TemplateLM._encode_pair(Peer(), context, answer)
        (row,) = Plain(tokenizer).encode_responses([Message("user", context)], [answer], [True])
        assert (row.ids[: len(before)], row.ids[len(before) :]) == (before, after)
        assert row.spans == [(len(before), len(row))]


CACHE = {}


def tokenizers_of(shared):
    if not CACHE:
        for name in ("models/stories260K", "tokenizers/gpt2", "tokenizers/mistral"):
            CACHE[name] = load_tokenizer(shared / "data" / name)
    return CACHE.values()


# Which option ---------------------------------------------------------------------------------------------------------


def test_the_lengths_by_hand():
    """ä has two bytes. By none, chars, bytes, tokens: A -6, -1.2, -1, -3; B -4, -2, -2, -4; C -5, -1, -5/6, -5."""
    texts = {"A": "äabcd", "B": "no", "C": "mäybe"}
    logprob, tokens = {"A": -6.0, "B": -4.0, "C": -5.0}, {"A": 2, "B": 1, "C": 1}
    found = {norm: choices.likeliest(texts, logprob, tokens, norm) for norm in choices.NORMS}
    assert found == {"none": "B", "chars": "C", "bytes": "C", "tokens": "A"}
    wide = {"A": "ääää", "B": "abcde"}  # chars: -1 and -0.9; bytes: -0.5 and -0.9
    found = [choices.likeliest(wide, {"A": -4.0, "B": -4.5}, {"A": 1, "B": 1}, norm) for norm in ("chars", "bytes")]
    assert found == ["B", "A"]


@given(st.lists(st.integers(-100, 0), min_size=2, max_size=5), st.sampled_from(list(choices.NORMS)))
def test_it_is_the_first_of_the_best(values, norm):
    labels = "ABCDE"[: len(values)]
    same = choices.likeliest(
        dict.fromkeys(labels, "text"), dict(zip(labels, values, strict=True)), dict.fromkeys(labels, 3), norm
    )
    assert same == labels[values.index(max(values))]


def test_a_record_has_what_was_chosen_and_why():
    record = choices.record_choice(item(), Scored([-3.0, -2.0, -2.5], [2, 1, 3], [None] * 3), "none")
    assert (record.final_prediction, record.correct, record.responses) == ("b", False, "neon")
    assert record.option_logprob == {"A": -3.0, "B": -2.0, "C": -2.5} and record.option_tokens == {
        "A": 2,
        "B": 1,
        "C": 3,
    }
    again = choices.choose_option(record, "chars")
    assert (again.final_prediction, again.correct, again.responses) == ("c", True, "carbon dioxide")
    assert choices.accuracies([record]) == {norm: {None: float(norm != "none")} for norm in choices.NORMS}


@pytest.mark.parametrize(
    ("logprob", "tokens", "error"),
    [
        ({"A": -1.0, "B": -2.0}, {"A": 1, "B": 1}, "its question A, B, C"),
        ({"A": -1.0, "B": -2.0}, {"A": 1}, "not of the same options"),
        ({"A": -1.0}, None, "not of the same options"),
        ({"A": -1.0, "B": -2.0, "C": -3.0}, {"A": 1, "B": 0, "C": 1}, "has no token"),
    ],
)
def test_a_file_with_other_options_is_refused(tmp_path, logprob, tokens, error):
    row = {"uuid": "q", "question": GAS, "label": "C", "responses": "", "final_prediction": "a", "correct": False}
    row |= {"option_logprob": logprob} | ({} if tokens is None else {"option_tokens": tokens})
    (tmp_path / "answers.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match=error):
        [choices.choose_option(record, "chars") for record in read(tmp_path / "answers.jsonl", Answer)]


def test_a_label_that_is_no_option_is_refused():
    record = choices.record_choice(item(), Scored([-3.0, -1.0, -2.5], [2, 2, 3], [None] * 3), "chars")
    with pytest.raises(UserError, match="label 'Z' is none of its options A, B, C"):
        choices.choose_option(structs.replace(record, label="z"), "chars")


def test_an_option_that_cannot_be_scored_leaves_the_item_unanswered():
    scored = Scored([-3.0, None, -2.5], [2, 0, 3], [None, "longer than 9 tokens", None])
    record = choices.record_choice(item(), scored, "chars")
    assert (record.final_prediction, record.correct, record.option_logprob) == ("none", False, None)
    assert record.extra == {"reason": "longer than 9 tokens"}
    assert choices.choose_option(record, "none") is record


@pytest.mark.parametrize("prompt_format", choices.FORMATS)
def test_scores_are_the_model_s_own(prompt_format, tiny_folder, tiny_chat, tiny_tokenizer):
    """Each option alone, by the library's own forward pass over the whole text."""
    chat = tiny_chat if prompt_format == "chat" else Plain(tiny_tokenizer)
    group = choices.group(item("Tom has 2?\nA. two\nB. 33\nC. a book", "B"), prompt_format)
    worker = Scorer(tiny_folder, chat, torch.float32, 128, None, 8, 1, "cpu")
    ((_, found),) = worker([group])
    policy = load_policy(tiny_folder, torch.float32, torch.device("cpu"))
    for tokens, value in zip(
        chat.encode_responses(group.prompt, group.responses, group.complete), found.logprob, strict=True
    ):
        ids, (start, end) = torch.tensor([tokens.ids]), tokens.spans[0]
        with torch.no_grad():
            logs = policy(ids).logits[0].log_softmax(-1)
        assert value == pytest.approx(sum(logs[t - 1, ids[0, t]].item() for t in range(start, end)), abs=1e-3)


def test_what_is_lost_on_a_cpu_is_at_most_a_chunk(tiny_folder, tiny_chat, tmp_path, monkeypatch):
    """A run that ends amid its second chunk's results keeps those that it has, and goes on to the same numbers."""
    items = [Item(uuid=f"u{i}", question=f"Who has {i % 30}? A) Tom B) Mary {i}", label="B") for i in range(80)]
    groups = [choices.group(item, "chat") for item in items]
    how = {"max_length": 100, "show": False}
    sizes, find = [], Scorer._score
    monkeypatch.setattr(Scorer, "_score", lambda self, some: sizes.append(len(some)) or find(self, some))

    def run(name, limit):
        provenance = Provenance()
        provenance.model("policy", tiny_folder)
        with Output(tmp_path / name, {}, provenance) as output:
            model = Model(tiny_folder, output.header["inputs"]["policy"], tiny_chat, Pool("cpu"), None)
            for uuid, found in islice(choices.score_options(output, model, groups, **how), limit):
                output.append({"uuid": uuid, "found": found.logprob})
            return list(output.rows(item.uuid for item in items))

    whole = run("whole.json", None)
    assert sizes == [32, 32, 16] and len(whole) == 80
    assert run("cut.json", 40) == whole[:40] and sizes[3:] == [32, 32]
    assert run("cut.json", None) == whole and sizes[5:] == [32, 16]


# The command ----------------------------------------------------------------------------------------------------------

COMMAND = "infer.py --device cpu --model tiny --mode evaluation --scoring loglikelihood --name localdata/"


@pytest.fixture(scope="module")
def world(workspace):
    items = [
        {"uuid": "long", "question": "much " * 300 + "?\nA. two\nB. three", "label": "A", "task": "siqa"},
        {"uuid": "sum", "question": "Tom has 2 books and gets 3. How many?", "label": "5", "task": "gsm8k"},
        {"uuid": "two", "question": "Who has more? A) Tom B) Mary", "label": "B", "task": "siqa", "note": 1},
        {"uuid": "gas", "question": GAS.replace("A.", "1.").replace("B.", "2.").replace("C.", "3."), "label": 3},
    ]
    workspace.write("localdata/mixed.json", items)
    workspace.write("localdata/sums.json", items[1:2])
    return workspace


@pytest.mark.parametrize("prompt_format", choices.FORMATS)
def test_options_are_compared_and_numbers_skipped(world, prompt_format):
    target = f"outputs/{prompt_format}.json"
    command = f"{COMMAND}mixed.json --prompt_format {prompt_format} --max_length 500 --output_dir {target}"
    done = world.run(command)
    assert "1 of 4 questions are skipped: no options to compare" in done.out
    assert "1 of 3 questions count as wrong: longer than 500 tokens" in done.out
    assert world.read(target + ".meta.json")["counts"]["dropped"] == {
        "longer than 500 tokens": 1,
        "no options to compare": 1,
    }
    long, two, gas = read(world.folder / target, Answer)
    assert (long.uuid, long.correct, long.extra) == ("long", False, {"reason": "longer than 500 tokens"})
    assert two.uuid == "two" and two.extra == {"note": 1} and two.option_logprob.keys() == {"A", "B"}
    assert gas.responses == TEXTS[chr(ord("A") + int(gas.final_prediction) - 1)] and gas.task == "mixed"
    summary = world.read(f"outputs/{prompt_format}.summary.json")
    assert [row["task"] for row in summary["tasks"]] == ["siqa", "mixed", "macro"]
    assert summary["by_length_norm"]["chars"] == {row["task"]: row["accuracy"] for row in summary["tasks"]}
    assert (summary["chat_template"] is None) == (prompt_format == "plain")
    for flags in ("", " --grader math --extraction strict --thinking_tags none --gen_n 3 --engine hf"):
        assert "is up to date" in world.run(command + flags).out
    assert "grader" not in world.read(target + ".meta.json")["settings"]  # outputs of earlier versions do not have it
    if prompt_format == "chat":
        return
    assert "length_norm: chars -> none" in world.run(command + " --length_norm none", code=2).err
    done = world.run(f"infer.py --mode rescore --input_file {target} --length_norm none")
    again = list(read(world.folder / "outputs/plain.rescored-none.json", Answer))
    assert [a.final_prediction for a in again[1:]] == [
        choices.likeliest(options_of(a.question), a.option_logprob, a.option_tokens, "none").lower() for a in (two, gas)
    ]


def test_what_cannot_be_compared_is_refused(world):
    assert "no question of" in world.refused(COMMAND + "sums.json")
    sampling = "infer.py --device cpu --model tiny --scoring loglikelihood --name tiny_prompt_1"
    assert "--mode evaluation" in world.refused(sampling)


def test_a_killed_comparison_goes_on(world):
    """The journal's items are not computed again, and the file is the same."""
    whole = f"{COMMAND}mixed.json --max_length 500 --output_dir outputs/whole.json"
    world.run(whole)
    meta = world.read("outputs/whole.json.meta.json")
    rows = world.read("outputs/whole.json")
    kept = {**rows["two"], "final_prediction": "kept"}
    lines = [{"journal": FORMAT, "settings": meta["settings"], "inputs": meta["inputs"]}, kept]
    (world.folder / "outputs/part.json.partial").write_bytes(b"".join(map(add_checksum, lines)))
    done = world.run(whole.replace("whole.json", "part.json"))
    assert "resuming: 1 of 3 questions are done" in done.out
    part = world.read("outputs/part.json")
    assert part.pop("two") == kept and rows.pop("two") and part == rows
