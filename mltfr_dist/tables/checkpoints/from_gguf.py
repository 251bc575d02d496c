"""Embeddings in GGUF files, whole or split; dequantised by the `gguf` library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from mltfr_dist.errors import DataError
from mltfr_dist.tables import choose
from mltfr_dist.tables.checkpoints.gguf_header import GgufHeader, GgufTensor
from mltfr_dist.tables.checkpoints.layout import MOST_PARTS, PART, Layout
from mltfr_dist.tables.checkpoints.source import EmbeddingSource, listing
from mltfr_dist.tables.vocabulary import Vocabulary, find_vocabulary, from_ggml

TENSOR = "token_embd.weight"
TOKENS = "tokenizer.ggml.tokens"
_DAMAGED = "Fetch the file again; it is damaged."


def open_gguf(folder: Path, layout: Layout, asked: str | None) -> EmbeddingSource:
    """The input embedding of a GGUF file or of the parts of a split one.

    Args:
        folder: of the files.
        layout: names one of the files or all; the other parts are found beside it.
        asked: the tensor's name; None: the usual one.

    Raises:
        DataError: no such tensor, a part that is missing, or a file that cannot be read.
    """
    paths, missing = split_parts(folder / layout.files[0])
    headers = [_header(path, len(paths) + len(missing)) for path in paths]
    name = asked or TENSOR
    holders = [header for header in headers if name in header.tensors]
    if len(holders) > 1:
        raise DataError(
            f"{' and '.join(header.path.name for header in holders)} both hold {name}.",
            remedy="Fetch the parts again; they are not of one model.",
        )
    tensor = holders[0].tensors[name] if holders else None
    if tensor is None or len(tensor.shape) != 2:
        _refuse_missing(missing, f"the tensor {name}")
        flat = [
            (one.name, one.shape[::-1]) for header in headers for one in header.tensors.values()
        ]
        raise DataError(
            f"{folder / layout.files[0]} has no two-dimensional tensor {name!r}.",
            rule=f"Its two-dimensional tensors are: {listing(flat)}.",
            remedy="Say which one is the embedding with --tensor NAME.",
        )
    everything = [one for header in headers for one in header.tensors]
    if beside := choose.siblings(name, everything):
        raise DataError(
            f"{holders[0].path} holds {', '.join(beside[:4])} beside {name}.",
            rule="They change what its values mean, and are not applied.",
            remedy="Use a GGUF file of the merged model in another format, such as Q8_0.",
        )
    vocabulary = next((header for header in headers if TOKENS in header), None)
    if vocabulary is None:
        _refuse_missing(missing, "the vocabulary")
    licences = [header.get("general.license") for header in headers]
    ignored = f"; beside it and not read: {', '.join(layout.ignored)}" if layout.ignored else ""
    return _source(
        holders[0].path,
        tensor,
        ("asked for" if asked else "its name (GGUF)") + ignored,
        next((str(one) for one in licences if one is not None), None),
        vocabulary,
    )


def _source(
    path: Path, tensor: GgufTensor, chosen_by: str, licence: str | None, tokens: GgufHeader | None
) -> EmbeddingSource:
    kind = gguf.GGMLQuantizationType(tensor.kind)
    dim, num_rows = tensor.shape  # GGUF states shapes column count first
    row_bytes = _row_bytes(tensor)
    try:
        gguf.dequantize(np.zeros((1, row_bytes), dtype=np.uint8), kind)
    except NotImplementedError:
        raise DataError(
            f"{tensor.name} in {path} is stored as {kind.name}, which cannot be read.",
            remedy="Use Q8_0 or F16.",
        ) from None

    def read_rows(start: int, stop: int) -> tuple[bytes, torch.Tensor]:
        # Plain reads: pages of a mapping would count as this process's memory.
        with path.open("rb") as file:
            file.seek(tensor.offset + start * row_bytes)
            raw = file.read((stop - start) * row_bytes)
        if len(raw) != (stop - start) * row_bytes:
            raise DataError(
                f"{path} ends before its tensor {tensor.name} does.",
                remedy="Fetch the file again; it is cut short.",
            )
        stored = np.frombuffer(raw, dtype=np.uint8).reshape(stop - start, row_bytes)
        rows = gguf.dequantize(stored, kind)  # [n, D_m]
        return raw, torch.from_numpy(np.array(rows, dtype=np.float32))

    files = dict.fromkeys([path.name] + ([tokens.path.name] if tokens else []))
    return EmbeddingSource(
        tuple(files),
        tensor.name,
        chosen_by,
        num_rows,
        dim,
        kind.name,
        licence,
        lambda: _vocabulary(tokens) if tokens else find_vocabulary(path.parent),
        read_rows,
    )


def _row_bytes(tensor: GgufTensor) -> int:
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor.kind)]
    return int(tensor.shape[0] // block * size)


def _header(path: Path, num_parts: int) -> GgufHeader:
    """The header of a file that is the right part and whose tensors lie within it and apart."""
    header = GgufHeader(path)
    size, end, before = path.stat().st_size, 0, ""
    for tensor in sorted(header.tensors.values(), key=lambda one: one.offset):
        if tensor.kind not in gguf.GGML_QUANT_SIZES:
            raise _damaged(path, f"its tensor {tensor.name} has the unknown format {tensor.kind}")
        block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor.kind)][0]
        if not tensor.shape or 0 in tensor.shape or tensor.shape[0] % block:
            raise _damaged(path, f"its tensor {tensor.name} has the shape {list(tensor.shape)}")
        if tensor.offset < end:
            raise _damaged(path, f"its tensors {before} and {tensor.name} overlap")
        end, before = tensor.offset + _row_bytes(tensor) * math.prod(tensor.shape[1:]), tensor.name
        if end > size:
            raise _damaged(path, f"its tensor {tensor.name} ends at byte {end:,} of {size:,}")
    count, number = header.get("split.count"), header.get("split.no")
    if count is not None and count > 1:
        match = PART.fullmatch(path.name)
        if (
            match is None
            or (int(match[3]), int(match[2]) - 1) != (count, number)
            or count != num_parts
        ):
            raise DataError(
                f"{path} says that it is part {number} (from 0) of {count} of a model.",
                rule="The parts are found by their names, NAME-00001-of-0000N.gguf.",
                remedy="Give the parts the names that they had.",
            )
    return header


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"{path} cannot be read as GGUF: {what}.", remedy=_DAMAGED)


def split_parts(path: Path) -> tuple[list[Path], list[Path]]:
    """The parts of the model that ``path`` is one of: those that are there, and the others."""
    match = PART.fullmatch(path.name)
    if match is None or not 0 < int(match[3]) <= MOST_PARTS:
        return [path], []
    names = [
        f"{match[1]}-{number:05d}-of-{match[3]}{match[4]}" for number in range(1, int(match[3]) + 1)
    ]
    paths = [path.with_name(name) for name in names]
    return [one for one in paths if one.is_file()], [one for one in paths if not one.is_file()]


def _refuse_missing(missing: Sequence[Path], what: str) -> None:
    if missing:
        raise DataError(
            f"None of the parts that are here holds {what}; missing: "
            f"{', '.join(str(path) for path in missing[:4])}.",
            remedy="Fetch the missing parts into the same folder.",
        )


def has_tensor(path: Path, asked: str | None) -> bool:
    """Whether a GGUF file holds the embedding."""
    return (asked or TENSOR) in GgufHeader(path).tensors


def has_tokens(path: Path) -> bool:
    """Whether a GGUF file holds a vocabulary."""
    return TOKENS in GgufHeader(path)


def _vocabulary(header: GgufHeader) -> Vocabulary:
    tokens = _texts(header, TOKENS)
    types = header.get("tokenizer.ggml.token_type")
    if types is not None:
        if not isinstance(types, list) or any(type(kind) is not int for kind in types):
            raise _damaged(header.path, "its tokenizer.ggml.token_type is no list of integers")
        if len(types) != len(tokens):
            raise DataError(
                f"{header.path} names {len(tokens)} tokens but {len(types)} token types.",
                remedy="Fetch the file again.",
            )
    model: Any = header.get("tokenizer.ggml.model")
    if not isinstance(model, str):
        raise DataError(
            f"{header.path} does not say what kind of tokenizer it has (tokenizer.ggml.model).",
            rule="How its tokens are spelled depends on it.",
            remedy="Give the tokenizer.json of this model with --vocabulary PATH.",
        )
    return from_ggml(tokens, types, model, header.path.name)


def _texts(header: GgufHeader, key: str) -> list[str]:
    value = header.get(key)
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value) or not value:
        raise _damaged(header.path, f"its {key} is no list of texts, or an empty one")
    return value
