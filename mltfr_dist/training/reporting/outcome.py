"""What is shown of a finished run beside its report: HParams, the projector, its services."""

from __future__ import annotations

from mltfr_dist.config import RunConfig
from mltfr_dist.training.reporting.hparams import write_session
from mltfr_dist.training.reporting.projector import Projected, write_projector
from mltfr_dist.training.reporting.services import open_services
from mltfr_dist.training.run_folder import Result, leaf_values


def show_outcome(config: RunConfig, items: Projected | None, result: Result, stage: str) -> None:
    """Show the chosen model; on rank 0 alone.

    Args:
        config: The run.
        items: Whose vectors of the chosen model the projector shows; None: it shows none.
        result: What it reached.
        stage: The last stage that was trained.
    """
    metrics = {f"final/test_{name}": value for name, value in result.test.items()}
    metrics |= {f"final/valid_{name}": value for name, value in result.valid.items()}
    metrics |= {"run/epochs": float(result.epochs), "run/seconds": result.seconds}
    fields = {k: v for k, v in leaf_values(config).items() if k not in ("name", "runs_dir")}
    session = write_session(config.folder, fields, metrics, result.step)
    if items is not None:
        write_projector(session, items)
    for service in open_services(config, stage, anew=False, say=print):
        service.send(metrics, result.step)
        service.close()
