"""MLTFR over all its tables in one pass, for training on a GPU: small kernels cost it their
launches, and tables one by one launch M times as many.

Candidates are the tables' shortlists, or what a search of every token finds.

Shapes: M tables of S candidate rows each, G query blocks of n positions, K kept rows, E experts (a
table's follow one another), H heads of size d, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mltfr_dist.models.experts import ExpertCore, TableAdapter
from mltfr_dist.models.placed_table import PlacedTable
from mltfr_dist.models.router import Router
from mltfr_dist.models.selectors import Queries
from mltfr_dist.models.selectors.user_guided import UserGuided
from mltfr_dist.numerics import at_least_fp32, distinct_in_room, in_order

SCORES = 1 << 26
"""Scores held at a time (256 MiB in fp32, and twice as much for their keys)."""


class Parts(NamedTuple):
    """MLTFR's."""

    tables: Sequence[PlacedTable]
    """M."""
    selectors: Sequence[nn.Module]
    """M."""
    adapters: Sequence[nn.Module]
    """E."""
    cores: Sequence[nn.Module]
    """E."""
    router: Router
    consensus: nn.Module | None
    members: Sequence[int]
    """Experts whose rows the consensus expert reads."""
    weight: Tensor | float
    """lambda, of the consensus expert."""

    @property
    def are_searched_alike(self) -> bool:
        """Whether a query keeps K of a shortlist of S rows of each table, or K of all rows."""
        sizes = set()
        for selector, table in zip(self.selectors, self.tables, strict=True):
            if type(selector) is not UserGuided or selector.reads_keys or table.trained:
                return False
            size = None if selector.shortlist is None else len(selector.shortlist.row_ids)
            if size is None and not table.is_at_hand:  # more rows are taken than are kept
                return False
            sizes.add((size, selector.num_kept))
        return len(sizes) == 1

    @property
    def have_shortlists(self) -> bool:
        """Where all are searched alike: whether shortlists are."""
        return all(selector.uses_shortlist for selector in self.selectors)


class Read(NamedTuple):
    """What positions have read of all tables."""

    mixed: Tensor
    """[G, n, D] the sum over experts, weighed by the gate, and the consensus expert's part."""
    gate: Tensor
    """[G, n, gates]."""
    log_weights: Tensor
    """[G, M, K] of the kept rows."""


class Kept(NamedTuple):
    """What filters have chosen."""

    rows: Tensor
    """[E, S, D] candidate rows in the space of each expert."""
    indices: Tensor
    """[G, M, K] int64, of the candidates that each query keeps, best first."""
    log_weights: Tensor
    """[G, M, K]."""


def all_alike(parts: Parts, device: torch.device) -> bool:
    """Whether one pass can serve all tables, and is worth it: on a GPU, where all have shortlists
    of one size or none, nothing is drawn in the choice, and parameters are held whole.

    The batch has no say in it: gradients must be formed in one order in every process.
    """
    return device.type != "cpu" and may_be_one(parts)


def may_be_one(parts: Parts) -> bool:
    """:func:`all_alike`, on any device. A model that is folded, or lacks an expert, has parts of
    other classes.
    """
    cores = [*parts.cores, *([] if parts.consensus is None else [parts.consensus])]
    if any(type(core) is not ExpertCore or core.is_tapped for core in cores):
        return False
    if any(type(adapter) is not TableAdapter for adapter in parts.adapters):
        return False
    # What is held in pieces is gathered at the call of its module, and is read without one here.
    whole = not any(hasattr(p, "ds_id") for core in cores for p in core.parameters())
    return whole and parts.are_searched_alike


def read_at_once(parts: Parts, positions: Tensor, queries: Queries) -> Read:
    """What blocks of positions [G, n, D] with a query each read of all tables."""
    chosen = _chosen(parts, queries)
    each = len(parts.cores) // len(parts.tables)
    kept, log_weights = (
        t.repeat_interleave(each, dim=1) if each > 1 else t
        for t in (chosen.indices, chosen.log_weights)
    )  # [G, E, K]
    num_experts, num_rows, _ = chosen.rows.shape
    first = num_rows * torch.arange(num_experts, device=kept.device)
    places = kept + first[:, None]  # among the rows of all experts
    cores = [cast(ExpertCore, core) for core in parts.cores]
    values = _of_experts(cores, positions, chosen.rows, places, log_weights)  # [E, G n, D]
    gate = parts.router(positions)
    of_experts = gate[..., :num_experts].flatten(0, 1).T[..., None]  # [E, G n, 1]
    mixed = (values * of_experts).sum(0).view_as(positions)
    if parts.consensus is not None:
        members = list(parts.members)
        if len(members) < num_experts:
            # No index by a list, which would be copied to the device.
            places, log_weights = (
                torch.cat([t.narrow(1, e, 1) for e in members], dim=1)
                for t in (places, log_weights)
            )
        core = cast(ExpertCore, parts.consensus)
        said = _of_consensus(core, positions, chosen.rows, places, log_weights)
        mixed = mixed + parts.weight * said
    return Read(mixed, gate, chosen.log_weights)


def _chosen(parts: Parts, queries: Queries) -> Kept:
    """The K rows of each table nearest to each query, as :meth:`UserGuided.select` has them."""
    mapped, of_tau, of_tables, found = [], [], [], []
    selectors = [cast(UserGuided, selector) for selector in parts.selectors]
    room = max(table.num_rows for table in parts.tables)
    for selector, table in zip(selectors, parts.tables, strict=True):
        if selector.shortlist is None:
            with torch.no_grad():
                kept = table.search(queries.vectors, selector.project, selector.num_kept)
            row_ids, places = distinct_in_room(kept, room)
            rows = table.take(row_ids)
            found.append(places)
        else:
            rows = selector.shortlist.candidates(table)
        mapped.append(selector.projection.mapped(rows))
        of_tau.append(selector.log_tau())
        of_tables += [rows] * (len(parts.cores) // len(parts.tables))
    unit_rows = F.normalize(torch.stack(mapped), dim=-1)  # [M, S, D]
    if found:
        indices = torch.stack(found, dim=1)
        scores = _products(queries.unit, unit_rows, indices)
    else:
        scores, indices = _nearest(queries.unit, unit_rows, selectors[0].num_kept)
    tau = at_least_fp32(torch.cat(of_tau)).exp()[:, None]
    log_weights = F.log_softmax(at_least_fp32(scores) / tau, dim=-1).to(scores.dtype)
    pairs = zip(parts.adapters, of_tables, strict=True)
    return Kept(torch.stack([adapter(rows) for adapter, rows in pairs]), indices, log_weights)


def _products(unit_query: Tensor, unit_rows: Tensor, indices: Tensor) -> Tensor:
    """[G, M, K] products of each query [G, D] with the rows [M, S, D] of each table at ``indices``
    [G, M, K].
    """
    num_tables, num_rows, _ = unit_rows.shape
    first = num_rows * torch.arange(num_tables, device=indices.device)
    kept = F.embedding(indices + first[:, None], unit_rows.flatten(0, 1))  # [G, M, K, D]
    return torch.einsum("gd,gmkd->gmk", unit_query, kept)


def _nearest(unit_query: Tensor, unit_rows: Tensor, num_kept: int) -> tuple[Tensor, Tensor]:
    """[G, M, K] largest products of each query [G, D] with the rows [M, S, D] of each table, best
    first, and which rows these are.
    """
    num_tables, num_rows, _ = unit_rows.shape
    found = []
    for some in torch.split(unit_query, max(1, SCORES // (num_tables * num_rows))):
        scores = F.linear(some, unit_rows.flatten(0, 1)).view(len(some), num_tables, num_rows)
        with torch.no_grad():
            indices = in_order(scores, num_kept)[1]
        found.append((scores.gather(-1, indices), indices))
    of_kept, of_rows = zip(*found, strict=True)
    return torch.cat(of_kept), torch.cat(of_rows)


def _of_experts(
    cores: Sequence[ExpertCore],
    positions: Tensor,
    rows: Tensor,
    places: Tensor,
    log_weights: Tensor,
) -> Tensor:
    """[E, G n, D] what each expert says of the positions [G, n, D]: see :class:`ExpertCore`.

    Args:
        cores: E of one shape.
        positions: [G, n, D].
        rows: [E, S, D] in their spaces.
        places: [G, E, K] what each query keeps, among all E S rows.
        log_weights: [G, E, K].
    """
    weight, bias = _stacked([m for core in cores for m in (core.key, core.value)])  # [2 E, H d, .]
    both = weight.view(len(cores), -1, weight.shape[-1])  # [E, 2 H d, D]
    pairs = torch.baddbmm(bias.view(len(cores), 1, -1), rows, both.mT)  # [E, S, 2 H d]
    weight, bias = _stacked([core.query for core in cores])
    query = F.linear(positions, weight.flatten(0, 1), bias.flatten())  # [G, n, E H d]
    mixed = _attended(cores[0], query, F.embedding(places, pairs.flatten(0, 1)), log_weights)
    weight, bias = _stacked([core.out for core in cores])
    said = torch.baddbmm(bias[:, None], mixed, weight.mT)
    # No call of the module, as in :meth:`ExpertCore.output`.
    dropped: Tensor = cores[0].output_dropout.forward(said)
    return dropped


def _of_consensus(
    core: ExpertCore, positions: Tensor, rows: Tensor, places: Tensor, log_weights: Tensor
) -> Tensor:
    """[G, n, D] what an expert says that attends to all kept rows [G, C, K] of C experts at once;
    see :func:`_of_experts`.
    """
    weight = torch.cat([core.key.weight, core.value.weight])
    bias = torch.cat([core.key.bias, core.value.bias])
    pairs = F.linear(rows, weight, bias).flatten(0, 1)  # [E S, 2 H d]
    kept = F.embedding(places.flatten(1), pairs)[:, None]  # [G, 1, C K, 2 H d]
    mixed = _attended(core, core.query(positions), kept, log_weights.flatten(1)[:, None])
    said: Tensor = core.output_dropout.forward(core.out(mixed[0]))
    return said.view_as(positions)


def _attended(core: ExpertCore, query: Tensor, pairs: Tensor, log_weights: Tensor) -> Tensor:
    """[C, G n, H d] what the queries of C cores of one shape read.

    Args:
        core: One of them.
        query: [G, n, C H d].
        pairs: [G, C, K, 2 H d] keys and values of what is kept.
        log_weights: [G, C, K].
    """
    heads, (groups, num_cores, count) = (core.num_heads, core.head_dim), log_weights.shape
    query = query.view(*query.shape[:2], num_cores, *heads).permute(0, 2, 3, 1, 4)
    both = pairs.view(groups, num_cores, count, 2, *heads).permute(3, 0, 1, 4, 2, 5)
    keys, values = both  # [G, C, H, K, d], of queries [G, C, H, n, d]
    logits = at_least_fp32(query @ keys.mT / core.head_dim**0.5)
    weights = torch.softmax(logits + at_least_fp32(log_weights)[:, :, None, None], dim=-1)
    mixed: Tensor = core.attention_dropout.forward(weights.to(query.dtype)) @ values
    return mixed.permute(1, 0, 3, 2, 4).flatten(3).flatten(1, 2)


def _stacked(maps: Sequence[nn.Linear]) -> tuple[Tensor, Tensor]:
    """Weights [., out, in] and biases [., out] of linear maps of one shape."""
    return torch.stack([m.weight for m in maps]), torch.stack([m.bias for m in maps])
