"""Prompt synthesis: ROUGE-L of few pairs as of all, the filters by hand, rounds that resume, and the command line."""

import functools
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from workspace import M1, ON

from cream.data import instructions
from cream.data.instructions import examples, query, unusable
from cream.data.similar import Similar, rouge_l
from cream.data.synthesis import EQUAL, SIMILAR, SURPLUS, TOO_LONG, Kept, Round, Writer
from cream.engines import Completion
from cream.files import store
from cream.records import Prompt
from cream.text.overlap import CONTAMINATED, grams
from cream.text.thoughts import USUAL

# Likeness -------------------------------------------------------------------------------------------------------------


def lcs(first, second):
    """The length of the longest common subsequence, by the recursion."""
    row = [0] * (len(second) + 1)
    for a in first:
        left = 0
        for j, b in enumerate(second):
            left, row[j + 1] = row[j + 1], left + 1 if a == b else max(row[j], row[j + 1])
    return row[-1]


def draw_texts(count, seed):
    """Texts of a few words that share many."""
    chance = random.Random(seed)
    words = ["write", "a", "poem", "about", "the", "sea", "Tell", "me", "why", "3", "is", "odd!", "Éa", "cats"]
    return [" ".join(chance.choices(words, k=chance.randint(1, 14))) for _ in range(count)]


def test_rouge_l_is_the_library_s_and_the_definition_s():
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    for first, second in zip(draw_texts(200, 0), draw_texts(200, 1), strict=True):
        a, b = (
            ["".join(c for c in word.lower() if c.isascii() and c.isalnum()) for word in text.split()]
            for text in (first, second)
        )
        f = 2 * lcs(a, b) / (len(a) + len(b))
        assert rouge_l(first, second) == scorer.score(first, second)["rougeL"].fmeasure == pytest.approx(f, abs=1e-12)


@given(st.integers(0, 10**6), st.sampled_from([0.3, 0.5, 0.7, 0.95]))
def test_a_text_is_like_another_as_if_all_were_compared(seed, limit):
    """The bound leaves out none, whatever is added in between."""
    *texts, last = draw_texts(12, seed)
    similar = Similar(limit)
    for text in (*texts, last, ""):
        like = [other for other in similar.texts if rouge_l(other, text) > limit]
        found = similar.find(text)
        assert (found in like) if like else found is None
        similar.add(text)


# Filters --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, why",
    [
        ("Name three rivers in Asia", None),
        ("Name three rivers", instructions.SHORT),
        ("Name " + "very " * 148 + "long rivers", instructions.LONG),
        ("Describe the picture of a cat", instructions.MEDIA),
        ("Go to the shop and buy bread", instructions.MEDIA),
        ("Explain photography and mapping to a child", None),  # whole words only
        ("Write a program that adds two numbers", instructions.PROGRAM),
        ("- Name three rivers in Asia", instructions.PUNCTUATION),
        ("Überlege dir drei Flüsse", instructions.NOT_ASCII),
    ],
)
def test_which_instructions_can_be_used(text, why):
    assert unusable(text) == why


def test_a_list_is_split_at_the_starts_of_its_lines():
    text = " what is  3.5 times\n2? \n10. Explain pH to McDonald.\n11) Sum up: 1. one 2. two\n12. Name a fe"
    found = list(instructions.instructions(text, cut=True, chat=False))
    assert found == [
        ("What is 3.5 times 2?", None),
        ("Explain pH to McDonald.", None),  # its capitals stay
        ("Sum up: 1. one 2. two", None),
        ("Name a fe", instructions.CUT),
    ]
    chat = list(instructions.instructions("Here they are:\n9. Name three big rivers.\n", cut=False, chat=True))
    assert chat == [("Name three big rivers.", None)]
    assert list(instructions.instructions("No.", cut=False, chat=True)) == [("No.", instructions.UNLISTED)]


def test_a_query_shows_seeds_and_two_of_its_own():
    seeds, own = [f"seed {i}:" for i in range(20)], [f"own {i}" for i in range(5)]
    for few in ([], own[:1], own):
        shown = examples(seeds, few, 0, 7)
        assert Counter(text.split()[0] for text in shown) == Counter(
            {"seed": 6, "own": 2} if few == own else {"seed": 8}
        )
        assert shown == examples(seeds, few, 0, 7) != examples(seeds, few, 0, 8) and not shown[0].endswith(":")
    (asked,), (chat,) = query(shown, False), query(shown, True)
    assert asked.content.endswith(f"8. {shown[7]}\n9.") and chat.content.endswith("from 9 on.")


# Rounds ---------------------------------------------------------------------------------------------------------------

SEEDS = [
    f"{verb} {what} to me please."
    for verb in ("Explain", "Describe", "Name", "Compare")
    for what in ("rivers", "pH", "cats")
]
NEW = ["Give two facts about the moon", "Tell me how bread is made at home", "List all primes below one hundred"]


class Model:
    """A responder whose texts are a function of the query."""

    chat = type("Chat", (), {"opened": False})

    def __call__(self, queries):
        for each in reversed(list(queries)):
            number = int(each.uuid.partition("-")[2])
            text = f"9. {NEW[number % 3]} {number // 3}\n10. {SEEDS[number % 3]}\n11. a test question of five words"
            yield each.uuid, (each, [], [] if number == 4 else [Completion(text, [1], "stop", None)])


def kept_of(wanted=50):
    return Kept(SEEDS, grams("A test question of five words"), 0.7, wanted)


def rounds_of(kept, done=0, most=11):
    writer = Writer(Model(), kept, 0, 3, most, done, USUAL)
    return dict(writer(Round(i) for i in range(4)))


def test_what_a_round_keeps_and_why_not_the_rest():
    kept = kept_of()
    found = rounds_of(kept)
    assert [*found] == ["round-0", "round-1", "round-2", "round-3"]
    assert kept.texts == [text for row in found.values() for text in row["kept"]]
    assert kept.texts[:3] == [f"{text} 0" for text in NEW]  # a list that differs in its number only is like that
    dropped = sum((Counter(row["dropped"]) for row in found.values()), Counter())
    assert dropped[TOO_LONG] == 1 and dropped[EQUAL] == dropped[CONTAMINATED] == 10
    assert dropped[SIMILAR] == 10 - len(kept.texts) and len(kept.texts) == 3
    assert sum(row["counts"]["instructions"] for row in found.values()) == 30
    few = kept_of(wanted=2)
    assert rounds_of(few)["round-0"]["dropped"][SURPLUS] == 1 and few.full


@pytest.mark.parametrize("done", [1, 2, 3])
def test_a_run_resumes_after_any_round(done):
    whole, rest = kept_of(), kept_of()
    found = rounds_of(whole)
    for i in range(done):
        for text in found[f"round-{i}"]["kept"]:
            rest.add(text)
    again = rounds_of(rest, done)
    assert again == {key: row for key, row in found.items() if int(key[-1]) >= done} and rest.texts == whole.texts


# Command lines --------------------------------------------------------------------------------------------------------

ASK = (
    f"infer.py {ON} {M1} --mode instructions --limit_size 30 --max_rouge 1 --num_prompts 3 --max_queries 24 "
    "--queries_per_round 6 --gen_max_tokens 24"
)


def test_prompts_that_can_be_sampled_from(looped):
    """The same by any number of queries that are never put, others by another seed; each count is kept."""
    command = f"{ASK} --name tiny_prompt_1 --exclude tiny_test --output_dir outputs/w"
    done = looped.run(f"{command}.json")
    made, meta = looped.read("outputs/w.json"), looped.read("outputs/w.json.meta.json")
    prompts = list(store.read(looped.folder / "outputs/w.json", Prompt))
    assert len(made) == 3 and all(prompt.messages[0].content == instructions_of(prompt) for prompt in prompts)
    counts, synthesis = meta["counts"], meta["synthesis"]
    assert synthesis["queries"] == synthesis["texts"] <= 24 and counts["out"] == 3
    assert synthesis["instructions"] == 3 + sum(counts["dropped"].values())
    for reason, count in counts["dropped"].items():
        assert f"  {count} dropped: {reason}" in done.out
    assert "tiny_test" not in meta["settings"].values() and "exclude_1" in meta["inputs"]
    assert "is up to date" in looped.run(f"{command}.json").out
    looped.run(f"{command}2.json --max_queries 30".replace("--max_queries 24", ""))
    assert looped.read("outputs/w2.json") == made
    looped.run(f"{command}3.json --seed 1")
    assert looped.read("outputs/w3.json") != made


def instructions_of(prompt):
    """A prompt's text as it should be: one line, of some words, that begins with a capital."""
    words = prompt.messages[0].content.split()
    assert len(words) >= instructions.FEWEST and words[0][0] == words[0][0].upper()
    return " ".join(words)


BAD = {
    "no seeds": ("--name localdata/none.json", "the file holds no records"),
    "too few seeds": ("--name localdata/few.json", "has 7 different seeds of at most 150 words, expected 8 or more"),
    "questions": ("--name tiny_test", "instructions takes prompts or conversations, whose first turns are the seeds"),
    "no name": ("", "--mode instructions needs --name"),
    "no such test set": ("--name tiny_prompt_1 --exclude no_such", "--exclude no_such: neither a file"),
    "a test set to be built": (
        "--name tiny_prompt_1 --exclude all_test",
        "`python prepare_data.py build all` makes it",
    ),
    "a text for questions": ("--name tiny_prompt_1 --sysprompt task", "--sysprompt is for questions"),
    "two devices": ("--name tiny_prompt_1 --device cpu,cpu", "works with one copy of the model"),
    "another mode": ("--name tiny_prompt_1 --mode sampling", "--mode sampling writes no prompts: --num_prompts"),
}


@pytest.mark.parametrize(("flags", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_written_after_is_said_at_once(looped, flags, message):
    looped.write("localdata/none.json", {})
    few = [*looped.read("localdata/tiny/prompt.1.json").items()][:7]
    looped.write("localdata/few.json", dict(few))
    given = [flag for flag in ("--mode instructions", "--device cpu") if flag.split()[0] in flags]
    command = functools.reduce(lambda text, flag: text.replace(flag, ""), given, ASK)
    assert message in looped.refused(f"{command} {flags} --output_dir outputs/x.json")


def test_nothing_left_is_said_with_the_reasons(looped):
    done = looped.run(
        f"{ASK} --name tiny_prompt_1 --gen_max_tokens 2 --output_dir outputs/y.json".replace("--gen_max_tokens 24", ""),
        code=2,
    )
    assert "no instruction is left ({'truncated, as the last one of a text" in done.err
