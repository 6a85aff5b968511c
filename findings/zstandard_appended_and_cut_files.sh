#!/usr/bin/env bash
# zstandard 0.25.0 has three ways to unpack, and they disagree on two files that are common: one to which a second frame
# was appended (`cat a.zst b.zst`, which the zst tool reads as both), and one that was cut short.
#
#                          two frames          cut short
#   stream_reader.read     both                what is there, without an error
#   decompressobj          the first alone     what is there, without an error
#   decompress             the first alone     raises ZstdError
#
# A reader of data that must be whole has to look itself: at `eof` and `unused_data` of decompressobj.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
packages zstandard==0.25.0
"$python" - <<'PYTHON'
import io

import zstandard

pack = zstandard.ZstdCompressor().compress
two, whole = pack(b"a\n") + pack(b"b\n"), pack(b"line\n" * 100_000)
WAYS = {
    "stream_reader": lambda data: zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data)).read(),
    "decompressobj": lambda data: zstandard.ZstdDecompressor().decompressobj().decompress(data),
    "decompress": lambda data: zstandard.ZstdDecompressor().decompress(data),
}


def seen(read, data):
    try:
        return read(data)
    except zstandard.ZstdError:
        return "ZstdError"


print("zstandard", zstandard.__version__)
appended = {name: seen(read, two) for name, read in WAYS.items()}
cut = {name: seen(read, whole[: len(whole) // 2]) for name, read in WAYS.items()}
print("two frames:", appended)
print("cut short:", {name: found if isinstance(found, str) else f"{len(found)} bytes" for name, found in cut.items()})
assert appended == {"stream_reader": b"a\nb\n", "decompressobj": b"a\n", "decompress": b"a\n"}
assert cut["decompress"] == "ZstdError" and all(0 < len(cut[n]) < 500_000 for n in ("stream_reader", "decompressobj"))
PYTHON
