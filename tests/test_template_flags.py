"""Command lines with chat templates: named ones, and those that refuse a record."""

import json
import shutil

import pytest
from workspace import M1, ON

from cream.errors import UserError
from cream.files.fingerprints import fingerprint_folder
from cream.model.load import load_chat, load_tokenizer

pytestmark = pytest.mark.slow
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
STRICT += "{% if 'magic' in messages[0].content %}{{ raise_exception('No magic') }}{% endif %}"
REFUSED = "the chat template refuses a conversation: System role not supported"


def turns(*texts, role="user"):
    """A conversation; a leading system message has `role` system."""
    roles = (["system"] if role == "system" else []) + ["user", "assistant"] * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


@pytest.fixture(scope="module")
def world(looped):
    looped.write(
        "localdata/p.json",
        {
            "p1": turns("2 + 3?"),
            "p2": turns("<end>4?"),
            "p3": turns("Be brief.", "5?", role="system"),
            "p4": turns("6?"),
        },
    )
    looped.write(
        "localdata/sft.json",
        {"s1": turns("2 + 3?", "5"), "s2": turns("Be brief.", "4?", "4", role="system"), "s3": turns("magic?", "No.")},
    )
    template = (looped.folder / "assets/tiny_m0/chat_template.jinja").read_text()
    (looped.folder / "strict.jinja").write_text(STRICT + template)
    folder = looped.folder / "assets/named"
    shutil.copytree(looped.folder / "assets/tiny_m0", folder)
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    named = {"default": template, "brief": "<pad>" + template}
    config["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return looped


SAMPLING = f"infer.py {ON} --chat_template strict.jinja --name localdata/p.json --gen_n 2 --gen_max_tokens 8"
SFT = f"train.py {ON} --chat_template strict.jinja --name localdata/sft.json --train_bsz 2 --output_dir outputs/strict"


def test_a_refused_record_is_named_and_nothing_is_written(world):
    refused = world.refused(f"{SAMPLING} --output_dir outputs/s.json")
    assert f"localdata/p.json: record 'p3': strict.jinja: {REFUSED}. To skip such records" in refused
    assert "localdata/sft.json: record 's2'" in (refused := world.refused(SFT))
    assert "; 1 more are refused" in refused and not (world.folder / "outputs/strict").exists()
    done = world.run(f"prepare_data.py validate localdata/p.json {ON[13:]} --chat_template strict.jinja", code=2)
    assert "3 prompts" not in done.out and f"bad: localdata/p.json: record 'p3': strict.jinja: {REFUSED}" in done.out
    assert "1 prompts with a mark of the chat template in their text (the first: record 'p2', '<end>')" in done.out


def test_refused_records_are_skipped_as_malformed_ones_are(world):
    world.run(f"{SAMPLING} --on_bad_record skip --output_dir outputs/s.json")
    assert world.read("outputs/s.json").keys() == {"p1", "p2", "p4"}
    rejected = json.loads((world.folder / "outputs/s.json.rejected.jsonl").read_text())
    assert rejected["uuid"] == "p3" and REFUSED in rejected["reason"]
    world.run(f"{SFT} --on_bad_record skip")
    meta = world.read("outputs/strict/meta.json")
    assert meta["counts"]["trained_on"] == 1 and meta["counts"]["dropped"] == {"malformed record": 2}
    lines = (world.folder / "outputs/strict/rejected.jsonl").read_text().splitlines()
    assert ["No magic" in line for line in lines] == [False, True]


def test_rewarding_names_the_record_too(world):
    prompt = turns("Be brief.", "5?", role="system")
    world.write(
        "localdata/s.json",
        {"p3": {"prompt": prompt, "responses": ["5", "6"]}, "p4": {"prompt": turns("6?"), "responses": ["6"]}},
    )
    rewarding = f"rewarding.py {ON} --chat_template strict.jinja --input_file localdata/s.json --reward likelihood"
    command = f"{rewarding} --checkpoint none --output outputs/r.json"
    assert "localdata/s.json: record 'p3': strict.jinja" in world.refused(command)
    assert f"2 have no reward: strict.jinja: {REFUSED}" in world.run(f"{command} --on_bad_record skip").out


def test_an_evaluation_names_the_question(world):
    world.write("localdata/quiz.json", [{"uuid": "q7", "question": "A magic number?", "label": 7}])
    refused = world.refused(f"infer.py {ON} --mode evaluation --chat_template strict.jinja --name localdata/quiz.json")
    assert "record 'q7': strict.jinja: the chat template refuses a conversation: No magic" in refused


def test_named_templates(world):
    """The default, or the one that the flag names; a checkpoint has the chosen one as its default, and the others."""
    on = "--device cpu --model assets/named"
    evaluation = f"infer.py {on} --mode evaluation --name tiny_test --limit_size 2 --gen_max_tokens 4"
    for flag, begins in (("", "<bos><user>"), (" --chat_template brief", "<pad><bos><user>")):
        world.run(f"{evaluation}{flag} --output_dir outputs/named{len(flag)}.json")
        assert world.read(f"outputs/named{len(flag)}.summary.json")["first_prompt"].startswith(begins)
    refused = world.refused(f"{evaluation} --chat_template brif --output_dir outputs/x.json")
    assert "--chat_template brif: no such file, and none of this model's templates: default, brief" in refused
    assert "chat_template" in world.refused(f"{evaluation} --output_dir outputs/named22.json")
    world.run(f"train.py {on} --chat_template brief --name localdata/sft.json --output_dir outputs/named")
    folder = world.folder / "outputs/named/checkpoint-last"
    named = load_tokenizer(folder).chat_template
    assert set(named) == {"default", "brief"} and named["default"] == named["brief"] == load_chat(folder).template
    before, other = fingerprint_folder(folder), folder / "additional_chat_templates/brief.jinja"
    other.write_text(other.read_text() + " ")
    assert fingerprint_folder(folder) != before
    only = load_tokenizer(world.folder / "assets/named")
    only.chat_template = {"brief": named["brief"]}
    only.save_pretrained(world.folder / "assets/only")
    with pytest.raises(UserError, match="several chat templates and no default; choose one: --chat_template brief"):
        load_chat(world.folder / "assets/only")


def test_outputs_of_an_earlier_version_that_rewrote_responses_are_not_up_to_date(world):
    """But those under a template that writes a response as it was sampled are."""
    template = (world.folder / "assets/tiny_m0/chat_template.jinja").read_text()
    trim = template.replace("+ message.content +", "+ message.content | trim +")
    assert trim != template
    (world.folder / "trim.jinja").write_text(trim)
    for name, flag in (("plain", ""), ("trim", " --chat_template trim.jinja")):
        command = f"rewarding.py {ON}{flag} --input_file outputs/loop/samples.jsonl --reward likelihood --limit_size 2"
        new = f"{command} --checkpoint outputs/loop/m1/checkpoint-last --output outputs/new.{name}.json"
        command += f" --checkpoint none --output outputs/{name}.json"
        world.run(command)
        assert "up to date" in world.run(command).out
        path = world.folder / f"outputs/{name}.json.meta.json"
        meta = json.loads(path.read_text())
        assert meta["scored"].pop("text") == "as sampled"
        path.write_text(json.dumps(meta))
        world.run(new)
        pairs = (
            f"cal_consistency.py --file1 outputs/new.{name}.json --file2 outputs/{name}.json --output outputs/p.json"
        )
        if flag:
            assert f"an earlier version scored outputs/{name}.json as the chat template" in world.refused(pairs)
            assert "an earlier version scored responses as the chat template rewrites them" in world.refused(command)
        else:
            world.run(pairs)
            assert "up to date" in world.run(command).out
        command = f"train.py {ON} {M1}{flag} --name outputs/loop/pairs.json --limit_size 4 --train_bsz 4"
        command += f" --allow_reversed --output_dir outputs/{name}"
        world.run(command)
        for left in ("meta.json", "args.json"):  # a finished run, and an interrupted one
            about = world.read(f"outputs/{name}/{left}")
            assert about.pop("text") == "as sampled"
            world.write(f"outputs/{name}/{left}", about)
            if flag:
                assert "an earlier version trained on responses as the chat template" in world.refused(command)
            else:
                assert "up to date" in world.run(command).out
            if left == "meta.json" and flag:
                (world.folder / f"outputs/{name}/{left}").unlink()
    command = f"train.py {ON} --name tiny_sft --limit_size 4 --train_bsz 4 --output_dir outputs/old"
    world.run(command)
    meta = world.read("outputs/old/meta.json")
    meta["counts"]["dropped"]["the template or tokenizer merges the prompt's last token with the response"] = 3
    world.write("outputs/old/meta.json", meta)
    assert "an earlier version dropped 3 records that are trained on now" in world.refused(command)
