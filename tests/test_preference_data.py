"""Preference data: which pairs are valid, which pairs scored responses make, ratings, steps, mixtures and RRM."""

import copy
import json
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

import prepare_data
from config import Run
from cream.data import columns, importing, making, mix, preferences, ratings, rrm, steps, table
from cream.data.importing import Preferences, Table
from cream.data.preferences import Selection
from cream.errors import UserError
from cream.files import store
from cream.pairs import validity
from cream.records import Message, Pair, Ratings, Rewards, Samples, Steps, encode
from cream.text import held_out
from cream.text.chat import Chat

SHARED = Path(__file__).resolve().parent.parent.parent / "shared/data"


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


def read_all(rows, named="", **how):
    kind, names = columns.plan(columns.parse_columns(named), rows[0], "rows")
    return list(table.records(rows, kind, names, "rows", "rows", making.Reading(**how)))


def responses(pair):
    return pair.selected[-1].content, pair.rejected[-1].content


# Validity -------------------------------------------------------------------------------------------------------------


def released_filter(chosen, rejected):
    """RLHFlow's pair-pm/process_pair_data.py in short: whether it keeps a pair."""
    if len(chosen) % 2 or len(chosen) != len(rejected):
        return False
    for turns in (chosen, rejected):
        if any(role != ("user", "assistant")[i % 2] or not text.strip() for i, (role, text) in enumerate(turns)):
            return False
    return chosen[:-1] == rejected[:-1]


TURN = st.tuples(st.sampled_from(["user", "assistant", "system"]), st.sampled_from(["", " ", "a", "b"]))
LIKELY = st.sampled_from(
    [[("user", "a"), ("assistant", "b")], [("user", "a"), ("assistant", "c"), ("user", "d"), ("assistant", "e")]]
)


@given(st.one_of(LIKELY, st.lists(TURN, max_size=4)), st.one_of(LIKELY, st.lists(TURN, max_size=4)))
def test_the_filter_is_the_released_one_with_reasons(chosen, rejected):
    reason = validity.why_invalid(chosen, rejected, system=False)
    assert (reason is None) == (bool(chosen) and released_filter(chosen, rejected))


Q, A, B, S = ("user", "q"), ("assistant", "a"), ("assistant", "b"), ("system", "s")


@pytest.mark.parametrize(
    "chosen, rejected, system, reason",
    [
        ([Q, A], [Q, B], False, None),
        ([S, Q, A], [S, Q, B], True, None),
        ([S, Q, A], [S, Q, B], False, validity.SYSTEM),
        ([Q, A, Q, A], [Q, B], True, validity.LENGTHS),
        ([Q, A, Q], [Q, A, Q], True, validity.ROLES),
        ([A, Q], [A, Q], True, validity.ROLES),
        ([Q, S, Q, A], [Q, S, Q, B], True, validity.ROLES),
        ([], [], True, validity.ROLES),
        ([Q, ("assistant", " \n")], [Q, B], True, validity.EMPTY),
        ([Q, A, Q, A], [Q, B, Q, B], True, validity.PROMPTS),
    ],
)
def test_every_reason_of_the_filter(chosen, rejected, system, reason):
    assert validity.why_invalid(chosen, rejected, system) == reason


def test_invalid_pairs_are_counted_by_reason_and_not_an_error():
    """The released code drops them without a word; HH-RLHF has some of each."""
    start = "\n\nHuman: q\n\nAssistant: "
    rows = [
        {"chosen": start + "good", "rejected": start + "bad"},
        {"chosen": start + "same", "rejected": start + "same"},
        {"chosen": start + "good", "rejected": start},
        {"chosen": start + "good", "rejected": "\n\nHuman: p\n\nAssistant: bad"},
        {"chosen": start + "a\n\nHuman: more\n\nAssistant: good", "rejected": start + "bad"},
        {"chosen": start + "a\n\nHuman: more", "rejected": start + "a\n\nHuman: more"},
    ]
    dropped = Counter()
    (made,) = table.keep_good(read_all(rows), [], dropped, skip=False)
    assert responses(made) == ("good", "bad")
    reasons = (table.SAME, validity.EMPTY, validity.PROMPTS, validity.LENGTHS, validity.ROLES)
    assert dropped == dict.fromkeys(reasons, 1)


# Pairs of scored responses --------------------------------------------------------------------------------------------


VALUES = st.lists(st.one_of(st.none(), st.sampled_from([-1.0, 0.0, 1.0, 2.0, 4.0])), min_size=2, max_size=6)


@given(VALUES, st.sampled_from(preferences.HOW), st.sampled_from([None, 1.0, 2.0]), st.integers(0, 3))
def test_pairs_by_score_are_those_of_their_definition(values, how, ratio, seed):
    texts = [str(i // 2) for i in range(len(values))]  # some are equal
    better = {
        (i, j)
        for i, a in enumerate(values)
        for j, b in enumerate(values)
        if None not in (a, b) and a > b and (ratio is None or b > 0 and a / b > ratio)
    }
    found = preferences.select(values, texts, Selection(how, ratio, None, seed), "u")
    if isinstance(found, str):
        assert not better or how != "all"
        return
    assert {*found} <= better and len({*found}) == len(found)
    known = [value for value in values if value is not None]
    if how == "all":
        assert {*found} == better
    else:
        ((i, j),) = found
        assert values[i] == max(known) and (how != "extremes" or values[j] == min(known))
        assert how == "extremes" or texts[i] != texts[j]
    assert found == preferences.select(values, texts, Selection(how, ratio, None, seed), "u")


def test_a_random_worse_response_is_any_of_them_by_seed_and_uuid():
    drawn = Counter(
        preferences.select([4, 1, 2, 3], "abcd", Selection("best_random", seed=seed), f"u{i}")[0]
        for seed in range(10)
        for i in range(60)
    )
    assert drawn.keys() == {(0, 1), (0, 2), (0, 3)} and min(drawn.values()) > 150


def completion(text, overall, *fine):
    names = ("helpfulness", "honesty", "instruction_following", "truthfulness")
    marks = {name: {"Rating": value} for name, value in zip(names, fine, strict=True)}
    return {"response": text, "overall_score": overall, "annotations": marks}


ULTRA = {
    "instruction": "q",
    "completions": [
        completion("a", 9.0, "1", "N/A", "2", "3"),  # mean 2
        completion("b", 7.0, "5", "4", "5", "4"),  # 4.5
        completion("c", 8.0, "3", "3", "3", "3"),
        completion("d", 1.0, "N/A", "N/A", "N/A", "N/A"),
    ],
}
FINE = "+".join(
    f"completions.annotations.{name}.Rating"
    for name in ("helpfulness", "honesty", "instruction_following", "truthfulness")
)


def test_ultrafeedback_by_its_overall_or_its_mean_fine_grained_score(repo):
    start = "prompt=instruction,responses=completions.response,score="
    (overall,) = read_all([ULTRA], start + "completions.overall_score")
    (fine,) = read_all([ULTRA], start + FINE)
    assert (responses(overall), responses(fine)) == (("a", "d"), ("b", "a"))
    assert (fine.extra["chosen_score"], fine.extra["rejected_score"]) == (4.5, 2.0)
    every = read_all([ULTRA], start + FINE, selection=Selection("all"))
    assert [responses(pair) for pair in every] == [("b", "a"), ("b", "c"), ("c", "a")]
    assert [pair.uuid for pair in every] == ["rows-000000-1-0", "rows-000000-1-2", "rows-000000-2-0"]
    (drawn,) = read_all([ULTRA], start + FINE, selection=Selection("best_random", seed=1))
    assert responses(drawn) in (("b", "a"), ("b", "c"))
    assert start + FINE in (repo / "docs/data.md").read_text()


def test_helpsteer_by_the_mean_of_two_attributes_best_or_all_pairs():
    rows = [
        {"prompt": p, "response": r, "helpfulness": h, "correctness": c}
        for p, r, h, c in (("q", "a", 4, 2), ("q", "b", 3, 4), ("p", "x", 1, 1), ("q", "c", 0, None), ("p", "y", 1, 1))
    ]
    made, tied = read_all(rows, "score=helpfulness+correctness")
    assert responses(made) == ("b", "c") and tied == table.Skipped(preferences.TIED)
    assert (made.extra["chosen_score"], made.extra["rejected_score"]) == (3.5, 0.0)
    *every, tied = read_all(rows, "score=helpfulness+correctness", selection=Selection("all"))
    assert [responses(pair) for pair in every] == [("a", "c"), ("b", "a"), ("b", "c")]
    assert len({pair.uuid for pair in every}) == 3


def test_nectars_ranks_make_every_pair():
    answers = [{"answer": text, "rank": rank} for rank, text in enumerate("abcdefg", 1)]
    made = read_all(
        [{"prompt": "\n\nHuman: q\n\nAssistant: ", "answers": answers}],
        "responses=answers.answer,rank=answers.rank",
        selection=Selection("all"),
    )
    assert len(made) == 21 and all(a < b for a, b in map(responses, made))
    assert "chosen_score" not in made[0].extra


SHP = [
    {"history": "q1", "human_ref_A": f"good {i}", "human_ref_B": f"bad {i}", "score_A": 5 + i, "score_B": 2}
    for i in range(4)
] + [{"history": "q2", "human_ref_A": "bad", "human_ref_B": "good", "score_A": 4, "score_B": 8}]


def test_shp_by_the_ratio_of_its_scores_and_at_most_k_pairs_of_a_prompt():
    """Of 7 pairs with a ratio above 2; exactly 2 is not above it."""
    named = "prompt=history,responses=human_ref_A+human_ref_B,score=score_A+score_B"
    *made, tied = read_all(SHP, named, selection=Selection(min_ratio=2))
    assert [responses(pair)[0] for pair in made] == [f"good {i}" for i in range(4)]
    assert tied == table.Skipped(preferences.RATIO)
    picks = set()
    for seed in range(20):
        dropped = Counter()
        kept = table.capped(made, Selection(max_pairs=2, seed=seed), dropped)
        assert dropped == {table.BEYOND: 2} and [*map(made.index, kept)] == sorted(map(made.index, kept))
        picks.add(tuple(pair.uuid for pair in kept))
    assert len(picks) > 3


def test_scores_of_rlhflows_own_layout_are_kept():
    row = {"chosen": [user("q"), said("a")], "rejected": [user("q"), said("b")], "chosen_score": 4.5}
    (made,) = read_all([row | {"rejected_score": 1.0}])
    assert responses(made) == ("a", "b") and made.extra == {"chosen_score": 4.5, "rejected_score": 1.0}
    named = {"prompt": "q", "chosen": "a", "rejected": "b", "chosen-rating": 8.5, "score_rejected": "2"}
    (made,) = read_all([named], "chosen_score=chosen-rating,rejected_score=score_rejected")
    assert made.extra == {"chosen_score": 8.5, "rejected_score": 2.0}


# Ratings and steps ----------------------------------------------------------------------------------------------------


def test_helpsteers_attributes_become_ratings_as_armorm_has_them():
    """r = (raw + 0.5) / 5 for raw in 0..4, as RLHFlow publishes it; null stays null."""
    rows = [
        {"prompt": "q", "response": r, "helpfulness": h, "verbosity": v}
        for r, h, v in (("a", 4, 0), ("b", 1, None), ("c", None, None), ("", 1, 1))
    ]
    scale = ratings.Scale("helpsteer-", ratings.parse_ranges("-0.5..4.5"))
    *made, unrated, empty = read_all(rows, "ratings=helpfulness+verbosity", scale=scale)
    assert [each.ratings for each in made] == [
        {"helpsteer-helpfulness": pytest.approx(0.9), "helpsteer-verbosity": pytest.approx(0.1)},
        {"helpsteer-helpfulness": pytest.approx(0.3), "helpsteer-verbosity": None},
    ]
    assert (unrated.reason, empty.reason) == (making.NO_RATING, validity.EMPTY)
    assert all(isinstance(each, Ratings) for each in made)


def test_ultrafeedbacks_completions_become_ratings_each():
    named = f"prompt=instruction,responses=completions.response,ratings=completions.overall_score+{FINE}"
    scale = ratings.Scale("ultrafeedback-", ratings.parse_ranges("1..10,1..5,1..5,1..5,1..5"))
    made = read_all([ULTRA], named, scale=scale)
    assert [each.messages[-1].content for each in made] == ["a", "b", "c", "d"]
    assert made[0].ratings["ultrafeedback-overall_score"] == pytest.approx(8 / 9)
    assert made[0].ratings["ultrafeedback-honesty"] is None and made[1].ratings["ultrafeedback-honesty"] == 0.75
    assert len({each.uuid for each in made}) == 4
    (bad,) = read_all([{"prompt": "q", "response": "a", "s": 7}], "ratings=s", scale=ratings.Scale("", ((1, 5),)))
    assert "s 7 is outside its --rating_range, 1..5" in bad.reason


def test_armorms_own_columns_are_ratings():
    row = dict.fromkeys(columns.ARMO) | {
        "messages": [user("q"), said("a")],
        "code-style": 0.5,
        "beavertails-is_safe": True,
    }
    (made,) = read_all([row])
    assert len(made.ratings) == 19 and made.extra == {}
    assert {k: v for k, v in made.ratings.items() if v is not None} == {"code-style": 0.5, "beavertails-is_safe": 1.0}


@pytest.mark.parametrize("text", ["4", "5..1", "a..b", "0..4,", ".."])
def test_ranges_that_are_refused(text):
    with pytest.raises(UserError, match="expected LOW..HIGH"):
        ratings.parse_ranges(text)


TWO = "How many? Step 1: 2+2=4. ки\nStep 2: It is 5. ки"


def test_math_shepherds_two_texts_are_the_steps_of_its_other_form():
    (made,) = steps.math_shepherd({"input": TWO, "label": TWO.replace("4. ки", "4. +").replace("ки", "-"), "task": "x"})
    assert made == {
        "prompt": "How many?",
        "steps": ["Step 1: 2+2=4.", "Step 2: It is 5."],
        "labels": [1.0, 0.0],
        "task": "x",
    }
    for label, told in ((TWO, r"no \+ or -"), (TWO.replace("2+2", "3+3").replace("ки", "+"), r"no \+ or -")):
        with pytest.raises(ValueError, match=told):
            next(steps.math_shepherd({"input": TWO, "label": label}))
    with pytest.raises(ValueError, match="no question before"):
        next(steps.math_shepherd({"input": "2+2=4 ки", "label": "2+2=4 +"}))


def rated(*ratings, chosen=None, human=None):
    completions = [{"text": f"{value} of {len(ratings)}", "rating": value} for value in ratings]
    return {"completions": completions, "chosen_completion": chosen, "human_completion": human}


def prm800k(*marked, **how):
    row = {"question": {"problem": "q", "ground_truth_answer": "5"}, "label": {"steps": [*marked]}, "labeler": "x"}
    return [(each["steps"], each["labels"]) for each in steps.prm800k(row, **how)]


def test_prm800ks_alternatives_are_labelled_once_after_the_steps_that_led_to_them():
    human = {"text": "by hand", "rating": None}
    made = prm800k(rated(1, chosen=0), rated(-1, 0, chosen=None, human=human), rated(0, chosen=0), rated(-1))
    path = ["1 of 1", "by hand", "0 of 1", "-1 of 1"]
    assert made == [
        (path, [1.0, None, 1.0, 0.0]),
        (["1 of 1", "-1 of 2"], [None, 0.0]),
        (["1 of 1", "0 of 2"], [None, 1.0]),
    ]
    assert prm800k(rated(0, 1, chosen=1), neutral=None) == [(["1 of 2"], [1.0])]
    assert prm800k(rated(0, chosen=0), neutral=0.5) == [(["0 of 1"], [0.5])]
    assert prm800k(rated(-1, -1)) == [(["-1 of 2"], [0.0])] * 2
    with pytest.raises(ValueError, match="rating 2 is not"):
        prm800k(rated(2))
    reading = {"take_apart": steps.prm800k}
    row = {"question": {"problem": "q"}, "label": {"steps": [rated(1, chosen=0)]}}
    good, bad, none = table.records(
        [row, {"question": "q"}, {**row, "label": {"steps": []}}],
        Steps,
        steps.COLUMNS,
        "u",
        "f",
        making.Reading(**reading),
    )
    assert encode(good) == {
        "uuid": "u-000000",
        "prompt": [user("q")],
        "steps": ["1 of 1"],
        "labels": [1.0],
    }
    assert "another form than the first row" in bad.reason and none == table.Skipped(making.NO_LABEL)


def test_steps_of_other_tables():
    (trl,) = read_all([{"prompt": "q", "completions": ["a ", " ", "b"], "labels": [True, True, False]}])
    assert (trl.steps, trl.labels) == (["a", "b"], [1.0, 0.0])
    row = {"question": "q", "solution": "a\n\nb\nc", "right": False}
    (orm,) = read_all([row], "prompt=question,steps=solution,labels=right")
    assert (orm.steps, orm.labels) == (["a", "b", "c"], [None, None, 0.0])
    (two,) = read_all([row], "prompt=question,steps=solution,labels=right", separator="\n\n")
    assert two.steps == ["a", "b\nc"]
    for labels, told in ([[True], "3 steps, but 1 labels"], [[1, 2, 1], "label 2 is not"], [["+", "-", None], None]):
        (made,) = read_all([{"prompt": "q", "completions": ["a", "b", "c"], "labels": labels}])
        assert made.labels == [1.0, 0.0, None] if told is None else told in made.reason


# The beginning of a text ----------------------------------------------------------------------------------------------


def test_training_and_scoring_see_one_bos_as_rlhflow_renders_it(tiny_tokenizer):
    """RLHFlow renders the template as text, deletes BOS from it and tokenises, so that one is added. The ids are the
    same here, in training (pairs, conversations) and in scoring, with a tokenizer that adds BOS by itself as well."""
    backend = copy.deepcopy(tiny_tokenizer.backend_tokenizer)
    bos = tiny_tokenizer.bos_token
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tiny_tokenizer.bos_token_id)]
    )
    eager = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token="<end>", pad_token="<pad>")
    eager.chat_template = tiny_tokenizer.chat_template
    assert "bos_token" in eager.chat_template
    turns = [Message("user", "2 + 3?"), Message("assistant", "5"), Message("user", "And 1?"), Message("assistant", "6")]
    text = eager.apply_chat_template([{"role": m.role, "content": m.content} for m in turns], tokenize=False)
    released = eager(text.replace(bos, ""))["input_ids"]
    for tokenizer in (tiny_tokenizer, eager):
        chat = Chat(tokenizer)
        (scored,) = chat.encode_responses(turns[:-1], ["6"], [True])
        (trained,) = chat.encode_responses(turns[:-1], ["6"], [True], sampled=False)
        (whole,) = chat.encode_conversation(turns)
        assert scored.ids == trained.ids == whole.ids == released[: len(scored.ids)]
        assert scored.ids.count(tokenizer.bos_token_id) == 1 and scored.ids[0] == tokenizer.bos_token_id


# Mixtures -------------------------------------------------------------------------------------------------------------


def pair_row(i, prompt, good="good", bad="bad", **more):
    return {
        "uuid": f"p{i}",
        "prompt": [user(prompt)],
        "selected": [user(prompt), said(f"{good} {i}")],
        "rejected": [user(prompt), said(f"{bad} {i}")],
        "consistency": None,
        **more,
    }


@given(st.integers(1, 30), st.one_of(st.none(), st.floats(0.01, 4)), st.integers(0, 3))
def test_a_weight_takes_that_many_times_a_source(n, weight, seed):
    uuids = [f"u{i}" for i in range(n)]
    found = mix.taken(uuids, weight, None, seed)
    assert len(found) == round(n * (1 if weight is None else weight)) and len({*found}) == len(found)
    times = Counter(uuid for uuid, _ in found)
    if found:
        assert max(times.values()) - min(times[uuid] for uuid in uuids) <= 1
    assert {*found} == {*mix.taken(uuids[::-1], weight, None, seed)}
    assert len(mix.taken(uuids, None, n, seed)) == n
    with pytest.raises(UserError, match="more than its"):
        mix.taken(uuids, None, n + 1, seed)


@given(
    st.lists(st.integers(0, 20), min_size=2).filter(lambda keys: len({*keys}) > 1), st.floats(0, 0.9), st.integers(0, 3)
)
def test_held_out_prompts_are_whole_prompts_drawn_by_the_seed(keys, share, seed):
    count = len({*keys})
    with suppress(UserError):
        held = held_out.held_out(keys, share, seed)
        assert held <= {*keys} and (len(held) > 0) == (share > 0) and len(held) < count
        assert held == held_out.held_out([*reversed(keys)], share, seed)
        more = held_out.held_out([*keys, *range(100, 300)], share, seed)  # where a prompt is depends on no other
        assert len(held) == 1 or held == more & {*keys}
    assert len(held_out.held_out(keys, count - 1, seed)) == count - 1
    with pytest.raises(UserError, match="none would be left"):
        held_out.held_out(keys, count, seed)


@pytest.fixture
def sources(tmp_path):
    """Two files of pairs: 20 prompts of the first, with two pairs each, are in the second too, in other words."""
    first = [pair_row(2 * i + n, f"What is {i} + 2?", source="own") for i in range(30) for n in (0, 1)]
    second = [pair_row(i, f"what is {i} + 2 ?") for i in range(20)]
    second += [pair_row(99, "empty?", good="", bad=" ") | {"selected": [user("empty?"), said(" ")]}]
    for name, rows in (("one", first), ("two", second)):
        store.write_rows(tmp_path / f"{name}.dpo.jsonl", rows)
    return tmp_path


def mixed(folder, text, **run):
    (folder / "m.yaml").write_text(text.replace("DIR", str(folder)))
    config = folder / "m.yaml"
    mix.make(mix.read_mixture(config), config, None, folder, Run(**run))
    return [json.loads((folder / f"m.{part}dpo.json").read_text()) for part in ("", "held_out.")]


MIXTURE = """
seed: 5
held_out: 6
sources:
  - {path: DIR/one.dpo.jsonl, count: 40, name: first}
  - {path: DIR/two.dpo.jsonl, weight: 1.5}
"""


def test_a_mixture_never_has_a_held_out_prompt_in_training(sources):
    """The released scripts evaluate on rows of the training set, and pairs of one prompt are in both parts."""
    train, held = mixed(sources, MIXTURE)
    ask = lambda rows: {int(row["prompt"][0]["content"].split()[2]) for row in rows.values()}  # noqa: E731
    assert len(ask(held)) == 6 and not ask(train) & ask(held)
    meta = json.loads((sources / "m.dpo.json.meta.json").read_text())
    assert sum(part["train"] for part in meta["taken"].values()) == len(train)
    assert sum(part["held out"] for part in meta["taken"].values()) == len(held)
    copies = sum("#" in uuid for uuid in train)  # of ten; the held-out part has none
    assert len(train) + len(held) + (10 - copies) == 40 + 30 and not any("#" in uuid for uuid in held)
    assert meta["counts"]["dropped"] == {validity.EMPTY: 1}
    assert {*meta["inputs"]} == {"first", "two"} and meta["sources"]["first"] == "one.dpo.jsonl"
    assert {row["mixed_from"] for row in train.values()} == {"first", "two"}
    assert all(row["source"] == "own" for uuid, row in train.items() if uuid.startswith("first/"))
    order = [uuid.partition("/")[0] for uuid in train]
    assert order != sorted(order)  # shuffled
    before = (sources / "m.dpo.json").read_bytes()
    mixed(sources, MIXTURE, overwrite=True)
    assert (sources / "m.dpo.json").read_bytes() == before
    assert mixed(sources, MIXTURE.replace("seed: 5", "seed: 6"), overwrite=True)[0].keys() != train.keys()


@pytest.mark.parametrize(
    "change, told",
    [
        (("weight: 1.5", "weight: 1.5, count: 3"), "a `weight` or a `count`, not both"),
        (("weight: 1.5", "wieght: 1.5"), r"unknown key `wieght` - at `\$.sources\[1\]`; did you mean weight"),
        (("weight: 1.5", "weight: 0"), "weight"),
        (("count: 40", "count: 61"), "one.dpo.jsonl: count 61 is more than its 60 usable records"),
        (("two.dpo", "three.dpo"), "three.dpo.jsonl: no such file"),
        (("name: first", "name: two"), "two sources are called two"),
        (("held_out: 6", "held_out: 30"), "none would be left"),
        (("sources:", "seed: 5\nsources:"), "'seed' is given twice"),
        (("two.dpo", "steps"), "holds responses in steps, and .* preference pairs"),
    ],
)
def test_mixtures_that_are_refused_leave_nothing_behind(sources, change, told):
    store.write_rows(sources / "steps.jsonl", [{"uuid": "s", "prompt": [user("q")], "steps": ["a"], "labels": [1.0]}])
    before = {path.name for path in sources.iterdir()} | {"m.yaml"}
    with pytest.raises(UserError, match=told):
        mixed(sources, MIXTURE.replace(*change))
    assert {path.name for path in sources.iterdir()} == before


def test_the_documented_mixture_is_one(repo, tmp_path):
    block = (repo / "docs/data.md").read_text().partition("```yaml mix.yaml\n")[2].partition("```")[0]
    (tmp_path / "mix.yaml").write_text(block)
    mixture = mix.read_mixture(tmp_path / "mix.yaml")
    assert [source.label for source in mixture.sources] == ["hh", "shp", "hs", "ultrafeedback"]
    assert (mixture.held_out, mixture.sources[1].count, mixture.sources[2].weight) == (500, 100000, 2)


# RRM ------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 6), min_size=3, max_size=40), st.integers(0, 5))
def test_partners_never_share_a_prompt_and_each_pair_is_each_partner_once(prompts, seed):
    """The released code takes two permutations: about three of its triples have an index twice, whatever N is."""
    if len(prompts) < 3 * max(Counter(prompts).values()):
        with pytest.raises(UserError, match="partners of two other prompts"):
            rrm.partners(prompts, seed)
        return
    found = rrm.partners(prompts, seed)
    assert all(len({prompts[i], prompts[j], prompts[k]}) == 3 for i, (j, k) in enumerate(found))
    for place in (0, 1):
        assert sorted(each[place] for each in found) == [*range(len(prompts))]
    assert found == rrm.partners(prompts, seed)


def pairs_file(folder, n=9, **more):
    rows = [pair_row(i, f"What is {i} + 2?", **more) for i in range(n)]
    rows[0]["selected"][1]["content"] = "  [RESPONSE A] so what [RESPONSE B]\n"  # white space, and the released markers
    store.write_rows(folder / "p.dpo.json", rows)
    return folder / "p.dpo.json"


def augmented(folder, seed=0, **flags):
    rrm.make(pairs_file(folder), rrm.RrmFlags(**flags), seed, folder / "out.json", Run(overwrite=True))
    kind = Samples if flags.get("candidates") else Pair
    return list(store.read(folder / "out.json", kind))


def test_rrm_adds_fourteen_pairs_to_each_in_which_responses_alone_say_nothing(tmp_path):
    made = augmented(tmp_path)
    original = [pair for pair in made if "rrm" not in pair.extra]
    added = [pair for pair in made if "rrm" in pair.extra]
    assert len(original) == 9 and len(added) == 9 * 14 and len({pair.uuid for pair in made}) == 15 * 9
    better = [pair for pair in added if pair.consistency == 1]
    neutral = [pair for pair in added if pair.consistency == 0.5]
    assert (len(better), len(neutral)) == (8 * 9, 6 * 9)
    own = {pair.uuid: {*responses(pair)} for pair in original}
    for pair in added:
        chosen, rejected = responses(pair)
        on_prompt = own[pair.uuid.partition("#")[0]]
        assert rejected not in on_prompt and (chosen in on_prompt) == (pair.consistency == 1)
    assert Counter(pair.selected[-1].content for pair in better) == Counter(
        pair.rejected[-1].content for pair in better
    )  # each response is chosen as often as it is rejected
    texts = [text for pair in made for text in responses(pair)]
    assert texts == [text.strip() for text in texts]  # white space does not tell the slot that a text is from
    assert any("[RESPONSE A] so what [RESPONSE B]" == text for text in texts)
    assert [encode(pair) for pair in augmented(tmp_path)] == [encode(pair) for pair in made]
    assert [encode(pair) for pair in augmented(tmp_path, seed=1)] != [encode(pair) for pair in made]
    assert len(augmented(tmp_path, per_pair=3)) == 4 * 9


def test_rrm_keeps_the_hard_pairs_by_a_models_rewards(tmp_path):
    """rewarding.py scores the candidates; a pair stays where |sigma(d) - label| is large, and the originals stay."""
    candidates = augmented(tmp_path, candidates=True)
    assert all(len(each.responses) == 6 for each in candidates)
    rewards = [
        Rewards(
            uuid=each.uuid,
            prompt=each.prompt,
            response=[[*each.prompt, Message("assistant", text)] for text in each.responses],
            reward=[3.0, 3.0, 0.0, 0.0, None, 3.0],  # of w_i, l_i, w_j, l_j, w_k, l_k
        )
        for each in candidates
    ]
    store.write(tmp_path / "r.json", rewards)
    made = augmented(tmp_path, rewards=str(tmp_path / "r.json"))
    kept = Counter((p.extra["rrm"]["selected"], p.extra["rrm"]["rejected"]) for p in made if "rrm" in p.extra)
    assert kept == dict.fromkeys([(role, "l_k") for role in ("w_i", "l_i", "w_j", "l_j")], 9)
    meta = json.loads((tmp_path / "out.json.meta.json").read_text())
    assert meta["counts"]["dropped"] == {rrm.EASY: 9 * 5, rrm.NO_REWARD: 9 * 5}
    with pytest.raises(UserError, match="other responses; --candidates was of another --seed"):
        augmented(tmp_path, seed=3, rewards=str(tmp_path / "r.json"))
    for flags, told in (({"candidates": True, "rewards": "r"}, "one of them"), ({"min_error": 0.3}, "not given")):
        with pytest.raises(UserError, match=told):
            augmented(tmp_path, **flags)


# The command ----------------------------------------------------------------------------------------------------------


def imported(folder, name, rows, **choice):
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    importing.import_table(str(path), Table(), Preferences(**choice), 0, folder, Run(overwrite=True))


def test_the_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pairs_file(tmp_path)
    prepare_data.main(["mix", "p.dpo.json", "--held_out", "3", "--seed", "1", "--output", "m.dpo.json"])
    prepare_data.main(["rrm", "m.dpo.json", "--per_pair", "1", "--dry_run"])
    prepare_data.main(["rrm", "m.dpo.json", "--per_pair", "1"])
    prepare_data.main(["validate", "m.dpo.rrm.json", "m.held_out.dpo.json"])
    out = capsys.readouterr().out
    assert "12 preference pairs, 24 responses" in out and "3 preference pairs, 6 responses" in out
    meta = json.loads((tmp_path / "m.dpo.rrm.json.meta.json").read_text())
    assert meta["sources"] == {"pairs": "m.dpo.json"} and not meta["unverified"][1:]
    for line, told in {
        "mix": "expected files, or --config FILE",
        "mix p.dpo.json --config m.yaml": "one of both",
        "rrm p.dpo.json --held_out 2": "rrm does not use --held_out",
        "mix p.dpo.json --pairs all": "mix does not use --pairs",
        "rrm m.held_out.dpo.json --rewards m.dpo.json": "--rewards m.dpo.json holds preference pairs",
    }.items():
        with pytest.raises(SystemExit) as end:
            prepare_data.main(line.split())
        assert end.value.code == 2 and told in capsys.readouterr().err


def test_import_says_what_its_flags_are_for(tmp_path):
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b"}]
    told = {"pairs": "all", "min_ratio": 2.0, "rating_range": "0..4", "neutral": "wrong", "step_separator": "x"}
    for name, value in told.items():
        with pytest.raises(UserError, match=f"--{name} is for .* no effect on these preference pairs"):
            imported(tmp_path, "t", rows, **{name: value})
    imported(tmp_path, "t", rows * 3, max_pairs=2)
    meta = json.loads((tmp_path / "t.dpo.json.meta.json").read_text())
    assert meta["counts"] == {"out": 2, "dropped": {table.BEYOND: 1}}
    assert (meta["settings"]["max_pairs"], meta["settings"]["seed"]) == (2, 0)
    imported(tmp_path, "t", rows)
    assert "seed" not in json.loads((tmp_path / "t.dpo.json.meta.json").read_text())["settings"]


def test_real_steps_of_both_forms_are_the_same(tmp_path):
    both = [SHARED / "prm" / name for name in ("samples_math-shepherd.jsonl", "math_shepherd_stepwise.jsonl")]
    if not both[0].exists():
        pytest.skip("needs the shared data")
    made = []
    for path in both:
        importing.import_table(str(path), Table(), Preferences(), 0, tmp_path, Run())
        records = store.read(tmp_path / f"{path.stem}.steps.json", Steps)
        made.append([(record.prompt, record.steps, record.labels) for record in records])
    assert made[0] == made[1] and len(made[0]) == 7
