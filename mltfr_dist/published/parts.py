"""Which parts of MLTFR are the published ones."""

from __future__ import annotations

from mltfr_dist.config import MLTFRConfig
from mltfr_dist.models.mltfr import Parts
from mltfr_dist.published.experts import DoubleSoftmax, mean_memory, own_row_experts, pooled
from mltfr_dist.published.queries import WholeHistory
from mltfr_dist.published.selecting import StraightThrough


def published_parts(config: MLTFRConfig) -> Parts:
    """The parts that ``config`` asks for; each defect is there by itself."""
    parts = Parts()
    if config.filter.query == "history":
        parts = parts._replace(blocks=WholeHistory)
    if config.filter.strategy == "user_guided" and config.filter.weights == "straight_through":
        parts = parts._replace(selector=StraightThrough)
    if config.filter.memory == "batch":
        parts = parts._replace(shared=pooled)
    if config.expert.form == "paper":
        parts = parts._replace(experts=own_row_experts, of_consensus=mean_memory)
    if config.router.double_softmax:
        parts = parts._replace(router=DoubleSoftmax)
    return parts
