"""The batches of a run, from its configuration."""

from __future__ import annotations

from mltfr_dist.config import RunConfig
from mltfr_dist.data.stream.augment import ViewRatios
from mltfr_dist.data.stream.collate import Objective
from mltfr_dist.data.stream.ranking import RankingStream
from mltfr_dist.data.stream.training import BatchLayout, TrainStream
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.losses import LOSSES
from mltfr_dist.models.backbone import backbone_class
from mltfr_dist.published.negatives import published_negatives


def ranking_stream(
    config: RunConfig, split: str, ranks: Ranks, *, once_a_user: bool = False
) -> RankingStream:
    """This rank's targets of a split; or, for who reads histories alone, each user once."""
    return RankingStream(
        config.data.path,
        split,
        max_len=config.data.max_len,
        batch_size=config.evaluation.batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        left_out=config.data.left_out,
        once_a_user=once_a_user,
    )


def train_stream(config: RunConfig, layout: BatchLayout) -> TrainStream:
    """This rank's share of the training sequences."""
    return TrainStream(
        config.data.path,
        config.data,
        layout,
        seed=config.training.seed,
        objective=objective(config),
        split="valid" if config.published.train_on_validation else "train",
    )


def objective(config: RunConfig) -> Objective:
    """What batches must hold for the backbone and the loss."""
    backbone, loss, kind = config.backbone, config.loss, backbone_class(config.backbone.name)
    views = backbone.cl4srec
    negatives = LOSSES[loss.name].negatives
    return Objective(
        num_negatives=loss.num_negatives if negatives == "per_position" else 0,
        negative_rule=published_negatives(config.published),
        num_shared_negatives=loss.num_negatives if negatives == "shared" else 0,
        proposal=loss.proposal,
        cloze_ratio=backbone.bert4rec.mask_ratio if kind.objective == "cloze" else None,
        views=ViewRatios(views.crop_ratio, views.mask_ratio, views.reorder_ratio)
        if kind.contrasts_views
        else None,
        group_size=views.contrast_group if kind.contrasts_views else 1,
    )
