"""Judge-training data: which responses count, how they are balanced, and the command with the training after it."""

import json
import re
import shutil
from collections import Counter

import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from cream.data import forms
from cream.data.judgements import (
    NO_SCORE,
    OTHERWISE,
    UNRANKED,
    agreeing,
    balanced,
    most_of_each,
    prompts_of,
    targets,
)
from cream.errors import UserError
from cream.files import store
from cream.model.load import load_chat
from cream.records import Conversation, Message, Rewards, Samples
from cream.rewards import judge
from cream.text.overlap import whole
from cream.training.stages import sft

VALUES = st.lists(st.one_of(st.none(), st.sampled_from([0.0, 1.0, 1.5, 4.0])), min_size=0, max_size=5)


@given(VALUES, st.data())
def test_the_whole_ranking_agrees_or_none_of_it_counts(rewards, data):
    """As scipy's dense ranks are the same, over all that people ranked."""
    gold = data.draw(
        st.lists(st.one_of(st.none(), st.sampled_from([-2.0, -1.0, 0.0])), min_size=len(rewards), max_size=len(rewards))
    )
    kept, lost = agreeing(rewards, gold, "ranking")
    ranked = [i for i, value in enumerate(gold) if value is not None]
    mine = [rewards[i] for i in ranked]
    same = (
        None not in mine
        and len(ranked) > 1
        and all(scipy.stats.rankdata(mine, "dense") == scipy.stats.rankdata([gold[i] for i in ranked], "dense"))
    )
    assert kept == (ranked if same else []) and len(kept) + lost.total() == len(rewards) and 0 not in lost.values()


@given(VALUES, st.data())
def test_or_each_response_at_its_own_position(rewards, data):
    gold = data.draw(st.lists(st.sampled_from([-2.0, -1.0, 0.0]), min_size=len(rewards), max_size=len(rewards)))
    kept, lost = agreeing(rewards, gold, "position")
    known = [i for i, reward in enumerate(rewards) if reward is not None]
    places = [scipy.stats.rankdata([values[i] for i in known]) if known else [] for values in (rewards, gold)]
    same = [i for i, a, b in zip(known, *places, strict=True) if a == b]
    assert kept == (same if len(gold) > 1 else []) and len(kept) + lost.total() == len(rewards)


def test_why_responses_do_not_count():
    assert agreeing([1.0, 2.0], [-1.0, None], "ranking") == ([], {UNRANKED: 2})
    assert agreeing([1.0, None, 2.0], [-2.0, -1.0, 0.0], "ranking") == ([], {NO_SCORE: 3})
    assert agreeing([1.0, None, 2.0], [-2.0, None, 0.0], "ranking") == ([0, 2], {UNRANKED: 1})
    assert agreeing([3.0, 3.0], [-2.0, 0.0], "ranking") == ([], {OTHERWISE: 2})  # a tie is no order


@given(st.lists(st.integers(1, 40), max_size=6), st.one_of(st.none(), st.integers(1, 120)))
def test_no_score_has_more_than_its_share(counts, total):
    most = most_of_each(counts, total)
    left = [min(count, most) for count in counts]
    if total is None:
        assert sorted(counts)[-2:-1] in ([], [most])
        return
    assert sum(left) <= total
    assert most >= max(counts, default=0) or sum(min(count, most + 1) for count in counts) > total


def test_the_frequent_score_is_thinned_by_the_seed():
    kept = [
        Conversation(
            uuid=f"{score}-{i}", messages=[Message("user", "?"), Message("assistant", "!")], extra={"score": score}
        )
        for score, count in ((4.0, 30), (3.5, 2), (3.0, 4), (1.0, 1))
        for i in range(count)
    ]
    first, again, other = (balanced(kept, None, seed) for seed in (0, 0, 1))
    assert Counter(int(each.extra["score"]) for each in first) == {4: 6, 3: 6, 1: 1}
    assert first == again and first != other and first == [each for each in kept if each in first]


def test_prompts_of_a_conversation_are_all_that_it_responds_to():
    turns = [
        Message(role, text)
        for role, text in (("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "2"))
    ]
    found = prompts_of([Conversation(uuid="a", messages=turns)])
    assert found == {whole("one"), whole("one two")}


def options_of(**flags):
    options = judge.Options(**flags)
    judge.check(options)
    return options


def judged(said, scores, responses=("good", "bad"), uuid="a"):
    """A record of rewards: what the judge said of each response, k texts, and the scores in them."""
    prompt = [Message("user", f"Question {uuid}?")]
    means = [[s for s in row if s is not None] for row in scores]
    return Rewards(
        uuid=uuid,
        prompt=prompt,
        response=[[*prompt, Message("assistant", text)] for text in responses],
        reward=[sum(row) / len(row) if row else None for row in means],
        parts={"scores": scores},
        texts={f"judge_{k + 1}": [row[k] for row in said] for k in range(len(said[0]))},
    )


def test_the_target_is_the_judgement_nearest_to_the_mean_up_to_its_score():
    said = [
        ["It is.\nScore: 5", "<think>5?</think>Good.\nScore: **4** points\nMore?", "Score: 4"],
        ["?", "Score: 1", "Score: 2"],
    ]
    options = options_of()
    first, second = targets(judged(said, [[5.0, 4.0, 4.0], [None, 1.0, 2.0]]), [0, 1], options)
    assert (first.uuid, first.extra, first.messages[-1].content) == (
        "a#0",
        {"score": 4.0},
        "Good.\nScore: **4** points",
    )
    assert second.messages[-1].content == "Score: 1" and not first.only_last
    sample = Samples(prompt=[Message("user", "Question a?")], responses=["good", "bad"])
    asked = judge.requests("judge", sample, options)
    assert [each.messages[:-1] for each in (first, second)] == [each.messages for each in asked]


def test_a_response_that_is_a_turn_is_not_trained_on():
    (found,) = targets(judged([["3"], ["1"]], [[3.0], [1.0]]), [1], options_of(judge_prompt="plain", judge_samples=1))
    assert [m.content for m in found.messages] == ["Question a?", "bad", "Score?", "1"] and found.only_last


def test_only_the_last_response_is_trained_on(repo):
    (record,) = targets(judged([["3"], ["1"]], [[3.0], [1.0]]), [1], options_of(judge_prompt="plain", judge_samples=1))
    chat = load_chat(repo / "assets/tiny_m0")
    (_, rows), (_, plain) = sft.Stage(sft.Options(), {}).prepare(
        [record, Conversation(messages=record.messages)], chat, 100, Counter()
    )
    assert [chat.decode(rows[0].ids[a:b]) for a, b in rows[0].spans] == ["1<end>"]
    assert rows[0].ids == plain[0].ids and rows[0].spans == plain[0].spans[1:]
    assert "cannot say" in str(pytest.raises(UserError, forms.export_row, record, "trl").value)


# Command lines --------------------------------------------------------------------------------------------------------

JUDGE = (
    "rewarding.py --device cpu --model tiny --reward judge --judge_prompt outputs/q.jinja --judge_parse '(\\d)' "
    "--valid_reward 0:9 --judge_max_tokens 12 --judge_samples 2 --on_unparsed continue --output outputs/judged.json"
)
EFT = "prepare_data.py eft outputs/judged.json --agree position --output outputs/eft.sft.json"


@pytest.fixture(scope="module")
def world(workspace):
    """Responses that people ranked, as the tiny base model judges them."""
    (workspace.folder / "outputs").mkdir(exist_ok=True)
    (workspace.folder / "outputs/q.jinja").write_text("{{ prompt }} {{ response }} How many?")
    rows = [
        {"id": f"r{i}", "prompt": f"What is {i} + 4?", "ranked": [f"Answer: {i + 4}", f"Answer: {i}"], "ranks": [0, 1]}
        for i in range(12)
    ]
    workspace.write("outputs/rows.json", rows)
    columns = "--columns responses=ranked,ranks=ranks --output outputs/human.json"
    workspace.run(f"prepare_data.py import outputs/rows.json {columns}")
    workspace.run(f"{JUDGE} --input_file outputs/human.json")
    seeds = {"s": [{"role": "user", "content": "What is 3 +  4?"}, {"role": "assistant", "content": "7"}]}
    workspace.write("outputs/seeds.json", seeds)
    return workspace


def test_the_command_writes_all_parts_without_the_seed_set_s_prompts(world):
    out = world.run(f"{EFT} --seed_data outputs/seeds.json --held_out 0.4 --with_seed").out
    train, held, again = (world.read(f"outputs/eft.{part}.json") for part in ("sft", "held_out.sft", "held_out.ranked"))
    assert "7 prompts to train on, 4 held out" in out and "2 responses dropped: its prompt is in --seed_data" in out
    assert len(again) == 4 and all(record["ranks"] == [0, 1] for record in again.values())
    assert train.pop("s") and train and held
    parts = [{uuid.partition("#")[0] for uuid in part} for part in (train, held)]
    assert parts[1] <= again.keys() and not parts[0] & again.keys() and "r3" not in parts[0] | again.keys()
    judged = world.read("outputs/judged.json")
    for uuid, record in (train | held).items():
        prompt, _, i = uuid.partition("#")
        said = [text[int(i)] for text in judged[prompt]["texts"].values()]
        request, target = record["messages"]
        assert any(text.startswith(target["content"]) for text in said)
        assert record["score"] == int(re.findall(r"\d", target["content"])[-1])
        assert (
            request["content"]
            == f"What is {prompt[1:]} + 4? {judged[prompt]['response'][int(i)][-1]['content']} How many?"
        )
    meta = world.read("outputs/eft.sft.json.meta.json")
    assert meta["judge"]["judge_prompt"] == "outputs/q.jinja" and meta["judge"]["valid_reward"] == "0:9"
    assert sum(meta["scores"]["train"].values()) == len(train) and meta["counts"]["dropped"]
    assert [*store.read(world.folder / "outputs/eft.sft.json", Conversation)]
    assert "is up to date" in world.run(f"{EFT} --seed_data outputs/seeds.json --held_out 0.4 --with_seed").out


def test_a_checkpoint_knows_the_form_that_it_was_trained_on(world):
    """It is that of its data, else of the model that training started from; another one is refused."""
    from cream.training.saving import trained_forms

    world.run(f"{EFT.replace('eft.sft', 'own.sft')} --seed_data none")
    folder, data = world.folder / "outputs/m1", world.folder / "outputs/own.sft.json"
    shutil.copytree(world.folder / "assets/tiny_m0", folder)
    assert trained_forms(data, folder) == {"judge": world.read("outputs/own.sft.json.meta.json")["judge"]}
    assert trained_forms(world.folder / "outputs/seeds.json", folder) == {}
    (folder / "cream.json").write_text(json.dumps({"kind": "policy"} | trained_forms(data, folder)))
    assert trained_forms(world.folder / "outputs/seeds.json", folder) == trained_forms(data, folder)
    ask = f"{JUDGE} --input_file outputs/human.json --checkpoint outputs/m1 --dry_run".replace("judged", "other")
    world.run(ask)
    other = ask.replace("outputs/q.jinja", "rating")
    assert "was trained as a judge with --judge_prompt outputs/q.jinja, and here it is rating" in world.refused(other)
    world.run(f"{other} --force")


BAD = {
    "samples": ("eft outputs/human.json", "holds prompts with responses"),
    "no words": ("eft outputs/loose.json", "it has no sidecar"),
    "no ranks": ("eft outputs/judged.json --ranks outputs/others.json", "none of its uuids"),
    "ranks of others": ("eft outputs/judged.json --ranks outputs/some.json", "no record has `ranks`"),
    "seeds that are none": ("eft outputs/judged.json --seed_data outputs/human.json", "holds prompts with responses"),
    "no such seeds": ("eft outputs/judged.json", "--seed_data oasst_sft: "),
    "no words any more": ("eft outputs/changed.json --force", "lacks what the judge said of its responses"),
    "an unknown name": ("eft outputs/judged.json --seed_data no_such", "--seed_data no_such: neither"),
    "nothing left": ("eft outputs/judged.json --seed_data outputs/all.json", "Build a smaller seed set"),
    "a flag of another command": ("overlap a.json b.json --agree position", "overlap does not use --agree"),
}


@pytest.mark.parametrize(("command", "message"), BAD.values(), ids=BAD)
def test_what_cannot_train_a_judge_is_said_at_once(world, command, message):
    judged = world.read("outputs/judged.json")
    world.write("outputs/loose.json", judged)
    world.write("outputs/changed.json", {uuid: {**record, "parts": {}} for uuid, record in judged.items()})
    world.write("outputs/changed.json.meta.json", world.read("outputs/judged.json.meta.json"))
    world.write("outputs/some.json", {uuid: {"messages": []} for uuid in judged})
    world.write("outputs/others.json", {"x": {"ranks": [0, 1]}})
    chat = [{"role": "assistant", "content": "!"}]
    world.write("outputs/all.json", {uuid: record["prompt"] + chat for uuid, record in judged.items()})
    command += "" if "seed_data" in command + message or "overlap" in command else " --seed_data none"
    assert message in world.refused(f"prepare_data.py {command}")
