"""SPIN and RLCD by their command lines: samples of SFT data's prompts, system prompts from files, pairs without
rewards, and what these are tokenised as."""

import copy
from collections import Counter

import pytest
from workspace import LOOP, M1, M2, ON

from cream.engines.options import SamplingFlags
from cream.errors import UserError
from cream.evaluation.evaluate import plan_evaluation
from cream.evaluation.grade import DEFAULT
from cream.evaluation.options import EvaluationFlags
from cream.evaluation.questions import Questions
from cream.files.store import read
from cream.records import Item, Message, Pair, Samples
from cream.text.chat import Chat
from cream.text.prompts import SYSPROMPTS, Sysprompt, load
from cream.training.stages.dpo import Options, Stage

GOOD, BAD = "You take your time.", "You guess.\n"
SAMPLE = f"infer.py {ON} --gen_n 2 --gen_max_tokens 48 --gen_temperature 1.0 --limit_size 8"
SFT = "localdata/tiny/sft.json"


@pytest.fixture(scope="module")
def world(looped):
    """Samples of two models to the prompts of SFT data, and of one to the same prompts with two system prompts."""
    for name, text in {"good": GOOD, "bad": BAD, "empty": " \n"}.items():
        (looped.folder / f"{name}.txt").write_text(text)
    for name, flags in {
        "round1": f"{M1} --name tiny_sft",
        "round2": f"{M2} --name tiny_sft",
        "good": f"{M1} --name tiny_prompt_1 --sysprompt good.txt",
        "bad": f"{M1} --name tiny_prompt_1 --sysprompt bad.txt",
    }.items():
        looped.out = looped.run(f"{SAMPLE} {flags} --output_dir outputs/{name}.json").out
    return looped


def pairs(world, name):
    return list(read(world.folder / f"outputs/{name}.json", Pair)), world.read(f"outputs/{name}.json.meta.json")


def test_spin_from_sft_data_to_pairs(world):
    command = f"make_pairs.py --strategy spin --conversations {SFT} --samples outputs/round1.json,outputs/round2.json"
    done = world.run(f"{command} --output outputs/spin.json")
    made, about = pairs(world, "spin")
    data = world.read(SFT)
    by_round = [world.read(f"outputs/round{t}.json") for t in (1, 2)]
    assert {p.uuid.partition("#")[0] for p in made} <= by_round[0].keys() <= data.keys() and len(made) > 8
    for pair in made:
        uuid = pair.uuid.partition("#")[0]
        assert pair.selected == [Message(**m) for m in data[uuid]]
        assert any(pair.rejected[-1].content in one[uuid]["responses"] for one in by_round)
    assert about["policy"]["checkpoint"] == f"{LOOP}/m2/checkpoint-last" and about["method"] == "original"
    assert about["inputs"].keys() == {"samples", "samples@-1", "conversations"} and about["mean_consistency"] is None
    assert about["counts"]["dropped"]["no sample of the conversation"] == len(data) - 8
    assert "possible pairs" in done.out and "has a consistency" not in done.out
    (train,) = done.commands()
    assert f"{M2} " in train and "max_length" not in train
    assert "is up to date" in world.run(f"{command} --output outputs/spin.json").out
    on = f"train.py {ON} --name outputs/spin.json --output_dir outputs/x"
    assert "would train" in world.run(f"{on} {M2} --loss hinge --dry_run").out
    assert "its pairs were made for" in world.refused(f"{on} {M1}")


def test_rlcd_from_two_system_prompts_to_pairs(world):
    for name, text in (("good", GOOD), ("bad", BAD.strip())):
        samples = list(read(world.folder / f"outputs/{name}.json", Samples))
        assert all(s.prompt == [Message("system", text), *s.source_prompt] for s in samples) and len(samples) == 8
        about = world.read(f"outputs/{name}.json.meta.json")
        assert "sysprompt" in about["inputs"] and "sysprompt" not in about["settings"]
    world.run(
        "make_pairs.py --strategy contrast --positive outputs/good.json --negative outputs/bad.json "
        "--max_pairs_per_prompt 1 --output outputs/contrast.json"
    )
    made, about = pairs(world, "contrast")
    prompts = world.read("localdata/tiny/prompt.1.json")
    assert made and all(p.prompt == [Message(**m) for m in prompts[p.uuid]] and p.source_prompt is None for p in made)
    assert about["policy"]["checkpoint"] == f"{LOOP}/m1/checkpoint-last" and about["strategy"] == "contrast"


def test_a_system_prompt_is_known_by_its_content(world):
    again = f"{SAMPLE} {M1} --name tiny_prompt_1 --output_dir outputs/good.json --sysprompt"
    (world.folder / "moved.txt").write_text((world.folder / "good.txt").read_text())
    assert "is up to date" in world.run(f"{again} moved.txt").out
    assert "sysprompt: " in world.refused(f"{again} bad.txt")


MISTAKES = {
    "no samples": (f"--strategy spin --conversations {SFT}", "--strategy spin: it needs --samples"),
    "rewards": (f"--strategy spin --conversations {SFT} --rewards x.json", "it does not read --rewards"),
    "a margin": (
        f"--strategy spin --conversations {SFT} --samples outputs/round1.json --margin 1",
        "--margin compares",
    ),
    "a method": ("--strategy contrast --method consistency_avg", "--method consistency_avg needs pairs with a confi"),
    "one round twice": (
        f"--strategy spin --conversations {SFT} --samples outputs/round1.json,outputs/round1.json",
        "are the same file",
    ),
    "a missing name": (f"--strategy spin --conversations {SFT} --samples outputs/round1.json,", "expected FILE or FIL"),
    "prompts as data": (
        "--strategy spin --conversations localdata/tiny/prompt.1.json --samples outputs/round1.json",
        "--conversations localdata/tiny/prompt.1.json holds prompts; it should hold conversations",
    ),
    "other data": (f"--strategy spin --conversations {SFT} --samples outputs/good.json", "no pair can be made"),
    "one system prompt": (
        "--strategy contrast --positive outputs/good.json --negative outputs/same.json",
        "were sampled from the same prompt, so that there is no contrast",
    ),
    "two models": (
        "--strategy contrast --positive outputs/good.json --negative outputs/round2.json",
        "--positive and --negative were sampled from different models",
    ),
}


@pytest.mark.parametrize(("flags", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_refused(world, flags, message):
    same = (world.folder / "outputs/good.json").read_text()
    (world.folder / "outputs/same.json").write_text(same.replace("\n}", " \n}"))  # the same samples, another file
    error = world.refused(f"make_pairs.py {flags} --output outputs/x.json")
    assert message in error and error.count("error: ") <= 1


def test_system_prompts_that_cannot_be_read_are_refused(world):
    for text, message in {
        "tsk": "neither a file nor one of auto, none, task; did you mean task?",
        "empty.txt": "the file holds no text",
        "outputs": "neither a file",
    }.items():
        error = world.refused(f"{SAMPLE} {M1} --name tiny_prompt_1 --output_dir outputs/x.json --sysprompt {text}")
        assert f"--sysprompt {text}: {message}" in error


# In process ----------------------------------------------------------------------------------------------------------

REWRITING = (  # as Qwen3's: a response gets an empty thought once it is part of a conversation, and is trimmed
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content | trim }}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_each_response_is_tokenised_by_its_origin(tiny_tokenizer):
    """The data's as the template writes it, as in SFT; a sample as it was sampled."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = REWRITING.replace("<end>", "{{ eos_token }}")
    chat = Chat(tokenizer)
    prompt = [Message("user", "2 + 3?")]
    one = {"prompt": prompt, "selected": [*prompt, Message("assistant", " 5")]}
    one["rejected"] = [*prompt, Message("assistant", " 6")]
    written, sampled = "<think>\n\n</think>\n\n5", " 6"
    for indices, expected in (
        ({"rejected_index": 0}, (written, sampled)),
        ({"selected_index": 0, "rejected_index": 0}, (" 5", sampled)),
        ({}, (written, "<think>\n\n</think>\n\n6")),
    ):
        pair = Pair(uuid="p", **one, **indices)
        ((_, example),) = Stage(Options(), {}).prepare([pair], chat, 512, dropped := Counter())
        assert not dropped
        for tokens, text in zip((example.chosen, example.rejected), expected, strict=True):
            ((start, end),) = tokens.spans
            assert chat.decode(tokens.ids[start:end]) == text + tokenizer.eos_token
    (pair,) = [Pair(uuid="p", **one, rejected_index=0)]
    ((_, example),) = Stage(Options(), {}).prepare([pair], chat, 512, Counter())
    (row,) = chat.encode_conversation(pair.selected)
    assert example.chosen == row  # as SFT has it


def test_a_system_prompt_goes_behind_an_existing_one():
    added = Sysprompt(system=GOOD)
    question, own = Message("user", "2 + 3?"), Message("system", "Be brief.")
    assert added.apply([question]) == [Message("system", GOOD), question]
    assert added.apply([own, question]) == [Message("system", f"Be brief.\n\n{GOOD}"), question]
    assert Sysprompt("task").apply([own, question])[1].content == f"2 + 3?\n\n{SYSPROMPTS['task']}"
    assert Sysprompt().apply([own, question]) == [own, question]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}", "no system role"),
        ("{% set messages = messages if messages[0].role != 'system' else messages[1:] %}", "leaves the system messa"),
    ],
    ids=["refused", "left out"],
)
def test_a_template_without_system_messages_is_refused(tiny_tokenizer, template, message):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = template + tiny_tokenizer.chat_template
    chat = Chat(tokenizer)
    Sysprompt("task").check(chat, "task")
    with pytest.raises(UserError, match=f"--sysprompt f.txt: .*{message}"):
        Sysprompt(system=GOOD).check(chat, "f.txt")


def test_evaluation_has_the_system_prompt_too(tmp_path):
    """With the task's own text at the end of the question; not where there are no turns."""
    (tmp_path / "good.txt").write_text(GOOD, encoding="utf-8")
    given = str(tmp_path / "good.txt")
    assert load(given) == Sysprompt(system=GOOD)
    item = Item(uuid="a", question="Which?\nA. x\nB. y", label="A", task="arc_easy")
    questions = Questions({"a": item}, {}, {}, 0, [])

    def plan(**flags):
        flags = EvaluationFlags(**flags)
        return plan_evaluation(questions, flags, DEFAULT, SamplingFlags(gen_n=1, sysprompt=given), {}, 0).requests["a"]

    system, asked = plan().messages
    assert system == Message("system", GOOD) and asked.content.endswith(SYSPROMPTS["task"])
    assert plan(scoring="loglikelihood", prompt_format="chat").prompt == [system, Message("user", item.question)]
    with pytest.raises(UserError, match="--prompt_format plain has no system message"):
        plan(scoring="loglikelihood")
