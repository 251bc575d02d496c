"""Every configuration makes a whole step and ranks a batch on a device, and waits for it where it
must; without a device (see gpu_step.py).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from changes import CHANGES
from support import clean_environment

WORKER = Path(__file__).with_name("gpu_step.py")

WAITS = {
    # The one of every step: what the ranks agreed on, and the step's sums.
    "distributed/health.py read: card to cpu",
    # The same, before the update, where the optimizer does not skip one by itself.
    "distributed/health.py agree: card to cpu",
}
SEARCHES = {
    # Whether computed scores tell the best rows apart: those that do not are looked at again.
    "models/search.py _separated: number",
    # Queries whose best rows fp32 does not tell apart: their rows are scored in float64.
    "models/search.py _ordered: nonzero",
    "models/search.py _cosines: unique",
}
"""Of a search of every token alone, by a GPU that is slow in float64."""
OTHERS = {
    # Each item of a batch is adapted once: a row is as wide as all tables together.
    "mltfr.item_tokens.source": {"models/item_tokens.py forward: unique"},
    # The published experts attend to all that the batch keeps: as many rows as there are.
    "published.pooled_memory": {"published/experts.py pooled: unique"},
}
"""By field."""

SAME_STEP = ("training.", "evaluation.", "checkpoint.", "baselines", "deepspeed", "data.left_out")
"""Fields that change no operator of a step: numbers of steps, rates, what is recorded."""
FIELDS = [field for field in CHANGES if not field.startswith(SAME_STEP)]
FEW = (
    "mltfr.enabled",
    "base",
    "a batch in room",
    "every token searched",
    "every token searched, slow in float64",
    "mltfr.filter.noise",
    "mltfr.expert.per_table",
    "backbone.cl4srec.crop_ratio",
)


def waits(folder: Path, fields: list[str]) -> dict[str, dict[str, int]]:
    """What waits, by field; `base` changes none."""
    output = folder / "found.json"
    command = [sys.executable, str(WORKER), str(folder), str(output), *fields]
    done = subprocess.run(
        command, env=clean_environment(), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(output.read_text())  # type: ignore[no-any-return]


def check(folder: Path, fields: list[str]) -> dict[str, set[str]]:
    """Each field's step runs and waits once, for its end, unless it is said why; what else it waits
    for.
    """
    of_fields, others = waits(folder, fields), {}
    assert set(of_fields) == set(fields)
    for field, places in of_fields.items():
        assert "error" not in places, f"{field}: {places['error']}"
        assert sum(places.get(place, 0) for place in WAITS) == 1, field
        others[field] = {p for p in places if "not waited for" not in p} - WAITS
        assert others[field] <= OTHERS.get(field, SEARCHES if "slow" in field else set()), field
    return others


def test_a_step_waits_once_for_the_device(tmp_path: Path) -> None:
    """Once; where every token is searched and float64 is slow, for that too."""
    assert check(tmp_path, list(FEW))["every token searched, slow in float64"] == SEARCHES


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_configuration_makes_a_step_on_a_device(tmp_path: Path) -> None:
    check(tmp_path, FIELDS)


def test_there_is_no_device(tmp_path: Path) -> None:
    """A tensor that stays on the CPU is found."""
    broken = tmp_path / "broken.py"
    fault = "from mltfr_dist.models import packing\nimport torch\n"
    fault += "packing.indices_where = lambda mask, *_: torch.arange(3)\n"
    source = WORKER.read_text().replace("def main()", f"{fault}\n\ndef main()")
    source = source.replace("Path(__file__)", f"Path({str(WORKER)!r})")
    broken.write_text(source)
    output = tmp_path / "found.json"
    command = [sys.executable, str(broken), str(tmp_path), str(output), "mltfr.enabled"]
    subprocess.run(command, env=clean_environment(), check=True, timeout=300)
    error = json.loads(output.read_text())["mltfr.enabled"]["error"]
    assert "device" in error.splitlines()[-1]
