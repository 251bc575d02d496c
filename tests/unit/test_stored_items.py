"""A divided item table is exported and indexed as a whole one, without ever being whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from stored_items import made, opened, rows_of, write_checkpoint
from support import clean_environment

from mltfr_dist.distributed.checkpoint import MODEL, read
from mltfr_dist.distributed.divided_files import MODEL_ROWS, file_name
from mltfr_dist.errors import CheckpointError, DamagedError
from mltfr_dist.exported import load_exported
from mltfr_dist.models.divided_rows import divided_rows
from mltfr_dist.training.using.export import publish
from mltfr_dist.training.using.index import write_vectors

NUM_ITEMS = 2_500
CASES: dict[str, dict[str, object]] = {
    "bare": {},
    "sparse": {"optimizer__item_gradients": "sparse", "loss__name": "sampled_softmax"},
    "a mask": {"backbone__name": "bert4rec"},
}


@pytest.mark.parametrize("case", CASES)
def test_what_stays_in_files_is_exported_as_what_is_held(tmp_path: Path, case: str) -> None:
    config, inputs = made(tmp_path, NUM_ITEMS, **CASES[case])
    write_checkpoint(tmp_path / "saved", config, inputs)
    stays = opened(tmp_path / "saved", config, inputs)
    held = opened(tmp_path / "saved", config, inputs, items_stay=False)
    rows = divided_rows(stays.model)
    assert rows is not None
    assert rows.weight.shape == (0, 64)
    assert divided_rows(held.model) is None
    ids = torch.tensor([[5, 0], [NUM_ITEMS, 5]])
    assert stays.model.vectors(ids.flatten()).equal(held.model.vectors(ids.flatten()))
    assert stays.model.vectors(torch.tensor([7, 1])).equal(rows_of(torch.tensor([7, 1]), 64))
    for loaded, name in ((stays, "stays"), (held, "held")):
        publish(loaded, tmp_path / name)
        write_vectors(loaded, tmp_path / f"{name}.npy")
    one, two = (load_file(tmp_path / name / MODEL) for name in ("stays", "held"))
    assert one.keys() == two.keys()
    assert all(tensor.equal(two[name]) for name, tensor in one.items())
    assert np.array_equal(np.load(tmp_path / "stays.npy"), np.load(tmp_path / "held.npy"))
    histories = [["i1", "i7"], ["i2400"]]
    assert np.array_equal(stays.user_vectors(histories), held.user_vectors(histories))
    exported = load_exported(tmp_path / "stays")
    assert exported.recommend(histories, 5).item_ids == held.recommend(histories, 5).item_ids
    assert exported.scores(histories).equal(held.scores(histories))


def test_damage_is_found_before_and_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, inputs = made(tmp_path, NUM_ITEMS)
    write_checkpoint(tmp_path / "saved", config, inputs)
    stays = opened(tmp_path / "saved", config, inputs)
    file = tmp_path / "saved" / file_name(MODEL_ROWS, 1, 3)
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    with pytest.raises(DamagedError, match=rf"{file.name} is missing or damaged: it ends before"):
        publish(stays, tmp_path / "model")
    file.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    with pytest.raises(DamagedError, match=file.name):
        opened(tmp_path / "saved", config, inputs)
    file.write_bytes(whole)

    vectors = type(stays.model).vectors
    flipped = []

    def otherwise(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
        result = vectors(model, ids)
        if model is stays.model:
            flipped.append(ids)
            result[-1, -1] += 1
        return result

    monkeypatch.setattr(type(stays.model), "vectors", otherwise)
    with pytest.raises(CheckpointError, match=r"scores otherwise .*: 1 of .* numbers"):
        publish(stays, tmp_path / "model")
    assert flipped
    assert not (tmp_path / "model").exists()


def test_a_whole_table_is_read_into_its_place(tmp_path: Path) -> None:
    config, inputs = made(tmp_path, NUM_ITEMS)
    write_checkpoint(tmp_path / "saved", config, inputs)
    held = opened(tmp_path / "saved", config, inputs, items_stay=False)
    table = held.model.backbone.item_embedding.weight.detach()
    assert table.equal(rows_of(torch.arange(len(table)), 64))
    assert read(tmp_path / "saved")["backbone.item_embedding.weight"].equal(table)


def test_a_table_of_another_size_does_not_fit(tmp_path: Path) -> None:
    config, inputs = made(tmp_path, NUM_ITEMS)
    write_checkpoint(tmp_path / "saved", config, inputs)
    _, more = made(tmp_path, NUM_ITEMS + 1)
    with pytest.raises(CheckpointError, match=r"(?s)does not fit its run.*size mismatch"):
        opened(tmp_path / "saved", config, more, items_stay=False)


@pytest.mark.integration
def test_no_step_holds_the_table(tmp_path: Path) -> None:
    """600,000 items, 614 MB, in a process of its own."""
    script = Path(__file__).parent / "stored_items.py"
    environment = clean_environment()
    environment["PYTHONPATH"] += f":{script.parents[1]}"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "600000"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout)
    table = result.pop("table")
    assert table == 614_400_000
    assert 0 < max(result.values()) < table / 4, result
