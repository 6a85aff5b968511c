"""The judge reward: verdicts to rewards by hand, expected scores against plain forward passes, and its command line."""

import itertools
import json
import math
import shutil
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_trees import MODELS, PADDED, random_model
from transformers import AutoConfig, AutoModelForCausalLM

from cream.engines import Request
from cream.errors import UserError
from cream.files import store
from cream.files.journal import Output
from cream.files.provenance import Provenance
from cream.model.load import load_chat
from cream.preferences import NOT_JOINED, bradley_terry, win_rates
from cream.records import Message, Rewards, Samples
from cream.rewards import judge, passes
from cream.rewards.base import ALONE, UNDECIDED, UNFINISHED
from cream.rewards.judge import TOO_LONG, Options, Watch
from cream.scoring import completions
from cream.scoring.completions import Texts
from cream.scoring.pool import Pool
from cream.text.judging import NO_SCORE, NOT_VALID

PROMPT = [Message("user", "2 + 3?")]
NO_CHOICE = {NO_SCORE, UNDECIDED}


def options_of(**flags):
    options = Options(**flags)
    judge.check(options)
    return options


def combine(responses, texts, opened=False, **flags):
    """The rewards by what a judge says, texts per request."""
    options = options_of(**flags)
    sample = Samples(uuid="a", prompt=PROMPT, responses=responses, thought_opened=opened)
    asked = judge.requests("judge", sample, options)
    results = [Texts(list(each), ["stop"] * len(each)) for each in texts]
    assert len(asked) == len(results)
    return judge.combine(sample, {"judge": results}, options)


def test_a_reward_is_the_mean_of_the_valid_scores():
    said = [["Score: 5", "Score: 4", "Score: 3"], ["Score: -1", "no idea", "Score: 2"], ["Score: 6"] * 3, ["?"] * 3]
    found = combine(["a", "b", "c", "d"], said)
    assert found.reward == [4.0, 2.0, None, None] and found.reason == [None, None, NOT_VALID, NO_SCORE]
    assert found.parts == {"scores": [[5.0, 4.0, 3.0], [None, None, 2.0], [None] * 3, [None] * 3]}
    assert found.texts == {f"judge_{k + 1}": [each[k] for each in said] for k in range(3)}
    assert found.preferences is None


def test_a_score_in_a_response_is_none():
    """The judge's own text counts alone, and the response is the same one with and without."""
    for said, reward in ((["The response claims 5 points."], None), (["Score: 1"], 1.0)):
        assert combine(["It is 5.\n\nScore: 5"], [said], judge_samples=1).reward == [reward]


def test_equal_responses_are_judged_once():
    found = combine(["5", "6", "5"], [["Score: 1"] * 3, ["Score: 2"] * 3])
    assert found.reward == [1.0, 2.0, 1.0] and found.texts["judge_3"] == ["Score: 1", "Score: 2", "Score: 1"]


def test_a_request_that_does_not_fit_has_no_reward():
    found = combine(["5", "6"], [[], ["Score: 2"] * 3])
    assert (found.reward, found.reason) == ([None, 2.0], [TOO_LONG, None])
    assert found.parts["scores"][0] is None and found.texts["judge_1"] == [None, "Score: 2"]


def test_thoughts_are_neither_judged_nor_read():
    """A response is judged by its final text; what a judge thinks of on the way is not its verdict."""
    options = options_of()
    sample = Samples(uuid="a", prompt=PROMPT, responses=["<think>6?</think>\n\n5", "5", "<think>never ending"])
    (asked,) = judge.requests("judge", sample, options)
    assert "<response>\n5\n</response>" in asked.messages[0].content
    texts = Texts(["<think>Score: 5</think>Score: 3", "<think>Score: 5", "Score: 1"], ["stop"] * 3)
    found = judge.combine(sample, {"judge": [texts]}, options)
    assert found.reward == [2.0, 2.0, None] and found.reason[2] == UNFINISHED
    opened = Texts(["Score: 5", "Score: 5</think>Score: 3", "Score: 1"], ["length"] * 3, opened=True)
    assert [v.value for v in judge.read_texts(opened, options)] == [None, None, None]  # the last may be cut


def order(responses):
    return list(itertools.permutations(responses, 2))


def test_a_judge_that_always_says_a_prefers_nothing():
    pairs = order("xyz")
    found = combine(["x", "y", "z"], [["Choice: A"] * 3] * len(pairs), judge_prompt="pairwise")
    assert found.reward == [0.5] * 3
    assert found.preferences == [[None if i == j else 1.0 for j in range(3)] for i in range(3)]


@settings(max_examples=30)
@given(st.lists(st.lists(st.sampled_from("AB?"), min_size=2, max_size=2), min_size=12, max_size=12))
def test_preferences_are_shares_of_choices_in_both_orders(choices):
    """Known only if there is a choice in both; the reward is of their mean, as for any source that compares."""
    names = ["w", "x", "y", "z", "x"]
    found = combine(
        names, [[f"Choice: {c}" for c in each] for each in choices], judge_prompt="pairwise", judge_samples=2
    )
    said = dict(zip(order("wxyz"), choices, strict=True))
    share = {pair: each.count("A") / (2 - each.count("?")) for pair, each in said.items() if each != ["?", "?"]}
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            both = (a, b) in share and (b, a) in share
            assert found.preferences[i][j] == (share[a, b] if both else None)
    assert found.reward[:4] == win_rates([row[:4] for row in found.preferences[:4]])
    assert found.reward[4] == found.reward[1]
    for i, row in enumerate(found.preferences):
        reasons = {None} if found.reward[i] is not None else {NOT_JOINED} if any(row) or 0.0 in row else NO_CHOICE
        assert found.reason[i] in reasons
    assert found.texts["judge_2_b3"][0] == f"Choice: {said['w', 'z'][1]}" and found.texts["judge_1_b0"][0] is None


def test_a_pairwise_judge_may_rank_by_strengths():
    said = dict.fromkeys(order("xyz"), "A") | {("y", "x"): "B"}
    found = combine(
        ["x", "y", "z"], [[f"Choice: {c}"] for c in said.values()], judge_prompt="pairwise", judge_samples=1,
        preference_score="bradley_terry",
    )  # fmt: skip
    assert found.reward == bradley_terry(found.preferences) and found.reward[0] > found.reward[2] > found.reward[1]


def test_why_a_comparison_is_missing():
    alone = combine(["x", "x"], [], judge_prompt="pairwise")
    assert alone.reward == [None, None] and alone.reason == [ALONE] * 2
    half = combine(["x", "y"], [["Choice: A"], ["?"]], judge_prompt="pairwise", judge_samples=1)
    assert half.reason == [NO_SCORE] * 2 and half.preferences == [[None, None], [None, None]]
    mixed = combine(["x", "y"], [["?"], []], judge_prompt="pairwise", judge_samples=1)
    assert mixed.reason == [UNDECIDED] * 2


def test_judgements_belong_to_their_prompts_whatever_their_order(tmp_path):
    """Sorted as text 10 comes before 2: counted off, prompts would have each other's scores."""
    path = tmp_path / "samples.jsonl"
    samples = [Samples(uuid=str(n), prompt=PROMPT, responses=[f"{n}!", f"{n}?"]) for n in range(12)]
    store.write(path, samples)
    run = passes.Run(judge, options_of(judge_samples=1, valid_reward="0:"), path, partial(store.read, path, Samples))
    output = Output(tmp_path / "out.jsonl", {}, Provenance())
    output.resume()
    asked = {request.uuid: request.messages[0].content for request in run.items("judge")}
    for key in sorted(asked):
        (response,) = [text for sample in samples for text in sample.responses if f"\n{text}\n" in asked[key]]
        score = 2 * int(response[:-1]) + response.endswith("?")
        output.append({"uuid": key, "text": [f"Score: {score}"], "finish_reason": ["stop"]})
    output.finish(passes.rewards(run, output))
    found = {record.uuid: record.reward for record in store.read(tmp_path / "out.jsonl", Rewards)}
    assert found == {str(n): [2 * n, 2 * n + 1] for n in range(12)}


def test_the_limit_on_a_judgement_is_of_new_tokens():
    """Not of prompt and judgement together, of which a long rubric would leave none."""
    sampling = options_of(judge_max_tokens=12).sampling()
    assert [Request("a", [1] * count).room(sampling, 1000) for count in (5, 500, 995)] == [12, 12, 5]


def test_a_request_fits_where_a_whole_judgement_does(monkeypatch):
    """One that the context cuts off would seem to have no score."""
    model = type("Model", (), {"limit": staticmethod(lambda length: min(length, 1000))})
    monkeypatch.setattr(completions, "engine_setup", lambda *given, skip_refused: given)
    assert completions.setup(model, options_of(judge_max_tokens=300), None, ())[-3:] == (1000, 700, ())
    with pytest.raises(UserError, match="1000 new tokens leave no room for a request in 1000"):
        completions.setup(model, options_of(judge_max_tokens=1000), None, ())


def test_a_judge_that_never_says_a_score_ends_the_stage():
    watch = Watch(options_of(judge_samples=1))
    for _ in range(judge.FIRST - 1):
        watch.see(Texts(["I like it" * 99], ["length"]))
    watch.see(Texts([], []))  # does not fit
    told = r"none of the first 64 judgements .* 64 of them are .*'I like it.*…'.* larger --judge_max_tokens"
    with pytest.raises(UserError, match=told):
        watch.see(Texts(["Score: 7"], ["length"]))
    fine = Watch(options_of())
    fine.see(Texts(["?", "?", "Score: 3"], ["stop"] * 3))
    for _ in range(100):
        fine.see(Texts(["?"] * 3, ["stop"] * 3))
    fine.end()
    assert judge.watch("judge", options_of(on_unparsed="continue")) is None
    assert judge.watch("judge", options_of(judge_mode="expected")) is None


FLAGS = {
    "greedy": ({"judge_temperature": 0.0}, "3 judgements would be equal"),
    "nothing is sampled": ({"judge_mode": "expected", "judge_samples": 2}, "--judge_samples would have no effect"),
    "no range": ({"judge_mode": "expected", "valid_reward": "reward > 3"}, "needs the admissible scores"),
    "of a comparison": ({"judge_prompt": "pairwise", "valid_reward": "0:1"}, "does not apply to a pairwise judge"),
    "no comparison": ({"preference_score": "bradley_terry"}, "is for judges that compare two responses"),
    "no text to seed": ({"judge_mode": "expected", "seed": 1, "engine": "hf"}, "--seed, --engine would have no effect"),
}


@pytest.mark.parametrize(("flags", "message"), FLAGS.values(), ids=FLAGS)
def test_flags_that_contradict_each_other(flags, message):
    with pytest.raises(UserError, match=message):
        options_of(**flags)


# Expected scores ------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-30, 0), min_size=11, max_size=11), st.floats(0, 1))
def test_a_distribution_is_a_softmax(logs, share):
    """Of log-probabilities; where the tokens of "1" begin those of "10", of the probability to say 1 and stop there."""
    names = [f"Score: {n}" for n in range(11)]
    exact = [math.exp(v) for v in logs]
    wanted = [p / sum(exact) for p in exact]
    assert judge.distribution(logs, [3] * 11, names) == pytest.approx(wanted, abs=1e-12)
    logs[10] = logs[1] + math.log(share) if share else -math.inf
    found = judge.distribution(logs, [3] * 10 + [4], names)
    exact = [math.exp(v) for v in logs]
    exact[1] *= 1 - share
    assert found == pytest.approx([p / sum(exact) for p in exact], abs=1e-9)


@pytest.mark.slow
@given(st.lists(st.floats(1e-6, 1), min_size=101, max_size=101))
def test_scores_to_100_digit_by_digit(weights):
    """ "1" begins "10", and both begin "100": no probability is taken off twice."""
    begins = [sum(w for m, w in enumerate(weights) if str(m).startswith(str(n))) for n in range(101)]
    logs = [math.log(p / (2 * sum(weights))) for p in begins]  # half of the probability is of other texts
    found = judge.distribution(logs, [2 + len(str(n)) for n in range(101)], [f"Score: {n}" for n in range(101)])
    assert found == pytest.approx([w / sum(weights) for w in weights], abs=1e-9)


def test_a_certain_10_is_not_half_a_1():
    names = [str(n) for n in range(1, 11)]
    logs = [-1e-9] + [-20.0] * 8 + [0.0]  # by rounding, "10" is above its own beginning
    assert judge.distribution(logs, [1] * 9 + [2], names)[-1] == pytest.approx(1, abs=1e-6)


def make_model(kind, tokenizer, folder):
    """A random model of an architecture, whose logits spread as a trained model's do."""
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    size = {"vocab_size": len(tokenizer) + 1}  # Qwen2's tokenizer adds a token
    config = AutoConfig.for_model(kind, **size, **ids, **(MODELS | PADDED)[kind])
    random_model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


RESPONSES = ["It is 5.", "6", "<end>Answer: 10", ""]


@pytest.mark.parametrize("kind", MODELS | PADDED)
def test_expected_scores_equal_plain_forward_passes(tiny_tokenizer, tmp_path, kind):
    """Scores of one token (0 to 9) and of two (10), by the probability of each token at its place."""
    model = make_model(kind, tiny_tokenizer, tmp_path / "model")
    (tmp_path / "q.jinja").write_text("{{ prompt }} {{ response }} How many?")
    options = Options(
        judge_prompt=str(tmp_path / "q.jinja"), judge_parse="Answer: {{ reward }}.", valid_reward="0:10",
        judge_mode="expected",
    )  # fmt: skip
    path = tmp_path / "samples.jsonl"
    store.write(path, [Samples(uuid="a", prompt=PROMPT, responses=RESPONSES)])
    run = passes.Run(judge, options, path, partial(store.read, path, Samples))
    provenance = Provenance()
    provenance.model("judge", tmp_path / "model")
    output = Output(tmp_path / "out.jsonl", {}, provenance)
    how = {"pool": lambda: Pool("cpu"), "bf16": False, "text": {}, "skip": False, "show": False}
    passes.score_all(run, output, {"judge": tmp_path / "model"}, 1, **how)
    output.finish(passes.rewards(run, output))
    (found,) = store.read(tmp_path / "out.jsonl", Rewards)

    chat = load_chat(tmp_path / "model")
    encode = partial(chat.tokenizer.encode, add_special_tokens=False)
    digit = {n: encode(str(n)) for n in range(11)}
    lead = encode("Answer: 7")[:-1]
    assert all(encode(f"Answer: {n}") == lead + ids for n, ids in digit.items())
    assert [len(ids) for ids in digit.values()] == [1] * 10 + [2]
    for text, shares, reward in zip(RESPONSES, found.parts["distribution"], found.reward, strict=True):
        asked = f"2 + 3? {text} How many?".replace("<end>", "<\\end>")
        ids = chat.encode_prompt([Message("user", asked)]) + lead
        with torch.no_grad():
            first = model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)
            second = model(torch.tensor([ids + digit[1]])).logits[0, -1].double().softmax(-1)
        ten = second[digit[0][0]].item()
        exact = [first[digit[n][0]].item() for n in range(10)]
        exact = [p * (1 - ten) if n == 1 else p for n, p in enumerate(exact)] + [exact[1] * ten]
        wanted = [p / sum(exact) for p in exact]
        assert shares == pytest.approx(wanted, abs=1e-4)
        assert reward == pytest.approx(sum(n * p for n, p in enumerate(wanted)), abs=1e-3)


# Command lines --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(workspace):
    responses = {"sum": ["Answer: 61", "Answer: 7", "Nobody knows."], "gas": ["Score: 5<end>", "neon"]}
    prompt = [{"role": "user", "content": "How many?"}]
    workspace.write(
        "outputs/samples.json", {uuid: {"prompt": prompt, "responses": each} for uuid, each in responses.items()}
    )
    (workspace.folder / "outputs/q.jinja").write_text("{{ prompt }}\n{{ response }}\nHow many?")
    return workspace


JUDGE = "rewarding.py --device cpu --model tiny --input_file outputs/samples.json --reward judge --engine hf"
OWN = f"{JUDGE} --judge_prompt outputs/q.jinja --judge_max_tokens 12 --judge_parse"


def test_a_judge_of_one_s_own(world):
    done = world.run(f"{OWN} '(?s)(.)' --valid_reward 0: --on_unparsed continue --output outputs/own.json")
    assert "Score: 5<\\end>" not in done.out and "How many?<end><assistant>" in done.out
    found, meta = world.read("outputs/own.json"), world.read("outputs/own.json.meta.json")
    assert [*found["sum"]["texts"]] == ["judge_1", "judge_2", "judge_3"] and len(
        found["gas"]["parts"]["scores"][0]
    ) == 3
    assert meta["inputs"].keys() == {"input_file", "judge", "judge_prompt"} and "scored" not in meta
    again = f"{OWN} '(?s)(.)' --valid_reward 0: --judge_model assets/tiny_m0 --thoughts drop --output outputs/own.json"
    done = world.run(again)  # the same model, whatever flag names it
    assert "up to date" in done.out and "--thoughts does not apply" in done.out
    changed = world.folder / "outputs/q.jinja"
    before = changed.read_text()
    changed.write_text(before + " ")
    assert "judge_prompt" in world.refused(again)
    changed.write_text(before)


def test_a_pattern_that_never_matches_ends_the_stage(world):
    command = f"{OWN} 'Never: {{{{ reward }}}}' --output outputs/never.json"
    done = world.run(command, code=2)
    assert "none of the first 15 judgements (of 5 requests) has a valid score" in done.err
    assert not (world.folder / "outputs/never.json").exists()
    done = world.run(command, code=2)  # it is known without judging again
    assert "resuming: 5 of 5 requests are done" in done.out and "--on_unparsed continue" in done.err
    done = world.run(command + " --on_unparsed continue")
    assert "0 of 5 responses rewarded" in done.out and f"5 have no reward: {NO_SCORE}" in done.out
    assert all(each["texts"]["judge_3"] for each in world.read("outputs/never.json").values())


@pytest.mark.parametrize("how", ["--judge_max_tokens 4 --on_unparsed continue", "--judge_mode expected"])
def test_a_request_that_the_template_refuses_has_no_reward(world, how):
    """With the reason, and the others have theirs: a judge's template may have no system messages, say."""
    template = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    template += "<{{ m.role }}>{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    (world.folder / "outputs/bare.jinja").write_text(template)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 3?"}]
    prompts = {"with": turns, "without": turns[1:]}
    world.write("outputs/s.json", {uuid: {"prompt": each, "responses": ["5"]} for uuid, each in prompts.items()})
    command = "rewarding.py --device cpu --model tiny --input_file outputs/s.json --reward judge --judge_prompt plain"
    world.run(f"{command} --chat_template outputs/bare.jinja {how} --overwrite --output outputs/refused.json")
    found = world.read("outputs/refused.json")
    assert "no system message" in found["with"]["reason"][0] and found["with"]["reward"] == [None]
    assert found["without"].get("reason") in (None, [NO_SCORE], [NOT_VALID])


def test_a_pairwise_judge_feeds_pairs(world):
    (world.folder / "outputs/two.jinja").write_text("{{ response_a }} or {{ response_b }}?")
    command = f"{JUDGE} --judge_prompt outputs/two.jinja --judge_parse".replace(" --engine hf", "")
    world.run(f"{command} 'Answer: {{{{ reward }}}}' --judge_mode expected --output outputs/two.json")
    found = world.read("outputs/two.json")
    for record in found.values():
        assert record["reward"] == win_rates(record["preferences"])
        for i, row in enumerate(record["preferences"]):
            assert [j for j, p in enumerate(row) if p is None] == [i]
    world.run("make_pairs.py --strategy threshold --threshold 0.5 --rewards outputs/two.json --output outputs/p.json")
    world.run("cal_consistency.py --file1 outputs/two.json --output outputs/c.json")
    assert world.read("outputs/p.json") and world.read("outputs/c.json")


BAD = {
    "a template without the response": ("outputs/blind.jinja", "x(1)", "the judge would not see what it judges"),
    "a pattern without a group": ("outputs/q.jinja", "Score", "has 0 groups"),
    "an unknown prompt": ("additiv", "(1)", "did you mean additive?"),
    "an unknown model": ("plain", "(1) --judge_model no_such", "--judge_model no_such"),
}


@pytest.mark.parametrize(("prompt", "parse", "message"), BAD.values(), ids=BAD)
def test_what_is_wrong_with_a_judge_is_said_at_once(world, prompt, parse, message):
    (world.folder / "outputs/blind.jinja").write_text("{{ prompt }}")
    assert message in world.refused(f"{JUDGE} --judge_prompt {prompt} --judge_parse {parse} --output outputs/x.json")


def test_a_judge_without_a_chat_template(world):
    folder = world.folder / "outputs/bare"
    shutil.copytree(world.folder / "assets/tiny_m0", folder)
    (folder / "chat_template.jinja").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    error = world.refused(f"{JUDGE} --judge_prompt plain --judge_model outputs/bare --output outputs/x.json")
    assert "no chat template" in error and "--chat_template FILE" in error
