"""`mltfr export`: a finished run's chosen model as a folder that needs neither the run nor DeepSpeed (exported.py)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from mltfr_dist import __version__
from mltfr_dist.errors import CheckpointError, ConfigError, MltfrError
from mltfr_dist.exported import (
    CONFIG,
    FEATURES,
    ITEM_TOKENS,
    ITEMS,
    MODEL,
    TABLES,
    TITLES,
    ExportInfo,
    load_exported,
)
from mltfr_dist.files import file_sha256, save_tensors
from mltfr_dist.models.recommender import Recommender
from mltfr_dist.ranking import score_histories
from mltfr_dist.training.build import model_spec
from mltfr_dist.training.using.inference import LoadedRun, load_run

COMPARED = 32
"""Histories, of all lengths, that are scored by both models before an export is published."""


def export(run: str | Path, folder: str | Path) -> ExportInfo:
    """Write the chosen model of a finished run to ``folder``, with its token tables' rows and raw item ids.

    Raises:
        ConfigError: ``folder`` exists.
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
    return publish(load_run(run), folder)


def publish(loaded: LoadedRun, folder: Path) -> ExportInfo:
    """Write the files beside ``folder``, load them, compare, and only then give them its name.

    Raises:
        CheckpointError: The exported model does not score as the run's.
    """
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    info = write_files(loaded, partial)
    (partial / CONFIG).write_text(info.model_dump_json(indent=2) + "\n")
    try:
        check_scores(loaded, partial)
    except MltfrError:
        shutil.rmtree(partial)
        raise
    partial.rename(folder)
    return info


def write_files(loaded: LoadedRun, folder: Path) -> ExportInfo:
    """All files but ``config.json``, which is what this returns."""
    config, model, inputs = loaded.config, loaded.model, loaded.inputs
    save_tensors(model.state_dict(), folder / MODEL)
    if inputs.tables:
        save_tensors({table.name: table.rows for table in inputs.tables}, folder / TABLES)
    if inputs.item_features is not None:
        save_tensors({FEATURES: inputs.item_features}, folder / ITEM_TOKENS)
    (folder / ITEMS).write_text(json.dumps(loaded.items.ids) + "\n")
    if any(loaded.items.titles):
        (folder / TITLES).write_text(json.dumps(loaded.items.titles) + "\n")
    return ExportInfo(
        mltfr_dist=__version__,
        spec=model_spec(config, inputs, with_consensus=has_consensus(model)).model_copy(
            update={"sparse_items": False}
        ),
        sha256={path.name: file_sha256(path) for path in sorted(folder.iterdir())},
    )


def has_consensus(model: Recommender) -> bool:
    """Whether the chosen model is one of stage 2."""
    return model.mltfr is not None and model.mltfr.consensus is not None


def check_scores(loaded: LoadedRun, folder: Path) -> None:
    """Score histories of all lengths with the run's model and with the one that ``folder`` holds.

    Raises:
        CheckpointError: A score differs.
    """
    exported = load_exported(folder)
    model, info = exported.model.to(loaded.device), exported.info
    draw = torch.Generator().manual_seed(0)
    item_ids = torch.randint(
        1, info.spec.num_items + 1, (COMPARED, info.spec.max_len), generator=draw
    )
    lengths = torch.arange(1, COMPARED + 1) * info.spec.max_len // COMPARED
    item_ids *= torch.arange(info.spec.max_len) < lengths.clamp(min=1)[:, None]  # padding behind
    differing = score_histories(model, item_ids) != score_histories(loaded.model, item_ids)
    if differing.any():
        raise CheckpointError(
            f"The export gives {int(differing.sum())} of {differing.numel()} scores otherwise "
            f"than the run {loaded.config.folder}; nothing was exported.",
            rule="An export scores as its run does, to the bit.",
            remedy="This is a defect of mltfr_dist: please report it with the run's config.yaml.",
        )
