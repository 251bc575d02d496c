"""What the ranks of the distributed tests do; started by torchrun, writes its findings as JSON.

Usage: worker.py TASK FOLDER OUTPUT
"""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support import REPOSITORY, tiny_config

from mltfr_dist.config import RunConfig
from mltfr_dist.data.batch import SequenceBatch
from mltfr_dist.data.stream.training import BatchLayout
from mltfr_dist.distributed import saving
from mltfr_dist.distributed.checkpoint import Progress
from mltfr_dist.distributed.engine import Engine
from mltfr_dist.distributed.fisher import fisher_diagonals
from mltfr_dist.distributed.meeting import leave, start_ranks, stop_ranks
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.distributed.state import whole_parameters
from mltfr_dist.models.recommender import Recommender
from mltfr_dist.optimizers import OPTIMIZERS
from mltfr_dist.published.consensus import batch_mean_squares
from mltfr_dist.training.build import build_model
from mltfr_dist.training.inputs import load_inputs
from mltfr_dist.training.running.step_values import step_totals
from mltfr_dist.training.streams import train_stream

STEPS = 20
HALF = 10


def no_dropout(folder: Path, stage: int, **changes: object) -> RunConfig:
    settings: dict[str, object] = {
        "backbone__dropout": 0.0,
        "mltfr__expert__dropout": 0.0,
        "optimizer__learning_rate": 0.01,
        "optimizer__weight_decay": 0.1,
        "optimizer__max_grad_norm": 0.5,
        "deepspeed": str(REPOSITORY / "ds_configs" / f"zero{stage}.json"),
    }
    return tiny_config(folder, **(settings | changes))


def steps(engine: Engine, config: RunConfig, ranks: Ranks, start: int, end: int) -> list[float]:
    """Losses of steps start..end-1."""
    stream = train_stream(config, engine.layout)
    per_epoch = stream.steps_per_epoch
    losses = []
    for step in range(start, end):
        batches = next(stream.epoch(step // per_epoch, step % per_epoch))
        totals = step_totals(engine.update(batches, step), batches)
        skipped = totals.routing is None or engine.verdict.nonfinite
        engine.module.after_update(None if skipped else totals.routing.gate)
        losses.append(totals.loss + totals.terms.get("contrast_loss", 0.0))
    return losses


def make_engine(config: RunConfig, ranks: Ranks, micro_batch_size: int | None = None) -> Engine:
    size = config.training.global_batch_size
    block = BatchLayout(
        ranks.rank, ranks.world_size, size, micro_batch_size or size // ranks.world_size
    )
    model = build_model(config, load_inputs(config), ranks, with_consensus=False)
    return Engine(model, config, ranks, block, STEPS)


def losses(folder: Path, ranks: Ranks) -> dict[str, list[float]]:
    """Per ZeRO stage, losses of 20 steps; also with micro-batches, BCE, bf16 and a bare
    backbone.
    """
    result = {}
    for stage in range(4):
        config = no_dropout(folder, stage)
        engine = make_engine(config, ranks)
        result[f"zero{stage}"] = steps(engine, config, ranks, 0, STEPS)
        engine.destroy()
    variants = {
        "accumulated": (no_dropout(folder, 2), 8),
        "bce": (no_dropout(folder, 1, loss__name="bce", loss__num_negatives=3), None),
        "bf16": (no_dropout(folder, 2, training__precision="bf16"), None),
        "bare": (no_dropout(folder, 1, mltfr__enabled=False), None),
    }
    for name, (config, micro) in variants.items():
        engine = make_engine(config, ranks, micro)
        result[name] = steps(engine, config, ranks, 0, STEPS)
        engine.destroy()
    return result


PUBLISHED_EXPERTS: dict[str, object] = {
    "published__unaligned_experts": True,
    "mltfr__consensus__group": ["second"],
    "published__random_consensus": True,
    "mltfr__consensus__learn_weight": True,
}
VARIANTS: dict[str, tuple[int, dict[str, object]]] = {
    "sasrec": (3, {"mltfr__item_tokens__source": "titles"}),
    "esasrec": (
        1,
        {
            "loss__name": "sampled_softmax",
            "loss__num_negatives": 8,
            "loss__proposal": "log_uniform",
        },
    ),
    "linrec": (
        2,
        {
            "mltfr__router__top_k": 3,
            "mltfr__router__null_expert": True,
            "mltfr__expert__per_table": 2,
        },
    ),
    "fmlp": (3, {"loss__name": "gbce", "loss__num_negatives": 3, **PUBLISHED_EXPERTS}),
    "bsarec": (0, {"mltfr__filter__noise": 0.2}),
    "bert4rec": (3, {"backbone__bert4rec__mask_ratio": 0.4}),
    "cl4srec": (
        3,
        {"backbone__cl4srec__contrast_group": 4, "backbone__cl4srec__contrast_weight": 1.0},
    ),
    "sasrec_original": (3, {"loss__name": "bce", "published__negatives_outside_inputs": True}),
}
"""ZeRO stage and settings of each backbone; MLTFR's options are spread over them."""


def backbones(folder: Path, ranks: Ranks) -> dict[str, list[float]]:
    """Losses of each backbone with MLTFR, in whole batches (at ZeRO 1) and in micro-batches (at the
    variant's stage).
    """
    result = {}
    for name, (stage, changes) in VARIANTS.items():
        for kind, micro, zero in (("whole", None, 1), ("accumulated", 4, stage)):
            config = no_dropout(folder, zero, backbone__name=name, **changes)
            engine = make_engine(config, ranks, micro)
            result[f"{name} {kind}"] = steps(engine, config, ranks, 0, HALF)
            engine.destroy()
    return result


PADDED: dict[str, tuple[int, dict[str, object]]] = {
    "fmlp_original": (
        3,
        {
            "loss__name": "bce",
            "loss__num_negatives": 2,
            "published__negatives_outside_inputs": True,
        },
    ),
    "bsarec_original": (2, {"mltfr__filter__noise": 0.2}),
    "linrec_original": (
        3,
        {
            "loss__name": "sampled_softmax",
            "loss__num_negatives": 8,
            "optimizer__item_gradients": "sparse",
            "data__long_histories": "windows",
            "data__max_len": 6,
        },
    ),
    "sasrec": (3, {"loss__name": "gbce", "mltfr__enabled": False}),
    "cl4srec": (
        1,
        {"backbone__cl4srec__contrast_group": 4, "backbone__cl4srec__contrast_weight": 1.0},
    ),
}
"""ZeRO stage and settings of backbones that are trained on prefixes; the first three padded."""


def padded(folder: Path, ranks: Ranks) -> dict[str, list[float]]:
    """Losses on prefixes, in whole batches (at ZeRO 1), in micro-batches, and these resumed."""
    result = {}
    for name, (stage, changes) in PADDED.items():
        changes = {"data__samples": "prefixes"} | changes
        config = no_dropout(folder, 1, backbone__name=name, **changes)
        engine = make_engine(config, ranks)
        result[f"{name} whole"] = steps(engine, config, ranks, 0, HALF)
        engine.destroy()
        config = no_dropout(folder, stage, backbone__name=name, **changes)
        engine = make_engine(config, ranks, 4)
        first = steps(engine, config, ranks, 0, 6)
        place = folder / f"padded-{ranks.world_size}-{name}"
        saving.save(place, engine, Progress(stage="train", step=6))
        result[f"{name} accumulated"] = [*first, *steps(engine, config, ranks, 6, HALF)]
        engine.destroy()
        result[f"{name} resumed"] = [*first, *resumed_from(config, ranks, place, 6, HALF)]
    return result


def saved(folder: Path, ranks: Ranks) -> dict[str, list[float]]:
    """Per ZeRO stage: uninterrupted and resumed losses."""
    result = {}
    for stage in range(4):
        place = folder / f"checkpoint-{ranks.world_size}-zero{stage}"
        result |= saved_and_resumed(f"zero{stage}", no_dropout(folder, stage), ranks, place)
    return result


def saved_and_resumed(
    name: str, config: RunConfig, ranks: Ranks, place: Path
) -> dict[str, list[float]]:
    """Save after half the steps, go on; and go on from the file in a new engine."""
    engine = make_engine(config, ranks)
    steps(engine, config, ranks, 0, HALF)
    saving.save(place, engine, Progress(stage="train", step=HALF))
    uninterrupted = steps(engine, config, ranks, HALF, STEPS)
    engine.destroy()
    return {
        f"{name} uninterrupted": uninterrupted,
        f"{name} resumed": resumed(config, ranks, place),
    }


def elsewhere(folder: Path, ranks: Ranks) -> dict[str, list[float]]:
    """Go on from the checkpoints that 2 ranks wrote, at this world size."""
    return {
        f"zero{stage} resumed": resumed(
            no_dropout(folder, stage), ranks, folder / f"checkpoint-2-zero{stage}"
        )
        for stage in (1, 2, 3)
    }


def resumed(config: RunConfig, ranks: Ranks, place: Path) -> list[float]:
    return resumed_from(config, ranks, place, HALF, STEPS)


def resumed_from(config: RunConfig, ranks: Ranks, place: Path, start: int, end: int) -> list[float]:
    """Losses of steps start..end-1 in a new engine that goes on from the checkpoint ``place``."""
    size = config.training.global_batch_size
    block = BatchLayout(ranks.rank, ranks.world_size, size, size // ranks.world_size)
    model = build_model(config, load_inputs(config), ranks, with_consensus=False)
    model.load_state_dict(saving.read_weights(model, place, ranks))
    engine = Engine(model, config, ranks, block, STEPS)
    saving.restore_optimizer(place, engine)
    result = steps(engine, config, ranks, start, end)
    engine.destroy()
    return result


def fisher(folder: Path, ranks: Ranks) -> dict[str, list[float]]:
    """Fisher diagonals, flattened, of a plain model at two batch sizes and of engines at stages 1
    and 3.
    """
    result = {}
    config = no_dropout(folder, 1)
    inputs = load_inputs(config)
    model = build_model(config, inputs, with_consensus=False)
    for size in (8, 32):
        stream = train_stream(
            config, BatchLayout(ranks.rank, ranks.world_size, size, size // ranks.world_size)
        )
        batches = (
            b for step in islice(stream.epoch(0), -(-50 // size)) for b in step.micro_batches
        )
        result[f"batch {size}"] = flat(fisher_diagonals(model, batches, ranks, 50))
    for micro in (4, 16 // ranks.world_size):
        stream = train_stream(config, BatchLayout(ranks.rank, ranks.world_size, 32, micro))
        result[f"batch mean {micro}"] = flat(
            batch_mean_squares(model, islice(stream.epoch(0), 2), ranks)
        )
    for stage in (1, 3):
        engine = make_engine(no_dropout(folder, stage), ranks)
        stream = train_stream(config, engine.layout)
        batches = (b for step in islice(stream.epoch(0), 2) for b in step.micro_batches)
        result[f"zero{stage}"] = flat(fisher_diagonals(engine.module, batches, ranks, 50))
        before = whole_parameters(engine)
        result[f"zero{stage} still trains"] = steps(engine, config, ranks, 0, 3)
        assert any(not torch.equal(before[name], t) for name, t in whole_parameters(engine).items())
        engine.destroy()
    return result


def offloaded(folder: Path, ranks: Ranks) -> dict[str, list[float]]:
    """Per file of ds_configs/: losses of 10 steps, in fp32 and (above stage 0) bf16; offloaded,
    also resumed.
    """
    result = {}
    for path in sorted((REPOSITORY / "ds_configs").glob("*.json")):
        for precision in ("fp32", "bf16") if path.stem != "zero0" else ("fp32",):
            config = no_dropout(folder, 0, deepspeed=str(path), training__precision=precision)
            engine = make_engine(config, ranks)
            result[f"{path.stem} {precision}"] = steps(engine, config, ranks, 0, HALF)
            if "offload" in path.stem and precision == "fp32":
                place = folder / f"offloaded-{ranks.world_size}-{path.stem}"
                saving.save(place, engine, Progress(stage="train", step=HALF))
                result[f"{path.stem} uninterrupted"] = steps(engine, config, ranks, HALF, STEPS)
                engine.destroy()
                result[f"{path.stem} resumed"] = resumed(config, ranks, place)
            else:
                engine.destroy()
    return result


def optimizers(folder: Path, ranks: Ranks) -> dict[str, list[float]]:
    """Per optimizer and some files of ds_configs/: uninterrupted and resumed losses."""
    result = {}
    for name in OPTIMIZERS:
        for file in ("zero0", "zero1", "zero2_offload", "zero3"):
            path = REPOSITORY / "ds_configs" / f"{file}.json"
            config = no_dropout(folder, 0, deepspeed=str(path), optimizer__name=name)
            place = folder / f"optimizers-{ranks.world_size}-{name}-{file}"
            result |= saved_and_resumed(f"{name} {file}", config, ranks, place)
    return result


SEARCHES: dict[str, dict[str, object]] = {
    "shortlist": {},
    "exact": {"mltfr__filter__shortlist_size": None},
    "noise": {"mltfr__filter__shortlist_size": None, "mltfr__filter__noise": 0.5},
    "random": {"mltfr__filter__strategy": "random_tokens"},
    "paper form": {
        "mltfr__filter__shortlist_size": None,
        "published__unaligned_experts": True,
        "mltfr__consensus__enabled": False,
    },
}
"""Ways to choose rows."""


def placements(folder: Path, ranks: Ranks) -> dict[str, list[float]]:
    """Per way to choose rows and placement: losses and gradients of two global batches, what a user
    keeps, and the shortlist.

    In the second batch all ranks but one have no query.
    """
    result = {}
    for search, changes in SEARCHES.items():
        for placement in ("replicated", "rows", "mmap"):
            config = no_dropout(folder, 1, mltfr__placement=placement, **changes)
            model = build_model(config, load_inputs(config), ranks, with_consensus=False)
            stream = train_stream(
                config, BatchLayout(ranks.rank, ranks.world_size, 24, 24 // ranks.world_size)
            )
            (batch,) = next(stream.epoch(0)).micro_batches
            nothing = batch._replace(
                item_ids=torch.zeros_like(batch.item_ids),
                target_ids=torch.zeros_like(batch.target_ids),
            ).counted()
            values = [refreshed(model, batch, ranks)] if model.mltfr.uses_shortlist else []
            for given in (batch, batch if ranks.is_main else nothing):
                model.zero_grad()
                output = model(given)
                (output.terms["loss"].sum + output.terms["balance_loss"].sum).backward()
                values.append(ranks.sum(output.terms["loss"].sum.detach()).view(1))
                values += [
                    ranks.sum(p.grad).flatten() for p in model.parameters() if p.grad is not None
                ]
            ids = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0]])
            values += [
                torch.cat([e.kept_ids[m].float() for e in model.eval().explain(ids)])
                for m in range(2)
            ]
            result[f"{search} {placement}"] = torch.cat(values).tolist()
    return result


def refreshed(model: Recommender, batch: SequenceBatch, ranks: Ranks) -> torch.Tensor:
    """Give the model the shortlist of a global batch; returns it, and how much of an exact search
    the one before found.
    """
    recall = model.before_update(0, [batch], ranks)
    lists = [selector.shortlist.row_ids for selector in model.mltfr.selectors]
    return torch.cat([recall, *(row_ids.float() for row_ids in lists)])


def placed_training(folder: Path, ranks: Ranks) -> dict[str, list[float]]:
    """Losses of training under ZeRO with tables placed in each way, and in bf16."""
    result = {}
    runs = {
        "replicated": (1, {}),
        "rows": (1, {}),
        "rows zero3": (3, {"mltfr__placement": "rows"}),
        "zero3": (3, {}),
        "mmap": (2, {}),
        "replicated bf16": (1, {"training__precision": "bf16"}),
        "rows bf16": (1, {"training__precision": "bf16"}),
        "mmap bf16": (1, {"training__precision": "bf16"}),
    }
    for name, (stage, changes) in runs.items():
        exact = {"mltfr__placement": name.split()[0], "mltfr__filter__shortlist_size": None}
        config = no_dropout(folder, stage, **(exact | changes))
        engine = make_engine(config, ranks)
        result[name] = steps(engine, config, ranks, 0, 5)
        if name == "zero3":
            assert not [key for key in whole_parameters(engine) if ".tables." in key]
            assert not [key for key in engine.module.state_dict() if ".tables." in key]
        engine.destroy()
    return result


def flat(states: list[dict[str, torch.Tensor]]) -> list[float]:
    return torch.cat([t.flatten() for state in states for _, t in sorted(state.items())]).tolist()


if __name__ == "__main__":
    task, folder, output = sys.argv[1:]
    all_ranks = start_ranks(1)
    tasks = [losses, saved, elsewhere, fisher, backbones, placements, placed_training, offloaded]
    tasks += [padded, optimizers]
    result = {one.__name__: one for one in tasks}[task](Path(folder), all_ranks)
    if all_ranks.is_main:
        Path(output).write_text(json.dumps(result))
    stop_ranks()
    leave()
