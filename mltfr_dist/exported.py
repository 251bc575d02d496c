"""Exported models: a folder that is read without DeepSpeed, the data or the token tables' folders.

It has the layout of the Hugging Face hub (config.json, model.safetensors, README.md), holds
tensors, JSON and the items as Parquet, and nothing in it is executed. Tables are folded
(models/folded.py): of rows that a history may be given it holds what the model makes of them; a
table that is searched as a whole stays.

exported = load_exported("model")
exported.recommend(["i1", "i7"], k=5)
exported.scores([["i1", "i7"]])  # [1, num_items + 1], column = index in exported.item_ids
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow.parquet as pq
import torch
from safetensors import safe_open

from mltfr_dist.errors import CheckpointError, DamagedError
from mltfr_dist.files import ALIGNMENT, file_sha256
from mltfr_dist.headers import parse_header
from mltfr_dist.models.divided_rows import Division
from mltfr_dist.models.folded import folded
from mltfr_dist.models.initial import undrawn_items
from mltfr_dist.models.recommender import Recommender
from mltfr_dist.ranking import ItemMap, Ranker
from mltfr_dist.schema import Section
from mltfr_dist.serving.explaining import NamedRows, Tokens
from mltfr_dist.spec import ModelSpec

SCHEMA_VERSION = 6
CONFIG, MODEL, TABLES, ITEM_TOKENS, ITEMS = (
    "config.json",
    "model.safetensors",
    "tables.safetensors",
    "item_tokens.safetensors",
    "items.parquet",
)
TOKENS, CARD, ONNX_MODEL = "tokens.json", "README.md", "model.onnx"
FEATURES = "features"
"""Name of the one tensor of ``item_tokens.safetensors``, [num_items + 1, C]."""


class ExportInfo(Section):
    """``config.json``: what the model is."""

    schema_version: int = SCHEMA_VERSION
    mltfr_dist: str
    """Release that wrote it."""
    model_type: str = "mltfr"
    format: Literal["safetensors", "onnx"] = "safetensors"
    spec: ModelSpec
    folded: dict[str, int]
    """Tables of which the model holds what it makes of their rows, and how many rows they had."""
    folded_bytes: int
    """Of these rows."""
    data: dict[str, str]
    """Name and sha256 of what the data was prepared from, and sha256 of its manifest."""
    licences: dict[str, str | None]
    """Of each token table, as its source states it."""
    sha256: dict[str, str]
    """File name to hash."""


@dataclass(frozen=True)
class Exported(Ranker):
    """A model ready to rank."""

    info: ExportInfo
    named_rows: tuple[NamedRows, ...] = ()

    @property
    def tokens(self) -> Sequence[Tokens]:
        """Names of those rows of each table that may be kept."""
        return self.named_rows


def load_exported(folder: str | Path, divide: Callable[[int], Division] | None = None) -> Exported:
    """Read what `mltfr export` wrote; the model is in evaluation mode, on the CPU.

    Its weights are the file's own pages, but for few: they take no memory of this process, and the
    file must stay as it is.

    Args:
        folder: To read.
        divide: How rows of the item table are read where it is not to be held; None: it is.

    Raises:
        CheckpointError: Missing, damaged, or of another schema version.
    """
    folder = Path(folder)
    info = read_info(folder)
    check_files(folder, info)
    if info.format == "onnx":
        raise CheckpointError(
            f"{folder} is an ONNX export.",
            rule="ONNX models are run by an ONNX runtime.",
            remedy=f"Open {folder / ONNX_MODEL} with onnxruntime, or export the run as "
            f"safetensors.",
        )
    return Exported(
        load_model(folder, info, divide),
        ItemMap.of(pq.ParquetFile(folder / ITEMS), str(folder / ITEMS)),
        info.spec.max_len,
        info,
        _named_rows(folder, info),
    )


def load_model(
    folder: Path, info: ExportInfo, divide: Callable[[int], Division] | None = None
) -> Recommender:
    """The model alone of an export whose files are what was written: see :func:`load_exported`."""
    rows = _mapped(folder / TABLES) if TABLES in info.sha256 else {}
    rows |= {name: torch.zeros(count, 1) for name, count in info.folded.items()}
    has_features = ITEM_TOKENS in info.sha256
    features = _mapped(folder / ITEM_TOKENS)[FEATURES] if has_features else None
    with undrawn_items():
        model = info.spec.build(rows, features, divide).eval()
    if info.folded:
        model = folded(model)
    state = _mapped(folder / MODEL, None if divide is None else set(model.state_dict()))
    model.load_state_dict(state, assign=True)
    return model.eval()


def _mapped(file: Path, names: set[str] | None = None) -> dict[str, torch.Tensor]:
    """Tensors of a file as its own pages, which processes share; copies of those that do not begin
    where torch would have put them, for products may then round otherwise.

    Args:
        file: To map.
        names: Those to map, as far as they are there; None: all.
    """
    with safe_open(file, framework="pt") as opened:
        found = set(opened.keys()) if names is None else names & set(opened.keys())
        stored = {name: opened.get_tensor(name) for name in found}
    return {n: t.clone() if t.data_ptr() % ALIGNMENT else t for n, t in stored.items()}


def check_files(folder: Path, info: ExportInfo) -> None:
    """Whether all files are there, as they were written.

    Raises:
        DamagedError: One is not.
    """
    for name, digest in info.sha256.items():
        if not (folder / name).exists() or file_sha256(folder / name) != digest:
            raise DamagedError(
                f"{folder / name} is missing or damaged.",
                rule=f"Its sha256 must equal the one in {CONFIG}.",
                remedy="Export the run again.",
            )


def _named_rows(folder: Path, info: ExportInfo) -> tuple[NamedRows, ...]:
    if TOKENS not in info.sha256:
        return ()
    names = json.loads((folder / TOKENS).read_text())
    return tuple(
        NamedRows(name, dict(zip(names[name]["rows"], names[name]["tokens"], strict=True)))
        for name in info.spec.tables
    )


def read_info(folder: str | Path) -> ExportInfo:
    """``config.json`` of an exported model.

    Raises:
        CheckpointError: Missing, damaged, or of another schema version.
    """
    path = Path(folder) / CONFIG
    try:
        info, _ = parse_header(
            path.read_bytes(),
            ExportInfo,
            (SCHEMA_VERSION,),
            what=path,
            remedy="Use the mltfr_dist release that wrote it, or export the run again.",
            error=CheckpointError,
        )
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(
            f"{folder} is no exported model: {error}.", remedy="Write one with `mltfr export`."
        ) from None
    return info
