"""Files: hashes, and writing in one step."""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mltfr_dist.errors import ConfigError

if TYPE_CHECKING:
    from pyarrow import NativeFile
    from torch import Tensor

BLOCK_BYTES, READ_BYTES = 1 << 26, 1 << 20
ALIGNMENT = 64
"""Bytes at whose multiples torch has its tensors begin on a CPU. A product may round otherwise
where one begins elsewhere, as in the pages of a file.
"""


def file_sha256(path: Path, after_block: Callable[[], object] = lambda: None) -> str:
    """sha256 of a file, hexadecimal; ``after_block`` is called after each :data:`BLOCK_BYTES`, and
    at the end of the last.
    """
    with path.open("rb", buffering=0) as file:
        return content_sha256(file, after_block)


def content_sha256(
    file: RawIOBase | BufferedReader | NativeFile, after_block: Callable[[], object] = lambda: None
) -> str:
    """The same of what is left of an open file."""
    digest, buffer, unsaid = (
        hashlib.sha256(),
        memoryview(bytearray(min(READ_BYTES, BLOCK_BYTES))),
        0,
    )
    while size := file.readinto(buffer):
        digest.update(buffer[:size])
        unsaid += size
        if unsaid >= BLOCK_BYTES:
            after_block()
            unsaid = 0
    if unsaid:
        after_block()
    return digest.hexdigest()


def code_sha256() -> str:
    """sha256 over the names and contents of this package's files."""
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)} {file_sha256(path)}\n".encode())
    return digest.hexdigest()


def packaged_names(pattern: str) -> list[str]:
    """Names, without their ending, of the package's files that fit a pattern such as
    `ds_configs/*.json`.
    """
    return sorted(path.stem for path in Path(__file__).parent.glob(pattern))


def with_packaged(path: Path) -> Path:
    """``path`` where something is there, or else the file of that name in the package.

    So `ds_configs/zero1.json` and `tuning/spaces/demo.yaml` are found from every folder.
    """
    packaged = Path(__file__).parent / path
    return packaged if not path.exists() and packaged.is_file() else path


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json.loads (object_pairs_hook): an object of which no key stands twice, so that none is
    lost without a word.

    Raises:
        ValueError: One does.
    """
    values = dict(pairs)
    if len(values) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return values


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what then takes the place of ``path`` in one step: a file, of which a reader
    sees the old or the new, or a new folder. If that fails, nothing of it stays.
    """
    partial = path.with_name(f".partial-{path.name}")
    _remove(partial)  # of a process that was killed
    try:
        yield partial
        partial.rename(path)
    except BaseException:
        _remove(partial)
        raise


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def writing(output: Path, rule: str = "") -> Iterator[None]:
    """While ``output`` is written: what the system refuses becomes an error for who named it.

    Raises:
        ConfigError: The disk does not take it, or its name is taken.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{output} cannot be written: {error}.",
            rule=rule,
            remedy="Make room, or give another name, in a folder that you may write to.",
        ) from error


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Where to write what then becomes ``folder`` in one step; after an error nothing of it stays.

    Raises:
        ConfigError: The disk does not take it.
    """
    with writing(folder, "A folder is complete or absent; nothing of it was left behind."):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with replacing(folder) as partial:
            partial.mkdir()
            yield partial


def write_atomically(path: Path, text: str) -> None:
    """Write or replace a small file in one step: a reader sees the old text or the new, never a
    part.
    """
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file that others may read as any new file: the library by itself writes
    for the owner alone.
    """
    from safetensors.torch import save_file  # imports torch: not for --help

    path.touch()
    mode = path.stat().st_mode
    save_file({name: t.contiguous() for name, t in tensors.items()}, path)
    path.chmod(mode)
