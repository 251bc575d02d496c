"""Where titles help: ranks of runs by whether the target's title shares a word with the history's.

What a language model knows of words, beyond which of them are equal, can only show where no word is
shared. Words have at least four letters; the hundred that stand in most titles count for nothing.

    python benchmarks/title_slices.py Beauty.txt Beauty_titles.tsv runs/quality/*/ranks.parquet

Runs whose folders differ in the number at the end alone are seeds of one model; the first model is
the reference. Sequences are one user a line, `user item item ...`, the last item the test target.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mltfr_dist.training.reporting.matrix import interval

COMMON = 100
WORD = re.compile(r"[a-z]{4,}")


def words_of(titles: Path) -> dict[str, set[str]]:
    """Item to the words of its title, without those that stand in most titles."""
    with titles.open(newline="") as file:
        rows = csv.DictReader(file, delimiter="\t" if titles.suffix == ".tsv" else ",")
        words = {row["item_id"]: set(WORD.findall(row["title"].lower())) for row in rows}
    counts = Counter(word for of_item in words.values() for word in of_item)
    common = {word for word, _ in counts.most_common(COMMON)}
    return {item: of_item - common for item, of_item in words.items()}


def slices_of(sequences: Path, words: dict[str, set[str]]) -> dict[str, str]:
    """User to slice."""
    result = {}
    with sequences.open() as file:
        for user, *items in map(str.split, file):
            history = set().union(*(words.get(item, set()) for item in items[:-1]))
            target = words.get(items[-1], set())
            result[user] = (
                "target without words"
                if not target
                else "shares a word"
                if target & history
                else "shares none"
            )
    return result


def test_ranks(path: Path) -> dict[str, float]:
    """User to rank of the test target."""
    table = pq.read_table(path)
    table = table.filter(pc.equal(table["split"].cast("string"), "test"))
    return dict(zip(table["user"].to_pylist(), table["rank"].to_pylist(), strict=True))


def ndcg(ranks: NDArray[np.float64]) -> float:
    """Mean NDCG@10 of single targets."""
    return float(np.where(ranks <= 10, 1 / np.log2(1 + ranks), 0.0).mean())


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table for each slice."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sequences", type=Path)
    parser.add_argument("titles", type=Path)
    parser.add_argument("ranks", type=Path, nargs="+")
    options = parser.parse_args(arguments)
    slices = slices_of(options.sequences, words_of(options.titles))
    runs: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    for path in options.ranks:
        name, _, seed = path.parent.name.rpartition("-")
        runs[name][seed] = test_ranks(path)
    reference = next(iter(runs))
    for which in ("shares a word", "shares none", "target without words"):
        users = [user for user, result in slices.items() if result == which]
        print(f"\n{which}: {len(users):,} users")
        for name, seeds in runs.items():
            ranks = {s: np.array([of_user[u] for u in users]) for s, of_user in seeds.items()}
            mean, half = interval([ndcg(values) for values in ranks.values()])
            median = np.median(np.concatenate(list(ranks.values())))
            paired = [
                ndcg(ranks[s]) - ndcg(np.array([runs[reference][s][u] for u in users]))
                for s in ranks.keys() & runs[reference].keys()
            ]
            apart, by = interval(paired)
            print(
                f"  {name:34} NDCG@10 {mean:.4f} +- {half:.4f}  median rank {median:7.1f}"
                f"   minus {reference}: {apart:+.4f} +- {by:.4f}"
            )


if __name__ == "__main__":
    main()
