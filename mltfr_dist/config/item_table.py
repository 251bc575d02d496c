"""Where the item table is held, and what can train a table that is stepped by rows."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mltfr_dist.losses import LOSSES
from mltfr_dist.optimizers import OPTIMIZERS
from mltfr_dist.schema import Section


class ItemTableConfig(Section):
    """The table of item vectors, which is both the model's input and its output."""

    placement: Literal["replicated", "rows", "auto"] = Field(
        "replicated",
        description="Where its rows, gradients and moments are held. replicated: each rank holds "
        "all rows; rows: each rank "
        "holds 1/N of them, and a step exchanges those that its batch reads (one rank: the same as "
        "replicated); "
        "auto: rows above one rank, wherever it serves the run. Numbers agree to rounding.",
    )


def check_items(placement: str, item_gradients: str, loss: str, name: str) -> None:
    """Whether the loss and the optimizer of these names fit a table that is stepped by rows, or
    divided.

    Raises:
        ValueError: They do not.
    """
    if item_gradients == "sparse":
        if LOSSES[loss].negatives == "none":
            *others, last = (n for n, entry in LOSSES.items() if entry.negatives != "none")
            raise ValueError(
                f"optimizer.item_gradients sparse with loss.name {loss}, which scores every item, "
                f"so that every row has a "
                f"gradient: give loss.name {', '.join(others)} or {last}, or item_gradients dense"
            )
        if not OPTIMIZERS[name].by_rows:
            serves = " or ".join(n for n, entry in OPTIMIZERS.items() if entry.by_rows)
            raise ValueError(
                f"optimizer.item_gradients sparse steps rows by lazy Adam, and optimizer.name is "
                f"{name}: "
                f"give optimizer.name {serves}, or item_gradients dense"
            )
    reason = needs_whole_items(loss, name)
    if placement == "rows" and reason:
        raise ValueError(
            f"item_table.placement rows divides the item table, but {reason}: give "
            "item_table.placement auto or replicated"
        )


def needs_whole_items(loss: str, name: str) -> str | None:
    """Why the loss or the optimizer of these names needs all rows of the item table at once; None
    where neither does.
    """
    entry = LOSSES[loss]
    if entry.negatives == "none" and entry.path != "losses:all_items":
        return f"loss.name {loss} reads all item vectors"
    if not OPTIMIZERS[name].elementwise:
        return f"optimizer.name {name} looks at the shape of the whole table"
    return None
