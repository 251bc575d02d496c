"""From a file or folder to a language model's embedding, by the format that its ending says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mltfr_dist.errors import DataError
from mltfr_dist.registry import load
from mltfr_dist.tables.checkpoints.formats import FORMATS
from mltfr_dist.tables.checkpoints.from_text import refuse_binary_vectors
from mltfr_dist.tables.checkpoints.layout import (
    PICKLE_ENDINGS,
    Layout,
    find_layout,
    local_names,
    model_folder,
    no_weights,
)
from mltfr_dist.tables.checkpoints.source import EmbeddingSource, refuse_pointer

Open = Callable[[Path, Layout, str | None], EmbeddingSource]


def _opener(ending: str) -> Open:
    opener: Open = load(FORMATS[ending].path, "mltfr_dist.tables.checkpoints")
    return opener


def open_embedding(path: Path, tensor: str | None = None) -> EmbeddingSource:
    """Find the input embedding in a weight file or a checkpoint's folder.

    Args:
        path: the file (see :data:`FORMATS`) or the folder.
        tensor: the tensor's name; found when None.

    Raises:
        DataError: nothing readable there, or no tensor that is certainly the embedding.
    """
    try:
        return _open(path, tensor)
    except OSError as error:
        raise DataError(
            f"{error.filename or path} cannot be read: {error.strerror or error}.",
            remedy="Check that you may read it, and that its disk is there.",
        ) from None


def _open(path: Path, tensor: str | None) -> EmbeddingSource:
    if path.is_dir():
        names = local_names(path)
        if below := model_folder(names, lambda name: path / name):
            return _open(path / below, tensor)
        for name in names:
            if "/" not in name and name.endswith(PICKLE_ENDINGS):
                refuse_binary_vectors(path / name)
        layout = find_layout(names, str(path))
        return _opener(layout.ending)(path, layout, tensor)
    if not path.is_file():
        raise DataError(
            f"The checkpoint {path} does not exist.",
            remedy="Give a file, a folder or a Hugging Face id (owner/name).",
        )
    refuse_pointer(path)
    if (ending := path.suffix.lower()) in FORMATS:
        return _opener(ending)(path.parent, Layout((path.name,)), tensor)
    if path.suffix in PICKLE_ENDINGS:
        refuse_binary_vectors(path)
        raise no_weights([path.name], str(path.parent))
    raise DataError(
        f"{path} is no .safetensors and no .gguf file.",
        rule=f"Readable are {', '.join(FORMATS)}, told by the ending.",
        remedy="Give a checkpoint's folder or file; unpack archives first.",
    )
