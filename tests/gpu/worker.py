"""Train cases one after the other in this process, and write what each said and how it ended as
JSON.

python worker.py FOLDER OUTPUT PRECISION CASE...
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from cases import CASES
from support import read_lines, tiny_config

from mltfr_dist.config import RunConfig
from mltfr_dist.distributed.meeting import stop_ranks
from mltfr_dist.models.replay import SWITCH
from mltfr_dist.repairs import as_published
from mltfr_dist.schema import changed
from mltfr_dist.training.running.fit import fit

DEVICE = "gpu" if torch.cuda.is_available() else "cpu"

PLAIN = {"backbone__dropout": 0.0, "mltfr__expert__dropout": 0.0}
"""A CPU and a GPU draw dropout differently."""


def case(folder: Path, name: str, precision: str) -> RunConfig:
    changes: dict[str, Any] = {
        "name": name.replace(" ", "-").replace(",", ""),
        "runs_dir": str(folder / f"{DEVICE}-{precision}"),
        "training__precision": precision,
        "training__epochs": 4,
    }
    changes |= PLAIN | CASES.get(name, {})
    config = tiny_config(folder, **changes)
    if name == "published":
        config = as_published(config)
        protocol = ("pick_on_test", "train_on_validation")
        fields = {f"published.{switch}": False for switch in protocol}
        config = changed(config, fields | {"mltfr.consensus.group": ["first"]}, source="a test")
    return config


def trained(config: RunConfig, name: str) -> dict[str, Any]:
    os.environ[SWITCH] = "on" if name.startswith("recorded") else "off"
    try:
        result = fit(config)[-1]
    except Exception:
        return {"error": traceback.format_exc()}
    lines = read_lines(config.folder / "metrics.jsonl")
    return {"lines": lines, "test": result.test, "valid": result.valid}


def main() -> None:
    folder, output, precision, *names = sys.argv[1:]
    result = {name: trained(case(Path(folder), name, precision), name) for name in names}
    Path(output).write_text(json.dumps(result))
    stop_ranks()


if __name__ == "__main__":
    main()
