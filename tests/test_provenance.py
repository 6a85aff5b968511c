"""Where outputs come from: hashes, objections and what overrides them, the chain down to the raw data."""

import pytest
import xxhash

from cream import provenance
from cream.errors import UserError


def test_fingerprints_are_those_of_xxhash(tmp_path):
    data = bytes(range(256)) * 10_000  # more than one block
    (tmp_path / "x").write_bytes(data)
    assert provenance.fingerprint_of(str(tmp_path / "x")) == xxhash.xxh3_128_hexdigest(data)
    assert provenance.fingerprint_text("é") == xxhash.xxh3_128_hexdigest("é".encode())
    with pytest.raises(UserError, match="absent"):
        provenance.fingerprint_of(tmp_path / "absent")
