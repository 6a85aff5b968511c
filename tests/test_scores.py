"""Kept log-probabilities: found again only where they would be computed again alike, and by whom they are used."""

import json
import logging
import math
import re
import shutil
import subprocess
import sys
from collections import Counter

import msgspec
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st
from workspace import LOOP, ON

from cream.cli import interrupts
from cream.cli.interrupts import Interrupted
from cream.errors import UserError
from cream.files.append_log import strip_checksum
from cream.files.fingerprints import fingerprint_folder
from cream.files.store import read
from cream.model.checkpoint import save
from cream.model.hardware import Budget
from cream.model.load import load_chat, load_policy, load_tokenizer
from cream.model.logprobs import LogProbs, score
from cream.records import Message, Pair, Rewards, Samples
from cream.scoring import team as scoring
from cream.scoring.cache import Scores, Source, beside
from cream.scoring.logprobs import Group, Scorer
from cream.text.chat import Tokens
from cream.text.options import describe_text
from cream.training import reference
from cream.training.loop import global_batches
from cream.training.stages import dpo

CPU = torch.device("cpu")
SOURCE = Source("c0ffee", "float32", "cpu")
OTHERS = {
    "policy": Source("decaf", "float32", "cpu"),
    "dtype": Source("c0ffee", "bfloat16", "cpu"),
    "device": Source("c0ffee", "float32", "cuda"),
    "scorer": Source("c0ffee", "float32", "cpu", "another"),
}


@pytest.fixture
def said(caplog, monkeypatch):
    """What the toolkit's log says."""
    monkeypatch.setattr(logging.getLogger("cream"), "propagate", True)
    caplog.set_level(logging.INFO, "cream")
    return caplog


def messages(said, level=logging.INFO):
    return [record.getMessage() for record in said.records if record.name == "cream" and record.levelno >= level]


# The file -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", OTHERS)
def test_a_score_is_found_under_its_own_source_only(tmp_path, part):
    path = tmp_path / "new" / "x.scores.jsonl"
    Scores(path, SOURCE).keep([("a", {"1": -1.5, "2": -2.5}), ("b", {"1": -3.5}), ("c", {})])
    Scores(path, OTHERS[part]).keep([("a", {"1": -9.0})])
    found = Scores(path, SOURCE)
    assert [found.find(uuid) for uuid in "abc"] == [{"1": -1.5, "2": -2.5}, {"1": -3.5}, {}]
    assert Scores(path, OTHERS[part]).find("a") == {"1": -9.0}
    assert set(OTHERS) == {field.name for field in msgspec.structs.fields(Source)}
    assert len(path.read_bytes().splitlines()) == 3  # no line for nothing


def test_a_digest_is_of_ids_and_of_what_of_them_is_scored():
    rows = [([1, 2, 3], [(1, 3)]), ([1, 2, 3], [(2, 3)]), ([1, 2, 3], []), ([1, 2, 4], [(1, 3)]), ([1, 2], [(1, 2)])]
    rows += [([1, 2, 3], [(1, 2), (2, 3)]), ([1, 2, -1, 1, 3], []), ([2**40, 2, 3], [(1, 3)])]
    assert len({Tokens(*row).digest() for row in rows}) == len(rows)
    assert Tokens([1, 2, 3], [(1, 3)]).digest() == Tokens([1, 2, 3], [(1, 3)]).digest()


uuids, digests = st.sampled_from(["a", "b", "é", 'line\n"quoted"']), st.sampled_from(["0", "1", "2"])
added = st.lists(st.tuples(uuids, st.dictionaries(digests, st.floats(-1e3, 0))), max_size=4)


@given(st.lists(st.tuples(st.sampled_from([SOURCE, OTHERS["dtype"]]), added), max_size=6))
def test_what_was_kept_last_is_found(tmp_path_factory, steps):
    path = tmp_path_factory.mktemp("scores") / "x.jsonl"
    expected = {}
    for source, rows in steps:
        Scores(path, source).keep(rows)
        for uuid, values in rows:
            expected[source, uuid] = expected.get((source, uuid), {}) | values
    for source in (SOURCE, OTHERS["dtype"]):
        found = Scores(path, source)
        for uuid in ("a", "b", "é", 'line\n"quoted"'):
            assert found.find(uuid) == expected.get((source, uuid), {})


def test_two_processes_add_to_a_file_at_once(tmp_path, repo):
    path = tmp_path / "x.scores.jsonl"
    adding = (
        "import sys; from pathlib import Path; from cream.scoring.cache import Scores, Source\n"
        "path, me, other = sys.argv[1:]; Path(path + me).touch()\n"
        "while not Path(path + other).exists(): pass\n"  # both begin together
        "kept = Scores(Path(sys.argv[1]), Source('c0ffee', 'float32', 'cpu'))\n"
        "for i in range(150):\n"
        "    kept.keep([(f'{sys.argv[2]}{i}', {f'{d:016x}': -float(i) for d in range(300)})])\n"
    )
    started = [subprocess.Popen([sys.executable, "-c", adding, str(path), *who], cwd=repo) for who in ("ab", "ba")]
    assert [process.wait() for process in started] == [0, 0]
    lines = path.read_bytes().splitlines()
    writers = [json.loads(strip_checksum(line))["uuid"][0] for line in lines]
    assert len(lines) == 300 and "ab" in "".join(writers) and "ba" in "".join(writers)  # they did take turns
    found = Scores(path, SOURCE)
    for who in "ab":
        for i in range(150):
            assert found.find(f"{who}{i}") == {f"{d:016x}": -float(i) for d in range(300)}


def test_a_line_that_was_cut_is_computed_again(tmp_path, said):
    """A file that ends anywhere in its last line, as a killed process leaves it."""
    whole = tmp_path / "whole.jsonl"
    Scores(whole, SOURCE).keep([("a", {"1": -1.5}), ("b", {"1": -2.5})])
    data = whole.read_bytes()
    first = data.index(b"\n") + 1
    for cut in range(first, len(data) + 1):
        said.clear()
        path = tmp_path / f"{cut}.jsonl"
        path.write_bytes(data[:cut])
        found = Scores(path, SOURCE)
        there = cut >= len(data) - 1  # but for its line's end it is whole
        assert found.find("a") == {"1": -1.5} and found.find("b") == ({"1": -2.5} if there else {})
        assert len(messages(said)) == (0 if there or cut == first else 1)
        found.keep([("b", {"1": -2.5}), ("c", {"1": -3.5})])
        again = Scores(path, SOURCE)
        assert [again.find(uuid) for uuid in "abc"] == [{"1": -1.5}, {"1": -2.5}, {"1": -3.5}]


DAMAGE = {
    "cut": lambda line: line[: len(line) // 2],
    "not text": lambda line: b"\xff\xfe" + line,
    "nothing but zeros": lambda line: b"\0" * len(line),
    "a number that is a text": lambda line: line.replace(b"-2.5", b'"x"'),
    "another number": lambda line: line.replace(b"-2.5", b"-3.5"),
    "of an earlier version": lambda line: line.partition(b"\t")[0],
    "another layout": lambda line: b'{"uuid": "b"}',
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_lines_are_passed_over_with_one_warning(tmp_path, said, damage):
    path = tmp_path / "x.jsonl"
    Scores(path, SOURCE).keep([(uuid, {"1": value}) for uuid, value in (("a", -1.5), ("b", -2.5), ("b2", -2.5))])
    Scores(path, SOURCE).keep([("c", {"1": -3.5})])
    lines = path.read_bytes().splitlines()
    lines[1:3] = map(damage, lines[1:3])
    path.write_bytes(b"\n".join(lines) + b"\n")
    found = Scores(path, SOURCE)
    assert [found.find(uuid) for uuid in ("a", "b", "b2", "c")] == [{"1": -1.5}, {}, {}, {"1": -3.5}]
    (line,) = messages(said, logging.WARNING)
    assert str(path) in line and "2 damaged lines" in line


@pytest.mark.parametrize("content", [b"mine\n", b'{"uuid": "a", "logprob": {}}\n{"uuid": "b"}\n'])
def test_a_file_of_another_kind_is_not_added_to(tmp_path, content):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match="x.jsonl: is not a score cache"):
        Scores(path, SOURCE)
    assert path.read_bytes() == content


@pytest.mark.parametrize("name", ["s.json", "s.jsonl", "s.json.gz", "s.jsonl.zst"])
def test_scores_stand_beside_the_samples(tmp_path, name):
    assert beside(tmp_path / name) == tmp_path / "s.scores.jsonl"


# Rewarding ----------------------------------------------------------------------------------------------------------

ANSWERS = ["Answer: 61", "Answer: 7", "Units: 8 + 3 = 11. Answer: 61", "Answer: 7"]


def group(uuid="a", answers=ANSWERS, sampled=None):
    prompt = [Message("user", "Tom has 28 books and gets 33 more. How many now?")]
    return Group(uuid, prompt, list(answers), [True] * len(answers), sampled)


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy of the tiny folder, to break."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


@pytest.fixture
def computed(monkeypatch):
    """The groups of tokens that are given to the model, call by call."""
    calls, computing = [], scoring.score

    def watched(model, groups, *options):
        calls.append([list(group) for group in groups])
        return computing(model, groups, *options)

    monkeypatch.setattr(scoring, "score", watched)
    return calls


class Rewarding:
    """A scorer with the kept scores at `path`, if any, as rewarding.py puts them together."""

    def __init__(self, folder, path=None):
        source = Source(fingerprint_folder(folder), "float32", "cpu")
        self.kept = path and Scores(path, source)
        self.score = Scorer(folder, load_chat(folder), torch.float32, 128, 500, 256, 1, "cpu")
        self.counts = Counter()

    def __call__(self, groups):
        for one in groups:
            one.cached = self.kept.find(one.uuid) if self.kept else {}
        found = list(self.score(groups))
        assert [uuid for uuid, _ in found] == [one.uuid for one in groups]
        if self.kept:
            self.kept.keep((uuid, one.computed) for uuid, one in found)
        self.counts += sum((one.sources for _, one in found), Counter())
        return [one for _, one in found]


def test_a_pass_over_kept_scores_needs_no_model(folder, tmp_path):
    path, groups = tmp_path / "s.scores.jsonl", [group("a"), group("b", ANSWERS[:2])]
    first = Rewarding(folder, path)
    found = first(groups)
    again = Rewarding(folder, path)
    (folder / "model.safetensors").unlink()
    assert again(groups) == found and again.counts == {"cached": 5}
    with pytest.raises(UserError, match="model.safetensors"):
        again([group("a", ["Answer: 8"])])
    other = group("a")  # kept for other prompts only: a uuid that was given to another question
    other.prompt = [Message("user", "How many?")]
    with pytest.raises(UserError, match="model.safetensors"):
        again([other])


def test_equal_answers_are_computed_once(folder, computed):
    scored = Rewarding(folder)
    found = scored([group("a"), group("b")])
    assert [len(rows) for rows in computed[-1]] == [3, 3] and scored.counts["computed"] == 6
    assert found[0].logprob[1] == found[0].logprob[3]


def test_kept_scores_serve_a_chunk_as_a_whole_or_not(folder, tmp_path, computed):
    """A run that was killed amid keeping a chunk's scores, or had a limit, changes no batch of the next one."""
    path, groups = tmp_path / "s.scores.jsonl", [group("a"), group("b", ANSWERS[2:]), group("c", ["x" * 500])]
    undisturbed = Rewarding(folder)(groups)
    Rewarding(folder, path)([group("a", ANSWERS[:1])])
    Rewarding(folder, path)([groups[1]])
    assert Rewarding(folder, path)(groups) == undisturbed
    assert [len(rows) for rows in computed[-1]] == [3, 2] and len(computed) == 4
    assert Rewarding(folder, path)(groups) == undisturbed and len(computed) == 4


def test_an_answer_cut_at_the_limit_is_another(folder, tmp_path, computed):
    path = tmp_path / "s.scores.jsonl"
    (whole,) = Rewarding(folder, path)([group("a", ANSWERS[:1])])
    cut = group("a", ANSWERS[:1])
    cut.complete = [False]
    (found,) = Rewarding(folder, path)([cut])
    assert len(computed) == 2 and found.num_tokens[0] == whole.num_tokens[0] - 1
    assert found.logprob[0] > whole.logprob[0]


def test_the_samplers_value_serves_where_its_tokens_are_as_many(folder, tmp_path, computed):
    """It is not kept: the next pass computes; and what is kept goes before it."""
    path = tmp_path / "s.scores.jsonl"
    (own,) = Rewarding(folder)([group()])
    counts = own.num_tokens
    sampled = [(-1.25, counts[0]), (-2.25, counts[1] + 1), None, (-2.25, counts[3] - 1)]
    score_from = Rewarding(folder, path)
    (found,) = score_from([group(sampled=sampled)])
    assert found.logprob == pytest.approx([-1.25, *own.logprob[1:]], abs=1e-4)
    assert score_from.counts["sampler"] == 1 and [len(rows) for rows in computed[-1]] == [2]
    (found,) = Rewarding(folder, path)([group()])
    assert found.logprob == pytest.approx(own.logprob, abs=1e-4) and [len(rows) for rows in computed[-1]] == [3]
    (found,) = Rewarding(folder, path)([group(sampled=sampled)])
    assert found.logprob == pytest.approx(own.logprob, abs=1e-4)


def test_what_is_not_a_finite_number_is_not_kept(folder, tmp_path):
    path = tmp_path / "s.scores.jsonl"
    model = load_policy(folder, torch.float32, CPU)
    model.model.norm.weight.data[:] = float("nan")
    save(model, load_tokenizer(folder), tmp_path / "broken", None, {})
    (found,) = Rewarding(tmp_path / "broken", path)([group()])
    assert found.logprob == [None] * 4 and found.reason == ["not a finite number"] * 4
    assert not path.exists() or path.read_bytes() == b""


# The reference of a training ----------------------------------------------------------------------------------------

TEXT = describe_text({})
SCORED = {**msgspec.structs.asdict(SOURCE), "from": "model", "text": "as sampled"}


@pytest.mark.parametrize(
    "scored, template, named",
    [
        (SCORED, None, None),
        (SCORED | {"chat_template": "f00"}, "f00", None),
        (SCORED | {"more": 1}, None, None),
        (None, None, "does not say"),
        ({}, None, "does not say"),
        ({"policy": "c0ffee"}, None, "dtype: None there, float32 here"),
        (SCORED | {"from": "sampling"}, None, "from: sampling there, model here"),
        (SCORED | {"chat_template": "f00"}, None, "chat_template: f00 there, None here"),
        (SCORED | {"chat_template": "f00"}, "ba5", "chat_template: f00 there, ba5 here"),
        (SCORED, "ba5", "chat_template: None there, ba5 here"),
        (SCORED | {"text": None}, None, "text: None there, as sampled here"),  # by an earlier version
        (SCORED | {"thoughts": "mask"}, None, "thoughts: mask there, None here"),
        *(
            ({**SCORED, name: getattr(other, name)}, None, f"{name}: {getattr(other, name)}")
            for name, other in OTHERS.items()
        ),
    ],
)
def test_pairs_hold_the_reference_only_if_scored_as_training_would(scored, template, named):
    why = reference.trusted(scored, SOURCE, template, TEXT)
    assert why is None if named is None else named in why


STAGE = dpo.Stage(dpo.Options(), {})


def pairs(chat, count=6):
    """(uuid, example) with no reference yet."""
    prompts = [[Message("user", f"Tom has {20 + i} books. How many now?")] for i in range(count)]
    rows = [
        chat.encode_responses(prompt, [f"Answer: {20 + i}", "5 + 3 = 8."], [True, i % 2 == 0])
        for i, prompt in enumerate(prompts)
    ]
    return [(f"p{i}", dpo.Example(*row)) for i, row in enumerate(rows)]


def values(examples):
    return [value for _, example in examples for value in example.reference]


def test_a_reference_comes_from_the_pairs_else_from_beside_them_else_from_the_model(
    tiny_folder, tiny_chat, tmp_path, said, monkeypatch
):
    monkeypatch.setattr(reference, "CHUNK", 2)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator, path = Accelerator(cpu=True), tmp_path / "pairs.json"
    model = LogProbs(load_policy(tiny_folder, torch.float32, CPU))
    examples = pairs(tiny_chat)
    expected = sum(score(model, [[e.chosen, e.rejected] for _, e in examples], Budget(1000)), [])

    def fill(source=SOURCE, given=0, **changed):
        """Values and what the log said of fresh pairs of which the first `given` bring theirs."""
        said.clear()
        fresh = pairs(tiny_chat)
        for _, example in fresh[:given]:
            example.reference = (-1.25, -2.25)
        fresh[given][1].reference = (-9.0, math.nan)  # half a reference is none
        reference.fill(accelerator, model, STAGE, fresh, path, source, Budget(1000))
        return values(fresh), messages(said)[-1]

    Scores(beside(path), SOURCE).keep(
        [(uuid, {e.chosen.digest(): -3.25, e.rejected.digest(): -4.25}) for uuid, e in examples[2:4]]
    )
    found, line = fill(given=2)
    assert found[:8] == [-1.25, -2.25] * 2 + [-3.25, -4.25] * 2
    assert found[8:] == pytest.approx(expected[8:], abs=1e-4)
    assert "6 examples: 2 from the data, 2 cached, 2 computed" in line
    again, line = fill()
    assert again[4:] == found[4:] and again[:4] == pytest.approx(expected[:4], abs=1e-4)
    assert "0 from the data, 4 cached, 2 computed" in line
    _, line = fill()
    assert "0 from the data, 6 cached, 0 computed" in line
    for other in OTHERS.values():
        found, line = fill(other)
        assert "0 cached, 6 computed" in line and found == pytest.approx(expected, abs=1e-4)


def test_a_signal_amid_the_reference_costs_the_chunk_in_hand(tiny_folder, tiny_chat, tmp_path, said, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", 2)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator, path = Accelerator(cpu=True), tmp_path / "pairs.json"
    model = LogProbs(load_policy(tiny_folder, torch.float32, CPU))
    for left in (4, 2):
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(interrupts, "received", lambda: True)
            reference.fill(accelerator, model, STAGE, pairs(tiny_chat), path, SOURCE, Budget(1000))
        kept = Scores(beside(path), SOURCE)
        assert sum(not kept.find(f"p{i}") for i in range(6)) == left
    reference.fill(accelerator, model, STAGE, pairs(tiny_chat), path, SOURCE, Budget(1000))
    assert "0 from the data, 4 cached, 2 computed" in messages(said)[-1]


def test_a_reference_that_is_not_finite_is_refused(tiny_folder, tiny_chat, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    policy = load_policy(tiny_folder, torch.float32, CPU)
    policy.model.norm.weight.data[:] = float("nan")
    with pytest.raises(UserError, match="6 examples have no finite reference"):
        reference.fill(
            Accelerator(cpu=True), LogProbs(policy), STAGE, pairs(tiny_chat), tmp_path / "p.json", SOURCE, Budget(1000)
        )
    assert not beside(tmp_path / "p.json").exists()


# Command lines ------------------------------------------------------------------------------------------------------

SAMPLE = f"infer.py {ON} --mode sampling --gen_n 4 --gen_temperature 1.0 --gen_max_tokens 48"
DPO = f"train.py {ON} --epoch 1 --train_bsz 4 --lr 1e-3 --beta 1.0"
ROUND_1 = {
    "sample": f"{SAMPLE} --checkpoint m1 --name tiny_prompt_1 --output_dir outputs/s1.json",
    "current": f"rewarding.py {ON} --input_file outputs/s1.json --checkpoint m1 --output outputs/c1.json",
    "previous": f"rewarding.py {ON} --input_file outputs/s1.json --reward likelihood --output outputs/p1.json",
    "pairs": "cal_consistency.py --file1 outputs/c1.json --file2 outputs/p1.json --output outputs/pairs1.json",
    "train": f"{DPO} --checkpoint m1 --name outputs/pairs1.json --output_dir outputs/m2 --register m2",
}
ROUND_2 = {
    "sample": f"{SAMPLE} --checkpoint m2 --name tiny_prompt_2 --output_dir outputs/s2.json",
    "current": f"rewarding.py {ON} --input_file outputs/s2.json --checkpoint m2 --output outputs/c2.json",
    "previous": f"rewarding.py {ON} --input_file outputs/s2.json --checkpoint m1 --output outputs/p2.json",
}


@pytest.fixture(scope="module")
def world(looped):
    """Few prompts; the tiny loop's M1, registered."""
    for name in ("prompt.1", "prompt.2"):
        looped.shorten(f"localdata/tiny/{name}.json", 24)
    looped.write("configs/checkpoint.json", {"m1": f"{LOOP}/m1/checkpoint-last"})
    return looped


@pytest.fixture(scope="module")
def first(world):
    """What the commands of the first round printed."""
    return {name: world.run(command).out for name, command in ROUND_1.items()}


@pytest.fixture(scope="module")
def second(world, first):
    """What those of the second did."""
    return {name: world.run(command).out for name, command in ROUND_2.items()}


def sources(out):
    """{role: {where its log-probabilities came from: how many}} as rewarding.py says it."""
    lines = dict(re.findall(r"^(policy|reference): log-probabilities of responses: (.*)$", out, re.MULTILINE))
    return {role: {words: int(n) for n, words in re.findall(r"(\d+) ([a-z ]+)", line)} for role, line in lines.items()}


COMPUTED, KEPT, SAMPLED = "computed", "from the score cache", "from the sampler"


def distinct(world, samples):
    """Answers in a file of samples, equal ones counted once a prompt; cut answers differ from whole ones."""
    return sum(len(set(zip(s.responses, s.finish_reason, strict=True))) for s in read(world.folder / samples, Samples))


def test_round_1_takes_two_passes(world, first):
    """M1's and M0's over the answers; the previous ranking, by M0, finds all of its values."""
    answers = distinct(world, "outputs/s1.json")
    assert sources(first["current"]) == {"policy": {COMPUTED: answers}, "reference": {COMPUTED: answers}}
    assert sources(first["previous"]) == {"policy": {KEPT: answers}}
    reuse = [world.read(f"outputs/{name}1.json.meta.json")["reuse"] for name in "cp"]
    assert reuse == [dict.fromkeys(("policy", "reference"), {"computed": answers}), {"policy": {"cached": answers}}]


def test_later_rounds_take_three_passes(world, second):
    """M2's, M1's and M0's, which serves both rankings."""
    answers = distinct(world, "outputs/s2.json")
    assert sources(second["current"]) == {"policy": {COMPUTED: answers}, "reference": {COMPUTED: answers}}
    assert sources(second["previous"]) == {"policy": {COMPUTED: answers}, "reference": {KEPT: answers}}


def test_what_is_printed_next_follows_from_who_sampled(second):
    """The current model's rewards need the previous model's; those of a model that did not sample are the latter."""
    assert "--checkpoint m1 " in next_of(second["current"])[0]
    pairs = "python cal_consistency.py --file1 outputs/c2.json --file2 outputs/p2.json --beta 1.0"
    assert next_of(second["previous"]) == [pairs]


def next_of(out):
    """The commands of next stages in what a stage printed."""
    return [line.strip() for line in out.splitlines() if line.startswith("  python ")]


def test_pairs_by_gold_labels_are_for_the_policy_that_sampled(world, first, second):
    labels = "--reward labels --labels localdata/tiny/labels.json --output outputs/gold.json"
    world.run(f"rewarding.py --input_file outputs/s1.json {labels}")
    pairs = world.run("make_pairs.py --strategy extremes --rewards outputs/gold.json --output outputs/gold.pairs.json")
    assert "python train.py --model tiny --checkpoint m1 " in pairs.out
    train = f"{DPO} --name outputs/gold.pairs.json --output_dir outputs/gold --dry_run"
    assert "were made for --checkpoint m1 of tiny" in world.refused(f"{train} --checkpoint m2")
    assert "it would train" in world.run(f"{train} --checkpoint m1").out


def test_kept_scores_are_those_that_would_be_computed(world, first):
    """The previous ranking again, from a copy of the samples that has none."""
    shutil.copy(world.folder / "outputs/s1.json", world.folder / "outputs/copy.json")
    out = world.run(ROUND_1["previous"].replace("s1.json", "copy.json").replace("p1.json", "fresh.json")).out
    assert sources(out) == {"policy": {COMPUTED: distinct(world, "outputs/s1.json")}}
    for kept, fresh in zip(
        *(read(world.folder / f"outputs/{name}.json", Rewards) for name in ("p1", "fresh")), strict=True
    ):
        assert kept.reward == pytest.approx(fresh.reward, abs=1e-4)


def referenced(out):
    """(from the data, cached, computed) as train.py says it."""
    return tuple(map(int, re.search(r": (\d+) from the data, (\d+) cached, (\d+) computed", out).groups()))


def first_loss(world, run):
    return json.loads((world.folder / run / "log.jsonl").read_text().splitlines()[0])["loss"]


def test_training_takes_its_reference_from_the_pairs(world, first):
    count = len(list(read(world.folder / "outputs/pairs1.json", Pair)))
    scored = world.read("outputs/c1.json.meta.json")["scored"]
    assert scored == {
        **msgspec.structs.asdict(
            Source(fingerprint_folder(world.folder / LOOP / "m1/checkpoint-last"), "float32", "cpu")
        ),
        "from": "model",
        "text": "as sampled",
    }
    assert world.read("outputs/pairs1.json.meta.json")["scored"] == scored
    assert referenced(first["train"]) == (count, 0, 0)
    assert world.read("outputs/m2/meta.json")["reuse"] == {"reference": {"data": count}}
    assert "do not serve" not in first["train"]
    assert first_loss(world, "outputs/m2") == pytest.approx(math.log(2), abs=1e-5)


@pytest.fixture(scope="module")
def bare_pairs(world, first):
    """The pairs without their sidecar, as from elsewhere."""
    shutil.copy(world.folder / "outputs/pairs1.json", world.folder / "outputs/bare.json")
    return "outputs/bare.json"


@pytest.mark.slow
def test_pairs_of_unknown_origin_are_scored_once(world, bare_pairs):
    command = DPO + f" --checkpoint m1 --name {bare_pairs} --output_dir outputs/bare-"
    count = len(list(read(world.folder / bare_pairs, Pair)))
    out = world.run(command + "1").out
    assert "do not serve as reference: their file does not say what scored them" in out
    assert referenced(out) == (0, 0, count)
    out = world.run(command + "2 --seed 1").out
    assert referenced(out) == (0, count, 0)
    out = world.run(command + "3 --bf16 yes").out  # scored with other products
    assert referenced(out) == (0, 0, count)
    assert world.read("outputs/bare-2/meta.json")["reuse"] == {"reference": {"cached": count}}
    for run in "12":
        assert first_loss(world, f"outputs/bare-{run}") == pytest.approx(math.log(2), abs=1e-5)


def test_pairs_that_were_changed_bring_no_reference(world, first):
    """An answer was written anew, and the log-probability beside it is still the old one's. No check of the first step
    would notice: the pair comes later."""
    pairs = world.read("outputs/pairs1.json")
    *_, last = global_batches(len(pairs), 4, 1, seed=0)
    list(pairs.values())[last[0]]["selected"][-1]["content"] = "Units: 8 + 3 = 11. Answer: 5"
    world.write("outputs/changed.json", pairs)
    shutil.copy(world.folder / "outputs/pairs1.json.meta.json", world.folder / "outputs/changed.json.meta.json")
    command = DPO + " --checkpoint m1 --name outputs/changed.json --output_dir outputs/changed"
    assert "changed.json was changed since it was made" in world.refused(command)
    assert referenced(world.run(command + " --force").out)[0] < len(pairs)
    (forced,) = world.read("outputs/changed/meta.json")["forced"]
    assert "changed.json was changed since it was made" in forced


# The sampler's own values -------------------------------------------------------------------------------------------

FROM_SAMPLING = (
    ROUND_1["current"].replace("s1.json", "own.json").replace("c1.json", "own-c.json") + " --score_from sampling"
)


@pytest.fixture(scope="module")
def own(world, first):
    """What rewarding by the sampler's values printed; the samples are a copy that no scores are kept beside."""
    for suffix in ("", ".meta.json"):
        shutil.copy(world.folder / f"outputs/s1.json{suffix}", world.folder / f"outputs/own.json{suffix}")
    return world.run(FROM_SAMPLING).out


def test_the_samplers_values_differ_from_the_models_by_rounding(world, own):
    """Of the hf engine in float32: less than 1e-3 nats an answer."""
    found = sources(own)
    usable = sum(value is not None for s in read(world.folder / "outputs/own.json", Samples) for value in s.logprob)
    assert usable > 50 and 0.5 * usable < found["policy"][SAMPLED] <= usable and SAMPLED not in found["reference"]
    for ours, exact in zip(*(read(world.folder / f"outputs/{n}.json", Rewards) for n in ("own-c", "c1")), strict=True):
        assert ours.reward == pytest.approx(exact.reward, abs=1e-3) and ours.num_tokens == exact.num_tokens
    assert [r.score for r in read(world.folder / "outputs/own-c.json", Rewards)] != [
        r.score for r in read(world.folder / "outputs/c1.json", Rewards)
    ]


def test_the_samplers_values_never_serve_as_reference(world, own):
    assert world.read("outputs/own-c.json.meta.json")["scored"]["from"] == "sampling"
    world.run("cal_consistency.py --file1 outputs/own-c.json --output outputs/own-pairs.json")
    out = world.run(DPO + " --checkpoint m1 --name outputs/own-pairs.json --output_dir outputs/own-m2").out
    assert "do not serve as reference: from: sampling there, model here" in out
    assert referenced(out)[::2] == (0, len(list(read(world.folder / "outputs/own-pairs.json", Pair))))
    assert first_loss(world, "outputs/own-m2") == pytest.approx(math.log(2), abs=1e-5)


def test_samples_of_another_policy_have_no_values_of_this_one(world, own):
    template = world.folder / "localdata/own.jinja"
    template.write_text((world.folder / "assets/tiny_m0/chat_template.jinja").read_text())
    shutil.copy(world.folder / "outputs/own.json", world.folder / "outputs/unknown.json")
    commands = [
        FROM_SAMPLING.replace("--checkpoint m1", "--checkpoint m2"),
        FROM_SAMPLING.replace("--checkpoint m1", "--reward likelihood"),
        FROM_SAMPLING + " --chat_template localdata/own.jinja",
        FROM_SAMPLING.replace("own.json", "unknown.json"),
    ]
    for command in commands:
        error = world.refused(command.replace("own-c.json", "x.json"))
        assert "was not sampled by this policy with this chat template" in error


def test_samples_changed_since_have_no_values_of_this_policy(world, own):
    """The answers in another order, the log-probabilities beside them not."""
    samples = world.read("outputs/own.json")
    for record in samples.values():
        record["responses"].reverse()
    world.write("outputs/reversed.json", samples)
    shutil.copy(world.folder / "outputs/own.json.meta.json", world.folder / "outputs/reversed.json.meta.json")
    command = FROM_SAMPLING.replace("own.json", "reversed.json").replace("own-c.json", "x.json")
    assert "reversed.json was changed since it was made" in world.refused(command)
    assert "reversed.json was changed since it was sampled" in world.refused(command + " --force")
