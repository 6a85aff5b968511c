"""prepare_data.py's command lines: public sources from local copies and from a mirror of the hub's data sets, tables of
users, exports that trl trains on, and what is refused."""

import gzip
import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
from layouts import lines, records, slices

from cream.files import store
from cream.files.fingerprints import fingerprint_file
from cream.records import Conversation, Item, Pair, Prompt, Samples

TASKS = ("arc-easy", "arc-challenge", "openbookqa", "siqa", "gsm8k")
ROWS = {"oasst1": 726, "arc_easy": 2251, "arc_challenge": 1119, "openbookqa": 4957, "gsm8k": 7473}  # of train splits
TESTS = {"arc-easy": 592, "arc-challenge": 302, "openbookqa": 123, "siqa": 500, "gsm8k": 320}


def digests(folder: Path) -> dict[str, str]:
    """Hashes of all record files below a folder."""
    found = (path for path in folder.rglob("*.json") if not path.name.endswith("meta.json"))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(found)}


# Public sources -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(workspace, shared):
    """What `build all` made of the shared slices, in the workspace's localdata/; and what it printed."""
    done = workspace.run(f"prepare_data.py build all --from {shared / 'data'}")
    return workspace.folder / "localdata", done.out


@pytest.mark.slow
def test_all_sources_in_one_command(built, workspace, shared):
    folder, out = built
    assert "siqa, train: not in" in out and "15825 records" in out
    for task, count in TESTS.items():
        items = workspace.read(f"localdata/{task}/test.json")
        assert items == json.loads((shared / f"data/eval_cream_layout/{task}/test.json").read_text())
        assert len(items) == count
    tests = list(store.read(folder / "all_test.json", Item))
    assert len(tests) == sum(TESTS.values()) and {item.task.replace("_", "-") for item in tests} == {*TASKS}
    for task in TASKS[:3] + TASKS[4:]:
        meta = workspace.read(f"localdata/{task}/train.json.meta.json")
        train = list(store.read(folder / task / "train.json", Item))
        assert len(train) + sum(meta["counts"]["dropped"].values()) == ROWS[task.replace("-", "_")]
        assert all(("solution" in item.extra) == (task == "gsm8k") for item in train)
    assert len(list(store.read(folder / "oasst1.sft.json", Conversation))) == 62
    assert "<<" not in (folder / "gsm8k/train.json").read_text()


@pytest.mark.slow
def test_the_prompts_are_questions_as_tested_in_disjoint_balanced_subsets(built, workspace):
    folder, _ = built
    whole, *parts = (
        {p.uuid: p for p in store.read(folder / f"prompt{n}.json", Prompt)} for n in ("", ".1", ".2", ".3")
    )
    assert whole == {uuid: prompt for part in parts for uuid, prompt in part.items()}
    assert sum(map(len, parts)) == len(whole) == 15825
    meta = workspace.read("localdata/prompt.json.meta.json")
    for task, counts in meta["tasks"].items():
        assert sum(counts.values()) == (63 if task == "oasst1" else ROWS[task])  # kept, and skipped for each reason
        sizes = [workspace.read(f"localdata/prompt.{n}.json.meta.json")["tasks"][task]["kept"] for n in (1, 2, 3)]
        assert sum(sizes) == counts["kept"] and max(sizes) - min(sizes) <= 1
    questions = {item.uuid: item.question for task in TASKS if (folder / task / "train.json").exists()
                 for item in store.read(folder / task / "train.json", Item)}  # fmt: skip
    tested = {item.question for item in store.read(folder / "all_test.json", Item)}
    for uuid, prompt in whole.items():
        assert prompt.messages[-1].content not in tested
        assert uuid not in questions or prompt.messages[-1].content == questions[uuid]


@pytest.mark.slow
def test_a_second_run_stands_and_another_process_gives_the_same_bytes(workspace, shared, tmp_path):
    command = f"prepare_data.py build all --from {slices(shared, tmp_path, 150, 60)} --output_dir outputs"
    workspace.run(f"{command}/first")
    before = workspace.state()
    assert workspace.run(f"{command}/first").out.count("(up to date; skipping)") == 16
    assert workspace.state() == before
    workspace.spawn(f"{command}/second")  # with another seed of Python's hashes
    first, second = (digests(workspace.folder / "outputs" / name) for name in ("first", "second"))
    assert first == second and len(first) == 16
    told = workspace.refused(f"{command}/first --seed 1")
    assert "seed: 0 -> 1" in told and "--overwrite" in told
    assert "would overlap with the new 2" in workspace.refused(f"{command}/first --subsets 2 --overwrite")


CARDS = {  # hub id -> configurations -> our splits; the hub's names of its splits
    "OpenAssistant/oasst1": {None: {"train": "train"}},
    "allenai/ai2_arc": {"ARC-Easy": {"train": "train", "test": "test"}, "ARC-Challenge": {"test": "test"}},
    "openai/gsm8k": {"main": {"train": "train", "test": "test"}},
    "lighteval/siqa": {None: {"test": "validation"}},
}
SLICES = {
    ("OpenAssistant/oasst1", None, "train"): "sft/oasst_en100_messages.jsonl",
    ("allenai/ai2_arc", "ARC-Easy", "train"): "train/arc_easy_train.jsonl",
    ("allenai/ai2_arc", "ARC-Easy", "test"): "eval/arc_easy_test.jsonl",
    ("allenai/ai2_arc", "ARC-Challenge", "test"): "eval/arc_challenge_test.jsonl",
    ("openai/gsm8k", "main", "train"): "train/gsm8k_train.jsonl",
    ("openai/gsm8k", "main", "test"): "eval/gsm8k_test.jsonl",
    ("lighteval/siqa", None, "test"): "eval/siqa_test.jsonl",
}
OURS = {"openai/gsm8k": ("id",), "lighteval/siqa": ("id",)}  # columns that the hub's data sets do not have


@pytest.fixture(scope="module")
def mirror(tmp_path_factory, shared) -> Path:
    """A folder laid out as the hub's data sets are: a card that declares configurations, a parquet file a split."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = tmp_path_factory.mktemp("mirror")
    for hub, subsets in CARDS.items():
        card = ["---", "configs:"]
        for subset, splits in subsets.items():
            card += [f"- config_name: {subset or 'default'}", "  data_files:"]
            for ours, split in splits.items():
                path = f"{subset or 'data'}/{split}-00000-of-00001.parquet"
                card += [f"  - split: {split}", f"    path: {path}"]
                with open(shared / "data" / SLICES[hub, subset, ours]) as file:
                    rows = [json.loads(line) for line, _ in zip(file, range(400), strict=False)]
                kept = [{k: v for k, v in row.items() if k not in OURS.get(hub, ())} for row in rows]
                (root / hub / path).parent.mkdir(parents=True, exist_ok=True)
                pq.write_table(pa.Table.from_pylist(kept), root / hub / path)
        (root / hub / "README.md").write_text("\n".join([*card, "---", "# a copy"]))
    return root


@pytest.mark.slow
def test_a_mirror_of_the_hub_is_read_as_the_hub_is(mirror, workspace, shared, monkeypatch):
    command = "prepare_data.py build arc_easy arc_challenge siqa gsm8k oasst1 --output_dir outputs/mirrored"
    out = workspace.run(f"{command} --from {mirror}").out
    assert f"arc_easy, train: 400 rows of {mirror}/allenai/ai2_arc (ARC-Easy, train)" in out
    assert f"siqa, test: 400 rows of {mirror}/lighteval/siqa (validation)" in out
    assert f"arc_challenge, train: not in {mirror}, skipped" in out
    for task in ("arc-easy", "arc-challenge"):
        expected = json.loads((shared / f"data/eval_cream_layout/{task}/test.json").read_text())[:400]
        assert workspace.read(f"outputs/mirrored/{task}/test.json") == expected
    for task, prefix in (("siqa", "siqa-validation"), ("gsm8k", "gsm8k-test")):
        expected = json.loads((shared / f"data/eval_cream_layout/{task}/test.json").read_text())[:400]
        made = workspace.read(f"outputs/mirrored/{task}/test.json")
        assert [item["uuid"] for item in made] == [f"{prefix}-{i:04d}" for i in range(len(expected))]
        assert [(i["question"], i["label"]) for i in made] == [(i["question"], i["label"]) for i in expected]
    assert "(up to date; skipping)" in workspace.run(f"{command} --from {mirror}").out


@pytest.mark.slow
def test_without_a_network_the_hub_is_one_clear_message(workspace):
    told = workspace.refused("prepare_data.py build gsm8k")
    assert "openai/gsm8k (main, train): not in the cache, and the hub cannot be reached" in told
    assert "HF_HUB_OFFLINE" in told and len(told.splitlines()) == 1


def test_whole_threads_and_fewer_prompts_when_asked(workspace, shared):
    command = f"prepare_data.py build oasst1 --from {shared / 'data'} --output_dir outputs/threads"
    assert "no message of these rows has a `quality` label" in workspace.refused(f"{command} --selection quality")
    out = workspace.run(f"{command} --multi_turn --task_limit 10 --subsets 4 --sft_limit 40").out
    assert "53 skipped: more than --task_limit of its task" in out and "22 skipped: more than --sft_limit" in out
    threads = list(store.read(workspace.folder / "outputs/threads/oasst1.sft.json", Conversation))
    assert max(len(thread.messages) for thread in threads) > 2 and len(threads) == 40
    assert len(list(store.read(workspace.folder / "outputs/threads/oasst1.ranked.json", Samples))) == 133
    sizes = [len(workspace.read(f"outputs/threads/prompt.{n}.json")) for n in (1, 2, 3, 4)]
    assert sorted(sizes) == [2, 2, 3, 3]


def test_a_bad_row_is_named_or_left_out(workspace, tmp_path):
    rows = [{"question": f"{i} + 2?", "answer": f"#### {i + 2}"} for i in range(4)]
    rows[1]["answer"] = None
    (tmp_path / "gsm8k_test.jsonl").write_bytes(lines(rows))
    command = f"prepare_data.py build gsm8k --from {tmp_path} --output_dir outputs/bad"
    told = workspace.refused(command)
    assert "gsm8k_test.jsonl, row 1 (gsm8k-test-0001): it lacks question and answer" in told
    workspace.run(f"{command} --on_bad_record skip")
    assert [item["label"] for item in workspace.read("outputs/bad/gsm8k/test.json")] == ["2", "4", "5"]
    (row,) = store.read_rows(workspace.folder / "outputs/bad/gsm8k/test.json.rejected.jsonl")
    assert row["where"] == "row 1" and json.loads(row["record"]) == rows[1]


def test_sources_that_leave_a_standing_file_are_named(workspace, tmp_path):
    sums = [{"question": f"{i} + 2?", "answer": f"#### {i + 2}"} for i in range(4)]
    arc = [{"id": "a1", "question": "Ice?", "choices": {"text": ["u", "v"], "label": ["A", "B"]}, "answerKey": "A"}]
    for name, rows in {"gsm8k_test": sums, "gsm8k_train": sums, "arc_easy_test": arc}.items():
        (tmp_path / f"{name}.jsonl").write_bytes(lines(rows))
    command = f"--from {tmp_path} --output_dir outputs/fewer"
    workspace.run(f"prepare_data.py build gsm8k arc_easy {command}")
    told = workspace.refused(f"prepare_data.py build gsm8k {command}")
    assert "Give another --output_dir, or --overwrite" in told and "say " not in told
    done = workspace.run(f"prepare_data.py build gsm8k {command} --overwrite")
    assert re.search(
        r"all_test.json: 4 records\n.*replaces a file that also has records of arc_easy", done.out + done.err
    )
    again = workspace.run(f"prepare_data.py build gsm8k {command} --overwrite")
    assert "is replaced" not in again.out + again.err


@pytest.mark.parametrize(
    "command, told",
    [
        ("", "expected a command"),
        ("build", "expected a command"),
        ("prepare all", "expected a command"),
        ("build gsm", "did you mean gsm8k"),
        ("build all --from nowhere", "no such folder"),
        ("build all --from configs", "found none of all"),
        ("import nothing.jsonl", "no such file or folder"),
        ("import README.md", "expected a file that ends in"),
        ("export localdata/tiny/sft.json", "--form is missing"),
        ("export localdata/tiny/sft.json --form trl --output x.json", "ends in .jsonl"),
        ("export localdata/tiny/test.json --form trl", "not questions with labels"),
        ("export nothing.json --form trl", "no such file"),
        ("overlap localdata/tiny/sft.json", "overlap FILE FILE"),
        ("overlap localdata/tiny/sft.json nothing.json", "no such file"),
        (
            "build all --columns prompt=q --split test",
            "build does not use --columns, --split; it takes --seed",
        ),
        ("import x.jsonl --form trl --subsets 4", "import does not use --subsets, --form"),
        ("export x.json --form trl --columns prompt=q", "export does not use --columns"),
        ("validate x.json --overwrite", "validate does not use --overwrite"),
        ("list --seed 1", "list does not use --seed"),
        ("build all --list", "build does not use --list"),
        ("import localdata/tiny/sft.json --split test", "this is one file"),
        ("import localdata/tiny/sft.json", "a file of this project already"),
    ],
)
def test_what_is_refused(workspace, command, told):
    shutil.copy(Path(__file__).parent.parent / "README.md", workspace.folder)
    assert told in workspace.refused(f"prepare_data.py {command}")


def test_an_export_of_nothing_is_refused(workspace):
    workspace.write("localdata/blank.json", {"a": [{"role": "user", "content": " "}]})
    told = workspace.refused("prepare_data.py export localdata/blank.json --form trl --on_bad_record skip")
    assert "no record is left to export; the first: localdata/blank.json: record 'a': a user's turn is empty" in told


def test_validate_tells_of_each_file(workspace):
    """Also of those that cannot be read, and of questions that could not be graded."""
    (workspace.folder / "localdata/loop.jsonl").symlink_to("loop.jsonl")
    item = {"uuid": "p", "question": "q?\nA. a\nB. b", "task": "arc_easy"}
    workspace.write("localdata/items.json", [item | {"label": "B"}, item | {"uuid": "z", "label": "Z"}])
    files = "localdata/loop.jsonl localdata/" + "x" * 300 + ".json localdata/items.json localdata/tiny/sft.json"
    done = workspace.run(f"prepare_data.py validate {files}", code=2)
    (workspace.folder / "localdata/loop.jsonl").unlink()
    assert "loop.jsonl: Too many levels of symbolic links" in done.out and "xxx.json: File name too long" in done.out
    assert (
        "items.json: 1 question with labels, 0 responses, 1 bad" in done.out
        and "label 'Z' is none of its options" in done.out
    )
    assert "sft.json: " in done.out and "3 of 4 files cannot be read or have bad records" in done.err


def test_the_sources_are_listed(workspace):
    out = workspace.run("prepare_data.py list").out
    assert out == workspace.run("prepare_data.py --list").out
    assert "train 33410, test 1954 rows" in out and "CC BY-SA 4.0" in out and "openai/gsm8k" in out


# Tables of users ------------------------------------------------------------------------------------------------------


TABLE = [
    {"instruction": f"Say {i}.", "response": f"{i}!", "better": f"{i}!", "worse": "no", "score": i / 2}
    for i in range(5)
]


def put(path: Path, rows: list[dict]) -> Path:
    """A table in the form that a suffix names."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    elif path.suffix == ".csv":
        pyarrow.csv.write_csv(table, path)
    else:
        path.write_bytes(lines(rows) if path.suffix == ".jsonl" else json.dumps(rows).encode())
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet", ".csv"])
def test_one_table_in_every_form_gives_the_same_pairs(workspace, tmp_path, suffix):
    path = put(tmp_path / f"mine{suffix}", TABLE)
    target = f"outputs/imported{suffix[1:]}.json"
    columns = "prompt=instruction,chosen=better,rejected=worse"
    out = workspace.run(f"prepare_data.py import {path} --columns {columns} --output {target}").out
    assert "5 preference pairs\n" in out
    pairs = list(store.read(workspace.folder / target, Pair))
    assert [(p.uuid, p.prompt[0].content, p.selected[1].content) for p in pairs] == [
        (f"mine-{i:06d}", f"Say {i}.", f"{i}!") for i in range(5)
    ]
    assert pairs[3].extra == {"response": "3!", "score": "1.5" if suffix == ".csv" else 1.5}
    assert "is up to date" in workspace.run(f"prepare_data.py import {path} --columns {columns} --output {target}").out


def test_a_folder_laid_out_as_the_hubs_is_imported(workspace, tmp_path):
    (tmp_path / "data").mkdir()
    put(tmp_path / "data/test-00000-of-00001.parquet", TABLE)
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: test\n    path: data/test-*.parquet\n---\n"
    )
    out = workspace.run(
        f"prepare_data.py import {tmp_path} --subset main --split test --columns copy=score "
        "--output outputs/folder.json"
    ).out
    assert "5 conversations" in out
    assert f"{tmp_path} (main, test): its files are data/test-00000-of-00001.parquet\n" in out
    assert workspace.read("outputs/folder.json.meta.json")["inputs"].keys() == {"table"}
    told = workspace.refused(f"prepare_data.py import {tmp_path} --subset main --output outputs/x.json")
    assert "Unknown split" in told


def test_a_folder_of_csv_files_is_read_as_one_of_them_is(workspace, tmp_path):
    header = "uuid,prompt,chosen,rejected,consistency,margin,source\n"
    rows = ["009,1e5,2023-01-01,NA,0.75,,007\n", "010,q,5,x,,1.5,\n"]  # of which no two files have equal types
    (tmp_path / "shards").mkdir()
    for index, row in enumerate(rows):
        (tmp_path / f"shards/train-{index}.csv").write_text(header + row)
    (tmp_path / "one.csv").write_text(header + "".join(rows))
    for name in ("shards", "one.csv"):
        workspace.run(f"prepare_data.py import {tmp_path / name} --output outputs/{name}.dpo.json")
    made = [list(store.read(workspace.folder / f"outputs/{name}.dpo.json", Pair)) for name in ("shards", "one.csv")]
    assert made[0] == made[1]
    told = [(p.uuid, p.prompt[0].content, p.selected[1].content, p.consistency, p.margin, p.extra) for p in made[0]]
    assert told == [
        ("009", "1e5", "2023-01-01", 0.75, None, {"source": "007"}),
        ("010", "q", "5", None, 1.5, {"source": ""}),
    ]
    (tmp_path / "one.csv").write_text(header + rows[0].replace("0.75", "high"))
    told = workspace.refused(f"prepare_data.py import {tmp_path / 'one.csv'} --output outputs/high.dpo.json")
    assert "row 0: consistency: Expected `float | null`, got `str`, found 'high'; rename the column" in told


def test_bad_rows_of_a_table_are_named_or_left_out(workspace, tmp_path):
    path = put(tmp_path / "chats.jsonl", [{"prompt": "q", "response": "a"}, {"prompt": " ", "response": "a"}])
    told = workspace.refused(f"prepare_data.py import {path}")
    assert "chats.jsonl, row 1: " in told and "a user's turn is empty" in told
    assert "1 skipped: malformed record" in workspace.run(f"prepare_data.py import {path} --on_bad_record skip").out
    assert "on_bad_record: skip -> None" in workspace.refused(f"prepare_data.py import {path}")
    assert len(workspace.read("localdata/chats.sft.json")) == 1
    checked = workspace.run("prepare_data.py validate localdata/chats.sft.json localdata/chats.sft.json.meta.json").out
    assert "1 sidecars skipped" in checked and "1 conversation" in checked
    for name, text in {"x": "{", "deep": f'{{"prompt": {"[" * 100_000}{"]" * 100_000}}}'}.items():
        path = _written(tmp_path / f"{name}.jsonl", text)
        assert f"{path}, line 1: not valid JSON" in workspace.refused(f"prepare_data.py import {path}")
    assert "no rows" in workspace.refused(f"prepare_data.py import {_written(tmp_path / 'y.jsonl', '')}")
    assert "make no record" in workspace.refused(f"prepare_data.py import {put(tmp_path / 'z.csv', [{'a': 1}])}")


@pytest.mark.parametrize(
    "name, text, flags, made",
    [
        ("bare.csv", "q1,true\nq2,1.50\n", "--columns prompt=#1,response=#2", {"q1": "true", "q2": "1.50"}),
        ("semi.csv", "prompt;response\nq;null\n", "--sep ;", {"q": "null"}),
        ("tab.tsv", "prompt\tresponse\nq,r\tNA\n", "", {"q,r": "NA"}),
        ("bare.tsv", "q1\t009\n", "--columns prompt=#1,response=#2", {"q1": "009"}),
        ("pipes.csv.gz", "q1|a\n", "--sep | --columns prompt=#1,response=#2", {"q1": "a"}),
    ],
)
def test_csv_files_without_a_header_or_with_another_separator(workspace, tmp_path, name, text, flags, made):
    data = gzip.compress(text.encode()) if name.endswith(".gz") else text.encode()
    (tmp_path / name).write_bytes(data)
    workspace.run(f"prepare_data.py import {tmp_path / name} {flags} --output outputs/{name}.json")
    found = store.read(workspace.folder / f"outputs/{name}.json", Conversation)
    assert {each.messages[0].content: each.messages[1].content for each in found} == made


def test_what_import_saw_is_in_its_messages(workspace, tmp_path):
    told = workspace.refused(f"prepare_data.py import {_written(tmp_path / 'semi.csv', 'id;prompt')}")
    assert "holds no rows" in told
    (tmp_path / "semi.csv").write_text("id;prompt\n1;q")
    told = workspace.refused(f"prepare_data.py import {tmp_path / 'semi.csv'}")
    assert "It has: id;prompt ('1;q'). If ';' separates its cells: --sep ';'" in told
    shp = {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 0, "upvotes": [1, 2]}
    told = workspace.refused(f"prepare_data.py import {put(tmp_path / 'shp.jsonl', [shp])}")
    assert "labels (0), upvotes (list of 2: 1). These are columns of SHP: --columns prompt=history," in told
    rated = [{"prompt": "q", "response": "a", "helpfulness": 3, "style": 1}]
    out = workspace.run(f"prepare_data.py import {put(tmp_path / 'rated.jsonl', rated)} --output outputs/r.json").out
    assert "prompt=prompt, response=response; only copied: helpfulness, style\n" in out
    assert "columns of HelpSteer, HelpSteer2; for pairs: --columns score=helpfulness" in out
    assert "then: python train.py --train_stage sft --name outputs/r.json" in out
    for flags, told in {"--best 1=1": "name the column with --columns best=", "--sep ;;": "one character"}.items():
        assert told in workspace.refused(f"prepare_data.py import {tmp_path / 'rated.jsonl'} {flags}")


def test_an_output_of_rows_that_are_refused_now_is_not_up_to_date(workspace, tmp_path):
    """As an older version wrote it: without the key that says what is not trained on."""
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = put(tmp_path / "chat.jsonl", [{"messages": chat}] * 2)
    command = f"prepare_data.py import {path} --output outputs/chat.json"
    workspace.run(command)
    put(path, [{"messages": chat}, {"messages": [chat[0], {**chat[1], "weight": 0}]}])
    meta = workspace.read("outputs/chat.json.meta.json")
    meta["inputs"]["table"] = fingerprint_file(path)
    workspace.write("outputs/chat.json.meta.json", meta)
    told = workspace.refused(command)
    assert "row 1: by its 'weight' an assistant's turn is not to be trained on" in told
    command = f"prepare_data.py import {path} --ignore_keys weight --output outputs/chat.ignored.json"
    workspace.run(command)
    assert "is up to date" in workspace.run(command).out


# Own files ------------------------------------------------------------------------------------------------------------


LONG = "Tom has 39 eggs and gets 92 more from the farm next door today, so how many"


def test_files_of_ones_own_are_compared_for_overlap(workspace):
    asked = {"p1": f"{LONG} now?", "p2": "Name a river.", "p3": "Name a hill."}
    prompts = {uuid: [{"role": "user", "content": text}] for uuid, text in asked.items()}
    workspace.write("localdata/own.json", prompts)
    workspace.write("localdata/quiz.json", [{"uuid": "t1", "question": f"Well: {LONG} in all?", "label": "131"}])
    workspace.write("localdata/short.json", [{"uuid": "t2", "question": "name a RIVER", "label": "7"}])
    workspace.write("configs/dataset.json", {"my_quiz": "localdata/quiz.json"})
    out = workspace.run("prepare_data.py overlap localdata/own.json my_quiz localdata/short.json").out
    assert "localdata/own.json: 2 of 3 records share 13 words in a row" in out and "with one of 2 records of" in out
    assert "p1:  83 % of its runs, one with t1 of" in out and "quiz.json: tom has 39 eggs and gets 92 more from" in out
    assert "p2: 100 % of its runs, one with t2 of localdata/short.json: name a river" in out
    command = "prepare_data.py overlap localdata/own.json my_quiz --output outputs/clean.json"
    assert "outputs/clean.json: 2 records" in workspace.run(command).out
    assert workspace.read("outputs/clean.json") == {uuid: prompts[uuid] for uuid in ("p2", "p3")}
    assert "is up to date" in workspace.run(command).out
    assert "they do not overlap" in workspace.run("prepare_data.py overlap localdata/short.json my_quiz").out


def test_validate_and_export_take_names(workspace):
    workspace.write("localdata/own.json", {"u": [{"role": "user", "content": "q"}]})
    workspace.write("configs/dataset.json", {"my_prompts": "localdata/own.json"})
    assert "own.json: 1 prompt" in workspace.run("prepare_data.py validate my_prompts").out
    workspace.run("prepare_data.py export my_prompts --form trl --output outputs/own.jsonl")
    assert len((workspace.folder / "outputs/own.jsonl").read_text().splitlines()) == 1
    told = workspace.refused("prepare_data.py validate my_prompt")
    assert "error: my_prompt: neither a file, nor a built-in dataset" in told and "did you mean my_prompts" in told


def test_pairs_that_prefer_nothing_are_left_out(workspace, tmp_path):
    pairs = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b" if i else "a"} for i in range(3)]
    told = "chosen and rejected are the same response"
    assert f"1 skipped: {told}" in workspace.run(f"prepare_data.py import {put(tmp_path / 'even.jsonl', pairs)}").out
    assert workspace.read("localdata/even.dpo.json.meta.json")["counts"] == {"out": 2, "dropped": {told: 1}}
    assert told in workspace.refused(f"prepare_data.py import {put(tmp_path / 'all.jsonl', pairs[:1])}")


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# Exports --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["trl", "sharegpt", "alpaca"])
@pytest.mark.parametrize("kind", [Conversation, Prompt, Pair])
def test_files_go_out_and_come_back(workspace, kind, form):
    folder = workspace.folder / "outputs"
    name = f"{kind.__name__}-{form}"
    folder.mkdir(exist_ok=True)
    store.write_rows(folder / f"{name}.json", [{**row, "weight": 0.5} for row in records(kind)])
    workspace.run(f"prepare_data.py export outputs/{name}.json --form {form} --output outputs/{name}.rows.jsonl")
    workspace.run(f"prepare_data.py import outputs/{name}.rows.jsonl --output outputs/{name}.back.json")
    first, back = (list(store.read(folder / f"{name}{part}.json", kind)) for part in ("", ".back"))
    assert first == back and len(first) == 6


@pytest.mark.slow
def test_trl_trains_on_exported_pairs(workspace, tiny_folder, tmp_path):
    """One step of trl's own DPOTrainer on what `export --form trl` wrote; consistency is a column."""
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    store.write_rows(workspace.folder / "outputs/pairs.json", records(Pair))
    workspace.run("prepare_data.py export outputs/pairs.json --form trl --output outputs/pairs.jsonl")
    rows = datasets.load_dataset(
        "json",
        data_files=str(workspace.folder / "outputs/pairs.jsonl"),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    assert rows["consistency"] == [0.75] * 6 and rows["tau"] == [0.5] * 6
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(tiny_folder),
        args=DPOConfig(
            str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True, bf16=False
        ),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(tiny_folder),
    )
    assert trainer.train().training_loss == pytest.approx(0.6931, abs=1e-3)
