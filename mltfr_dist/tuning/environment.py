"""Ray's settings by environment variables."""

from __future__ import annotations

import os
from collections.abc import Mapping

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # a trial's output goes to its own log
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # one more process a trial; Slurm's signal and a lost node are seen without it
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # a trial's end is seen that much later at most, instead of 2 s
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",  # why trials fail, the sweep says itself
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # a run writes its own TensorBoard page
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",  # Tune's state is never read
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # driver.py has its own
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
"""What the driver and the trials of a sweep have, where the user has not set it."""

LOOPBACK = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # under `uv run`: an environment for each process
}
"""The same for the driver of a Ray of its own. Without clusters it takes 127.0.0.1 for its node and
listens there alone (on every system, whatever the name says); asked for that address in any other
way, it listens on all interfaces.
"""


def set_environment(more: Mapping[str, str] | None = None) -> None:
    """Set :data:`ENVIRONMENT` and ``more`` in this process; those it starts inherit them, those of
    a cluster do not.
    """
    for name, value in {**ENVIRONMENT, **(more or {})}.items():
        os.environ.setdefault(name, value)
