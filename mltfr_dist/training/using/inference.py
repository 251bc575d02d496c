"""Using a finished run: its numbers again, and recommendations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mltfr_dist.config import RunConfig
from mltfr_dist.distributed.devices import uses_gpus
from mltfr_dist.distributed.meeting import start_ranks
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.distributed.sending import send_text
from mltfr_dist.distributed.stored_rows import items_of_file
from mltfr_dist.errors import CheckpointError, ConfigError, DamagedError
from mltfr_dist.exported import CONFIG as EXPORTED
from mltfr_dist.exported import MODEL, load_exported
from mltfr_dist.invocation import train_command
from mltfr_dist.ranking import Ranker
from mltfr_dist.serving.explaining import Tokens
from mltfr_dist.training.build import load_model
from mltfr_dist.training.evaluating.compare import final_metrics
from mltfr_dist.training.evaluating.evaluate import ALL, evaluate
from mltfr_dist.training.evaluating.lists import lister, measure_lists
from mltfr_dist.training.evaluating.rankers import ByModel
from mltfr_dist.training.inputs import Inputs, check_recorded, load_inputs
from mltfr_dist.training.items import load_items
from mltfr_dist.training.run_folder import (
    CHECKPOINTS,
    CONFIG,
    RANKS,
    RESULT,
    STAGES,
    Result,
    load_config,
    load_result,
)
from mltfr_dist.training.streams import ranking_stream

ECHOED_ITEMS = 10
"""Items of a history that a text names."""

SPLITS = ("valid", "test")


@dataclass(frozen=True)
class LoadedRun(Ranker):
    """A finished run, its chosen model in memory."""

    config: RunConfig
    inputs: Inputs
    device: torch.device

    @property
    def tokens(self) -> Sequence[Tokens]:
        """The token tables' names of rows; none for a bare backbone."""
        return self.inputs.tables

    def evaluate(self, split: str = "test", *, lists: bool = False) -> dict[str, float]:
        """The metrics of the chosen model on a split, as the run reported them; in one process.

        Args:
            split: "valid" or "test".
            lists: Whether what is recommended is measured, too (list_metrics.py): coverage,
                novelty, popularity, and diversity where items have titles.

        Raises:
            ConfigError: Another split.
        """
        alone = Ranks(0, 1, self.device)
        metrics = evaluate_model(self, split, alone)
        return metrics | _model_lists(self, split, alone) if lists else metrics


def load_run(
    folder: str | Path, ranks: Ranks | None = None, *, items_stay: bool = False
) -> LoadedRun:
    """Load the chosen model of a finished run; on several ranks all must call (None: one process).

    Args:
        folder: Of the run.
        ranks: All processes.
        items_stay: Whether an item table that ranks wrote divided stays in its files: the model
            then gives vectors of some users and items at a time, and nothing else.

    Raises:
        CheckpointError: No run, an unfinished one, or inputs that changed since.
        DataError: Its data or tables are missing or damaged.
    """
    folder = Path(folder)
    ranks = ranks or Ranks(0, 1, torch.device("cuda" if uses_gpus() else "cpu"))
    finished_run = ranks.on_rank0(lambda _: finished(folder))
    texts = send_text(json.dumps([one.model_dump_json() for one in finished_run or ()]), ranks)
    config_text, result_text = json.loads(texts)
    config, result = (
        RunConfig.model_validate_json(config_text),
        Result.model_validate_json(result_text),
    )
    inputs = ranks.jointly(lambda: load_inputs(config))
    ranks.on_rank0(lambda _: check_recorded(folder, inputs))
    weights, stage = folder / CHECKPOINTS / result.checkpoint, result.stage
    try:
        model = load_model(
            config,
            inputs,
            weights,
            ranks,
            with_consensus=stage == STAGES[1],
            items_stay=items_stay,
        )
    except DamagedError as error:
        raise CheckpointError(
            f"The checkpoint that the run {folder} chose cannot be used: {error.what}",
            rule=error.rule,
            remedy=f"Restore it from a copy; or delete {folder / RESULT} and start the run again, "
            f"{command(folder)}: it then chooses the best of the checkpoints that are left, and "
            "says which.",
        ) from None
    return LoadedRun(model, load_items(config), config.data.max_len, config, inputs, ranks.device)


def open_model(
    folder: Path, device: torch.device | None = None, *, items_stay: bool = False
) -> Ranker:
    """What a folder holds: a finished run, or an exported model.

    Args:
        folder: Of either.
        device: Where to compute; None: the first GPU for a run, else the CPU.
        items_stay: See :func:`load_run`; an export's item table then always does.

    Raises:
        CheckpointError: Neither of them, or one that cannot be used.
        DataError: A run's data or tables are missing or damaged.
    """
    if (folder / EXPORTED).exists():
        divide = items_of_file(folder / MODEL) if items_stay else None
        exported = load_exported(folder, divide)
        return replace(exported, model=exported.model.to(device or torch.device("cpu")))
    ranks = None if device is None else Ranks(0, 1, device)
    return load_run(folder, ranks, items_stay=items_stay)


def command(folder: Path) -> str:
    """What goes on with a run."""
    return f"`{train_command()} --config {folder / CONFIG}`"


def finished(folder: Path) -> tuple[RunConfig, Result]:
    """The configuration and the outcome of a finished run.

    Raises:
        CheckpointError: No run, or an unfinished one.
    """
    config, result = load_config(folder, locate=True), load_result(folder)
    if result is None:
        raise CheckpointError(
            f"The run {folder} is not finished.", remedy=f"Go on with it: {command(folder)}."
        )
    return config, result


def evaluate_run(
    folder: str | Path,
    split: str,
    ranks: Ranks | None = None,
    *,
    keep_ranks: bool = False,
    lists: bool = False,
) -> dict[str, float]:
    """The metrics of a run's chosen model on a split, as the run reported them. All must call.

    Args:
        folder: Of the run.
        split: "valid" or "test".
        ranks: All processes; None: those that a launcher started, or this one alone.
        keep_ranks: Whether `ranks.parquet` is written, see :func:`save_ranks`.
        lists: Whether what is recommended is measured, too (list_metrics.py).
    """
    ranks = ranks or start_ranks()
    run = load_run(folder, ranks)
    if keep_ranks:
        metrics = save_ranks(run, Path(folder), split, ranks)
    else:
        metrics = evaluate_model(run, split, ranks)
    return metrics | _model_lists(run, split, ranks) if lists else metrics


def save_ranks(run: LoadedRun, folder: Path, split: str, ranks: Ranks) -> dict[str, float]:
    """:func:`evaluate_model`, and `ranks.parquet` of both splits in the run's folder. All must
    call.

    A run that left the test split unread leaves it unread here, too.

    Raises:
        ConfigError: ``split`` is the unread one.
    """
    result = ranks.on_rank0(lambda _: load_result(folder))
    read_test = bool(ranks.from_main("read" if result and result.test else ""))
    if split == "test" and not read_test:
        raise ConfigError(
            f"The run {folder} has left the test split unread.",
            remedy="Give --split valid, or start the run itself again.",
        )
    valid, by_slice = final_metrics(
        ByModel(run.model), run.config, run.inputs.manifest, ranks, read_test, folder / RANKS
    )
    return valid if split == "valid" else by_slice[ALL]


def evaluate_model(run: LoadedRun, split: str, ranks: Ranks) -> dict[str, float]:
    """The metrics of a run's chosen model. All ranks must call.

    Raises:
        ConfigError: There is no such split.
    """
    check_split(split)
    stream = ranking_stream(run.config, split, ranks)
    return evaluate(ByModel(run.model), stream, run.config.evaluation, ranks)


def check_split(split: str) -> None:
    """Whether a split can be evaluated on.

    Raises:
        ConfigError: There is no such split.
    """
    if split not in SPLITS:
        raise ConfigError(
            f"There is no split `{split}` to evaluate on.", remedy=f"Give {' or '.join(SPLITS)}."
        )


def _model_lists(run: LoadedRun, split: str, ranks: Ranks) -> dict[str, float]:
    config, manifest = run.config, run.inputs.manifest
    k, filter_seen = max(config.evaluation.cutoffs), config.evaluation.filter_seen
    best = lister(run.model, manifest.num_items, k, filter_seen=filter_seen)
    return measure_lists(best, split, config, manifest, ranks, run.items.titles)


def recommendation_text(
    run: Ranker, history: Sequence[str], *, k: int, explain: bool, keep_seen: bool
) -> str:
    """What `mltfr recommend` prints."""
    numbers = run.items.encode(history)
    items = run.recommend(history, k, filter_seen=not keep_seen)
    lines = [history_line(run, numbers), ""]
    if items:
        lines.append(f"{'rank':>4}  {'score':>8}  {'item':<10}  title")
    for rank, item in enumerate(items, 1):
        lines.append(
            f"{rank:>4}  {item.score:>8.4f}  {item.item_id:<10}  {item.title or ''}".rstrip()
        )
    if len(items) < k:
        left = f"These {len(items)} are" if len(items) > 1 else "This one is"
        lines += [""] * bool(items) + [
            f"{left if items else 'Nothing is'} left: all other items are in the history. "
            "`--keep-seen` lets them be recommended again."
        ]
    if explain:
        lines += ["", *explanation_lines(run, history)]
    return "\n".join(lines)


def history_line(run: Ranker, item_ids: Sequence[int]) -> str:
    """The history by its items' names; of a long one the end, which weighs most."""
    names = [run.items.name(item) for item in item_ids[-ECHOED_ITEMS:]]
    end = " -> ".join(names)
    if len(item_ids) <= ECHOED_ITEMS:
        return f"After: {end}"
    read = min(len(item_ids), run.max_len)
    return f"After {len(item_ids)} items, of which the model reads the last {read}: ... -> {end}"


def explanation_lines(run: Ranker, history: Sequence[str]) -> list[str]:
    """Kept tokens per table and gate weights for a history."""
    if run.model.mltfr is None:
        return ["This run is a bare backbone: no token tables."]
    lines = [
        "What the token filter keeps for this history, and how much the router listens to each "
        "table:"
    ]
    for view in run.explain(history):
        tokens = ", ".join(f"{token!r} {weight:.2f}" for token, weight in view.tokens)
        lines.append(f"  {view.table:<12} gate {view.gate_weight:.2f}  {tokens}")
    return lines
