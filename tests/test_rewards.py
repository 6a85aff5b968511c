"""Rewards against one plain forward pass per answer, and passes that go on where they were killed."""

from functools import cache, partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs
from transformers import AutoModelForCausalLM, AutoTokenizer

from cream.errors import UserError
from cream.files import store
from cream.files.journal import Output
from cream.files.provenance import Provenance
from cream.model.checkpoint import save
from cream.model.load import load_chat, load_policy, load_tokenizer
from cream.records import Message, Rewards, Samples
from cream.rewards import dpo, likelihood, passes
from cream.scoring import logprobs
from cream.scoring.cache import Scores, Source
from cream.scoring.logprobs import Scored
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


def scorer(folder, max_tokens=300, limit=LIMIT, chunk=256):
    return logprobs.scorer(folder, load_chat(folder), torch.float32, limit, max_tokens, chunk, 1, "cpu")


def one_pass(path, role, score, samples, chunk=256, progress=lambda: None):
    """What rewarding.py does for a model; nothing is kept beside the samples."""
    output, given = Output(path, {}, Provenance()), path.with_name("given.jsonl")
    store.write(given, samples)
    kept, done = (path.with_name("none.scores.jsonl"), Source("", "", "")), output.resume()
    todo = passes.todo(partial(store.read, given, Samples), role, done, kept, chunk, False)
    unkept = Scores(*kept)
    unkept.keep = lambda found: None
    passes.run(output, role, done, score(todo), unkept, progress)
    return output


def reward(source, normalize, folders, path, samples, max_tokens=300, limit=LIMIT, chunk=256):
    """What rewarding.py does: a pass per model, then the file."""
    for role, folder in zip(source.PASSES, folders, strict=True):
        output = one_pass(path, role, scorer(folder, max_tokens, limit, chunk), samples, chunk)
    passes.finish(output, source, normalize, lambda: samples)
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
        for j, answer in enumerate(record.answers()):
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
    assert (likelihood.NORMALIZE, dpo.NORMALIZE) == ("mean", "sum")
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
        assert record.answers() == sample.responses and record.finish_reason == sample.finish_reason


def test_an_absent_finish_reason_means_complete():
    samples = [Samples(uuid="a", prompt=[Message("user", "2 + 3?")], responses=["5", "6"])]
    assert next(passes.groups(samples)).complete == [True, True]
    assert list(passes.groups(records()))[1].complete == [True, False]


def test_the_samplers_own_values_are_passed_on_when_asked_for():
    """With their number of tokens; None where the text does not give the sampled tokens back, or says nothing."""
    sample = Samples(
        uuid="a", prompt=[Message("user", "?")], responses=["5", "6"], logprob=[-1.5, None], num_tokens=[2, 3]
    )
    silent = Samples(uuid="b", prompt=[Message("user", "?")], responses=["5", "6"])
    assert [group.sampled for group in passes.groups([sample, silent], sampled=True)] == [[(-1.5, 2), None], None]
    assert [group.sampled for group in passes.groups([sample])] == [None]


def test_a_killed_pass_goes_on_with_the_same_numbers(tiny_folder, trained, tmp_path):
    folders, samples = [trained, tiny_folder], records()
    undisturbed, _ = reward(dpo, "sum", folders, tmp_path / "whole.jsonl", samples, chunk=2)

    path, progress = tmp_path / "killed.jsonl", []

    def killed_in_the_second_chunk(groups):
        for uuid, found in scorer(trained, chunk=2)(groups):
            if uuid == samples[3].uuid:
                raise KeyboardInterrupt
            yield uuid, found

    with pytest.raises(KeyboardInterrupt):
        one_pass(path, "policy", killed_in_the_second_chunk, samples, 2, lambda: progress.append(1))
    assert len(progress) == 3

    def watched(groups):
        assert [group.uuid for group in groups] == [sample.uuid for sample in samples[2:]]  # a chunk is done as a whole
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        one_pass(path, "policy", watched, samples, 2)
    resumed, _ = reward(dpo, "sum", folders, path, samples, chunk=2)
    assert resumed == undisturbed
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


OTHER = {"another uuid": {"uuid": "new"}, "fewer answers": {"responses": ["Answer: 7"], "finish_reason": None}}


@pytest.mark.parametrize("change", OTHER.values(), ids=OTHER)
def test_scores_of_other_samples_than_there_are_make_no_rewards(tiny_folder, tmp_path, change):
    """The samples changed between a pass and the end, as by another process."""
    path, samples = tmp_path / "x.jsonl", records()
    output = one_pass(path, "policy", scorer(tiny_folder), samples)
    samples[3] = structs.replace(samples[3], **change)
    with pytest.raises(UserError, match=f"{samples[3].uuid!r} as it is now: the samples were changed"):
        passes.finish(output, likelihood, "mean", lambda: samples)
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

    both = {"policy": scored([p for p, _, _ in answers]), "reference": scored([r for _, r, _ in answers])}
    group = dpo.combine(both, normalize)
    for (p, r, n), found, reason in zip(answers, group.reward, group.reason, strict=True):
        share = 1 if normalize == "sum" else n
        assert found == (None if p is None or r is None else p / share - r / share)
        assert (reason is None) == (found is not None)
    alone = likelihood.combine({"policy": both["policy"]}, normalize)
    for (p, _, n), found in zip(answers, alone.reward, strict=True):
        assert found == (None if p is None else p / (1 if normalize == "sum" else n))
