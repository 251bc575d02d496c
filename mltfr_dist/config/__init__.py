"""The configuration: one typed, frozen tree. Every field says what it does and in which unit.

A run's complete configuration is stored in its folder and runs again. Unknown keys are errors (see
:func:`mltfr_dist.schema.validate`), never ignored.
"""

from mltfr_dist.config.backbone import BackboneConfig
from mltfr_dist.config.data import DataConfig
from mltfr_dist.config.filter import FilterConfig
from mltfr_dist.config.loss import LossConfig
from mltfr_dist.config.mltfr import (
    ConsensusConfig,
    ExpertConfig,
    ItemTokensConfig,
    MLTFRConfig,
    RouterConfig,
    TableContent,
)
from mltfr_dist.config.preparation import PrepareConfig, PrepareResources, TableConfig
from mltfr_dist.config.published import PublishedConfig
from mltfr_dist.config.run import (
    CheckpointConfig,
    EvaluationConfig,
    OptimizerConfig,
    RunConfig,
    TrackingConfig,
    TrainingConfig,
)

__all__ = [
    "BackboneConfig",
    "CheckpointConfig",
    "ConsensusConfig",
    "DataConfig",
    "EvaluationConfig",
    "ExpertConfig",
    "FilterConfig",
    "ItemTokensConfig",
    "LossConfig",
    "MLTFRConfig",
    "OptimizerConfig",
    "PrepareConfig",
    "PrepareResources",
    "PublishedConfig",
    "RouterConfig",
    "RunConfig",
    "TableConfig",
    "TableContent",
    "TrackingConfig",
    "TrainingConfig",
]
