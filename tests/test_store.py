"""Record files: every form reads back, errors name file and record, and a file is whole or absent."""

import gzip
import json
import tracemalloc
from array import array
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from cream.errors import UserError
from cream.files import raw as files
from cream.files import store
from cream.records import Answer, Conversation, Item, Message, Pair, Prompt, Samples

FORMS = [form + packing for form in (".json", ".jsonl") for packing in ("", ".gz", ".zst")]
text = st.text(st.characters(exclude_categories=["Cs"]))
words = text.filter(lambda t: t.strip())


def prompt(uuid, content="What is 2 + 3?", **extra):
    return Prompt(uuid=uuid, messages=[Message("user", content)], extra=extra)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=30)
@given(st.dictionaries(words, st.tuples(words, st.dictionaries(st.sampled_from(["task", "level"]), text)), max_size=5))
def test_every_form_reads_back_in_order(tmp_path_factory, form, contents):
    path = tmp_path_factory.mktemp("forms") / f"prompts{form}"
    records = [prompt(uuid, content, **extra) for uuid, (content, extra) in contents.items()]
    assert store.write(path, records) == len(records)
    assert list(store.read(path, Prompt)) == records


@pytest.mark.parametrize("form", FORMS)
def test_every_layout_reads_back(tmp_path, form):
    question, answer, other = Message("user", "2 + 3?"), Message("assistant", "5"), Message("assistant", "6")
    graded = {"responses": "Answer: 5", "final_prediction": "5", "correct": True}
    for records in (
        [Conversation(uuid="a", messages=[question, answer], extra={"source": "mine"})],
        [Samples(uuid="a", prompt=[question], responses=["5", ""], finish_reason=["stop", "length"])],
        [Pair(uuid="a", prompt=[question], selected=[question, answer], rejected=[question, other], consistency=None)],
        [Item(uuid="a", question="2 + 3?", label=5), Item(uuid="b", question="1 + 1?", label="2", task="sum")],
        [Answer(uuid="a", question="2 + 3?", label=5, **graded)],
    ):
        path, kind = tmp_path / f"x{form}", type(records[0])
        store.write(path, records)
        assert list(store.read(path, kind)) == records
        assert store.detect(path) is kind


def test_json_files_have_the_methods_layouts(tmp_path):
    question, answer = Message("user", "2 + 3?"), Message("assistant", "5")
    graded = {"responses": "Answer: 5", "final_prediction": "5", "correct": True}
    item = {"uuid": "a", "question": "2 + 3?", "label": "5"}
    turns = [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}]
    for record, layout in (
        (Conversation(uuid="a", messages=[question, answer]), {"a": turns}),
        (Prompt(uuid="a", messages=[question]), {"a": turns[:1]}),
        (Samples(uuid="a", prompt=[question], responses=["5"]), {"a": {"prompt": turns[:1], "responses": ["5"]}}),
        (Item(**item), [item]),
        (Answer(**item, **graded), {"a": {**item, **graded}}),
    ):
        store.write(tmp_path / "x.json", [record])
        assert json.loads((tmp_path / "x.json").read_text()) == layout


def test_lines_are_streamed(tmp_path):
    path = tmp_path / "x.jsonl"
    store.write(path, [prompt("a")])
    path.write_text(path.read_text() + "\n{broken\n")
    records = store.read(path, Prompt)
    assert next(records).uuid == "a"
    with pytest.raises(UserError, match="line 3"):
        next(records)


A_PROMPT = '[{"role": "user", "content": "x"}]'
A_LINE = f'{{"uuid": "a", "messages": {A_PROMPT}}}'.encode()


@pytest.mark.parametrize(
    "name, content, named",
    [
        ("x.json", b"", "x.json"),
        ("x.json", b"3", "x.json"),
        ("x.json", b"\xef\xbb\xbf{}", "x.json"),
        ("x.json", f'{{"": {A_PROMPT}}}'.encode(), "uuid is blank"),
        ("x.json", f'{{"a": {A_PROMPT}, " \\n": {A_PROMPT}}}'.encode(), "uuid is blank"),
        ("x.jsonl", f'{{"uuid": "  ", "messages": {A_PROMPT}}}'.encode(), "line 1: a record's uuid is blank"),
        ("x.json", f'{{"a": {A_PROMPT}, "a": {A_PROMPT}}}'.encode(), "'a'"),
        ("x.json", f'{{"a": {A_PROMPT}, "b": []}}'.encode(), "'b'"),
        ("x.json", b'{"a": [{"role": "user", "content": "\\ud800"}]}', "x.json"),
        ("x.json", b'{"a": [{"role": "user", "content": "\xff"}]}', "'a'"),
        ("x.json", b'{"a": ' + b"[" * 200_000 + b"}", "x.json"),
        ("x.json", b'[{"question": "?", "label": 1}]', "element 0"),
        ("x.jsonl", b'{"messages": []}', "line 1"),
        ("x.jsonl", f'{{"uuid": "a", "messages": {A_PROMPT}}}\n'.encode() * 2, "'a'"),
        ("x.jsonl", b'{"uuid": "a", "messages": NaN}', "line 1"),
        ("x.jsonl.gz", b"not packed", "damaged"),
        ("x.json.zst", b"not packed", "damaged"),
        ("x.csv", b"a,b", ".jsonl"),
    ],
)
def test_a_bad_file_ends_in_one_message(tmp_path, name, content, named):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        list(store.read(tmp_path / name, Prompt))
    assert name in str(error.value) and named in str(error.value)


@pytest.mark.parametrize(
    "form, place",
    [(".jsonl", ", line 2: "), (".jsonl.zst", ", line 2: "), (".jsonl.gz", ", line 2: "), (".json.zst", ": ")],
)
def test_what_unpacks_without_end_is_refused(tmp_path, monkeypatch, form, place):
    monkeypatch.setattr(files, "MOST", 1000)
    path = tmp_path / f"x{form}"
    store.write(path, [prompt("a"), prompt("b", "9" * 1000)])
    with pytest.raises(UserError, match=rf"{path.name}{place}.*more than 1000 bytes"):
        list(store.read(path, Prompt, skip=True))


def test_a_packed_file_is_unpacked_piece_by_piece(tmp_path):
    """64 MB of blank lines, in 2 kB."""
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress(b"\n" * (64 << 20)))
    tracemalloc.start()
    with files.open_file(path) as file:
        assert file.read(5) == b"\n" * 5
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 48 << 20


NOTHING, SKIPPABLE = zstandard.ZstdCompressor().compress(b""), b"\x50\x2a\x4d\x18\x04\0\0\0skip"  # RFC 8878 §3.1.2


@pytest.mark.parametrize(
    "suffix, between, after",
    [
        (".zst", b"", b""),  # cat a.zst b.zst
        (".zst", SKIPPABLE, SKIPPABLE),  # pzstd's and the seekable format's frames
        (".zst", NOTHING, NOTHING),
        (".gz", b"", b""),
        (".gz", gzip.compress(b"", mtime=0), b"\0" * 512),  # padded, as on a tape
    ],
)
def test_all_that_was_appended_to_a_packed_file_is_read(tmp_path, suffix, between, after):
    path = tmp_path / f"x.jsonl{suffix}"
    parts = []
    for uuid in ("a", "b", "c"):
        store.write(path, [prompt(uuid, "long " * 3000)])
        parts.append(path.read_bytes())
    path.write_bytes(parts[0] + between + parts[1] + parts[2] + after)
    assert [record.uuid for record in store.read(path, Prompt)] == ["a", "b", "c"]
    path.write_bytes(path.read_bytes()[: len(parts[0] + between + parts[1]) - 3])
    with pytest.raises(UserError, match=f"{path.name}: damaged"):
        list(store.read(path, Prompt))


def test_a_frame_that_takes_much_memory_is_not_called_damaged(tmp_path):
    path = tmp_path / "x.jsonl.zst"
    wide = zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters(window_log=28)).compressobj()
    path.write_bytes(wide.compress(b"{}\n") + wide.flush())
    with pytest.raises(UserError, match=r"window of more than 128 MB.*zstd -d --long=31 x.jsonl.zst"):
        list(store.read(path, Prompt))


@pytest.mark.parametrize("form", [".json.gz", ".jsonl.gz", ".json.zst"])
def test_a_file_cut_short_is_noticed(tmp_path, form):
    path = tmp_path / f"x{form}"
    store.write(path, [prompt(f"u{i}", f"What is {i * i} + {i**3}?") for i in range(500)])
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=path.name):
        list(store.read(path, Prompt))


@pytest.mark.parametrize("form", [".jsonl", ".jsonl.zst"])
@settings(max_examples=30)
@given(data=st.data())
def test_a_doubled_uuid_is_named_wherever_it_stands(tmp_path_factory, form, data):
    path = tmp_path_factory.mktemp("doubled") / f"x{form}"
    count = data.draw(st.integers(2, 20))
    first, second = sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=2, max_size=2)))
    uuids = [f"u{i}" for i in range(count)]
    uuids[second] = uuids[first]
    store.write(path, [prompt(uuid) for uuid in uuids])
    with pytest.raises(UserError, match=f"'{uuids[first]}' occurs twice"):
        list(store.read(path, Prompt))
    with pytest.raises(UserError, match=f"'{uuids[first]}' occurs twice"):
        list(store.read(path, Prompt, limit=second + 1))
    assert len(list(store.read(path, Prompt, limit=second))) == second


def test_doubles_are_looked_for_among_what_is_malformed(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"uuid": "a"}\ngarbage\n{"uuid": "b"}\n{}\n{"uuid": "c"}\n')
    store.check_unique(path)
    path.write_text(path.read_text() + '{"uuid": "b"}\n')
    with pytest.raises(UserError, match="line 6: uuid 'b' occurs twice"):
        store.check_unique(path)


def test_uuids_of_one_hash_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(store.xxhash, "xxh3_64_intdigest", lambda data: 7)
    path = tmp_path / "x.jsonl"
    store.write(path, [prompt(f"u{i}") for i in range(9)])
    assert len(list(store.read(path, Prompt))) == 9
    store.write(path, [*store.read(path, Prompt), prompt("u4")])
    with pytest.raises(UserError, match="'u4' occurs twice"):
        list(store.read(path, Prompt))


@pytest.mark.parametrize("form", [".json", ".jsonl"])
@pytest.mark.parametrize("levels, fits", [(store.DEPTH - 1, True), (store.DEPTH, False)])
def test_how_deep_a_record_may_be_does_not_depend_on_who_reads_it(tmp_path, form, levels, fits):
    path = tmp_path / f"x{form}"
    value = '{"messages": ' + A_PROMPT + ', "own": ' + "[" * levels + "]" * levels + ', "more": [[], "[{"]}'
    path.write_text('{"a": ' + value + "}" if form == ".json" else '{"uuid": "a", ' + value[1:])

    def read(deep):
        return read(deep - 1) if deep else len(list(store.read(path, Prompt, skip=True)))

    assert {read(0), read(300)} == {int(fits)}


def test_missing_file_and_folder_are_named(tmp_path):
    (tmp_path / "folder.json").mkdir()
    for name in ("absent.json", "folder.json"):
        with pytest.raises(UserError, match=name):
            list(store.read(tmp_path / name, Prompt))


@pytest.mark.parametrize("content", ["{}", "[]", '{"a": {"unheard": 1}}', '{"a": 3}'])
def test_detect_refuses_what_no_stage_writes(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UserError, match=r"x\.json"):
        store.detect(tmp_path / "x.json")


@pytest.mark.parametrize(
    "line, why",
    [
        (files.BOM + A_LINE, "line 1: begins with a byte-order mark"),
        (A_LINE.decode().encode("utf-16"), "line 1: not valid JSON"),
        (A_LINE.replace(b"[", b"[NaN, "), "line 1: not valid JSON"),
        (A_LINE.replace(b'"x"', b'"\\ud800"'), "line 1: not valid JSON: a lone surrogate"),
        (A_LINE.replace(b'"x"', b'"\xff"'), "line 1: not valid UTF-8"),
        (b'{"uuid": "a"}\n[]', "line 1: record 'a' has no known layout"),
        (b"", "x.jsonl: the file holds no records$"),
    ],
)
def test_detect_tells_why_the_first_record_is_none_when_no_other_is(tmp_path, line, why):
    (tmp_path / "x.jsonl").write_bytes(line)
    with pytest.raises(UserError, match=why):
        store.detect(tmp_path / "x.jsonl", skip=True)


@pytest.mark.parametrize("name, is_file", [("a.json", True), ("a.jsonl.zst", True), ("run.v2", False), ("out", False)])
def test_a_suffix_tells_files_from_folders(tmp_path, name, is_file):
    assert store.is_record_file(tmp_path / name) is is_file


@pytest.mark.parametrize("form", FORMS)
def test_an_interrupted_write_changes_nothing(tmp_path, form):
    def stops():
        yield prompt("new")
        raise KeyboardInterrupt

    path = tmp_path / f"x{form}"
    store.write(path, [prompt("old")])
    with pytest.raises(KeyboardInterrupt):
        store.write(path, stops())
    assert [record.uuid for record in store.read(path, Prompt)] == ["old"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_no_folder(tmp_path):
    """Not the folders it would have made; those that were there stay, and untouched when its first record fails."""

    def fails(records):
        yield from records
        raise UserError("no")

    (tmp_path / "old").mkdir()
    before = (tmp_path / "old").stat().st_mtime_ns
    with pytest.raises(UserError):
        store.write(tmp_path / "old" / "x.jsonl", fails([]))
    assert (tmp_path / "old").stat().st_mtime_ns == before
    for folder in ("new/folder", "old"):
        with pytest.raises(UserError):
            store.write(tmp_path / folder / "x.jsonl", fails([prompt("a")]))
    assert [path.name for path in tmp_path.rglob("*")] == ["old"]


@pytest.mark.parametrize("form", FORMS)
def test_equal_records_make_equal_bytes(tmp_path, form):
    for name in ("a", "b"):
        store.write(tmp_path / f"{name}{form}", [prompt("u1"), prompt("u2")])
    assert (tmp_path / f"a{form}").read_bytes() == (tmp_path / f"b{form}").read_bytes()


@pytest.mark.parametrize("block", [1, 3, 1 << 16])
def test_a_duplicate_is_found_wherever_it_lies_among_the_hashes(monkeypatch, block):
    monkeypatch.setattr(store, "BLOCK", block)
    for count in range(9):
        for at in range(count):
            hashes = array("Q", [*range(count), at])
            assert store._sort_and_find_doubles(hashes).tolist() == [at] and hashes.tolist() == sorted(
                [*range(count), at]
            )
        assert store._sort_and_find_doubles(array("Q", range(count))).tolist() == []


def test_a_file_that_is_not_there_is_answered_with_one_that_looks_like_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs/round1").mkdir(parents=True)
    for name in ("samples.json", "samples.json.meta.json", "pairs.jsonl.zst"):
        (tmp_path / "outputs/round1" / name).touch()
    for path, meant in {
        "outputs/round1/sample.json": "outputs/round1/samples.json",
        "outputs/roudn1/samples.json": "outputs/round1/samples.json",
        "outputs/round1/samples": "outputs/round1/samples.json",
        "outputs/round1/pair.jsonl.zst": "outputs/round1/pairs.jsonl.zst",
        "tiny_m3": "tiny_m2",
        "output": "outputs",
    }.items():
        assert files.did_you_mean(Path(path), ["tiny_m2", "other"]) == f"; did you mean {meant}?", path
    assert files.did_you_mean(Path("nothing/like/it.json")) == files.did_you_mean(Path()) == ""
    with pytest.raises(UserError, match="sample.json: no such file; did you mean outputs/round1/samples.json"):
        store.read_json(Path("outputs/round1/sample.json"))
