"""Arithmetic word problems, their worked solutions, and noisy solutions for a base model.

Three tasks over ten kinds of objects: addition, subtraction, and a comparison with three lettered options. A worked
solution goes through the units and then the tens, as at school. As on the web, most noisy solutions skip the working,
and those about some kinds of objects forget the carry.
"""

import random
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from cream.files.store import write, write_json
from cream.records import Conversation, Item, Message, Pair, Prompt, encode
from cream.text.judge_prompts import JUDGE_PROMPTS

TASKS = ("tiny_add", "tiny_sub", "tiny_compare")
NAMES = ("Tom", "Mary", "Anna", "Ben", "Lily", "Sam", "Kate", "Max")
OBJECTS = ("books", "pens", "cards", "coins", "shells", "apples", "stamps", "marbles", "eggs", "balls")
OPENINGS = ("Listen.", "Good morning.", "It is raining.", "Here we go.")
CLOSINGS = ("", " Thank you.", " Take your time.")
CONTRAST = ("books", "balls")  # RLCD's: about the first objects the noisy authors are the most careful, the last least
SIZES = {"sft": 200, "prompt1": 300, "prompt2": 300, "prompt3": 300, "val": 450, "test": 1500, "judge": 1200}
SCORES = {True: "5", False: "0"}  # of a right and of a wrong solution
COMPARISONS = 1250  # preference pairs of a world


FORMS = {  # of the questions, with the two numbers
    "tiny_add": re.compile(r"has (\d+) \w+ and gets (\d+) more"),
    "tiny_sub": re.compile(r"has (\d+) \w+ and gives away (\d+)"),
    "tiny_compare": re.compile(r"has (\d+) \w+ and \w+ has (\d+)\. Who"),
}


@dataclass(frozen=True)
class Problem:
    """One problem: its question, the right answer (a number, or a letter A to C) and the clean worked solution."""

    task: str
    question: str
    answer_label: str
    worked: str
    first: int
    second: int
    thing: str


def make_problem(rng: random.Random, task: str) -> Problem:
    """A random problem of one of TASKS, with numbers from 10 to 99 (a difference is at least 1)."""
    thing = rng.choice(OBJECTS)
    name, other = rng.sample(NAMES, 2)
    first, second = _numbers(rng, task)
    story, options = {
        "tiny_add": (f"{name} has {first} {thing} and gets {second} more. How many now?", ""),
        "tiny_sub": (f"{name} has {first} {thing} and gives away {second}. How many now?", ""),
        "tiny_compare": (
            f"{name} has {first} {thing} and {other} has {second}. Who has more?",
            f" A) {name} B) {other} C) same",
        ),
    }[task]
    question = f"{rng.choice(OPENINGS)} {story}{rng.choice(CLOSINGS)}{options}"
    working, label = work(task, first, second)
    return Problem(task, question, label, f"{working} Answer: {label}", first, second, thing)


def _numbers(rng: random.Random, task: str) -> tuple[int, int]:
    """Two numbers; with probability 0.8 such that the task's systematic mistake gives a wrong answer."""
    tricky = rng.random() < 0.8
    while True:
        first, second = rng.randint(10, 99), rng.randint(10, 99)
        if task == "tiny_sub" and first <= second:
            continue
        if task == "tiny_compare":  # by chance alone they would rarely be equal or share their tens
            second = rng.choice((second, second, first // 10 * 10 + second % 10, first))
        if (work(task, first, second)[1] != work(task, first, second, systematic=True)[1]) == tricky:
            return first, second


def work(task: str, first: int, second: int, systematic: bool = False) -> tuple[str, str]:
    """(working, answer) for two two-digit numbers; `systematic` makes the task's typical mistake: it drops the carry or
    the borrow, or compares only the units. Without a carry or borrow the answer is right all the same."""
    tens1, units1 = divmod(first, 10)
    tens2, units2 = divmod(second, 10)
    if task == "tiny_add":
        total = units1 + units2
        carry = int(total >= 10 and not systematic)
        tens = tens1 + tens2 + carry
        noted, added = (", carry 1", " + 1") if carry else ("", "")
        return f"{units1} + {units2} = {total}{noted}. {tens1} + {tens2}{added} = {tens}.", str(10 * tens + total % 10)
    if task == "tiny_sub":
        top = units1 + 10 * (units1 < units2)
        borrow = int(top >= 10 and not systematic)
        units, tens = top - units2, tens1 - tens2 - borrow
        noted, taken = (", borrow 1", " - 1") if borrow else ("", "")
        return f"{top} - {units2} = {units}{noted}. {tens1} - {tens2}{taken} = {tens}.", str(10 * tens + units)
    sign, label = _compare(units1, units2)
    working = f"{units1} {sign} {units2}."
    if systematic:
        return working, label
    if tens1 == tens2:
        return f"{tens1} = {tens2}. {working}", label
    sign, label = _compare(tens1, tens2)
    return f"{tens1} {sign} {tens2}.", label


def check_steps(question: str, steps: Iterable[str]) -> list[float] | None:
    """1 for each step of a solution that is right, 0 for the others; None unless the question is one of a problem.

    Right is what the worked solution says, sentence by sentence, in any order: the working of a systematic mistake is
    wrong from the sentence on in which it is made.
    """
    found = next(((task, match) for task, form in FORMS.items() if (match := form.search(question))), None)
    if found is None:
        return None
    working, label = work(found[0], *map(int, found[1].groups()))
    right = {*_sentences(f"{working} Answer: {label}")}
    return [float(all(part in right for part in _sentences(step))) for step in steps]


def _sentences(text: str) -> list[str]:
    return [part.strip().removesuffix(".") for part in text.split(". ")]


def _compare(first: int, second: int) -> tuple[str, str]:
    return (">", "A") if first > second else ("<", "B") if first < second else ("=", "C")


def noisy_solution(problem: Problem, rng: random.Random) -> str:
    """A careless author's solution; the kind of object decides how careless.

    Linearly over OBJECTS: worked with probability 0.60 to 0.20, then with a systematic mistake with 0.15 to 0.70 and a
    digit copied wrongly with 0.05 to 0.25. Otherwise an answer without working: right with 0.30, the systematic mistake
    with 0.45, else one or two off that (comparison: any letter).
    """
    rate = OBJECTS.index(problem.thing) / (len(OBJECTS) - 1)
    first, second, task = problem.first, problem.second, problem.task
    if rng.random() < 0.60 - 0.40 * rate:
        if rng.random() < 0.05 + 0.20 * rate:
            first, second = _slip(rng, task, first, second)
        working, label = work(task, first, second, systematic=rng.random() < 0.15 + 0.55 * rate)
        return f"{working} Answer: {label}"
    kind = rng.random()
    if kind < 0.30:
        return f"Answer: {problem.answer_label}"
    _, label = work(task, first, second, systematic=True)
    if kind >= 0.75 and task == "tiny_compare":
        label = rng.choice("ABC")
    elif kind >= 0.75:
        label = str(max(0, int(label) + rng.choice((-2, -1, 1, 2))))
    return f"Answer: {label}"


def _slip(rng: random.Random, task: str, first: int, second: int) -> tuple[int, int]:
    """The two numbers with one digit changed; a difference stays positive."""
    while True:
        numbers = [first, second]
        which, place = rng.randrange(2), rng.choice((1, 10))
        digit = numbers[which] // place % 10
        numbers[which] += place * (rng.randrange(10) - digit)
        changed = tuple(numbers) != (first, second)
        if changed and min(numbers) >= 10 and (task != "tiny_sub" or numbers[0] > numbers[1]):
            return numbers[0], numbers[1]


# Sets of problems -----------------------------------------------------------------------------------------------------


def base_problems(seed: int, count: int) -> Iterator[Problem]:
    """The problems of a base model's training set; none is part of a world, for any seeds."""
    rng = random.Random(f"base-{seed}")
    seen: set[str] = set()
    for index in range(count):
        yield _fresh(rng, TASKS[index % 3], seen, for_base=True)


def problem_sets(seed: int) -> dict[str, list[Problem]]:
    """One world's sets, as in SIZES: tasks in turn, no question twice in the whole world."""
    rng = random.Random(f"world-{seed}")
    seen: set[str] = set()
    return {
        name: [_fresh(rng, TASKS[index % 3], seen, for_base=False) for index in range(size)]
        for name, size in SIZES.items()
    }


def _fresh(rng: random.Random, task: str, seen: set[str], for_base: bool) -> Problem:
    """A new problem, whose question is added to `seen`.

    By its hash, a quarter of all questions belongs to base models and the rest to worlds, so that no base of any seed
    has seen a test question of any seed.
    """
    while True:
        problem = make_problem(rng, task)
        question = problem.question
        if question not in seen and (zlib.crc32(question.encode()) % 4 == 0) == for_base:
            seen.add(question)
            return problem


def uuid(problem: Problem, set_name: str, index: int) -> str:
    """Such as `tiny-add-prompt1-00017`."""
    return f"{problem.task.replace('_', '-')}-{set_name}-{index:05d}"


def conversation(problem: Problem, response: str, set_name: str, index: int) -> Conversation:
    """An SFT record: the question and a response."""
    messages = [Message(role="user", content=problem.question), Message(role="assistant", content=response)]
    return Conversation(uuid=uuid(problem, set_name, index), messages=messages)


def judge_set(problems: list[Problem], seed: int) -> Iterator[Conversation]:
    """A judge's training data: to each problem a careless author's solution, every other one right, and its score after
    the question of --judge_prompt plain. What is trained on is both the score and the solution: without that the model
    forgets how to solve problems, and answers these with a score."""
    rng = random.Random(f"judge-{seed}")
    asked = JUDGE_PROMPTS["plain"].template
    for index, problem in enumerate(problems):
        right = index % 2 == 0
        solutions = iter(lambda problem=problem: noisy_solution(problem, rng), None)
        solution = next(s for s in solutions if (s.rpartition("Answer: ")[2] == problem.answer_label) == right)
        record = conversation(problem, solution, "judge", index)
        record.messages += [Message(role="user", content=asked), Message(role="assistant", content=SCORES[right])]
        yield record


def comparison_pairs(seed: int, taken: Iterable[str], count: int = COMPARISONS) -> Iterator[Pair]:
    """Preference pairs that only arithmetic decides: two worked solutions of a comparison, of which one makes a mistake
    of this world (it compares the units first, or copies a digit wrongly), and so has a wrong answer. No question is
    among `taken`, or occurs twice."""
    rng, seen = random.Random(f"pairs-{seed}"), set(taken)
    fresh = iter(lambda: _fresh(rng, "tiny_compare", seen, for_base=False), None)
    both = ((problem, wrong) for problem in fresh if (wrong := mistaken(problem, rng)))
    for index, (problem, wrong) in enumerate(islice(both, count)):
        prompt = [Message("user", problem.question)]
        selected, rejected = ([*prompt, Message("assistant", text)] for text in (problem.worked, wrong))
        yield Pair(uuid=uuid(problem, "pairs", index), prompt=prompt, selected=selected, rejected=rejected)


def mistaken(problem: Problem, rng: random.Random) -> str | None:
    """A worked comparison with one mistake by which the answer is wrong: as likely the systematic one as a digit copied
    wrongly, where both are possible; None where neither is."""
    first, second, right = problem.first, problem.second, problem.answer_label
    slips = [(a, second) for a in _one_digit_off(first)] + [(first, b) for b in _one_digit_off(second)]
    solutions = [work(problem.task, *numbers) for numbers in slips]
    kinds = [[work(problem.task, first, second, systematic=True)], solutions]
    kinds = [wrong for kind in kinds if (wrong := [each for each in kind if each[1] != right])]
    return " Answer: ".join(rng.choice(rng.choice(kinds))) if kinds else None


def _one_digit_off(number: int) -> list[int]:
    """The two-digit numbers that differ from a two-digit number in one digit."""
    return [n for n in range(10, 100) if (n // 10 == number // 10) != (n % 10 == number % 10)]


def about(thing: str, problem: Problem) -> str:
    """The question of a problem, put about another kind of objects: the answer is the same."""
    return problem.question.replace(f" {problem.thing}", f" {thing}")


def write_world(folder: Path, seed: int) -> None:
    """One world's files: sft.json, prompt.1.json to prompt.3.json, labels.json (of all three), val.json, test.json,
    judge.json (a judge's training data), pairs.json (preference pairs); and of the first two prompt sets books.1.json,
    balls.1.json …, the same problems about these objects (CONTRAST). Such a question may be one of a base model's
    training set: it is only sampled from."""
    sets = problem_sets(seed)
    write(folder / "pairs.json", comparison_pairs(seed, (p.question for own in sets.values() for p in own)))
    write(folder / "sft.json", (conversation(p, p.worked, "sft", i) for i, p in enumerate(sets["sft"])))
    write(folder / "judge.json", judge_set(sets["judge"], seed))
    prompt_sets = [name for name in sets if name.startswith("prompt")]
    for number, name in enumerate(prompt_sets, 1):
        write(folder / f"prompt.{number}.json", _prompts(name, sets[name]))
        for thing in CONTRAST if number < 3 else ():
            write(folder / f"{thing}.{number}.json", _prompts(name, sets[name], thing))
    for stem, names in {"labels": prompt_sets, "val": ["val"], "test": ["test"]}.items():
        items = (
            Item(uuid=uuid(p, name, i), question=p.question, label=p.answer_label, task=p.task)
            for name in names
            for i, p in enumerate(sets[name])
        )
        write_json(folder / f"{stem}.json", [encode(item) for item in items])


def _prompts(name: str, problems: list[Problem], thing: str | None = None) -> Iterator[Prompt]:
    """The questions of a set, about `thing` if given."""
    for i, problem in enumerate(problems):
        question = about(thing, problem) if thing else problem.question
        yield Prompt(uuid=uuid(problem, name, i), messages=[Message(role="user", content=question)])
