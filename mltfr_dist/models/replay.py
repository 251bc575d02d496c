"""A training pass on a GPU, recorded once for each shape of a batch and played from then on.

Small steps leave a GPU idle, for the host cannot launch their hundreds of kernels as fast as they
run. A recording (a CUDA graph) is one launch, of the same kernels over the same memory: parameters
and all else that a pass reads must stay where they are, and what differs from batch to batch is
copied to where the recorded one stood. Batches come in few shapes for that
(:meth:`SequenceBatch.in_room`).
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from mltfr_dist.data.batch import SequenceBatch
from mltfr_dist.errors import ConfigError
from mltfr_dist.models.backbone import Backbone, PositionalBackbone
from mltfr_dist.models.initial import ItemEmbedding
from mltfr_dist.models.output import TrainingOutput
from mltfr_dist.models.recommender import Recommender
from mltfr_dist.models.routing import RoutingSums

SWITCH = "MLTFR_GRAPHS"
"""Environment variable: `on` records passes. They are not where nothing is said, for no GPU has
done it yet.
"""
MOST_TRAINED = 1 << 24
"""Numbers that are trained, at most: kernels over more take longer than their launches, and each
recording holds its gradients.
"""
MOST_HELD = 16
"""Recordings that are kept; of more shapes the one that was played longest ago makes way."""


def is_asked_for() -> bool:
    """Whether passes are to be recorded."""
    return os.environ.get(SWITCH) == "on"


def why_launched(model: Recommender, device: torch.device) -> str | None:
    """Why passes of ``model`` are not recorded, as they ask for more than the shape of a batch, or
    would gain nothing; None where they can be.
    """
    backbone, mltfr = model.backbone, model.mltfr
    if device.type != "cuda":
        return "the model is not on a CUDA GPU"
    if not isinstance(backbone, PositionalBackbone) or type(backbone).pack is not Backbone.pack:
        return "its backbone computes on padding, or may ask for lengths"
    if backbone.contrasts_views:
        return "its backbone contrasts views, whose lengths are their own"
    if type(backbone.item_embedding) is not ItemEmbedding:
        return "vectors of items are made of tokens, or their rows divided or stepped one by one"
    if model.num_trained > MOST_TRAINED:
        return (
            f"it trains {model.num_trained:,} numbers, more than {MOST_TRAINED:,}: kernels take "
            "longer than their launches"
        )
    if mltfr is not None and not mltfr.reads_at_once(device):
        return (
            "not every table is read in one pass: that takes shortlists of one size, no noise, "
            "tables that are not trained, and none of the published defects"
        )
    return None


class Replay:
    """A model's training passes, each recorded when its shape first comes."""

    def __init__(self, model: Recommender) -> None:
        """Args: model: one that can be recorded, on a GPU, as it stays."""
        assert isinstance(model.backbone, PositionalBackbone)
        self.model, self.max_len = model, model.backbone.position_embedding.num_embeddings
        self.records = True
        """False: each kernel is launched, and draws the same."""
        self._parameters = list(model.parameters())
        self._holders = [m for m in model.modules() if m._buffers]
        self._held: OrderedDict[Any, Recorded] = OrderedDict()
        self._places: list[int] = []
        """Where all that passes read stood when the first of ``_held`` was made."""
        self._pool: Any = None

    def __call__(self, batch: SequenceBatch) -> TrainingOutput:
        """What :meth:`Recommender.train_on` gives, of a batch in room on the GPU.

        Raises:
            ConfigError: The pass cannot be recorded.
        """
        if self.model.mltfr is not None:
            self.model.mltfr.fetch()
        watched = torch._C._len_torch_dispatch_stack() > 0  # who counts operators is to see them
        launches = watched or not self.records
        found = Launched(self.model, batch) if launches else self._recorded(batch)
        outputs: list[TrainingOutput] = []
        trained = [p for p in self._parameters if p.requires_grad]
        sums = _Whole.apply(found, outputs, *trained)  # type: ignore[no-untyped-call]
        terms = {
            name: term._replace(sum=total)
            for (name, term), total in zip(outputs[0].terms.items(), sums, strict=True)
        }
        return outputs[0]._replace(terms=terms)

    def _recorded(self, batch: SequenceBatch) -> Recorded:
        """The recording of passes over batches like this one, which stands in it; made where there
        is none, or where what it reads has moved.
        """
        buffers = [b for m in self._holders for b in m._buffers.values() if b is not None]
        places = [t.data_ptr() for t in (*self._parameters, *buffers)]
        if places != self._places:
            self._held.clear()
            self._places = places
        tensors = tensors_of(batch)
        shape = (batch.room, *(t.shape for t in tensors))
        if shape not in self._held:
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            copy = (t.clone() if isinstance(t, Tensor) else t for t in batch)
            passes = Launched(self.model, SequenceBatch(*copy))  # type: ignore[arg-type]
            self._held[shape] = Recorded(passes, self._pool)
            if len(self._held) > MOST_HELD:
                self._held.popitem(last=False)
        self._held.move_to_end(shape)
        recorded = self._held[shape]
        for place, tensor in zip(recorded.batch, tensors, strict=True):
            place.copy_(tensor)
        return recorded


class _Pass(nn.Module):
    """A training pass as the call of a module."""

    def __init__(self, model: Recommender) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: SequenceBatch) -> TrainingOutput:
        return self.model.train_on(batch)


class Launched:
    """A pass whose kernels are launched one by one."""

    def __init__(self, model: Recommender, batch: SequenceBatch) -> None:
        """Args: model: its parameters are read where they are, by other tensors: hooks on a
        parameter are for the gradient that it gets; batch: in room.
        """
        self.batch, self._pass = batch, _Pass(model)
        self._over = {
            f"model.{name}": p.detach().requires_grad_(p.requires_grad)
            for name, p in model.named_parameters()
        }
        self._sums: list[Tensor] = []

    def forward(self) -> TrainingOutput:
        """Sums, without gradient."""
        with torch.enable_grad():
            output = cast(TrainingOutput, functional_call(self._pass, self._over, (self.batch,)))
        self._sums = [term.sum for term in output.terms.values()]
        terms = {name: t._replace(sum=t.sum.detach()) for name, t in output.terms.items()}
        return output._replace(terms=terms)

    def backward(self, of_sums: Sequence[Tensor]) -> list[Tensor | None]:
        """Gradients of the trained parameters, for those of the sums."""
        trained = [p for p in self._over.values() if p.requires_grad]
        sums, self._sums = self._sums, []
        return list(torch.autograd.grad(sums, trained, of_sums, allow_unused=True))


class Recorded:
    """A pass over batches of one shape that is played."""

    def __init__(self, passes: Launched, pool: Any) -> None:
        """Record it.

        Args:
            passes: Over a batch that stays where it is.
            pool: Memory that recordings share, as only one is played at a time and what it leaves
                is copied at once.

        Raises:
            ConfigError: It cannot be recorded.
        """
        self.batch = tensors_of(passes.batch)
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        device = passes.batch.item_ids.device
        state, stream = torch.cuda.get_rng_state(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):  # libraries choose and load what they need
            output = passes.forward()
            self._of_sums = [torch.ones_like(term.sum) for term in output.terms.values()]
            passes.backward(self._of_sums)
        torch.cuda.current_stream(device).wait_stream(stream)
        torch.cuda.set_rng_state(state, device)
        how = {"pool": pool, "stream": stream, "capture_error_mode": "thread_local"}
        try:
            with torch.cuda.graph(self._forward, **how):
                self._output = passes.forward()
            with torch.cuda.graph(self._backward, **how):
                self._gradients = passes.backward(self._of_sums)
        except RuntimeError as error:
            raise ConfigError(
                f"The training passes of this model cannot be recorded for the GPU: {error}",
                rule=f"{SWITCH}=on records passes whose kernels follow from a batch's shape.",
                remedy=f"Start it again without {SWITCH}.",
            ) from error

    def forward(self) -> TrainingOutput:
        """Sums, without gradient."""
        self._forward.replay()
        terms, routing = self._output.terms, self._output.routing
        copies = _copies([term.sum for term in terms.values()])
        pairs = zip(terms.items(), copies, strict=True)
        return TrainingOutput(
            {name: term._replace(sum=total) for (name, term), total in pairs},
            None if routing is None else RoutingSums(*_copies(routing)),
        )

    def backward(self, of_sums: Sequence[Tensor]) -> list[Tensor | None]:
        """Gradients of the trained parameters, for those of the sums."""
        for place, gradient in zip(self._of_sums, of_sums, strict=True):
            place.copy_(gradient)
        self._backward.replay()
        copies = iter(_copies([g for g in self._gradients if g is not None]))
        return [None if g is None else next(copies) for g in self._gradients]


class _Whole(torch.autograd.Function):
    """A pass as one operator: whether it is launched or played, gradients come in one order, by
    which ranks add them up.
    """

    @staticmethod
    def forward(
        ctx: Any, passes: Launched | Recorded, outputs: list[TrainingOutput], *_: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.passes = passes
        outputs.append(passes.forward())
        return tuple(term.sum for term in outputs[0].terms.values())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *of_sums: Tensor) -> tuple[Tensor | None, ...]:
        passes: Launched | Recorded = ctx.passes
        return None, None, *passes.backward(of_sums)


def tensors_of(batch: SequenceBatch) -> list[Tensor]:
    """Those that there are, in their order."""
    return [t for t in batch if isinstance(t, Tensor)]


def _copies(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """By a few launches for all."""
    return torch._foreach_mul(list(tensors), 1)
