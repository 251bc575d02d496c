"""docs/library.md and docs/notebook.ipynb, block by block and cell by cell, on small inputs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from support import REPOSITORY, clean_environment

sys.path.insert(0, str(REPOSITORY / "tests" / "unit" / "tables"))
from table_files import table, write_single, write_tokenizer

import mltfr_dist
from mltfr_dist import build_table, prepare

PAGE = REPOSITORY / "docs" / "library.md"
NOTEBOOK = REPOSITORY / "docs" / "notebook.ipynb"
MOVIES = [*range(1, 40), 50, 172, 181]


def write_inputs(folder: Path) -> None:
    """Interactions of some users with some movies, and a checkpoint of a small vocabulary."""
    rng = np.random.default_rng(0)
    rows = [
        (user, MOVIES[(start + position) % len(MOVIES)], 1_600_000_000 + position)
        for user, start in enumerate(rng.integers(len(MOVIES), size=80).tolist())
        for position in range(int(rng.integers(8, 16)))
    ]
    users, items, times = (list(column) for column in zip(*rows, strict=True))
    pa.parquet.write_table(
        pa.table({"user": users, "sku": items, "ts": times}), folder / "events.parquet"
    )
    tokens = ["<s>", *(f"Ġ{a}{b}{c}" for a in "abcdefgh" for b in "ijklmnop" for c in "qrstuvwx")]
    checkpoint = folder / "Llama-3.2-1B"
    write_single(checkpoint, table(len(tokens), 32, 0))
    write_tokenizer(checkpoint, tokens)


def run_blocks(blocks: list[str], shown: list[str], folder: Path) -> dict[str, Any]:
    """Run Python blocks in order, in one process of their own; the values of ``shown`` at the
    end.
    """
    lines = ["import json", "scope = {'__name__': '__main__'}"]
    for number, block in enumerate(blocks):
        lines += [f"print('@@', {number}, flush=True)", f"exec({block!r}, scope)"]
    values = ", ".join(f"{text!r}: eval({text!r}, scope)" for text in shown)
    lines += [f"print('@@ values', json.dumps({{{values}}}))"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        env=clean_environment(DS_ACCELERATOR="cpu"),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=280,
    )
    reached = re.findall(r"^@@ (\d+)$", done.stdout, re.MULTILINE)
    assert done.returncode == 0, f"block {reached[-1:]}\n{done.stderr[-4000:]}"
    assert reached == [str(number) for number in range(len(blocks))]
    result: dict[str, Any] = json.loads(done.stdout.rpartition("@@ values ")[2])
    return result


def page_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def test_the_page_has_every_name() -> None:
    text = PAGE.read_text()
    assert len(page_blocks()) == 9
    assert set(re.findall(r"^```(\w+)$", text, re.MULTILINE)) == {"python", "bash"}
    for name in mltfr_dist._ROOMS:
        assert f"`{name}" in text, name
    assert "(docs/library.md)" in (REPOSITORY / "README.md").read_text()


@pytest.mark.integration
def test_the_page_runs(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    result = run_blocks(
        page_blocks(),
        [
            "[manifest.num_users, manifest.num_items]",
            "[info.name, info.dim]",
            "[result.name for result in run.results]",
            "list(scores.shape)",
            "[r.title for r in exported.recommend(history, k=5)]",
        ],
        tmp_path,
    )
    sizes, table_size, names, shape, titles = result.values()
    assert sizes == [80, len(MOVIES)]
    assert table_size == ["llama3", 32]
    assert names == ["popularity", "sasrec + MLTFR"]
    assert shape == [2, len(MOVIES) + 1]
    assert all(title.startswith("Article ") for title in titles)
    assert not (tmp_path / "data" / "other").exists(), "refused"
    assert (tmp_path / "runs" / "mine" / "report.md").is_file()


def notebook() -> dict[str, Any]:
    result: dict[str, Any] = json.loads(NOTEBOOK.read_text())
    return result


def cells() -> list[str]:
    return ["".join(c["source"]) for c in notebook()["cells"] if c["cell_type"] == "code"]


def test_the_notebook_holds_no_output() -> None:
    assert notebook()["nbformat"] == 4
    assert len(cells()) == 10
    code = [cell for cell in notebook()["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    ids = [cell["id"] for cell in notebook()["cells"]]
    assert len(set(ids)) == len(ids)
    assert not any(re.search(r"^[!%]", cell, re.MULTILINE) for cell in cells()), "no command line"


@pytest.fixture
def quick(tmp_path: Path) -> Path:
    """In small, and under the same names, what `make quick` fetches."""
    write_inputs(tmp_path)
    columns = {"user_column": "user", "item_column": "sku", "time_column": "ts"}
    prepare(tmp_path / "events.parquet", tmp_path / "data" / "ml-100k", log=str, **columns)
    for name in ("llama2", "smollm2", "minilm"):
        build_table(tmp_path / "Llama-3.2-1B", tmp_path / "data" / "tables", name=name, log=str)
    return tmp_path


@pytest.mark.integration
def test_the_notebook_runs_cell_by_cell(quick: Path) -> None:
    result = run_blocks(
        cells(),
        [
            "[manifest.num_users, manifest.num_items]",
            "refusal",
            "run.test['HR@10']",
            "[r.item_id for r in model.recommend(history, k=5)]",
            "[result.name for result in movies.results]",
            "[r.item_id for r in best]",
        ],
        quick,
    )
    sizes, refusal, hit_rate, after, names, best = result.values()
    assert sizes == [200, 50]
    assert refusal.startswith("DataFrame, row 8: `item_id` is empty.")
    assert hit_rate > 0.3, "of 50 items, one of ten is right by chance in a fifth"
    assert len(after) == 5
    assert not set(after) & {"item 3", "item 4", "item 5"}
    assert names == ["popularity", "sasrec + MLTFR"]
    assert len(best) == 5
    assert not set(best) & {"50", "172", "181"}
    assert (quick / "data" / "exported-notebook" / "model.safetensors").is_file()


def test_the_notebook_says_what_it_needs(tmp_path: Path) -> None:
    (movies,) = (cell for cell in cells() if "ml-100k" in cell)
    script = "from pathlib import Path\n" + movies
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=clean_environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "data/ml-100k, data/tables/llama2, data/tables/smollm2" in done.stderr
    assert "run `make quick` in the repository first" in done.stderr
