"""`items.parquet` read by range gives the rows that reading all of it gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from support import write_data

from mltfr_dist.data.shards.manifest import ITEMS_NAME, open_map, read_manifest, read_map
from mltfr_dist.errors import DataError
from mltfr_dist.files import file_sha256
from mltfr_dist.serving import texts
from mltfr_dist.serving.items import ItemMap
from mltfr_dist.training.reporting.projector import _rows


@pytest.mark.parametrize("held", [0, texts.HELD_BYTES])
def test_rows_come_from_their_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: int
) -> None:
    folder = write_data(tmp_path)
    whole = pq.read_table(folder / ITEMS_NAME)
    pq.write_table(whole, folder / ITEMS_NAME, row_group_size=7)
    manifest = read_manifest(folder)
    with pytest.raises(DataError, match=r"items.parquet is damaged: its sha256"):
        read_map(folder, manifest, ITEMS_NAME)
    files = manifest.files | {ITEMS_NAME: file_sha256(folder / ITEMS_NAME)}
    manifest = manifest.model_copy(update={"files": files})
    for places in ([30, 2, 3, 39, 14], [0], [*range(40)]):
        expected = whole.take(places).to_pydict()
        assert _rows(folder, manifest, np.array(places)) == expected
    items = ItemMap.of(open_map(folder, manifest, ITEMS_NAME), "here")
    monkeypatch.setattr(texts, "HELD_BYTES", held)
    assert items.ids[1:] == whole["item_id"].to_pylist()
    assert items.titles == [None, *whole["title"].to_pylist()]
    assert items.counts.tolist() == [0, *whole["count"].to_pylist()]
    some = whole["item_id"].to_pylist()[3::5]
    assert items.find([*some, "none of them"]) == [*range(4, 41, 5), 0]
    items.write(tmp_path / "again.parquet")
    assert pq.read_table(tmp_path / "again.parquet").equals(whole)


def test_a_map_that_is_cut_off_in_use_is_named(tmp_path: Path) -> None:
    folder = write_data(tmp_path)
    items = ItemMap.of(open_map(folder, read_manifest(folder), ITEMS_NAME), "items.parquet")
    (folder / ITEMS_NAME).write_bytes(b"")
    with pytest.raises(DataError, match=r"items\.parquet cannot be read any more.*Restore it"):
        items.find(["i1"])
