"""Scores of users and items in tiles, so that nothing of the size users x items is ever held.

A **score** is the product of a hidden state and an item's vector in float64, added up pairwise in
one fixed order and rounded to float32 (in fp64 models: not rounded). A product of matrices rounds
otherwise in another shape, so it decides only where its error cannot matter; whatever lies nearer
is scored again by :func:`exact_scores`. So what is made of scores (``rank_counts.py`` and
``top_items.py``) is the same to the bit for any tile, any users beside a user, and any division of
the items.

Shapes: B users, D hidden size, R items at hand, b users and T items of a tile, S pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mltfr_dist.numerics import at_least_fp32

CPU_ELEMENTS = 1 << 20
"""Scores of a tile on a CPU: 4 MiB, which stay in its cache."""
GPU_ELEMENTS = 1 << 25
"""Scores of a tile on a GPU (128 MiB)."""
USERS = 1024
"""Users of a tile at most."""
PART_ELEMENTS = 1 << 19
"""Numbers of the items that a kernel looks at together (2 MiB)."""
EXACT_ELEMENTS = 1 << 21
"""Products that :meth:`Tiles.exact` forms at a time (16 MiB)."""

UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
"""Relative error of one rounding."""
INPUT_ERROR = {"highest": 0.0, "high": 2.0**-10, "medium": 2.0**-7}
"""Relative error of products whose factors are rounded first, by torch's precision of products."""


class Pairs(NamedTuple):
    """Pairs of a user and an item."""

    rows: Tensor
    """[S] int64, rows of the hidden states."""
    item_ids: Tensor
    """[S] int64; those of no item at hand are passed over."""


class Tile(NamedTuple):
    """The scores of some users and items as a product of matrices has them: near the true ones."""

    users: slice
    """Rows of the hidden states."""
    start: int
    """Place of the first item among those at hand."""
    scores: Tensor
    """[b, T] in a buffer that the next tile overwrites."""
    error: Tensor
    """[b] float64, by how much a score of the tile, or its rounding, may err."""


def exact_scores(hidden: Tensor, vectors: Tensor) -> Tensor:
    """The score of each hidden state [..., D] with its vector [..., D] -> [...].

    Every operation is elementwise, so neither shape nor device nor threads change a bit.
    """
    products = hidden.double() * vectors.double()  # exact where both are of fp32 or less
    while products.shape[-1] > 1:
        products = F.pad(products, (0, products.shape[-1] % 2))
        half = products.shape[-1] // 2
        products = products[..., :half] + products[..., half:]
    return products[..., 0].to(at_least_fp32(hidden).dtype)


class Tiles:
    """Hidden states and item vectors, whose scores are gone through in tiles."""

    def __init__(
        self,
        hidden: Tensor,
        vectors: Tensor,
        first_id: int,
        exclude: Pairs | None,
        shape: tuple[int, int] | None,
    ) -> None:
        """Hold the factors.

        Args:
            hidden: [B, D]; vectors are brought to its format first.
            vectors: [R, D] of the items with the ids ``first_id``, ``first_id`` + 1, ...
            first_id: Id of the first of them.
            exclude: Pairs that :meth:`leave_out` leaves out.
            shape: Users and items of a tile; None: what suits the device.
        """
        self.format, self.hidden, self.vectors = hidden.dtype, at_least_fp32(hidden), vectors
        self.first_id = first_id
        self._norms = torch.linalg.vector_norm(self.hidden.double(), dim=1)
        if shape is None:
            users = max(1, min(len(hidden), USERS))
            elements = CPU_ELEMENTS if hidden.device.type == "cpu" else GPU_ELEMENTS
            shape = (users, min(max(1, elements // users), max(1, len(vectors))))
        self.shape, self._exclude = shape, exclude

    def __iter__(self) -> Iterator[Tile]:
        """All tiles, those of the same items in a row.

        Raises:
            ValueError: A score may not be finite.
        """
        users, items = self.shape
        buffer = self.hidden.new_empty(users * items)
        for start, vectors, error in self.item_blocks(items):
            for first in range(0, len(self.hidden), users):
                block = slice(first, first + users)
                hidden = self.hidden[block]
                scores = buffer[: len(hidden) * len(vectors)].view(len(hidden), len(vectors))
                torch.mm(hidden, vectors.T, out=scores)
                yield Tile(block, start, scores, error[block])

    def item_blocks(self, items: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Some ``items`` at a time: the index of the first, their vectors [T, D] and the error [B]
        of their scores.

        Raises:
            ValueError: A score may not be finite.
        """
        for start in range(0, len(self.vectors), items):
            vectors = self._rows(slice(start, start + items))
            yield start, vectors, self._error(vectors)

    def leave_out(self, tile: Tile) -> None:
        """Set the scores of excluded pairs to -inf, in place."""
        if self._exclude is None:
            return
        indices, bounds, per_row = self._excluded_by_tile
        cell = tile.start // self.shape[1] * per_row + tile.users.start // self.shape[0]
        within = indices[bounds[cell] : bounds[cell + 1]]
        rows, items = within[:, 0] - tile.users.start, within[:, 1] - tile.start
        tile.scores.view(-1).index_fill_(0, rows * tile.scores.shape[1] + items, -torch.inf)

    def exact(self, rows: Tensor, indices: Tensor) -> Tensor:
        """[S] true scores of the users ``rows`` and the items at ``indices``."""
        chunk = max(1, EXACT_ELEMENTS // self.hidden.shape[1])
        scores = [
            exact_scores(self.hidden[r], self._rows(p))
            for r, p in zip(torch.split(rows, chunk), torch.split(indices, chunk), strict=True)
        ]
        return torch.cat(scores)

    def _rows(self, which: slice | Tensor) -> Tensor:
        """[n, D] vectors of some items, with the digits of the model's format."""
        return self.vectors[which].to(self.format).to(self.hidden.dtype)

    def _error(self, vectors: Tensor) -> Tensor:
        """[B] float64 bound of the error of any score with ``vectors`` [n, D].

        D products summed in any order err by at most D roundings of the sum of their sizes (Higham
        2002, section 3.1), which the product of the norms bounds; 16 more cover all that follows.
        """
        norm = torch.linalg.vector_norm(vectors, dim=1).amax().double()
        unit = UNIT[self.hidden.dtype]
        factors = INPUT_ERROR[torch.get_float32_matmul_precision()]
        error: Tensor = ((vectors.shape[1] + 16) * unit + factors) * self._norms * norm
        if not (error < unit * torch.finfo(self.hidden.dtype).max).all():
            raise ValueError("scores hold NaN or no finite number: the model has diverged")
        error += torch.finfo(torch.float32).tiny * vectors.shape[1]  # where products underflow
        return error

    def excluded_by_user(self) -> tuple[Tensor, Tensor]:
        """Where the excluded indices of each user begin [B + 1], and these indices, ascending for
        each user, none twice.
        """
        rows, indices = self._excluded.unbind(1)
        items = max(1, len(self.vectors))
        pairs = torch.unique(rows * items + indices)
        users = torch.arange(len(self.hidden) + 1, device=pairs.device)
        return torch.searchsorted(pairs, users * items), pairs % items

    @property
    def _excluded(self) -> Tensor:
        """[S, 2] rows and indices of the excluded pairs whose items are at hand."""
        if self._exclude is None:
            return torch.zeros(0, 2, dtype=torch.int64, device=self.hidden.device)
        pairs = torch.stack([self._exclude.rows, self._exclude.item_ids - self.first_id], dim=1)
        return pairs[(pairs[:, 1] >= 0) & (pairs[:, 1] < len(self.vectors))]

    @cached_property
    def _excluded_by_tile(self) -> tuple[Tensor, list[int], int]:
        """Excluded (row, index) [S, 2] in the order of tiles, where each tile's begin, and tiles in
        a row.
        """
        users, items = self.shape
        indices = self._excluded
        per_row = -(-len(self.hidden) // users)
        cells = indices[:, 1] // items * per_row + indices[:, 0] // users
        cells, order = cells.sort()
        count = -(-len(self.vectors) // items) * per_row
        edges = torch.arange(count + 1, device=cells.device)
        return indices[order], torch.searchsorted(cells, edges).tolist(), per_row
