import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mltfr_dist.config import TableConfig
from mltfr_dist.errors import DataError
from mltfr_dist.tables.clean import mean_cosine, normalise_rows
from mltfr_dist.tables.store import TableInfo, load_table, save_table, table_hash


def random_rows(num_rows: int = 300, dim: int = 8, *, offset: float = 2.0) -> torch.Tensor:
    mix = torch.randn(dim, dim, generator=torch.Generator().manual_seed(1))
    return torch.randn(num_rows, dim, generator=torch.Generator().manual_seed(0)) @ mix + offset


def save(output: Path, rows: torch.Tensor, name: str = "small", **changed: object) -> TableInfo:
    described: dict[str, object] = {
        "name": name,
        "source_files": ("model.safetensors",),
        "source_sha256": "0" * 64,
        "tensor": "wte.weight",
        "source_dtype": "F32",
        "source_rows": len(rows) + 3,
        "vocabulary_file": "tokenizer.json",
        "licence": None,
        "dropped": {"special": 3},
        "mean_cosine_before": 0.5,
        "mean_cosine_after": 0.0,
        "config": TableConfig(),
    }
    return save_table(
        output, rows, [f" tökén{index}" for index in range(len(rows))], **(described | changed)
    )


# --- normalisation


@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_mean_cosine_equals_all_pairs(offset: float) -> None:
    rows = random_rows(5000, 6, offset=offset)[:700]
    unit = torch.nn.functional.normalize(rows.double())
    pairs = unit @ unit.T
    expected = (pairs.sum() - pairs.trace()) / (700 * 699)
    assert mean_cosine(rows) == pytest.approx(float(expected), abs=1e-12)


def test_mean_cosine_leaves_out_rows_without_direction() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    assert mean_cosine(rows) == pytest.approx(2**-0.5)
    assert mean_cosine(rows[:2]) == 0.0


def test_scale_centres_and_gives_unit_variance_keeping_proportions() -> None:
    rows = random_rows(9000)
    centred = rows - rows.mean(0)
    normalise_rows(rows, "scale")
    torch.testing.assert_close(rows.mean(0), torch.zeros(8), atol=1e-5, rtol=0)
    assert float(rows.square().mean()) == pytest.approx(1, abs=1e-5)
    ratio = rows / centred
    torch.testing.assert_close(ratio, ratio.median().expand_as(ratio), rtol=1e-2, atol=1e-2)


def test_whiten_gives_identity_covariance_and_is_symmetric() -> None:
    rows = random_rows(9000)
    before = rows.clone()
    normalise_rows(rows, "whiten")
    torch.testing.assert_close(rows.mean(0), torch.zeros(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(rows.T @ rows / len(rows), torch.eye(8), atol=1e-4, rtol=0)
    transform = torch.linalg.lstsq((before - before.mean(0)).double(), rows.double()).solution
    torch.testing.assert_close(
        transform, transform.T, atol=1e-4, rtol=1e-4
    )  # ZCA, not another whitening


def test_whiten_does_not_blow_up_a_missing_direction() -> None:
    rows = torch.cat([random_rows(500, 4), torch.zeros(500, 1)], dim=1)
    normalise_rows(rows, "whiten")
    assert float(rows[:, 4].abs().max()) < 1e-3
    assert bool(torch.isfinite(rows).all())


def test_none_keeps_values() -> None:
    rows = random_rows()
    normalise_rows(rows, "none")
    assert torch.equal(rows, random_rows())


@pytest.mark.parametrize("how", ["scale", "whiten"])
def test_equal_rows_cannot_be_scaled(how: str) -> None:
    with pytest.raises(DataError, match="All rows of the token table are equal"):
        normalise_rows(torch.ones(10, 3), how)  # type: ignore[arg-type]


# --- saving and loading


def test_round_trip(tmp_path: Path) -> None:
    rows = random_rows()
    info = save(tmp_path / "tables", rows)
    table = load_table(tmp_path / "tables" / "small")
    assert table.name == "small"
    assert torch.equal(table.rows, rows)
    assert table.info == info
    assert table.vocabulary[7] == " tökén7"
    assert len(table.vocabulary) == info.num_rows == 300
    assert table_hash(table.rows) == info.rows_sha256
    assert sorted(file.name for file in (tmp_path / "tables").iterdir()) == [
        "small"
    ]  # nothing partial is left


def test_table_hash_sees_one_changed_bit_and_not_the_layout() -> None:
    rows = random_rows()
    changed = rows.clone()
    changed[299, 7] = torch.nextafter(changed[299, 7], torch.tensor(9.0))
    assert table_hash(rows) == table_hash(rows.T.contiguous().T)
    assert table_hash(rows) != table_hash(changed)


def test_bytes_are_deterministic_and_readable_by_others(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        save(tmp_path / folder, random_rows())
    for name in ("table.safetensors", "vocabulary.json", "table.json"):
        assert (tmp_path / "a/small" / name).read_bytes() == (
            tmp_path / "b/small" / name
        ).read_bytes()
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "a/small").iterdir()}
    assert len(modes) == 1


def test_equal_table_is_kept_and_another_refused(tmp_path: Path) -> None:
    save(tmp_path, random_rows())
    written = (tmp_path / "small/table.safetensors").stat().st_mtime_ns
    save(tmp_path, random_rows())
    assert (tmp_path / "small/table.safetensors").stat().st_mtime_ns == written
    with pytest.raises(
        DataError, match=r"already holds a different table \(differing: table_sha256, rows_sha256\)"
    ):
        save(tmp_path, random_rows(offset=1.0))
    assert torch.equal(load_table(tmp_path / "small").rows, random_rows())
    assert [file.name for file in tmp_path.iterdir()] == ["small"]


def test_damaged_table_is_not_mistaken_for_an_equal_one(tmp_path: Path) -> None:
    save(tmp_path, random_rows())
    (tmp_path / "small/vocabulary.json").write_text("[]")
    with pytest.raises(DataError, match="is no sound token table"):
        save(tmp_path, random_rows())


def test_rows_and_tokens_must_agree(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="300 rows but 2 tokens"):
        save_table(tmp_path, random_rows(), ["a", "b"], name="x")


def test_rows_are_mapped_from_the_file_and_writes_do_not_reach_it(tmp_path: Path) -> None:
    save(tmp_path, random_rows())
    table = load_table(tmp_path / "small")
    with Path("/proc/self/maps").open() as maps:
        assert str(tmp_path / "small" / "table.safetensors") in maps.read()
    table.rows.zero_()
    load_table(tmp_path / "small")  # the hash is still right


# --- what load_table refuses


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is no token table: it has no table\.json.*mltfr tables"):
        load_table(tmp_path / "none")
    save(tmp_path, random_rows())
    (tmp_path / "small/table.safetensors").unlink()
    with pytest.raises(DataError, match=r"has no table\.safetensors"):
        load_table(tmp_path / "small")


def edit_header(folder: Path, **changes: object) -> None:
    header = json.loads((folder / "table.json").read_text())
    (folder / "table.json").write_text(json.dumps(header | changes))


def test_wrong_schema_version(tmp_path: Path) -> None:
    save(tmp_path, random_rows())
    edit_header(tmp_path / "small", schema_version=2)
    with pytest.raises(DataError, match="has schema version 2; this program reads 1"):
        load_table(tmp_path / "small")


@pytest.mark.parametrize("content", ["{", '{"schema_version": 1}', "[]"])
def test_malformed_header(tmp_path: Path, content: str) -> None:
    save(tmp_path, random_rows())
    (tmp_path / "small/table.json").write_text(content)
    with pytest.raises(DataError, match=r"table\.json (is malformed|has schema version None)"):
        load_table(tmp_path / "small")


def test_one_changed_byte(tmp_path: Path) -> None:
    save(tmp_path, random_rows())
    path = tmp_path / "small/table.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"table\.safetensors was changed after it was written"):
        load_table(tmp_path / "small")
    assert load_table(tmp_path / "small", verify=False).rows.shape == (300, 8)


def test_cut_short(tmp_path: Path) -> None:
    save(tmp_path, random_rows())
    os.truncate(tmp_path / "small/table.safetensors", 500)
    with pytest.raises(DataError, match=r"table\.safetensors cannot be read"):
        load_table(tmp_path / "small", verify=False)


def test_shape_that_disagrees_with_the_header(tmp_path: Path) -> None:
    save(tmp_path, random_rows())
    save_file(
        {"token_table": load_file(tmp_path / "small/table.safetensors")["token_table"][:9]},
        tmp_path / "small/table.safetensors",
    )
    with pytest.raises(
        DataError, match=r"holds \(9, 8\) torch\.float32, but table\.json says \(300, 8\)"
    ):
        load_table(tmp_path / "small", verify=False)


def test_vocabulary_that_disagrees(tmp_path: Path) -> None:
    save(tmp_path, random_rows())
    (tmp_path / "small/vocabulary.json").write_text('["a"]')
    with pytest.raises(DataError, match=r"vocabulary\.json was changed"):
        load_table(tmp_path / "small")
    late = load_table(tmp_path / "small", verify=False)
    with pytest.raises(DataError, match=r"vocabulary\.json was changed"):
        _ = late.vocabulary
    (tmp_path / "small/vocabulary.json").unlink()
    with pytest.raises(DataError, match=r"has no vocabulary\.json"):
        load_table(tmp_path / "small")
