"""Exported models: a folder that is read without DeepSpeed, the data or the token tables' folders.

exported = load_exported("model")
exported.recommend(["i1", "i7"], k=5)
exported.scores([["i1", "i7"]])  # [1, num_items + 1], column = index in exported.item_ids
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors.torch import load_file

from mltfr_dist.errors import CheckpointError, DamagedError
from mltfr_dist.files import file_sha256
from mltfr_dist.ranking import ItemMap, Ranker
from mltfr_dist.schema import Section
from mltfr_dist.spec import ModelSpec

SCHEMA_VERSION = 4
CONFIG, MODEL, TABLES, ITEM_TOKENS, ITEMS, TITLES = (
    "config.json",
    "model.safetensors",
    "tables.safetensors",
    "item_tokens.safetensors",
    "items.json",
    "titles.json",
)
FEATURES = "features"
"""Name of the one tensor of ``item_tokens.safetensors``, [num_items + 1, C]."""


class ExportInfo(Section):
    """``config.json``: what the model is."""

    schema_version: int = SCHEMA_VERSION
    mltfr_dist: str
    """Release that wrote it."""
    spec: ModelSpec
    sha256: dict[str, str]
    """File name to hash."""


@dataclass(frozen=True)
class Exported(Ranker):
    """A model ready to rank."""

    info: ExportInfo


def load_exported(folder: str | Path) -> Exported:
    """Read what `mltfr export` wrote; the model is in evaluation mode, on the CPU.

    Raises:
        CheckpointError: Missing, damaged, or of another schema version.
    """
    folder = Path(folder)
    info = read_info(folder)
    for name, digest in info.sha256.items():
        if not (folder / name).exists() or file_sha256(folder / name) != digest:
            raise DamagedError(
                f"{folder / name} is missing or damaged.",
                rule=f"Its sha256 must equal the one in {CONFIG}.",
                remedy="Export the run again.",
            )
    rows = load_file(folder / TABLES) if info.spec.tables else {}
    has_tokens = ITEM_TOKENS in info.sha256
    features = load_file(folder / ITEM_TOKENS)[FEATURES] if has_tokens else None
    model = info.spec.build(rows, features)
    model.load_state_dict(load_file(folder / MODEL))
    ids: list[str] = json.loads((folder / ITEMS).read_text())
    titles: list[str | None] = [None] * len(ids)
    if TITLES in info.sha256:
        titles = json.loads((folder / TITLES).read_text())
    items = ItemMap(ids, titles, str(folder / ITEMS))
    return Exported(model.eval(), items, info.spec.max_len, info)


def read_info(folder: str | Path) -> ExportInfo:
    """``config.json`` of an exported model.

    Raises:
        CheckpointError: Missing, damaged, or of another schema version.
    """
    path = Path(folder) / CONFIG
    try:
        content: Any = json.loads(path.read_text())
        version = content.get("schema_version") if isinstance(content, dict) else None
        if version != SCHEMA_VERSION:
            raise CheckpointError(
                f"{path} has schema version {version}; this program reads {SCHEMA_VERSION}.",
                remedy="Use the mltfr_dist release that wrote it, or export the run again.",
            )
        return ExportInfo.model_validate(content)
    except (OSError, ValueError, ValidationError) as error:
        raise DamagedError(
            f"{folder} is no exported model: {error}.", remedy="Write one with `mltfr export`."
        ) from None
