"""Hashes of files, read in blocks."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from mltfr_dist import files


@pytest.mark.parametrize(("size", "blocks"), [(0, 0), (3, 1), (4, 1), (11, 3)])
def test_a_hash_tells_after_each_block_that_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, blocks: int
) -> None:
    monkeypatch.setattr(files, "BLOCK_BYTES", 4)
    content = bytes(range(size))
    (tmp_path / "file").write_bytes(content)
    told: list[None] = []
    assert (
        files.file_sha256(tmp_path / "file", lambda: told.append(None))
        == hashlib.sha256(content).hexdigest()
    )
    assert len(told) == blocks
