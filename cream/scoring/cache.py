"""The score cache: log-probabilities that a checkpoint once gave, in a file beside the samples or pairs.

`<stem>.scores.jsonl` is only ever appended to: a line holds the responses to one prompt under one checkpoint. A value
is found again by all that it depends on: the checkpoint's content, the response's token ids, the dtype, the kind of
device, and SCORER, which stands for the code. A length limit is not among them: no response is ever truncated. Each
line carries a hash of itself: one that was changed is not believed.
"""

import fcntl
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from cream.errors import UserError
from cream.files.index import Index
from cream.files.raw import sealed, unsealed

log = logging.getLogger("cream")
SCORER = "log-softmax in float32, 1"  # increased when the same tokens would get another number


class Source(msgspec.Struct, frozen=True):
    """Where log-probabilities come from: the checkpoint's fingerprint, the weights' dtype, cpu or cuda, the code."""

    policy: str
    dtype: str
    device: str
    scorer: str = SCORER


class Line(msgspec.Struct):
    """One prompt's responses under one source: digest of a response's tokens -> log π in nats, summed over them."""

    uuid: str
    source: Source
    logprob: dict[str, float]


class Scores:
    """The cached log-probabilities of one source in one file. Several processes may add to a file at once.

    Raises UserError where the file is not a score cache: it would be added to.
    """

    def __init__(self, path: Path, source: Source):
        self.path, self.source = path, source
        self._refused = False
        self._file = open(path, "rb") if path.exists() else None
        self._index = Index(self._lines() if self._file else ())

    def _lines(self) -> Iterator[tuple[str, int]]:
        """(uuid, offset) of every line of this source."""
        decoder, damaged, offset, ours = msgspec.json.Decoder(Line), 0, 0, 0
        for raw in self._file:
            try:
                line = decoder.decode(unsealed(raw) or b"")
                ours += 1
                if line.source == self.source:
                    yield line.uuid, offset
            except (msgspec.DecodeError, UnicodeDecodeError):
                damaged += bool(raw.strip())
            offset += len(raw)
        if damaged > ours == 0 and raw.endswith(b"\n"):  # else a kill left half of the very first line
            raise UserError(f"{self.path}: is not a score cache, and scores would be added to it; rename or remove it")
        if damaged:
            message = "%s: %d damaged lines (or of an earlier version) are skipped; their scores are computed again"
            log.warning(message, self.path, damaged)

    def find(self, uuid: str) -> dict[str, float]:
        """digest of its tokens -> log π, of each response to a prompt that is cached."""
        known: dict[str, float] = {}
        for offset in self._index.find(uuid):
            self._file.seek(offset)
            known |= msgspec.json.decode(unsealed(self._file.readline()), type=Line).logprob
        return known

    def keep(self, found: Iterable[tuple[str, dict[str, float]]]) -> None:
        """Add (uuid, digest -> log π) to the file, for those who open it after this."""
        data = b"".join(sealed(Line(uuid, self.source, values)) for uuid, values in found if values)
        if not data:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                end = file.seek(0, os.SEEK_END)
                if end and not _ends_line(file, end):  # another process was killed within a line
                    data = b"\n" + data
                file.write(data)
        except OSError as error:  # what was computed is in its output all the same
            if not self._refused:
                log.warning("%s: scores are not cached; a later pass computes them: %s", self.path, error.strerror)
            self._refused = True


def _ends_line(file, end: int) -> bool:
    file.seek(end - 1)
    return file.read(1) == b"\n"


def beside(path: Path) -> Path:
    """The score cache of a file of samples or pairs."""
    return path.with_name(f"{path.name.partition('.json')[0]}.scores.jsonl")
