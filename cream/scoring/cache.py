"""The score cache: log-probabilities, or a reward model's outputs, that a checkpoint once gave, beside the samples, so
that none is computed twice.

`<stem>.scores.jsonl` is only ever appended to: a line holds the responses to one prompt under one checkpoint. A value
is looked up by all that it depends on: the checkpoint's content, the response's token ids, the dtype, the kind of
device, and SCORER, which stands for the code. A length limit is not among them: no response is ever truncated.
"""

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from cream.errors import UserError
from cream.files.append_log import AppendLog, strip_checksum
from cream.files.index import Index

log = logging.getLogger("cream")
SCORER = "log-softmax in float32, 1"  # increased when the same tokens would get another number
PER_TOKEN = "log-softmax in float32, per token, 1"  # for lists of a response's tokens' (in `outputs`)
HEAD = "reward head in float32, 1"  # the same for the outputs of reward models
SIGNS = "log-odds of signs in float32, 1"  # and for those of the signs of steps


class Source(msgspec.Struct, frozen=True):
    """What computed the values: the checkpoint's fingerprint, the weights' dtype, cpu or cuda, the code."""

    policy: str
    dtype: str
    device: str
    scorer: str = SCORER


class Line(msgspec.Struct, omit_defaults=True):
    """One prompt's responses under one source: digest of a response's tokens -> log π in nats, summed over it; or its
    outputs, of a source that is a reward model."""

    uuid: str
    source: Source
    logprob: dict[str, float] = {}
    outputs: dict[str, list] = {}


LINE = msgspec.json.Decoder(Line)


class Scores:
    """The cached values of one source in one file. Several processes may add to a file at once.

    Raises UserError where the file exists and is not a score cache: it would be added to.
    """

    def __init__(self, path: Path, source: Source):
        self.path, self.source = path, source
        self._refused = False
        self._log = AppendLog(path) if path.exists() else None
        self._index = Index(self._lines() if self._log else ())

    def _lines(self) -> Iterator[tuple[str, int]]:
        """(uuid, offset) of every line of this source."""
        damaged, valid, raw = 0, 0, b""
        for offset, raw in self._log.lines():
            try:
                line = LINE.decode(strip_checksum(raw) or b"")
            except (msgspec.DecodeError, UnicodeDecodeError):
                damaged += bool(raw.strip())
                continue
            valid += 1
            if line.source == self.source:
                yield line.uuid, offset
        if damaged > valid == 0 and raw.endswith(b"\n"):  # else a kill truncated the very first line
            raise UserError(f"{self.path}: is not a score cache, and scores would be added to it; rename or remove it")
        if damaged:
            log.warning(
                "%s: %d damaged lines (or of an earlier version) are skipped; their scores are computed again",
                self.path,
                damaged,
            )

    def find(self, uuid: str) -> dict[str, float | list]:
        """digest of its tokens -> log π, or outputs, of the responses to a prompt that are cached."""
        cached: dict[str, float | list] = {}
        for offset in self._index.find(uuid):
            line = LINE.decode(self._log.read(offset))
            cached |= line.logprob or line.outputs
        return cached

    def keep(self, computed: Iterable[tuple[str, dict]]) -> None:
        """Add (uuid, digest -> log π, or outputs) to the file. What is added is found by whoever opens it next."""
        if not (lines := [_line(uuid, self.source, values) for uuid, values in computed if values]):
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with AppendLog(self.path, writable=True) as file:
                file.append(*lines)
        except OSError as error:  # the output has the values all the same
            if not self._refused:
                log.warning("%s: scores are not cached, a later pass computes them: %s", self.path, error.strerror)
            self._refused = True


def _line(uuid: str, source: Source, values: dict) -> Line:
    kind = "outputs" if isinstance(next(iter(values.values())), list) else "logprob"
    return Line(uuid, source, **{kind: values})


def beside(path: Path) -> Path:
    """The score cache that belongs to a file of samples or pairs."""
    return path.with_name(f"{path.name.partition('.json')[0]}.scores.jsonl")
