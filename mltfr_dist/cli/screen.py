"""What commands print at their end: whole in a file or a pipe; on a terminal in lines that fit."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from itertools import groupby, pairwise

from mltfr_dist.progress import broken, columns

FENCE = "```"
RULE = re.compile(r":?-+:?")
"""A cell of the line below a Markdown table's head."""

Rows = list[list[str]]
"""Cells, each padded to its column's width."""


def show(text: str) -> None:
    """Print a document: on a terminal prose is broken between words, and a table that is too wide
    comes in parts, each with the first columns. Code stays whole.
    """
    terminal = sys.stdout is not None and sys.stdout.isatty()
    print(fitted(text, columns(sys.stdout)) if terminal else text, flush=True)


def fitted(text: str, width: int) -> str:
    """``text`` in lines of at most ``width`` columns, where that can be."""
    code, lines = False, []
    for kind, some in groupby(text.split("\n"), _kind):
        block = list(some)
        if kind == FENCE:
            code ^= len(block) % 2 == 1
        if code or kind == FENCE or all(len(line) <= width for line in block):
            lines += block
        elif kind == "|":
            lines += _in_pieces(*_markdown(block), "| ", " | ", " |", width)
        elif len(block) > 1 and len((rows := _aligned(block))[0]) > 1:
            lines += _in_pieces(rows, 1, "", "  ", "", width)
        else:
            hang = {"- ": 2}.get(block[0][:2], 4 * (len(block) > 1))
            lines += [broken(line, width, hang) for line in block]
    return "\n".join(lines)


def _kind(line: str) -> str:
    return next((kind for kind in (FENCE, "|") if line.startswith(kind)), "text" * bool(line))


def _markdown(block: list[str]) -> tuple[Rows, int]:
    """Rows of a Markdown table, and how many columns at its left are text."""
    between = [" | ", "|"]
    cells = [
        [cell.strip() for cell in line.strip(" |").split(between[k == 1])]
        for k, line in enumerate(block)
    ]
    if len({len(row) for row in cells}) > 1:
        cells = [[line.strip(" |")] for line in block]  # a bar within a cell
    body = cells[2:]
    texts = [all(not re.match(r"[-+\d?]", row[k]) for row in body) for k in range(len(cells[0]))]
    leading = texts.index(False) if False in texts else 1
    widths = [max(len(row[k]) for row in cells if not _is_rule(row)) for k in range(len(cells[0]))]
    padded = [
        ["-" * w for w in widths]
        if _is_rule(row)
        else [cell.ljust(w) for cell, w in zip(row, widths, strict=True)]
        for row in cells
    ]
    return padded, max(leading, 1)


def _is_rule(row: list[str]) -> bool:
    return all(RULE.fullmatch(cell) for cell in row)


def _aligned(block: list[str]) -> Rows:
    """Columns of lines, between which two spaces or more stand in every one of them."""
    longest = max(map(len, block))
    lines = [line.ljust(longest) for line in block]
    indent = min(len(line) - len(line.lstrip()) for line in block)
    empty = "".join(" " if all(line[k] == " " for line in lines) else "x" for k in range(longest))
    ends = [m.end() for m in re.finditer(r" {2,}", empty) if indent < m.end() < longest]
    return [
        [line[a:b].rstrip() if b == longest else line[a : b - 2] for a, b in pairwise(edges)]
        for line in lines
        for edges in [[0, *ends, longest]]
    ]


def _in_pieces(
    rows: Rows, leading: int, left: str, between: str, right: str, width: int
) -> Iterator[str]:
    """The columns in as many parts as it takes, each behind the ``leading`` ones."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    base = len(left) + len(right) + sum(widths[:leading]) + len(between) * (leading - 1)
    lines: list[list[int]] = [[]]
    for k in range(leading, len(widths)):
        taken = base + sum(widths[j] + len(between) for j in lines[-1])
        if lines[-1] and taken + len(between) + widths[k] > width:
            lines.append([])
        lines[-1].append(k)
    for line in lines:
        if line is not lines[0]:
            yield ""
        room = width - base - sum(widths[k] + len(between) for k in line[:-1]) - len(between)
        for row in rows:
            *first, last = [row[k] for k in [*range(leading), *line]]
            for cell in _wrapped(last, max(room, 20)) if room < widths[line[-1]] else [last]:
                yield (left + between.join([*first, cell]) + right).rstrip()
                first = [" " * len(other) for other in first]


def _wrapped(cell: str, width: int) -> list[str]:
    return broken(cell.strip(), width, 0).split("\n")
