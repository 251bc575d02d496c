"""What a step comes to: its sums over all ranks, and the values that are recorded of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mltfr_dist.data.stream import StepBatches
from mltfr_dist.distributed.engine import Engine
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.distributed.state import whole_parameter
from mltfr_dist.models.recommender import TrainingOutput


@dataclass
class StepTotals:
    """Means over the global batch of one step."""

    loss: float
    gate_weights: Tensor | None = None
    """[M]."""
    top_share: Tensor | None = None
    """[M]."""
    entropy: float = 0.0
    balance: float = 0.0
    contrast: float | None = None
    kept_entropy: Tensor | None = None
    """[M] mean entropy of the kept tokens' weights, nats."""
    nonfinite: tuple[str, ...] = ()
    """What was not finite on some rank, by name; the update was then skipped."""


def reduce_outputs(ranks: Ranks, outputs: list[TrainingOutput], batches: StepBatches) -> StepTotals:
    """Sum a step's outputs over micro-batches and ranks, in one collective."""
    vectors = []
    for output in outputs:
        routing, contrast = output.routing, output.contrastive_sum
        parts = [
            output.loss_sum.view(1),
            output.loss_sum.new_zeros(1) if contrast is None else contrast.view(1),
        ]
        if routing is not None:
            parts += [
                routing.entropy_sum,
                routing.balance_sum.detach(),
                routing.gate_sum,
                routing.top_sum,
                routing.kept_entropy_sum,
                routing.num_queries,
            ]
        vectors.append(torch.cat([p.double() for p in parts]))
    means = ranks.sum(torch.stack(vectors).sum(0)).cpu()
    loss, contrast_mean = (
        float(means[0]) / batches.num_targets,
        float(means[1]) / batches.num_sequences,
    )
    contrasted = None if outputs[0].contrastive_sum is None else contrast_mean
    routing = outputs[0].routing
    if routing is None:
        return StepTotals(loss, contrast=contrasted)
    gates, tables = len(routing.gate_sum), len(routing.kept_entropy_sum)
    sizes = [1, 1, gates, gates, tables, 1]
    entropy, balance, gate, top, kept_entropy, queries = torch.split(means[2:], sizes)
    positions = gate.sum()  # the gates of a position sum to 1, so their sum counts positions
    return StepTotals(
        loss,
        (gate / positions).float(),
        (top / positions).float(),
        float(entropy / positions),
        float(balance / positions),
        contrasted,
        (kept_entropy / queries).float(),
    )


def exp_or_inf(power: float) -> float:
    """Exponential of ``power``; infinity where that is no finite number any more, for which math.exp raises."""
    try:
        return math.exp(power)
    except OverflowError:
        return math.inf


def step_values(
    engine: Engine, totals: StepTotals, num_targets: int, table_names: Sequence[str]
) -> dict[str, float]:
    """What metrics.jsonl holds of a step. All ranks must call."""
    values = {
        "loss": totals.loss,
        "learning_rate": float(engine.optimizer.param_groups[0]["lr"]),
        "positions": float(num_targets),
    }
    if totals.contrast is not None:
        values["contrast_loss"] = totals.contrast
    norm = engine.grad_norm()
    if norm is not None:
        values["grad_norm"] = norm
    if totals.gate_weights is not None and totals.top_share is not None:
        values |= {"balance_loss": totals.balance, "gate/entropy": totals.entropy}
        values |= {
            "gate/max_weight": float(totals.gate_weights.max()),
            "gate/max_top_share": float(totals.top_share.max()),
        }
        mltfr = engine.module.mltfr
        assert mltfr is not None
        for e, name in enumerate(mltfr.gate_names(table_names)):
            values[f"gate_weight/{name}"] = float(totals.gate_weights[e])
            values[f"gate_top_share/{name}"] = float(totals.top_share[e])
        if mltfr.consensus is not None and mltfr.config.consensus.learn_weight:
            values["consensus/weight"] = float(whole_parameter(engine, mltfr.consensus_weight))
        for m, name in enumerate(table_names):
            log_temperature = mltfr.log_temperature(m)
            if log_temperature is not None:
                power = float(whole_parameter(engine, log_temperature))
                values[f"filter_temperature/{name}"] = exp_or_inf(power)
    return values


def board_values(totals: StepTotals, table_names: Sequence[str]) -> dict[str, float]:
    """What TensorBoard shows of a step beside that."""
    if totals.kept_entropy is None:
        return {}
    return {
        f"filter_entropy/{name}": float(value)
        for name, value in zip(table_names, totals.kept_entropy, strict=True)
    }
