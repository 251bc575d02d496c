"""A comparison in words: on the screen, as Markdown, as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from mltfr_dist.files import write_atomically, writing
from mltfr_dist.training.comparing.compare import Change, Comparison, Difference, verdict
from mltfr_dist.training.comparing.plot import write_plot

Table = list[list[str]]
NAME = "compare"
"""Of the files, before their endings."""


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Write compare.md, compare.json and compare.png into ``folder``.

    Raises:
        ConfigError: It cannot be written.
    """
    page, values, plot = (folder / f"{NAME}.{ending}" for ending in ("md", "json", "png"))
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_plot(plot, comparison)
        write_atomically(values, json.dumps(comparison.as_json(), indent=2) + "\n")
        write_atomically(
            page, f"# Comparison with {comparison.reference}\n\n" + as_markdown(comparison)
        )
    return [page, values, plot]


def as_text(comparison: Comparison) -> str:
    """For the screen: aligned columns."""
    lines = []
    for title, table in tables(comparison):
        lines += [title, "", *aligned(table), ""]
    return "\n".join([*lines, *notes(comparison)])


def as_markdown(comparison: Comparison) -> str:
    """The same as Markdown, with the plot."""
    lines = []
    for title, table in tables(comparison):
        lines += [f"## {title}", "", *markdown(table), ""]
    lines += [f"![Differences with their intervals]({NAME}.png)", ""]
    return "\n".join([*lines, "## How", "", *(f"- {note}" for note in notes(comparison)), ""])


def tables(comparison: Comparison) -> list[tuple[str, Table]]:
    """Every table with its title."""
    metric, reference = comparison.options.metric, comparison.reference
    shown = [
        (f"{comparison.split} split, {size(comparison)}", means(comparison)),
        (f"{metric}, difference to {reference}", differences(comparison)),
        ("What this design could have shown", power(comparison)),
        (f"Other metrics, difference to {reference}, 95% interval", other_metrics(comparison)),
    ]
    for difference in comparison.differences:
        if difference.slices:
            title = f"{metric} by slice of the users, {difference.model} and {reference}"
            shown.append((title, slices(difference)))
    return shown


def size(comparison: Comparison) -> str:
    """Users, and targets where there are more."""
    more = f", {comparison.num_targets:,} targets" * (comparison.num_targets > comparison.num_users)
    return f"{comparison.num_users:,} users{more}"


def means(comparison: Comparison) -> Table:
    """Each model's metrics."""
    names = list(next(iter(comparison.means.values())))
    table = [["model", "seeds", *names]]
    for model in comparison.models:
        seeds = [str(seed) for seed in model.seeds if seed is not None]
        values = [f"{comparison.means[model.label][name]:.4f}" for name in names]
        table.append([model.label, ",".join(seeds) or "-", *values])
    return table


def differences(comparison: Comparison) -> Table:
    """The metric that is tested."""
    head = ["model", "difference", "95% interval", "relative", "p", "p (Holm)", "effect"]
    table = [[*head, "wins", "losses", "ties", "verdict"]]
    for one in comparison.differences:
        change = one.changes[comparison.options.metric]
        base = comparison.means[comparison.reference][comparison.options.metric]
        relative = f"{change.difference / base:+.1%}" if base else "-"
        numbers = [relative, p_text(one.p), p_text(one.p_holm), f"{one.effect:+.3f}"]
        users = [f"{n:,}" for n in (one.wins, one.losses, one.ties)]
        cells = [*numbers, *users, verdict(one, comparison.options)]
        table.append([one.model, f"{change.difference:+.4f}", interval(change), *cells])
    return table


def power(comparison: Comparison) -> Table:
    """What the design could have shown."""
    margin = comparison.options.margin
    table = [["model", "paired seeds", "standard error", "detectable (80%)", "seeds needed"]]
    table[0] += ["for"] if margin is None else ["for", f"p (Holm) of +-{margin:g}"]
    for one in comparison.differences:
        row = [one.model, str(one.spread.num_seeds), f"{one.spread.error:.4f}"]
        row += [f"{one.detectable:.4f}", seeds_text(one), f"{one.seeds_for:.4f}"]
        table.append(row + ([] if one.equivalence_p is None else [p_text(one.equivalence_p)]))
    return table


def seeds_text(one: Difference) -> str:
    """How many seeds would find the difference with 80% power."""
    if one.spread.num_seeds < 2:
        return "? (one seed)"
    return "more users" if one.seeds_needed is None else str(one.seeds_needed)


def other_metrics(comparison: Comparison) -> Table:
    """The metrics that are not tested."""
    names = [
        name for name in comparison.differences[0].changes if name != comparison.options.metric
    ]
    table = [["model", *names]]
    for one in comparison.differences:
        changes = [one.changes[name] for name in names]
        table.append([one.model, *(f"{c.difference:+.4f} {interval(c)}" for c in changes)])
    return table


def slices(one: Difference) -> Table:
    """The metric that is tested, by slice."""
    table = [
        ["slice", "users", "reference", "model", "difference", "95% interval", "wins", "losses"]
    ]
    for user_slice in one.slices:
        values = [
            f"{user_slice.reference:.4f}",
            f"{user_slice.model:.4f}",
            f"{user_slice.change.difference:+.4f}",
        ]
        counts = [f"{user_slice.wins:,}", f"{user_slice.losses:,}"]
        table.append(
            [
                user_slice.name,
                f"{user_slice.users:,}",
                *values,
                interval(user_slice.change),
                *counts,
            ]
        )
    return table


def protocol_text(comparison: Comparison) -> str:
    """By which rules the ranks came about, and how checkpoints were picked."""
    if not comparison.protocol:
        return "no file says it"
    rules = [f"{name} {rule}" for name, rule in comparison.protocol.items()]
    picked = dict.fromkeys(m.picked_on for m in comparison.models if m.picked_on)
    rules += [f"checkpoints by {', '.join(picked)}"] if picked else []
    return "; ".join([*rules, "leak check passed at preparation, on the shards as written"])


def notes(comparison: Comparison) -> list[str]:
    """By which rules, and what each number is."""
    options, seeds = comparison.options, max(d.spread.num_seeds for d in comparison.differences)
    said = [f"Protocol: {protocol_text(comparison)}."]
    if comparison.unknown:
        said.append(
            f"{', '.join(comparison.unknown)} do not say by which rules they were made "
            "(candidates, seen items, ties): their users and targets are the same, the rules "
            "are taken on trust."
        )
    on_test = [m.label for m in comparison.models if m.picked_on.endswith(" on test")]
    if on_test and comparison.split == "test":
        said.append(
            f"{', '.join(on_test)}: the checkpoint was picked on the test split, as published; its "
            "figures are too high."
        )
    said.append(
        f"Intervals: percentile bootstrap over users{' and seeds' * (seeds > 1)}, "
        f"{options.resamples:,} resamples, seed {options.seed}"
        + ("." if seeds > 1 else "; with one seed they hold for these trained models alone.")
    )
    tests = len(comparison.differences)
    said.append(
        f"p: two-sided paired randomisation test over users on {options.metric}, "
        f"{options.resamples:,} draws; Holm over {tests} comparison{'s' * (tests > 1)}. A "
        f"difference "
        "is shown where p (Holm) is below 0.05 and the interval leaves zero out. Effect: mean by "
        "standard deviation of the users' differences. Slices and other metrics are not tested."
    )
    said += [pairing for one in comparison.differences for pairing in unpaired(comparison, one)]
    return said


def unpaired(comparison: Comparison, one: Difference) -> list[str]:
    """What is to be said of seeds that have no partner."""
    model = next(m for m in comparison.models if m.label == one.model)
    sizes = (len(model.seeds), len(comparison.models[0].seeds))
    if 1 in sizes:
        return [
            f"{label} has one run: it is compared with each of the other's, and how it would "
            f"differ "
            "between seeds is not in the interval."
            for label, size in ((one.model, sizes[0]), (comparison.reference, sizes[1]))
            if size == 1 < max(sizes)
            and (model if label == one.model else comparison.models[0]).seeds != (None,)
        ]
    if any(mine != other for mine, other in one.paired_seeds):
        return [f"{one.model} and {comparison.reference} share no seed: runs are paired in order."]
    if len(one.paired_seeds) < max(sizes):
        return [f"{one.model}: only seeds that {comparison.reference} has, too, are compared."]
    return []


def interval(change: Change) -> str:
    """`[-0.0012, +0.0034]`."""
    return f"[{change.low:+.4f}, {change.high:+.4f}]"


def p_text(p: float) -> str:
    """Four digits; smaller ones by their power of ten."""
    return f"{p:.4f}" if p >= 0.001 else f"{p:.0e}"


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines of columns, the first flush left."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return [
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]


def markdown(table: Sequence[Sequence[str]]) -> list[str]:
    """The same as a table of Markdown."""
    head, *rows = [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table
    ]
    return [head, "|---" + "|---:" * (len(table[0]) - 1) + "|", *rows]
