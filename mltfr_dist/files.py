"""Files: hashes, and writing in one step."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

BLOCK_BYTES = 1 << 26


def file_sha256(path: Path, after_block: Callable[[], object] = lambda: None) -> str:
    """sha256 of a file, hexadecimal; read in blocks of :data:`BLOCK_BYTES`, after each of which ``after_block`` is called."""
    digest, block = hashlib.sha256(), memoryview(bytearray(min(BLOCK_BYTES, path.stat().st_size)))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(block[:size])
            after_block()
    return digest.hexdigest()


def code_sha256() -> str:
    """sha256 over the names and contents of this package's files."""
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)} {file_sha256(path)}\n".encode())
    return digest.hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write or replace a small file in one step: a reader sees the old text or the new, never a part."""
    partial = path.with_name(f".partial-{path.name}")
    partial.write_text(text, encoding="utf-8")
    partial.rename(path)
