"""Texts and their places in Arrow arrays are those that lists and dictionaries give."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mltfr_dist.serving import texts as module
from mltfr_dist.serving.texts import Kept, Lookup, Texts, hashed

WORDS = st.text(st.characters(codec="utf-8"), max_size=6)


def column(words: list[str | None], size: int = 3) -> pa.ChunkedArray:
    """In chunks, as Parquet files give them."""
    blocks = [words[start : start + size] for start in range(0, len(words), size)]
    return pa.chunked_array(blocks, pa.string())


@settings(deadline=None)
@given(st.lists(WORDS, unique=True, max_size=30), st.lists(WORDS, max_size=10))
def test_places_are_those_of_a_dictionary(words: list[str], others: list[str]) -> None:
    places = {word: place for place, word in enumerate(words)}
    asked = [*others, *words[::-1]]
    result = Lookup(Texts.of(column(words))).find(asked)
    assert result.tolist() == [places.get(word, -1) for word in asked]


def test_texts_of_one_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [f"w{n}" for n in range(40)]
    monkeypatch.setattr(module, "hashed", lambda t: np.zeros(len(t), np.uint64))
    lookup = Lookup(Texts.of(column(words)))
    assert lookup.find([*words, "w40", ""]).tolist() == [*range(40), -1, -1]


def test_hashes_do_not_depend_on_neighbours_and_rarely_meet() -> None:
    words = [*(str(n) for n in range(200_000)), *(f"\x00{n}" for n in range(1000)), "", "\x00"]
    together = hashed(pa.array(words))
    assert len(np.unique(together)) == len(words)
    assert np.array_equal(together[777:999], hashed(pa.array(words[777:999])))
    assert np.array_equal(together[777:999], hashed(pa.array(words).slice(777, 222)))


def test_a_column_reads_as_a_list() -> None:
    words = ["", "a", None, "b", "\u00e4", "c", None]
    texts: Texts[str | None] = Texts.of(column(words))
    assert texts == words
    assert texts[1:6:2] == words[1:6:2]
    assert texts[-1] is None
    assert texts[4] == words[4]
    assert texts.index("b") == 3
    assert texts != [*words, "d"]
    assert texts.at(np.array([6, 1, 1, 4])) == [None, "a", "a", words[4]]
    assert texts.between(2, 5).to_pylist() == words[2:5]
    with pytest.raises(IndexError):
        texts[len(words)]
    assert texts.any
    assert not Texts.of(column(["", None])).any
    assert not Texts.of(column([])).any


def test_chunks_that_were_asked_for_last_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [f"word {number:02}" for number in range(12)]
    chunks, read = column(words).chunks, []

    def reader(number: int) -> pa.Array:
        read.append(number)
        return chunks[number]

    texts: Texts[str] = Texts([3] * 4, Kept(reader))
    assert texts == words
    assert [texts[1], texts[11]] == [words[1], words[11]]
    assert read == [0, 1, 2, 3], "all that was read fits"
    monkeypatch.setattr(module, "HELD_BYTES", 2 * chunks[0].nbytes)
    texts = Texts([3] * 4, Kept(reader))
    read.clear()
    assert texts.at(np.array([11, 0, 9, 1, 4])) == [words[n] for n in (11, 0, 9, 1, 4)]
    assert read == [0, 1, 3], "each once"
    assert [texts[n] for n in (5, 10, 0, 5)] == [words[n] for n in (5, 10, 0, 5)]
    assert read == [0, 1, 3, 0, 1], "of two that are kept the one not asked for longest goes"
