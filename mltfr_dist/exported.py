"""Exported models: a folder that torch and this package's models read, without DeepSpeed, the data or the token tables' folders.

    exported = load_exported("model")
    exported.scores([["i1", "i7"]])  # [1, num_items + 1], column = place in exported.item_ids

Shapes: B histories, L positions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from mltfr_dist.data.batch import PADDING_IDX, RankingBatch
from mltfr_dist.errors import CheckpointError, DamagedError, DataError
from mltfr_dist.files import file_sha256
from mltfr_dist.models.recommender import Recommender
from mltfr_dist.schema import Section
from mltfr_dist.spec import ModelSpec

SCHEMA_VERSION = 4
CONFIG, MODEL, TABLES, ITEM_TOKENS, ITEMS = (
    "config.json",
    "model.safetensors",
    "tables.safetensors",
    "item_tokens.safetensors",
    "items.json",
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
class Exported:
    """A model ready to rank."""

    info: ExportInfo
    model: Recommender
    item_ids: list[str]
    """Raw ids of the items; index 0 is padding."""

    @torch.no_grad()
    def scores(self, histories: Sequence[Sequence[str]]) -> Tensor:
        """Scores of every item after each history.

        Args:
            histories: Raw item ids, oldest first; the last ``max_len`` of each are read.

        Returns:
            [B, num_items + 1], -inf in column 0.

        Raises:
            DataError: An empty history, or an id that the model does not know.
        """
        numbers = {raw: index for index, raw in enumerate(self.item_ids) if index}
        unknown = [raw for history in histories for raw in history if raw not in numbers]
        if unknown or not all(histories):
            raise DataError(
                f"Unknown item id {unknown[0]}." if unknown else "A history is empty.",
                rule="A history holds at least one id, and only ids of items.json.",
                remedy="Leave the history or the id out.",
            )
        recent = [
            [numbers[raw] for raw in history][-self.info.spec.max_len :] for history in histories
        ]
        item_ids = torch.full((len(recent), max(map(len, recent))), PADDING_IDX)  # [B, L]
        for row, history in zip(item_ids, recent, strict=True):
            row[: len(history)] = torch.tensor(history)
        return ranked(self.model, item_ids)


@torch.no_grad()
def ranked(model: Recommender, item_ids: Tensor) -> Tensor:
    """Scores [B, num_items + 1] of every item after each history [B, L]; -inf in column 0."""
    none = torch.zeros(0, dtype=torch.int64)
    batch = RankingBatch(item_ids, torch.zeros(len(item_ids), dtype=torch.int64), none, none)
    scores: Tensor = model(batch.to(next(model.parameters()).device))
    return scores


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
    item_ids: list[str] = json.loads((folder / ITEMS).read_text())
    return Exported(info, model.eval(), item_ids)


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
