"""What a baseline without a training loop reaches, measured as every model is."""

from __future__ import annotations

import time

from mltfr_dist.config import RunConfig
from mltfr_dist.data.batch import RankingBatch
from mltfr_dist.data.shards.manifest import Manifest
from mltfr_dist.distributed.health import UntilStopped
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.training.evaluating import baselines
from mltfr_dist.training.evaluating.evaluate import ALL, evaluate, evaluate_slices
from mltfr_dist.training.evaluating.placing import Placer
from mltfr_dist.training.evaluating.slices import training_slices
from mltfr_dist.training.run_folder import Result
from mltfr_dist.training.streams import ranking_stream


def ranked(config: RunConfig, split: str, ranks: Ranks, by: str = "") -> UntilStopped[RankingBatch]:
    """This rank's users of a split, until a rank is asked to stop; ``by`` names the model where it is a baseline."""
    doing = f"ranking the {split} split" + (f" by {by}" if by else "")
    return UntilStopped(ranking_stream(config, split, ranks), ranks, doing)


BASELINES = ("popularity", "item_knn")


def baseline_result(
    name: str, config: RunConfig, manifest: Manifest, ranks: Ranks, *, read_test: bool
) -> Result:
    """Fit one of :data:`BASELINES` and rank with it; all ranks must call."""
    started = time.monotonic()
    train = baselines.training_sequences(config.data.path, manifest)
    if name == "item_knn":
        place: Placer = baselines.item_knn(
            train,
            manifest.num_items,
            through=lambda blocks: UntilStopped(blocks, ranks, "fitting item_knn"),
        )
    else:
        place = baselines.Popularity(train, manifest.num_items)
    seconds = time.monotonic() - started
    valid = evaluate(place, ranked(config, "valid", ranks, name), config.evaluation, ranks)
    by_slice = metrics_by_slice(place, config, manifest, ranks, name) if read_test else {}
    return Result(
        name=name,
        valid=valid,
        test=by_slice.pop(ALL, {}),
        test_slices=by_slice,
        seconds=seconds,
        world_size=ranks.world_size,
    )


def metrics_by_slice(
    place: Placer, config: RunConfig, manifest: Manifest, ranks: Ranks, by: str = ""
) -> dict[str, dict[str, float]]:
    """Metrics of the test split, of all its users and by slice."""
    slices = training_slices(config, manifest)
    stream = ranked(config, "test", ranks, by)
    return evaluate_slices(place, stream, config.evaluation, ranks, slices.NAMES, slices.members)
