"""infer.py as a command: what sampling takes from a file of prompts, in any form; what an evaluation's summary says."""

import json

import pytest
from layouts import lines

from cream.files.store import read
from cream.records import Samples

COMMAND = "infer.py --device cpu --model tiny --mode sampling --gen_n 2 --gen_max_tokens 8 --max_length 60 --name "
LONG = 3  # the prompt that does not fit


@pytest.fixture(scope="module")
def world(workspace):
    prompts = list(workspace.read("localdata/tiny/prompt.1.json").values())[:8]
    prompts[LONG][0]["content"] *= 20
    records = [{"uuid": f"q{i}", "messages": messages, "topic": i} for i, messages in enumerate(prompts)]
    workspace.write("localdata/asked.json", {record["uuid"]: record for record in records})
    (workspace.folder / "localdata/asked.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return workspace


@pytest.mark.parametrize("limit", [None, 5])
def test_samples_follow_the_prompts(world, limit):
    """One record for each that fits, in their order, with what else their records hold; the same from either form."""
    found = {}
    for form in ("json", "jsonl"):
        output = f"outputs/{form}-{limit}.{form}"
        flags = f"localdata/asked.{form} --output_dir {output}" + (f" --limit_size {limit}" if limit else "")
        done = world.run(COMMAND + flags)
        kept, asked = (limit or 8) - 1, limit or 8
        assert f"{kept} prompts, {2 * kept} responses" in done.out
        assert f"  1 of {asked} prompts dropped: prompt longer than 60 tokens" in done.out
        assert world.read(output + ".meta.json")["counts"]["out"] == kept
        found[form] = list(read(world.folder / output, Samples))
    assert [r.uuid for r in found["json"]] == [f"q{i}" for i in range(limit or 8) if i != LONG]
    assert [r.extra for r in found["json"]] == [{"topic": i} for i in range(limit or 8) if i != LONG]
    assert found["json"] == found["jsonl"]


def test_parts_of_a_file(world):
    """The last one is short, and after it comes the first again."""
    for part, wanted in ((2, ["q4", "q5"]), (3, ["q6", "q7"]), (4, ["q0", "q1", "q2"])):
        world.run(ASKED + f" --part {part} --output_dir outputs/part-{part}.jsonl")
        found = read(world.folder / f"outputs/part-{part}.jsonl", Samples)
        assert [r.uuid for r in found] == wanted
    error = world.refused(COMMAND + "localdata/asked.jsonl --part 2")
    assert "--part is for --mode sampling, with --limit_size" in error


ASKED = COMMAND + "localdata/asked.jsonl --limit_size 3"


def test_flags_that_are_off_decide_nothing(world):
    """So outputs of versions without them are up to date; those that are on are part of the output, and in its name."""
    world.run(ASKED + " --output_dir outputs/off.json")
    kept = world.read("outputs/off.json.meta.json")["settings"]
    assert not {"top_k", "min_p", "repetition_penalty", "stop"} & kept.keys() and "top_p" in kept
    off = " --output_dir outputs/off.json --top_k 0 --min_p 0 --repetition_penalty 1 --stop none"
    assert "is up to date" in world.run(ASKED + off).out
    error = world.refused(ASKED + " --output_dir outputs/off.json --top_k 5 --stop ###")
    assert "its settings or inputs differ: stop: None -> ###, top_k: None -> 5" in error
    named = world.run(ASKED + " --top_k 5 --repetition_penalty 1.2 --dry_run").out
    assert "_temp-0.8_top_k-5_repetition_penalty-1.2_GenMaxT-8" in named


def test_stop_strings_are_kept_in_samples(world):
    """One that is in nearly every response."""
    done = world.run(ASKED + r" --stop ':,\n' --output_dir outputs/stopped.json")
    assert "a response stops at <end> or ':' or '\\n'" in done.out
    samples = list(read(world.folder / "outputs/stopped.json", Samples))
    ended = [(text, reason) for s in samples for text, reason in zip(s.responses, s.finish_reason, strict=True)]
    assert all((":" in text or "\n" in text) == (reason == "stop_string") for text, reason in ended)
    count = sum(reason == "stop_string" for _, reason in ended)
    assert count and f"{count} of 6 responses ended with a stop string; no end of turn is scored" in done.out


def test_a_bad_record_is_found_before_anything_is_spent(world):
    """Also one that comes after the limit."""
    lines = (world.folder / "localdata/asked.jsonl").read_text().splitlines()
    (world.folder / "localdata/doubled.jsonl").write_text("\n".join([*lines, lines[6]]))
    error = world.refused(COMMAND + "localdata/doubled.jsonl --limit_size 2 --output_dir outputs/doubled.jsonl")
    assert "uuid 'q6' occurs twice" in error


def test_prompts_of_which_none_fits_are_refused(world):
    flags = "localdata/asked.jsonl --output_dir outputs/none.json --max_length 4"
    done = world.run((COMMAND + flags).replace("--max_length 60 ", ""), code=2)
    assert "no prompt is left to respond to (dropped: {'prompt longer than 4 tokens': 8})" in done.err


@pytest.mark.parametrize("count, flags", [(1, ""), (2, " --limit_size 1")])
def test_prompts_of_which_all_are_bad_are_refused(world, count, flags):
    rows = [{"uuid": f"q{i}", "messages": [{"role": "user", "content": "x" * i}]} for i in range(count)]
    (world.folder / "localdata/blank.jsonl").write_bytes(lines(rows))
    error = world.refused(f"{COMMAND}localdata/blank.jsonl --output_dir outputs/b.json --on_bad_record skip{flags}")
    assert "no prompt is left to respond to; the first: localdata/blank.jsonl, line 1: record 'q0': a user's" in error


EVALUATION = (
    "infer.py --device cpu --model tiny --mode evaluation --name tiny_test --limit_size 4 --gen_max_tokens 8 "
    "--output_dir outputs/x.json"
)


def test_a_summary_replaces_nothing_else(world):
    """Neither a file of the user's own, nor the answers of another evaluation, though that be called a summary."""
    world.write("outputs/own/results.summary.json", {"mine": 1})
    refused = world.refused(EVALUATION.replace("x.json", "own/results.json"))
    assert "results.summary.json exists" in refused and "or --overwrite" in refused
    world.run(EVALUATION.replace("x.json", "y.summary.json"))
    assert "y.summary.json is an output of its own" in world.refused(EVALUATION.replace("x.json", "y.json --overwrite"))


def test_what_applies_to_one_greedy_response(world):
    command = EVALUATION.replace("x.json", "greedy.json")
    world.run(command)
    done = world.run(command + " --top_k 5 --min_p 0.1")
    assert "greedy: --top_k, --min_p without effect\n" in done.out and "is up to date" in done.out
    assert "repetition_penalty: None -> 1.2" in world.refused(command + " --repetition_penalty 1.2")
    world.run(command.replace("greedy.json", "ended.json") + " --stop =")
    records = world.read("outputs/ended.json").values()
    assert "stop_string" in {r["finish_reason"] for r in records}
    assert not any("=" in r["responses"] for r in records)


@pytest.mark.slow
@pytest.mark.parametrize("left", ["[]", "{", '{"tasks": 7}', "of another model", None])
def test_the_summary_is_always_of_the_answers_that_stand(world, left):
    """Whatever a kill, between the answers and it, has left there; where it is right it is not touched."""
    world.run(EVALUATION)
    path = world.folder / "outputs/x.summary.json"
    right = path.read_text()
    if left == "of another model":
        left = right.replace('"correct": ', '"correct": 1')
    assert left != right
    path.unlink() if left is None else path.write_text(left)
    assert "is up to date (same settings and inputs)" in world.run(EVALUATION).out
    assert path.read_text() == right
    before = world.state()
    world.run(EVALUATION)
    assert world.state() == before
