"""`mltfr export`: a finished run's chosen model as a folder that needs neither the run nor
DeepSpeed (exported.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from mltfr_dist import __version__
from mltfr_dist.data.shards.manifest import MANIFEST_NAME
from mltfr_dist.distributed.stored_rows import blocks, items_of_file
from mltfr_dist.distributed.tensor_file import Streamed, write_tensors
from mltfr_dist.errors import CheckpointError, ConfigError
from mltfr_dist.exported import (
    CARD,
    CONFIG,
    FEATURES,
    ITEM_TOKENS,
    ITEMS,
    MODEL,
    TABLES,
    TOKENS,
    ExportInfo,
    load_model,
    read_info,
)
from mltfr_dist.files import file_sha256, new_folder, save_tensors
from mltfr_dist.models.divided_rows import DividedRows, divided_rows
from mltfr_dist.models.folded import is_folded
from mltfr_dist.models.recommender import Recommender
from mltfr_dist.serving.scoring import drawn_histories, score_histories, user_vectors
from mltfr_dist.training.build import model_spec
from mltfr_dist.training.using.card import model_card
from mltfr_dist.training.using.inference import LoadedRun, load_run

COMPARED_NUMBERS = 1 << 21
"""Of vectors of items that are compared together."""
Format = Literal["safetensors", "onnx"]


def export(run: str | Path, folder: str | Path, format: Format = "safetensors") -> ExportInfo:
    """Write the chosen model of a finished run to ``folder``, with raw item ids and a model card.

    Args:
        run: Its folder.
        folder: To write.
        format: "safetensors", or "onnx" for other programs.

    Raises:
        ConfigError: ``folder`` exists, or ONNX cannot express the model, or is not installed.
        CheckpointError: No run, an unfinished one, a damaged checkpoint, or an export that does not
            score as the run.
    """
    folder = Path(folder)
    if folder.exists():
        raise ConfigError(
            f"{folder} exists.",
            rule="An export never overwrites.",
            remedy="Name another folder, or delete it.",
        )
    if format not in ("safetensors", "onnx"):
        raise ConfigError(f"There is no format `{format}`.", remedy="Give safetensors or onnx.")
    if format == "onnx":
        from mltfr_dist.training.using.onnx import check_expressible, check_onnx, write_onnx

        loaded = load_run(run)
        check_expressible(loaded)
        return publish(loaded, folder, write_onnx, check_onnx, format)
    return publish(load_run(run, items_stay=True), folder)


def publish(
    loaded: LoadedRun,
    folder: Path,
    write: Callable[[LoadedRun, Path], None] | None = None,
    check: Callable[[LoadedRun, Path], None] | None = None,
    format: Format = "safetensors",
) -> ExportInfo:
    """Write the files beside ``folder``, compare what they score, and only then give them its name.

    Args:
        loaded: The run.
        folder: To write.
        write: Writes the model; None: as safetensors.
        check: Compares its scores with the run's; None: to the bit.
        format: What it is called.

    Raises:
        CheckpointError: The exported model does not score as the run's.
        ConfigError: The disk does not take it.
    """
    with new_folder(folder) as partial:
        (write or write_model)(loaded, partial)
        loaded.items.write(partial / ITEMS)
        info = export_info(loaded, partial, format)
        (partial / CONFIG).write_text(info.model_dump_json(indent=2) + "\n")
        (partial / CARD).write_text(model_card(loaded, info, folder.name), encoding="utf-8")
        (check or check_scores)(loaded, partial)
    return info


def write_model(loaded: LoadedRun, folder: Path) -> None:
    """The model, tables folded, as safetensors, and the names of the rows that may be kept."""
    tables, inputs = unfolded(loaded), loaded.inputs
    state: dict[str, torch.Tensor | Streamed] = {**loaded.serving.state_dict()}
    for name, items in loaded.serving.named_modules():
        if isinstance(items, DividedRows):
            shape = (items.num_embeddings, items.embedding_dim)
            state[f"{name}.weight"] = Streamed(torch.float32, shape, blocks(items))
    write_tensors(folder / MODEL, state)
    rows = {table.name: table.rows for table in inputs.tables if table.name in tables}
    if rows:
        save_tensors(rows, folder / TABLES)
    if inputs.item_features is not None:
        save_tensors({FEATURES: inputs.item_features}, folder / ITEM_TOKENS)
    if inputs.tables:
        (folder / TOKENS).write_text(json.dumps(_token_names(loaded)) + "\n")


def export_info(loaded: LoadedRun, folder: Path, format: Format) -> ExportInfo:
    """What the files of ``folder`` are."""
    config, inputs = loaded.config, loaded.inputs
    spec = model_spec(config, inputs, with_consensus=has_consensus(loaded.model))
    stay = unfolded(loaded) if format == "safetensors" else ()
    return ExportInfo(
        mltfr_dist=__version__,
        format=format,
        spec=spec.model_copy(update={"sparse_items": False}),
        folded={t.name: len(t.rows) for t in inputs.tables if t.name not in stay},
        folded_bytes=sum(t.rows.nbytes for t in inputs.tables if t.name not in stay),
        data={
            "source": inputs.manifest.source.file,
            "source_sha256": inputs.manifest.source.sha256,
            f"{MANIFEST_NAME}_sha256": inputs.hashes["data"],
        },
        licences={table.name: table.info.licence for table in inputs.tables},
        sha256={path.name: file_sha256(path) for path in sorted(folder.iterdir())},
    )


def unfolded(loaded: LoadedRun) -> list[str]:
    """Tables whose rows the exported model needs."""
    pairs = zip(loaded.inputs.table_names, is_folded(loaded.model))
    return [name for name, folded in pairs if not folded]


def _token_names(loaded: LoadedRun) -> dict[str, dict[str, list[int] | list[str]]]:
    """Of every table the rows that may be kept, and their names; none of prototypes."""
    assert loaded.model.mltfr is not None
    made = loaded.config.mltfr.filter.strategy == "learned_prototypes"
    names: dict[str, dict[str, list[int] | list[str]]] = {}
    for m, table in enumerate(loaded.inputs.tables):
        shortlist = getattr(loaded.model.mltfr.selector(m), "shortlist", None)
        rows = list(range(len(table.rows))) if shortlist is None else shortlist.row_ids.tolist()
        rows = [] if made else rows
        names[table.name] = {"rows": rows, "tokens": [table.token(row) for row in rows]}
    return names


def size_line(info: ExportInfo, folder: Path) -> str:
    """How large an export is, and what its tables' rows would add."""
    size = sum(path.stat().st_size for path in folder.iterdir())
    if not info.folded:
        return f"{size / 1e6:.1f} MB"
    return (
        f"{size / 1e6:.1f} MB in place of {(size + info.folded_bytes) / 1e6:.1f} MB with the rows "
        f"of "
        f"{', '.join(info.folded)}"
    )


def has_consensus(model: Recommender) -> bool:
    """Whether the chosen model is one of stage 2."""
    return model.mltfr is not None and model.mltfr.consensus is not None


def check_scores(loaded: LoadedRun, folder: Path) -> None:
    """Score histories of all lengths with the run's model and with the one that ``folder`` holds.

    Raises:
        CheckpointError: A score differs.
    """
    item_ids = drawn_histories(loaded.items.num_items, loaded.max_len)
    is_held = divided_rows(loaded.model) is None
    divide = None if is_held else items_of_file(folder / MODEL)
    model = load_model(folder, read_info(folder), divide).to(loaded.device)
    if is_held:
        differing = score_histories(model, item_ids) != score_histories(loaded.model, item_ids)
        num_differing, count = int(differing.sum()), differing.numel()
    else:  # a score is a product of two vectors
        differing = user_vectors(model, item_ids) != user_vectors(loaded.model, item_ids)
        num_differing, count = int(differing.sum()), differing.numel()
        step = max(1, COMPARED_NUMBERS // loaded.config.backbone.hidden_dim)
        for ids in torch.split(torch.arange(1, loaded.items.num_items + 1), step):
            differing = model.vectors(ids) != loaded.model.vectors(ids)
            num_differing, count = num_differing + int(differing.sum()), count + differing.numel()
    if num_differing:
        raise CheckpointError(
            f"The export scores otherwise than the run {loaded.config.folder}: {num_differing} "
            f"of {count} numbers differ; nothing was exported.",
            rule="An export scores as its run does, to the bit.",
            remedy="This is a defect of mltfr_dist: please report it with the run's config.yaml.",
        )
