"""`mltfr recommend --histories`: files in, one file out, on after a kill, over several
processes.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import clean_environment, tiny_config

import mltfr_dist
from mltfr_dist.cli import main as mltfr
from mltfr_dist.config import RunConfig
from mltfr_dist.errors import EXIT_BAD_INPUT
from mltfr_dist.serving import batch

NUM_USERS = 300


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    made = tiny_config(
        tmp_path_factory.mktemp("batch"), training__epochs=1, mltfr__consensus__enabled=False
    )
    mltfr_dist.fit(made)
    return made


def users(count: int = NUM_USERS) -> dict[str, list[Any]]:
    rng = np.random.default_rng(0)
    histories = [[f"i{n}" for n in rng.integers(40, size=rng.integers(1, 9))] for _ in range(count)]
    return {"user_id": [f"u{n}" for n in range(count)], "history": histories}


def write(path: Path, rows: dict[str, list[Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.table(rows), path, row_group_size=70)
    elif path.suffix == ".jsonl":
        pairs = zip(*rows.values(), strict=True)
        path.write_text("".join(json.dumps(dict(zip(rows, pair))) + "\n" for pair in pairs))
    else:
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(rows)
            writer.writerows((u, " ".join(h)) for u, h in zip(*rows.values(), strict=True))
    return path


def command(config: RunConfig, histories: Path, output: Path, *more: str) -> list[str]:
    return [
        *("recommend", str(config.folder), "--histories", str(histories)),
        *("--output", str(output), "--k", "5", *more),
    ]


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_every_format_gives_what_the_model_recommends(
    config: RunConfig, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "PART_ROWS", 64)
    given = users()
    source, output = write(tmp_path / f"users.{kind}", given), tmp_path / "recs.parquet"
    assert mltfr(command(config, source, output)) == 0
    result = pq.read_table(output)
    assert result.column_names == ["user_id", "item_ids", "scores"]
    assert result["user_id"].to_pylist() == given["user_id"]
    expected = mltfr_dist.load(config.folder).recommend(given["history"], k=5)
    assert result["item_ids"].to_pylist() == expected.item_ids
    assert np.allclose(result["scores"].to_pylist(), expected.scores, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recs.parquet", source.name]


def test_killed_it_goes_on_without_a_repeated_or_missing_user(
    config: RunConfig, tmp_path: Path
) -> None:
    given = users(5 * batch.PART_ROWS + 17)
    source, output = write(tmp_path / "users.parquet", given), tmp_path / "recs.parquet"
    program = [sys.executable, "-m", "mltfr_dist", *command(config, source, output)]
    begun = subprocess.Popen(program, env=clean_environment(), cwd=tmp_path)
    blocks = tmp_path / ".parts-recs.parquet"
    deadline = time.monotonic() + 120
    while len(list(blocks.glob("part-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    begun.kill()
    begun.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in blocks.glob("part-*")}
    assert 2 <= len(kept) < 6
    assert not output.exists()
    other = [*program, "--keep-seen"]
    refused = subprocess.run(other, env=clean_environment(), capture_output=True, text=True)
    assert refused.returncode == EXIT_BAD_INPUT
    assert "parts of another call" in refused.stderr

    done = subprocess.run(program, env=clean_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{len(kept)} of 6 parts are done already" in done.stdout
    assert f"{len(given['user_id']):,} users" in done.stdout
    result = pq.read_table(output)
    assert result["user_id"].to_pylist() == given["user_id"]
    whole = tmp_path / "whole.parquet"
    assert mltfr(command(config, source, whole)) == 0
    assert whole.read_bytes() == output.read_bytes()
    assert not blocks.exists()


def test_several_processes_share_the_parts(config: RunConfig, tmp_path: Path) -> None:
    given = users(2 * batch.PART_ROWS + 5)
    source, output = write(tmp_path / "users.parquet", given), tmp_path / "recs.parquet"
    program = [sys.executable, "-m", "mltfr_dist", *command(config, source, output)]
    meet = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}
    started = [
        subprocess.Popen(program, env=clean_environment(RANK=r, LOCAL_RANK=r, **meet))
        for r in ("0", "1")
    ]
    assert [one.wait(timeout=200) for one in started] == [0, 0]
    assert pq.read_table(output)["user_id"].to_pylist() == given["user_id"]


def test_unknown_and_empty_histories(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {"user_id": ["a", "b", "c"], "history": [["i1", "x1"], ["x2"], ["i2"]]}
    source, output = write(tmp_path / "users.parquet", rows), tmp_path / "recs.parquet"
    assert mltfr(command(config, source, output)) == EXIT_BAD_INPUT
    printed = capsys.readouterr().err
    assert f"Unknown item id x1 in row 1 of {source}" in printed
    assert "`--unknown drop` leaves them out" in printed
    assert not (tmp_path / ".parts-recs.parquet").exists(), "nothing was made"
    assert mltfr(command(config, source, output, "--unknown", "drop")) == EXIT_BAD_INPUT
    assert f"No history in row 2 of {source}" in capsys.readouterr().err
    more = ("--unknown", "drop", "--empty", "popular")
    assert mltfr(command(config, source, output, *more)) == 0
    assert "2 unknown item ids were left out" in capsys.readouterr().out
    popular = pq.read_table(output).to_pylist()[1]
    assert popular["scores"] == sorted(popular["scores"], reverse=True)
    assert popular["scores"][0] > 20, "a count"


def test_a_strange_row_far_behind_loses_nothing(
    config: RunConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Parts that hold no strange row are the same by either rule; the other way round they are
    not.
    """
    monkeypatch.setattr(batch, "PART_ROWS", 4)
    given = users(10)
    given["history"][9] = ["i1", "x1"]
    source, output = write(tmp_path / "users.parquet", given), tmp_path / "recs.parquet"
    assert mltfr(command(config, source, output)) == EXIT_BAD_INPUT
    blocks = tmp_path / ".parts-recs.parquet"
    assert len(list(blocks.glob("part-*"))) == 2
    assert mltfr(command(config, source, output, "--unknown", "drop", "--k", "4")) == EXIT_BAD_INPUT
    assert "parts of another call" in capsys.readouterr().err
    made = batch._write_part
    monkeypatch.setattr(batch, "_write_part", stopped)
    with pytest.raises(KeyboardInterrupt):
        mltfr(command(config, source, output, "--unknown", "drop"))
    monkeypatch.setattr(batch, "_write_part", made)
    assert mltfr(command(config, source, output)) == EXIT_BAD_INPUT
    assert "parts of another call" in capsys.readouterr().err
    assert mltfr(command(config, source, output, "--unknown", "drop")) == 0
    assert "2 of 3 parts are done already" in capsys.readouterr().out
    assert pq.read_table(output)["user_id"].to_pylist() == given["user_id"]


def stopped(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("option", "value"), [("--unknown", "drop"), ("--empty", "popular")])
def test_one_history_has_no_such_option(
    config: RunConfig, option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["recommend", str(config.folder), "--history", "i1", option, value]
    assert mltfr(given) == EXIT_BAD_INPUT
    assert f"{option} belongs to --histories" in capsys.readouterr().err


def test_one_history_is_refused_in_the_words_of_its_command(
    config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mltfr(["recommend", str(config.folder), "--history", "i1,x1"]) == EXIT_BAD_INPUT
    printed = capsys.readouterr().err
    assert "Unknown item id x1" in printed
    assert "drop" not in printed


BAD: dict[str, tuple[list[str], str]] = {
    "both": (["--history", "i1"], "Give one of --history and --histories"),
    "no Parquet": (["--output", "recs.csv"], r"recs.csv does not end in .parquet"),
    "explained": (["--explain"], "--explain explains one history"),
    "k": (["--k", "41"], "k is 41; there are 40 items"),
}


@pytest.mark.parametrize("wrong", BAD)
def test_bad_use(
    config: RunConfig, tmp_path: Path, wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more, words = BAD[wrong]
    source, output = write(tmp_path / "users.parquet", users(3)), tmp_path / "recs.parquet"
    assert mltfr(command(config, source, output, *more)) == EXIT_BAD_INPUT
    assert words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [source.name], "nothing half written"


def test_an_output_below_a_file(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "users.parquet", users(3))
    assert mltfr(command(config, source, source / "recs.parquet")) == EXIT_BAD_INPUT
    words = capsys.readouterr().err
    assert "recs.parquet cannot be written" in words
    assert "give another name, in a folder that you may write to" in words
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


FILES: dict[str, tuple[str, str, str]] = {
    "column": ("users.csv", "user_id,items\na,i1\n", "no column `history` (it has user_id, items)"),
    "line": ("users.jsonl", '{"history": ["i1"]}\n{"history"\n', "line 2"),
    "no list": ("users.jsonl", '{"history": 7}\n', "7 is no list of ids in row 1"),
    "ending": ("users.txt", "i1\n", "has the ending `.txt`"),
    "mapping": ("users.jsonl", '{"history": {"i1": 2}}\n', "is no list of ids in row 1"),
    "twice": ("users.jsonl", '{"history": ["i1"], "history": ["i2"]}\n', "stands twice"),
    "columns": ("users.csv", "history,history\ni1,i2\n", "2 columns `history`"),
    "no rows": ("users.csv", "user_id,items\n", "no column `history`"),
    "null": ("users.jsonl", '{"user_id": null, "history": ["i1"]}\n', "Row 1 of"),
    "user": ("users.jsonl", '{"user_id": [1], "history": ["i1"]}\n', "has the user_id [1]"),
    "carriage return": ("users.jsonl", '{"history": ["i1"]}\r{"history": []}\r', "line 1"),
    "encoding": ("users.jsonl", '{"user_id": "\udce9", "history": ["i1"]}\n', "can't decode"),
    "damage": ("users.parquet", "none", "users.parquet cannot be read"),
}


@pytest.mark.parametrize("wrong", FILES)
def test_bad_files(
    config: RunConfig, tmp_path: Path, wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, content, words = FILES[wrong]
    (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
    output = tmp_path / "recs.parquet"
    assert mltfr(command(config, tmp_path / name, output)) == EXIT_BAD_INPUT
    assert words in capsys.readouterr().err
    assert mltfr(command(config, tmp_path / "none.csv", output)) == EXIT_BAD_INPUT
    assert "none.csv is not there" in capsys.readouterr().err
    assert not output.exists()


def test_a_mark_of_byte_order_is_no_text(config: RunConfig, tmp_path: Path) -> None:
    source, output = tmp_path / "users.jsonl", tmp_path / "recs.parquet"
    source.write_bytes(b'\xef\xbb\xbf{"user_id": 7, "history": ["i1"]}\n')
    assert mltfr(command(config, source, output)) == 0
    assert pq.read_table(output)["user_id"].to_pylist() == ["7"]
