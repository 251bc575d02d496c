"""Differences of a matrix's variants to one of them: by the users' ranks where the rows have them,
else by seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from mltfr_dist.errors import DataError
from mltfr_dist.statistics.power import ALPHA, detectable, equivalence_p, holm, seeds_needed
from mltfr_dist.statistics.spread import Spread, seeds_alone
from mltfr_dist.training.comparing.compare import Options, compare_models
from mltfr_dist.training.comparing.load import MATRIX_COLUMN, read_ranks
from mltfr_dist.training.comparing.models import as_models
from mltfr_dist.training.comparing.text import p_text, protocol_text

COMPARED = "test/NDCG@10"
Row = dict[str, Any]


@dataclass(frozen=True)
class Line:
    """One variant against the reference."""

    variant: str
    spread: Spread
    low: float
    high: float
    p: float
    """Corrected for the number of lines (Holm)."""
    equivalence: float | None
    """p of two one-sided tests against the margin, corrected likewise."""

    def verdict(self, margin: float | None) -> str:
        """What may be said."""
        if math.isnan(self.p):
            return "too few seeds"
        differs = self.p < ALPHA and not self.low <= 0 <= self.high
        if self.equivalence is not None and self.equivalence < ALPHA:
            return f"differs, within +-{margin:g}" if differs else f"equivalent (+-{margin:g})"
        return "differs" if differs else "no difference shown"


class Differences(NamedTuple):
    """Every variant against the reference."""

    over: str
    """What the intervals are over."""
    protocol: str
    """By which rules the users were ranked, as their files say."""
    lines: list[Line]


def differences(rows: Sequence[Row], reference: str, options: Options) -> Differences:
    """A line for each variant that shares a seed with ``reference``.

    Raises:
        DataError: Ranks that are not there, or of other rules or users.
    """
    seeds = {row["seed"] for row in rows if row["variant"] == reference}
    paired = [row for row in rows if row["seed"] in seeds]
    others = dict.fromkeys(r["variant"] for r in paired if r["variant"] != reference)
    if not others:
        return Differences("", "", [])
    if all(row.get(MATRIX_COLUMN) for row in paired):
        return _by_users(paired, reference, options)
    lines = [_by_seeds(paired, name, reference, options) for name in others]
    unknown = "not kept in rows without ranks of users"
    return Differences("seeds alone", unknown, _corrected(lines))


def _by_users(rows: Sequence[Row], reference: str, options: Options) -> Differences:
    ordered = sorted(rows, key=lambda row: bool(row["variant"] != reference))
    files = [Path(row[MATRIX_COLUMN]) for row in ordered]
    missing = [str(file) for file in files if not file.exists()]
    if missing:
        raise DataError(
            f"{missing[0]} is not there"
            + (f", nor are {len(missing) - 1} more" * (len(missing) > 1))
            + ", though the matrix names it.",
            rule="A matrix and the folder of its runs are moved together.",
            remedy="Put the runs back where they were, as seen from the matrix.",
        )
    measured = [read_ranks(file, COMPARED.partition("/")[0]) for file in files]
    models = as_models(measured, [row["variant"] for row in ordered])
    compared = compare_models(replace(models, slicing={}), "test", options)
    metric = options.metric
    lines = [
        Line(
            one.model,
            one.spread,
            one.changes[metric].low,
            one.changes[metric].high,
            one.p_holm,
            one.equivalence_p,
        )
        for one in compared.differences
    ]
    return Differences("users and seeds", protocol_text(compared), lines)


def _by_seeds(rows: Sequence[Row], variant: str, reference: str, options: Options) -> Line:
    values = {(row["variant"], row["seed"]): row[COMPARED] for row in rows}
    paired = [
        v - values[reference, seed]
        for (name, seed), v in values.items()
        if name == variant and (reference, seed) in values
    ]
    observed = seeds_alone(np.array(paired))
    if observed.num_seeds < 2:
        return Line(variant, observed, math.nan, math.nan, math.nan, None)
    half = float(stats.t.isf(ALPHA / 2, observed.freedom)) * observed.error
    p = (
        float(2 * stats.t.sf(abs(observed.mean) / observed.error, observed.freedom))
        if observed.error
        else 0.0
    )
    margin, equal = options.margin, None
    if margin is not None:
        equal = equivalence_p(observed.mean, observed.error, observed.freedom, margin)
    return Line(variant, observed, observed.mean - half, observed.mean + half, p, equal)


def _corrected(lines: Sequence[Line]) -> list[Line]:
    """Holm over the lines that have a test."""
    tested = [line for line in lines if not math.isnan(line.p)]
    p = iter(holm([line.p for line in tested]))
    equal = iter(holm([line.equivalence for line in tested if line.equivalence is not None]))
    return [
        line
        if math.isnan(line.p)
        else replace(line, p=next(p), equivalence=None if line.equivalence is None else next(equal))
        for line in lines
    ]


def table(lines: Sequence[Line], options: Options) -> list[list[str]]:
    """Rows of cells, the head first."""
    head = ["variant", "seeds", "difference", "95% interval", "p (Holm)", "detectable (80%)"]
    head += ["seeds needed"] + ["p of equivalence"] * (options.margin is not None)
    rows = [[*head, "verdict"]]
    for line in lines:
        row = [line.variant, str(line.spread.num_seeds), f"{line.spread.mean:+.4f}"]
        if math.isnan(line.p):
            row += ["?"] * (len(head) - 3)
        else:
            row += [f"[{line.low:+.4f}, {line.high:+.4f}]", p_text(line.p)]
            row += [f"{detectable(line.spread.error, line.spread.freedom):.4f}"]
            row += [needed(line.spread, options.difference)]
            row += [] if line.equivalence is None else [p_text(line.equivalence)]
        rows.append([*row, line.verdict(options.margin)])
    return rows


def needed(observed: Spread, difference: float | None) -> str:
    """Seeds that would find ``difference``, or the observed one, with 80% power."""
    if observed.num_seeds < 2:
        return "? (one seed)"
    number = seeds_needed(observed, difference or abs(observed.mean))
    if number is not None:
        return str(number)
    return "> 1000" if observed.num_users == 1 else "more users"
