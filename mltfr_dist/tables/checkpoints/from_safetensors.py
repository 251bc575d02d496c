"""Embeddings in safetensors files: whole or in parts, FP8 with scales, and model2vec's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mltfr_dist.errors import DataError
from mltfr_dist.tables import choose
from mltfr_dist.tables.checkpoints.layout import (
    INDEX_FILE,
    MOST_PARTS,
    PART,
    Layout,
    read_index,
)
from mltfr_dist.tables.checkpoints.scales import find_scale, scale_names
from mltfr_dist.tables.checkpoints.source import (
    EmbeddingSource,
    licence_of,
    listing,
    read_json,
    read_settings,
)
from mltfr_dist.tables.checkpoints.static import Rows, static_rows
from mltfr_dist.tables.checkpoints.stored import (
    FLOAT_DTYPES,
    StoredTensor,
    bytes_of,
    shapes,
    tensor_names,
)
from mltfr_dist.tables.vocabulary import find_vocabulary

Held = Mapping[str, Sequence[Path]]
"""Tensor name to the files that hold it."""


def open_safetensors(folder: Path, layout: Layout, asked: str | None) -> EmbeddingSource:
    """The input embedding among the safetensors files of ``folder``.

    Args:
        folder: of the checkpoint.
        layout: which files are read.
        asked: the tensor's name; found when None.

    Raises:
        DataError: no tensor that is certainly the embedding, or one that cannot be read.
    """
    held, note = _held(folder, layout)
    _refuse_adapter(folder, layout)
    settings = read_settings(folder)
    architecture = choose.names_from_config(folder, settings) if asked is None else None
    names, chosen_by = choose.choose_tensors(
        held,
        asked=asked,
        architecture=architecture or choose.Architecture(),
        where=str(folder),
        describe=lambda: _describe(held),
    )
    table = _one_of([StoredTensor.find(name, file) for name in names for file in held[name]])
    if len(table.shape) != 2 or 0 in table.shape:
        raise DataError(
            f"{table.name} in {table.file} has shape {list(table.shape)}; "
            "an embedding has two dimensions, and no empty one.",
            rule=f"The checkpoint's two-dimensional tensors are: {_describe(held)}.",
            remedy="Say which one it is with --tensor NAME.",
        )
    if table.name == choose.STATIC_NAME:
        files, dtype, num_rows, read_rows = static_rows(table, held)
    else:
        files, dtype, num_rows, read_rows = _scaled_rows(table, held, settings)
    return EmbeddingSource(
        files,
        table.name,
        chosen_by + note,
        num_rows,
        table.shape[1],
        dtype,
        licence_of(folder),
        lambda: find_vocabulary(_vocabulary_folder(folder)),
        read_rows,
    )


def needed_tensors(names: Sequence[str], held: Held | Mapping[str, str]) -> list[str]:
    """The tensors that :func:`open_safetensors` reads, given those that may be the embedding."""
    beside = [one for name in names for one in scale_names(name, choose.siblings(name, held))]
    return [*names, *beside]


def _held(folder: Path, layout: Layout) -> tuple[dict[str, list[Path]], str]:
    """The checkpoint's tensors, and for the log what lies there and is not read."""
    held: dict[str, list[Path]] = {}
    for file in layout.files:
        for name in tensor_names(folder / file):
            held.setdefault(name, []).append(folder / file)
    by_index = read_index(folder / layout.index) if layout.index else {}
    stale = bool(layout.files)  # transformers reads model.safetensors first
    for name, file in by_index.items():
        path = folder / file
        if path not in held.setdefault(name, []) and (not stale or path.is_file()):
            held[name].append(path)
    held = {name: files for name, files in held.items() if files}
    read = {file.name for files in held.values() for file in files}
    ignored = [name for name in layout.ignored if name not in read]
    if stale and set(by_index.values()) - read:
        ignored.append(str(layout.index))
    return held, f"; beside it and not read: {', '.join(ignored)}" if ignored else ""


def _refuse_adapter(folder: Path, layout: Layout) -> None:
    """Raise DataError if the folder holds an adapter that changes its base model's embedding."""
    if layout.adapter is None:
        return
    file = folder / choose.ADAPTER_CONFIG
    settings = read_json(file) if file.is_file() else {}
    if not isinstance(settings, dict):
        raise DataError(f"{file} is no JSON object.", remedy="Fetch it again; it is damaged.")
    modules = {known.removesuffix(".weight") for known in choose.KNOWN_NAMES}
    base = str(settings.get("base_model_name_or_path") or "BASE")
    keys = ("target_modules", "modules_to_save", "trainable_token_indices")
    targets = {key: set(re.findall(r"\w+", str(settings.get(key)))) for key in keys}
    stated = [f"{key} of {choose.ADAPTER_CONFIG}" for key in keys if targets[key] & modules]
    if settings.get("trainable_token_indices"):
        stated.append(f"trainable_token_indices of {choose.ADAPTER_CONFIG}")
    inside = (
        tensor_names(folder / layout.adapter) if layout.adapter.endswith(".safetensors") else ()
    )
    of_embedding = [name for name in inside if not modules.isdisjoint(name.split("."))]
    is_alone = layout.files == (layout.adapter,)
    changed = [name for name in of_embedding if choose.is_adapter(name)] or (
        [] if is_alone and of_embedding else of_embedding + stated
    )
    if changed:
        raise choose.unmerged(changed, str(folder), base)
    if is_alone and not of_embedding:
        raise DataError(
            f"{folder} holds a fine-tuning adapter without an embedding of its own.",
            rule="Its rows are those of its base model.",
            remedy=f"Give the base model: {base}.",
        )


def _one_of(copies: Sequence[StoredTensor]) -> StoredTensor:
    """The one tensor that all of ``copies`` are."""
    first = copies[0]
    for other in copies[1:]:
        if first.equals(other):
            continue
        same_name = first.name == other.name
        files = len({one.file for one in copies}) > 1
        shown = [f"{one.name} in {one.file.name}" if files else one.name for one in copies]
        raise DataError(
            f"{len(copies)} tensors could be the input embedding ({', '.join(shown[:12])}), "
            "and they differ.",
            rule="The two-dimensional ones among them are: "
            f"{listing([(one.name, one.shape) for one in copies])}.",
            remedy=f"Give the path of the right file ({first.file} or {other.file})."
            if same_name
            else "Say which one it is with --tensor NAME.",
        )
    return first


def _scaled_rows(table: StoredTensor, held: Held, settings: Mapping[str, Any]) -> Rows:
    """How the rows of a table are read that is one tensor, with scales or without."""
    everything = {**_other_parts(table.file), **held}
    beside = choose.siblings(table.name, everything)
    if adapters := [name for name in beside if choose.is_adapter(name)]:
        raise choose.unmerged(adapters, str(table.file.parent))
    if table.dtype not in FLOAT_DTYPES:
        others = f" beside {', '.join(beside[:4])}" if beside else ""
        raise DataError(
            f"{table.name} in {table.file} is stored as {table.dtype}{others}.",
            rule=f"Readable are {', '.join(FLOAT_DTYPES)}; "
            "integers mean nothing without their scales.",
            remedy="Use an unquantised checkpoint or a GGUF file.",
        )
    names = scale_names(table.name, beside)
    stored = [StoredTensor.find(name, file) for name in names for file in everything[name]]
    scale = find_scale(table, _one_of(stored) if stored else None, settings, everything)

    def read_rows(start: int, stop: int) -> tuple[bytes | memoryview, torch.Tensor]:
        rows = table.rows(start, stop)
        values = rows.to(torch.float32)
        if scale is None:
            return rows.view(torch.uint8).numpy().data, values
        raw, factors = scale.of_rows(start, stop, table.shape[1])
        return bytes_of(rows) + raw, values.mul_(factors)

    files = dict.fromkeys([table.file.name] + ([scale.stored.file.name] if scale else []))
    dtype = f"{table.dtype} x {scale}" if scale else table.dtype
    return tuple(files), dtype, table.shape[0], read_rows


def _other_parts(file: Path) -> dict[str, list[Path]]:
    """The tensors in the other parts of the model that ``file`` is a part of."""
    index = file.with_name(INDEX_FILE)
    if index.is_file() and file.name in (by_index := read_index(index)).values():
        return {name: [file.with_name(other)] for name, other in by_index.items()}
    held: dict[str, list[Path]] = {}
    if match := PART.fullmatch(file.name):
        for number in range(1, min(int(match[3]), MOST_PARTS) + 1):
            other = file.with_name(f"{match[1]}-{number:05d}-of-{match[3]}{match[4]}")
            if other.is_file():
                for name in tensor_names(other):
                    held.setdefault(name, []).append(other)
    return held


def _vocabulary_folder(folder: Path) -> Path:
    """Where the tokenizer lies: beside the weights, but for diffusers' text encoders."""
    name = folder.absolute().name  # of `.`, too
    beside = folder / ".." / name.replace("text_encoder", "tokenizer")
    return beside if name.startswith("text_encoder") and beside.is_dir() else folder


def _describe(held: Held) -> str:
    """The two-dimensional tensors with their shapes (files that are not here are left out)."""
    files = {file for several in held.values() for file in several}
    return listing([one for file in sorted(files) if file.is_file() for one in shapes(file)])
