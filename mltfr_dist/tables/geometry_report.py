"""`mltfr tables --inspect`: the geometry of stored tables as text, as pictures, and in
TensorBoard's projector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mltfr_dist.errors import ConfigError
from mltfr_dist.files import write_atomically
from mltfr_dist.tables.geometry import (
    NEIGHBOURS,
    SHOWN_WORDS,
    Overlap,
    Spread,
    neighbour_words,
    overlaps,
    sampled,
    shared_words,
    spread,
    words_of,
)
from mltfr_dist.tables.store import TokenTable, load_table

PICTURE = "geometry.png"
PROJECTED_WORDS = 5_000
_SHOWN_NEIGHBOURS = 5


def inspect_tables(
    folders: Sequence[str | Path], *, words: Sequence[str] = (), pictures: Path | None = None
) -> str:
    """What the tables' geometry has to offer, as text.

    Args:
        folders: Stored tables; several are compared with each other.
        words: Whose neighbours are shown; none: a few that all tables hold.
        pictures: Folder for a PNG and a TensorBoard page with the words' vectors.

    Raises:
        DataError: A table is missing or damaged, or the tables share too few words.
        ConfigError: A word that a table does not hold as a whole, or a table named twice.
    """
    tables = [load_table(folder) for folder in folders]
    names = [table.name for table in tables]
    if len(set(names)) < len(names):
        raise ConfigError(f"{', '.join(names)}: a table is named twice.", remedy="Name each once.")
    shared = shared_words(tables)
    for word in words:
        lacking = [table.name for table in tables if word not in words_of(table)]
        if lacking:
            raise ConfigError(
                f"{', '.join(lacking)} holds no token that is the whole word {word!r}.",
                rule="Neighbours are shown of words in lower case that are one token in each "
                "table.",
                remedy=f"Give others, as {', '.join(sampled(shared)[:SHOWN_WORDS])}.",
            )
    shown = list(words) or sampled(shared)[:: max(1, len(sampled(shared)) // SHOWN_WORDS)]
    spreads = {table.name: spread(table, sampled(shared)) for table in tables}
    agreed = overlaps(tables)
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
        draw(spreads, agreed, pictures / PICTURE)
        for table in tables:
            write_words(pictures / table.name, table)
    lines = [*_spread_lines(tables, spreads), "", *_overlap_lines(agreed)]
    for word, *nearest in zip(
        shown, *(neighbour_words(t, shown, _SHOWN_NEIGHBOURS) for t in tables), strict=True
    ):
        lines += [f"nearest to {word!r}, by cosine"]
        for table, near in zip(tables, nearest, strict=True):
            listed = ", ".join(f"{token.strip()} {cosine:.2f}" for token, cosine in near)
            lines += [f"  {table.name:<14}{listed}"]
    if pictures is not None:
        lines += ["", f"{pictures / PICTURE}; the words' vectors for TensorBoard: {pictures}"]
    return "\n".join(lines)


def _spread_lines(tables: Sequence[TokenTable], spreads: Mapping[str, Spread]) -> list[str]:
    lines = [
        f"{'table':<14}{'rows':>9}{'columns':>9}{'dimensions':>12}{'mean cosine':>17}"
        f"{'nearest':>9}{'of random':>11}"
    ]
    for table in tables:
        of_table = spreads[table.name]
        before, after = of_table.mean_cosine
        lines.append(
            f"{table.name:<14}{table.info.num_rows:>9,}{table.info.dim:>9,}{of_table.dimensions:>12.1f}"
            f"{f'{before:.3f} to {after:.3f}':>17}{float(of_table.nearest.median()):>9.3f}"
            f"{float(of_table.nearest_random.median()):>11.3f}"
        )
    return [
        *lines,
        "dimensions: 1 / sum of squared shares of variance. mean cosine: of two rows, as the model",
        "has them and as stored. nearest: median cosine of a word with its nearest row, and in a",
        "table of normal rows of the same mean and covariance: the more, the less it is an "
        "accident.",
    ]


def _overlap_lines(agreed: Mapping[tuple[str, str], Overlap]) -> list[str]:
    if not agreed:
        return []
    lines = [f"of a word's {NEIGHBOURS} nearest words in one table, in the other stand"]
    for (first, second), overlap in agreed.items():
        lines.append(
            f"  {f'{first}, {second}':<30}{overlap.share:>6.1%}  "
            f"(by chance {overlap.by_chance:.1%}; {overlap.words:,} words in both)"
        )
    return [*lines, ""]


def draw(
    spreads: Mapping[str, Spread], agreed: Mapping[tuple[str, str], Overlap], path: Path
) -> None:
    """Spectra, cosines of nearest neighbours beside the control's, and overlaps, side by side."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    bins = np.linspace(0, 1, 51)
    for index, (name, of_table) in enumerate(spreads.items()):
        axis = np.arange(1, len(of_table.shares) + 1)
        left.plot(axis, of_table.shares.cumsum(0), label=name, color=f"C{index}")
        shape = {"bins": bins, "histtype": "step", "color": f"C{index}"}
        middle.hist(of_table.nearest.clamp(0, 1).numpy(), **shape, label=name)
        middle.hist(of_table.nearest_random.clamp(0, 1).numpy(), **shape, linestyle=":")
    left.set(xscale="log", xlabel="principal axes", ylabel="share of the variance, summed")
    left.legend(frameon=False)
    middle.set(xlabel="cosine with the nearest row (dotted: random rows)", ylabel="words")
    middle.legend(frameon=False)
    labels = [f"{first},\n{second}" for first, second in agreed]
    right.bar(labels, [overlap.share for overlap in agreed.values()])
    right.scatter(
        labels, [overlap.by_chance for overlap in agreed.values()], color="black", zorder=2
    )
    right.set_ylabel(f"of {NEIGHBOURS} nearest words in common (dot: by chance)")
    if not agreed:
        right.set_axis_off()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def write_words(folder: Path, table: TokenTable) -> None:
    """Vectors of a table's whole words for TensorBoard's projector."""
    from torch.utils.tensorboard import SummaryWriter

    folder.mkdir(parents=True, exist_ok=True)
    words = list(words_of(table).items())[:PROJECTED_WORDS]
    SummaryWriter(str(folder)).close()  # TensorBoard looks for projectors beside event files
    rows = table.rows[[row for _, row in words]].numpy()
    np.savetxt(folder / "vectors.tsv", rows, fmt="%.5g", delimiter="\t")
    write_atomically(folder / "words.tsv", "".join(f"{word}\n" for word, _ in words))
    write_atomically(
        folder / "projector_config.pbtxt",
        f'embeddings {{\n  tensor_name: "{table.name}"\n  tensor_path: "vectors.tsv"\n'
        '  metadata_path: "words.tsv"\n}\n',
    )
