"""The tiny world: its answers are right, its sets are disjoint, its files are the generator's, its tokens are exact."""

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cream.text.judge_prompts import JUDGE_PROMPTS
from cream.tiny.base import BOS, END, SPECIALS, build_tokenizer, noisy_set, write_init
from cream.tiny.problems import (
    OBJECTS,
    SIZES,
    TASKS,
    base_problems,
    comparison_pairs,
    judge_set,
    make_problem,
    noisy_solution,
    problem_sets,
    work,
    write_world,
)

ROOT = Path(__file__).resolve().parents[1]
NUMBERS = st.integers(10, 99)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def world():
    return problem_sets(seed=0)


def recomputed_label(problem) -> str:
    """The answer, from the question's text alone."""
    first, second = map(int, re.findall(r"\d+", problem.question))
    if "gets" in problem.question:
        return str(first + second)
    if "gives away" in problem.question:
        return str(first - second)
    options = dict(re.findall(r"([A-C])\) (\w+)", problem.question))
    owner, other = re.search(r"(\w+) has \d+ \w+ and (\w+) has", problem.question).groups()
    winner = owner if first > second else other if second > first else "same"
    return next(letter for letter, name in options.items() if name == winner)


def check_working(text: str) -> None:
    """Every equation and comparison in a solution's working holds, and there is one."""
    clauses = [clause for clause in re.split(r"[.,]", text) if re.search(r"[<>=]", clause)]
    assert clauses
    for clause in clauses:
        assert eval(clause.replace("=", "==")), text


def test_labels_and_workings_are_right(world):
    for problem in (p for problems in world.values() for p in problems):
        assert problem.answer_label == recomputed_label(problem)
        assert problem.worked.endswith(f" Answer: {problem.answer_label}")
        check_working(problem.worked)


@given(NUMBERS, NUMBERS)
def test_systematic_mistakes(first, second):
    _, total = work("tiny_add", first, second, systematic=True)
    assert int(total) == first + second - 10 * (first % 10 + second % 10 >= 10)
    larger, smaller = max(first, second), min(first, second)
    _, difference = work("tiny_sub", larger, smaller, systematic=True)
    assert int(difference) == larger - smaller + 10 * (larger % 10 < smaller % 10)
    _, letter = work("tiny_compare", first, second, systematic=True)
    assert letter == ("A" if first % 10 > second % 10 else "B" if first % 10 < second % 10 else "C")


@pytest.mark.parametrize(
    "thing, worked, mistake, slip", [(OBJECTS[0], 0.60, 0.15, 0.05), (OBJECTS[-1], 0.20, 0.70, 0.25)]
)
def test_noise_rates(thing, worked, mistake, slip):
    """8000 solutions of one comparison whose units digits mislead meet the stated rates (4 sigma or more)."""
    rng = random.Random(0)
    problem = make_problem(rng, "tiny_compare")
    while problem.thing != thing or problem.first < problem.second + 10 or problem.first % 10 >= problem.second % 10:
        problem = make_problem(rng, "tiny_compare")
    texts = [noisy_solution(problem, rng) for _ in range(8000)]
    quick = Counter(text[-1] for text in texts if text.startswith("Answer"))
    assert quick.total() / len(texts) == pytest.approx(1 - worked, abs=0.022)
    for letter, rate in {"A": 0.30 + 0.25 / 3, "B": 0.45 + 0.25 / 3, "C": 0.25 / 3}.items():
        assert quick[letter] / quick.total() == pytest.approx(rate, abs=0.04)
    working = Counter(text for text in texts if not text.startswith("Answer"))
    wrong = " Answer: ".join(work("tiny_compare", problem.first, problem.second, systematic=True))
    for text, rate in {problem.worked: 1 - mistake, wrong: mistake}.items():
        # Half of all slips, or nearly, fall on a digit that this working does not read.
        assert working[text] / working.total() == pytest.approx(rate * (1 - slip / 2), abs=0.05)


def test_sets_are_disjoint_and_balanced(world):
    questions = Counter(p.question for problems in world.values() for p in problems)
    assert max(questions.values()) == 1
    for name, problems in world.items():
        assert len(problems) == SIZES[name]
        counts = Counter(p.task for p in problems)
        assert max(counts.values()) - min(counts.values()) <= 1
    for seed in (0, 1):
        assert not questions.keys() & {p.question for p in base_problems(seed, 3000)}
    other = {p.question for p in problem_sets(seed=1)["test"]}
    assert len(other & questions.keys()) < 5


def test_files_are_the_generators(tmp_path):
    write_world(tmp_path, seed=0)
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == sorted(path.name for path in (ROOT / "localdata/tiny").iterdir())
    for name in made:
        assert (tmp_path / name).read_bytes() == (ROOT / "localdata/tiny" / name).read_bytes(), name


def test_a_judge_learns_from_as_many_right_as_wrong_solutions(world):
    """Of the careless authors, each with its score after the question of --judge_prompt plain; all turns are trained
    on."""
    records = list(judge_set(world["judge"], seed=0))
    for problem, record in zip(world["judge"], records, strict=True):
        question, solution, asked, score = (message.content for message in record.messages)
        assert question == problem.question and asked == JUDGE_PROMPTS["plain"].template and not record.only_last
        assert score == ("5" if solution.endswith(f"Answer: {problem.answer_label}") else "0")
    scores = Counter(record.messages[-1].content for record in records)
    assert scores["5"] == scores["0"] == len(records) / 2


def test_one_mistake_decides_a_pair(world):
    """Both responses are worked; the working of the wrong one holds for other digits, or compares the units."""
    taken = {p.question for problems in world.values() for p in problems}
    pairs = list(comparison_pairs(0, taken, 300))
    units = 0
    for pair in pairs:
        (question, right), wrong = (message.content for message in pair.selected), pair.rejected[-1].content
        first, second = map(int, re.findall(r"\d+", question))
        assert right == " Answer: ".join(work("tiny_compare", first, second))
        answers = [text.rpartition("Answer: ")[2] for text in (right, wrong)]
        assert answers[0] != answers[1] and pair.prompt == pair.selected[:1] == pair.rejected[:1]
        check_working(wrong.partition(" Answer")[0])
        if wrong == " Answer: ".join(work("tiny_compare", first, second, systematic=True)):
            units += 1
        else:
            near = [(a, second) for a in range(10, 100)] + [(first, b) for b in range(10, 100)]
            assert wrong in {" Answer: ".join(work("tiny_compare", *numbers)) for numbers in near}
    assert 0.3 < units / len(pairs) < 0.7
    assert not taken & {pair.prompt[0].content for pair in pairs} and len({pair.uuid for pair in pairs}) == 300


def test_labels_cover_the_prompts():
    folder = ROOT / "localdata/tiny"
    labels = {item["uuid"]: item for item in json.loads((folder / "labels.json").read_text())}
    prompts = {}
    for number in (1, 2, 3):
        prompts |= json.loads((folder / f"prompt.{number}.json").read_text())
    assert {uuid: messages[0]["content"] for uuid, messages in prompts.items()} == {
        uuid: item["question"] for uuid, item in labels.items()
    }
    assert {item["task"] for item in labels.values()} == set(TASKS)


def test_world_text_needs_no_bytes(tokenizer, world):
    """World text is words, signs and digits (below the words' ids stands the alphabet), the same when read back."""
    records = list(noisy_set(seed=1, count=1500))
    texts = [m.content for r in records for m in r.messages]
    texts += [text for problems in world.values() for p in problems for text in (p.question, p.worked)]
    words = len(SPECIALS) + 256
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        for index, piece in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
            assert index >= words or piece in set("0123456789.,:?)"), (text, piece)
        assert tokenizer.decode(ids) == text
    digits = [i for i in tokenizer("28 + 3 = 11, carry 1. Answer: 61")["input_ids"] if tokenizer.decode([i]).isdigit()]
    assert tokenizer.decode(digits) == "28311161"


@settings(max_examples=300)
@given(st.text())
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@settings(max_examples=100)
@given(st.text(), st.lists(st.tuples(st.text(min_size=1), st.text()), min_size=1, max_size=3))
def test_conversation_continues_its_prompt(tokenizer, system, turns):
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    assert ids[: len(prompt)] == prompt
    assert ids[-1] == tokenizer.eos_token_id != tokenizer.pad_token_id
    if not any(special in text for special in SPECIALS for text in (system, *sum(turns, ()))):
        assert ids.count(tokenizer.convert_tokens_to_ids(BOS)) == 1
        assert ids.count(tokenizer.convert_tokens_to_ids(END)) == 2 * len(turns)
        assert tokenizer.decode(ids[len(prompt) : -1]) == turns[-1][1]


def test_template_refuses_other_roles(tokenizer):
    from jinja2 import TemplateError

    with pytest.raises(TemplateError, match="system message must be the first"):
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}])


@pytest.mark.slow
def test_write_init_is_seeded_and_leaves_the_generator_alone(tmp_path):
    import torch
    from safetensors.torch import load_file

    state = torch.random.get_rng_state()
    for name, seed in {"a": 0, "b": 0, "c": 1}.items():
        write_init(tmp_path / name, seed)
    assert torch.equal(state, torch.random.get_rng_state())
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["model.embed_tokens.weight"], c["model.embed_tokens.weight"])


def test_base_model_knows_some_of_its_world(tokenizer, world):
    """assets/tiny_m0 loads, is small, stops by itself, and answers the validation set neither badly nor well."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = ROOT / "assets/tiny_m0"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 4e6
    saved = AutoTokenizer.from_pretrained(folder)
    assert saved.get_vocab() == tokenizer.get_vocab()
    assert saved.chat_template == tokenizer.chat_template
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == saved.eos_token_id

    problems = world["val"][:150]
    saved.padding_side = "left"
    chats = [[{"role": "user", "content": p.question}] for p in problems]
    inputs = saved.apply_chat_template(
        chats, add_generation_prompt=True, return_tensors="pt", padding=True, return_dict=True
    )
    ids = model.generate(**inputs, max_new_tokens=48, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert (ids == saved.eos_token_id).any(dim=1).float().mean() > 0.98
    answers = saved.batch_decode(ids, skip_special_tokens=True)
    right = sum(a.endswith(f"Answer: {p.answer_label}") for a, p in zip(answers, problems, strict=True))
    assert 0.2 < right / len(problems) < 0.5
