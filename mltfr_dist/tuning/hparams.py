"""A sweep's HParams page: one session a trial, with its searched fields and its outcome, from its
files.
"""

from __future__ import annotations

from collections.abc import Sequence

from mltfr_dist.training.reporting.hparams import SESSION, write_session
from mltfr_dist.tuning.records import Trial
from mltfr_dist.tuning.space import shown_value


def write_all(trials: Sequence[Trial]) -> None:
    """Write the session of every trial that is over and has none, such as one that ended while the
    sweep was down.
    """
    for trial in trials:
        if trial.state != "unfinished" and not (trial.folder / SESSION).exists():
            write_hparams(trial)


def write_hparams(trial: Trial) -> None:
    """Write the session of a trial that is over; one that failed before its first validation has no
    metrics.
    """
    validations = trial.validations()
    names = validations[-1].metrics if validations else ()
    metrics = {f"sweep/best_{name}": max(v.metrics[name] for v in validations) for name in names}
    epochs = validations[-1].epoch if validations else 0
    metrics["sweep/epochs"] = float(epochs)
    fields = {
        key: v if isinstance(v, int | float | str | bool) else shown_value(v)
        for key, v in trial.values.items()
    }
    write_session(trial.folder, fields | {"state": trial.state}, metrics, epochs)
