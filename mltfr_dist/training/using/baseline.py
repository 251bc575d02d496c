"""The numbers of a baseline on a finished run's data, for `mltfr evaluate --baseline`."""

from __future__ import annotations

from pathlib import Path

from mltfr_dist.data.shards.manifest import Manifest
from mltfr_dist.distributed.meeting import start_ranks
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.training.evaluating.compare import fitted, ranker_of
from mltfr_dist.training.evaluating.evaluate import evaluate
from mltfr_dist.training.evaluating.lists import lister_by_scores, measure_lists
from mltfr_dist.training.inputs import check_recorded, load_inputs
from mltfr_dist.training.items import load_items
from mltfr_dist.training.streams import ranking_stream
from mltfr_dist.training.using.inference import check_split, finished


def evaluate_baseline(
    folder: str | Path, name: str, split: str, ranks: Ranks | None = None, *, lists: bool = False
) -> dict[str, float]:
    """The metrics of a baseline, fitted anew, on a run's data and by its protocol. All must call.

    Args:
        folder: Of the run.
        name: One of the registry (baselines.py), whether or not the run had it.
        split: "valid" or "test".
        ranks: All processes; None: those that a launcher started, or this one alone.
        lists: Whether what it recommends is measured, too (list_metrics.py).

    Raises:
        CheckpointError: No run, an unfinished one, or inputs that changed since.
        ConfigError: No such split, or a baseline that does not fit the free memory.
    """
    check_split(split)
    folder, ranks = Path(folder), ranks or start_ranks()
    config, _ = ranks.jointly(lambda: finished(folder))

    def manifest_of_run() -> Manifest:
        inputs = load_inputs(config)
        check_recorded(folder, inputs)
        return inputs.manifest

    manifest = ranks.jointly(manifest_of_run)
    scorer = fitted(name, config, manifest, ranks)
    stream = ranking_stream(config, split, ranks)
    metrics = evaluate(ranker_of(scorer, manifest), stream, config.evaluation, ranks)
    if lists:
        k, filter_seen = max(config.evaluation.cutoffs), config.evaluation.filter_seen
        best = lister_by_scores(scorer, manifest.num_items, k, filter_seen=filter_seen)
        titles = load_items(config).titles
        metrics |= measure_lists(best, split, config, manifest, ranks, titles)
    return metrics
