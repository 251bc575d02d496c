"""What a baseline without a training loop reaches, measured as every model is."""

from __future__ import annotations

import time
from pathlib import Path

from mltfr_dist.baselines import BASELINES
from mltfr_dist.config import RunConfig
from mltfr_dist.data.batch import RankingBatch
from mltfr_dist.data.shards.manifest import Manifest
from mltfr_dist.data.shards.short_parts import training_sequences
from mltfr_dist.distributed.health import UntilStopped
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.registry import load
from mltfr_dist.training.evaluating.evaluate import ALL, Keep, evaluate, evaluate_slices
from mltfr_dist.training.evaluating.rankers import ByScores, Ranker, SameForAll, Scorer
from mltfr_dist.training.evaluating.slices import training_slices
from mltfr_dist.training.evaluating.user_ranks import UserRanks
from mltfr_dist.training.run_folder import Result
from mltfr_dist.training.streams import ranking_stream

PACKAGE = "mltfr_dist.training.evaluating"


def ranked(
    config: RunConfig, split: str, ranks: Ranks, by: str = "", *, once_a_user: bool = False
) -> UntilStopped[RankingBatch]:
    """:func:`ranking_stream`, until a rank is asked to stop; ``by`` names the model where it is a
    baseline.
    """
    doing = f"ranking the {split} split" + (f" by {by}" if by else "")
    stream = ranking_stream(config, split, ranks, once_a_user=once_a_user)
    return UntilStopped(stream, ranks, doing)


def baseline_result(
    name: str,
    config: RunConfig,
    manifest: Manifest,
    ranks: Ranks,
    *,
    read_test: bool,
    ranks_file: Path | None = None,
) -> Result:
    """Fit one of ``BASELINES`` and rank with it; all ranks must call.

    Args:
        name: The baseline.
        config: The run.
        manifest: Its prepared data.
        ranks: All processes.
        read_test: Whether the test split is read.
        ranks_file: Where the ranks of users are written, if anywhere.
    """
    started = time.monotonic()
    scorer = fitted(name, config, manifest, ranks)
    seconds = time.monotonic() - started
    valid, by_slice = final_metrics(
        ranker_of(scorer, manifest), config, manifest, ranks, read_test, ranks_file, baseline=name
    )
    return Result(
        name=name,
        valid=valid,
        test=by_slice.pop(ALL, {}),
        test_slices=by_slice,
        seconds=seconds,
        world_size=ranks.world_size,
    )


def fitted(name: str, config: RunConfig, manifest: Manifest, ranks: Ranks) -> Scorer:
    """One of ``BASELINES``, fitted on the training split; all ranks must call."""
    fit = load(BASELINES[name].path, PACKAGE)
    scorer: Scorer = fit(
        training_sequences(config.data.path, manifest),
        manifest.num_items,
        through=lambda blocks: UntilStopped(blocks, ranks, f"fitting {name}"),
    )
    return scorer


def ranker_of(scorer: Scorer, manifest: Manifest) -> Ranker:
    """What ranks by a baseline's scores."""
    return scorer.count if isinstance(scorer, SameForAll) else ByScores(scorer, manifest.num_items)


def final_metrics(
    ranker: Ranker,
    config: RunConfig,
    manifest: Manifest,
    ranks: Ranks,
    read_test: bool,
    ranks_file: Path | None,
    baseline: str = "",
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Rank the validation split and, where it is read, the test split; all must call.

    Args:
        ranker: The chosen model, or a baseline.
        config: The run.
        manifest: Its prepared data.
        ranks: All processes.
        read_test: Whether the test split is read.
        ranks_file: Where the ranks of users are written, if anywhere.
        baseline: The baseline's name, where it is one.

    Returns:
        Metrics of the validation split, and :func:`metrics_by_slice`.
    """
    users, stream = UserRanks(), ranked(config, "valid", ranks, baseline)
    valid = evaluate(ranker, stream, config.evaluation, ranks, users.of("valid"))
    by_slice = {}
    if read_test:
        by_slice = metrics_by_slice(ranker, config, manifest, ranks, baseline, users.of("test"))
    if ranks_file:
        users.write(ranks_file, config, manifest, ranks, baseline=baseline)
    return valid, by_slice


def metrics_by_slice(
    ranker: Ranker,
    config: RunConfig,
    manifest: Manifest,
    ranks: Ranks,
    by: str = "",
    keep: Keep | None = None,
) -> dict[str, dict[str, float]]:
    """Metrics of the test split, of all its users and by slice; ``keep`` takes the ranks."""
    slices = training_slices(config, manifest)
    stream = ranked(config, "test", ranks, by)
    return evaluate_slices(
        ranker, stream, config.evaluation, ranks, slices.NAMES, slices.members, keep
    )
