"""Using a finished run: its numbers again, and recommendations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mltfr_dist.config import RunConfig
from mltfr_dist.data.batch import RankingBatch
from mltfr_dist.distributed.ranks import Ranks, start_ranks
from mltfr_dist.distributed.sending import send_text
from mltfr_dist.errors import CheckpointError, DamagedError, DataError
from mltfr_dist.invocation import train_command
from mltfr_dist.models.recommender import Recommender
from mltfr_dist.schema import or_nearest
from mltfr_dist.training.evaluate import evaluate, mask_seen
from mltfr_dist.training.explain import TableView, explain
from mltfr_dist.training.inputs import (
    Inputs,
    check_recorded,
    load_inputs,
    load_model,
    ranking_stream,
)
from mltfr_dist.training.items import ItemMap
from mltfr_dist.training.run_folder import (
    CHECKPOINTS,
    CONFIG,
    RESULT,
    Result,
    load_config,
    load_result,
)
from mltfr_dist.training.tracking import STAGES

ECHOED_ITEMS = 10
"""Items of a history, or unknown ids, that a text names."""


@dataclass(frozen=True)
class LoadedRun:
    """A finished run, its chosen model in memory."""

    config: RunConfig
    inputs: Inputs
    model: Recommender
    items: ItemMap
    device: torch.device


def load_run(folder: str | Path, ranks: Ranks | None = None) -> LoadedRun:
    """Load the chosen model of a finished run; on several ranks all must call (None: one process).

    Raises:
        CheckpointError: No run, an unfinished one, or inputs that changed since.
        DataError: Its data or tables are missing or damaged.
    """
    folder = Path(folder)
    ranks = ranks or Ranks(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    found = ranks.main_works(lambda _: finished(folder))
    texts = send_text(json.dumps([part.model_dump_json() for part in found or ()]), ranks)
    config_text, result_text = json.loads(texts)
    config, result = (
        RunConfig.model_validate_json(config_text),
        Result.model_validate_json(result_text),
    )
    inputs = ranks.jointly(lambda: load_inputs(config))
    ranks.main_works(lambda _: check_recorded(folder, inputs))
    place, stage = folder / CHECKPOINTS / result.checkpoint, result.stage
    try:
        model = load_model(config, inputs, place, ranks, with_consensus=stage == STAGES[1])
    except DamagedError as error:
        raise CheckpointError(
            f"The checkpoint that the run {folder} chose cannot be used: {error.what}",
            rule=error.rule,
            remedy=f"Restore it from a copy; or delete {folder / RESULT} and start the run again, "
            f"{command(folder)}: it then chooses the best of the checkpoints that are left, and "
            "says which.",
        ) from None
    return LoadedRun(config, inputs, model, ItemMap.load(config), ranks.device)


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


def evaluate_run(folder: str | Path, split: str, ranks: Ranks | None = None) -> dict[str, float]:
    """The metrics of a run's chosen model on a split, as the run reported them. All must call.

    Args:
        folder: Of the run.
        split: "valid" or "test".
        ranks: All processes; None: those that a launcher started, or this one alone.
    """
    ranks = ranks or start_ranks()
    run = load_run(folder, ranks)
    return evaluate(
        run.model, ranking_stream(run.config, split, ranks), run.config.evaluation, ranks
    )


@dataclass(frozen=True)
class Recommendation:
    """One recommended item."""

    item_id: str
    title: str | None
    score: float


def recommend(
    run: LoadedRun, history: Sequence[str], *, k: int, keep_seen: bool = False
) -> list[Recommendation]:
    """The ``k`` items of highest score after a history.

    Args:
        run: From :func:`load_run`.
        history: Raw item ids, oldest first.
        k: Items to return.
        keep_seen: Whether items of the history may come again.

    Raises:
        DataError: An id that the run's data does not hold, an empty history, or a ``k`` out of range.
    """
    item_ids = encode_history(run, history)
    num_items = run.inputs.manifest.num_items
    if not 1 <= k <= num_items:
        raise DataError(
            f"k is {k}; there are {num_items} items.",
            rule="k lies in 1..number of items.",
            remedy="Change --k.",
        )
    seen = torch.zeros(0, dtype=torch.int64) if keep_seen else torch.tensor(item_ids)
    recent = torch.tensor([item_ids[-run.config.data.max_len :]])
    batch = RankingBatch(
        recent, torch.zeros(1, dtype=torch.int64), torch.zeros_like(seen), seen
    ).to(run.device)
    with torch.no_grad():
        scores = mask_seen(run.model(batch), batch)[0]
    best = scores.topk(min(k, int(torch.isfinite(scores).sum())))
    return [
        Recommendation(run.items.ids[item], run.items.titles[item], score)
        for item, score in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def encode_history(run: LoadedRun, history: Sequence[str]) -> list[int]:
    """Raw item ids to 1..num_items."""
    numbers = {raw: index for index, raw in enumerate(run.items.ids) if index}
    if not history:
        raise DataError(
            "The history is empty.", remedy="Give at least one item: --history ID,ID,..."
        )
    unknown = [raw for raw in history if raw not in numbers]
    if unknown:
        raise DataError(
            f"Unknown item id{'s' if len(unknown) > 1 else ''} "
            + ", ".join(unknown[:ECHOED_ITEMS])
            + (f" and {len(unknown) - ECHOED_ITEMS} more" * (len(unknown) > ECHOED_ITEMS))
            + f"{or_nearest(unknown[0], numbers)}.",
            rule=f"Ids are those of the raw data that preparation kept ({run.config.data.path}/items.parquet lists them).",
            remedy="Leave them out or correct them.",
        )
    return [numbers[raw] for raw in history]


def recommendation_text(
    run: LoadedRun, history: Sequence[str], *, k: int, explain: bool, keep_seen: bool
) -> str:
    """What `mltfr recommend` prints."""
    found = recommend(run, history, k=k, keep_seen=keep_seen)
    lines = [history_line(run, encode_history(run, history)), ""]
    if found:
        lines.append(f"{'rank':>4}  {'score':>8}  {'item':<10}  title")
    for rank, item in enumerate(found, 1):
        lines.append(
            f"{rank:>4}  {item.score:>8.4f}  {item.item_id:<10}  {item.title or ''}".rstrip()
        )
    if len(found) < k:
        left = f"These {len(found)} are" if len(found) > 1 else "This one is"
        lines += [""] * bool(found) + [
            f"{left if found else 'Nothing is'} left: all other items are in the history. "
            "`--keep-seen` lets them be recommended again."
        ]
    if explain:
        lines += ["", *explanation_lines(run, history)]
    return "\n".join(lines)


def history_line(run: LoadedRun, item_ids: Sequence[int]) -> str:
    """The history by its items' names; of a long one the end, which weighs most."""
    names = [run.items.name(item) for item in item_ids[-ECHOED_ITEMS:]]
    end = " -> ".join(names)
    if len(item_ids) <= ECHOED_ITEMS:
        return f"After: {end}"
    read = min(len(item_ids), run.config.data.max_len)
    return f"After {len(item_ids)} items, of which the model reads the last {read}: ... -> {end}"


def explanation_lines(run: LoadedRun, history: Sequence[str]) -> list[str]:
    """Kept tokens per table and gate weights for a history."""
    if run.model.mltfr is None:
        return ["This run is a bare backbone: no token tables."]
    item_ids = torch.tensor(
        [encode_history(run, history)[-run.config.data.max_len :]], device=run.device
    )
    views: list[TableView] = explain_views(run, item_ids)
    lines = [
        "What the token filter keeps for this history, and how much the router listens to each table:"
    ]
    for view in views:
        tokens = ", ".join(f"{token!r} {weight:.2f}" for token, weight in view.tokens)
        lines.append(f"  {view.table:<12} gate {view.gate_weight:.2f}  {tokens}")
    return lines


def explain_views(run: LoadedRun, item_ids: torch.Tensor) -> list[TableView]:
    """Explanation of a single history [1, L]."""
    return explain(run.model, run.inputs.tables, item_ids)[0]
