"""A run's TensorBoard: each stage is a TensorBoard run of its own, `tb/train` and
`tb/consensus`.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from mltfr_dist.config import RunConfig
from mltfr_dist.training.reporting.markdown import block
from mltfr_dist.training.run_folder import dump_config

FOLDER = "tb"


class Board:
    """The event files of one stage. Points stand at the updates of the whole run."""

    def __init__(
        self, folder: Path, stage: str, step: int | None, base_step: int, later: Sequence[str]
    ) -> None:
        """Continue a stage, so that what is drawn again stands there once.

        Args:
            folder: The run's folder.
            stage: Whose board it is.
            step: TensorBoard drops what was drawn after it; None: the stage begins anew.
            base_step: Updates of earlier stages.
            later: Stages that follow. They have not begun: what is there of them is deleted.
        """
        for void in [*later, *[stage] * (step is None)]:
            shutil.rmtree(folder / FOLDER / void, ignore_errors=True)
        self._base_step = base_step
        # TensorBoard takes the first mark of a start for no restart, so a new board needs one too.
        first = base_step if step is None else base_step + step + 1
        self._writer = SummaryWriter(str(folder / FOLDER / stage), purge_step=first)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Points at ``step`` of the stage."""
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, self._base_step + step)

    def text(self, tag: str, markdown: str, step: int) -> None:
        """A text at ``step`` of the stage."""
        self._writer.add_text(tag, markdown, self._base_step + step)

    def open_with(self, config: RunConfig) -> None:
        """The layout of the custom scalars."""
        self._writer.add_custom_scalars(layout(config))

    def flush(self) -> None:
        """Bring everything to the disk."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


def layout(config: RunConfig) -> dict[str, dict[str, list[str | list[str]]]]:
    """Category to chart to the tags that it joins, as regular expressions.

    TensorBoard merges the layouts of all runs that it shows: charts that are alike become one.
    """

    def joined(*tags: str) -> list[str | list[str]]:
        return ["Multiline", list(tags)]

    validation = "(valid|picked_on_test)"
    shown = dict.fromkeys([config.evaluation.select_by, "NDCG@10", "HR@10"])
    charts = {f"validation {name}": joined(f"{validation}/{name}$") for name in shown}
    charts["loss in training and validation"] = joined("step/loss$", f"{validation}/loss$")
    pages = {"Validation, loss, gates": charts}
    if config.mltfr.enabled:
        charts["mean weight of the gates"] = joined("gate_weight/.*")
        pages["Gates and filters"] = {
            "share of positions at which a gate is the largest": joined("gate_top_share/.*"),
            "entropy of the gate (nats)": joined("gate/entropy$"),
            "entropy of the kept weights (nats)": joined("filter_entropy/.*"),
            "temperature of the filters": joined("filter_temperature/.*"),
            "recall of the shortlist": joined("filter_shortlist_recall/.*"),
        }
    pages["Speed"] = {
        "seconds a step": joined("time/.*"),
        "sequences a second": joined("speed/sequences_per_second$"),
        "share of the matrix peak": joined("speed/share_of_matrix_peak$"),
        "memory (GiB)": joined("memory/.*"),
    }
    return pages


def configuration(config: RunConfig) -> str:
    """The configuration as Markdown."""
    return block(dump_config(config))
