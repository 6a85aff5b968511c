"""The public sources: OpenAssistant's best replies, and where local copies are found."""

import bz2
import gzip
import json
import lzma
import random
import tracemalloc
import zipfile
from functools import partial
from pathlib import Path

import pytest

from cream.data import SOURCES, oasst, reading, source, sources
from cream.data.reading import Place, find
from cream.errors import UserError
from cream.records import encode

# OpenAssistant --------------------------------------------------------------------------------------------------------


def message(uuid, parent=None, rank=None, **about):
    role = "assistant" if uuid.count(".") % 2 else "prompter"
    row = {"message_id": uuid, "parent_id": parent, "text": f"text of {uuid}", "role": role, "lang": "en", "rank": rank}
    return {
        **row,
        "review_result": True,
        "deleted": False,
        "synthetic": False,
        "tree_state": "ready_for_export",
        **about,
    }


def replies(parent, *ranks, **about):
    return [message(f"{parent}.{i}", parent, rank, **about) for i, rank in enumerate(ranks)]


THREAD = [message("t"), *replies("t", 1, 0), *replies("t.1", None, None, None), *replies("t.1.1", 0, 1)]
THREAD += [*replies("t.1.2", None), *replies("t.1.2.0", None)]


def test_the_best_ranked_reply_and_the_thread_that_goes_on_from_it():
    for rows in (THREAD, THREAD[::-1]):
        found = oasst.read(rows, "")
        assert [m.content for m in found.conversations[0].messages] == ["text of t", "text of t.1"]
        (whole,) = oasst.read(rows, "", multi_turn=True).conversations
        # t.1.0 has no reply; t.1.1 comes before t.1.2
        assert [m.content[8:] for m in whole.messages] == ["t", "t.1", "t.1.1", "t.1.1.0"]
        assert whole.uuid == found.prompts[0].uuid == "t"


@pytest.mark.parametrize(
    "root, answers, dropped, unanswered",
    [
        ({"lang": "de"}, [0], "the prompt is not in English", None),
        ({"deleted": True}, [0], "the prompt is deleted or synthetic", None),
        ({"synthetic": True}, [0], "the prompt is deleted or synthetic", None),
        ({"review_result": None}, [0], "the prompt is refused, or not seen, in review", None),
        ({"tree_state": "aborted_low_grade"}, [0], "the prompt is of a tree that was not finished", None),
        ({}, [], None, "it has no usable reply"),
        ({}, [None, None], None, "none of its usable replies is ranked best"),
        ({}, [1, 2], None, "none of its usable replies is ranked best"),
        ({}, [None], None, None),  # alone
    ],
)
def test_why_a_prompt_is_left_out_or_stays_without_an_answer(root, answers, dropped, unanswered):
    found = oasst.read([message("r", **root), *replies("r", *answers)], "")
    assert dict(found.dropped) == ({dropped: 1} if dropped else {})
    assert dict(found.unanswered) == ({unanswered: 1} if unanswered else {})
    assert len(found.prompts) == (not dropped) and len(found.conversations) == (not dropped and not unanswered)


def test_a_reply_that_was_refused_is_no_answer():
    rows = [message("r"), *replies("r", 0, review_result=False)]
    assert dict(oasst.read(rows, "").unanswered) == {"it has no usable reply": 1}


def labelled(which, prompt, reply, hub=False, text="six words are in this text"):
    """A prompt and its best reply, with quality labels in the form of files or of the hub."""
    labels = [{"quality": {"value": value, "count": 3}} if value is not None else None for value in (prompt, reply)]
    if hub:
        labels = [{"name": ["spam", "quality"], "value": [0.9, value], "count": [3, 3]} for value in (prompt, reply)]
    first = message(which, labels=labels[0]) | {"text": text}
    return [first, *replies(which, 0, labels=labels[1], text="and six words are in this")]


@pytest.mark.parametrize("hub", [False, True])
def test_the_selection_by_quality_takes_the_best_first(hub):
    rows = [*labelled("a", 0.7, 0.7, hub), *labelled("b", 0.9, 0.95, hub), *labelled("c", 0.6, 1.0, hub)]
    rows += [*labelled("d", 1.0, 1.0, hub, text="only five words are here"), *labelled("e", 0.8, None, hub)]
    found = oasst.read(rows, "", selection="quality")
    assert [conversation.uuid for conversation in found.conversations] == ["b", "a"]
    assert found.unanswered == {oasst.LOW: 2, oasst.SHORT: 1} and len(found.prompts) == 5
    with pytest.raises(UserError, match="no message of these rows has a `quality` label"):
        oasst.read(THREAD, "", selection="quality")


MALFORMED = {
    "no role": (message("t.9", "t", role=None), "it has no role"),
    "an assistant's first turn": (message("x", role="assistant"), "its role is not that of a person"),
    "a parent that is a list": (message("t.9", ["t"]), "its parent_id is not a text"),
    "a reply that leads back": (message("t", "t.1.1.0"), "a second message with the id t"),
    "a tree of other things": ({"prompt": {**message("x"), "replies": [None]}}, "no message_id or no text"),
}


@pytest.mark.parametrize(("row", "reason"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_messages_are_rejected(row, reason):
    good, found = oasst.read(THREAD, ""), oasst.read([*THREAD, row], "")
    assert [each["reason"] for each in found.rejected] == [reason]
    assert found.conversations == good.conversations and found.ranked == good.ranked


def test_only_an_assistant_responds():
    rows = [message("t"), message("t.0", "t", 0, role="prompter"), message("t.1", "t", 1)]
    assert oasst.read(rows, "").conversations == []


@pytest.mark.parametrize("labels", ["x", [1], {"quality": 0.9}, {"quality": {"value": "0.9"}}, {"name": ["quality"]}])
def test_odd_labels_are_none(labels):
    assert oasst._quality(message("t", labels=labels)) == 0


def test_ranked_replies_of_every_turn(shared):
    """Every prompt with two ranked replies or more, later turns with those before them, as another reader has it."""
    (first, later) = oasst.read(THREAD, "").ranked
    assert (first.uuid, first.responses, first.extra) == ("t", ["text of t.1", "text of t.0"], {"ranks": [0, 1]})
    assert [m.content for m in later.prompt] == ["text of t", "text of t.1", "text of t.1.1"]
    assert [later.uuid, *later.responses] == ["t.1.1", "text of t.1.1.0", "text of t.1.1.1"]
    rows = map(json.loads, (shared / "data/sft/oasst_en100_messages.jsonl").read_text().splitlines())
    found = {each.uuid: encode(each) for each in oasst.read(rows, "").ranked}
    lines = map(json.loads, (shared / "data/pref/oasst_human_ranked.jsonl").read_text().splitlines())
    names = {"id": "uuid", "prompt": "prompt", "ranked": "responses", "ranks": "ranks"}
    assert found == {row["id"]: {new: row[old] for old, new in names.items()} for row in lines}


def test_messages_without_an_id_are_malformed_rows():
    tree = {"message_tree_id": "r", "tree_state": "ready_for_export", "prompt": message("r", replies=[{"text": "a"}])}
    found = oasst.read([tree, {"text": "b"}], "")
    assert [row["where"] for row in found.rejected] == ["row 0", "row 1"] and len(found.prompts) == 1


def test_flat_messages_and_trees_give_the_same(shared):
    folder = shared / "data/sft"
    flat, nested = (
        [json.loads(line) for line in (folder / f"oasst_en100_{form}.jsonl").read_text().splitlines()]
        for form in ("messages", "trees")
    )
    random.Random(0).shuffle(flat)
    for multi_turn in (False, True):
        by_form = [oasst.read(rows, "", multi_turn=multi_turn) for rows in (flat, nested)]
        first, second = ({c.uuid: c for c in found.conversations} for found in by_form)
        assert first == second and len(first) == 62
        assert {p.uuid for p in by_form[0].prompts} == {p.uuid for p in by_form[1].prompts}


def test_messages_of_a_csv_file_are_the_same(shared, tmp_path):
    import pandas

    lines = (shared / "data/sft/oasst_en100_messages.jsonl").read_text().splitlines()
    flat = [{**json.loads(line), "synthetic": i % 9 == 0} for i, line in enumerate(lines)]
    pandas.DataFrame(flat).to_csv(tmp_path / "m.csv", index=False)  # ranks become 0.0
    read_back = reading.rows(Place(str(tmp_path / "m.csv")), oasst.COLUMNS)
    for multi_turn in (False, True):
        first, second = (oasst.read(each, "", multi_turn=multi_turn) for each in (flat, read_back))
        assert first == second and first.conversations and first.dropped


def test_the_seed_set_is_the_reference_but_for_a_prompt_whose_replies_nobody_ranked(shared):
    folder = shared / "data/sft"
    reference = json.loads((folder / "oasst1.sft.json").read_text())
    rows = [json.loads(line) for line in (folder / "oasst_en100_messages.jsonl").read_text().splitlines()]
    found = oasst.read(rows, "")
    ours = {c.uuid: encode(c)["messages"] for c in found.conversations}
    (missing,) = reference.keys() - ours.keys()
    assert ours == {uuid: messages for uuid, messages in reference.items() if uuid != missing}
    assert [row["rank"] for row in rows if row["parent_id"] == missing] == [None, None, None]


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["json", "jsonl", "folder"])
def test_times_and_numbers_are_read_as_they_stand(tmp_path, form):
    table = [
        {"prompt": "2023-01-01", "when": "2023-01-01T10:00:00Z", "turns": [{"at": "2023-01-02 03:04"}], "n": 2**63},
        {"prompt": "2024-02-01", "when": None, "turns": [], "n": 10**400},
    ]
    lines = [json.dumps(row) for row in table]
    path = tmp_path / ("train.jsonl" if form == "folder" else f"t.{form}")
    path.write_text(f"[{', '.join(lines)}]" if form == "json" else "\n".join(lines))
    assert reading.rows(Place(str(tmp_path if form == "folder" else path))) == table


CELLS = [
    {"uuid": "009", "prompt": "None", "response": "5"},
    {"uuid": "010", "prompt": "", "response": "NA"},
    {"uuid": "1e3", "prompt": "2023-01-01", "response": 'a, "b"\nc'},
    {"uuid": "x", "prompt": "true", "response": "1.50"},
]
HEADER, FIRST, SECOND = (
    "uuid,prompt,response\n",
    "009,None,5\n",
    '010,,"NA"\n1e3,2023-01-01,"a, ""b""\nc"\nx,true,1.50\n',
)
DECLARED = """---
configs:
- config_name: main
  sep: ","
  data_files:
  - split: test
    path: data/*.csv
dataset_info:
  config_name: main
  features:
  - {name: uuid, dtype: string}
  - {name: prompt, dtype: string}
  - {name: response, dtype: float64}
---
"""
PLACES = {  # files, and the place within their folder that is read; types would be guessed per file
    "file": ({"t.csv": HEADER + FIRST + SECOND}, Place("t.csv")),
    "packed": ({"t.csv.gz": HEADER + FIRST + SECOND}, Place("t.csv.gz")),
    "byte-order mark": ({"t.csv": "\ufeff" + HEADER + "\n" + FIRST + "\n" + SECOND}, Place("t.csv")),
    "folder": ({"train.csv": HEADER + FIRST + SECOND}, Place("")),
    "tabs": ({"train.tsv": (HEADER + FIRST + SECOND).replace(",", "\t").replace("a\t ", "a, ")}, Place("")),
    "shards": ({"train-0.csv": HEADER + FIRST, "train-1.csv": HEADER + SECOND}, Place("")),
    "packed folder": ({"data/test.csv.gz": HEADER + FIRST + SECOND}, Place("", None, "test")),
    "mirror": (
        {"README.md": DECLARED, "data/a.csv": HEADER + FIRST, "data/b.csv": HEADER + SECOND},
        Place("", "main", "test"),
    ),
}


@pytest.mark.parametrize("files, place", PLACES.values(), ids=PLACES)
def test_every_cell_of_csv_files_is_a_text(tmp_path, files, place):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    assert reading.rows(place._replace(path=str(tmp_path / place.path))) == CELLS


def test_the_folder_where_one_stands_is_read(tmp_path, monkeypatch):
    (tmp_path / "train.csv").write_text(HEADER + FIRST)
    monkeypatch.chdir(tmp_path)
    assert reading.rows(Place(".")) == CELLS[:1]


def test_csv_files_whose_columns_differ_are_refused(tmp_path):
    for name, text in {"train-0.csv": "a,b\n1,2\n", "train-1.csv": "a,c,b\n1,2,3\n", "train-2.csv": "a,b\n"}.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match="not all of its files have the columns c"):
        reading.rows(Place(str(tmp_path)))
    (tmp_path / "train-1.csv").write_text("b,a\n1,2\n")
    assert reading.rows(Place(str(tmp_path))) == [{"a": "1", "b": "2"}, {"a": "2", "b": "1"}]
    (tmp_path / "train-0.csv").write_text("a,b\n")
    (tmp_path / "train-1.csv").write_text("a,b\n")
    with pytest.raises(UserError, match="holds no rows"):
        reading.rows(Place(str(tmp_path)))


ROWS = [{"a": 1, "b": None}, {"a": [2], "b": "x"}]
LINES = b'{"a": 1}\n\n{"a": [2], "b": "x"}\n'
FORMS = {
    "lines.json": LINES,
    "lines.jsonl": b"\xef\xbb\xbf" + LINES,
    "lines.ndjson": LINES,
    "list.json": b'\n[{"a": 1}, {"a": [2], "b": "x"}]',
    "indented.json": json.dumps([{"a": 1}, {"a": [2], "b": "x"}], indent=1).encode(),
    "objects within lines.json": b'{ "a": 1\n}{"a":\n[2], "b": "x"}',
    "bare returns.jsonl": LINES.replace(b"\n", b"\r"),
    "objects.json": b'{\n "a": 1\n}\r\n{\n "a": [\n2],\n "b": "x"\n}\n',
    "lines.jsonl.xz": lzma.compress(LINES),
    "list.json.bz2": bz2.compress(json.dumps(ROWS).encode()),
    "list.json.gz": gzip.compress(json.dumps(ROWS).encode()),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_forms_of_json(tmp_path, name):
    (tmp_path / name).write_bytes(FORMS[name])
    assert reading.rows(Place(str(tmp_path / name))) == ROWS


def test_a_list_of_texts_and_cells_of_any_length(tmp_path):
    (tmp_path / "t.json").write_text('["x", "y"]')
    assert reading.rows(Place(str(tmp_path / "t.json"))) == [{"text": "x"}, {"text": "y"}]
    (tmp_path / "t.csv").write_text(",Unnamed: 0,a\n1,2,3\n  \n")
    assert reading.rows(Place(str(tmp_path / "t.csv"))) == [{"Unnamed: 0.1": "1", "Unnamed: 0": "2", "a": "3"}]
    (tmp_path / "t.csv").write_text(f',a\r1,{"x" * 200_000}\r2,"{chr(10)}"\r')
    cells = [{"Unnamed: 0": "1", "a": "x" * 200_000}, {"Unnamed: 0": "2", "a": "\n"}]
    assert reading.rows(Place(str(tmp_path / "t.csv"))) == cells


DEEP = b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
DAMAGED = {
    "a cell too many": ("csv", b'p,r\n"q\n1",a\n\nq2,a2,\n', "line 5: has 3 cells where the header has 2 columns"),
    "a cell too few": ("csv", b"p,r\nq1,a1\nq2\n", "line 3: has 1 cells"),
    "columns of one name": ("csv", b"p,r,p\n1,2,3\n", "line 1: two columns have one name: p, r, p"),
    "an open quote": ("csv", b'p,r\n1,2\n"3,4\n5,6\n', "line 3: cannot be read: unexpected end"),
    "cells not of UTF-8": ("csv", b"p,r\n1,2\ncaf\xe9,4\n", "line 3: not valid UTF-8"),
    "not of UTF-8": ("jsonl", b'{"a": 1}\n{"a": "caf\xe9"}\n', "line 2: not valid UTF-8"),
    "a depth bomb": ("jsonl", b"\n" + DEEP, "line 2: not valid JSON: nested too deeply"),
    "a bomb in a list": ("json", b"[" + DEEP + b"]", "not valid JSON: nested too deeply"),
    "101 levels": ("jsonl", b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "line 1: nested too deeply: in more than 100"),
    "a key twice": ("jsonl", b'{"a": [{"b": 1, "b": 2}]}\n', "line 1: a key occurs twice in one object: b, b"),
    "no object": ("json", b'[{"a": 1}, null]', "element 1: expected an object"),
    "no number": ("jsonl", b'{"a": NaN}\n', "line 1: not valid JSON.*write null"),
    "nothing": ("json", b"[]", "holds no rows"),
    "an object cut short": ("json", b'{\n "a": 1}\n\n{\n "b"', "line 5: not valid JSON"),
    "a value that lacks": ("json", b'\n\n{\n "a": 1}\n{\n "b":}', "line 6: not valid JSON: Expecting value$"),
    "a number of 5000 digits": ("json", b'{\n "a": ' + b"9" * 5000 + b"}", "line 1: .*too many digits"),
    "a comma after the first": ("jsonl", b'{"a": 1},\n{"a": 2}\n', "line 1: not valid JSON: .*trailing characters"),
    "NaN in a text": ("jsonl", b'{"a": "is: NaN", "b":}', r"line 1: not valid JSON: .*\(byte \d+\)$"),
    "no value": ("json", b'{\n "a": 1}\n!', "line 3: not valid JSON"),
    "not .bz2": ("jsonl.bz2", b'{"a": 1}', "cannot be unpacked"),
    "half an .xz": ("csv.xz", lzma.compress(b"a,b\n1,2\n")[:-9], "cannot be unpacked"),
}


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("suffix, data, told", DAMAGED.values(), ids=DAMAGED)
def test_damaged_files_are_refused_with_the_line(tmp_path, suffix, data, told, folder):
    path = tmp_path / f"train.{suffix}"
    path.write_bytes(data)
    with pytest.raises(UserError, match=told) as refused:
        reading.rows(Place(str(tmp_path if folder else path)))
    assert str(tmp_path if folder and suffix == "json" else path) in str(refused.value)


@pytest.mark.parametrize(
    "setting, split, text, expected",
    [
        ("sep: ','", "test", "a,b\n09,2\n", [{"a": "09", "b": "2"}]),
        ("sep: ';'", "test", "a;b\n09;2\n", [{"a": "09", "b": "2"}]),
        ("sep: ','", "test[:1]", "a,b\n9,x\n8,y\n", [{"a": "9", "b": "x"}]),
        ("sep: ','", "test[1:]+test[:50%]", "a,b\n1.50,x\n,NA\n", [{"a": "", "b": "NA"}, {"a": "1.50", "b": "x"}]),
        ("sep: ','", "all", "a,b\n009,null\n", [{"a": "009", "b": "null"}]),
        ("skiprows: 1", "test", "told\na,b\n1.50,true\n,NA\n", [{"a": "1.50", "b": "true"}, {"a": "", "b": "NA"}]),
        ("names: [p, r]", "test", "09,x\n8,\n", [{"p": "09", "r": "x"}, {"p": "8", "r": ""}]),
    ],
)
def test_what_a_mirrors_card_asks_for_is_heeded(tmp_path, setting, split, text, expected):
    """Where it is more than a separator, by the library; every cell is a text."""
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text(DECLARED.replace('sep: ","', setting).partition("dataset_info")[0] + "---")
    (tmp_path / "data/t.csv").write_text(text)
    assert reading.rows(Place(str(tmp_path), "main", split)) == expected
    with pytest.raises(UserError, match='Unknown split "train"'):
        reading.rows(Place(str(tmp_path), "main"))


GUESSED = [{"a": text, "b": "2024-01-05"} for text in ("12", "true", "null", "1.50")] + [{"a": 13, "b": "x"}]


@pytest.mark.parametrize("split", ["train", "train[:100%]", "train[:3]+train[3:]", "all"])
@pytest.mark.parametrize("name", ["train.jsonl", "train.json", "train.jsonl.gz", "train.zip"])
def test_texts_of_a_mixed_column_stay_texts_however_the_file_is_named(tmp_path, name, split):
    """`datasets` reads them as its type Json, and decodes them: 12, True, None, 1.5."""
    text = json.dumps(GUESSED) if name == "train.json" else "\n".join(map(json.dumps, GUESSED))
    if name.endswith(".zip"):
        with zipfile.ZipFile(tmp_path / name, "w") as file:
            file.writestr("train.jsonl", text)
    else:
        (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    assert reading.rows(Place(str(tmp_path), None, split)) == GUESSED
    assert reading.rows(Place(str(tmp_path), None, "train[1:2]")) == GUESSED[1:2]
    if not name.endswith(".zip"):
        assert reading.rows(Place(str(tmp_path / name))) == GUESSED


@pytest.mark.parametrize("rows", [GUESSED, GUESSED[:4], [{"a": ["true", 1]}], [{"a": {"b": "1.50"}}, {"a": {"b": 2}}]])
def test_json_texts_that_the_library_changes_are_refused(tmp_path, rows):
    """Where only it can read the file: here by a card with settings for it."""
    (tmp_path / "README.md").write_text(CARD)
    (tmp_path / "t.json").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match="takes texts in .* for other values"):
        reading.rows(Place(str(tmp_path), "main"))


CARD = """---
configs:
- config_name: main
  chunksize: 100000
  data_files: t.json
---"""


def test_a_card_may_name_the_key_that_holds_the_rows(tmp_path):
    (tmp_path / "README.md").write_text(CARD.replace("chunksize: 100000", "field: rows"))
    (tmp_path / "t.json").write_text(json.dumps({"version": 1, "rows": GUESSED}))
    assert reading.rows(Place(str(tmp_path), "main", "train[:4]")) == GUESSED[:4]
    (tmp_path / "t.json").write_text(json.dumps({"version": 1}))
    with pytest.raises(UserError, match="has no key 'rows'"):
        reading.rows(Place(str(tmp_path), "main"))


def test_lines_after_a_bad_first_one_are_not_held(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"a": 1},\n' + b'{"a": 1}\n' * 1_000_000)
    tracemalloc.start()
    with pytest.raises(UserError, match="line 1"):
        reading.rows(Place(str(tmp_path / "x.jsonl")))
    assert tracemalloc.get_traced_memory()[1] < 4e6
    tracemalloc.stop()


def test_a_mirror_is_not_read_to_find_its_splits(tmp_path):
    (tmp_path / "gsm8k/main").mkdir(parents=True)
    (tmp_path / "gsm8k/README.md").write_text(
        DECLARED.replace("data/*.csv", "main/*.jsonl").partition("dataset_info")[0] + "---"
    )
    (tmp_path / "gsm8k/main/t.jsonl").write_bytes(DEEP)
    assert find(tmp_path, source("gsm8k"), "test") == Place(str(tmp_path / "gsm8k"), "main", "test")


def test_cells_of_the_hubs_csv_files_are_texts(tmp_path, monkeypatch):
    import datasets

    (tmp_path / "t.csv").write_text("uuid,text\n009,NA\n,true\n")
    load = partial(datasets.load_dataset, "csv", data_files=str(tmp_path / "t.csv"), cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "load_dataset", lambda path, subset, **flags: load(**flags))
    assert reading.rows(Place("owner/name")) == [{"uuid": "009", "text": "NA"}, {"uuid": "", "text": "true"}]


# Sources --------------------------------------------------------------------------------------------------------------


def test_every_source_is_whole():
    from config import DATASET_FILES

    for each in sources(["all"]):
        assert each.gives and each.licence and each.columns and all(split.rows for split in each.splits.values())
        folder = each.name.replace("_", "-")
        for split in each.splits if each.name != "oasst1" else ():
            assert DATASET_FILES[f"{each.name}_{split}"] == f"localdata/{folder}/{split}.json"
    assert [each.name for each in sources(["gsm8k", "OASST1"])] == ["oasst1", "gsm8k"]
    assert [each.name for each in sources(["gsm8k", "all"])] == [*SOURCES]
    with pytest.raises(UserError, match="did you mean gsm8k"):
        source("gsm8")


def card(files: list[str]) -> str:
    """The README.md of a mirror whose one configuration has these .csv files for splits."""
    splits = [f"  - split: {Path(name).stem}\n    path: {Path(name).name}\n" for name in files if name.endswith(".csv")]
    return "---\nconfigs:\n- config_name: ARC-Easy\n  data_files:\n" + "".join(splits) + "---\n"


@pytest.mark.parametrize(
    "files, found",
    [
        (["data/ARC-Easy.test.parquet"], "data/ARC-Easy.test.parquet"),
        (["eval/arc_easy_test.jsonl", "layout/arc-easy/test.json"], "eval/arc_easy_test.jsonl"),
        (["layout/arc-easy/test.json", "arc-easy/train.json"], "layout/arc-easy/test.json"),
        (["arc_easy_tested.jsonl", "arc_easy_test.txt", "arc_challenge_test.jsonl", "easy_test.csv"], None),
        (["arc-easy/test.json", "arc-easy/test.json.meta.json"], "arc-easy/test.json"),
        (["arc_easy_test.json", "arc_easy_test.json.rejected.jsonl"], "arc_easy_test.json"),
        (["arc_easy_test.csv.gz"], "arc_easy_test.csv.gz"),
        (["allenai/ai2_arc/README.md", "allenai/ai2_arc/test.csv", "arc_easy_test.jsonl"], "allenai/ai2_arc"),
        (["ai2_arc/README.md", "ai2_arc/test.csv"], "ai2_arc"),
        (["ai2_arc/README.md", "ai2_arc/train.csv", "arc_easy_test.jsonl"], None),  # a mirror without this split
    ],
)
def test_where_a_local_copy_is_found(files, found, tmp_path):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(card(files) if name.endswith("README.md") else "id,question\n1,2\n")
    place = find(tmp_path, source("arc_easy"), "test")
    assert place == found or place.path == str(tmp_path / found)
    if found and "." not in found:
        assert place[1:] == ("ARC-Easy", "test")


def test_the_public_validation_split_is_looked_for_first_and_two_that_fit_are_refused(tmp_path):
    for name in ("siqa_test.jsonl", "siqa_dev.jsonl"):
        (tmp_path / name).touch()
    assert find(tmp_path, source("siqa"), "test").path == str(tmp_path / "siqa_dev.jsonl")
    (tmp_path / "siqa-dev.json").touch()
    with pytest.raises(UserError, match="several files fit"):
        find(tmp_path, source("siqa"), "test")
