"""Pairwise preference models: the form byte for byte, training data, shares against plain forward passes, knockouts."""

import itertools
import math
import pickle
from functools import partial

import jinja2
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp
from test_judge import make_model

from cream.data.pairwise import ALIKE, EMPTY, EQUAL, UNFINISHED, PairwiseFlags, chosen_first, examples
from cream.errors import UserError
from cream.files import store
from cream.files.journal import Output
from cream.files.provenance import Provenance
from cream.model.batches import predicting
from cream.model.load import load_chat
from cream.model.trees import branches, pack
from cream.preferences import bradley_terry, win_rates
from cream.records import Message, Pair, Rewards, Samples
from cream.rewards import base, pairwise, passes
from cream.rewards.pairwise import Options, log_share, matches, mean_share, share
from cream.scoring.logprobs import Scored, encode, join_groups
from cream.scoring.pool import Pool
from cream.text import pairwise as form

PROMPT = [Message("user", "What is 2 + 3?")]
TURNS = [*PROMPT, Message("assistant", "5."), Message("user", " And\n4 + 4? ")]
SYSTEM = [Message("system", "Be kind."), *PROMPT]

# RLHFlow's template (pair-pm, with its blank lines), which transformers renders with these two settings.
TEMPLATE = (
    "\n{% for message in messages %}{% if loop.index0 % 2 == 0 %}\n\n<turn> user\n {{ message['content'] }}"
    "{% else %}\n\n<turn> assistant\n {{ message['content'] }}{% endif %}{% endfor %}\n\n\n"
)


@pytest.mark.parametrize("prompt", [PROMPT, TURNS])
def test_the_form_is_rlhflow_s_byte_for_byte(prompt):
    plain = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(TEMPLATE)
    context = plain.render(messages=[{"content": message.content} for message in prompt])
    (asked,) = form.ask(prompt, "It is {5}.", " 6\n")
    assert asked == Message("user", f"[CONTEXT] {context} [RESPONSE A] It is {{5}}. [RESPONSE B]  6\n \n")
    if prompt is TURNS:
        assert context == ("\n\n<turn> user\n What is 2 + 3?\n<turn> assistant\n 5.\n<turn> user\n  And\n4 + 4? \n")


# Training data --------------------------------------------------------------------------------------------------------


def pair(selected="5", rejected="6", prompt=PROMPT, **more):
    turn = [[*prompt, Message("assistant", text)] for text in (selected, rejected)]
    return Pair(uuid=more.pop("uuid", "a"), prompt=prompt, selected=turn[0], rejected=turn[1], **more)


def read(record):
    """(response A, response B, label) of a training record."""
    request, label = record.messages
    a, b = request.content.removesuffix(" \n").partition(" [RESPONSE A] ")[2].split(" [RESPONSE B] ")
    return a, b, label.content


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.text("abc#0", min_size=1), st.booleans())
def test_an_order_is_drawn_for_each_pair(seed, uuid, multi):
    given = pair(uuid=uuid, prompt=TURNS if multi else PROMPT, consistency=0.9, extra={"source": "x"})
    (one,) = examples(given, PairwiseFlags(), seed)
    first, second = examples(given, PairwiseFlags("both"), seed)
    assert read(one) == (("5", "6", "A") if chosen_first(uuid, seed) else ("6", "5", "B"))
    assert {read(first), read(second)} == {("5", "6", "A"), ("6", "5", "B")} and read(first) == read(one)
    assert (one.uuid, first.uuid, second.uuid) == (uuid, f"{uuid}#1", f"{uuid}#2") and one.extra == {"source": "x"}


def test_orders_are_drawn_evenly_and_by_the_seed():
    drawn = [[chosen_first(str(i), seed) for i in range(2000)] for seed in (0, 1)]
    assert all(900 < sum(each) < 1100 for each in drawn)
    assert 900 < sum(a == b for a, b in zip(*drawn, strict=True)) < 1100


def test_neither_is_better_is_the_label_same():
    (same,) = examples(pair(consistency=0.5), PairwiseFlags(with_same=True), 0)
    assert read(same)[2] == "Same" and {*read(same)[:2]} == {"5", "6"}
    assert {read(each)[2] for each in examples(pair(), PairwiseFlags("both", with_same=True), 0)} == {"A", "B"}


def test_the_better_one_is_that_of_the_confidence():
    """A pair of which `rejected` is the likelier one must not keep the label that it was given, as in SSRM's code."""
    (one,) = examples(pair(consistency=0.05), PairwiseFlags(), 0)
    a, b, label = read(one)
    assert {"A": a, "B": b}[label] == "6"


DROPPED = {
    "neither is better": (pair(consistency=0.5), EQUAL),
    "equal": (pair("5", "<think>6?</think>\n\n5"), ALIKE),
    "empty": (pair("5", " \n"), EMPTY),
    "a thought alone": (pair("5", "<think>never"), UNFINISHED),
    "a system message": (pair(prompt=SYSTEM), form.NO_SYSTEM),
}


@pytest.mark.parametrize(("given", "reason"), DROPPED.values(), ids=DROPPED)
def test_why_a_pair_is_dropped(given, reason):
    assert examples(given, PairwiseFlags(), 0) == reason


# Probabilities --------------------------------------------------------------------------------------------------------

LOGS = st.lists(st.floats(-2000, 0), min_size=2, max_size=3)


@settings(max_examples=30)
@given(LOGS)
def test_a_share_is_a_softmax_over_the_labels(logs):
    """P(A) + P(Same) / 2 after a softmax over two or three tokens."""
    p = [math.exp(value - logsumexp(logs)) for value in logs]
    assert share(logs) == pytest.approx(p[0] + (p[2] / 2 if len(p) == 3 else 0), abs=1e-12)
    assert log_share(logs) <= 0 and share([*logs[:-1], None]) is None
    swapped = [logs[1], logs[0], *logs[2:]]
    assert share(logs) + share(swapped) == pytest.approx(1, abs=1e-12)


def test_shares_by_hand():
    assert share([math.log(0.3), math.log(0.1)]) == pytest.approx(0.75)
    assert share([math.log(0.3), math.log(0.1), math.log(0.2)]) == pytest.approx((0.3 + 0.1) / 0.6)
    assert log_share([-1500.0, -20.0]) == -1480.0  # no overflow, and no 0


@settings(max_examples=30)
@given(LOGS, LOGS)
def test_both_orders_count_alike(one, other):
    other = other[: len(one)] + [-1.0] * (len(one) - len(other))
    by_other = 1 - share(other)
    assert mean_share(one, other) == pytest.approx((share(one) + by_other) / 2, abs=1e-12)
    assert mean_share(one, [*other[:-1], None]) is None


def combine(texts, shares, **flags):
    """Rewards of texts, given P(A) of each request in its order."""
    options = Options(reward_model="rm", **flags)
    pairwise.check(options)
    sample = Samples(uuid="a", prompt=PROMPT, responses=list(texts))
    long = Scored([None, None], [0, 0], ["too long"] * 2)
    scored = [long if p is None else Scored([math.log(p), math.log(1 - p)], [1, 1], [None, None]) for p in shares]
    return pairwise.combine(sample, {pairwise.ROLE: scored}, options)


def test_rewards_are_of_the_mean_over_both_orders():
    found = combine(["x", "y", "x"], [0.8, 0.4])  # x first, then y first
    assert found.preferences == [[None, pytest.approx(0.8), None], [pytest.approx(0.4), None, pytest.approx(0.4)],
                                 [None, pytest.approx(0.8), None]]  # fmt: skip
    assert found.reward == pytest.approx([0.7, 0.3, 0.7])
    strengths = combine(["x", "y"], [0.8, 0.4], preference_score="bradley_terry").reward
    assert strengths[0] - strengths[1] == pytest.approx(math.log(0.7 / 0.3), abs=1e-3)


def test_a_comparison_that_does_not_fit_is_unknown():
    found = combine(["x", "y"], [0.8, None])
    assert found.reward == [None, None] and found.reason == ["too long"] * 2
    assert combine(["x"], []).reason == [base.ALONE]


def test_a_model_that_does_not_mean_the_labels_has_no_say():
    """A policy, say: the share of A in what little A and B have is that of nothing."""
    sample = Samples(uuid="a", prompt=PROMPT, responses=["x", "y"])
    for logprob, reason in (([-9.0, -7.0], pairwise.NO_LABEL), ([-4.0, -7.0], None)):
        scored = [Scored(logprob, [1, 1], [None, None])] * 2
        found = pairwise.combine(sample, {pairwise.ROLE: scored}, Options(reward_model="rm"))
        assert found.reason == [reason] * 2 and (found.reward[0] is None) == (reason is not None)


def test_a_prompt_that_the_form_has_no_place_for_has_no_reward():
    sample = Samples(prompt=SYSTEM, responses=["5", "6"])
    assert pairwise.requests("rm", sample, Options()) == []
    found = pairwise.combine(sample, {"rm": []}, Options())
    assert found.reward == [None, None] and found.reason == [form.NO_SYSTEM] * 2


# Knockout -------------------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.integers(1, 17), st.data())
def test_a_knockout_compares_n_minus_1_times(n, data):
    """Whoever is left beat all that it met, and has the highest strength of all by the comparisons that were made."""
    players, rounds, known = [str(i) for i in range(n)], [], {}
    while now := matches(players, rounds):
        shares = data.draw(st.lists(st.sampled_from([0.1, 0.4, 0.6, 0.7]), min_size=len(now), max_size=len(now)))
        known |= dict(zip(now, shares, strict=True))
        rounds.append(shares)
    assert len(known) == n - 1 and len(rounds) == math.ceil(math.log2(n))
    beaten = [b if share > 0.5 else a for (a, b), share in known.items()]
    (left,) = {*players} - {*beaten}
    table = [[known.get((a, b)) for b in players] for a in players]
    strengths = bradley_terry(table)
    assert n == 1 or max(range(n), key=strengths.__getitem__) == int(left)


@settings(max_examples=30)
@given(st.permutations(range(11)))
def test_the_strongest_of_a_transitive_order_wins(order):
    rounds = []
    while now := matches(order, rounds):
        rounds.append([1 / (1 + math.exp(b - a)) for a, b in now])
        final = now
    assert 10 in final[0] and len(final) == 1


def test_a_tie_or_an_unknown_match_is_the_first_one_s():
    assert matches("abcd", [[0.5, None]]) == [("a", "c")]
    assert matches("abcde", [[0.2, 0.9]]) == [("e", "b")] and matches("abcde", [[0.2, 0.9], [0.9]]) == [("c", "e")]


# Against plain forward passes -----------------------------------------------------------------------------------------


RESPONSES = ["It is 5.", "6", "<end>Answer: 10", "7!", "It is 5.", "<think>5</think>8"]


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def model(request, tiny_tokenizer, tmp_path_factory):
    """(folder, the model as transformers loads it), of a tokenizer that has the label Same as one token."""
    import copy

    from test_trees import MODELS

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens("Same")
    folder = tmp_path_factory.mktemp("pm") / request.param
    long = {"max_position_embeddings": 512}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, request.param, MODELS[request.param] | long)
        return folder, make_model(request.param, tokenizer, folder)


def reward(folder, path, samples, again=False, **flags):
    """What rewarding.py makes of some samples."""
    options = Options(reward_model=str(folder), **flags)
    pairwise.check(options)
    store.write(path.with_name("samples.jsonl"), samples)
    source = path.with_name("samples.jsonl")
    run = passes.Run(pairwise, options, source, partial(store.read, source, Samples))
    provenance = Provenance()
    provenance.model(pairwise.ROLE, folder)
    output = Output(path, {}, provenance)
    how = {"pool": lambda: Pool("cpu"), "bf16": False, "text": {}, "skip": False, "show": False}
    passes.score_all(run, output, {pairwise.ROLE: folder}, len(samples), **how)
    output.finish(passes.rewards(run, output))
    return list(store.read(path, Rewards))


@torch.no_grad()
def plain_share(model, chat, a, b, labels, prompt=PROMPT):
    """P(A) as released: softmax over the labels' logits after the prompt alone, in the model's own forward pass."""
    text = form.ask(prompt, *(each.replace("<end>", "<\\end>") for each in (a, b)))[0].content
    messages = [{"role": "user", "content": text}]
    ids = chat.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    tokens = [chat.tokenizer.encode(label, add_special_tokens=False) for label in labels]
    assert all(len(each) == 1 for each in tokens)
    logits = model(torch.tensor([ids])).logits[0, -1, [each[0] for each in tokens]].double()
    shares = logits.softmax(0).tolist()
    return shares[0] + sum(shares[2:]) / 2


@pytest.mark.parametrize("with_same", [False, True])
def test_preferences_equal_plain_forward_passes(model, tmp_path, with_same, monkeypatch):
    monkeypatch.setattr(pairwise, "LEAST", 1e-6)  # the model is random
    folder, plain = model
    chat = load_chat(folder)
    sample = Samples(uuid="a", prompt=PROMPT, responses=RESPONSES)
    other = Samples(uuid="b", prompt=TURNS, responses=["8", "9"])
    found, second = reward(folder, tmp_path / "out.jsonl", [sample, other], with_same=with_same)
    texts, labels = [*RESPONSES[:5], "8"], form.labels(with_same)
    for (i, a), (j, b) in itertools.product(enumerate(texts), repeat=2):
        wanted = None if a == b else pytest.approx(plain_share(plain, chat, a, b, labels), abs=1e-4)
        assert found.preferences[i][j] == wanted
    assert found.reward == [win_rates([row[:4] + row[5:] for i, row in enumerate(found.preferences) if i != 4])[k]
                            for k in (0, 1, 2, 3, 0, 4)]  # fmt: skip
    assert second.preferences[0][1] == pytest.approx(plain_share(plain, chat, "8", "9", labels, TURNS), abs=1e-4)

    knockout = {"tournament": "knockout", "preference_score": "bradley_terry", "with_same": with_same}
    by_knockout, _ = reward(folder, tmp_path / "knockout.jsonl", [sample, other], **knockout)
    compared = [(i, j) for i in range(6) for j in range(6) if by_knockout.preferences[i][j] is not None]
    assert len({frozenset((texts[i], texts[j])) for i, j in compared}) == 4  # of 5 different texts
    assert all(by_knockout.preferences[i][j] == found.preferences[i][j] for i, j in compared)  # from the score cache
    (tmp_path / "samples.scores.jsonl").unlink()
    again, _ = reward(folder, tmp_path / "again.jsonl", [sample, other], **knockout)
    for i, j in compared:
        assert again.preferences[i][j] == pytest.approx(found.preferences[i][j], abs=1e-5)


def test_a_label_stands_where_training_puts_it(model, tmp_path):
    """A request's last token is the one before the label in the SFT row of the same pair."""
    chat, options = load_chat(model[0], **passes.QUOTING), Options(reward_model="rm", with_same=True)
    for label, consistency in (("A", None), ("B", None), ("Same", 0.5)):
        flags = PairwiseFlags("both", with_same=True)
        record = next(
            each for each in examples(pair(consistency=consistency), flags, 0) if each.messages[-1].content == label
        )
        (row,) = load_chat(model[0]).encode_conversation(record.messages)
        group = pairwise._group(PROMPT, options.labels, read(record)[:2])
        scored = dict(zip(options.labels, encode(group, chat, 4096)[0], strict=True))[label]
        assert row.ids[: len(scored)] == scored.ids and row.ids[len(scored) :] == [chat.end_of_turn]
        assert row.spans[0][0] == scored.spans[0][0] == len(scored) - 1


def test_the_first_response_is_shared_by_its_opponents(tiny_chat):
    """The prompt is laid out once, each of five responses once as A and four times as B."""
    texts = [f"{word} " * 40 for word in ("one", "two", "six", "ten", "few")]
    sample = Samples(prompt=[Message("user", "why " * 80)], responses=texts)
    groups = [encode(group, tiny_chat, 9999)[0] for group in pairwise.requests("rm", sample, Options())]
    (joined,) = join_groups(groups)
    tokens = sum(branch.end - branch.start for branch in branches(joined))
    own = len(groups[0][0]) - len(tiny_chat.encode_prompt(form.ask(sample.prompt, "", texts[1]))) - 1  # of a response
    rest = len(groups[0][0]) - 2 * own
    assert rest + 25 * own <= tokens < rest + 25 * own + 20 * 30  # and what stands around responses
    assert len(pack([joined], places=predicting).source) == 40


def test_a_label_of_several_tokens_is_refused(tiny_folder, tmp_path):
    samples = [Samples(uuid="a", prompt=PROMPT, responses=["5", "6"])]
    with pytest.raises(UserError, match=r"the label 'Same' is not one token of its tokenizer \(4 tokens\)"):
        reward(tiny_folder, tmp_path / "out.jsonl", samples, with_same=True)
    assert not (tmp_path / "out.jsonl").exists()


def test_what_is_played_belongs_to_the_samples_as_they_are(tiny_folder):
    """A journal's rounds are of this bracket; requests go to replicas."""
    from cream.scoring import rounds

    options = Options(reward_model="rm", tournament="knockout", preference_score="bradley_terry")

    def request(texts):
        (one,) = pairwise.requests("rm", Samples(prompt=PROMPT, responses=list(texts)), options)
        return pickle.loads(pickle.dumps(one))

    three, played = request("xyz"), rounds.Played([])
    scored = Scored([-1.0, -2.0], [1, 1], [None, None])
    while groups := three.following(played.rounds):
        played.rounds.append([scored] * len(groups))
    assert [len(each) for each in played.rounds] == [2, 2]
    row = rounds.as_row(played)
    assert rounds.from_row(row, request("xyz")) == played
    assert rounds.from_row(row, request("xyzw")) is None and rounds.from_row(row, request("xy")) is None
    assert rounds.from_row({"rounds": row["rounds"][:1]}, request("xyz")) is None


# Forms and flags ------------------------------------------------------------------------------------------------------


def test_a_model_that_was_trained_on_something_else_is_refused(tmp_path):
    own, wide = form.describe_form(False), form.describe_form(True)
    objects = partial(pairwise.objection, folder=tmp_path)
    assert objects(Options(), about={}) is None  # from elsewhere, RLHFlow's own, say
    assert objects(Options(), about={"pairwise": own}) is None
    assert "was not trained to compare" in objects(Options(), about={"kind": "policy"})
    assert "A, B, Same: give --with_same yes" in objects(Options(), about={"pairwise": wide})
    assert "A, B: give --with_same no" in objects(Options(with_same=True), about={"pairwise": own})
    assert "other words" in objects(Options(), about={"pairwise": own | {"template": "0"}})


def test_flags_that_contradict_each_other():
    with pytest.raises(UserError, match="--reward pairwise needs --reward_model"):
        pairwise.check(Options())
    with pytest.raises(UserError, match="give --preference_score bradley_terry"):
        pairwise.check(Options(reward_model="rm", tournament="knockout"))


# Command lines --------------------------------------------------------------------------------------------------------


def test_from_pairs_to_rewards(looped):
    """Data, training, rewards, and the pairs that these make."""
    source, data = "outputs/loop/pairs.json", "outputs/pm.sft.json"
    out = looped.run(f"prepare_data.py pairwise {source} --orders both --output {data}").out
    records = looped.read(data)
    assert f"{data}: {len(records)} records, {len(records) // 2} A, {len(records) // 2} B" in out
    assert "is up to date" in looped.run(f"prepare_data.py pairwise {source} --orders both --output {data}").out
    meta = looped.read(f"{data}.meta.json")
    assert meta["pairwise"] == form.describe_form(False)
    (train,) = [line for line in out.splitlines() if line.startswith("  python train.py")]
    train += " --model tiny --device cpu --train_bsz 8 --limit_size 8 --epoch 8 --lr 1e-2 --output_dir outputs/pm"
    looped.run(train.strip().removeprefix("python "))
    assert looped.read("outputs/pm/checkpoint-last/cream.json")["pairwise"] == meta["pairwise"]

    ask = "rewarding.py --device cpu --model tiny --input_file outputs/loop/samples.jsonl --reward pairwise"
    own, limit = "--reward_model outputs/pm/checkpoint-last", "--limit_size 4"
    looped.run(f"{ask} {own} {limit} --output outputs/pm.json")
    for record in looped.read("outputs/pm.json").values():
        rewards = dict(zip([turns[-1]["content"] for turns in record["response"]], record["reward"], strict=True))
        assert sum(rewards.values()) == pytest.approx(len(rewards) / 2)  # each comparison has one win
    knockout = "--tournament knockout --preference_score bradley_terry"
    out = looped.run(f"{ask} {own} {limit} {knockout} --output outputs/ko.json").out
    assert "from the score cache" in out and "computed" not in out
    looped.run("make_pairs.py --strategy extremes --rewards outputs/ko.json --output outputs/ko.pairs.json")

    other = f"{ask} --reward_model outputs/loop/m1/checkpoint-last --output outputs/no.json"
    assert "was not trained to compare two responses" in looped.refused(other)
    wide = f"{ask} {own} --with_same yes --output outputs/no.json"
    assert "was trained on the labels A, B: give --with_same no" in looped.refused(wide)
    assert "'Same' is not one token" in looped.refused(f"{wide} --force")
    assert "holds prompts with responses" in looped.refused("prepare_data.py pairwise outputs/loop/samples.jsonl")
    assert "pairwise does not use --agree" in looped.refused(f"prepare_data.py pairwise {source} --agree position")
