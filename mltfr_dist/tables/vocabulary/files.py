"""Opens a tokenizer's file: nothing larger than a tokenizer, nothing binary taken for text."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mltfr_dist.errors import DataError
from mltfr_dist.files import unique_keys
from mltfr_dist.tables.vocabulary.base import Vocabulary

MAX_BYTES = 1 << 27
"""Size above which a file is no tokenizer; the largest ones known have a quarter of it."""

_SIGNATURES = {
    b"GGUF": "a GGUF file",
    b"PK\x03\x04": "a zip archive (PyTorch's pickles are such)",
    b"\x80": "a Python pickle",
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b": "compressed by gzip",
    b"\x93NUMPY": "a NumPy array",
}


@dataclass(frozen=True)
class TokenizerFile:
    """The bytes of a file, and what they are as text and as JSON.

    Attributes:
        path: where it lies. data: its bytes.
    """

    path: Path
    data: bytes

    @property
    def name(self) -> str:
        """The file's name without its folder."""
        return self.path.name

    @cached_property
    def text(self) -> str:
        """The content as text, a line feed at the ends of lines.

        Raises:
            DataError: it is not UTF-8, or holds zero bytes as no text does.
        """
        try:
            text = self.data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise unreadable(self.path, f"it is not UTF-8 text ({error.reason})") from None
        if "\0" in text:
            raise unreadable(self.path, "it is no text, for it holds zero bytes")
        return text.replace("\r\n", "\n").replace("\r", "\n")

    @cached_property
    def lines(self) -> list[str]:
        """The lines of the text, blank ones too."""
        return self.text.removesuffix("\n").split("\n")

    @cached_property
    def json(self) -> Any:
        """The content as JSON; None for a file that is not named ``.json`` and does not hold it.

        Raises:
            DataError: a ``.json`` file that does not hold it, or in which a key stands twice.
        """
        named = self.path.suffix == ".json"
        if not named and not (self.data.lstrip()[:1] == b"{" and self.data.rstrip()[-1:] == b"}"):
            return None
        try:
            return json.loads(self.text, object_pairs_hook=unique_keys)
        except RecursionError:
            raise unreadable(self.path, "its JSON nests too deeply") from None
        except ValueError as error:
            if named:
                raise unreadable(self.path, str(error).partition(";")[0]) from None
            return None


@dataclass(frozen=True)
class Format:
    """A format of vocabularies: how it is told from others by its content, and read or refused."""

    recognises: Callable[[TokenizerFile], bool]
    read: Callable[[TokenizerFile], Vocabulary]


def open_file(path: Path) -> TokenizerFile:
    """Read a file that may be a tokenizer's.

    Raises:
        DataError: it is no file, cannot be read, is a git-lfs pointer, is empty, is too large
            or is of a binary format.
    """
    if not path.is_file():
        raise DataError(
            f"The vocabulary file {path} is no regular file.",
            remedy="Give the path of a tokenizer.json or vocab.txt with --vocabulary PATH.",
        )
    try:
        with path.open("rb") as file:
            head = file.read(64)
            _refuse_binary(path, head)
            if path.stat().st_size > MAX_BYTES:
                raise unreadable(path, "it has more than 128 MiB, which no tokenizer has")
            data = head + file.read()
    except OSError as error:
        raise DataError(
            f"The vocabulary file {path} cannot be read: {error.strerror}.",
            remedy="Give the path of a tokenizer.json or vocab.txt that you may read with "
            "--vocabulary PATH.",
        ) from None
    if not data.strip():
        raise DataError(f"The vocabulary in {path} is empty.", remedy="Fetch the file again.")
    return TokenizerFile(path, data)


def unreadable(path: Path, why: str) -> DataError:
    """The error for a file whose content is not what its format demands."""
    return DataError(
        f"The vocabulary file {path} cannot be read: {why.removesuffix('.')}.",
        remedy="Fetch it again, or give the tokenizer.json or vocab.txt of this checkpoint with "
        "--vocabulary PATH.",
    )


def malformed(name: str, why: str) -> DataError:
    """The error for a vocabulary with an entry that cannot be right."""
    return DataError(f"The vocabulary in {name} is malformed: {why}.", remedy="Fetch it again.")


def _refuse_binary(path: Path, head: bytes) -> None:
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        raise DataError(
            f"{path} is a git-lfs pointer, not the file itself.",
            remedy="Run `git lfs pull` in that folder, which fetches it.",
        )
    what = next((what for mark, what in _SIGNATURES.items() if head.startswith(mark)), None)
    if head[8:10] == b'{"' and int.from_bytes(head[:8], "little") < 1 << 32:
        what = "a safetensors file"
    if what is not None:
        raise DataError(
            f"{path} is no vocabulary; it is {what}.",
            remedy="Give the tokenizer.json or vocab.txt of this checkpoint with "
            "--vocabulary PATH (a GGUF file given as the source brings its own).",
        )
