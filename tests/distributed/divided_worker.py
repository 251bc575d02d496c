"""What the ranks of test_divided_items.py do; started by torchrun, writes its findings as JSON.

Usage: divided_worker.py TASK FOLDER OUTPUT
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from worker import make_engine, no_dropout, resumed_from, steps

from mltfr_dist.backbones import BACKBONES
from mltfr_dist.config import RunConfig
from mltfr_dist.distributed import checkpoint, saving
from mltfr_dist.distributed.checkpoint import MODEL, Progress
from mltfr_dist.distributed.item_division import RankDivision
from mltfr_dist.distributed.meeting import leave, start_ranks, stop_ranks
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.errors import MltfrError, OtherRankError
from mltfr_dist.models.cross_entropy import full_cross_entropy
from mltfr_dist.models.divided_rows import DividedRows, divided_rows
from mltfr_dist.models.initial import ItemEmbedding
from mltfr_dist.models.rank_counts import LogNormaliser, count_better
from mltfr_dist.models.tiles import Pairs, exact_scores
from mltfr_dist.models.top_items import top_items

SAMPLED = {"loss__name": "sampled_softmax", "loss__num_negatives": 8}
SPARSE = SAMPLED | {"optimizer__item_gradients": "sparse"}

STEPS = 5
Variants = dict[str, tuple[int, int | None, dict[str, object]]]
QUICK: Variants = {
    "sampled, sparse": (1, None, SPARSE),
    "sampled, dense, accumulated": (3, 2, SAMPLED),
    "cross-entropy": (0, None, {}),
    "cross-entropy, titles": (
        2,
        2,
        {"backbone__name": "bert4rec", "mltfr__item_tokens__source": "titles"},
    ),
}
"""ZeRO stage, micro-batch and settings."""

FURTHER: Variants = {
    "bce, unclipped": (
        2,
        None,
        {"loss__name": "bce", "loss__num_negatives": 2, "optimizer__max_grad_norm": None},
    ),
    "gbce, sparse, titles": (
        3,
        4,
        {
            "loss__name": "gbce",
            "loss__num_negatives": 3,
            "optimizer__item_gradients": "sparse",
            "mltfr__item_tokens__source": "titles",
        },
    ),
    "cl4srec": (3, 4, {"backbone__name": "cl4srec", "backbone__cl4srec__contrast_group": 4}),
    "esasrec, adam": (1, None, {"backbone__name": "esasrec", "optimizer__name": "adam"}),
    "fmlp, sgd": (3, None, {"backbone__name": "fmlp", "optimizer__name": "sgd"}),
    "linrec_original": (
        2,
        None,
        SAMPLED | {"backbone__name": "linrec_original", "data__samples": "prefixes"},
    ),
    "bf16": (3, None, {"training__precision": "bf16"}),
    "bf16, sparse": (1, None, SPARSE | {"training__precision": "bf16"}),
}


def placed(folder: Path, placement: str, stage: int, changes: dict[str, object]) -> RunConfig:
    fixed = {"item_table__placement": placement, "training__global_batch_size": 24}
    return no_dropout(folder, stage, **(fixed | changes))


def losses(folder: Path, ranks: Ranks, variants: Variants = QUICK) -> dict[str, list[float]]:
    """Losses of each variant with each placement, and the norm of the last gradient."""
    result = {}
    for name, (stage, micro, changes) in variants.items():
        for placement in ("replicated", "rows"):
            config = placed(folder, placement, stage, changes)
            engine = make_engine(config, ranks, micro)
            rows = divided_rows(engine.module)
            assert (rows is not None) == (placement == "rows" and ranks.world_size > 1)
            if rows is not None:
                assert rows.weight.dtype == torch.float32
                assert len(rows.weight) <= -(-rows.num_embeddings // ranks.world_size)
            result[f"{name} {placement}"] = steps(engine, config, ranks, 0, STEPS)
            result[f"{name} {placement}"].append(engine.grad_norm() or 1.0)
            engine.destroy()
    return result


def further(folder: Path, ranks: Ranks) -> dict[str, list[float]]:
    return losses(folder, ranks, FURTHER)


def backbones(folder: Path, ranks: Ranks) -> dict[str, list[float]]:
    """Losses of every backbone of the registry, at all stages in turn."""
    variants: Variants = {}
    for number, (name, entry) in enumerate(BACKBONES.items()):
        needed: dict[str, object] = {"backbone__name": name}
        if entry.reads_future:
            needed["data__samples"] = "prefixes"
        if name == "cl4srec":
            needed["backbone__cl4srec__contrast_group"] = 4
        variants[name] = (number % 4, None, needed)
    return losses(folder, ranks, variants)


SAVED: dict[str, tuple[int, dict[str, object]]] = {
    "sparse": (3, SPARSE),
    "cross-entropy": (1, {"mltfr__item_tokens__source": "titles"}),
}


def saved(folder: Path, ranks: Ranks) -> dict[str, list[float]]:
    """Losses that go on, and losses resumed, with each placement; the ranks' own rows and moments
    after it.
    """
    result = {}
    for name, (stage, changes) in SAVED.items():
        for placement in ("replicated", "rows"):
            config = placed(folder, placement, stage, changes)
            place = folder / f"{name}-{placement}"
            engine = make_engine(config, ranks)
            steps(engine, config, ranks, 0, STEPS)
            saving.save(place, engine, Progress(stage="train", step=STEPS))
            result[f"{name} {placement} goes on"] = steps(engine, config, ranks, STEPS, 2 * STEPS)
            engine.destroy()
    a_full_disk_on_one_rank(folder, ranks)
    return result | elsewhere(folder, ranks)


def a_full_disk_on_one_rank(folder: Path, ranks: Ranks) -> None:
    """All ranks say so, what was saved before stays, and the run can go on."""
    place = folder / "full"
    engine = make_engine(placed(folder, "rows", 1, SPARSE), ranks)
    saving.save(place, engine, Progress(stage="train", step=1, skipped_steps=1))
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if ranks.is_main else 500, hard))
    expected = (MltfrError, "could not be written") if ranks.is_main else (OtherRankError, "")
    with pytest.raises(expected[0], match=expected[1]):
        saving.save(place, engine, Progress(stage="train", step=2, skipped_steps=2))
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    ranks.barrier()
    assert not list(folder.glob(".partial-*"))
    assert checkpoint.read_header(place).progress.step == 1
    checkpoint.verify_with_rows(place, MODEL)
    saving.save(place, engine, Progress(stage="train", step=3, skipped_steps=3))
    assert saving.progress_for_all(place, ranks).step == 3
    engine.destroy()


def elsewhere(folder: Path, ranks: Ranks) -> dict[str, list[float]]:
    """Losses resumed from what 2 ranks saved with each placement, with each placement."""
    result = {}
    for name, (stage, changes) in SAVED.items():
        for written, read in (("rows", "rows"), ("rows", "replicated"), ("replicated", "rows")):
            config = placed(folder, read, stage, changes)
            place = folder / f"{name}-{written}"
            result[f"{name} {written} {read}"] = resumed_from(
                config, ranks, place, STEPS, 2 * STEPS
            )
    return result


NUM_ITEMS, DIM = 10_000, 8


def cross_entropy(folder: Path, ranks: Ranks) -> dict[str, list[float]]:
    """Largest differences from the whole softmax in float64, by loss, gradient of hidden states and
    of rows; one rank has no position.
    """
    result = {}
    for dtype in (torch.float32, torch.float64):
        generator = torch.Generator().manual_seed(3)
        weight = torch.randn(NUM_ITEMS + 2, DIM, generator=generator, dtype=dtype)
        weight[0] = 0
        counts = [40 + 7 * rank for rank in range(ranks.world_size)]
        counts[-1] *= ranks.world_size == 1
        hidden = 4 * torch.randn(sum(counts), DIM, generator=generator, dtype=dtype)
        targets = torch.randint(1, NUM_ITEMS + 1, (sum(counts),), generator=generator)
        weights = torch.rand(sum(counts), generator=generator, dtype=dtype)
        exact, whole = (t.double().clone().requires_grad_() for t in (hidden, weight))
        items = whole[1 : NUM_ITEMS + 1]
        expected = full_cross_entropy(exact, items, targets, weights.double())
        (expected / 7).backward()
        mine = slice(sum(counts[: ranks.rank]), sum(counts[: ranks.rank + 1]))
        rows = DividedRows(ItemEmbedding(NUM_ITEMS + 2, DIM), RankDivision(NUM_ITEMS + 2, ranks))
        rows.weight, rows.dtype = weight[rows.division.own_ids], dtype
        own, block = rows.own_vectors(), hidden[mine].clone().requires_grad_()
        given = rows.division.cross_entropy(block, own, targets[mine], weights[mine], NUM_ITEMS)
        (given / 7).backward()
        differences = [
            abs(float(ranks.sum(given.detach()) - expected)) / float(expected),
            largest(block.grad - exact.grad[mine]) / largest(exact.grad),
            largest(rows.take_own_gradients()[0] - whole.grad[rows.division.own_ids])
            / largest(whole.grad),
        ]
        result[str(dtype)] = ranks.max(torch.tensor(differences, dtype=torch.float64)).tolist()
    return result


def positions(folder: Path, ranks: Ranks) -> dict[str, list[float]]:
    """Differences of counts and normalisers from those over whole items, ties included, and lists
    that are the same; one rank has no user.
    """
    generator = torch.Generator().manual_seed(5)
    distinct = torch.randn(NUM_ITEMS // 3, DIM, generator=generator)
    weight = distinct[torch.arange(NUM_ITEMS + 2) % len(distinct)]
    weight[-1] *= 100  # a mask, which would be best
    counts = [12 + 5 * rank for rank in range(ranks.world_size)]
    counts[-1] *= ranks.world_size == 1
    hidden = 3 * torch.randn(sum(counts), DIM, generator=generator)
    targets = torch.randint(1, NUM_ITEMS + 1, (sum(counts),), generator=generator)
    rows = torch.arange(sum(counts)).repeat(40)
    seen = torch.randint(1, NUM_ITEMS + 1, (len(rows),), generator=generator)
    exclude = Pairs(torch.cat([rows, rows[: len(hidden)]]), torch.cat([seen, targets]))
    scores, whole = exact_scores(hidden, weight[targets]), LogNormaliser(hidden)
    expected = count_better(
        hidden, weight[1 : NUM_ITEMS + 1], scores, exclude=exclude, normaliser=whole
    )
    start, end = sum(counts[: ranks.rank]), sum(counts[: ranks.rank + 1])
    mine = (exclude.rows >= start) & (exclude.rows < end)
    division = RankDivision(NUM_ITEMS + 2, ranks)
    result, value = division.count_better(
        hidden[start:end],
        weight[division.own_ids],
        scores[start:end],
        Pairs(exclude.rows[mine] - start, exclude.item_ids[mine]),
        NUM_ITEMS,
        normalise=True,
    )
    assert result.better.dtype == torch.int64
    best = top_items(hidden, weight[1 : NUM_ITEMS + 1], LISTED, exclude=exclude)
    seen_here = Pairs(exclude.rows[mine] - start, exclude.item_ids[mine])
    own = division.top_items(
        hidden[start:end], weight[division.own_ids], LISTED, seen_here, NUM_ITEMS
    )
    assert all(torch.equal(a, b[start:end]) for a, b in zip(own, best, strict=True))
    differences = [largest(a - b[start:end]) for a, b in zip(result, expected, strict=True)]
    differences.append(largest(value - whole.value[start:end]))
    everyone = ranks.max(torch.tensor(differences, dtype=torch.float64)).tolist()
    return {"differences": everyone, "ties": [float(expected.equal.sum())]}


LISTED = NUM_ITEMS - 5
"""More than are left to users who have seen many."""


def largest(values: torch.Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


if __name__ == "__main__":
    task, where, output = sys.argv[1:]
    all_ranks = start_ranks(1)
    tasks = (losses, further, backbones, cross_entropy, saved, elsewhere, positions)
    result = {one.__name__: one for one in tasks}[task](Path(where), all_ranks)
    if all_ranks.is_main:
        Path(output).write_text(json.dumps(result))
    stop_ranks()
    leave()
