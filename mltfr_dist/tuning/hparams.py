"""TensorBoard's HParams page: one session a trial, with its searched fields and its outcome.

A session is a folder of its own and is written anew each time, from the trial's files, so it can be made at any time.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from mltfr_dist.tuning.space import shown_value
from mltfr_dist.tuning.trials import Trial

SESSION = Path("tb", "hparams")
"""In a trial's folder."""


def write_all(trials: Sequence[Trial]) -> None:
    """Write the session of every trial that is over and has none, such as one that ended while the sweep was down."""
    for trial in trials:
        if trial.state != "unfinished" and not (trial.folder / SESSION).exists():
            write_hparams(trial)


def write_hparams(trial: Trial) -> None:
    """Write the session of a trial that is over; one that failed before its first validation has no metrics."""
    validations = trial.validations()
    names = validations[-1].metrics if validations else ()
    metrics = {f"sweep/best_{name}": max(v.metrics[name] for v in validations) for name in names}
    epochs = validations[-1].epoch if validations else 0
    metrics["sweep/epochs"] = float(epochs)
    fields = {
        key: v if isinstance(v, int | float | str | bool) else shown_value(v)
        for key, v in trial.values.items()
    }
    fields |= {"state": trial.state}
    shutil.rmtree(trial.folder / SESSION, ignore_errors=True)
    writer = SummaryWriter(str(trial.folder / SESSION))
    assert writer.file_writer is not None
    for summary in hparams(fields, dict.fromkeys(metrics, 0.0)):
        writer.file_writer.add_summary(summary)
    for tag, value in metrics.items():
        writer.add_scalar(tag, value, epochs)
    writer.close()
