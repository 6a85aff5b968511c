"""Rewards against one plain forward pass per response, passes that resume where they were killed, and new sources."""

import json
import shutil
from functools import cache, partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from cream import engines
from cream.errors import UserError
from cream.evaluation.tasks import grade
from cream.files import store
from cream.files.journal import Output
from cream.files.provenance import Provenance
from cream.model.checkpoint import save
from cream.model.load import load_chat, load_policy, load_tokenizer
from cream.records import Message, Rewards, Samples
from cream.rewards import dpo, labels, likelihood, passes
from cream.scoring import logprobs
from cream.scoring.logprobs import Scored
from cream.scoring.pool import Pool
from cream.text.chat import NOT_A_PREFIX

CPU = torch.device("cpu")
ANSWERS = ["Units: 8 + 3 = 11. Answer: 61", "Answer: 7", "", "Answer: 7", "x" * 50]
LIMIT = 60  # the last of the five does not fit


def records():
    """Prompts with one to five answers, the last of each cut at the length limit."""
    return [
        Samples(
            uuid=f"p{count}",
            prompt=[Message("user", f"Tom has {count} books and gets 33 more. How many now?")],
            responses=ANSWERS[:count],
            finish_reason=["stop"] * (count - 1) + ["length"],
            extra={"source": "mine"},
        )
        for count in range(1, 6)
    ]


@pytest.fixture(scope="module")
def trained(tiny_folder, tmp_path_factory):
    """Another policy on the same tokenizer: the reference with noise on its weights."""
    model = load_policy(tiny_folder, torch.float32, CPU)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("rewards") / "trained"
    tokenizer = load_tokenizer(tiny_folder)
    save(model, tokenizer, folder, None, {})
    return folder


def start(source, path, samples, normalize="sum", max_tokens=300, limit=LIMIT):
    """A source's run over samples in a file of their own, which have no score cache yet."""
    given = path.with_name(f"{path.stem}.given.jsonl")
    store.write(given, samples)
    options = source.Options(max_length=limit, max_tokens_per_batch=max_tokens, normalize=normalize)
    return passes.Run(source, options, given, partial(store.read, given, Samples))


def provenance_of(*folders):
    """Of a run with the models in these folders."""
    provenance = Provenance()
    for role, folder in zip(("policy", "reference"), folders, strict=False):
        provenance.model(role, folder)
    return provenance


def compute(run, path, folders, count):
    """What rewarding.py does before the rewards: a pass for each model."""
    output = Output(path, {}, provenance_of(*folders.values()))
    how = {"pool": lambda: Pool("cpu"), "bf16": None, "text": {}, "skip": False, "show": False}
    passes.score_all(run, output, folders, count, **how)
    return output


def reward(source, normalize, folders, path, samples, max_tokens=300, limit=LIMIT):
    """What rewarding.py does: a pass per model, then the file."""
    run = start(source, path, samples, normalize, max_tokens, limit)
    folders = dict(zip([p.role for p in run.passes], folders, strict=True))
    output = compute(run, path, folders, len(samples))
    output.finish(passes.rewards(run, output))
    return list(store.read(path, Rewards)), output


@cache
def plain(folder):
    return AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def oracle(folder, prompt, answer, complete):
    """(log π, tokens) of one answer by transformers alone: its own ids, full logits, float64, the row by itself."""
    tokenizer, model = plain(folder)
    turns = [{"role": m.role, "content": m.content} for m in prompt]
    start = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    ids = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": answer}], return_dict=False)
    ids = ids[: len(ids) - ids[::-1].index(tokenizer.eos_token_id) - (not complete)]
    assert ids[: len(start)] == start
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    values = [logprobs[i - 1, ids[i]].item() for i in range(len(start), len(ids))]
    return sum(values), len(values), len(ids)


def check_scores(found, key, folder, normalize, limit):
    for record in found:
        for j, answer in enumerate(record.responses()):
            complete = record.finish_reason is None or record.finish_reason[j] == "stop"
            logprob, tokens, length = oracle(folder, record.prompt, answer, complete)
            value = getattr(record, key)[j]
            if length > limit or not tokens:
                assert value is None and record.reason[j]
            else:
                assert record.num_tokens[j] == tokens
                difference = value - logprob if normalize == "sum" else (value - logprob / tokens) * tokens
                assert abs(difference) <= 1e-4 * tokens


@pytest.mark.parametrize("normalize", ["sum", "mean"])
@pytest.mark.parametrize("max_tokens", [1, 300, 10_000])
def test_the_dpo_reward_equals_one_pass_per_answer(tiny_folder, trained, tmp_path, normalize, max_tokens):
    found, _ = reward(dpo, normalize, [trained, tiny_folder], tmp_path / "x.json", records(), max_tokens)
    check_scores(found, "score", trained, normalize, LIMIT)
    check_scores(found, "ref_score", tiny_folder, normalize, LIMIT)
    for record in found:
        for r, score, reference in zip(record.reward, record.score, record.ref_score, strict=True):
            assert r == (None if score is None or reference is None else score - reference)


def test_the_likelihood_reward_is_the_mean_of_the_policy(tiny_folder, tmp_path):
    assert (likelihood.DEFAULTS, dpo.DEFAULTS) == ({"normalize": "mean"}, {"normalize": "sum"})
    found, output = reward(likelihood, "mean", [tiny_folder], tmp_path / "x.jsonl", records())
    check_scores(found, "reward", tiny_folder, "mean", LIMIT)
    assert all(record.score == record.reward for record in found)
    assert found[-1].ref_score == [0, 0, 0, 0, None]
    assert found[-1].reason[:4] == [None] * 4 and str(LIMIT) in found[-1].reason[4]
    assert found[2].reason == [None, None, "no token to score"]  # empty and cut: not even an end of turn
    assert sum(output.dropped.values()) == 2


def test_a_real_model(shared, tmp_path):
    folder = shared / "data" / "models" / "stories260K"
    found, _ = reward(likelihood, "sum", [folder], tmp_path / "x.json", records(), limit=200)
    check_scores(found, "score", folder, "sum", 200)


def test_the_file_keeps_what_the_samples_said(tiny_folder, tmp_path):
    samples = records()
    found, _ = reward(likelihood, "mean", [tiny_folder], tmp_path / "x.json", samples)
    for record, sample in zip(found, samples, strict=True):
        assert (record.uuid, record.prompt, record.extra) == (sample.uuid, sample.prompt, sample.extra)
        assert record.responses() == sample.responses and record.finish_reason == sample.finish_reason


def test_an_absent_finish_reason_means_complete():
    samples = [Samples(uuid="a", prompt=[Message("user", "2 + 3?")], responses=["5", "6"])]
    assert passes.group(samples[0]).complete == [True, True]
    assert passes.group(records()[1]).complete == [True, False]
    samples[0].finish_reason = ["stop_string", "stop"]
    assert passes.group(samples[0]).complete == [False, True]


def test_the_samplers_own_values_are_passed_on_when_asked_for():
    """With their number of tokens; None where the text does not give the sampled tokens back, or says nothing."""
    sample = Samples(
        uuid="a", prompt=[Message("user", "?")], responses=["5", "6"], logprob=[-1.5, None], num_tokens=[2, 3]
    )
    silent = Samples(uuid="b", prompt=[Message("user", "?")], responses=["5", "6"])
    assert [passes.group(each, sampled=True).sampled for each in (sample, silent)] == [[(-1.5, 2), None], None]
    assert passes.group(sample).sampled is None


def test_a_killed_pass_resumes_to_the_same_numbers(tiny_folder, trained, tmp_path, monkeypatch):
    folders, samples = [trained, tiny_folder], records()
    monkeypatch.setattr(logprobs, "chunk_of", lambda pool, count: 2)
    undisturbed, _ = reward(dpo, "sum", folders, tmp_path / "whole.jsonl", samples)

    path, find, computed = tmp_path / "killed.jsonl", logprobs.Scorer._score, []

    def killed_in_the_second_chunk(self, groups):
        computed.append([group.uuid for group in groups])
        for number, one in enumerate(find(self, groups)):
            if len(computed) == 2 and number == 1:
                raise KeyboardInterrupt
            yield one

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(logprobs.Scorer, "_score", killed_in_the_second_chunk)
        reward(dpo, "sum", folders, path, samples)
    journal = Output(path, {}, provenance_of(trained, tiny_folder)).resume()
    assert len(journal) == 3 and f"policy:{samples[2].uuid}" in journal

    def watched(self, groups):
        computed.append([group.uuid for group in groups])
        return find(self, groups)

    del computed[:]
    (path.parent / "killed.given.scores.jsonl").unlink()
    monkeypatch.setattr(logprobs.Scorer, "_score", watched)
    resumed, _ = reward(dpo, "sum", folders, path, samples)
    assert computed[0] == [f"policy:{sample.uuid}" for sample in samples[2:4]]  # a chunk is done as a whole
    assert resumed == undisturbed
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


OTHER = {"another uuid": {"uuid": "new"}, "fewer answers": {"responses": ["Answer: 7"], "finish_reason": None}}


@pytest.mark.parametrize("change", OTHER.values(), ids=OTHER)
def test_scores_of_other_samples_than_there_are_make_no_rewards(tiny_folder, tmp_path, change):
    """The samples changed between a pass and the end, as by another process."""
    path, samples = tmp_path / "x.jsonl", records()
    run = start(likelihood, path, samples, "mean")
    output = compute(run, path, {"policy": tiny_folder}, len(samples))
    samples[3] = structs.replace(samples[3], **change)
    store.write(run.path, samples)
    with pytest.raises(UserError, match=f"{samples[3].uuid!r} as it is now: the samples were changed"):
        output.finish(passes.rewards(run, output))
    assert not path.exists()


def test_broken_weights_give_no_reward(tiny_folder, tmp_path):
    """NaN would win both argmax and argmin."""
    model = load_policy(tiny_folder, torch.float32, CPU)
    model.model.norm.weight.data[:] = float("nan")
    save(model, load_tokenizer(tiny_folder), tmp_path / "broken", None, {})
    found, _ = reward(likelihood, "mean", [tmp_path / "broken"], tmp_path / "x.json", records()[:2])
    assert [record.reward for record in found] == [[None], [None, None]]
    assert found[0].reason == ["not a finite number"]


maybe = st.one_of(st.none(), st.floats(-200, 0))


@given(st.lists(st.tuples(maybe, maybe, st.integers(1, 50)), max_size=6), st.sampled_from(["sum", "mean"]))
def test_combining_passes(answers, normalize):
    """A reward exactly where both passes have a value, a reason exactly where there is none."""

    def scored(values):
        counts = [n for *_, n in answers]
        return Scored(list(values), counts, [NOT_A_PREFIX if v is None else None for v in values])

    both = {"policy": [scored([p for p, _, _ in answers])], "reference": [scored([r for _, r, _ in answers])]}
    group = dpo.combine(None, both, dpo.Options(normalize=normalize))
    for (p, r, n), found, reason in zip(answers, group.reward, group.reason, strict=True):
        share = 1 if normalize == "sum" else n
        assert found == (None if p is None or r is None else p / share - r / share)
        assert (reason is None) == (found is not None)
    alone = likelihood.combine(None, both, likelihood.Options(normalize=normalize))
    for (p, _, n), found in zip(answers, alone.reward, strict=True):
        assert found == (None if p is None else p / (1 if normalize == "sum" else n))


def test_the_sampler_s_values_and_the_source_prompt_are_carried_along(tiny_folder, tmp_path):
    source = [Message("user", "How many?")]
    sample = structs.replace(records()[1], logprob=[-1.5, None], num_tokens=[3, 4], source_prompt=source)
    found, _ = reward(likelihood, "mean", [tiny_folder], tmp_path / "x.json", [sample, records()[0]])
    assert (found[0].logprob, found[0].source_prompt) == ([-1.5, None], source)
    assert (found[1].logprob, found[1].source_prompt) == (None, None)
    assert found[0].num_tokens != sample.num_tokens  # those that were scored


# Command lines --------------------------------------------------------------------------------------------------------

ASKED = {
    "sum": ("Tom has 28 books and gets 33 more. How many now?", ["Answer: 61", "Answer: 7", "Nobody knows."]),
    "gas": ("Which gas do plants take in?", ["It is C.", "Answer: A", "neon"]),
    "more": ("Who has more?", ["#### B", "Answer: B", "I take B"]),
}
LABELS = [
    {"uuid": "sum", "question": ASKED["sum"][0], "label": "61.0", "task": "gsm8k"},
    {"uuid": "gas", "question": "Which gas do plants take in?\nA. oxygen\nB. neon\nC. carbon dioxide", "label": "C"},
    {"uuid": "more", "question": "Who has more? A) Tom B) Mary", "label": "b", "task": "siqa"},
    {"uuid": "other", "question": "1 + 1?", "label": 2},
]
LABEL = "rewarding.py --reward labels --input_file outputs/samples.json --labels localdata/labels.json"


@pytest.fixture(scope="module")
def world(workspace):
    samples = {
        uuid: {"prompt": [{"role": "user", "content": text}], "responses": responses, "logprob": [-1.0, -2.0, None]}
        for uuid, (text, responses) in ASKED.items()
    }
    workspace.write("outputs/samples.json", samples)
    workspace.write("localdata/labels.json", LABELS)
    return workspace


def test_labels_reward_by_the_extracted_answer(world):
    """Neither --model nor --device is looked at: there is neither such a model nor such a device."""
    done = world.run(f"{LABEL} --device 7 --model no/where --output outputs/labelled.json")
    assert "no model is loaded" in done.out and "8 of 9 responses rewarded" in done.out
    found = world.read("outputs/labelled.json")
    assert found["sum"]["reward"] == [1.0, 0.0, None]
    assert found["sum"]["reason"] == [None, None, labels.NOTHING]
    assert found["sum"]["texts"] == {"extracted": ["61", "7", None]}
    assert found["gas"]["reward"] == [1.0, 0.0, 0.0] and found["gas"]["texts"] == {"extracted": ["c", "a", "b"]}
    assert found["more"]["reward"] == [1.0, 1.0, 1.0]
    assert all("score" not in each and each["logprob"] == [-1.0, -2.0, None] for each in found.values())
    meta = world.read("outputs/labelled.json.meta.json")
    assert meta["inputs"].keys() == {"input_file", "labels"} and not {"policy", "scored"} & meta.keys()
    assert meta["counts"]["dropped"] == {labels.NOTHING: 1}
    assert "up to date" in world.run(f"{LABEL} --device cpu --bf16 yes --output outputs/labelled.json").out
    world.run("cal_consistency.py --file1 outputs/labelled.json --output outputs/labelled.dpo.json")
    pair = world.read("outputs/labelled.dpo.json")["sum"]
    assert (pair["selected_index"], pair["rejected_index"], pair.get("selected_logp")) == (0, 1, None)


def test_labels_grade_as_the_evaluation_does(world):
    for extraction in ("default", "strict"):
        world.run(f"{LABEL} --extraction {extraction} --output outputs/{extraction}.json")
        found = world.read(f"outputs/{extraction}.json")
        for item in LABELS[:3]:
            expected = [
                grade(item["question"], item["label"], t, extraction == "strict") for t in ASKED[item["uuid"]][1]
            ]
            wanted = [None if prediction == "none" else float(correct) for prediction, correct in expected]
            assert found[item["uuid"]]["reward"] == wanted
    assert world.read("outputs/default.json") != world.read("outputs/strict.json")


@pytest.mark.parametrize(
    "response, opened, flags, reward",
    [
        ("<thought>7</thought> 61", False, "", 1.0),
        ("7</think> 61", True, " --thoughts mask", 1.0),
        ("61", True, "", None),  # within the thought that the prompt opened
        ("Answer: 61 <thought>7</thought>", False, " --thinking_tags '<think> </think>'", 1.0),  # not a thought's tags
    ],
)
def test_labels_grade_the_final_text(world, response, opened, flags, reward):
    record = {"prompt": [{"role": "user", "content": ASKED["sum"][0]}], "responses": [response, "7"]}
    world.write("outputs/thoughts.json", {"sum": record | {"thought_tokens": [4, None], "thought_opened": opened}})
    world.write("localdata/sum.json", LABELS[:1])
    command = LABEL.replace("samples.json", "thoughts.json").replace("labels.json", "sum.json")
    done = world.run(f"{command}{flags} --overwrite --output outputs/final.json")
    assert world.read("outputs/final.json")["sum"]["reward"] == [reward, None if opened else 0.0]
    assert ("--thoughts does not apply" in done.out) == ("--thoughts" in flags)


def test_malformed_labels_are_skipped_on_request(world):
    world.write("localdata/some.json", [*LABELS, {"uuid": "bad", "question": "Which? A) x B) y", "label": "Z"}])
    command = LABEL.replace("labels.json", "some.json") + " --output outputs/some.json"
    assert "'bad'" in world.refused(command)
    world.run(command + " --on_bad_record skip")
    (rejected,) = map(json.loads, (world.folder / "outputs/some.json.rejected.jsonl").read_text().splitlines())
    assert rejected["uuid"] == "bad" and len(world.read("outputs/some.json")) == 3


OTHERS = [{"uuid": "x", "question": "1 + 1?", "label": 2}]
WRONG = {
    "no file": (LABEL.partition(" --labels")[0], "--reward labels needs --labels FILE"),
    "no such file": (LABEL.replace("labels.json", "none.json"), "none.json: no such file"),
    "no labels": (LABEL.replace("localdata/labels.json", "outputs/samples.json"), "record 'sum'"),
    "labels of other prompts": (
        LABEL.replace("labels.json", "others.json"),
        "none of its 1 questions belongs to a prompt",
    ),
    "a prompt without a label": (
        LABEL.replace("labels.json", "few.json"),
        "1 of 3 prompts have no label, the first is 'more'",
    ),
    "another reward's flag": (LABEL + " --normalize sum", "--normalize belongs to --reward likelihood or dpo"),
    "a flag of labels": (LABEL.replace("--reward labels", "--reward dpo"), "--labels belongs to --reward labels"),
    "an unknown reward": (LABEL.replace("--reward labels", "--reward label"), "did you mean labels?"),
    "over its input": (LABEL + " --output localdata/labels.json", "is an input, and would be replaced"),
}


@pytest.mark.parametrize(("command", "message"), WRONG.values(), ids=WRONG)
def test_wrong_labels_are_refused(world, command, message):
    world.write("localdata/others.json", OTHERS)
    world.write("localdata/few.json", LABELS[:2])
    for dry in ("", " --dry_run"):
        assert message in world.refused(command + dry)


# A source of one's own: one file and one line -------------------------------------------------------------------------

PAIRWISE = '''
"""Which of two responses the policy itself calls the better one, both ways round."""

import math
from dataclasses import dataclass

from cream.cli.flags import flag
from cream.records import Message
from cream.rewards.base import GroupReward
from cream.scoring import logprobs
from cream.scoring.driver import Pass
from cream.scoring.logprobs import Group


@dataclass
class Options(logprobs.Options):
    """Rewards by comparison (pairwise)"""

    scale: float = flag(1.0, "divides the difference of log-probabilities", above=0)


def passes(options):
    return [Pass("comparison")]


def ordered(sample):
    n = range(len(sample.responses))
    return [(i, j) for i in n for j in n if i != j]


def requests(role, sample, options):
    question = sample.prompt[-1].content
    texts = [f"{question} A {sample.responses[i]} B {sample.responses[j]}" for i, j in ordered(sample)]
    return [Group("", [Message("user", text)], ["A", "B"], [True, True]) for text in texts]


def combine(sample, results, options):
    n = len(sample.responses)
    win = [[None] * n for _ in range(n)]
    for (i, j), scored in zip(ordered(sample), results["comparison"], strict=True):
        a, b = scored.logprob
        win[i][j] = 1 / (1 + math.exp((b - a) / options.scale))
    better = [[None if i == j else (win[i][j] + 1 - win[j][i]) / 2 for j in range(n)] for i in range(n)]
    reward = [sum(p for p in row if p is not None) / (n - 1) for row in better]
    verdicts = ["best" if r == max(reward) else None for r in reward]
    return GroupReward(reward, parts={"first": [[p or 0.0 for p in row] for row in win], "mean": reward},
                       texts={"verdict": verdicts}, preferences=better)
'''

WORDS = '''
"""A model's own words on a response, and how long they are."""

from dataclasses import dataclass

from cream.cli.flags import flag
from cream.records import Prompt
from cream.rewards.base import GroupReward
from cream.scoring import completions
from cream.scoring.driver import Pass


@dataclass
class Options(completions.Options):
    """Rewards by the length of a model's words (words)"""

    judge: str | None = flag(None, "the judge's folder; none: M0", decides=False)


def passes(options):
    return [Pass("judge", model="judge", worker="completions")]


def requests(role, sample, options):
    turn = type(sample.prompt[0])
    return [Prompt(messages=[turn("user", f"Is this right? {text}")]) for text in sample.responses]


def combine(sample, results, options):
    texts = [found.text[0] if found.text else None for found in results["judge"]]
    return GroupReward([None if t is None else float(len(t)) for t in texts],
                       [None if t is not None else "too long to judge" for t in texts], texts={"judge": texts})
'''


ATTRIBUTES = '''
"""The outputs of a reward model with two heads; the first is the reward."""

from cream.rewards.base import GroupReward, RewardModelOptions
from cream.scoring.driver import Pass

Options = RewardModelOptions


def passes(options):
    return [Pass("judge", model="reward_model", worker="heads", kind="reward_model")]


def combine(sample, results, options):
    (read,) = results["judge"]
    return GroupReward([o and o[0] for o in read.outputs], read.reason, parts={"outputs": read.outputs})
'''


@pytest.fixture(scope="module")
def own_sources(world):
    rewards = world.folder / "cream/rewards"
    (rewards / "pairwise.py").write_text(PAIRWISE)
    (rewards / "words.py").write_text(WORDS)
    (rewards / "attributes.py").write_text(ATTRIBUTES)
    listing = (rewards / "__init__.py").read_text()
    listing = listing.replace("rewards import ", "rewards import attributes, words, pairwise, ")
    listing = listing.replace(
        "REWARDS = {", 'REWARDS = {"pairwise": pairwise, "words": words, "attributes": attributes, '
    )
    (rewards / "__init__.py").write_text(listing)
    return world


REWARD = "rewarding.py --device cpu --model tiny --input_file outputs/samples.json --reward"


def test_a_source_of_one_s_own(own_sources):
    world = own_sources
    assert "--scale" in world.run("rewarding.py --help").out
    done = world.run(f"{REWARD} pairwise --scale 2 --output outputs/pairwise.json")
    assert "36 computed" in done.out and "9 of 9 responses rewarded" in done.out
    found = list(store.read(world.folder / "outputs/pairwise.json", Rewards))
    model = load_policy(world.folder / "assets/tiny_m0", torch.float32, CPU)
    chat = load_chat(world.folder / "assets/tiny_m0")

    def wins(record, i, j):
        """P(A) against P(B) by one plain forward pass each."""
        texts = record.responses()
        prompt = [Message("user", f"{record.prompt[0].content} A {texts[i]} B {texts[j]}")]
        values = []
        for tokens in chat.encode_responses(prompt, ["A", "B"], [True, True]):
            with torch.no_grad():
                logs = model(torch.tensor([tokens.ids])).logits[0].double().log_softmax(-1)
            values.append(sum(logs[t - 1, tokens.ids[t]].item() for t in range(*tokens.spans[0])))
        return 1 / (1 + 2.718281828459045 ** ((values[1] - values[0]) / 2))

    for record in found:
        for i in range(3):
            for j in range(3):
                if i != j:
                    assert record.parts["first"][i][j] == pytest.approx(wins(record, i, j), abs=1e-4)
                    both = (wins(record, i, j) + 1 - wins(record, j, i)) / 2
                    assert record.preferences[i][j] == pytest.approx(both, abs=1e-4)
        assert record.reward == record.parts["mean"] and record.texts["verdict"].count("best") >= 1
        assert record.score is None and record.preferences[1][1] is None
    meta = world.read("outputs/pairwise.json.meta.json")
    assert meta["settings"]["scale"] == 2 and "normalize" not in meta["settings"] and "scored" not in meta
    assert "36 from the score cache" in world.run(f"{REWARD} pairwise --scale 3 --output outputs/again.json").out
    assert "--scale belongs to --reward pairwise" in world.refused(f"{REWARD} dpo --scale 2")
    default = "outputs/samples.rewarding.tiny-pairwise-comparison_none.json"
    assert default in world.run(f"{REWARD} pairwise --dry_run").out


def test_a_source_that_lets_a_model_write(own_sources):
    """Each text is greedy and begins anew: the same again for the same prompt; what does not fit has a reason."""
    world = own_sources
    command = f"{REWARD} words --judge assets/tiny_m0 --gen_max_tokens 5 --engine hf --max_length 29"
    world.run(f"{command} --output outputs/judge.json")
    found = list(store.read(world.folder / "outputs/judge.json", Rewards))
    engine = engines.load(
        "hf", world.folder / "assets/tiny_m0", load_chat(world.folder / "assets/tiny_m0").tokenizer, device="cpu",
        dtype="float32", max_model_len=29,
    )  # fmt: skip
    chat = load_chat(world.folder / "assets/tiny_m0")
    sampling = engines.Sampling(temperature=0, max_tokens=5, stop_token_ids=chat.stop_ids)
    fits = set()
    for record in found:
        for text, words, reward in zip(record.responses(), record.texts["judge"], record.reward, strict=True):
            ids = chat.encode_prompt([Message("user", f"Is this right? {text}")])
            fits.add(len(ids) <= 24)  # of 29, with a text of 5
            if len(ids) > 24:
                assert words is None and reward is None
                continue
            ((_, (completion,)),) = engine.generate([engines.Request("x", ids)], sampling)
            assert (words, reward) == (completion.text, len(words))
    engine.close()
    assert fits == {True, False}
    assert world.read("outputs/judge.json.meta.json")["inputs"].keys() == {"input_file", "judge"}


def test_a_source_that_reads_a_reward_model(own_sources):
    """Its outputs are those of transformers' own forward pass over each response alone."""
    world, folder = own_sources, own_sources.folder / "outputs/reward_model"
    shutil.copytree(world.folder / "assets/tiny_m0", folder)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, dtype=torch.float32)
    model.score.weight.data.normal_()
    model.save_pretrained(folder)
    command = f"{REWARD} attributes --reward_model outputs/reward_model --max_length 36"
    done = world.run(f"{command} --output outputs/attributes.json")
    assert "2 have no reward: longer than 36 tokens" in done.out
    chat, skipped = load_chat(folder), 0
    for record in store.read(world.folder / "outputs/attributes.json", Rewards):
        rows = chat.encode_responses(record.prompt, record.responses(), [True] * 3)
        for row, reward, outputs in zip(rows, record.reward, record.parts["outputs"], strict=True):
            if len(row) > 36:
                skipped += 1
                assert reward is None and outputs is None
                continue
            with torch.no_grad():
                wanted = model(torch.tensor([row.ids])).logits[0].tolist()
            assert outputs == pytest.approx(wanted, abs=1e-4) and reward == outputs[0]
    assert skipped == 2
    assert world.read("outputs/attributes.json.meta.json")["inputs"].keys() == {"input_file", "judge"}
    error = world.refused(command.replace("outputs/reward_model", "assets/tiny_m0") + " --output outputs/x.json")
    assert "expected a reward model, found a policy" in error
    assert "found a reward model" in world.refused(f"{REWARD} dpo --checkpoint outputs/reward_model")
