"""A trained model without the tables' rows: what its parts make of rows that never change is
computed once.

The rows that a query may ever be given are fixed in evaluation (a shortlist, all rows, prototypes);
their unit vectors, keys and values are then constants. A folded model has these in place of the
tables and of the maps that made them, and computes all else by the same operations on the same
shapes: scores are equal to the bit.

Shapes: S rows that may be kept, D_m columns of a table, D hidden size, I = heads times head size of
an expert.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from mltfr_dist.config import FilterConfig
from mltfr_dist.models.experts import ExpertCore, TableAdapter
from mltfr_dist.models.mltfr import MLTFR, Components
from mltfr_dist.models.placed_table import PlacedTable, ReplicatedTable, WholeTable
from mltfr_dist.models.recommender import Recommender
from mltfr_dist.models.selectors import Selector
from mltfr_dist.models.selectors.others import AllRows, Prototypes
from mltfr_dist.models.selectors.user_guided import UserGuided

Kind = TypeVar("Kind", bound=nn.Module)


class Stored(nn.Module):
    """What a map gives of rows that never change; the rows themselves are not looked at."""

    values: Tensor
    """[S, W]."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values)

    def forward(self, rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Anything -> [S, W]."""
        return self.values


class Columns(nn.Module):
    """Keys or values of rows that stand mapped already, side by side."""

    def __init__(self, index: int, width: int) -> None:
        """Args: index: 0 for the first map; width: I."""
        super().__init__()
        self.start, self.stop = index * width, (index + 1) * width

    def forward(self, rows: Tensor) -> Tensor:
        """[S, W] -> [S, I]."""
        return rows[..., self.start : self.stop]


class Joint(nn.Module):
    """An expert's adapter and the maps that read what it gives, side by side."""

    def __init__(self, adapter: nn.Module, maps: list[nn.Module]) -> None:
        """Args: adapter: [S, D_m] -> [S, E]; maps: of n, each [S, E] -> [S, I]."""
        super().__init__()
        self.adapter, self.maps = adapter, nn.ModuleList(maps)

    def forward(self, rows: Tensor) -> Tensor:
        """[S, D_m] -> [S, n I]."""
        adapted = self.adapter(rows)
        return torch.cat([mapped(adapted) for mapped in self.maps], dim=1)


@torch.no_grad()
def folded(model: Recommender, *, whole_tables: bool = False) -> Recommender:
    """The model with all of its tables folded whose rows are fixed; parts that stay are shared with
    ``model``.

    The published defects that stand between rows and keys (experts that read rows as they are,
    straight-through weights, memories of a whole batch) leave nothing to fold; then ``model``
    itself is returned.

    Args:
        model: Trained.
        whole_tables: Whether tables that are searched as a whole are folded, too, with all of their
            rows. No selector can search them then, and bits may differ.
    """
    mltfr = model.mltfr
    if mltfr is None or not can_fold(mltfr):
        return model
    rows = [_rows_of(mltfr, m, whole_tables) for m in range(mltfr.num_tables)]
    if all(of_table is None for of_table in rows):
        return model
    lean = shallow(model)
    lean.mltfr = _folded(mltfr, rows)
    return lean.eval()


def can_fold(mltfr: MLTFR) -> bool:
    """Whether keys and values are those of single adapted rows, parameters are held whole, and this
    is no folded model already.
    """
    scaled = any(mltfr.selector(m).scales_rows for m in range(mltfr.num_tables))
    own = all(isinstance(adapter, TableAdapter) for adapter in mltfr.adapters)
    # What is held in pieces is whole in the calls of its module alone, and only for their time.
    own = own and not any(hasattr(parameter, "ds_id") for parameter in mltfr.parameters())
    return own and not scaled and mltfr.components.shared is Components().shared


def is_folded(model: Recommender) -> list[bool]:
    """Per table, whether :func:`folded` does without its rows."""
    mltfr = model.mltfr
    if mltfr is None:
        return []
    able = can_fold(mltfr)
    return [able and _rows_of(mltfr, m, False) is not None for m in range(mltfr.num_tables)]


def _rows_of(mltfr: MLTFR, m: int, or_all: bool) -> Tensor | None:
    """[S, D_m] candidates of table m in evaluation, where they are fixed; else all rows, or
    None.
    """
    table = mltfr.table(m)
    rows = mltfr.selector(m).fixed_rows(table)
    if rows is None and or_all:
        assert isinstance(table, WholeTable)
        rows = table.whole()
    return rows


def _folded(mltfr: MLTFR, of_tables: Sequence[Tensor | None]) -> MLTFR:
    lean, consensus = shallow(mltfr), mltfr.consensus
    selectors: list[Selector] = []
    tables: list[PlacedTable] = []
    adapters: list[nn.Module] = []
    for m in range(mltfr.num_tables):
        selector, table, rows = mltfr.selector(m), mltfr.table(m), of_tables[m]
        if rows is not None:
            selector, table = _without_rows(selector, rows, table.num_rows, mltfr.config.filter)
        selectors.append(selector)
        tables.append(table)
        for e in mltfr.experts_of([m]):
            maps = _maps(mltfr.cores[e])
            if consensus is not None and e in mltfr.consensus_members:
                maps += _maps(consensus)
            joint = Joint(mltfr.adapters[e], maps)
            adapters.append(joint if rows is None else Stored(joint(rows)))
    lean.selectors, lean.tables = nn.ModuleList(selectors), nn.ModuleList(tables)
    lean.adapters = nn.ModuleList(adapters)
    lean.cores = nn.ModuleList(_reads_columns(core, 0) for core in mltfr.cores)
    if consensus is not None:
        lean.consensus = _reads_columns(consensus, 2)
    return lean


def _maps(core: nn.Module) -> list[nn.Module]:
    assert isinstance(core, ExpertCore)
    return [core.key, core.value]


def _reads_columns(core: nn.Module, index: int) -> ExpertCore:
    """The expert whose keys and values stand in the memory, from ``index`` on."""
    assert isinstance(core, ExpertCore)
    lean, width = shallow(core), core.num_heads * core.head_dim
    lean._modules |= {"key": Columns(index, width), "value": Columns(index + 1, width)}
    return lean


def _without_rows(
    selector: Selector, rows: Tensor, num_rows: int, config: FilterConfig
) -> tuple[Selector, ReplicatedTable]:
    """A selector that chooses among ``rows`` [S, D_m] without them, and the table that stands for
    its own.
    """
    if isinstance(selector, Prototypes):
        num_rows = len(rows)
        selector = AllRows(config, num_rows, 1, 1)
    elif isinstance(selector, UserGuided):
        lean = shallow(selector)
        lean._modules |= {"projection": Stored(selector.projection(rows))}
        if selector.shortlist is not None:
            lean.shortlist = shallow(selector.shortlist)
            lean.shortlist.rows = None  # the selector's own
        selector = lean
    return selector, ReplicatedTable(rows.new_zeros(1, 1).expand(num_rows, 1))


def shallow(module: Kind) -> Kind:
    """Another module of the same parts."""
    other = copy.copy(module)
    for name in ("_modules", "_parameters", "_buffers"):
        setattr(other, name, dict(getattr(module, name)))
    return other
