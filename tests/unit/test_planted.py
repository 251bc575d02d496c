"""The planted control: its worlds are what their dial says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from benchmarks import planted
from mltfr_dist.config import TableConfig
from mltfr_dist.errors import DataError
from mltfr_dist.tables.store import TokenTable, load_table, save_table

ITEMS, USERS = 60, 80
WORDS = [f"{a}{b}{c}" for a in "abcdef" for b in "ghijkl" for c in "mnop"]


def made_table(folder: Path, words: Sequence[str], dim: int) -> TokenTable:
    """A table of random rows, a word each."""
    rows = torch.randn(len(words), dim, generator=torch.Generator().manual_seed(0))
    described = {
        "source_files": ("made",),
        "source_sha256": "0" * 64,
        "tensor": "made",
        "source_dtype": "F32",
        "source_rows": len(rows),
        "vocabulary_file": "made",
        "licence": None,
        "dropped": {},
        "mean_cosine_before": 0.0,
        "mean_cosine_after": 0.0,
        "config": TableConfig(),
    }
    save_table(folder, rows, [f" {word}" for word in words], name="words", **described)
    return load_table(folder / "words")


@pytest.fixture
def table(tmp_path: Path) -> TokenTable:
    return made_table(tmp_path, WORDS, 4)


def cosines(world: planted.World, table: TokenTable) -> np.ndarray:
    """Of the features of items that follow each other in a walk."""
    features = planted.title_features([None, *world.titles], table)[1:]
    pairs = np.concatenate([np.stack([walk[:-1], walk[1:]], 1) for walk in world.walks])
    result: np.ndarray = F.cosine_similarity(features[pairs[:, 0]], features[pairs[:, 1]]).numpy()
    return result


def test_the_dial_decides_whether_steps_follow_the_geometry(table: TokenTable) -> None:
    worlds = {
        dial: planted.make_world(table, dial, 0, items=ITEMS, users=USERS) for dial in (0, 0.5, 1)
    }
    means = {dial: cosines(world, table).mean() for dial, world in worlds.items()}
    assert abs(means[0]) < 0.1, "no link: names and steps are independent"
    assert means[1] > 0.8
    assert means[0] + 0.2 < means[0.5] < means[1] - 0.2
    assert worlds[0].titles == worlds[1].titles, "the same names at any dial"


def test_a_world_is_a_function_of_its_arguments(table: TokenTable) -> None:
    first, again, other = (
        planted.make_world(table, 0.5, seed, items=ITEMS, users=USERS) for seed in (1, 1, 2)
    )
    assert all(map(np.array_equal, first.walks, again.walks))
    assert first.titles == again.titles != other.titles
    words = [word for title in first.titles for word in title.split()]
    assert len(words) == len(set(words)) == 2 * ITEMS
    for walk in first.walks:
        assert 5 <= len(walk) <= 10
        assert len(set(walk.tolist())) == len(walk)


def test_a_table_of_too_few_words_is_refused(table: TokenTable) -> None:
    with pytest.raises(DataError, match="holds 144 whole words; 146 are needed"):
        planted.make_world(table, 1.0, 0, items=73, users=2)


@pytest.mark.slow  # twelve runs
@pytest.mark.timeout(1800)
def test_both_ends_of_the_dial_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = ("abcdefghijkl", "aeiou", "bcdfgklmnp", "aeiou")
    words = ["".join(letters) for letters in product(*blocks)][:1600]
    made_table(tmp_path, words, 8)
    command = [
        *("--tables", "words", "--worlds", "worlds", "--items", "600", "--users", "600"),
        *("--dials", "0", "1", "--seeds", "0", "1", "2"),
        *("--variants", "grounded", "grounded_random", "--jobs", "2"),
        *("--set", "training.epochs=8", "backbone.hidden_dim=32", "training.global_batch_size=64"),
    ]
    assert planted.main(command) == 0
    nothing, full = (
        curve["differences"]["grounded - grounded_random"]
        for curve in json.loads(Path("planted.json").read_text())
    )
    assert full["seeds"] == nothing["seeds"] == 3
    assert full["difference"] > full["half_width"], "where tokens are all that counts, they help"
    assert abs(nothing["difference"]) < nothing["half_width"], "where they say nothing, they do not"
    assert full["difference"] > 3 * abs(nothing["difference"])
