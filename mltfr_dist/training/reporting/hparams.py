"""TensorBoard's HParams page: one session a run or a trial, with its fields and its outcome.

A session is a folder of its own, written anew each time, so it can be made at any time. It defines
no experiment: TensorBoard reads a single definition for all runs that it shows, and without one it
gathers fields and metrics from the sessions themselves.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from mltfr_dist.files import replacing

SESSION = Path("tb", "hparams")
"""In a run's folder."""

EXPERIMENT = "_hparams_/experiment"


def write_session(
    folder: Path, fields: Mapping[str, Any], metrics: Mapping[str, float], step: int
) -> Path:
    """Write the session of a run.

    Args:
        folder: The run's folder.
        fields: Dotted key to value.
        metrics: Name to final value; empty where there is none.
        step: Where the metrics stand on TensorBoard's axis.

    Returns:
        The session's folder.
    """
    session = folder / SESSION
    session.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(session, ignore_errors=True)
    shown = {key: shown_field(value) for key, value in fields.items()}
    with (
        replacing(session) as partial,  # whole or absent: a sweep writes what is absent
        closing(SummaryWriter(str(partial))) as writer,
    ):
        assert writer.file_writer is not None
        for summary in hparams(shown, dict.fromkeys(metrics, 0.0)):
            if summary.value[0].tag != EXPERIMENT:
                writer.file_writer.add_summary(summary)
        for tag, value in metrics.items():
            writer.add_scalar(tag, value, step)
    return session


def shown_field(value: Any) -> int | float | str:
    """A field's value as a column shows it."""
    if isinstance(value, list | tuple):
        return ", ".join(str(one) for one in value) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    return value if isinstance(value, int | float | str) else str(value)
