"""Similarity of texts, and the split of prompts over the rounds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cream.data.build import shuffled, subsets
from cream.text.overlap import CONTAMINATED, EQUAL, SIMILAR, grams, share, sift, words

TEXTS = st.lists(st.sampled_from("ab"), max_size=40).map(" ".join)  # of two words: many runs are shared


# Overlap --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ("What is 3+4?", ["what", "is", "3", "+", "4"]),
        ("What is 3 * 4", ["what", "is", "3", "*", "4"]),
        ("a well-known fact: 7 - 5, -2", ["a", "well", "known", "fact", "7", "-", "5", "-", "2"]),
        ("Über  uns;\n«naïve»", ["über", "uns", "naïve"]),
        ("C# or C++?", ["c", "#", "or", "c", "+", "+"]),
        ("snake_case", ["snake", "case"]),
        ("🙂", ["🙂"]),
    ],
)
def test_words(text, expected):
    assert words(text) == expected


def number_words(count: int, start: int = 0) -> str:
    return " ".join(f"w{i}" for i in range(start, start + count))


def test_runs_of_thirteen_words_worked_by_hand():
    assert [len(grams(number_words(count))) for count in (1, 12, 13, 14, 40)] == [1, 1, 1, 2, 28]
    whole, changed = number_words(40), number_words(20) + " other " + number_words(19, 21)
    assert share(grams(changed), grams(whole)) == 15 / 28  # runs that begin at 0 … 7 and 21 … 27
    assert not grams(number_words(12)) & grams(number_words(13))  # a short text is compared as a whole
    assert grams("Predators eat:\n  grass!") == grams("predators eat grass")


def test_the_documented_example(repo):
    page = (repo / "docs/data.md").read_text()
    train = page.partition("\n> ")[2].partition("\n")[0]
    test = grams(train.replace("organism", "organisms"))
    assert "8 of its 15 runs" in page and (len(grams(train) & test), len(grams(train))) == (8, 15)
    assert list(sift([train], test)) == [CONTAMINATED]


def brute(texts: list[str], tests: list[str]) -> list[str | None]:
    """The rules again, on tuples of words, without hashes or sets that grow."""

    def runs(text):
        found = words(text)
        return [tuple(found[i : i + 13]) for i in range(len(found) - 12)] or [tuple(found)]

    told, kept = [], []
    for text in texts:
        own = {*runs(text)}
        if any(run in runs(test) for run in own for test in tests):
            told.append(CONTAMINATED)
        elif any(words(text) == words(other) for other in kept):
            told.append(EQUAL)
        elif sum(any(run in runs(other) for other in kept) for run in own) >= len(own) / 2:
            told.append(SIMILAR)
        else:
            told.append(None)
            kept.append(text)
    return told


@given(st.lists(TEXTS, max_size=8), st.lists(TEXTS, max_size=2))
def test_sifting_equals_the_rules_by_brute_force(texts, tests):
    known = set().union(*map(grams, tests))
    assert list(sift(texts, known)) == brute(texts, tests)


def test_a_text_is_compared_with_kept_ones_only():
    first, second, third = number_words(40), number_words(40, 20), number_words(40, 40)
    assert list(sift([first, second, third], set())) == [None, None, None]  # each shares 8 of 28 runs with the last
    long = number_words(60)
    assert list(sift([first, long, second], set())) == [None, SIMILAR, None]  # 28 of 48; `long` is no reason for more
    assert list(sift([first, second], grams(number_words(13)))) == [CONTAMINATED, None]


# Subsets --------------------------------------------------------------------------------------------------------------


TASKS = st.dictionaries(st.sampled_from("abcd"), st.integers(0, 30), max_size=4).map(
    lambda sizes: {task: [f"{task}-{i}" for i in range(size)] for task, size in sizes.items()}
)


@given(TASKS, st.integers(1, 5), st.integers(0, 2**32 - 1), st.randoms())
def test_subsets_are_disjoint_whole_balanced_and_independent_of_order(tasks, count, seed, chance):
    parts = subsets(tasks, count, seed)
    everything = sorted(uuid for uuids in tasks.values() for uuid in uuids)
    assert len(parts) == count and sorted(uuid for part in parts for uuid in part) == everything
    for uuids in [*tasks.values(), everything]:
        sizes = [len({*part} & {*uuids}) for part in parts]
        assert max(sizes) - min(sizes) <= 1
    mixed = [(task, chance.sample(uuids, len(uuids))) for task, uuids in tasks.items()]
    chance.shuffle(mixed)
    assert subsets(dict(mixed), count, seed) == parts


def test_the_seed_decides_and_the_beginning_of_a_subset_is_a_sample_of_it():
    tasks = {task: [f"{task}{i}" for i in range(300)] for task in "ab"}
    first, other = subsets(tasks, 3, 0), subsets(tasks, 3, 1)
    assert first != other
    assert 20 < sum(uuid[0] == "a" for uuid in first[0][:60]) < 40
    assert shuffled(["x", "y", "z"], 0) == shuffled(["z", "y", "x"], 0)
