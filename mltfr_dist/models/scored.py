"""What a loss reads of a micro-batch."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from mltfr_dist.config import LossConfig
from mltfr_dist.errors import ConfigError


class Negatives(NamedTuple):
    """Items that all positions share as negatives."""

    item_ids: Tensor
    """[S]."""
    vectors: Tensor
    """[S, D]."""
    log_probability: Tensor
    """[S] log Q: with which probability each was drawn."""


class Scored(NamedTuple):
    """The N scored positions of a micro-batch, and what they are compared with."""

    hidden: Tensor
    """[N, D] hidden states."""
    targets: Tensor
    """[N] item ids, 1..num_items."""
    weights: Tensor
    """[N] weight of each position."""
    embedding: nn.Module
    """Item ids [...] -> output vectors [..., D]."""
    num_items: int
    config: LossConfig
    drawn: Tensor | None = None
    """[N, S] negatives of each position, where the batch holds any."""
    shared: tuple[Tensor, Tensor] | None = None
    """[S] negatives of all positions and their log Q, where the batch holds any."""

    @property
    def target_vectors(self) -> Tensor:
        """[N, D] output vectors of the targets."""
        return self.embedding(self.targets)  # type: ignore[no-any-return]

    @property
    def item_vectors(self) -> Tensor:
        """[I, D] output vectors of items 1..I: no padding, no mask. Of a table that is not
        divided.
        """
        weight = self.embedding.weight
        assert isinstance(weight, Tensor)
        return weight[1 : self.num_items + 1]

    @property
    def negative_vectors(self) -> Tensor:
        """[N, S, D] output vectors of each position's own negatives.

        Raises:
            ConfigError: The loss's registry line asks for none.
        """
        if self.drawn is None:
            raise self._without("per_position")
        return self.embedding(self.drawn)  # type: ignore[no-any-return]

    @property
    def shared_negatives(self) -> Negatives:
        """The S negatives of all positions.

        Raises:
            ConfigError: The loss's registry line asks for none.
        """
        if self.shared is None:
            raise self._without("shared")
        item_ids, log_probability = self.shared
        return Negatives(item_ids, self.embedding(item_ids), log_probability)

    def _without(self, negatives: str) -> ConfigError:
        name = self.config.name
        return ConfigError(
            f"loss.name={name} reads negatives ({negatives}), and the batch holds none.",
            rule="Batches hold the negatives that a loss's line in mltfr_dist/losses.py asks for.",
            remedy=f'Give the line of `{name}` negatives="{negatives}".',
        )
