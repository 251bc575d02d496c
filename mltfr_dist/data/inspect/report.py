"""`mltfr inspect`: what a prepared folder holds, as a table, as PNG plots and as a TensorBoard
page.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import numpy as np

from mltfr_dist.data.inspect.plots import line_plot
from mltfr_dist.data.shards.manifest import Manifest, load_manifest, verify_maps
from mltfr_dist.data.shards.reader import read_shard
from mltfr_dist.data.shards.short_parts import one_item_parts

_LENGTHS = (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)
SHOWN = 100_000
"""Items whose popularity is drawn, at most."""
_UNITS = ((5e17, 10**9), (5e14, 10**6), (5e11, 10**3), (5e8, 1))


@dataclass(frozen=True)
class Facts:
    """What was counted.

    Attributes:
        manifest: the folder's manifest.
        lengths: split -> [longest + 1] sequences of each length.
        counts: [num_items] training occurrences of each item, most first.
        cold: split -> (targets that training never shows, targets).
        repeats: training interactions with an item that the user had before.
    """

    manifest: Manifest
    lengths: dict[str, np.ndarray]
    counts: np.ndarray
    cold: dict[str, tuple[int, int]]
    repeats: int


def gather(folder: Path) -> Facts:
    """Read every shard once, verified; the maps of users and items are verified, too.

    Raises:
        DataError: something is missing or damaged.
    """
    manifest = load_manifest(folder)
    verify_maps(folder, manifest)
    lengths = {
        name: np.zeros(split.max_length + 1, dtype=np.int64)
        for name, split in manifest.splits.items()
    }
    counts = np.zeros(manifest.num_items + 1, dtype=np.int64)
    repeats = 0
    cold = {"valid": (0, 0), "test": (0, 0)}
    for name in ("train", *cold):  # training first, which decides what is cold
        for info in manifest.splits[name].shards:
            sequences = read_shard(folder, info, num_items=manifest.num_items)
            lengths[name] += np.bincount(sequences.lengths, minlength=len(lengths[name]))
            if name == "train":
                np.add.at(counts, sequences.items, 1)
                owners = np.repeat(np.arange(len(sequences)), sequences.lengths)
                pairs = owners * (manifest.num_items + 1) + sequences.items
                repeats += len(pairs) - len(np.unique(pairs))
            else:
                unseen = counts[sequences.distinct_targets()[1]] == 0
                cold[name] = (cold[name][0] + int(unseen.sum()), cold[name][1] + len(unseen))
    np.add.at(counts, one_item_parts(folder, manifest, counts), 1)
    counts[1:].sort()
    return Facts(manifest, lengths, counts[:0:-1], cold, repeats)


def table(folder: Path, facts: Facts) -> str:
    """The facts as text."""
    manifest, report = facts.manifest, facts.manifest.report
    rows = [
        ("users", f"{manifest.num_users:,}"),
        ("items", f"{manifest.num_items:,}"),
        ("interactions", f"{manifest.num_interactions:,} of {report.rows_read:,} read"),
        ("duplicates dropped", f"{report.duplicates_dropped:,} ({manifest.prepare.duplicates})"),
        (
            "repeated items",
            f"{facts.repeats:,} training interactions with an item the user had before",
        ),
        ("ties in time", f"{report.ties:,}"),
        ("density", f"{manifest.num_interactions / (manifest.num_users * manifest.num_items):.4%}"),
        ("split", manifest.prepare.split_in_words),
        ("time range", _time_range(manifest)),
    ]
    if report.cut_times:
        rows.append(("cuts", " and ".join(moment(cut) for cut in report.cut_times)))
    top = facts.counts[: max(1, len(facts.counts) // 100)].sum() / max(1, facts.counts.sum())
    rows.append(
        (
            "popularity",
            f"top 1% of items: {top:.1%} of training; {int((facts.counts == 0).sum()):,} items "
            f"never in it",
        )
    )
    lines = [f"{folder}", *(f"  {name:<20}{value}" for name, value in rows), ""]
    lines.append(
        f"  {'split':<8}{'sequences':>12}{'items':>14}{'median':>8}{'mean':>8}{'longest':>9}"
        f"{'shards':>8}{'cold targets':>22}"
    )
    for name, split in manifest.splits.items():
        cold, total = facts.cold.get(name, (0, 0))
        note = f"{cold:,} ({cold / total:.2%})" if total else ""
        median = (
            int(np.searchsorted(np.cumsum(facts.lengths[name]), split.num_sequences / 2))
            if split.num_sequences
            else 0
        )
        mean = split.num_items / max(1, split.num_sequences)
        lines.append(
            f"  {name:<8}{split.num_sequences:>12,}{split.num_items:>14,}{median:>8}{mean:>8.1f}"
            f"{split.max_length:>9,}"
            f"{len(split.shards):>8}{note:>22}"
        )
    return "\n".join(
        [*lines, "", "  training sequences by length", *_histogram(facts.lengths["train"])]
    )


def _histogram(lengths: np.ndarray) -> list[str]:
    edges = [*_LENGTHS, max(_LENGTHS[-1] + 1, len(lengths))]
    sums = [(a, b - 1, int(lengths[a:b].sum())) for a, b in pairwise(edges)]
    most = max(1, *(count for *_, count in sums))
    return [
        f"  {f'{a}-{b}' if b > a else a:>10} {count:>12,}  {'#' * round(40 * count / most)}"
        for a, b, count in sums
        if count
    ]


def moment(time: str) -> str:
    """A time as a date, if its size says that it is one; else as it is."""
    value = float(time)
    for least, scale in _UNITS:
        if least <= value < least * 10:
            return f"{datetime.fromtimestamp(value / scale, UTC):%Y-%m-%d %H:%M} UTC"
    return time


def _time_range(manifest: Manifest) -> str:
    times = manifest.report.times
    if times:
        return f"{moment(times[0])} to {moment(times[1])}"
    if manifest.prepare.format == "sequences":
        return "none: sequence text has an order and no times"
    return "not recorded (prepared by an earlier version)"


def write_plots(facts: Facts, folder: Path) -> list[Path]:
    """`lengths.png` and `popularity.png` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    histogram = facts.lengths["train"]
    present = np.flatnonzero(histogram)
    seen = np.count_nonzero(facts.counts)  # they stand first
    shown = np.arange(seen)
    if seen > SHOWN:  # a point for each of so many steps of a logarithmic axis
        shown = np.unique(np.geomspace(1, seen, SHOWN).astype(np.int64)) - 1
    lengths, popularity = folder / "lengths.png", folder / "popularity.png"
    line_plot(
        lengths, present, histogram[present], "training sequences by length", "items", "sequences"
    )
    line_plot(
        popularity,
        shown + 1,
        facts.counts[shown],
        "item popularity",
        "rank",
        "training interactions",
    )
    return [lengths, popularity]


def write_board(folder: Path, facts: Facts, plots: list[Path], text: str) -> None:
    """A TensorBoard page in ``folder``: the table, the plots, the lengths and counts as
    histograms.
    """
    from PIL import Image
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        writer.add_text("data/facts", "\n".join(f"    {line}" for line in text.splitlines()))
        for path in plots:
            with Image.open(path) as image:
                writer.add_image(
                    f"data/{path.stem}", np.asarray(image.convert("RGB")), dataformats="HWC"
                )
        lengths = facts.lengths["train"]
        writer.add_histogram(
            "data/train_lengths", np.repeat(np.arange(len(lengths)), np.minimum(lengths, 10_000))
        )
        writer.add_histogram(
            "data/log10_item_counts", np.log10(facts.counts[: np.count_nonzero(facts.counts)])
        )


def inspect(folder: str | Path, output: str | Path | None) -> str:
    """The table of a prepared folder; with ``output``, plots and a TensorBoard page go there."""
    folder = Path(folder)
    output = None if output is None else Path(output)
    facts = gather(folder)
    text = table(folder, facts)
    if output is not None:
        write_board(output, facts, write_plots(facts, output), text)
        text += (
            f"\n\nPlots and a TensorBoard page are in {output} (`tensorboard --logdir {output}`)."
        )
    return text
