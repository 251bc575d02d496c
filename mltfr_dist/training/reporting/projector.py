"""Item vectors for TensorBoard's projector: the most popular items, with their titles."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from mltfr_dist.config import RunConfig
from mltfr_dist.data.shards.manifest import (
    ITEMS_NAME,
    Manifest,
    open_map,
    read_manifest,
    read_map,
)
from mltfr_dist.files import write_atomically
from mltfr_dist.models.recommender import Recommender

CONFIG, VECTORS, LABELS = "projector_config.pbtxt", "item_vectors.tsv", "items.tsv"

DESCRIPTION = f"""embeddings {{
  tensor_name: "items"
  tensor_path: "{VECTORS}"
  metadata_path: "{LABELS}"
}}
"""


class Projected(NamedTuple):
    """The most popular items, and the vectors that score them."""

    vectors: np.ndarray
    """[n, D]."""
    shown: dict[str, list[Any]]
    """Columns of `items.parquet`, n rows."""


def projected(config: RunConfig, model: Recommender) -> Projected | None:
    """The `tracking.projector_items` most popular items; None where these are 0. All ranks must
    call.

    Args:
        config: The run.
        model: As it is read from a checkpoint; no parameter is gathered.

    Raises:
        DataError: `items.parquet` is not what the manifest says.
    """
    if not config.tracking.projector_items:
        return None
    folder = config.data.path
    manifest = read_manifest(folder)
    items = read_map(folder, manifest, ITEMS_NAME, ["item_index", "count"])
    numbers, counts = items["item_index"].to_numpy(), items["count"].to_numpy()
    chosen = np.lexsort((numbers, -counts))[: config.tracking.projector_items]
    with torch.no_grad():
        ids = torch.from_numpy(numbers[chosen].copy())
        vectors = model.vectors(ids).float().cpu().numpy()
    return Projected(vectors, _rows(folder, manifest, chosen))


def _rows(folder: Path, manifest: Manifest, indices: np.ndarray) -> dict[str, list[Any]]:
    """Rows of `items.parquet`, of which only the row groups that hold them are read."""
    with open_map(folder, manifest, ITEMS_NAME) as file:
        sizes = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
        ends = np.cumsum(sizes)
        groups = np.searchsorted(ends, indices, side="right")
        needed = np.unique(groups)
        starts = np.cumsum([0, *(sizes[n] for n in needed)])[:-1]  # in what is read
        moved = indices - (ends - sizes)[groups] + starts[np.searchsorted(needed, groups)]
        return file.read_row_groups(needed.tolist()).take(moved).to_pydict()


def write_projector(folder: Path, items: Projected) -> None:
    """Write items into a folder with an event file: TensorBoard looks for projectors beside
    those.
    """
    shown = items.shown
    np.savetxt(folder / VECTORS, items.vectors, fmt="%.6g", delimiter="\t")
    rows = zip(shown["title"], shown["item_id"], shown["count"], strict=True)
    lines = [f"{field(t or i)}\t{field(i)}\t{count}" for t, i, count in rows]
    write_atomically(folder / LABELS, "\n".join(["title\titem_id\tcount", *lines]) + "\n")
    write_atomically(folder / CONFIG, DESCRIPTION)


def field(text: str) -> str:
    """``text`` as one field of a table of lines and tabs."""
    return "".join(c if c.isprintable() else " " for c in text)
