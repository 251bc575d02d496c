"""The registry of optimizers: configuration, training, checkpoints and help follow from a line."""

from __future__ import annotations

from typing import NamedTuple


class Entry(NamedTuple):
    """Where an optimizer is found and what it is."""

    path: str
    """``module:function`` under ``mltfr_dist``: builds it, see `optim.py`."""
    what: str
    """What it is, with its source."""
    state: tuple[str, ...]
    """Names of the tensors that it keeps for each parameter, of the parameter's shape and zero at
    the start. A checkpoint holds these, and the number of updates."""
    elementwise: bool = True
    """Whether a number's update depends on no other number: ZeRO hands an optimizer flat pieces."""
    skips_on_device: bool = False
    """Whether its fused kernel leaves parameters and state as they are where ``found_inf`` is 1, in
    a first update too: nobody then has to know on the host, before it, that it is skipped."""
    by_rows: bool = False
    """Whether `distributed/row_adam.py` is its form for `optimizer.item_gradients=sparse`."""


OPTIMIZERS: dict[str, Entry] = {
    "adamw": Entry(
        "optim:adamw",
        "Loshchilov and Hutter 2019, Adam with decoupled weight decay",
        state=("exp_avg", "exp_avg_sq"),
        skips_on_device=True,
        by_rows=True,
    ),
    "adam": Entry(
        "optim:adam",
        "Kingma and Ba 2015, weight decay as a part of the gradient",
        state=("exp_avg", "exp_avg_sq"),
        skips_on_device=True,
        by_rows=True,
    ),
    "sgd": Entry(
        "optim:sgd",
        "gradient descent with momentum, weight decay as a part of the gradient",
        state=("momentum_buffer",),
    ),
}
