"""The published method's defects, as switches, and which run can have each."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from pydantic import Field

from mltfr_dist.config.backbone import BackboneConfig
from mltfr_dist.config.loss import LossConfig
from mltfr_dist.config.mltfr import MLTFRConfig
from mltfr_dist.losses import LOSSES
from mltfr_dist.schema import Section


class PublishedConfig(Section):
    """What the published method does wrong, each to be switched on by itself (docs/method.md)."""

    straight_through: bool = Field(
        False,
        description="D1: kept rows are multiplied by normalised straight-through weights of value "
        "1 / top_k; with mltfr.filter.top_k=1, which is then allowed, no gradient reaches the "
        "filter.",
    )
    noise_in_evaluation: bool = Field(
        False, description="D3: mltfr.filter.noise is drawn outside training too."
    )
    pooled_memory: bool = Field(
        False, description="D4: an expert reads what any query of the batch keeps."
    )
    whole_history_query: bool = Field(
        False, description="D5: a user's one query is the mean of all items, future ones too."
    )
    whole_sequence_filter: bool = Field(
        False,
        description="D6: the frequency filter of a position mixes the whole sequence, future "
        "included, though every position is scored.",
    )
    trained_tables: bool = Field(
        False, description="D7: tables called frozen are trained parameters."
    )
    read_before_mask: bool = Field(
        False,
        description="D8: the next item of a history below max_len is scored before its mask.",
    )
    attending_padding: bool = Field(
        False, description="D9: padding acts as an item, up to max_len."
    )
    double_softmax: bool = Field(
        False, description="D10: softmax is applied twice to the gate (in some variants)."
    )
    random_consensus: bool = Field(
        False,
        description="D10b: stage 1 adds lambda times a frozen, randomly initialised consensus "
        "expert.",
    )
    fresh_start: bool = Field(
        False,
        description="D10b: stage 2 starts from a new initialisation, not from stage 1's best "
        "weights.",
    )
    batch_mean_fisher: bool = Field(
        False,
        description="D12: the Fisher is the squared gradient of a global batch's mean loss; it "
        "shrinks as the batch grows.",
    )
    unnormalised_fisher: bool = Field(
        False,
        description="D13: the experts' Fishers are not divided by their means, and 1e-12 is added "
        "to their sum.",
    )
    unaligned_experts: bool = Field(
        False,
        description="D14: each expert reads its table's own rows and starts by itself, so that "
        "only tables of equal width can be merged.",
    )
    consensus_without_dropout: bool = Field(
        False, description="The consensus expert has none of the experts' dropout in training."
    )
    fisher_at_last_epoch: bool = Field(
        False,
        description="The experts merged are those of stage 1's last epoch, not of its best "
        "validation.",
    )
    pick_on_test: bool = Field(
        False, description="D17: the test split picks the checkpoint: its figures are too high."
    )
    train_on_validation: bool = Field(
        False, description="Each user's validation target is trained on too."
    )
    negatives_outside_inputs: bool = Field(
        False,
        description="D18: negatives lie outside the sample's inputs and differ from each other, so "
        "that the last target can be among them.",
    )

    def on(self) -> list[str]:
        """The names of the defects that are switched on."""
        return [name for name in type(self).model_fields if getattr(self, name)]


class HasDefects(Protocol):
    """What a run's configuration says of its defects, and of what has them."""

    @property
    def backbone(self) -> BackboneConfig:
        """The backbone."""

    @property
    def mltfr(self) -> MLTFRConfig:
        """MLTFR."""

    @property
    def loss(self) -> LossConfig:
        """The loss."""

    @property
    def published(self) -> PublishedConfig:
        """The defects."""


class Need(NamedTuple):
    """What a run must have, or the defect would do nothing."""

    given: str
    """As it is given."""
    is_met: Callable[[HasDefects], bool]


MLTFR = Need("mltfr.enabled=true", lambda c: c.mltfr.enabled)
CONSENSUS = Need("mltfr.consensus.enabled=true", lambda c: c.mltfr.consensus.enabled)
USER_GUIDED = Need(
    "mltfr.filter.strategy=user_guided", lambda c: c.mltfr.filter.strategy == "user_guided"
)
PER_USER = Need(
    "mltfr.filter.strategy=user_guided or random_tokens",
    lambda c: c.mltfr.filter.strategy in ("user_guided", "random_tokens"),
)
NOISE = Need("mltfr.filter.noise above 0", lambda c: c.mltfr.filter.noise > 0)
DENSE_GATE = Need(  # a second softmax gives weight to what was left out
    "a dense gate (mltfr.router.top_k=null, mltfr.router.expert_dropout=0)",
    lambda c: c.mltfr.router.top_k is None and not c.mltfr.router.expert_dropout,
)
SOFTMAX = Need("mltfr.router.name=softmax", lambda c: c.mltfr.router.name == "softmax")
FILTERS = Need("backbone.name=fmlp or bsarec", lambda c: c.backbone.name in ("fmlp", "bsarec"))
MASKS = Need("backbone.name=bert4rec", lambda c: c.backbone.name == "bert4rec")
NEGATIVES = Need("loss.name=bce or gbce", lambda c: LOSSES[c.loss.name].negatives == "per_position")
PICKED_ON_TEST = Need("published.pick_on_test=true", lambda c: c.published.pick_on_test)

NEEDS: dict[str, tuple[Need, ...]] = {
    "straight_through": (MLTFR, USER_GUIDED),
    "noise_in_evaluation": (MLTFR, USER_GUIDED, NOISE),
    "pooled_memory": (MLTFR, PER_USER),
    "whole_history_query": (MLTFR, PER_USER),
    "whole_sequence_filter": (FILTERS,),
    "trained_tables": (MLTFR,),
    "read_before_mask": (MASKS,),
    "attending_padding": (MASKS,),
    "double_softmax": (MLTFR, SOFTMAX, DENSE_GATE),
    "random_consensus": (MLTFR, CONSENSUS),
    "fresh_start": (MLTFR, CONSENSUS),
    "batch_mean_fisher": (MLTFR, CONSENSUS),
    "unnormalised_fisher": (MLTFR, CONSENSUS),
    "unaligned_experts": (MLTFR,),
    "consensus_without_dropout": (MLTFR, CONSENSUS),
    "fisher_at_last_epoch": (MLTFR, CONSENSUS),
    "pick_on_test": (),
    "train_on_validation": (PICKED_ON_TEST,),
    "negatives_outside_inputs": (NEGATIVES,),
}
"""Of every defect."""


def lacking(config: HasDefects, defect: str) -> list[str]:
    """What a run would have to be given to have ``defect``; empty where it can have it."""
    return [need.given for need in NEEDS[defect] if not need.is_met(config)]


def check_published(config: HasDefects) -> None:
    """Refuse a defect that does not apply to the run.

    Raises:
        ValueError: Which, what it needs, and what to do.
    """
    for defect in config.published.on():
        if missing := lacking(config, defect):
            raise ValueError(
                f"published.{defect}=true needs {' and '.join(missing)}: give that too, or leave "
                f"published.{defect} out"
            )


def without(*needs: Need) -> dict[str, bool]:
    """Fields that switch off every defect that has one of ``needs``, where these are taken away."""
    return {f"published.{name}": False for name, own in NEEDS.items() if {*own} & {*needs}}
