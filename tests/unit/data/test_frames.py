"""A table in memory is prepared as a Parquet file with the same columns: same bytes, same
refusals.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mltfr_dist import prepare
from mltfr_dist.data.shards.manifest import MANIFEST_NAME
from mltfr_dist.data.sources.frames import write_frame
from mltfr_dist.errors import ConfigError, DataError, MltfrError

START = 1_600_000_000
SMALL = {"user_core": 1, "item_core": 1, "sequences_per_shard": 16, "sequences_per_block": 8}


def events(num_users: int = 40) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = [
        (f"u{user}", int(rng.integers(30)), START + 3600 * position + user)
        for user in range(num_users)
        for position in range(int(rng.integers(4, 9)))
    ]
    return pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"])


def titles() -> pd.DataFrame:
    return pd.DataFrame({"item_id": range(30), "title": [f"Item {n}" for n in range(30)]})


def quiet(source: object, output: Path, **options: Any) -> Any:
    return prepare(source, output, log=lambda _: None, **SMALL | options)


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the manifest, which names the source."""
    names = (path for path in folder.iterdir() if path.name != MANIFEST_NAME)
    return {path.name: path.read_bytes() for path in names}


class Older:
    """A table that knows the older protocol alone."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def __dataframe__(self, *arguments: Any, **named: Any) -> Any:
        return self._table.__dataframe__(*arguments, **named)


def as_polars(frame: pd.DataFrame) -> Any:
    reason = "polars, of the development dependencies, is not installed"
    polars = pytest.importorskip("polars", reason=reason)
    return polars.from_arrow(pa.Table.from_pandas(frame, preserve_index=False))


def cut(frame: pd.DataFrame) -> pa.Table:
    table = pa.Table.from_pandas(frame, preserve_index=False)
    return pa.concat_tables([table.slice(0, 5), table.slice(5, 1), table.slice(6)])


KINDS: dict[str, Callable[[pd.DataFrame], Any]] = {
    "pandas": lambda frame: frame,
    "pandas categories": lambda frame: frame.astype({"user_id": "category"}),
    "polars": as_polars,
    "arrow": lambda frame: pa.Table.from_pandas(frame, preserve_index=False),
    "arrow in pieces": cut,
    "arrow stream": lambda frame: cut(frame).to_reader(max_chunksize=7),
    "older protocol": lambda frame: Older(pa.Table.from_pandas(frame, preserve_index=False)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_equal_bytes_as_from_parquet(kind: str, tmp_path: Path) -> None:
    events().to_parquet(tmp_path / "events.parquet", index=False)
    titles().to_parquet(tmp_path / "titles.parquet", index=False)
    quiet(tmp_path / "events.parquet", tmp_path / "file", titles=tmp_path / "titles.parquet")
    make = KINDS[kind]
    titled = titles() if "categories" in kind else make(titles())
    manifest = quiet(make(events()), tmp_path / "frame", titles=titled)
    assert contents(tmp_path / "frame") == contents(tmp_path / "file")
    assert len(contents(tmp_path / "file")) >= 5
    assert manifest.source.file == "DataFrame"
    assert manifest.prepare.format == "parquet"
    assert (
        pq.read_table(tmp_path / "frame" / "items.parquet")["title"]
        .to_pylist()[0]
        .startswith("Item ")
    )
    assert {path.name for path in tmp_path.iterdir()} == {
        "events.parquet",
        "titles.parquet",
        "file",
        "frame",
    }


def test_the_hash_is_of_the_content(tmp_path: Path) -> None:
    frame = events().assign(
        moment=pd.date_range("2024-01-01", periods=len(events()), tz="UTC"),
        text=["a", None, "bc"] * (len(events()) // 3) + [""] * (len(events()) % 3),
        lists=[[1, 2], None, []] * (len(events()) // 3) + [[3]] * (len(events()) % 3),
        flag=True,
    )
    result = {
        name: write_frame(make(frame), "DataFrame", tmp_path).content
        for name, make in KINDS.items()
        if name not in ("polars", "older protocol")  # the older one has no lists
    }
    assert len(set(result.values())) == 1, result
    first = result["pandas"]
    assert first is not None
    for column, value in {
        "user_id": "u1000",
        "item_id": 7000,
        "moment": pd.Timestamp("2030-01-01", tz="UTC"),
        "text": "ab",
        "flag": False,
    }.items():
        changed = frame.copy()
        changed.loc[3, column] = value
        assert write_frame(changed, "DataFrame", tmp_path).content != first, column
    other = frame.copy()
    other.at[0, "lists"] = [1, 2, 0]
    assert write_frame(other, "DataFrame", tmp_path).content != first
    swapped = frame.assign(text=[*"bac", *frame["text"][3:]])
    moved = frame.assign(text=["ba", "", "c", *frame["text"][3:]])
    hashes = {write_frame(f, "DataFrame", tmp_path).content for f in (swapped, moved)}
    assert len(hashes) == 2, "lengths count"


def test_again_is_verified_and_reused_and_another_is_refused(tmp_path: Path) -> None:
    lines: list[str] = []
    first = quiet(events(), tmp_path / "data")
    before = contents(tmp_path / "data")
    again = prepare(events(), tmp_path / "data", log=lines.append, **SMALL)
    assert "verified and reused" in lines[-1]
    assert again == first
    assert contents(tmp_path / "data") == before
    other = events()
    other.loc[3, "item_id"] = 29 if other.loc[3, "item_id"] != 29 else 28
    with pytest.raises(DataError, match=r"prepared differently: .*sha256 was"):
        quiet(other, tmp_path / "data")
    with pytest.raises(DataError, match="`item_core` was 1, now 2"):
        quiet(events(), tmp_path / "data", item_core=2)
    assert {path.name for path in tmp_path.iterdir()} == {"data"}


def test_it_is_read_from_a_url_like_output_too(tmp_path: Path) -> None:
    url = (tmp_path / "there").as_uri()
    manifest = quiet(events(), url, temp_dir=tmp_path / "temporary")
    assert json.loads((tmp_path / "there" / MANIFEST_NAME).read_text())
    assert quiet(events(), url, temp_dir=tmp_path / "temporary") == manifest


def nan_ids(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(item_id=frame["item_id"].where(frame.index != 5))


def text_nan(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(user_id=frame["user_id"].where(frame.index != 4, "NaN"))


WRONG: dict[str, tuple[Callable[[pd.DataFrame], pd.DataFrame], dict[str, Any]]] = {
    "no column": (lambda f: f.rename(columns={"user_id": "userid"}), {}),
    "no time": (lambda f: f.drop(columns="timestamp"), {}),
    "missing id": (nan_ids, {}),
    "NaN as text": (text_nan, {}),
    "rounded ids": (lambda f: f.assign(item_id=f["item_id"] + 2.0**60), {}),
    "two units": (
        lambda f: f.assign(timestamp=f["timestamp"] * [1, 1000, *[1] * (len(f) - 2)]),
        {},
    ),
    "future": (lambda f: f.assign(timestamp=f["timestamp"] + 2_000_000_000), {}),
    "no moments": (lambda f: f.assign(timestamp=["soon"] * len(f)), {}),
    "booleans": (lambda f: f.assign(item_id=f["item_id"] > 3), {}),
    "lists": (lambda f: f.assign(item_id=[[1]] * len(f)), {}),
    "pattern of moments": (
        lambda f: f.assign(timestamp=pd.to_datetime(f["timestamp"], unit="s")),
        {"time_format": "%Y"},
    ),
    "useless option": (lambda f: f, {"delimiter": ";"}),
    "no rows": (lambda f: f.iloc[:0].astype({"user_id": str}), {}),
    "nothing left": (lambda f: f, {"user_core": 1000}),
}


@pytest.mark.parametrize("kind", ["pandas", "polars", "arrow"])
@pytest.mark.parametrize("wrong", WRONG)
def test_equal_refusals_as_of_parquet(wrong: str, kind: str, tmp_path: Path) -> None:
    spoil, options = WRONG[wrong]
    frame = spoil(events())
    frame.to_parquet(tmp_path / "DataFrame", index=False)
    said: list[MltfrError] = []
    copy = (tmp_path / "DataFrame").rename(tmp_path / "DataFrame.parquet")
    for source in (copy, KINDS[kind](frame)):
        with pytest.raises(MltfrError) as caught:
            quiet(source, tmp_path / "data", **options)
        said.append(caught.value)
    file, own = said
    assert type(own) is type(file)
    assert str(own) == str(file).replace(str(copy), "DataFrame").replace(copy.name, "DataFrame")
    assert "--" not in re.sub("`mltfr [^`]*`", "", str(own))
    assert {path.name for path in tmp_path.iterdir()} == {copy.name}


def test_the_nearest_column_is_named_and_the_parameter_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        quiet(events().rename(columns={"item_id": "itemid"}), tmp_path / "data")
    assert "DataFrame has no column `item_id`" in str(caught.value)
    assert "the nearest is `itemid`" in str(caught.value)
    assert "Name it with `user_column`, `item_column` or `time_column`." in str(caught.value)
    manifest = quiet(
        events().rename(columns={"item_id": "itemid"}), tmp_path / "data", item_column="itemid"
    )
    assert manifest.num_users == 40


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (events().assign(item_id=[7, *["x"] * (len(events()) - 1)]), "column item_id"),
        (events()["user_id"], "a table of named columns"),
        (pd.concat([events(), events()[["user_id"]]], axis=1), "user_id"),
    ],
    ids=["mixed types", "one column", "two of one name"],
)
def test_what_cannot_be_handed_out(frame: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words):
        quiet(frame, tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


def test_a_format_that_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`format='csv'` is given for a table in memory"):
        quiet(events(), tmp_path / "data", format="csv")


def test_lists_one_row_a_user(tmp_path: Path) -> None:
    lists = events().groupby("user_id", as_index=False).agg(list)
    lists.to_parquet(tmp_path / "lists.parquet", index=False)
    quiet(tmp_path / "lists.parquet", tmp_path / "file", format="parquet-lists")
    quiet(lists, tmp_path / "frame", format="parquet-lists")
    assert contents(tmp_path / "frame") == contents(tmp_path / "file")
