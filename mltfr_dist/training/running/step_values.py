"""What a step comes to: its sums over all ranks, and the values that are recorded of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mltfr_dist.data.stream.training import StepBatches
from mltfr_dist.distributed.engine import Engine
from mltfr_dist.distributed.state import whole_parameter
from mltfr_dist.models.mltfr import MLTFR
from mltfr_dist.models.output import TrainingOutput
from mltfr_dist.models.routing import RoutingSums


@dataclass
class StepTotals:
    """Means over the global batch of one step."""

    terms: dict[str, float]
    """Of the loss, by name."""
    routing: RoutingSums | None = None
    """Means over real positions, or query blocks; ``num_queries`` is their number."""
    nonfinite: tuple[str, ...] = ()
    """What was not finite on some rank, by name; the update was then skipped."""

    @property
    def loss(self) -> float:
        """The recommendation loss."""
        return self.terms["loss"]


def step_totals(output: TrainingOutput, batches: StepBatches) -> StepTotals:
    """Means over the global batch, of the sums that :meth:`Engine.update` returns."""
    counts: dict[str, float] = {**batches.counts()}
    routing, summed = None, output.routing
    if summed is not None:
        positions = summed.gate.sum()  # the gates of a position sum to 1, so it counts positions
        counts["positions"] = float(positions)
        routing = RoutingSums(
            gate=(summed.gate / positions).float(),
            top=(summed.top / positions).float(),
            entropy=summed.entropy / positions,
            kept_entropy=(summed.kept_entropy / summed.num_queries).float(),
            num_queries=summed.num_queries,
        )
    terms = {name: float(term.sum) / counts[term.over] for name, term in output.terms.items()}
    return StepTotals(terms, routing)


def exp_or_inf(power: float) -> float:
    """Exponential of ``power``; infinity where that is no finite number any more, for which
    math.exp raises.
    """
    try:
        return math.exp(power)
    except OverflowError:
        return math.inf


def step_values(
    engine: Engine, totals: StepTotals, num_targets: int, table_names: Sequence[str]
) -> dict[str, float]:
    """What metrics.jsonl holds of a step. All ranks must call."""
    values = totals.terms | {
        "learning_rate": float(engine.optimizer.param_groups[0]["lr"]),
        "positions": float(num_targets),
    }
    norm = engine.grad_norm()
    if norm is not None:
        values["grad_norm"] = norm
    mltfr = engine.module.mltfr
    if mltfr is not None and totals.routing is not None:
        values |= mltfr_values(engine, mltfr, totals.routing, table_names)
    return values


def mltfr_values(
    engine: Engine, mltfr: MLTFR, routing: RoutingSums, table_names: Sequence[str]
) -> dict[str, float]:
    """Its gate's means, and its learned scalars. All ranks must call."""
    values = {
        "gate/entropy": float(routing.entropy),
        "gate/max_weight": float(routing.gate.max()),
        "gate/max_top_share": float(routing.top.max()),
    }
    for e, name in enumerate(mltfr.gate_names(table_names)):
        values[f"gate_weight/{name}"] = float(routing.gate[e])
        values[f"gate_top_share/{name}"] = float(routing.top[e])
    if mltfr.consensus is not None and mltfr.config.consensus.learn_weight:
        values["consensus/weight"] = float(whole_parameter(engine, mltfr.consensus_weight))
    for m, name in enumerate(table_names):
        log_tau = mltfr.selector(m).log_tau()
        if log_tau is not None:
            power = float(whole_parameter(engine, log_tau))
            values[f"filter_temperature/{name}"] = exp_or_inf(power)
    return values


def board_values(totals: StepTotals, table_names: Sequence[str]) -> dict[str, float]:
    """What TensorBoard shows of a step beside that."""
    if totals.routing is None:
        return {}
    entropies = zip(table_names, totals.routing.kept_entropy.tolist(), strict=True)
    return {f"filter_entropy/{name}": value for name, value in entropies}
