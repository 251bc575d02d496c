"""The registry of language models' formats: a line for each ending of a weight file."""

from __future__ import annotations

from typing import NamedTuple


class Entry(NamedTuple):
    """Where a format's reader is found and what it is."""

    path: str
    """``module:function`` beside this file: (folder, layout, tensor's name or None) -> source."""
    what: str
    in_folders: bool = True
    """Whether a folder's file of this ending is its model; else the file itself must be given."""


FORMATS: dict[str, Entry] = {
    ".safetensors": Entry("from_safetensors:open_safetensors", "Hugging Face checkpoints"),
    ".gguf": Entry("from_gguf:open_gguf", "llama.cpp's files"),
    ".vec": Entry("from_text:open_word_vectors", "word vectors"),
    ".txt": Entry("from_text:open_word_vectors", "word vectors", in_folders=False),
}
