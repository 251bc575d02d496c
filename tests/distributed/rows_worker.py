"""What the ranks of test_row_adam.py do; started by torchrun, writes its findings as JSON.

Usage: rows_worker.py TASK FOLDER OUTPUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from support import REPOSITORY
from worker import STEPS, make_engine, no_dropout, resumed, saved_and_resumed, steps

from mltfr_dist.config import OptimizerConfig, RunConfig
from mltfr_dist.data.stream.training import BatchLayout
from mltfr_dist.distributed.engine import Engine
from mltfr_dist.distributed.meeting import leave, start_ranks, stop_ranks
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.distributed.row_adam import RowAdam
from mltfr_dist.distributed.step_sums import StepSums
from mltfr_dist.models.item_rows import ItemRows
from mltfr_dist.optim import parameter_groups
from mltfr_dist.training.build import build_model
from mltfr_dist.training.inputs import load_inputs
from mltfr_dist.training.running.step_values import step_totals
from mltfr_dist.training.streams import train_stream

SAMPLED = {"loss__name": "sampled_softmax", "loss__num_negatives": 8}


def sparse(folder: Path, stage: int, **changes: object) -> RunConfig:
    return no_dropout(
        folder, stage, **(SAMPLED | {"optimizer__item_gradients": "sparse"} | changes)
    )


def offloaded(stage: int) -> dict[str, object]:
    return {"deepspeed": str(REPOSITORY / "ds_configs" / f"zero{stage}_offload.json")}


VARIANTS: dict[str, tuple[int, int | None, dict[str, object]]] = {
    "zero0": (0, None, {}),
    "zero1": (1, None, {}),
    "zero2": (2, None, {}),
    "zero3": (3, None, {}),
    "zero2 offload": (2, None, offloaded(2)),
    "zero3 offload": (3, None, offloaded(3)),
    "accumulated zero0": (0, 4, {}),
    "accumulated zero3": (3, 8, {}),
    "unclipped": (1, None, {"optimizer__max_grad_norm": None}),
    "bce": (
        1,
        None,
        {
            "loss__name": "bce",
            "loss__num_negatives": 2,
            "published__negatives_outside_inputs": True,
        },
    ),
    "gbce bert4rec": (
        3,
        8,
        {"loss__name": "gbce", "loss__num_negatives": 3, "backbone__name": "bert4rec"},
    ),
    "cl4srec": (2, 4, {"backbone__name": "cl4srec", "backbone__cl4srec__contrast_group": 4}),
    "titles": (3, 8, {"mltfr__item_tokens__source": "titles"}),
    "bf16 zero3": (3, None, {"training__precision": "bf16"}),
}
"""ZeRO stage, micro-batch and settings."""


def losses(folder: Path, ranks: Ranks) -> dict[str, list[float]]:
    """Losses of each variant; on one rank also of the references."""
    result = {}
    for name, (stage, micro, changes) in VARIANTS.items():
        config = sparse(folder, stage, **changes)
        engine = make_engine(config, ranks, micro)
        result[name] = steps(engine, config, ranks, 0, STEPS)
        assert replicas_are_equal(engine, ranks), name
        assert "item_embedding" not in "".join(
            name for name, _ in engine.module.named_parameters() if "adapter" not in name
        )
        engine.destroy()
    if ranks.world_size == 1:
        for name in ("zero1", "bce", "unclipped"):
            result[f"{name} reference"] = reference(sparse(folder, 1, **VARIANTS[name][2]), ranks)
        config = no_dropout(folder, 1, **SAMPLED)
        engine = make_engine(config, ranks)
        result["dense"] = steps(engine, config, ranks, 0, STEPS)
        engine.destroy()
    return result


def replicas_are_equal(engine: Engine, ranks: Ranks) -> bool:
    (table,) = [m.weight for m in engine.module.modules() if isinstance(m, ItemRows)]
    everywhere = ranks.gather(table)
    return (
        table.dtype == torch.float32
        and bool((everywhere == everywhere[0]).all())
        and not table[0].any()
    )


def reference(config: RunConfig, ranks: Ranks) -> list[float]:
    """A plain loop without DeepSpeed: torch's own sparse embedding under SparseAdam, all else under
    AdamW.
    """
    dense = config.model_copy(
        update={"optimizer": config.optimizer.model_copy(update={"item_gradients": "dense"})}
    )
    model = build_model(dense, load_inputs(config), with_consensus=False)
    embedding = model.backbone.item_embedding
    embedding.sparse = True
    groups = parameter_groups(model, config.optimizer.weight_decay)
    for group in groups:
        group["params"] = [p for p in group["params"] if p is not embedding.weight]
    options = {"lr": config.optimizer.learning_rate, "betas": config.optimizer.betas}
    optimizers = [
        torch.optim.AdamW(groups, **options),
        torch.optim.SparseAdam([embedding.weight], **options),
    ]
    stream = train_stream(config, BatchLayout(0, 1, 32, 32))
    result = []
    for step in range(STEPS):
        batches = next(stream.epoch(step // stream.steps_per_epoch, step % stream.steps_per_epoch))
        output = model(batches.micro_batches[0])
        balance = (
            config.mltfr.router.balance_weight
            * output.terms["balance_loss"].sum
            / batches.num_positions
        )
        (output.terms["loss"].sum / batches.num_targets + balance).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        values = [(g.coalesce().values() if g.is_sparse else g) for g in gradients]
        norm = torch.stack([v.square().sum() for v in values]).sum().sqrt()
        if config.optimizer.max_grad_norm is not None:
            for gradient in gradients:
                gradient.mul_(min(1.0, config.optimizer.max_grad_norm / (float(norm) + 1e-6)))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        sums = StepSums([output])
        totals = step_totals(sums.output(sums.vector), batches)
        model.after_update(totals.routing.gate)
        result.append(totals.loss)
    return result


def gradients(folder: Path, ranks: Ranks) -> dict[str, list[float]]:
    """Per variant: largest difference of the rows' gradient from the dense one's, that one's size,
    and the norms of both.
    """
    result = {}
    for name, stage, micro in (("zero1", 1, None), ("zero3", 3, None), ("accumulated", 2, 4)):
        config = sparse(folder, stage)
        engine = make_engine(config, ranks, micro)
        batches = next(train_stream(config, engine.layout).epoch(0))
        whole = next(train_stream(config, BatchLayout(0, 1, 32, 32)).epoch(0))
        plain = build_model(
            no_dropout(folder, stage, **SAMPLED), load_inputs(config), with_consensus=False
        )
        output = plain(whole.micro_batches[0])
        balance = config.mltfr.router.balance_weight * output.terms["balance_loss"].sum
        balance = balance / whole.num_positions
        (output.terms["loss"].sum / whole.num_targets + balance).backward()
        expected = plain.backbone.item_embedding.weight.grad
        given, step = torch.zeros_like(expected), engine.row_adam.step
        clipped = []

        def recorded(
            rate: float, scale: float, engine=engine, given=given, step=step, clipped=clipped
        ) -> None:
            given[engine.row_adam.ids] = engine.row_adam.gradients
            clipped.append(scale)
            step(rate, scale)

        engine.row_adam.step = recorded
        engine.update(batches, 0)
        norm = (
            torch.stack([p.grad.square().sum() for p in plain.parameters() if p.grad is not None])
            .sum()
            .sqrt()
        )
        difference = (ranks.sum(given) - expected).abs().max()
        result[name] = [
            float(difference),
            float(expected.abs().max()),
            engine.grad_norm(),
            float(norm),
            *clipped,
        ]
        engine.destroy()
    return result | exchanged(ranks)


SAVED = {
    "zero0": (0, {}),
    "zero1": (1, {}),
    "zero3": (3, {}),
    "bf16": (2, {"training__precision": "bf16"}),
}


def saved(folder: Path, ranks: Ranks) -> dict[str, list[float]]:
    """Uninterrupted and resumed losses."""
    result = {}
    for name, (stage, changes) in SAVED.items():
        place = folder / f"rows-{ranks.world_size}-{name}"
        result |= saved_and_resumed(name, sparse(folder, stage, **changes), ranks, place)
    return result


def elsewhere(folder: Path, ranks: Ranks) -> dict[str, list[float]]:
    """Go on from the checkpoints that 2 ranks wrote, at this world size."""
    return {
        f"{name} resumed": resumed(
            sparse(folder, stage, **changes), ranks, folder / f"rows-2-{name}"
        )
        for name, (stage, changes) in SAVED.items()
    }


def exchanged(ranks: Ranks) -> dict[str, list[float]]:
    """Bytes that three updates bring this rank, by the rows of the table."""
    result = {}
    for num_rows in (1_000, 1_000_000):
        rows = ItemRows(nn.Embedding(num_rows, 8, padding_idx=0))
        adam = RowAdam("table", rows, OptimizerConfig(), ranks)
        generator = torch.Generator().manual_seed(ranks.rank)
        for step in range(3):
            if step < 2 or ranks.is_main:  # in the last, all ranks but one have nothing
                rows(torch.randint(1000, (4, 25), generator=generator)).square().sum().backward()
            adam.collect()
            adam.reduce()
            adam.step(0.1, 1.0)
        result[f"{num_rows} rows"] = [float(v) for _, v in sorted(adam.exchange.received.items())]
    return result


if __name__ == "__main__":
    task, where, output = sys.argv[1:]
    all_ranks = start_ranks(1)
    result = {one.__name__: one for one in (losses, gradients, saved, elsewhere)}[task](
        Path(where), all_ranks
    )
    if all_ranks.is_main:
        Path(output).write_text(json.dumps(result))
    stop_ranks()
    leave()
