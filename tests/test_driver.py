"""The driver of all passes: which items a worker gets after an interruption, and which results come out."""

from dataclasses import dataclass
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cream.errors import UserError
from cream.files.fingerprints import fingerprint_folder
from cream.files.index import Keys
from cream.scoring import driver
from cream.scoring.pool import Pool


@dataclass
class Item:
    uuid: str


class Batches:
    """A worker that takes its items `size` at a time, and records these batches."""

    def __init__(self, size, taken):
        self.size, self.taken = size, taken

    def __call__(self, items):
        items = iter(items)
        while batch := [item.uuid for item in islice(items, self.size)]:
            self.taken.append(batch)
            yield from ((uuid, uuid.upper()) for uuid in reversed(batch))

    def close(self):
        self.taken.append("closed")


def run(folder, uuids, done, size, chunk, taken, expected=None):
    model = driver.Model(folder, expected or fingerprint_folder(folder), None, Pool("cpu"), None)
    made = []

    def setup():
        made.append(1)
        return lambda device: Batches(size, taken)

    items = lambda: map(Item, uuids)  # noqa: E731
    how = {"count": len(uuids), "chunk": chunk, "doing": "testing"}
    return dict(driver.run(model, items, Keys(done), setup, **how)), made


@pytest.mark.slow
@given(st.integers(0, 12), st.sets(st.integers(0, 11)), st.integers(1, 5))
def test_a_resumed_pass_computes_whole_chunks(tiny_folder, count, done, size):
    uuids, taken = [f"u{i}" for i in range(count)], []
    done = {f"u{i}" for i in done} & {*uuids}
    results, made = run(tiny_folder, uuids, done, size, size, taken)
    assert results == {uuid: uuid.upper() for uuid in uuids if uuid not in done}
    chunks = [uuids[i : i + size] for i in range(0, count, size)]  # those of a run without interruption
    wanted = [chunk for chunk in chunks if not {*chunk} <= done]
    assert taken == ([*wanted, "closed"] if wanted else [])
    assert len(made) == bool(wanted)  # nothing is set up, and so no model loaded, for nothing


def test_a_worker_that_knows_what_is_done_gets_all(tiny_folder):
    taken = []
    results, _ = run(tiny_folder, ["a", "b", "c"], {"a", "b"}, 2, None, taken)
    assert results == {"c": "C"} and taken == [["a", "b"], ["c"], "closed"]


def test_another_model_than_was_recorded_is_refused(tiny_folder):
    taken = []
    with pytest.raises(UserError, match="this node has another model"):
        run(tiny_folder, ["a"], set(), 1, 1, taken, expected="f00")
    assert taken == []
