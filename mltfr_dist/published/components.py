"""Which parts of a model are the published ones."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mltfr_dist.config import MLTFRConfig, PublishedConfig
from mltfr_dist.models.backbone import Backbone, backbone_class
from mltfr_dist.models.mltfr import Components
from mltfr_dist.models.placed_table import PlacedTable, ReplicatedTable
from mltfr_dist.models.selectors import Selector, selector_class
from mltfr_dist.published.consensus import CoreWithoutDropout
from mltfr_dist.published.experts import DoubleSoftmax, mean_rows, own_row_experts, pooled
from mltfr_dist.published.filters import CircularFMLPRec, WholeSequenceBSARec
from mltfr_dist.published.masks import AttendsToPadding, ReadsBeforeMask
from mltfr_dist.published.mixing import with_defects
from mltfr_dist.published.queries import WholeHistory
from mltfr_dist.published.selecting import NoiseInEvaluation, StraightThrough
from mltfr_dist.published.tables import TrainedTable

WHOLE_SEQUENCE: dict[str, type[Backbone]] = {
    "fmlp": CircularFMLPRec,
    "bsarec": WholeSequenceBSARec,
}


def published_backbone(name: str, published: PublishedConfig) -> type[Backbone]:
    """The backbone of that name, with its defects."""
    defects: list[type[Backbone]] = []
    if published.whole_sequence_filter:
        defects.append(WHOLE_SEQUENCE[name])
    if published.read_before_mask:
        defects.append(ReadsBeforeMask)
    if published.attending_padding:
        defects.append(AttendsToPadding)
    return with_defects(backbone_class(name), defects)


def published_components(config: MLTFRConfig, published: PublishedConfig) -> Components:
    """MLTFR's parts; each defect is there by itself."""
    components = Components()
    if published.whole_history_query:
        components = components._replace(blocks=WholeHistory)
    selectors: list[type[Selector]] = []
    if published.noise_in_evaluation:
        selectors.append(NoiseInEvaluation)
    if published.straight_through:
        selectors.append(StraightThrough)
    if selectors:
        repaired = selector_class(config.filter.strategy)
        components = components._replace(selector=with_defects(repaired, selectors))
    if published.pooled_memory:
        components = components._replace(shared=pooled)
    if published.unaligned_experts:
        components = components._replace(experts=own_row_experts, of_consensus=mean_rows)
    if published.double_softmax:
        components = components._replace(router=DoubleSoftmax)
    if published.consensus_without_dropout:
        components = components._replace(consensus=CoreWithoutDropout)
    return components


def published_table(published: PublishedConfig) -> Callable[[Tensor], PlacedTable]:
    """What holds a table's rows [V, D_m] in this process."""
    return TrainedTable if published.trained_tables else ReplicatedTable
