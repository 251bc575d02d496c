"""Exports and indexes a model whose item table lies divided in a checkpoint, in a process whose
memory is measured; called by test_stored_items.py with a folder and a number of items.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from support import tiny_config

from mltfr_dist.config import RunConfig
from mltfr_dist.config.index import IndexConfig
from mltfr_dist.distributed import checkpoint
from mltfr_dist.distributed.checkpoint import MODEL, Progress
from mltfr_dist.distributed.divided_files import MODEL_ROWS, file_name
from mltfr_dist.distributed.ranks import ALONE
from mltfr_dist.distributed.resources import peak_memory_bytes
from mltfr_dist.distributed.row_layout import RowLayout
from mltfr_dist.distributed.tensor_file import Streamed, write_tensors
from mltfr_dist.exported import load_exported
from mltfr_dist.serving.items import ItemMap
from mltfr_dist.serving.recall import exact
from mltfr_dist.serving.texts import Texts
from mltfr_dist.serving.vector_index import build, plan
from mltfr_dist.training.build import build_model, load_model
from mltfr_dist.training.inputs import Inputs, load_inputs
from mltfr_dist.training.using.export import publish
from mltfr_dist.training.using.index import write_vectors
from mltfr_dist.training.using.inference import LoadedRun

NUM_FILES = 3


def made(folder: Path, num_items: int, **changes: object) -> tuple[RunConfig, Inputs]:
    """A configuration of a bare backbone, and inputs of so many items."""
    given = {"mltfr__enabled": False, "mltfr__tables": [], "backbone__hidden_dim": 64} | changes
    config = tiny_config(folder, **given)
    inputs = load_inputs(config)
    manifest = inputs.manifest.model_copy(update={"num_items": num_items})
    return config, replace(inputs, manifest=manifest)


def write_checkpoint(place: Path, config: RunConfig, inputs: Inputs) -> None:
    """What three ranks would save: rows of a function of their ids, and the rest as drawn."""
    small = replace(inputs, manifest=inputs.manifest.model_copy(update={"num_items": 9}))
    state = build_model(config, small, with_consensus=False).state_dict()
    (table,) = (name for name in state if "item_embedding" in name and "adapter" not in name)
    num_rows = len(state.pop(table)) - 9 + inputs.manifest.num_items
    partial = checkpoint.begin(place)
    hashes = {MODEL: write_tensors(partial / MODEL, state)}
    layout, dim = RowLayout(num_rows, NUM_FILES), config.backbone.hidden_dim
    for rank, (first, end) in enumerate(pairwise(layout.bounds)):
        ids = torch.split(layout.ids_between(first, end), 1 << 15)
        rows = Streamed(torch.float32, (end - first, dim), (rows_of(block, dim) for block in ids))
        name = file_name(MODEL_ROWS, rank, NUM_FILES)
        hashes[name] = write_tensors(partial / name, {table: rows})
    checkpoint.finish(place, Progress(stage="train", step=1), hashes)


def rows_of(ids: torch.Tensor, dim: int) -> torch.Tensor:
    columns = torch.arange(dim)
    return torch.sin(ids[:, None] * 0.37 + columns) * (ids != 0)[:, None]


def opened(
    folder: Path, config: RunConfig, inputs: Inputs, *, items_stay: bool = True
) -> LoadedRun:
    model = load_model(config, inputs, folder, ALONE, with_consensus=False, items_stay=items_stay)
    num_items = inputs.manifest.num_items
    ids = pa.chunked_array([pa.array([""] + [f"i{i}" for i in range(num_items)])])
    titles = pa.chunked_array([pa.nulls(num_items + 1, pa.string())])
    items = ItemMap(
        Texts.of(ids), Texts.of(titles), "none", lambda: np.ones(num_items + 1, np.int64)
    )
    return LoadedRun(model, items, config.data.max_len, config, inputs, torch.device("cpu"))


def more_memory(before: int) -> int:
    """Bytes of the peak above ``before``; the next starts anew."""
    more = peak_memory_bytes() - before
    Path("/proc/self/clear_refs").write_text("5")
    return more


def own_memory() -> int:
    """Bytes of this process that are no pages of a file."""
    (line,) = (s for s in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in s)
    return int(line.split()[1]) * 1024


def main(folder: Path, num_items: int) -> dict[str, int]:
    """Bytes of the table, and what each step added to this process."""
    wide = {"backbone__hidden_dim": 256}
    config, inputs = made(folder, num_items, **wide)
    write_checkpoint(folder / "saved", config, inputs)
    warm = folder / "warm"  # libraries, at their first use
    _, few = made(folder, 500, **wide)
    write_checkpoint(warm / "saved", config, few)
    publish(opened(warm / "saved", config, few), warm / "model")
    loaded = opened(folder / "saved", config, inputs)
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_memory_bytes()
    publish(loaded, folder / "model")
    result = {"table": 4 * num_items * 256, "export": more_memory(before)}
    vectors = write_vectors(loaded, folder / "vectors.npy")
    result["vectors"] = more_memory(before)
    users = loaded.user_vectors([["i1", "i2"], ["i3"]])
    exact(users, vectors, 10)
    result["exact"] = more_memory(before)
    build(vectors, plan(IndexConfig(type="pq", code_bytes=1), num_items, 256))
    result["index"] = more_memory(before)
    load_exported(warm / "model").recommend([["i1"]])
    before = own_memory()
    exported = load_exported(folder / "model")
    exported.recommend([["i1", "i2"], ["i3"]])
    result["exported"] = own_memory() - before
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))))
