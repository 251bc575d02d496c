"""Weights & Biases, MLflow and Trackio beside TensorBoard (`tracking.also`); none is a dependency.

Each stage is a run of the service, named NAME-STAGE and continued when ours goes on. A service gets
the numbers of TensorBoard's charts and the configuration. What it has is noted in the run's folder,
so that a run which goes on sends no point twice.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from mltfr_dist.config import RunConfig
from mltfr_dist.errors import ConfigError
from mltfr_dist.files import write_atomically
from mltfr_dist.training.run_folder import leaf_values

PROJECT = "mltfr_dist"
Say = Callable[[str], None]


class Client(Protocol):
    """One open run of a service."""

    id: str
    """By which it is continued."""

    def send(self, values: Mapping[str, float], step: int) -> None:
        """Send numbers."""

    def finish(self) -> None:
        """Close the run."""


class Wandb:
    """Weights & Biases; `wandb offline` keeps its files in the run's folder."""

    def __init__(self, name: str, known: str | None, config: RunConfig) -> None:
        wandb: Any = importlib.import_module("wandb")
        self._run = wandb.init(
            project=PROJECT,
            name=name,
            id=known,
            resume="allow",
            config=leaf_values(config),
            dir=str(config.folder),
        )
        self.id = str(self._run.id)

    def send(self, values: Mapping[str, float], step: int) -> None:
        """One call a step and group of values."""
        self._run.log(dict(values), step=step)

    def finish(self) -> None:
        """Close the run."""
        self._run.finish()


class Mlflow:
    """MLflow; MLFLOW_TRACKING_URI says where, else its own default."""

    def __init__(self, name: str, known: str | None, config: RunConfig) -> None:
        self._mlflow: Any = importlib.import_module("mlflow")
        self._mlflow.set_experiment(PROJECT)
        self.id = str(self._mlflow.start_run(run_id=known, run_name=name).info.run_id)
        if known is None:
            self._mlflow.log_params(leaf_values(config))

    def send(self, values: Mapping[str, float], step: int) -> None:
        """Names keep what MLflow allows; `@` is spelt out."""
        named = {
            re.sub(r"[^\w./ -]", "_", tag.replace("@", "_at_")): v for tag, v in values.items()
        }
        self._mlflow.log_metrics(named, step=step)

    def finish(self) -> None:
        """Close the run."""
        self._mlflow.end_run()


class Trackio:
    """Trackio, which knows a run by its name."""

    def __init__(self, name: str, known: str | None, config: RunConfig) -> None:
        self._trackio: Any = importlib.import_module("trackio")
        self.id = name
        resume = "never" if known is None else "must"
        self._trackio.init(project=PROJECT, name=name, config=leaf_values(config), resume=resume)

    def send(self, values: Mapping[str, float], step: int) -> None:
        """One call a step and group of values."""
        self._trackio.log(dict(values), step=step)

    def finish(self) -> None:
        """Close the run."""
        self._trackio.finish()


CLIENTS: dict[str, Callable[[str, str | None, RunConfig], Client]] = {
    "wandb": Wandb,
    "mlflow": Mlflow,
    "trackio": Trackio,
}


def check_services(config: RunConfig) -> None:
    """Whether what `tracking.also` names is installed.

    Raises:
        ConfigError: It is not.
    """
    for name in config.tracking.also:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"tracking.also names {name}, and the Python package {name} is not installed.",
                remedy=f"`pip install {name}`, or leave it out of tracking.also.",
            )


class Service:
    """A stage's numbers for one service, each once.

    A service that fails is told of once and left alone from then on: no training ends for it.
    """

    def __init__(self, name: str, config: RunConfig, stage: str, *, anew: bool, say: Say) -> None:
        """Open its run.

        Args:
            name: Of :data:`CLIENTS`.
            config: The run.
            stage: Its stage.
            anew: Whether the stage begins.
            say: Prints a line.
        """
        self.name, self._say = name, say
        self._note = config.folder / f"{name}-{stage}.json"
        noted = {} if anew or not self._note.exists() else json.loads(self._note.read_text())
        self._sent: dict[str, int] = noted.get("sent", {})
        self._client: Client | None = None
        with self._leaving():
            self._client = CLIENTS[name](f"{config.name}-{stage}", noted.get("id"), config)

    def send(self, values: Mapping[str, float], step: int) -> None:
        """Send what the service does not have."""
        new = {tag: v for tag, v in values.items() if step > self._sent.get(tag, -1)}
        if not new or self._client is None:
            return
        with self._leaving():
            self._client.send(new, step)
            self._sent |= dict.fromkeys(new, step)
            write_atomically(self._note, json.dumps({"id": self._client.id, "sent": self._sent}))

    def close(self) -> None:
        """Close its run; it can be continued."""
        if self._client is not None:
            with self._leaving():
                self._client.finish()

    @contextmanager
    def _leaving(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever another's code raises
            self._client = None
            first = str(error).strip().partition("\n")[0] or type(error).__name__
            self._say(f"  warning: {self.name} gets nothing more of this stage: {first}")


def open_services(config: RunConfig, stage: str, *, anew: bool, say: Say) -> list[Service]:
    """All of `tracking.also`."""
    return [Service(name, config, stage, anew=anew, say=say) for name in config.tracking.also]
