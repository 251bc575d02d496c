"""Hashes of files, read in blocks, and the rights of those that are written."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mltfr_dist import files
from mltfr_dist.distributed import tensor_file
from mltfr_dist.distributed.tensor_file import write_tensors


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


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_tensors_are_as_readable_as_any_new_file(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        files.save_tensors({"t": torch.arange(6).view(2, 3).T}, tmp_path / "t.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "t.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask
    assert torch.equal(load_file(tmp_path / "t.safetensors")["t"], torch.arange(6).view(2, 3).T)


def test_tensors_written_in_pieces_are_those_of_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers, for every kind that a checkpoint holds; those of the largest tensor of a
    kind, and of all where sizes allow it, begin where torch would have put them.
    """
    monkeypatch.setattr(tensor_file, "PIECE_BYTES", 20)
    tensors = {f"of {kind}": torch.arange(21).view(7, 3).to(kind) for kind in tensor_file.NAMES}
    tensors |= {"one": torch.tensor(2.5), "none": torch.ones(0, 3), "é": torch.ones(9)[::2]}
    beats: list[None] = []
    digest = write_tensors(tmp_path / "pieces", tensors, lambda: beats.append(None))
    files.save_tensors(tensors, tmp_path / "whole")
    written, whole = load_file(tmp_path / "pieces"), load_file(tmp_path / "whole")
    assert written.keys() == whole.keys()
    for name, tensor in whole.items():
        assert written[name].dtype == tensor.dtype
        assert torch.equal(written[name], tensor)
    assert digest == files.file_sha256(tmp_path / "pieces")
    assert len(beats) > 3 * len(tensors)


def test_a_file_that_is_mapped_holds_its_tensors_where_torch_would_put_them(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3), "of items": torch.ones(50, 5), "rows": torch.arange(8)}
    write_tensors(tmp_path / "t", tensors)
    offsets = {name: held.offset for name, held in tensor_file.tensors_in(tmp_path / "t").items()}
    assert offsets["rows"] % 64 == offsets["of items"] % 64 == 0
    assert offsets["rows"] < offsets["of items"] < offsets["a"]


@pytest.mark.parametrize("of_folder", [False, True])
def test_what_fails_on_its_way_leaves_the_old_and_nothing_else(
    tmp_path: Path, of_folder: bool
) -> None:
    target = tmp_path / "name"

    def write(target: Path, text: str, error: BaseException | None = None) -> None:
        with files.replacing(target) as partial:
            if of_folder:
                partial.mkdir()
            (partial / "inside" if of_folder else partial).write_text(text)
            if error:
                raise error

    def there() -> dict[str, str]:
        return {str(p): p.read_text() for p in tmp_path.rglob("*") if p.is_file()}

    write(target, "old")
    before = there()
    assert list(before.values()) == ["old"]
    with pytest.raises(KeyboardInterrupt):
        write(target, "new", KeyboardInterrupt())
    assert there() == before
    leftover = tmp_path / ".partial-another"  # of a process that was killed
    leftover.mkdir()
    (leftover / "more").write_text("half")
    write(tmp_path / "another", "whole")
    assert sorted(there().values()) == ["old", "whole"]
