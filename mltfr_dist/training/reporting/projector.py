"""Item vectors for TensorBoard's projector: the most popular items, with their titles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from mltfr_dist.config import RunConfig
from mltfr_dist.data.shards.manifest import ITEMS_NAME, read_manifest, read_map
from mltfr_dist.files import write_atomically
from mltfr_dist.models.recommender import Recommender

CONFIG, VECTORS, LABELS = "projector_config.pbtxt", "item_vectors.tsv", "items.tsv"

DESCRIPTION = f"""embeddings {{
  tensor_name: "items"
  tensor_path: "{VECTORS}"
  metadata_path: "{LABELS}"
}}
"""


def write_projector(place: Path, config: RunConfig, model: Recommender) -> None:
    """Write the vectors that score the `tracking.projector_items` most popular items.

    Args:
        place: A folder with an event file: TensorBoard looks for projectors beside those.
        config: The run.
        model: A whole model, as it is read from a checkpoint; nothing is gathered.

    Raises:
        DataError: `items.parquet` is not what the manifest says.
    """
    folder = config.data.path
    items = read_map(folder, read_manifest(folder), ITEMS_NAME)
    numbers, counts = items["item_index"].to_numpy(), items["count"].to_numpy()
    chosen = np.lexsort((numbers, -counts))[: config.tracking.projector_items]
    shown = items.take(chosen).to_pydict()
    with torch.no_grad():
        ids = torch.from_numpy(numbers[chosen].copy())
        vectors = model.backbone.item_embedding.weight.detach().float().cpu()[ids]
    np.savetxt(place / VECTORS, vectors.numpy(), fmt="%.6g", delimiter="\t")
    rows = zip(shown["title"], shown["item_id"], shown["count"], strict=True)
    lines = [f"{field(t or i)}\t{field(i)}\t{count}" for t, i, count in rows]
    write_atomically(place / LABELS, "\n".join(["title\titem_id\tcount", *lines]) + "\n")
    write_atomically(place / CONFIG, DESCRIPTION)


def field(text: str) -> str:
    """``text`` as one field of a table of lines and tabs."""
    return "".join(c if c.isprintable() else " " for c in text)
