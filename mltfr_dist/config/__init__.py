"""The configuration: one typed, frozen tree. Every field says what it does and in which unit.

A run's complete configuration is stored in its folder and runs again. Unknown keys are errors (see
:func:`mltfr_dist.schema.validate`), never ignored.
"""

from mltfr_dist.config.model import (
    BackboneConfig,
    ConsensusConfig,
    ExpertConfig,
    FilterConfig,
    ItemTokensConfig,
    LossConfig,
    MLTFRConfig,
    RouterConfig,
    TableContent,
)
from mltfr_dist.config.preparation import PrepareConfig, PrepareResources, TableConfig
from mltfr_dist.config.run import (
    CheckpointConfig,
    DataConfig,
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
    "RouterConfig",
    "RunConfig",
    "TableConfig",
    "TableContent",
    "TrackingConfig",
    "TrainingConfig",
]
