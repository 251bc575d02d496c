"""Control tables: what they keep of the real one, what they destroy, and that they are made, never
stored.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import tiny_config, write_table

from mltfr_dist.tables.content import with_content
from mltfr_dist.tables.store import TokenTable, load_table, table_hash
from mltfr_dist.training.build import build_model
from mltfr_dist.training.inputs import load_inputs
from mltfr_dist.training.using.explain import explain


@pytest.fixture
def table(tmp_path: Path) -> TokenTable:
    """Correlated, skewed columns: something to keep and something to destroy."""
    stored = load_table(write_table(tmp_path, "t", num_rows=4000, dim=6, seed=3))
    mix = torch.eye(6) + 0.8 * torch.roll(torch.eye(6), 1, dims=1)
    rows = stored.rows.exp() @ mix + torch.arange(6.0)
    return TokenTable("t", rows, stored.info, stored.folder, stored.sha256)


def test_random_rows_have_the_mean_and_the_full_covariance_of_the_real_ones(
    table: TokenTable,
) -> None:
    made = with_content(table, "random", 0).rows
    assert (made.shape, made.dtype) == (table.rows.shape, table.rows.dtype)
    scale = table.rows.std(0)
    assert ((made.mean(0) - table.rows.mean(0)).abs() < 0.1 * scale).all()
    real, random = torch.cov(table.rows.T), torch.cov(made.T)
    assert ((random - real).abs() < 0.12 * scale[:, None] * scale[None, :]).all()
    assert (
        real - torch.diag(real.diagonal())
    ).abs().max() > 0.3  # there was something off the diagonal to keep
    skew = ((made - made.mean(0)) ** 3).mean(0) / made.std(0) ** 3
    assert skew.abs().max() < 0.3  # beyond second moments nothing is left


def test_shuffled_columns_keep_every_marginal_and_lose_the_geometry(table: TokenTable) -> None:
    made = with_content(table, "shuffled", 0).rows
    assert torch.equal(made.sort(0).values, table.rows.sort(0).values)
    correlation = torch.corrcoef(made.T) - torch.eye(6)
    assert correlation.abs().max() < 0.1
    assert (torch.corrcoef(table.rows.T) - torch.eye(6)).abs().max() > 0.4
    assert not set(map(tuple, made.tolist())) & set(map(tuple, table.rows.tolist()))


@pytest.mark.parametrize("content", ["random", "shuffled"])
def test_a_control_follows_from_seed_and_name_alone(table: TokenTable, content: str) -> None:
    made = with_content(table, content, 5)
    torch.manual_seed(1)
    again = with_content(table, content, 5)
    assert torch.equal(made.rows, again.rows)
    assert made.sha256 == again.sha256
    other_name = TokenTable("u", table.rows, table.info, table.folder, table.sha256)
    others = [with_content(table, content, 6), with_content(other_name, content, 5), table]
    assert all(
        o.sha256 != made.sha256 and table_hash(o.rows) != table_hash(made.rows) for o in others
    )


def test_real_is_the_stored_table_itself(table: TokenTable) -> None:
    assert with_content(table, "real", 0) is table


@pytest.mark.parametrize("content", ["random", "shuffled"])
def test_a_run_reads_control_tables_and_records_their_hash(tmp_path: Path, content: str) -> None:
    real = load_inputs(tiny_config(tmp_path))
    before = {p: p.read_bytes() for p in sorted((tmp_path / "tables").rglob("*")) if p.is_file()}
    inputs = load_inputs(tiny_config(tmp_path, mltfr__table_content=content))
    again = load_inputs(tiny_config(tmp_path, mltfr__table_content=content))
    other_seed = load_inputs(tiny_config(tmp_path, mltfr__table_content=content, training__seed=1))
    assert {
        p: p.read_bytes() for p in sorted((tmp_path / "tables").rglob("*")) if p.is_file()
    } == before
    assert inputs.hashes == again.hashes
    for name in ("first", "second"):
        assert len({i.hashes[name] for i in (real, inputs, other_seed)}) == 3
    assert inputs.hashes["data"] == real.hashes["data"]
    assert all(
        torch.equal(a.rows, b.rows) for a, b in zip(inputs.tables, again.tables, strict=True)
    )


def test_explain_shows_tokens_of_real_tables_only(tmp_path: Path) -> None:
    for content, start in (("real", " first-"), ("random", "row "), ("shuffled", "row ")):
        config = tiny_config(tmp_path, mltfr__table_content=content)
        inputs = load_inputs(config)
        model = build_model(config, inputs, with_consensus=False).eval()
        (views,) = explain(model, inputs.tables, torch.tensor([[1, 2, 3]]))
        assert all(token.startswith(start) for token, _ in views[0].tokens)
