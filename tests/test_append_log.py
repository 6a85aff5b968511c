"""Files that grow: every line is found again as it was written, or seen not to be."""

import errno
import json
import os
import signal

import pytest
import xxhash

from cream.files import append_log
from cream.files.append_log import AppendLog, add_checksum, strip_checksum


def read_all(path):
    with AppendLog(path) as log:
        return [strip_checksum(line) for _, line in log.lines()]


def test_a_line_is_its_json_a_tab_and_its_hash(tmp_path):
    text = '{"a":"é\\n","b":1.5}'.encode()
    line = text + b"\t" + xxhash.xxh3_64_hexdigest(text).encode() + b"\n"
    assert add_checksum({"a": "é\n", "b": 1.5}) == line
    assert strip_checksum(line) == strip_checksum(line[:-1]) == text
    assert all(strip_checksum(line[:cut]) is None for cut in range(len(line) - 1))
    assert all(strip_checksum(line[:i] + b"#" + line[i + 1 :]) is None for i in range(len(line) - 1))


def test_what_was_appended_is_read_at_its_offset(tmp_path):
    path = tmp_path / "x"
    with AppendLog(path, writable=True) as log:
        log.append(1, [2])
        log.append({"three": 3})
        offsets = [offset for offset, _ in log.lines()]
        assert [json.loads(log.read(offset)) for offset in offsets] == [1, [2], {"three": 3}]
        log.truncate(offsets[1])
        log.append(4)
        assert [json.loads(log.read(offset)) for offset in offsets[:2]] == [1, 4]
        assert [offset for offset, _ in log.lines(offsets[1])] == offsets[1:2]


def test_a_line_that_was_cut_short_costs_no_other(tmp_path):
    path = tmp_path / "x"
    whole = add_checksum("first") + add_checksum("second")
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        with AppendLog(path, writable=True) as log:
            log.append("third")
        found = read_all(path)
        assert found[-1] == b'"third"' and [text for text in found[:-1] if text] == [
            text for text, end in ((b'"first"', whole.index(b"\n")), (b'"second"', len(whole) - 1)) if cut >= end
        ]


def test_a_full_disk_is_told_once_and_harms_no_earlier_line(tmp_path, monkeypatch):
    """It takes half of a line; the rest is not written when the file is closed."""
    path, real = tmp_path / "x", os.write

    def full(handle, data):
        if len(data) < 10:
            raise OSError(errno.ENOSPC, "No space left")
        return real(handle, data[: len(data) // 2])

    with AppendLog(path, writable=True) as log:
        log.append("first")
        monkeypatch.setattr(append_log.os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            log.append("second")
    monkeypatch.undo()
    with AppendLog(path, writable=True) as log:
        log.append("third")
    assert [text for text in read_all(path) if text] == [b'"first"', b'"third"']


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_it_is_appended_to_where_there_are_no_locks(tmp_path, monkeypatch, number):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(append_log, "lock_descriptor", refuse)
    monkeypatch.setattr(append_log, "unlock_descriptor", refuse)
    with AppendLog(tmp_path / "x", writable=True) as log:
        log.append(1)
    assert read_all(tmp_path / "x") == [b"1"]


def test_what_was_appended_survives_a_kill(tmp_path):
    """Up to the last line, without `sync`."""
    if not (child := os.fork()):
        log = AppendLog(tmp_path / "x", writable=True)
        for number in range(3):
            log.append(number)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert read_all(tmp_path / "x") == [b"0", b"1", b"2"]
