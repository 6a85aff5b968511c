"""Process and outcome reward models: where signs stand, their probabilities against plain forward passes, the loss by
hand, and the faults of the released code (RLHFlow, math-rm), each as a test."""

import copy
import json
import math
import random
from collections import Counter
from functools import partial
from statistics import fmean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chat import GOOD, with_template
from test_judge import make_model
from test_reasoning import THINKING, WAYS, chat_of  # noqa: F401
from workspace import LOOP, M1, ON

from cream.data.verified import NO_REWARD, REPEATED, label_responses
from cream.errors import UserError
from cream.files import store
from cream.files.journal import Output
from cream.files.provenance import Provenance
from cream.model.hardware import Budget
from cream.model.load import load_chat, load_policy
from cream.model.logprobs import LogProbs
from cream.model.signs import SignOdds, sign_odds
from cream.records import Message, Rewards, Samples, Steps
from cream.rewards import orm, passes, prm
from cream.scoring.pool import Pool
from cream.scoring.signs import Reader, Signed, StepGroup
from cream.text.chat import UNFINISHED, Chat
from cream.text.steps import NO_STEPS, Signs, join_steps, split_steps, step_conversation
from cream.tiny import problems
from cream.training.stages import orm as orm_stage
from cream.training.stages import prm as prm_stage

CPU = torch.device("cpu")
PROMPT = [Message("user", "Tom has 28 books. How many?")]
STEPS = ["8 + 4 = 12, carry 1.", "2 + 1 = 3.", "Answer: 32"]
RESPONSES = [STEPS, ["Answer: 31"], ["8 + 4 = 12.", "+", "- <end> -", "Answer: 32"], STEPS[:2] + ["Answer: 33"]]


def plain(model, ids, signs):
    """P(+) after these ids, by the model's own forward pass alone."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1, list(signs)].double()
    return logits.softmax(-1)[0].item()


# Steps ----------------------------------------------------------------------------------------------------------------


def test_steps_of_a_text():
    text = "9 + 4 = 13, carry 1. 6.5 + 1 = 7.5!\n\nSo it is 7?  Answer: 73"
    assert split_steps(text, "sentences") == ["9 + 4 = 13, carry 1.", "6.5 + 1 = 7.5!", "So it is 7?", "Answer: 73"]
    assert split_steps(text, "paragraphs") == ["9 + 4 = 13, carry 1. 6.5 + 1 = 7.5!", "So it is 7?  Answer: 73"]
    assert split_steps("a\n\n b \n", "lines") == ["a", "b"]
    assert split_steps("Step 1: a ки\nStep 2: b ки\n", "ки") == ["Step 1: a", "Step 2: b"]  # no empty piece at the end
    assert split_steps("a.*b.*", ".*") == ["a", "b"]  # not a pattern
    assert split_steps(" \n ", "lines") == []


@settings(max_examples=30)
@given(st.lists(st.text("ab1 +", min_size=1).map(str.strip).filter(bool), min_size=1), st.sampled_from(["lines", "ки"]))
def test_joined_steps_are_split_again(steps, by):
    tag = "" if by == "lines" else f" {by}"
    joined = "\n".join(step + tag for step in steps)
    assert split_steps(joined, by) == steps and join_steps(steps, by) == "\n".join(steps)


# Signs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*GOOD, *WAYS])
@pytest.mark.parametrize("prompt", [PROMPT, [Message("user", "1?"), Message("assistant", "+1"), *PROMPT]])
def test_a_sign_stands_where_the_model_would_write_it(chat_of, tiny_tokenizer, name, prompt):  # noqa: F811
    """Whatever the template puts around it. Before each sign is the conversation so far, as it is for a response."""
    chat = chat_of(WAYS[name]) if name in WAYS else Chat(with_template(tiny_tokenizer, GOOD[name]))
    signs = Signs(chat)
    assert chat.decode(signs.ids) == "+-"
    for steps in RESPONSES:
        rows = signs.encode(prompt, steps, 1000)
        assert (len(rows) == 1) == (name not in ("thinking", "opened", "channels") or len(steps) == 1)
        assert rows == signs._turn_by_turn(step_conversation(prompt, steps), len(steps))
        before = [row.ids[:start] for row in rows for start, end in row.spans if row.ids[start:end] == [signs.ids[0]]]
        quoted = [step.replace("<end>", "<\\end>") for step in steps]
        for k, ids in enumerate(before, 1):
            asked = step_conversation(prompt, quoted[:k])[:-1]
            (wanted,) = chat.encode_responses(asked, ["+"], [True], sampled=False)
            assert ids == wanted.ids[: wanted.ids.index(signs.ids[0], wanted.spans[0][0])]
        assert len(before) == len(steps) and all(row.ids[-1] == signs.ids[0] for row in rows)


@pytest.mark.parametrize("written", ["{{ m.content ~ m.content }}", "{{ 'plus' if m.content == '+' else 'minus' }}"])
def test_signs_of_several_tokens_are_refused(tiny_tokenizer, written):
    """The released code takes the last token of each, which need not be told apart from that of another word."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    sign = "m.role == 'assistant' and m.content in '+-'"
    answer = f"{{% if {sign} %}}{written}{{% else %}}{{{{ m.content }}}}{{% endif %}}"
    tokenizer.chat_template = GOOD["no bos"].replace("{{ m.content }}", answer)
    with pytest.raises(UserError, match="should be one token each"):
        Signs(Chat(tokenizer))


def test_what_does_not_fit_or_is_empty_has_no_signs(tiny_chat):
    signs = Signs(tiny_chat)
    assert signs.encode(PROMPT, [], 100) == NO_STEPS
    assert signs.encode(PROMPT, STEPS, 20) == "longer than 20 tokens"
    (row,) = signs.encode(PROMPT, STEPS, 1000)
    assert signs.encode(PROMPT, STEPS, len(row)) == [row]


# Scores ---------------------------------------------------------------------------------------------------------------


def score(source, options, samples, folder, place):
    """The rewards of samples, as rewarding.py has them."""
    path = place / "samples.jsonl"
    store.write(path, samples)
    run = passes.Run(source, options, path, partial(store.read, path, Samples))
    provenance = Provenance()
    provenance.model("rm", folder)
    output = Output(place / "out.jsonl", {}, provenance, overwrite=True)
    how = {"pool": lambda: Pool("cpu"), "bf16": False, "text": {}, "skip": False, "show": False}
    with output:
        passes.score_all(run, output, {"rm": folder}, len(samples), **how)
        output.finish(passes.rewards(run, output))
    return list(store.read(place / "out.jsonl", Rewards))


SAMPLES = [
    Samples(uuid="a", prompt=PROMPT, responses=["\n".join(steps) for steps in RESPONSES] + ["", "\n<think>never"]),
    Samples(uuid="b", prompt=PROMPT, responses=["\n\n".join(STEPS)]),
]


@pytest.mark.parametrize(("kind", "template"), [("llama", None), ("gemma2", None), ("gpt2", THINKING)])
def test_one_pass_equals_a_forward_pass_for_each_step(tiny_tokenizer, tmp_path, monkeypatch, kind, template):
    """Of the model alone, to 1e-4: over trees and padded rows, and again from the score cache."""
    tokenizer = with_template(tiny_tokenizer, template or tiny_tokenizer.chat_template)
    monkeypatch.setattr("cream.model.signs.LEAST", 0)  # a random model means no sign
    model, signs = make_model(kind, tokenizer, tmp_path / "model").eval(), Signs(Chat(tokenizer))
    options = prm.Options(reward_model="x")
    first, second = score(prm, options, SAMPLES, tmp_path / "model", tmp_path)
    assert first.reason == [None] * 4 + [NO_STEPS, UNFINISHED] and first.reward[4:] == [None, None]
    chat = load_chat(tmp_path / "model")
    for steps, found, reward in zip(RESPONSES, first.parts["steps"], first.reward, strict=False):
        quoted = [step.replace("<end>", "<\\end>") for step in steps]
        wanted = []
        for k in range(1, len(steps) + 1):  # one conversation for each step
            asked = step_conversation(PROMPT, quoted[:k])[:-1]
            ids = chat.encode_prompt(asked) + ([*chat.tokenizer.encode("<think></think>")] if template else [])
            wanted.append(plain(model, ids, signs.ids))
        assert found == pytest.approx(wanted, abs=1e-4) and reward == pytest.approx(sum(wanted) / len(wanted), abs=1e-4)
    assert max(first.parts["steps"][0]) - min(first.parts["steps"][0]) > 1e-3
    assert second.parts["steps"][0] == pytest.approx(first.parts["steps"][0], abs=1e-5)

    rows = [row for steps in RESPONSES for row in signs.encode(PROMPT, steps, 1000)]
    padded = SignOdds(load_policy(tmp_path / "model", torch.float32, CPU), signs.ids, share=False)
    odds = [value for row in sign_odds(padded, [rows], Budget(1000))[0] for value in row]
    own = [p for steps in first.parts["steps"][:4] for p in steps]
    assert [*map(prm.sigmoid, odds)] == pytest.approx(own, abs=1e-4)

    monkeypatch.setattr("cream.scoring.team.Local", None)  # no model is loaded
    assert (
        score(prm, prm.Options(reward_model="x", prm_aggregate="min"), SAMPLES, tmp_path / "model", tmp_path)[0].parts
        == first.parts
    )


def test_a_response_that_the_template_refuses_has_no_signs(tiny_tokenizer):
    template = GOOD["no bos"].replace(
        "{{ m.content }}", "{{ raise_exception('no') if 'X' in m.content }}{{ m.content }}"
    )
    reader = Reader.__new__(Reader)
    reader._encoder, reader.limit = Signs(Chat(with_template(tiny_tokenizer, template))), 100
    rows, (first, why) = reader._encode(StepGroup("a", PROMPT, [["a", "b"], ["aX"]]))
    assert len(rows[0].spans) == 2 and rows[1] is None and first is None and "refuses a conversation: no" in why


def test_signs_are_those_of_their_response():
    """Rows may be several for a response; one that is broken takes its response alone with it."""
    group = StepGroup("a", PROMPT, [["x", "y"], [], ["z"], ["u", "v"]])
    rows = Signed([[1.0], [2.0], None, [3.0], None, [5.0]], [None, None, "empty", None, "broken", None])
    reader = Reader.__new__(Reader)
    from cream.scoring import signs as worker

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker.Scorer, "_score", lambda self, groups: [rows])
        (found,) = reader._score([group])
    assert found.log_odds == [[1.0, 2.0], None, [3.0], None]
    assert found.reason == [None, "empty", None, "broken"]


def test_aggregates():
    """The mean by default, as released; the product prefers a response of few steps."""
    sample = Samples(uuid="a", prompt=PROMPT, responses=["a\nb\nc", "d"])
    odds = Signed([[math.log(9), 0.0, math.log(4)], [math.log(3 / 2)]], [None, None])
    steps = [[0.9, 0.5, 0.8], [0.6]]
    for name, wanted in {"mean": [2.2 / 3, 0.6], "min": [0.5, 0.6], "prod": [0.36, 0.6], "last": [0.8, 0.6]}.items():
        found = prm.combine(sample, {"rm": [odds]}, prm.Options(prm_aggregate=name))
        assert found.reward == pytest.approx(wanted)
        assert found.parts["steps"] == [pytest.approx(own) for own in steps]
    assert prm.Options().prm_aggregate == "mean"
    assert [prm.sigmoid(x) for x in (-1000.0, 0.0, 1000.0)] == [0.0, 0.5, 1.0]


def test_an_outcome_model_signs_the_whole_response():
    """However it is written: no "Step 1" is looked for in it."""
    text = "Step 1: 8 + 4 = 12.\nStep 1: again"
    sample = Samples(uuid="a", prompt=PROMPT, responses=[f" {text}\n", "", f"<think>7</think>\n{text}"])
    (asked,) = orm.requests("rm", sample, orm.Options())
    assert asked.steps == [[text], [], [text]]
    found = orm.combine(sample, {"rm": [Signed([[0.0], None, [math.log(3)]], [None, NO_STEPS, None])]}, orm.Options())
    assert found.reward == [0.5, None, pytest.approx(0.75)] and found.reason == [None, NO_STEPS, None]


# Training -------------------------------------------------------------------------------------------------------------

LABELS = [1.0, 0.0, 0.25]


def prepared(chat, records, stage=prm_stage, about=None, **options):
    trained, dropped = stage.Stage(stage.Options(**options), about or {}), Counter()
    return trained, trained.prepare(records, chat, 1000, dropped), dropped


def record(steps=STEPS, labels=LABELS, uuid="a"):
    return Steps(uuid=uuid, prompt=PROMPT, steps=list(steps), labels=list(labels))


def test_what_is_trained_is_what_is_scored(tiny_chat):
    """The rows are those of scoring, whatever the labels: no label is given away to the steps after it, which in the
    released data stand in the conversation. Nothing but signs is trained on, no end of turn either."""
    scored = Signs(tiny_chat).encode(PROMPT, STEPS, 1000)
    for labels in ([1.0, 1.0, 1.0], [0.0, 0.0, 0.0], LABELS):
        _, ((_, example),), _ = prepared(tiny_chat, [record(labels=labels)])
        assert example.rows == scored and example.labels == labels
    assert [tiny_chat.decode(scored[0].ids[a:b]) for a, b in scored[0].spans] == ["+", "+", "+"]


def test_steps_without_a_label_are_seen_and_not_trained_on(tiny_chat, chat_of):  # noqa: F811
    for chat in (tiny_chat, chat_of(THINKING)):
        whole = Signs(chat).encode(PROMPT, STEPS, 1000)
        _, ((_, example),), _ = prepared(chat, [record(labels=[None, 1.0, None])])
        (row,) = example.rows
        start, end = [span for each in whole for span in each.spans][1]
        assert row.spans == [(start, end)] and row.ids == whole[min(1, len(whole) - 1)].ids[:end]
        assert example.labels == [1.0]


def test_labels_may_be_hard(tiny_chat):
    """Math-Shepherd's: right if any completion from there succeeds."""
    _, ((_, example),), _ = prepared(tiny_chat, [record()], step_labels="hard")
    assert example.labels == [1.0, 0.0, 1.0]


def test_the_loss_by_hand(tiny_folder):
    """-y log π(+) - (1 - y) log π(-) over the vocabulary, from a plain forward pass of each step."""
    chat = load_chat(tiny_folder)
    records = [record(), record(["Answer: 31"], [0.5], "b"), record(STEPS[:2], [0.0, 1.0], "c")]
    stage, rows, _ = prepared(chat, records)
    policy = load_policy(tiny_folder, torch.float32, CPU)
    wanted, right = [], 0
    for each in records:
        for k, label in enumerate(each.labels, 1):
            ids = chat.encode_prompt(step_conversation(PROMPT, each.steps[:k])[:-1])
            with torch.no_grad():
                plus, minus = policy(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[list(stage.signs)].tolist()
            wanted.append(-label * plus - (1 - label) * minus)
            right += 0.5 if label == 0.5 else (plus > minus) == (label > 0.5)
    examples = [example for _, example in rows]
    for share in (True, False):
        model = LogProbs(policy, share)
        batch = model.pack([stage.group(example) for example in examples])
        total, metrics = stage.loss(model, batch, examples)
        assert total.item() == pytest.approx(sum(wanted), rel=1e-5) and metrics["accuracy"] == right
        assert sum(map(stage.weight, examples)) == len(wanted) == 6
    total.backward()
    assert policy.get_input_embeddings().weight.grad.abs().sum() > 0
    assert stage.facts(examples) == {"signs": 6, "mean_label": pytest.approx(2.75 / 6)}


def test_an_outcome_model_is_trained_on_the_whole_response_and_its_last_label(tiny_chat):
    about = {"steps": {"split": "sentences"}}
    records = [record(), record(labels=[1.0, 0.0, None], uuid="b")]
    stage, rows, dropped = prepared(tiny_chat, records, orm_stage, about)
    assert [uuid for uuid, _ in rows] == ["a"] and dropped == {prm_stage.NO_LABEL: 1}
    assert rows[0][1].rows == Signs(tiny_chat).encode(PROMPT, [" ".join(STEPS)], 1000)
    assert rows[0][1].labels == [0.25] and stage.about == about
    _, ((_, lines),), _ = prepared(tiny_chat, [record()], orm_stage)
    assert lines.rows == Signs(tiny_chat).encode(PROMPT, ["\n".join(STEPS)], 1000)
    with pytest.raises(UserError, match="were split by sentences"):
        prepared(tiny_chat, [], orm_stage, about, step_split="lines")


def test_steps_of_verified_samples():
    """The outcome is the label of the last step, and so of the whole; a response counts once, without its thought."""
    texts = ["8 + 4 = 12.\nAnswer: 32", "Answer: 31", "<think>?</think>\nAnswer: 31", "I see.", " "]
    record = Rewards(
        uuid="a",
        prompt=PROMPT,
        response=[[*PROMPT, Message("assistant", text)] for text in texts],
        reward=[1.0, 0.0, 0.0, None, 0.0],
    )
    found = list(label_responses(record, "lines", "outcome", dropped := Counter()))
    assert [(each.uuid, each.steps, each.labels) for each in found] == [
        ("a#0", ["8 + 4 = 12.", "Answer: 32"], [None, 1.0]),
        ("a#1", ["Answer: 31"], [0.0]),
    ]
    assert dropped == {REPEATED: 1, NO_REWARD: 1, NO_STEPS: 1}
    record.reward[0] = 4.5
    with pytest.raises(UserError, match="'a': the reward 4.5"):
        list(label_responses(record, "lines", "outcome", Counter()))
    with pytest.raises(UserError, match="tiny world alone"):
        list(label_responses(record, "lines", "tiny", Counter()))


@pytest.mark.parametrize("task", problems.TASKS)
def test_the_tiny_world_checks_steps(task):
    """A worked solution is right, step by step; of the systematic mistake's some step before its wrong answer is wrong,
    unless it comes to the right one."""
    draw = random.Random(0)
    for _ in range(40):
        problem = problems.make_problem(draw, task)
        steps = split_steps(problem.worked, "sentences")
        assert problems.check_steps(problem.question, [*steps, problem.worked]) == [1.0] * (len(steps) + 1)
        working, label = problems.work(task, problem.first, problem.second, systematic=True)
        wrong = [*split_steps(working, "sentences"), f"Answer: {label}"]
        labels = problems.check_steps(problem.question, wrong)
        assert labels[-1] == (label == problem.answer_label) and all(labels) <= (label == problem.answer_label)
        assert label == problem.answer_label or 0.0 in labels[:-1]
    assert problems.check_steps("What is 2 + 3?", ["5"]) is None


@pytest.mark.slow
def test_real_steps_by_a_real_model(shared):
    """Math-Shepherd's, as Math-Shepherd and trl write them, by stories260K: trained on as they are scored."""
    rows = [json.loads(line) for line in (shared / "data/prm/math_shepherd_stepwise.jsonl").read_text().splitlines()]
    lines = (shared / "data/prm/samples_math-shepherd.jsonl").read_text().splitlines()
    solutions = [json.loads(line)["input"] for line in lines]
    folder = shared / "data/models/stories260K"
    chat, policy = load_chat(folder), load_policy(folder, torch.float32, CPU)
    records = [
        Steps(
            uuid=f"{i}",
            prompt=[Message("user", row["prompt"])],
            steps=row["completions"],
            labels=[*map(float, row["labels"])],
        )
        for i, row in enumerate(rows)
    ]
    for row, text in zip(records, solutions, strict=True):
        assert split_steps(text.removeprefix(row.prompt[0].content), "ки") == row.steps
    stage, kept, dropped = prepared(chat, records)
    assert len(kept) == len(rows) and not dropped
    examples = [example for _, example in kept]
    model, odds = LogProbs(policy), SignOdds(policy, stage.signs)
    total, _ = stage.loss(model, model.pack([stage.group(example) for example in examples]), examples)
    assert math.isfinite(total.item())
    for each, found in zip(records, sign_odds(odds, [e.rows for e in examples], Budget(4000)), strict=True):
        for k, value in enumerate(value for row in found for value in row):
            asked = step_conversation(each.prompt, each.steps[: k + 1])[:-1]
            (row,) = chat.encode_responses(asked, ["+"], [True], sampled=False)
            ids = row.ids[: row.ids.index(stage.signs[0], row.spans[0][0])]
            assert prm.sigmoid(value) == pytest.approx(plain(policy, ids, stage.signs), abs=1e-4)


# Command lines --------------------------------------------------------------------------------------------------------

RM = "outputs/prm/checkpoint-last"
TRAIN = f"train.py {ON} --checkpoint none --epoch 2 --lr 1e-2 --train_bsz 8 --train_stage"
REWARD = f"rewarding.py {ON} --input_file {LOOP}/samples.jsonl --limit_size 6 --step_split sentences --reward"


@pytest.fixture(scope="module")
def world(looped):
    """Labelled samples, steps made of them, and a model trained on these."""
    looped.run(
        f"rewarding.py --input_file {LOOP}/samples.jsonl --reward labels --labels localdata/tiny/labels.json "
        "--output outputs/labelled.jsonl"
    )
    looped.run(
        "prepare_data.py steps outputs/labelled.jsonl --step_split sentences --step_labeller tiny "
        "--output outputs/steps.jsonl"
    )
    out = looped.run(f"{TRAIN} prm --name outputs/steps.jsonl --eval_share 0.2 --output_dir outputs/prm").out
    assert "held out: " in out and "eval_accuracy_low" in out
    return looped


def test_a_process_reward_model_from_samples_to_pairs(world):
    about = world.read(f"{RM}/cream.json")
    assert about["kind"] == "policy" and about["stage"] == "prm" and about["steps"] == {"split": "sentences"}
    done = world.run(f"{REWARD} prm --reward_model {RM} --output outputs/mean.jsonl")
    assert "its signs marked" in done.out and "⟦+⟧" in done.out and "computed" in done.out
    again = world.run(f"{REWARD} prm --reward_model {RM} --prm_aggregate prod --output outputs/prod.jsonl")
    assert "from the score cache" in again.out and " computed" not in again.out
    assert "up to date" in world.run(f"{REWARD} prm --reward_model {RM} --output outputs/mean.jsonl").out
    mean, prod = (list(store.read(world.folder / f"outputs/{name}.jsonl", Rewards)) for name in ("mean", "prod"))
    assert len(mean) == len(prod) == 6
    for a, b in zip(mean, prod, strict=True):
        assert a.parts == b.parts and a.score is None
        for steps, text, x, y in zip(a.parts["steps"], a.responses(), a.reward, b.reward, strict=True):
            assert len(steps or ()) == len(split_steps(text, "sentences"))
            assert (x, y) == ((None, None) if steps is None else (fmean(steps), math.prod(steps)))
    world.run("make_pairs.py --strategy threshold --threshold 0.5 --rewards outputs/mean.jsonl --output outputs/p.json")
    world.run(f"{TRAIN} orm --name outputs/steps.jsonl --output_dir outputs/orm")
    done = world.run(
        REWARD.replace(" --step_split sentences", "") + " orm --reward_model outputs/orm/checkpoint-last "
        "--output outputs/orm.jsonl"
    )
    assert "6 prompts" in done.out
    found = list(store.read(world.folder / "outputs/orm.jsonl", Rewards))
    assert all(0 < reward < 1 for each in found for reward in each.reward if reward is not None)


def test_what_is_no_process_reward_model_is_refused(world):
    for reward, flags, message in (
        ("prm", "", "needs --reward_model"),
        ("prm", M1.replace("--checkpoint", "--reward_model"), "needs a model of --train_stage prm, not of sft; train"),
        ("prm", "--reward_model assets/tiny_m0", "it was not trained to sign steps in this form"),
        ("orm", f"--reward_model {RM}", "not of prm; use --reward prm"),
        ("prm", f"--reward_model {RM} --step_split lines", "was trained on steps by --step_split sentences"),
    ):
        own = REWARD if reward == "prm" and "lines" not in flags else REWARD.replace(" --step_split sentences", "")
        assert message in world.refused(f"{own} {reward} {flags} --output outputs/no.jsonl")
    row = {"uuid": "a", "prompt": [{"role": "user", "content": "2 + 3?"}], "steps": [], "labels": []}
    (world.folder / "outputs/none.jsonl").write_text(json.dumps(row))
    assert "`$.steps`" in world.refused(f"{TRAIN} prm --name outputs/none.jsonl --output_dir outputs/no")
    assert "trains on responses in steps" in world.refused(f"{TRAIN} prm --name tiny_sft --output_dir outputs/no")
    for file, message in (
        (f"{LOOP}/samples.jsonl", "give what rewarding.py --reward labels writes, or with --step_labeller tiny"),
        (f"{LOOP}/pairs.json", "holds preference pairs"),
        (f"{LOOP}/current.jsonl", "is no probability that a response is right"),
    ):
        assert message in world.refused(f"prepare_data.py steps {file} --output outputs/no.jsonl")
