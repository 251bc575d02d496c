"""The diagonal Fisher information of each expert's core: the mean of *per-sample* squared
gradients, under any ZeRO stage.

The square of a batch's mean gradient is not the Fisher: it shrinks with the batch and depends on
how ranks divide it. Here each sample's own gradient is formed. For a linear map y = W x it is the
sum over the sample's rows of (dloss/dy) x^T, so one backward pass through a whole batch gives every
sample's gradient from the maps' inputs and output gradients. Only those outputs are differentiated
(``torch.autograd.grad``): no parameter gradient is formed, so ZeRO's reduction never runs.

A sample is one training sequence; its loss is the mean over its scored positions (the
recommendation loss alone, without a contrast of views).
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack

import torch
from torch import Tensor

from mltfr_dist.data.batch import SequenceBatch, lengths
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.distributed.watchdog import heartbeat
from mltfr_dist.models.consensus import State
from mltfr_dist.models.experts import ExpertCore, Tap
from mltfr_dist.models.mltfr import MLTFR
from mltfr_dist.models.output import TrainingOutput
from mltfr_dist.models.recommender import Recommender


def fisher_diagonals(
    model: Recommender, batches: Iterable[SequenceBatch], ranks: Ranks, num_samples: int
) -> list[State]:
    """Fisher diagonal of every expert's core.

    Args:
        model: The trained model (any ZeRO stage); evaluated without dropout.
        batches: This rank's batches; together the ranks' hold samples 0..num_samples-1, and any
            others are ignored.
        ranks: All processes; every one must call, with as many batches.
        num_samples: Samples to average over.

    Returns:
        Per expert, parameter name to mean squared per-sample gradient, fp32, the same on every rank
        and for every division into batches.
    """
    mltfr = model.mltfr
    assert isinstance(mltfr, MLTFR)
    cores = [core for core in mltfr.cores if isinstance(core, ExpertCore)]
    names = [
        f"{linear}.{kind}"
        for linear in ("query", "key", "value", "out")
        for kind in ("weight", "bias")
    ]
    sums: list[State] = [{} for _ in cores]
    was_training = model.training
    model.eval()
    for batch in batches:
        heartbeat()
        for state, squares in zip(
            sums,
            _batch_squares(model, mltfr, cores, batch.to(ranks.device), num_samples),
            strict=True,
        ):
            for name, value in squares.items():
                state[name] = state[name] + value if name in state else value
    model.train(was_training)
    return [{name: ranks.sum(state[name]) / num_samples for name in names} for state in sums]


def _batch_squares(
    model: Recommender,
    mltfr: MLTFR,
    cores: list[ExpertCore],
    batch: SequenceBatch,
    num_samples: int,
) -> list[State]:
    """Per core, sums over the batch's samples of squared gradients."""
    counted = (batch.sample_ids >= 0) & (batch.sample_ids < num_samples)  # [B]
    weights = counted[:, None] / lengths(batch.target_ids).clamp(min=1)[:, None].float()  # [B, 1]
    with ExitStack() as stack:
        taps = [stack.enter_context(core.tapped()) for core in cores]
        output = model(
            batch._replace(view_ids=None), weights.expand_as(batch.item_ids)
        )  # of the recommendation loss alone
    assert isinstance(output, TrainingOutput)
    gradients = torch.autograd.grad(
        output.terms["loss"].sum, [tap.outputs for core_taps in taps for tap in core_taps]
    )
    read = model.backbone.pack(batch.item_ids).read
    ones = read.pack(torch.ones_like(read.item_ids, dtype=torch.float32)[..., None])  # [N, 1]
    sample_of_block = mltfr.blocks(ones, read).users  # [G]
    remaining = iter(gradients)
    return [
        {
            name: squares
            for tap in core_taps
            for name, squares in _tap_squares(
                tap, next(remaining), sample_of_block, len(read.item_ids)
            ).items()
        }
        for core_taps in taps
    ]


def _tap_squares(tap: Tap, gradient: Tensor, sample_of_block: Tensor, num_rows: int) -> State:
    """Sums over samples of the squared gradients of one linear map's weight and bias."""
    gradient = gradient.float()  # [G, r, D_out]
    per_block = {
        "weight": torch.einsum("gro,gri->goi", gradient, tap.inputs.float()),
        "bias": gradient.sum(1),
    }
    squares = {}
    for kind, value in per_block.items():
        per_sample = value.new_zeros(num_rows, *value.shape[1:]).index_add_(
            0, sample_of_block, value
        )
        squares[f"{tap.parameter}.{kind}"] = per_sample.square().sum(0)
    return squares
