"""The model card of an export: README.md, as the Hugging Face hub shows it."""

from __future__ import annotations

from mltfr_dist.exported import ExportInfo
from mltfr_dist.training.run_folder import load_result
from mltfr_dist.training.using.inference import LoadedRun

FRONT = """---
library_name: mltfr_dist
license: other
tags:
- recommendation
- sequential-recommendation
- mltfr
---

"""

USE = {
    "safetensors": """```python
import mltfr_dist

model = mltfr_dist.load("{name}")
model.recommend([{history}], k=10)
```

Tensors, JSON and Parquet; nothing in the folder is executed.
""",
    "onnx": """```python
import numpy as np
import onnxruntime
import pyarrow.parquet as pq

ids = ["", *pq.read_table("{name}/items.parquet")["item_id"].to_pylist()]
session = onnxruntime.InferenceSession("{name}/model.onnx")
history = np.array([[ids.index(raw) for raw in [{history}]]])  # [B, L], L <= {max_len}; 0 behind
scores, user_vectors = session.run(None, {{"item_ids": history}})  # column = index in ids
```
""",
}


def model_card(loaded: LoadedRun, info: ExportInfo, name: str) -> str:
    """Model, data, results, limits and licences, in Markdown.

    Args:
        loaded: The run that it comes from.
        info: Of the export.
        name: Of its folder.
    """
    spec, manifest = info.spec, loaded.inputs.manifest
    mltfr = f" with MLTFR over {', '.join(spec.tables)}" if spec.tables else ""
    history = ", ".join(repr(raw) for raw in loaded.item_ids[1:3])
    lines = [
        f"# {name}",
        "",
        f"{spec.backbone.name}{mltfr}: recommends the next of {spec.num_items:,} items from a "
        f"history "
        f"(the last {spec.max_len} are read). Trained by mltfr_dist {info.mltfr_dist} as the run "
        f"`{loaded.config.name}`, seed {loaded.config.training.seed}.",
        "",
        "## Use",
        "",
        USE[info.format].format(name=name, history=history, max_len=spec.max_len),
        "## Data",
        "",
        f"{manifest.num_users:,} users, {manifest.num_items:,} items, "
        f"{manifest.num_interactions:,} interactions; split {manifest.prepare.split_in_words}.",
        "",
        *(f"- {key}: `{value}`" for key, value in info.data.items()),
        "",
        "## Results",
        "",
        *_results(loaded),
        "",
        "Every item is ranked; on one data set and one seed. Items that are not in `items.parquet` "
        "cannot be recommended.",
        "",
        "## Licences",
        "",
        "The folder holds ids (and titles, where there are some) of the data above, and numbers "
        "made from the rows of "
        "token tables: the terms of both apply.",
        "",
        *(
            f"- {table}: {licence or 'its source states none'}"
            for table, licence in info.licences.items()
        ),
    ]
    return FRONT + "\n".join(lines).rstrip() + "\n"


def _results(loaded: LoadedRun) -> list[str]:
    result = load_result(loaded.config.folder) if loaded.config.folder.exists() else None
    if result is None:
        return ["None were recorded."]
    names = [name for name in result.test if name.endswith("@10")]
    return [
        "| split | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(names),
        *(
            f"| {split} | " + " | ".join(f"{values[name]:.4f}" for name in names) + " |"
            for split, values in (("validation", result.valid), ("test", result.test))
        ),
    ]
