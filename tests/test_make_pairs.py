"""make_pairs.py by its command line: any strategy over any file of rewards, mistakes, a strategy of one's own."""

import json
import math
import shlex

import pytest
from test_pairs import record

from cream.cli import advice
from cream.files import store
from cream.files.provenance import fingerprint_file, meta_path
from cream.records import Item, Pair
from cream.text.options import GIVEN

COUNT = 12
SCORED = {"policy": "0" * 32, "dtype": "float32", "device": "cpu", "scorer": "test", "from": "model"}
REWARDS, PREVIOUS, LABELS, JUDGE = (f"localdata/p/{name}.json" for name in ("r", "p", "labels", "judge"))


def rewards(i, shift=0.0):
    """Three responses, the second graded correct, with rewards that rank them differently from prompt to prompt."""
    values = [math.sin(3 * i + j + shift) for j in range(3)]
    texts = [f"{i} and no more. Answer: {i}", f"Answer: {i + 1}", "Answer: none"]
    one = record(f"p{i}", values, texts, num_tokens=[7, 5, 3])
    one.score, one.ref_score = [v - 9 for v in values], [-9.0] * 3
    return one


def put(workspace, path, records, **about):
    """A record file; with `about`, its sidecar says that too."""
    path = workspace.folder / path
    path.parent.mkdir(parents=True, exist_ok=True)
    store.write(path, records)
    if about:
        meta_path(path).write_text(json.dumps({"output": fingerprint_file(path), **about}))


@pytest.fixture(scope="module")
def world(workspace):
    """A workspace with two rankings, labels, and the scores of a judge who compared the responses."""
    by_model = {"settings": {"normalize": "sum"}, "reward": "dpo", "scored": SCORED}
    put(workspace, REWARDS, [rewards(i) for i in range(COUNT)], **by_model)
    put(workspace, PREVIOUS, [rewards(i, 0.5) for i in reversed(range(COUNT))])
    put(workspace, LABELS, [Item(uuid=f"p{i}", question=f"{i} + 1?", label=i + 1) for i in range(COUNT)])
    judged = [rewards(i) for i in range(COUNT)]
    for one in judged:
        one.score = [4.3, 2.0, 1.0]
        one.preferences = [[None, 0.9, 0.5], [0.2, None, 0.5], [0.5, None, None]]
    put(workspace, JUDGE, judged, settings={"normalize": "sum"}, reward="judge")
    return workspace


def make(world, flags, output, code=0):
    """What `make_pairs.py flags` prints, its pairs, and their sidecar."""
    done = world.run(f"make_pairs.py {flags} --output outputs/{output}", code)
    pairs = list(store.read(world.folder / f"outputs/{output}", Pair))
    return done.out, pairs, world.read(f"outputs/{output}.meta.json")


@pytest.mark.parametrize(
    ("strategy", "files"),
    [("extremes", ""), ("extremes", f"--previous {PREVIOUS}"), ("oracle", f"--labels {LABELS}")],
    ids=["alone", "two rankings", "oracle"],
)
def test_cal_consistency_makes_the_same_files(world, strategy, files, request):
    name = request.node.callspec.id.replace(" ", "")
    out, _, about = make(world, f"--strategy {strategy} --rewards {REWARDS} {files}", f"{name}.json")
    other = files.replace("--previous", "--file2")
    own = world.run(f"cal_consistency.py --file1 {REWARDS} {other} --output outputs/{name}.cal.json")
    made, expected = ((world.folder / f"outputs/{name}{end}").read_bytes() for end in (".json", ".cal.json"))
    assert made == expected and made.count(b'"selected_logp"') > 3
    sidecar = world.read(f"outputs/{name}.cal.json.meta.json")
    for part in ("method", "counts", "policy", "scored", "mean_consistency", "without_consistency"):
        assert about[part] == sidecar[part]
    said = [text[: text.index("pairs: outputs")] for text in (out, own.out)]
    assert said[0] == said[1] and "responses" in said[0]


def test_all_pairs_have_the_consistency_of_their_prompt(world):
    out, pairs, about = make(
        world, f"--strategy all_pairs --rewards {REWARDS} --previous {PREVIOUS} --max_pairs_per_prompt 2", "all.jsonl"
    )
    assert [p.uuid for p in pairs] == [f"p{i}{end}" for i in range(COUNT) for end in ("", "#2")]
    one = {
        p.uuid: p for p in make(world, f"--strategy extremes --rewards {REWARDS} --previous {PREVIOUS}", "1.json")[1]
    }
    assert all(p.consistency == one[p.uuid.removesuffix("#2")].consistency for p in pairs)
    assert about["method"] == "consistency_avg" and f"{2 * COUNT} pairs from {COUNT} prompts" in out
    assert f"C of {COUNT} prompts" in out and about["counts"]["out"] == 2 * COUNT


def test_pseudo_labels_carry_their_probability(world):
    out, pairs, about = make(world, f"--strategy threshold --rewards {REWARDS} --threshold 0.6 --margin 0.5", "t.json")
    assert len(pairs) > COUNT / 2 and all(p.tau is None for p in pairs)
    for pair in pairs:
        assert pair.consistency == pytest.approx(1 / (1 + math.exp(-pair.margin))) and pair.consistency >= 0.6
    assert (about["method"], about["strategy"], about["rank"]) == ("consistency_dyn", "threshold", None)
    assert f"C of {len(pairs)} pairs" in out
    assert about["mean_consistency"] == pytest.approx(sum(p.consistency for p in pairs) / len(pairs))
    chosen = make(world, f"--strategy threshold --rewards {REWARDS} --method consistency_avg", "avg.json")
    assert chosen[2]["method"] == "consistency_avg"


def test_pairs_by_a_judges_preferences(world):
    """0.9 and 1 - 0.2 that the first is better than the second; ½ of the others."""
    _, pairs, about = make(world, f"--strategy threshold --rewards {JUDGE}", "judged.json")
    assert len(pairs) == COUNT and about["scored"] is None
    for pair in pairs:
        assert (pair.selected_index, pair.rejected_index) == (0, 1) and pair.consistency == pytest.approx(0.85)


@pytest.mark.parametrize(
    ("about", "kept"),
    [
        ({"settings": {"normalize": "sum"}, "scored": SCORED}, True),
        ({"settings": {"normalize": "mean"}, "scored": SCORED}, False),
        ({"settings": {"normalize": "sum"}, "scored": None}, False),
        ({"settings": {"normalize": "sum"}}, False),
        ({"settings": {}, "scored": SCORED}, False),
        ({}, False),
    ],
    ids=["summed", "mean", "not scored", "a judge", "unsaid", "no sidecar"],
)
@pytest.mark.parametrize("script", ["make_pairs.py --strategy extremes --rewards", "cal_consistency.py --file1"])
def test_only_summed_log_probabilities_become_dpos_reference(world, request, about, kept, script):
    name = f"{request.node.name}.json".replace(" ", "-").replace("/", "-")
    put(world, f"localdata/s/{name}", [rewards(0)], **about)
    world.run(f"{script} 'localdata/s/{name}' --output 'outputs/s/{name}'")
    (pair,) = store.read(world.folder / f"outputs/s/{name}", Pair)
    assert pair.margin and (pair.selected_logp is not None, pair.rejected_logp is not None) == (kept, kept)


def test_rewards_without_a_score_make_pairs(world):
    """A judge's have none: not even where the sidecar claims log-probabilities."""
    one = rewards(0)
    one.score = one.ref_score = None
    put(world, "localdata/p/none.json", [one], settings={"normalize": "sum"}, scored=SCORED)
    _, (pair,), _ = make(world, "--strategy extremes --rewards localdata/p/none.json", "none.json")
    assert pair.selected_logp is None


def test_another_seed_makes_another_output_and_no_flag_of_another_strategy_does(world):
    command = f"--strategy random --rewards {REWARDS} --seed 3"
    out, pairs, about = make(world, command, "random.json")
    assert about["settings"]["seed"] == 3 and "threshold" not in about["settings"]
    before = world.state()
    assert "is up to date" in world.run(f"make_pairs.py {command} --output outputs/random.json").out
    assert world.state() == before
    error = world.refused(f"make_pairs.py {command.replace('3', '4')} --output outputs/random.json")
    assert "seed: 3 -> 4" in error
    other = make(world, command.replace("3", "4"), "random4.json")[1]
    assert {p.uuid for p in other} == {p.uuid for p in pairs} and other != pairs


def test_the_default_name_and_the_registry(world):
    done = world.run(f"make_pairs.py --strategy random --rewards {REWARDS} --register drawn")
    assert world.read("configs/dataset.json")["drawn"].endswith("localdata/p/r.random.dpo.json")
    assert done.commands() == ["python train.py --checkpoint CHECKPOINT --lr 1e-06 --beta 0.1 --name drawn"]


TEXT = {"text": "as sampled"}
MASKING = {"thoughts": "mask", "thinking_tags": "<a> </a>"}


@pytest.mark.parametrize(
    ("now", "before", "told"),
    [
        (TEXT, TEXT | MASKING, "thoughts: score and mask; thinking_tags: none"),
        (TEXT | {"thoughts": "drop"}, TEXT | {"thoughts": "mask"}, "thoughts: drop and mask"),
        (TEXT | {"chat_template_kwargs": "a=no"}, TEXT, "chat_template_kwargs: {'a': False} and none"),
        (TEXT | {"chat_template": "f00"}, TEXT | {"chat_template": "ba5"}, "chat_template: f00 and ba5"),
        (TEXT, {}, "earlier version scored localdata/p/before.json as the"),  # whose model is not there any more
        ({}, TEXT, "earlier version scored localdata/p/now.json as the chat template rewrites responses"),
        (TEXT, TEXT | {"chat_template": "f00"}, None),  # the other model may have it in its folder
        (TEXT | {"chat_template_kwargs": "a=no,b=1"}, TEXT | {"chat_template_kwargs": '{"b": 1, "a": false}'}, None),
        ({}, {}, None),
        (TEXT, None, None),  # a judge's, or from elsewhere
        (None, TEXT | {"thoughts": "mask"}, None),
    ],
)  # fmt: skip
def test_rankings_of_other_tokens_are_not_compared(world, now, before, told):
    for name, scored in (("now", now), ("before", before)):
        about = {"settings": {"normalize": "sum"}, "scored": None if scored is None else SCORED | scored}
        put(world, f"localdata/p/{name}.json", [rewards(i, 0.5 * (name == "now")) for i in range(3)], **about)
    files = "--rewards localdata/p/now.json --previous localdata/p/before.json --output outputs/text.json --overwrite"
    command = f"make_pairs.py --strategy extremes {files}"
    if told is None:
        world.run(command)
        return
    assert told in world.refused(command)
    world.run(f"{command} --force")
    assert told in world.read("outputs/text.json.meta.json")["forced"][0]


POLICY = {"policy": {"model": "tiny", "checkpoint": "m1", "fingerprint": "f00"}}
TEMPLATE = {"inputs": {"chat_template": "f00"}}
THERE = {"sources": {"chat_template": "../../own.jinja"}}
LABELLED = {"scored": None, "sources": {"input_file": "s.json"}}
OWN = "--chat_template own.jinja --chat_template_kwargs b=2"


@pytest.mark.parametrize(
    ("rewarded", "about", "wanted"),
    [
        ("--chat_template own.jinja", TEMPLATE | THERE, "--chat_template own.jinja"),
        ("--config rewards.yaml", TEMPLATE | THERE, "--chat_template own.jinja"),
        ("--chat_template brief", TEMPLATE, "--chat_template brief"),
        ("", {"scored": SCORED | {"chat_template_kwargs": "a=1"}}, "--chat_template_kwargs a=1"),
        ("", {"scored": SCORED | MASKING}, "--thoughts mask --thinking_tags '<a> </a>'"),
        ("--bf16 no", {"settings": {"bf16": False}}, "--bf16 no"),
        ("--config rewards.yaml", {"settings": {"bf16": True}}, "--bf16 yes"),
        ("--max_length 4096 --device 0,1", {}, "--device 0,1 --max_length 4096"),
        ("--device cpu --limit_size 3 --trust_remote_code yes --score_from sampling", {}, "--device cpu"),
        ("--device cuda --ray_address auto --tensor_parallel_size 2", {}, ""),
        ("--reward labels", LABELLED, OWN),
        ("--reward labels", {"scored": None, "sources": {"input_file": "gone.json"}}, ""),
    ],
)  # fmt: skip
def test_training_has_the_flags_of_the_rewards_that_it_needs(world, rewarded, about, wanted):
    """Text, device and precision, from the sidecars; the text of gold labels' from that of the samples."""
    path, usual = "localdata/p/flags.json", {"settings": {"normalize": "sum"}, "scored": SCORED}
    (world.folder / "own.jinja").write_text("x")
    sampled = {"settings": {"chat_template_kwargs": "b=2"}, **TEMPLATE, **THERE}
    put(world, "localdata/p/s.json", [rewards(0)], **sampled)
    put(world, path, [rewards(0)], **POLICY, command=["rewarding.py", *rewarded.split()], **(usual | about))
    pairs = f"make_pairs.py --strategy extremes --rewards {path} --output outputs/f.json --overwrite"
    (train,) = world.run(pairs).commands()
    given = advice.as_given(shlex.split(train)[2:])
    assert given.items() >= {"model": "tiny", "checkpoint": "m1", "lr": "0.0002", "beta": "1.0"}.items()
    names = ("device", "bf16", "max_length", "chat_template", *GIVEN)
    assert {name: text for name, text in given.items() if name in names} == advice.as_given(shlex.split(wanted))


def test_what_is_up_to_date_is_not_made_again(world):
    """Not even its first pass, which --shuffle_consistency needs."""
    command = f"cal_consistency.py --file1 {REWARDS} --file2 {PREVIOUS} --shuffle_consistency 1 --output outputs/s.json"
    assert "responses" in world.run(command).out
    again = world.run(command).out
    assert "outputs/s.json is up to date" in again and "responses" not in again


def test_a_dry_run_reports_and_writes_nothing(world):
    before = world.state()
    out = world.run(f"make_pairs.py --strategy all_pairs --rewards {REWARDS} --register dry --dry_run").out
    assert f"{3 * COUNT} pairs from {COUNT} prompts" in out and "nothing was written" in out
    assert world.state() == before


def test_bad_records_and_truncated_responses_are_skipped_on_request(world):
    some = [rewards(0), record("cut", [1.0, 2.0], truncated=[1])]
    put(world, "localdata/p/bad.jsonl", some)
    with open(world.folder / "localdata/p/bad.jsonl", "a") as file:
        file.write('{"uuid": "bad", "prompt": 3}\n')
    command = "--strategy extremes --rewards localdata/p/bad.jsonl"
    assert "'bad'" in world.refused(f"make_pairs.py {command} --output outputs/bad.json")
    out, pairs, about = make(world, f"{command} --on_bad_record skip", "bad.json")
    assert [p.uuid for p in pairs] == ["p0"] and "1 truncated" in out
    assert about["counts"]["dropped"] == {"fewer than two usable responses": 1, "malformed record": 1}
    (rejected,) = store.read_rows(world.folder / "outputs/bad.json.rejected.jsonl")
    assert rejected["uuid"] == "bad"
    kept = make(world, f"{command} --on_bad_record skip --keep_truncated", "cut.json")[1]
    assert [p.selected_truncated for p in kept] == [False, True]


MISTAKES = {
    "no strategy": (f"--rewards {REWARDS}", "--strategy is missing: one of extremes, oracle"),
    "unknown strategy": (f"--strategy extreme --rewards {REWARDS}", "did you mean extremes?"),
    "no rewards": ("--strategy random", "it needs --rewards"),
    "no labels": (f"--strategy oracle --rewards {REWARDS}", "--strategy oracle: it needs --labels"),
    "labels for nothing": (f"--strategy extremes --rewards {REWARDS} --labels {LABELS}", "it does not read --labels"),
    "labels of other prompts": (
        f"--strategy oracle --rewards {REWARDS} --labels localdata/tiny/labels.json",
        "there is no item 'p0'; every prompt needs its label",
    ),
    "rewards as labels": (f"--strategy oracle --rewards {REWARDS} --labels {REWARDS}", "question"),
    "two confidences": (
        f"--strategy threshold --rewards {REWARDS} --previous {PREVIOUS}",
        "it does not read --previous, for it states the confidence of its pairs itself",
    ),
    "a flag of another": (
        f"--strategy extremes --rewards {REWARDS} --threshold 0.8",
        "--threshold belongs to --strategy threshold",
    ),
    "threshold below a half": (f"--strategy threshold --rewards {REWARDS} --threshold 0.4", "[0.5, 1]"),
    "no number": (f"--strategy threshold --rewards {REWARDS} --threshold x", "'x' is not a number"),
    "negative margin": (f"--strategy extremes --rewards {REWARDS} --margin -1", "at least 0"),
    "no pairs": (f"--strategy extremes --rewards {REWARDS} --max_pairs_per_prompt 0", "at least 1"),
    "a method without c": (
        f"--strategy extremes --rewards {REWARDS} --method consistency_dyn",
        "--method consistency_dyn needs --previous",
    ),
    "a rank of one ranking": (f"--strategy extremes --rewards {REWARDS} --rank spearman", "needs --previous"),
    "one ranking twice": (f"--strategy extremes --rewards {REWARDS} --previous {REWARDS}", "--previous is --rewards"),
    "margin above all": (f"--strategy extremes --rewards {REWARDS} --margin 99", "no pair can be made"),
    "no such file": ("--strategy extremes --rewards localdata/nothing.json", "no such file"),
    "samples": ("--strategy extremes --rewards localdata/tiny/labels.json", "holds questions with labels; it should"),
    "name taken": (f"--strategy extremes --rewards {REWARDS} --register tiny_sft", "built-in name"),
}


@pytest.mark.parametrize(("flags", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_refused(world, flags, message):
    """One message that says what is wrong, exit code 2, nothing written."""
    error = world.refused(f"make_pairs.py {flags} --output outputs/x.json")
    assert message in error and error.count("error: ") <= 1


STRATEGY = '''\
"""The longest response against the shortest, and how sure we are of it."""

from dataclasses import dataclass

from cream.cli.flags import flag
from cream.pairs.choice import Choice
from cream.pairs.inputs import REWARDS

INPUTS = {"rewards": REWARDS}


@dataclass
class Options:
    """--strategy longest"""

    sureness: float = flag(0.5, "confidence of every pair", low=0, high=1)


def choose(record, usable, item, options):
    by_length = sorted(usable, key=lambda i: len(record.responses()[i]))
    return [Choice(by_length[-1], by_length[0], options.sureness)] if len(usable) > 2 else "too few"
'''


def test_a_default_that_is_spelled_out_is_the_same_output(world):
    flags = f"--strategy extremes --rewards {REWARDS} --previous {PREVIOUS}"
    make(world, flags, "spelled.json")
    assert "is up to date" in make(world, f"{flags} --rank kendall", "spelled.json")[0]


def test_a_strategy_is_one_file_and_one_line(world):
    """A new one is on the command line with its own flags, and changes nothing of what the others have made."""
    make(world, f"--strategy extremes --rewards {REWARDS}", "before.json")
    package = world.folder / "cream/pairs/__init__.py"
    before = package.read_text()
    (world.folder / "cream/pairs/longest.py").write_text(STRATEGY)
    package.write_text(f'{before}from cream.pairs import longest; PAIRS["longest"] = longest\n')
    try:
        assert "--sureness" in world.run("make_pairs.py --help").out
        records = [rewards(i) for i in range(3)] + [record("few", [1.0, 2.0])]
        put(world, "localdata/p/few.json", records)
        out, pairs, about = make(world, "--strategy longest --rewards localdata/p/few.json --sureness 0.8", "l.json")
        assert [(p.selected_index, p.rejected_index, p.consistency) for p in pairs] == [(0, 1, 0.8)] * 3
        assert all(len(p.selected[-1].content) > len(p.rejected[-1].content) for p in pairs)
        assert about["counts"]["dropped"] == {"too few": 1} and about["settings"]["sureness"] == 0.8
        assert about["method"] == "consistency_dyn" and "no pair from 1 prompt: too few" in out
        error = world.refused(
            f"make_pairs.py --strategy random --rewards {REWARDS} --sureness 1 --output outputs/x.json"
        )
        assert "--sureness belongs to --strategy longest" in error
        changed = world.state()
        make(world, f"--strategy extremes --rewards {REWARDS}", "before.json")
        assert world.state() == changed
    finally:
        package.write_text(before)
        (world.folder / "cream/pairs/longest.py").unlink()


@pytest.mark.slow
def test_training_takes_several_pairs_of_a_prompt_with_their_confidences(world):
    make(world, f"--strategy threshold --rewards {REWARDS} --threshold 0.55", "several.json")
    done = world.run(
        "train.py --device cpu --model tiny --train_stage dpo --name outputs/several.json --output_dir outputs/run"
    )
    count = world.read("outputs/several.json.meta.json")["counts"]["out"]
    assert count > COUNT and f"{count} pairs, method consistency_dyn" in done.out
