"""Pairs without rewards, SPIN's and RLCD's, against a plain loop over their definition."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cream.errors import UserError
from cream.files.index import Waiting
from cream.pairs import contrast, spin
from cream.pairs.candidates import EQUAL, REPEATED, TRUNCATED, build_candidates
from cream.pairs.match import Lookup
from cream.records import Conversation, Message, Prompt, Samples

UUIDS = "pqrs"
TEXTS = st.sampled_from(["x", "y", "z", "gold"])


def prompt_of(uuid, system=None):
    return [*([Message("system", system)] if system else []), Message("user", f"Question {uuid}?")]


def conversation(uuid, response="gold"):
    return Conversation(uuid=uuid, messages=[*prompt_of(uuid), Message("assistant", response)], extra={"source": 7})


def sample(uuid, texts, truncated=(), system=None, **more):
    return Samples(
        uuid=uuid,
        prompt=prompt_of(uuid, system),
        responses=list(texts),
        finish_reason=["length" if i in truncated else "stop" for i in range(len(texts))],
        source_prompt=prompt_of(uuid) if system else None,
        **more,
    )


@st.composite
def files(draw, system=None, count=None):
    """Samples of some prompts in any order."""
    made = []
    for uuid in draw(st.lists(st.sampled_from(UUIDS), unique=True)):
        texts = draw(st.lists(TEXTS, min_size=count or 0, max_size=count or 3))
        made.append(sample(uuid, texts, draw(st.sets(st.integers(0, 2), max_size=1)), system))
    return made


def made(strategy, files, options=None, **rules):
    pair_set = build_candidates(strategy.candidates(files, options or strategy.Options()), **rules)
    return list(pair_set.pairs), pair_set


def outline(pairs):
    return [(p.uuid, p.selected[-1].content, p.rejected[-1].content) for p in pairs]


@given(st.permutations(UUIDS), files(), files(), st.booleans(), st.sampled_from([None, 1, 2]))
def test_spin_is_the_data_against_every_sample(order, new, old, keep_truncated, most):
    """The newest round first; truncated samples, equal texts, and what is there already are left out."""
    pairs, pair_set = made(
        spin,
        {"samples": new, "samples@-1": old, "conversations": map(conversation, order)},
        keep_truncated=keep_truncated,
        most=most,
    )
    expected, counts, paired = [], Counter(), 0
    for uuid in order:
        texts = []
        for one in (each for each in (*new, *old) if each.uuid == uuid):
            for text, end in zip(one.responses, one.finish_reason, strict=True):
                counts[""] += 1
                reasons = {TRUNCATED: end == "length" and not keep_truncated, EQUAL: text == "gold"}
                reasons[REPEATED] = text in texts
                if reason := next((reason for reason, holds in reasons.items() if holds), None):
                    counts[reason] += 1
                else:
                    texts.append(text)
        paired += bool(texts)
        ends = ["", "#2", "#3", "#4", "#5", "#6"]
        expected += [(uuid + end, "gold", text) for text, end in zip(texts[:most], ends, strict=False)]
    assert outline(pairs) == expected and pair_set.count == len(expected)
    assert pair_set.responses == counts and pair_set.dropped.total() == len(UUIDS) - paired
    for pair in pairs:
        assert pair.sampled == (False, True) and pair.consistency is None and pair.margin is None
        assert pair.prompt == prompt_of(pair.uuid[0]) and pair.selected_index is None


def test_spin_counts_what_has_no_counterpart():
    data = {"samples": [sample("p", ["x"]), sample("t", ["x"])], "conversations": map(conversation, UUIDS)}
    pairs, pair_set = made(spin, data)
    assert outline(pairs) == [("p", "gold", "x")]
    assert pair_set.dropped == {spin.NOT_SAMPLED: 3, spin.UNKNOWN: 1} and pair_set.prompts == 5


def test_spin_takes_the_turn_that_follows_the_prompt():
    """Of a long conversation the prompt may be all turns before the last, as infer.py has it, or the first one."""
    turns = [Message("user", "1?"), Message("assistant", "one"), Message("user", "2?"), Message("assistant", "two")]
    for cut, response in ((1, "one"), (3, "two")):
        own = Samples(uuid="p", prompt=turns[:cut], responses=["x"])
        (pair,), _ = made(spin, {"samples": [own], "conversations": [Conversation(uuid="p", messages=turns)]})
        assert pair.selected == [*turns[:cut], Message("assistant", response)]


@pytest.mark.parametrize(
    ("new", "old", "message"),
    [
        (Samples(uuid="p", prompt=prompt_of("q"), responses=["x"]), None, "another prompt than the one in --conv"),
        (Samples(uuid="p", prompt=conversation("p").messages + prompt_of("p"), responses=[]), None, "another prompt"),
        (sample("p", ["x"], system="Be brief."), sample("p", ["x"]), "different prompts in different rounds"),
    ],
    ids=["another question", "a longer prompt", "another system prompt"],
)
def test_spin_refuses_samples_of_other_prompts(new, old, message):
    data = {"samples": [new], "samples@-1": [old] if old else [], "conversations": [conversation("p")]}
    with pytest.raises(UserError, match="'p'.*" + message):
        made(spin, data)


def test_spin_keeps_the_prompt_as_it_was_sampled():
    data = {"samples": [sample("p", ["x"], system="Be brief.")], "conversations": [conversation("p")]}
    (pair,), _ = made(spin, data)
    assert pair.prompt == prompt_of("p", "Be brief.") and pair.source_prompt == prompt_of("p")


@given(files("Be good.", count=2), files("Be bad.", count=2), st.booleans())
def test_contrast_is_one_sample_against_its_counterpart(good, bad, keep_truncated):
    pairs, pair_set = made(contrast, {"positive": good, "negative": bad}, keep_truncated=keep_truncated)
    others, expected = {one.uuid: one for one in bad}, []
    for one in (one for one in good if one.uuid in others):
        other, seen = others[one.uuid], []
        for i, both in enumerate(zip(one.responses, other.responses, strict=True)):
            complete = {one.finish_reason[i], other.finish_reason[i]} == {"stop"}
            if (complete or keep_truncated) and both[0] != both[1] and both not in seen:
                seen.append(both)
        expected += [(one.uuid + end, *both) for both, end in zip(seen, ("", "#2"), strict=False)]
    assert outline(pairs) == expected
    alone = {one.uuid for one in good} ^ others.keys()
    assert pair_set.dropped[contrast.NO_NEGATIVE] + pair_set.dropped[contrast.NO_POSITIVE] == len(alone)
    for pair in pairs:
        assert pair.prompt == prompt_of(pair.uuid[0]) and pair.source_prompt is None
        assert pair.sampled == (True, True) and pair.selected_index == pair.rejected_index


def test_contrast_may_have_prompts_of_its_own():
    """Where the two were not put as the same question with two system prompts."""
    good, bad = (Samples(uuid="p", prompt=prompt_of(thing), responses=[thing]) for thing in ("books", "balls"))
    own = [Prompt(uuid="q", messages=prompt_of("q")), Prompt(uuid="p", messages=prompt_of("p"))]
    (pair,), _ = made(contrast, {"positive": [good], "negative": [bad], "prompts": own})
    assert pair.prompt == prompt_of("p") and outline([pair]) == [("p", "books", "balls")]
    _, pair_set = made(contrast, {"positive": [good], "negative": [bad], "prompts": own[:1]})
    assert pair_set.dropped == {contrast.NO_PROMPT: 1}
    with pytest.raises(UserError, match="'p'.*different prompts.*--prompts FILE"):
        made(contrast, {"positive": [good], "negative": [bad]})


def test_contrast_filters_by_length():
    good, bad = (sample("p", texts, num_tokens=[9, 9], system=texts) for texts in ("ab", "cd"))
    bad.num_tokens = [12, 13]
    for gap, left in ((None, "ab"), (3, "a"), (4, "ab"), (2, "")):
        pairs, pair_set = made(contrast, {"positive": [good], "negative": [bad]}, contrast.Options(gap))
        assert "".join(text for _, text, _ in outline(pairs)) == left
        assert pair_set.responses[contrast.GAP] == 2 - len(left)
    bad.num_tokens = None
    with pytest.raises(UserError, match="'p' has no `num_tokens`"):
        made(contrast, {"positive": [good], "negative": [bad]}, contrast.Options(3))


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        (sample("p", "a", system="Be."), sample("p", "b", system="Be."), "the same prompt.*no contrast"),
        (sample("p", "a"), sample("p", "b"), "the same prompt"),
        (sample("p", "ab", system="Be good."), sample("p", "c"), "2 responses in --positive, 1 in --negative"),
    ],
    ids=["equal system prompts", "none at all", "unequal numbers"],
)
def test_contrast_refuses_what_is_none(good, bad, message):
    with pytest.raises(UserError, match="'p'.*" + message):
        made(contrast, {"positive": [good], "negative": [bad]})


def test_a_prompt_that_is_named_as_a_further_pair_is_refused():
    data = {"samples": [sample("p", "ab"), sample("p#2", "ab")], "conversations": map(conversation, ("p", "p#2"))}
    with pytest.raises(UserError, match="'p#2'.*UUID#2"):
        made(spin, data)


@given(st.permutations(range(5)), st.lists(st.integers(0, 6), unique=True), st.sampled_from([1, 1024]))
def test_a_lookup_finds_each_record_once_in_any_order(held, asked, most):
    """Whole records, from memory or from disk."""
    records = [sample(f"p{i}", ["x"] * i, [0]) for i in held]
    lookup = Lookup(records, Samples)
    Waiting.MOST, before = most, Waiting.MOST
    try:
        found = [lookup.take(f"p{i}") for i in asked]
        assert found == [next((one for one in records if one.uuid == f"p{i}"), None) for i in asked]
        assert lookup.rest() == len({*held} - {*asked})
    finally:
        Waiting.MOST = before


def test_after_a_stop_string_no_end_of_turn_is_trained_on():
    """Such a response is complete, and may be in a pair; a truncated one may not."""
    ended = {"finish_reason": ["stop_string", "stop", "length"]}
    good, bad = (Samples(uuid="a", prompt=[Message("user", t)], responses=[t, f"{t}1", f"{t}2"], **ended) for t in "+-")
    files = {"positive": [good], "negative": [bad], "prompts": [Prompt(uuid="a", messages=[Message("user", "?")])]}
    pairs = list(build_candidates(contrast.candidates(files, contrast.Options())).pairs)
    assert [(p.selected_truncated, p.rejected_truncated) for p in pairs] == [(True, True), (False, False)]
