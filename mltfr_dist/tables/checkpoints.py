"""Opens one embedding tensor of a checkpoint, whatever its format, and reads it in blocks of rows.

Shapes: V_m rows and D_m columns of the tensor as stored.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from mltfr_dist.errors import DataError
from mltfr_dist.tables import choose
from mltfr_dist.tables.vocabulary import Vocabulary, find_vocabulary, from_ggml

BLOCK_BYTES = 1 << 20
"""Size of a block of rows in float32: small beside any table, large enough to read fast."""

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
"""Number formats of safetensors that are token embeddings as they stand (integers would need their scales)."""


@dataclass(frozen=True)
class EmbeddingSource:
    """One tensor in one file, not yet read.

    Attributes:
        files: names of the files that the table comes from.
        tensor: the tensor's name; ``chosen_by`` says how it was found.
        num_rows: V_m as stored. dim: D_m.
        dtype: the stored number format.
        licence: as the checkpoint states it, or None.
        read_vocabulary: reads the checkpoint's own vocabulary.
        read_rows: (start, stop) to the stored bytes and the rows [stop - start, D_m] in float32.
    """

    files: tuple[str, ...]
    tensor: str
    chosen_by: str
    num_rows: int
    dim: int
    dtype: str
    licence: str | None
    read_vocabulary: Callable[[], Vocabulary]
    read_rows: Callable[[int, int], tuple[bytes | memoryview, torch.Tensor]]

    def blocks(self, digest: hashlib._Hash | None = None) -> Iterator[tuple[int, torch.Tensor]]:
        """All rows in order as (index of the first row, rows [n, D_m] float32); ``digest`` is fed the stored bytes."""
        step = max(1, BLOCK_BYTES // (4 * self.dim))
        for start in range(0, self.num_rows, step):
            raw, rows = self.read_rows(start, min(start + step, self.num_rows))
            if digest is not None:
                digest.update(raw)
            yield start, rows


def open_embedding(path: Path, tensor: str | None = None) -> EmbeddingSource:
    """Find the input embedding in a ``.safetensors`` or ``.gguf`` file or a checkpoint folder.

    Args:
        path: the file or folder.
        tensor: the tensor's name; found when None.

    Raises:
        DataError: nothing readable there, or no tensor that is certainly the embedding.
    """
    if path.is_dir():
        found = sorted(path.glob("*.safetensors"))
        ggufs = sorted(path.glob("*.gguf"))
        if (path / choose.INDEX_FILE).is_file():
            names = choose.read_index(path / choose.INDEX_FILE)
            return _open_safetensors(
                {name: path / file for name, file in names.items()}, path, tensor
            )
        if (path / choose.WEIGHT_FILE) in found:
            found = [path / choose.WEIGHT_FILE]
        if found:
            return _open_safetensors(
                {name: file for file in found for name in _tensor_names(file)}, path, tensor
            )
        if len(ggufs) == 1:
            return _open_gguf(ggufs[0], tensor)
        if ggufs:
            names_ = ", ".join(file.name for file in ggufs)
            raise DataError(
                f"{path} holds {len(ggufs)} GGUF files: {names_}.",
                remedy="Give the path of one of them.",
            )
        raise choose.no_weights([file.name for file in path.iterdir()], str(path))
    if not path.is_file():
        raise DataError(
            f"The checkpoint {path} does not exist.",
            remedy="Give a file, a folder or a Hugging Face id (owner/name).",
        )
    if path.suffix == ".safetensors":
        return _open_safetensors(dict.fromkeys(_tensor_names(path), path), path.parent, tensor)
    if path.suffix == ".gguf":
        return _open_gguf(path, tensor)
    if path.suffix in choose.PICKLE_ENDINGS:
        raise choose.no_weights([path.name], str(path.parent))
    raise DataError(
        f"{path} is no .safetensors and no .gguf file.",
        remedy="Give a checkpoint's folder or file.",
    )


# --- safetensors -------------------------------------------------------------------------------------------------


def _safe_open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"{file} cannot be read as safetensors: {error}.",
            remedy="Fetch the file again; it is damaged.",
        ) from None


def _tensor_names(file: Path) -> list[str]:
    with _safe_open(file) as handle:
        return list(handle.keys())


def _describe(names: dict[str, Path]) -> str:
    """The two-dimensional tensors with their shapes, most rows first (files that are not here are left out)."""
    shapes: dict[str, list[int]] = {}
    for file in sorted(set(names.values())):
        if file.is_file():
            with _safe_open(file) as handle:
                shapes |= {name: handle.get_slice(name).get_shape() for name in handle.keys()}  # noqa: SIM118 (not a dict)
    flat = sorted(
        ((shape, name) for name, shape in shapes.items() if len(shape) == 2), reverse=True
    )
    return _listing([(name, shape) for shape, name in flat])


def _listing(tensors: list[tuple[str, list[int]]]) -> str:
    shown = [f"{name} [{rows}, {columns}]" for name, (rows, columns) in tensors[:12]]
    return (", ".join(shown) or "none") + (
        f" and {len(tensors) - 12} more" if len(tensors) > 12 else ""
    )


def _open_safetensors(names: dict[str, Path], folder: Path, asked: str | None) -> EmbeddingSource:
    architecture, note = choose.names_from_config(folder) if asked is None else ((), "asked for")
    name = choose.choose_tensor(
        names, asked=asked, architecture=architecture, describe=lambda: _describe(names)
    )
    file = names[name]
    if not file.is_file():
        raise DataError(
            f"{file} is missing, which holds {name} by {choose.INDEX_FILE}.",
            remedy="Fetch that file.",
        )
    with _safe_open(file) as handle:
        if name not in handle.keys():  # noqa: SIM118 (not a dict)
            raise DataError(
                f"{file} does not hold {name}, against {choose.INDEX_FILE}.",
                remedy="Fetch the checkpoint again.",
            )
        shape, dtype = handle.get_slice(name).get_shape(), handle.get_slice(name).get_dtype()
    if len(shape) != 2:
        raise DataError(
            f"{name} in {file} has shape {shape}; an embedding has two dimensions.",
            rule=f"The checkpoint's two-dimensional tensors are: {_describe(names)}.",
            remedy="Say which one it is with tensor=NAME.",
        )
    if dtype not in FLOAT_DTYPES:
        raise DataError(
            f"{name} in {file} is stored as {dtype}.",
            rule=f"Readable are {', '.join(FLOAT_DTYPES)}; integers mean nothing without their scales.",
            remedy="Use an unquantised checkpoint or a GGUF file.",
        )

    def read_rows(start: int, stop: int) -> tuple[memoryview, torch.Tensor]:
        # A handle per block: pages of its mapping count as this process's memory until it is closed.
        with _safe_open(file) as handle:
            stored: torch.Tensor = handle.get_slice(name)[start:stop].contiguous()  # [n, D_m]
            return stored.view(torch.uint8).numpy().data, stored.to(torch.float32)

    by_config = any(name == one or name.endswith("." + one) for one in architecture)
    chosen_by = (
        f"config.json ({note})" if by_config else "asked for" if asked else f"its name ({note})"
    )
    return EmbeddingSource(
        (file.name,),
        name,
        chosen_by,
        shape[0],
        shape[1],
        dtype,
        licence_of(folder),
        lambda: find_vocabulary(folder),
        read_rows,
    )


def licence_of(folder: Path) -> str | None:
    """The ``license:`` entry at the head of a model card (README.md), or None."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    head = re.match(
        r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL
    )
    entry = re.search(r"^license:\s*(\S+)\s*$", head[1], re.MULTILINE) if head else None
    return entry[1].strip("'\"") if entry else None


# --- GGUF --------------------------------------------------------------------------------------------------------


def _open_gguf(path: Path, asked: str | None) -> EmbeddingSource:
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise DataError(
            f"{path} cannot be read as GGUF: {error}.",
            remedy="Fetch the file again; it is damaged.",
        ) from None
    if reader.byte_order == "S":
        raise DataError(
            f"{path} has the other byte order.",
            remedy="Use a GGUF file made for this kind of machine.",
        )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    # GGUF states shapes column count first.
    flat = sorted(
        ((int(t.shape[1]), int(t.shape[0]), t.name) for t in tensors.values() if len(t.shape) == 2),
        reverse=True,
    )
    listing = _listing([(name, [rows, columns]) for rows, columns, name in flat])
    name = asked or "token_embd.weight"
    if name not in {name for _, _, name in flat}:
        raise DataError(
            f"{path} has no two-dimensional tensor {name!r}.",
            rule=f"Its two-dimensional tensors are: {listing}.",
            remedy="Say which one is the embedding with tensor=NAME.",
        )
    tensor = tensors[name]
    dim, num_rows = (int(size) for size in tensor.shape)
    kind, offset, row_bytes = (
        tensor.tensor_type,
        int(tensor.data_offset),
        int(tensor.n_bytes) // num_rows,
    )

    def read_rows(start: int, stop: int) -> tuple[bytes, torch.Tensor]:
        # Plain reads: pages of the reader's mapping would count as this process's memory.
        with path.open("rb") as file:
            file.seek(offset + start * row_bytes)
            raw = file.read((stop - start) * row_bytes)
        if len(raw) != (stop - start) * row_bytes:
            raise DataError(
                f"{path} ends before its tensor {name} does.",
                remedy="Fetch the file again; it is cut short.",
            )
        stored = np.frombuffer(raw, dtype=np.uint8).reshape(stop - start, row_bytes)
        try:
            rows = gguf.dequantize(stored, kind)  # [n, D_m]
        except NotImplementedError:
            raise DataError(
                f"{name} in {path} is stored as {kind.name}, which cannot be read.",
                remedy="Use Q8_0 or F16.",
            ) from None
        return raw, torch.from_numpy(np.array(rows, dtype=np.float32))

    licence = _gguf_field(reader, "general.license")
    return EmbeddingSource(
        (path.name,),
        name,
        "asked for" if asked else "its name (GGUF)",
        num_rows,
        dim,
        kind.name,
        None if licence is None else str(licence),
        lambda: _gguf_vocabulary(reader, path),
        read_rows,
    )


def _gguf_field(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _gguf_vocabulary(reader: Any, path: Path) -> Vocabulary:
    tokens = _gguf_field(reader, "tokenizer.ggml.tokens")
    if not tokens:
        return find_vocabulary(path.parent)
    types = _gguf_field(reader, "tokenizer.ggml.token_type")
    if types is not None and len(types) != len(tokens):
        raise DataError(
            f"{path} names {len(tokens)} tokens but {len(types)} token types.",
            remedy="Fetch the file again.",
        )
    return from_ggml(tokens, types, str(_gguf_field(reader, "tokenizer.ggml.model")), path.name)
