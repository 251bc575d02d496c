"""TensorBoard's HParams page: one session a trial, with its searched fields and its outcome."""

from __future__ import annotations

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from mltfr_dist.tuning.space import shown_value
from mltfr_dist.tuning.trials import Trial


def write_hparams(trial: Trial) -> None:
    """Add a trial that is over to the page; nothing where it failed before its first validation."""
    validations = trial.validations()
    if not validations:
        return
    best = {
        f"sweep/best_{name}": max(v.metrics[name] for v in validations)
        for name in validations[-1].metrics
    }
    metrics = best | {"sweep/epochs": float(validations[-1].epoch)}
    fields = {
        key: v if isinstance(v, int | float | str | bool) else shown_value(v)
        for key, v in trial.values.items()
    }
    fields |= {"state": trial.state}
    writer = SummaryWriter(str(trial.folder / "tb"))
    assert writer.file_writer is not None
    for summary in hparams(fields, dict.fromkeys(metrics, 0.0)):
        writer.file_writer.add_summary(summary)
    for tag, value in metrics.items():
        writer.add_scalar(tag, value, validations[-1].epoch)
    writer.close()
