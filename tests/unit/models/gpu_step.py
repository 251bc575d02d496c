"""Whole training steps and ranking batches on a GPU that is not there; run by test_gpu_step.py.

python gpu_step.py FOLDER OUTPUT FIELD...

Tensors have shapes and a device and no numbers (torch's FakeTensorMode), and an operator over two
devices is an error. A torch without CUDA has no guards for device `cuda`, so the device is one that
torch lets a test register. It is registered for good, so this is a process of its own. Where a
step asks for numbers, it gets the answer that asks for the most work: all places of a mask, all
values distinct, every comparison true.

Three are no fields. `a batch in room` changes none, over a batch of the shape of recorded passes;
`every token searched` and `every token searched, slow in float64` search whole tables, on a GPU
that does float64 at half its rate in fp32, as all others here, and on one that does not.
Not covered: DeepSpeed's own step (the optimizer is stepped as DeepSpeed would), SGD's fused kernel,
collectives, a shortlist's refresh (run, not counted), and what kernels compute.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from changes import CHANGES, WITH
from support import tiny_config
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import mltfr_dist
from mltfr_dist.config import RunConfig
from mltfr_dist.data.stream.training import BatchLayout, StepBatches
from mltfr_dist.distributed.health import Health
from mltfr_dist.distributed.ranks import ALONE, Ranks
from mltfr_dist.distributed.step_sums import StepSums
from mltfr_dist.models import search
from mltfr_dist.models.recommender import Recommender
from mltfr_dist.optim import build_optimizer
from mltfr_dist.optimizers import OPTIMIZERS
from mltfr_dist.training.build import build_model
from mltfr_dist.training.inputs import load_inputs
from mltfr_dist.training.running.step_values import step_totals
from mltfr_dist.training.streams import ranking_stream, train_stream

PACKAGE = Path(mltfr_dist.__file__).parent
CARD = "card"
ROOM = "a batch in room"
WHOLE, WHOLE_SLOW = "every token searched", "every token searched, slow in float64"
NO_SHORTLIST = {"mltfr.filter.shortlist_size": None}
aten = torch.ops.aten


class WithoutDevice(FakeTensorMode):
    """Never asks the device itself for anything."""

    avoid_device_init = True


def is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype == torch.bool


def as_numbers(index: Tensor | None) -> list[Tensor | None]:
    """An index by numbers, as many as a mask has places."""
    if index is None or not is_mask(index):
        return [index]
    return list(index.new_empty((index.ndim, index.numel()), dtype=torch.int64).unbind(0))


class Waits(TorchDispatchMode):
    """Answers what only a device could, and counts by file and function of the package what waits
    for one, and what is copied to or from it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def note(self, what: str) -> None:
        frame: Any = sys._getframe(2)
        while frame is not None and not Path(frame.f_code.co_filename).is_relative_to(PACKAGE):
            frame = frame.f_back
        place = "elsewhere"
        if frame is not None:
            path = Path(frame.f_code.co_filename).relative_to(PACKAGE).as_posix()
            place = f"{path} {frame.f_code.co_name}"
        self.found[f"{place}: {what}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            if args[0].device.type == CARD:
                self.note("number")
            kind = args[0].dtype
            return True if kind == torch.bool else 1.0 if kind.is_floating_point else 1
        if func is aten.nonzero.default:
            self.note("nonzero")
            return args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.int64)
        if func is aten._unique2.default:
            self.note("unique")
            counts = torch.empty_like(args[0], dtype=torch.int64)
            return args[0].new_empty(args[0].numel()), counts, counts.new_empty(0)
        if func in (aten.index.Tensor, aten.index_put_.default) and any(map(is_mask, args[1])):
            self.note("mask")
            args = (args[0], [block for index in args[1] for block in as_numbers(index)], *args[2:])
        out = func(*args, **kwargs)
        if func in (aten._to_copy.default, aten.copy_.default):
            source = args[1] if func is aten.copy_.default else args[0]
            if out.device != source.device:
                late = ", not waited for" if kwargs.get("non_blocking") else ""
                self.note(f"{source.device.type} to {out.device.type}{late}")
        return out


def faked(mode: FakeTensorMode, batch: Any) -> Any:
    """A batch without numbers."""
    blocks = (mode.from_tensor(t) if isinstance(t, Tensor) else t for t in batch)
    return type(batch)(*blocks)


def train(model: Recommender, config: RunConfig, batches: StepBatches, given: Any) -> Counter[str]:
    """One step as :meth:`Engine.update` makes it; what waits."""
    ranks = Ranks(0, 1, torch.device(CARD, 0))
    skips = OPTIMIZERS[config.optimizer.name].skips_on_device
    optimizer = build_optimizer(model, config.optimizer, fused=skips)
    health = Health(model, optimizer, ranks, skips_on_device=skips)
    model.train()
    model.before_update(0, given, ranks)
    with Waits() as waits:
        output, counts = model(given[0].to(ranks.device)), batches.counts()
        means = [t.weight * (t.sum / counts[t.over]) for t in output.terms.values()]
        loss = sum(means[1:], means[0])
        loss.backward()
        health.note_loss(loss)
        sums = StepSums([output])
        told = health.agree(sums.vector)
        optimizer.step()
        optimizer.zero_grad()
        totals = step_totals(sums.output(health.read(told)), batches)
        model.after_update(None if totals.routing is None else totals.routing.gate)
    return waits.found


def tried(folder: Path, field: str) -> dict[str, int]:
    """A step and a ranking batch of the configuration; what waits in the step."""
    changes = {**WITH.get(field, {}), **({field: CHANGES[field]} if field in CHANGES else {})}
    changes |= NO_SHORTLIST if field in (WHOLE, WHOLE_SLOW) else {}
    search.is_fast_in_float64 = lambda _: field != WHOLE_SLOW  # the device itself cannot say
    dotted = {key.replace(".", "__"): value for key, value in changes.items()}
    config = tiny_config(folder, **dotted)
    consensus = config.mltfr.enabled and config.mltfr.consensus.enabled
    model = build_model(config, load_inputs(config, verify=False), with_consensus=consensus)
    size = config.training.global_batch_size
    batches = next(train_stream(config, BatchLayout(0, 1, size, size)).epoch(0))
    users = next(iter(ranking_stream(config, "valid", ALONE)))
    mode = WithoutDevice(allow_non_fake_inputs=True)
    with mode, Waits():
        model.to(torch.device(CARD, 0))
        given = [faked(mode, batch) for batch in batches.micro_batches]
        if field == ROOM:
            given = [batch.in_room(config.data.max_len) for batch in given]
        asking = faked(mode, users)
        mode.allow_non_fake_inputs = False  # from here on a tensor on the CPU is a fault
        result = train(model, config, batches, given)
        model.eval()
        with torch.no_grad():
            scores = model(asking.to(torch.device(CARD, 0)))
    assert scores.device.type == CARD
    assert scores.shape == (len(users.item_ids), model.num_items + 1)
    assert all(p.device.type == CARD for p in model.parameters())
    return dict(result)


def main() -> None:
    folder, output, *fields = sys.argv[1:]
    _setup_privateuseone_for_python_backend(CARD)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    result: dict[str, Any] = {}
    for field in fields:
        try:
            result[field] = tried(Path(folder), field)
        except Exception:
            result[field] = {"error": traceback.format_exc()[-3000:]}
    Path(output).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
