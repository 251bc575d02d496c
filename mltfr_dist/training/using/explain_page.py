"""The page of `mltfr explain`: one HTML file that loads nothing else. Every name and token is
escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from mltfr_dist.serving.ablation import Answer, Effect
from mltfr_dist.training.using.inference import LoadedRun

METRICS = ("HR@10", "NDCG@10")
COLOURS = ("#4878a8", "#d1802f", "#5d9a55", "#b04a4a", "#7d6ba8", "#8a7560")
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h2 { margin-top: 2.2rem; border-bottom: 1px solid #ccc } h3 { margin-bottom: .3rem }
table { border-collapse: collapse; margin: .6rem 0 } td, th { padding: .15rem .7rem .15rem 0; text-align: left }
td { vertical-align: top }
th { font-weight: 600; border-bottom: 1px solid #999 } td.n { text-align: right; font-variant-numeric: tabular-nums }
code { background: #eef0f3; padding: 0 .25rem; border-radius: 3px; white-space: pre }
.tokens code { display: inline-block; margin-right: .2rem }
.note { color: #555 } .key i { display: inline-block; width: .8rem; height: .8rem; margin: 0 .3rem 0 .9rem }
svg { display: block; margin: .4rem 0; max-width: 100% } details { margin: .5rem 0 } summary { cursor: pointer }
"""  # noqa: E501


@dataclass(frozen=True)
class Group:
    """Users whose first recommendation is of one group of items, and what serves them."""

    name: str
    users: int
    gates: dict[str, float]
    """Mean gate weight of each table at the last position."""
    tokens: list[tuple[str, str, float, float]]
    """Table, token, share of what is read in this group, and over all; those of the largest
    difference.
    """


@dataclass(frozen=True)
class Explained:
    """All that the page shows."""

    run: LoadedRun
    answers: list[Answer]
    groups: list[Group]
    metrics: dict[str, dict[str, float]]
    """Name of the run, of its control, of others, to test metrics."""


def page(explained: Explained) -> str:
    """The whole page."""
    config = explained.run.config
    title = f"What {config.name} reads, and what it owes to it"
    names = explained.run.inputs.table_names
    about = f"{config.backbone.name} over {explained.run.items.num_items:,} items"
    about += f", with MLTFR over {', '.join(names)}" if names else ", bare: there are no tables"
    sections = [
        f"<h1>{escape(title)}</h1><p>{escape(about)}.</p>",
        "<h2>Do the tables matter?</h2>",
        metrics_table(explained.metrics),
    ]
    if explained.groups:
        sections.append("<h2>Which tokens serve which items</h2>")
        sections.append(
            '<p class="note">Users of the validation split by the popularity of their first recommendation: items in '  # noqa: E501
            "three equal groups. Shares are of kept weight times gate; listed are the tokens whose "
            "share in the group "
            "exceeds that over all users by most.</p>"
        )
        sections += [group_part(group) for group in explained.groups]
    sections.append("<h2>Sample users</h2>")
    sections += [answer_part(one) for one in explained.answers]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n'
        + "\n".join(sections)
        + ("\n</body></html>\n")
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table of cells that are HTML already; columns ``numbers`` stand right."""
    lines = ["<table><tr>", *(f"<th>{cell}</th>" for cell in head), "</tr>"]
    for row in rows:
        cells = (
            f'<td class="n">{cell}</td>' if column in numbers else f"<td>{cell}</td>"
            for column, cell in enumerate(row)
        )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return "".join([*lines, "</table>"])


def metrics_table(metrics: dict[str, dict[str, float]]) -> str:
    """Test figures of the run and of its control."""
    rows = [
        [escape(name), *(f"{values[metric]:.4f}" for metric in METRICS)]
        for name, values in metrics.items()
    ]
    note = (
        "One seed each: differences need several to mean anything (<code>mltfr compare</code>)."
        if len(metrics) > 1
        else "No control was given, and without one nothing below says that real tokens are better "
        "than random rows. Train the same run with <code>mltfr.table_content=random</code>, and "
        "name it here by <code>--control</code>."
    )
    head = ["run", *(f"test {name}" for name in METRICS)]
    return table(head, rows, (1, 2)) + f'<p class="note">{note}</p>'


def group_part(group: Group) -> str:
    """One group of items."""
    gates = ", ".join(f"{escape(name)} {weight:.2f}" for name, weight in group.gates.items())
    rows = [
        [escape(name), f"<code>{escape(token)}</code>", f"{here:.2%}", f"{over:.2%}"]
        for name, token, here, over in group.tokens
    ]
    head = ["table", "token", "share here", "over all"]
    text = f"{group.users} user{'s' * (group.users != 1)}" + (
        f"; mean gates: {gates}" if group.users else ""
    )
    rows_table = table(head, rows, (2, 3)) if rows else ""
    return f"<h3>{escape(group.name)}</h3><p>{text}</p>{rows_table}"


def answer_part(one: Answer) -> str:
    """One user."""
    best = ", ".join(f"{escape(r.title or r.item_id)} ({r.score:.2f})" for r in one.best)
    sections = [
        f"<h3>{escape(one.user)}</h3>",
        f"<p><b>Last items:</b> {escape(' → '.join(one.history[-10:]))}</p>",
        f"<p><b>Recommended (score):</b> {best}</p>",
    ]
    if one.views:
        rows = [
            [
                escape(view.table),
                f"{view.gate_weight:.2f}",
                '<span class="tokens">'
                + " ".join(
                    f"<code>{escape(token)}</code>{weight:.2f}" for token, weight in view.tokens
                )
                + "</span>",
            ]
            for view in one.views
        ]
        sections.append(table(["table", "gate", "kept tokens, with weights"], rows, (1,)))
        sections.append(gate_chart(one))
        sections.append("<p><b>Without a table</b> (its experts add nothing):</p>")
        sections.append(effects_table(one.tables))
    if one.items:
        sections.append("<details open><summary><b>Without an item of the history</b></summary>")
        sections.append(effects_table(one.items) + "</details>")
    return "\n".join(sections)


def effects_table(effects: Sequence[Effect]) -> str:
    """What leaving something out does to the top ten."""
    rows = [
        [escape(e.what), str(e.stay), f"{e.shift:.3f}", escape("; ".join(e.entered))]
        for e in effects
    ]
    return table(["without", "of the top ten stay", "scores move by", "enter"], rows, (1, 2))


def gate_chart(one: Answer) -> str:
    """Gate weights over the positions of the history, stacked: one column a position."""
    width, height = max(4, min(16, 900 // max(1, len(one.gates)))), 90
    bars = []
    for column, weights in enumerate(one.gates):
        top = 0.0
        label = escape(one.history[column])
        for m, weight in enumerate(weights):
            bars.append(
                f'<rect x="{column * width}" y="{top:.1f}" width="{width - 1}" '
                f'height="{weight * height:.1f}" fill="{COLOURS[m % len(COLOURS)]}">'
                f"<title>{label}: {escape(one.views[m].table)} {weight:.2f}</title></rect>"
            )
            top += weight * height
    keys = "".join(
        f'<i style="background:{COLOURS[m % len(COLOURS)]}"></i>{escape(view.table)}'
        for m, view in enumerate(one.views)
    )
    size = f'width="{width * len(one.gates)}" height="{height}"'
    return (
        f'<p class="key">Gates over the history, oldest first:{keys}</p>'
        f'<svg {size} role="img">{"".join(bars)}</svg>'
    )
