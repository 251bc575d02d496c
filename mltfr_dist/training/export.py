"""`mltfr export`: a finished run's chosen model as a folder that needs neither the run nor DeepSpeed (exported.py)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import save_file

from mltfr_dist import __version__
from mltfr_dist.errors import ConfigError
from mltfr_dist.exported import CONFIG, ITEMS, MODEL, TABLES, ExportInfo
from mltfr_dist.files import file_sha256
from mltfr_dist.training.inference import LoadedRun, load_run


def export(run: Path, folder: Path) -> ExportInfo:
    """Write the chosen model of a finished run to ``folder``, with its token tables' rows and raw item ids.

    Raises:
        ConfigError: ``folder`` exists.
        CheckpointError: No run, an unfinished one, or a damaged checkpoint.
    """
    if folder.exists():
        raise ConfigError(
            f"{folder} exists.",
            rule="An export never overwrites.",
            remedy="Name another folder, or delete it.",
        )
    loaded = load_run(run)
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    info = write_files(loaded, partial)
    (partial / CONFIG).write_text(info.model_dump_json(indent=2) + "\n")
    partial.rename(folder)
    return info


def write_files(loaded: LoadedRun, folder: Path) -> ExportInfo:
    """All files but ``config.json``, which is what this returns."""
    config, model, tables = loaded.config, loaded.model, loaded.inputs.tables
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, folder / MODEL)
    if tables:
        save_file({table.name: table.rows.contiguous() for table in tables}, folder / TABLES)
    (folder / ITEMS).write_text(json.dumps(loaded.items.ids) + "\n")
    return ExportInfo(
        mltfr_dist=__version__,
        backbone=config.backbone,
        mltfr=config.mltfr,
        loss=config.loss,
        num_items=loaded.inputs.manifest.num_items,
        max_len=config.data.max_len,
        has_consensus=model.mltfr is not None and model.mltfr.consensus is not None,
        tables=loaded.inputs.table_names,
        sha256={path.name: file_sha256(path) for path in sorted(folder.iterdir())},
    )
