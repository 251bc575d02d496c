"""Titles in a table's own tokens."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from table_files import table

from mltfr_dist.config import TableConfig
from mltfr_dist.tables.content import with_content
from mltfr_dist.tables.store import TokenTable, load_table, save_table
from mltfr_dist.tables.titles import title_features, title_tokens

VOCABULARY = (" star", " Star", "s", " trek", "k", " the", "tre", ":", "2", " first", " firs", "é")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> TokenTable:
    described = {
        "source_files": ("x",),
        "source_sha256": "0" * 64,
        "tensor": "x",
        "source_dtype": "F32",
        "source_rows": 12,
    }
    described |= {"vocabulary_file": "x", "licence": None, "dropped": {}, "config": TableConfig()}
    described |= {"mean_cosine_before": 0.0, "mean_cosine_after": 0.0, "name": "small"}
    place: Path = tmp_path_factory.mktemp("titles")
    save_table(place, table(len(VOCABULARY), 6), VOCABULARY, **described)
    return load_table(place / "small")


@pytest.mark.parametrize(
    ("title", "tokens"),
    [
        (
            "Star Trek",
            [" Star", " trek"],
        ),  # as written where the vocabulary has it, in lower case where it has not
        ("STAR", [" star"]),
        (
            "Stars: First 2",
            [" Star", "s", ":", " first", "2"],
        ),  # the longest that fits; unmarked where no marked token is
        ("trek-trek", [" trek", " trek"]),  # "-" is no token here, and what follows begins a word
        ("astar", ["s"]),  # " star" begins words only: the rest has "s" and nothing else
        ("Amé", ["é"]),
        ("", []),
    ],
)
def test_a_title_is_cut_into_the_longest_tokens(title: str, tokens: list[str]) -> None:
    rows = {token: row for row, token in enumerate(VOCABULARY)}
    assert [VOCABULARY[row] for row in title_tokens(title, rows)] == tokens


def test_features_are_weighed_centred_mixtures_of_rows(stored: TokenTable) -> None:
    titles = [None, "The Star", "the trek trek", None, "?", "the Star 2"]
    rows, items = stored.rows.double(), len(titles)
    once, twice, thrice = (math.log(items / count) for count in (1, 2, 3))
    sums = {
        1: thrice * rows[5] + twice * rows[1],
        2: thrice * rows[5] + once * rows[3],  # a word said twice counts once
        5: thrice * rows[5] + twice * rows[1] + once * rows[8],
    }
    unit = {item: total / total.norm() for item, total in sums.items()}
    mean = torch.stack(list(unit.values())).mean(0)
    result = title_features(titles, stored)
    for item in range(items):
        expected = (
            (unit[item] - mean) / (unit[item] - mean).norm()
            if item in unit
            else torch.zeros(6).double()
        )
        assert torch.allclose(result[item].double(), expected, atol=1e-6), item


def test_a_control_table_has_the_same_links_and_other_rows(stored: TokenTable) -> None:
    titles = [None, "Star", "trek", "Star"]
    real, random = (
        title_features(titles, with_content(stored, content, 0)) for content in ("real", "random")
    )
    for result in (real, random):
        assert torch.equal(result[1], result[3])
        assert not torch.allclose(result[1], result[2])
    assert not torch.allclose(real, random)
